"""What the harness raises for input that it cannot use. Imports nothing, so that every file of the harness can use it."""


class InputError(ValueError):
    """What the user gave, files or options, cannot be used; the message says why in one line per fault."""


class DataError(InputError):
    """Input files that cannot be used; the message has one line per fault: file, line number, what was expected."""


class EmptyError(DataError):
    """A file without any row: of several test sets, it is the one to pass over."""


class ElsewhereError(InputError):
    """Another process of the run has failed, and says why; this one ends without a word."""
