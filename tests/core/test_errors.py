"""The exception tree, its exit codes and its drawing."""

from __future__ import annotations

import re

import pytest

from edgekit import errors


def drawn() -> dict[str, tuple[str | None, int]]:
    """Class to (parent, exit code) as drawn in the module's docstring."""
    found: dict[str, tuple[str | None, int]] = {}
    stack: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^ {4}([│├└─ ]*)([A-Z]\w+) +(?:(\d)|exit code)", line)
        if match:
            depth, name = len(match[1]) // 4, match[2]
            stack = [*stack[:depth], (depth, name)]
            found[name] = (stack[-2][1] if depth else None, int(match[3] or 2))
    return found


def classes() -> dict[str, tuple[str | None, int]]:
    found: dict[str, tuple[str | None, int]] = {}
    todo: list[type[errors.EdgekitError]] = [errors.EdgekitError]
    while todo:
        kind = todo.pop()
        parent = kind.__base__
        if kind.__module__ == errors.__name__:
            found[kind.__name__] = (None if parent is Exception or parent is None else parent.__name__, kind.exit_code)
        todo += kind.__subclasses__()
    return found


def test_the_drawing_is_the_tree() -> None:
    assert drawn() == classes()


def test_all_names_every_class() -> None:
    assert set(classes()) | {"cause", "missing_extra"} == set(errors.__all__)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.ParityError, 1),
        (errors.InputError, 2),
        (errors.RecipeError, 2),
        (errors.ModelError, 2),
        (errors.DataError, 2),
        (errors.FormatError, 2),
        (errors.UnsupportedError, 2),
        (errors.MissingTool, 3),
    ],
)
def test_exit_codes(kind: type[errors.EdgekitError], code: int) -> None:
    assert kind("x").exit_code == code


def test_missing_extra_says_what_to_run() -> None:
    error = errors.missing_extra("executorch", "executorch")
    assert isinstance(error, errors.MissingTool)
    assert str(error) == "executorch is not installed; run: pip install 'edgekit[executorch]'"
