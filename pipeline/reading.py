"""Read JSON that strangers may have written: what it can cost is known before it is parsed."""

import json
import math
from pathlib import Path
from typing import Any

LARGEST = 1 << 28
"""Bytes of a JSON file; what is larger was not written by this program."""
MOST_VALUES = 1 << 23
"""Values in a JSON file, counted from above by its commas and brackets. An empty list takes two bytes in a file and
sixty in memory, so that the size of a file alone says little."""


def read_json(path: Path, largest: int = LARGEST) -> Any:
    """The content of a JSON file in UTF-8. NaN and infinity, which JSON does not have, and numbers too large
    to compute with are refused.

    Raises OSError, or ValueError for everything that is wrong with the content.
    """
    with open(path, "rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"more than {largest} bytes")
    if sum(map(content.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES} values")
    return parse_json(content, parse_constant=_refuse, parse_int=_integer, parse_float=_float)


def parse_json(content: bytes, **options: Any) -> Any:
    """``json.loads`` for UTF-8 only; nesting beyond what Python can follow is a ValueError like any other fault."""
    try:
        return json.loads(content.decode("utf-8"), **options)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _integer(text: str) -> int:
    # Beyond this nothing is counted, and far beyond it a division no longer fits a float.
    if abs(value := int(text)) >= 1 << 64:
        raise ValueError(f"an integer of {len(text)} digits")
    return value


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is beyond what a float holds")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
