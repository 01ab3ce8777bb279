"""The exceptions that speak to a user: what is wrong, with the value, and the cure."""

LONGEST = 4000
"""Characters of a message."""
_JOINERS = "\u200c\u200d"
"""Parts of words in some scripts, and of pictographs, though Python calls them not printable."""


def printable(text: str, keep: str = "") -> str:
    """Text that any terminal, log or JSON document may show.

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
    """Something the user can mend. Its text is one clear sentence that says what and how.

    Jobs print it without a traceback and exit with status 2 (`raylarge.report.entry`). Names of
    files and values of users may stand in it as they are: it shows them by `printable`.
    """

    def __init__(self, text: str = "") -> None:
        """Take the sentence."""
        super().__init__(printable(text))


class MissingResource(Exception):
    """What a file needs and this machine has not (a package, room): the end of a sentence.

    Whoever knows the file puts its name before it.
    """


class SlideError(UserError):
    """Something wrong with one slide's own files: a run over many may go on without it.

    What the machine lacks (a package, room, a store that answers) is none: it would take every
    slide of the run for a bad one.
    """
