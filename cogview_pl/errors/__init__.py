"""The exception for errors that the user can fix."""


class UserError(Exception):
    """Bad input or configuration.

    The message is one line: it names the key or file, the value found, and a remedy. The command line prints it and
    exits with code 2. Other exceptions are bugs and keep their traceback.
    """
