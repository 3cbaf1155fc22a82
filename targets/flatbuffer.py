"""Read flatbuffers by their text schema (``.fbs``), knowing where in the file each field lies.

The generated Python classes of a format give values but not positions, and trust the bytes they read. This reader gives both the
value and its byte offset (so a fact can be shown, or altered, in the file), and refuses every offset outside the data.

Format: https://flatbuffers.dev/internals/. Supported is what file formats of networks use: tables, unions of tables, vectors,
strings and scalars. Structs, nested flatbuffers and vectors of unions are not.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import FormatError

__all__ = ["Schema", "Table", "parse_schema", "read_flatbuffer"]

_SCALARS = {
    "bool": "?", "byte": "b", "ubyte": "B", "int8": "b", "uint8": "B", "short": "h", "ushort": "H", "int16": "h", "uint16": "H",
    "int": "i", "uint": "I", "int32": "i", "uint32": "I", "float": "f", "float32": "f",
    "long": "q", "ulong": "Q", "int64": "q", "uint64": "Q", "double": "d", "float64": "d",
}  # fmt: skip


@dataclass(frozen=True)
class Schema:
    """A parsed schema: field lists of tables as (name, type, default), members of unions, and names of enum values."""

    tables: Mapping[str, tuple[tuple[str, str, str], ...]]
    unions: Mapping[str, tuple[tuple[str, str], ...]]
    enums: Mapping[str, tuple[str, Mapping[int, str]]]
    root: str


@dataclass(frozen=True)
class Table:
    """One table of a file.

    Attributes:
        kind: the table's name in the schema, or the member's name where a union chose it.
        fields: values by field name; scalars, enum names (str), strings, tables, lists of them, or numpy arrays of scalars.
        at: byte offset of each stored scalar, or of a vector's first element. A scalar left at its default is not stored.
    """

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    at: Mapping[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value, or ``default`` where it is absent or this table has no such field."""
        value = self.fields.get(name)
        return default if value is None else value


@cache
def parse_schema(*paths: Path) -> Schema:
    """Parse one schema that may be spread over several files (``include`` is not followed: name them all)."""
    text = "\n".join(path.read_text() for path in paths)
    text = re.sub(r"//[^\n]*", "", text)
    tables, unions, enums = {}, {}, {}
    for word, name, base, body in re.findall(r"\b(table|union|enum)\s+(\w+)\s*(?::\s*(\w+))?\s*\{([^}]*)\}", text):
        if word == "table":
            found = re.findall(r"(\w+)\s*:\s*([\w\[\].]+)\s*(?:=\s*([\w.+-]+))?\s*(?:\([^)]*\))?\s*;", body)
            tables[name] = tuple((f, t, d) for f, t, d in found)
        elif word == "union":
            members = (m.strip().partition(":") for m in body.split(",") if m.strip())
            unions[name] = tuple((m.strip(), (t or m).strip()) for m, _, t in members)
        else:
            values, following = {}, 0
            for member in (m.strip() for m in body.split(",")):
                if member:
                    label, _, number = member.partition("=")
                    following = int(number) if number else following
                    values[following] = label.strip()
                    following += 1
            enums[name] = (base, values)
    root = re.search(r"\broot_type\s+(\w+)\s*;", text)
    return Schema(tables, unions, enums, root[1] if root else "")


def read_flatbuffer(data: bytes, schema: Schema, base: int, size: int, where: str) -> Table:
    """The root table of the flatbuffer at ``data[base : base + size]``; offsets in the result count from ``data[0]``.

    Raises:
        FormatError: an offset or length points outside the flatbuffer; ``where`` names the file in the message.
    """
    reader = _Reader(data, schema, base + size)
    try:
        return reader.table(schema.root, reader.pointer(base))
    except (struct.error, ValueError, KeyError, UnicodeDecodeError, IndexError, RecursionError) as error:
        again = "make it again with `edgekit export RUN`"
        raise FormatError(f"{where}: damaged, its tables cannot be read ({error}); {again}") from error


class _Reader:
    """Cursor-free reader; ``budget`` bounds the work that hostile offsets can cause."""

    def __init__(self, data: bytes, schema: Schema, end: int) -> None:
        self.data, self.schema, self.end, self.budget = data, schema, end, max(end, 1)

    def unpack(self, code: str, at: int) -> Any:
        if at < 0 or at + struct.calcsize(code) > self.end:
            raise ValueError(f"offset {at} lies outside")
        return struct.unpack_from("<" + code, self.data, at)[0]

    def pointer(self, at: int) -> int:
        return at + int(self.unpack("I", at))

    def table(self, name: str, at: int, kind: str = "") -> Table:
        self.budget -= 1
        if self.budget < 0:
            raise ValueError("more tables than bytes")
        vtable = at - self.unpack("i", at)
        slots = (self.unpack("H", vtable) - 4) // 2
        values: dict[str, Any] = {}
        places: dict[str, int] = {}
        slot = 0
        for label, type_, default in self.schema.tables[name]:
            union = self.schema.unions.get(type_)
            offsets = [
                self.unpack("H", vtable + 4 + 2 * s) if s < slots else 0 for s in range(slot, slot + 1 + (union is not None))
            ]
            slot += len(offsets)
            place = at + offsets[-1] if offsets[-1] else 0
            if union is not None:
                number = self.unpack("B", at + offsets[0]) if offsets[0] else 0
                member = union[number - 1] if number else None
                values[label] = self.table(member[1], self.pointer(place), member[0]) if member and place else None
            else:
                values[label], found = self.value(type_, place, default)
                if found:
                    places[label] = found
        return Table(kind or name, values, places)

    def value(self, type_: str, place: int, default: str) -> tuple[Any, int]:
        """Value and byte offset; offset 0 for what is not stored."""
        if type_ in _SCALARS or type_ in self.schema.enums:
            base, names = self.schema.enums.get(type_, (type_, {}))
            if not place:
                return (default or names.get(0, 0)) if names else _number(base, default), 0
            number = self.unpack(_SCALARS[base], place)
            return names.get(number, number), place
        if not place:
            return None, 0
        target = self.pointer(place)
        if type_ == "string":
            raw = self.vector(target, "B")
            return raw.tobytes().decode(), target + 4
        if type_.startswith("["):
            return self.elements(type_[1:-1], target)
        return self.table(type_, target), 0

    def elements(self, inner: str, at: int) -> tuple[Any, int]:
        base = self.schema.enums.get(inner, (inner, {}))[0]
        if base in _SCALARS:
            return self.vector(at, _SCALARS[base]), at + 4
        pointers = self.vector(at, "I")
        starts = [at + 4 + 4 * i + int(p) for i, p in enumerate(pointers)]
        if inner == "string":
            return [self.vector(s, "B").tobytes().decode() for s in starts], 0
        return [self.table(inner, s) for s in starts], 0

    def vector(self, at: int, code: str) -> np.ndarray:
        dtype = np.dtype("<" + code)
        count = int(self.unpack("I", at))
        if at + 4 + count * dtype.itemsize > self.end:
            raise ValueError(f"a vector of {count} at offset {at} lies outside")
        return np.frombuffer(self.data, dtype, count, at + 4)


def _number(base: str, default: str) -> float | int | bool:
    if base in ("float", "double", "float32", "float64"):
        return float(default or 0)
    return default == "true" if base == "bool" else int(default or 0)
