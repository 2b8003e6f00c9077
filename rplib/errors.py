"""Errors that a user can fix."""


class UserError(Exception):
    """A user error; its message is one sentence that includes the remedy.

    The command line prints it as one line, without a traceback, and exits with code 2.
    """
