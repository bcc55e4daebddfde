"""Text from strangers at a terminal: it must not move the cursor, change colours or reorder what stands around it."""

import re
from typing import Any

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line end, marks of writing direction, line separators, halves of surrogate pairs."""


def printable(text: str) -> str:
    r"""``text`` with what a terminal would obey or could not encode as an escape, such as ``\x1b``."""
    return _UNSAFE.sub(lambda found: ascii(found.group())[1:-1], text)


def shortened(text: str, longest: int = 500) -> str:
    """``text``, cut in the middle to ``longest`` characters."""
    half = (longest - 5) // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


def described(value: Any) -> str:
    """A value from a file for a message: its ``repr``, cut; of what is nested too deeply for that only its kind."""
    try:
        return shortened(repr(value), 120)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
