"""Regular expressions of layer names in settings: refused when the recipe is read, not when the first layer is matched."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

__all__ = ["check_patterns"]

T = TypeVar("T", bound=Iterable[str])


def check_patterns(value: T) -> T:
    """The value itself: a tuple of regular expressions, or a mapping whose keys are.

    Raises:
        ValueError: one of them is no regular expression; says which and why.
    """
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return value
