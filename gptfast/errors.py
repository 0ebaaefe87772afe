"""The two exception types that reach a user for bad input; everything else that escapes is a defect of gptfast."""


def shown(value: object) -> str:
    """A value as an error names it: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


class Error(ValueError):
    """Bad input: one line that names the thing, the value and what is allowed."""


class LoadError(Error, OSError):
    """A file or folder that cannot be read as what it should be: missing, truncated, of another version, malformed."""

    def __str__(self) -> str:  # OSError's own __str__ would print "[Errno ...]" pieces when given two arguments
        return str(self.args[0]) if self.args else ""
