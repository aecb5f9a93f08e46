"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """Bad input or configuration.

    The message is one line that names the key or file, what was found and what to do. `run.py` prints it and
    exits with code 2; anything else that escapes is a defect of ours and keeps its traceback.
    """
