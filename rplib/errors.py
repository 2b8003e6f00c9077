"""Errors that a user can mend."""


class UserError(Exception):
    """A foreseeable mistake: its text is one sentence with the remedy.

    The command line prints it as one line and leaves with exit code 2; it never shows a traceback for it.
    """
