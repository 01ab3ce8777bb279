"""The exceptions that speak to a user: what is wrong, with the value, and the cure."""


class UserError(Exception):
    """Something the user can mend. Its text is one clear sentence that says what and how.

    Jobs print it without a traceback and exit with status 2 (`raylarge.report.entry`).
    """


class Lack(Exception):
    """What a file needs and this machine has not (a package, room): the end of a sentence.

    Whoever knows the file puts its name before it.
    """


class SlideError(UserError):
    """Something wrong with one slide's own files: a run over many may go on without it.

    What the machine lacks (a package, room, a store that answers) is none: it would take every
    slide of the run for a bad one.
    """
