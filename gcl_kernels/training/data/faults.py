"""How faults are worded: one line each, whatever the input holds."""

from __future__ import annotations

LINES_SHOWN = 10
"""Bad rows quoted in an error or a report; the rest are counted."""

LONGEST_QUOTE = 300
"""Characters of an input value that a message repeats."""


def one_line(text: str) -> str:
    """`text` with line ends, control characters and what UTF-8 cannot hold written as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def quoted(value: object) -> str:
    """A value from a file as a message shows it: in quotes, on one line, its start if it is long."""
    text = str(value)
    return f"'{one_line(text[:LONGEST_QUOTE])}{'...' if len(text) > LONGEST_QUOTE else ''}'"


def reason(error: BaseException) -> str:
    """What other people's code says is wrong, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return quoted(error.strerror)
    lines = str(error).strip().splitlines()
    return quoted(lines[0] if lines else type(error).__name__)


def shown(lines: list[str], count: int | None = None) -> list[str]:
    """The first `LINES_SHOWN` lines, and one that counts the others of `count` in all."""
    first = lines[:LINES_SHOWN]
    rest = (len(lines) if count is None else count) - len(first)
    return first if rest <= 0 else [*first, f"and {rest} more bad rows"]
