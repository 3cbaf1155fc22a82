"""The JSON schema of recipes and the tables of docs/recipe.md: ``python -m edgekit.schema docs`` writes both.

Descriptions come from the "Attributes:" sections of the settings' docstrings, so they stand in one place.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from edgekit.compress.binary.settings import Distill, Stage
from edgekit.compress.ptq.settings import Meta, Mixed, Reconstruct
from edgekit.compress.spiking.settings import EarlyExit
from edgekit.files import write_json, write_whole
from edgekit.recipe import NAMED, SETTINGS, Recipe, Verify

__all__ = ["MARK", "attributes", "schema", "tables"]

MARK = "<!-- written by `python -m edgekit.schema docs` -->\n"
"""Everything after this line of docs/recipe.md is written by :func:`tables`."""


def schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of ``recipe.yaml`` as a user writes it."""
    from edgekit.targets import TARGETS, get

    definitions: dict[str, Any] = {}
    for kind in (*SETTINGS.values(), Verify):
        definitions[kind.__name__] = _definition(kind, definitions)
    options = {name: get(name).Options for name in TARGETS}
    for name, kind in options.items():
        definitions[f"{name}.Options"] = _definition(kind, definitions)

    def one_key(values: dict[str, str], required_words: list[str]) -> dict[str, Any]:
        single = {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": False}
        references = {k: {"anyOf": [{"$ref": f"#/$defs/{v}"}, {"type": "null"}]} for k, v in values.items()}
        item = {"anyOf": [{"enum": required_words}, {**single, "properties": references}]}
        return {"anyOf": [item, {"type": "array", "items": item}]}

    top = _definition(Recipe, definitions)
    top["properties"]["compress"] |= one_key({k: v.__name__ for k, v in SETTINGS.items()}, [*NAMED, *SETTINGS])
    top["properties"]["compress"]["anyOf"][1]["minItems"] = 1
    top["properties"]["targets"] |= one_key({name: f"{name}.Options" for name in TARGETS}, list(TARGETS))
    devices = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}], "default": []}
    for holder in (top, definitions["Verify"]):
        key = "profile" if holder is top else "devices"
        holder["properties"][key] = {"description": holder["properties"][key]["description"], "title": key.title(), **devices}
    for key in ("compress", "targets"):
        for old in ("type", "items", "default"):
            top["properties"][key].pop(old, None)
    used = {k: v for k, v in definitions.items() if k not in ("Block", "Target")}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top, "title": "edgekit recipe", "$defs": used}


def tables() -> str:
    """One Markdown table of settings for each part of a recipe."""
    from edgekit.targets import TARGETS, get

    parts: dict[str, type[Any]] = {"Keys of a recipe": Recipe, **{f"`{name}`": kind for name, kind in SETTINGS.items()}}
    parts |= {"`stages` of `binary`": Stage, "`distill` of `binary`": Distill}
    parts |= {"`early_exit` of `spiking`": EarlyExit}
    parts |= {
        "`reconstruct` of `ptq`": Reconstruct,
        "`meta` of `reconstruct`": Meta,
        "`mixed` of `ptq`": Mixed,
        "`verify`": Verify,
    }
    groups: dict[type[Any], list[str]] = {}
    for name in TARGETS:  # the Cortex-M cores share theirs
        groups.setdefault(get(name).Options, []).append(f"`{name}`")
    parts |= {f"Options of {', '.join(names)}": kind for kind, names in groups.items()}
    text = ""
    for title, kind in parts.items():
        properties, texts = _definition(kind, {})["properties"], attributes(kind)
        found = {f.name: properties[f.name] for f in dataclasses.fields(kind)}
        rows = [f"| `{n}` | {_allowed(v)} | {_default(v)} | {texts.get(n, '').replace('``', '`')} |" for n, v in found.items()]
        text += "\n".join([f"## {title}", "", "| key | allowed | default | meaning |", "|---|---|---|---|", *rows, "", ""])
    return text.rstrip() + "\n"


def _allowed(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{v}`" for v in field["enum"])
    if "anyOf" in field:
        return " or ".join(_allowed(f) for f in field["anyOf"] if f.get("type") != "null")
    limits = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most", "exclusiveMaximum": "less than"}
    words = [f"{word} {field[key]}" for key, word in limits.items() if key in field]
    kind = {"object": "mapping", "array": "list", "boolean": "`true`, `false`", "string": "text"}.get(field.get("type", ""))
    return " ".join([kind or field.get("type", "mapping"), " and ".join(words)]).strip()


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return ""
    value = field["default"]
    return (
        "" if value is None or isinstance(value, dict | list) else f"`{str(value).lower() if isinstance(value, bool) else value}`"
    )


def attributes(kind: type[Any]) -> dict[str, str]:
    """Field name to its text in the class's (or a base's) docstring."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        section = re.search(r"Attributes:\n(.*?)(?:\n\n|\Z)", inspect.cleandoc(base.__doc__ or ""), re.S)
        for names, text in re.findall(
            r"^ {4}(\w[\w, ]*): (.*?)(?=^ {4}\w|\Z)", section[1] + "\n" if section else "", re.S | re.M
        ):
            for name in names.split(","):
                found[name.strip()] = " ".join(text.split())
    return found


def _definition(kind: type[Any], shared: dict[str, Any]) -> dict[str, Any]:
    """Schema of one class with the descriptions of its attributes; what it refers to goes into ``shared``."""
    found: dict[str, Any] = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
    for name, value in found.pop("$defs", {}).items():
        shared.setdefault(name, value)
    texts = attributes(kind)
    for field in dataclasses.fields(kind):
        if field.name in found.get("properties", {}) and field.name in texts:
            found["properties"][field.name]["description"] = texts[field.name]
    found["additionalProperties"] = False
    found["description"] = inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0]
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_json(folder / "recipe.schema.json", schema())
    page = folder / "recipe.md"
    write_whole(page, page.read_text().partition(MARK)[0] + MARK + "\n" + tables())
