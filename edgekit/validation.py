"""A failed check of a recipe as one sentence: file, line, key, what was found, what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from edgekit import marked_yaml
from edgekit.errors import RecipeError

__all__ = ["Reader", "closest", "sentence", "shown"]


@dataclass(frozen=True)
class Reader:
    """Turns a failed check into one sentence with the line of the recipe."""

    document: marked_yaml.Document
    name: str

    def fail(self, path: marked_yaml.Path, message: str) -> Any:
        """Raise a RecipeError for what is at ``path``."""
        where = ".".join(map(str, path))
        line = f":{self.document.line(path)}" if self.document.lines else ""
        raise RecipeError(f"{self.name}{line}: {where + ': ' if where else ''}{message}")

    def check(self, kind: type[Any], value: Any, path: marked_yaml.Path) -> Any:
        """``value`` as ``kind``, or a RecipeError for its first fault."""
        try:
            return TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            where, message = _first(error, kind)
            self.fail((*path, *where), message)


def sentence(error: ValidationError, kind: type[Any]) -> str:
    """The first fault of arguments for ``kind``, a dataclass, in one sentence."""
    where, message = _first(error, kind)
    return ": ".join(filter(None, (".".join(map(str, where)), message)))


def _first(error: ValidationError, kind: type[Any]) -> tuple[marked_yaml.Path, str]:
    first = min(error.errors(), key=lambda e: e["type"].startswith("missing"))  # a wrong value has a line of its own
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return first["loc"], _sentence(first, kind) + more


def _sentence(error: ErrorDetails, kind: type[Any]) -> str:
    """A pydantic error in the words of recipes."""
    last = str(error["loc"][-1]) if error["loc"] else ""
    whole = error["type"] == "dataclass_type"  # no mapping at all: its keys are those of the last name itself
    for key in error["loc"] if whole else error["loc"][:-1]:  # settings inside settings
        inner = get_type_hints(kind).get(str(key)) if dataclasses.is_dataclass(kind) else None
        kind = next((x for x in (inner, *get_args(inner)) if isinstance(x, type) and dataclasses.is_dataclass(x)), kind)
    allowed = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key {last!r}{closest(last, allowed)}"
    if error["type"].startswith("missing"):
        return f"the key {last!r} is missing"
    found = f"found {shown(error['input'])}"
    if error["type"] == "literal_error":
        values = [v.strip().strip("'") for v in error["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return found + closest(str(error["input"]), values)
    if error["type"] in ("dataclass_type", "dict_type"):
        return f"{found}; expected a mapping{f' with the keys {chr(44).join(allowed)}' if allowed else ''}".replace(",", ", ")
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{found}; expected {message}" if error["msg"].startswith("Input should be ") else f"{found}; {message}"


def closest(found: str, allowed: Sequence[str]) -> str:
    """The end of a sentence about a wrong word: what may have been meant, and all that is allowed."""
    close = difflib.get_close_matches(found, allowed, 1)
    return (f"; did you mean {close[0]!r}?" if close else ";") + f" allowed: {', '.join(allowed)}"


def shown(value: Any) -> str:
    """A value of a recipe in words."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return "nothing" if value is None else repr(value)
