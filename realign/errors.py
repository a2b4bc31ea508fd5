"""The one exception a user is meant to read."""


class RefusedError(ValueError):
    """Input or configuration refused before any work. The message names the place, the value and
    the remedy.

    The command line ends with exit code 2 and prints the message without a traceback.
    """
