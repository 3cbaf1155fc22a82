"""YAML with the line of every key and value, so that an error can point at it.

A small dialect: mappings, lists, scalars. Anchors, aliases and tags are refused (a recipe needs none, and nested aliases can grow
without bound); so are keys that stand twice, which plain YAML silently drops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from edgekit.errors import RecipeError

__all__ = ["Document", "parse"]

Path = tuple[str | int, ...]

_DEEPEST = 30


@dataclass(frozen=True)
class Document:
    """Plain values, and the 1-based line of each by its path, such as ``("compress", 0, "ptq")``; for a key, the key's line."""

    value: Any
    lines: Mapping[Path, int]

    def line(self, path: Path) -> int:
        """Line of the value at ``path``, or of the nearest that encloses it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def parse(text: str, name: str) -> Document:
    """Read YAML text; ``name`` is how errors call the file.

    Raises:
        RecipeError: not valid YAML, or one of the constructs that the module's docstring refuses, with the line.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        lines: dict[Path, int] = {}
        value = None if node is None else _value(loader, node, (), lines, set(), name)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{name}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None
    finally:
        loader.dispose()
    return Document(value, lines)


def _value(loader: yaml.SafeLoader, node: Any, path: Path, lines: dict[Path, int], seen: set[int], name: str) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if id(node) in seen:
        raise RecipeError(f"{name}:{line}: anchors and aliases (&, *) are not taken in recipes; write the value out")
    seen.add(id(node))
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.rsplit(":", 1)[1] not in _TAGS:
        raise RecipeError(f"{name}:{line}: the tag {node.tag} is not taken in recipes; remove it")
    if len(path) > _DEEPEST:
        raise RecipeError(f"{name}:{line}: nested deeper than {_DEEPEST} levels")
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_object(node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, child, (*path, i), lines, seen, name) for i, child in enumerate(node.value)]
    found: dict[str, Any] = {}
    for key_node, child in node.value:
        key_line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{name}:{key_line}: a key must be a word")
        key = str(key_node.value)
        if key in found:
            raise RecipeError(f"{name}:{key_line}: the key {key!r} stands twice in one mapping; keep one")
        lines[(*path, key)] = key_line
        found[key] = _value(loader, child, (*path, key), lines, seen, name)
    return found


_TAGS = {"map", "seq", "str", "int", "float", "bool", "null"}
