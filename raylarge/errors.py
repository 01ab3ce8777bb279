"""Exceptions whose messages are for users: what is wrong, with the value, and the cure."""

LONGEST = 4000
"""Characters of a message."""
_JOINERS = "\u200c\u200d"
"""Parts of words in some scripts, and of pictographs, though Python calls them not printable."""


def printable(text: str, keep: str = "") -> str:
    """Return a text that any terminal, log or JSON document may show.

    Control characters, marks that turn the direction of writing, and the surrogates by which
    Python stands for bytes that are no text are escaped as in Python's source (`\\n`, `\\u202e`);
    the middle of what is longer than LONGEST is left out.

    Args:
        text: a message with names and values of a user.
        keep: characters to leave as they are, such as a line break of our own.
    """
    if len(text) > LONGEST:
        head, tail = text[: LONGEST // 2], text[-LONGEST // 2 :]
        text = f"{head} [... {len(text) - LONGEST:,} characters ...] {tail}"
    if text.isprintable():
        return text
    return "".join(
        one
        if one.isprintable() or one in keep or one in _JOINERS
        else one.encode("unicode_escape").decode()
        for one in text
    )


class UserError(Exception):
    """An error that the user can fix; its message is one sentence with the cause and the cure.

    Jobs print it without a traceback and exit with status 2 (`raylarge.report.entry`). It may
    contain file names and values as they are: `printable` escapes them.
    """

    def __init__(self, text: str = "") -> None:
        """Take the sentence."""
        super().__init__(printable(text))


class MissingResource(Exception):
    """A sentence on what this machine lacks to read a file (a package, room), and the cure.

    The caller that knows the file's path adds it.
    """


class SlideError(UserError):
    """An error in one slide's own files; a run over many slides may continue without it.

    A resource that the machine lacks (a package, room, a store) is no such error: it would
    concern every slide of the run.
    """
