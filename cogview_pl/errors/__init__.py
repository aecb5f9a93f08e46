"""The exception for errors that the user can mend."""


class UserError(Exception):
    """Bad input or configuration.

    The message is one line that names the key or file, what was found, and what to do. The command line prints it and
    exits with code 2. Other exceptions are defects of ours and keep their traceback.
    """
