"""Save and load frozen programs as ``.pt2`` without ever executing code from the file.

The file is a standard ``torch.export`` archive plus one member, ``extra/edgekit.json``: format number, edgekit version, a SHA-256
over every other member, and the program's own facts. Plain ``torch.export.load`` unpickles ``data/sample_inputs`` and any tensor
marked ``use_pickle``; :func:`load` hands torch a copy in which the first is empty and refuses the second, and custom objects too.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from edgekit.errors import FormatError
from edgekit.files import write_whole
from edgekit.frozen import ops  # noqa: F401  registers the operators before torch reads a graph of them
from edgekit.frozen.program import FrozenProgram, Unquantized

__all__ = ["FORMAT", "load", "read_exported", "save", "to_bytes"]

FORMAT = 1
"""Version of ``edgekit.json``; a file with a larger number is from a newer edgekit."""

_FACTS = "extra/edgekit.json"
_FIXED_DATE = (1980, 1, 1, 0, 0, 0)


def save(program: FrozenProgram, path: Path) -> None:
    """Write the program to ``path`` (``.pt2``), whole or not at all; the same program gives the same bytes."""
    write_whole(path, to_bytes(program))


def to_bytes(program: FrozenProgram) -> bytes:
    """The bytes of the ``.pt2`` file."""
    buffer = io.BytesIO()
    torch.export.save(program.exported, buffer)
    members = _members(buffer.getvalue(), program.name)
    facts = {
        "format": FORMAT,
        "edgekit": _version(),
        "torch": str(torch.__version__).split("+")[0],
        "sha256": _digest(members),
        "name": program.name,
        "unquantized": [[u.layer, u.op, u.reason] for u in program.unquantized],
        "sources": dict(sorted(program.sources.items())),
    }
    members[_FACTS] = json.dumps(facts, indent=1, sort_keys=True).encode()
    return _pack(members)


def load(path: Path) -> FrozenProgram:
    """Read a frozen program.

    Raises:
        FormatError: the file is missing, truncated, altered, not from edgekit, from a newer edgekit, or carries pickled objects.
    """
    members = _read(path)
    if _FACTS not in members:
        raise FormatError(f"{path}: not a frozen program of edgekit (no {_FACTS}); make one with `edgekit compress`")
    try:
        facts: dict[str, Any] = json.loads(members.pop(_FACTS))
        number = int(facts["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: {_FACTS} is damaged ({error}); make the file again with `edgekit compress`") from error
    if number > FORMAT or number < 1:
        raise FormatError(
            f"{path}: format {number} of edgekit {facts.get('edgekit', '?')}, this edgekit reads format {FORMAT}; upgrade edgekit"
        )
    if _digest(members) != facts.get("sha256"):
        raise FormatError(f"{path}: its contents were altered after it was written (checksum differs); make it again")
    try:
        return FrozenProgram(
            _load_exported(path, members),
            str(facts["name"]),
            tuple(Unquantized(*map(str, u)) for u in facts["unquantized"]),
            {str(k): str(v) for k, v in facts["sources"].items()},
        )
    except (KeyError, TypeError) as error:
        raise FormatError(f"{path}: {_FACTS} lacks {error}; make the file again with `edgekit compress`") from error


def read_exported(path: Path) -> ExportedProgram:
    """Read any ``.pt2`` (a float model too) under the same rules: nothing in it is executed.

    Raises:
        FormatError: as :func:`load`, without the demand that edgekit wrote it.
    """
    members = _read(path)
    members.pop(_FACTS, None)
    return _load_exported(path, members)


def _version() -> str:
    from edgekit import __version__

    return __version__


def _members(data: bytes, name: str) -> dict[str, bytes]:
    """Archive members by name below the archive's root folder, sorted."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        found = {i.filename.split("/", 1)[-1]: archive.read(i) for i in archive.infolist() if not i.is_dir()}
    return dict(sorted(found.items()))


def _read(path: Path) -> dict[str, bytes]:
    try:
        return _members(Path(path).read_bytes(), str(path))
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file") from error
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise FormatError(f"{path}: truncated or not a .pt2 archive ({error}); make it again with `edgekit compress`") from error


def _digest(members: dict[str, bytes]) -> str:
    total = hashlib.sha256()
    for name, data in sorted(members.items()):
        total.update(f"{name}\0{len(data)}\0".encode())
        total.update(data)
    return total.hexdigest()


def _pack(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(members.items()):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", _FIXED_DATE), data)
    return buffer.getvalue()


def _load_exported(path: Path, members: dict[str, bytes]) -> ExportedProgram:
    for name, data in members.items():
        if name.rsplit("/", 1)[-1].startswith("custom_obj") or name.startswith("data/aotinductor"):
            raise FormatError(f"{path}: member {name} holds a pickled or compiled object, which edgekit never loads")
        if name.endswith("_config.json"):
            try:
                config = json.loads(data)["config"].items()
                pickled = [k for k, v in config if v.get("use_pickle", True)]
            except (ValueError, KeyError, AttributeError) as error:
                raise FormatError(f"{path}: {name} is damaged ({error})") from error
            if pickled:
                raise FormatError(f"{path}: tensor {pickled[0]} is stored as a pickle, which edgekit never loads")
    safe = {k: b"" if k.startswith("data/sample_inputs/") else v for k, v in members.items()}
    try:
        return torch.export.load(io.BytesIO(_pack(safe)))
    except Exception as error:
        cause = str(error.__cause__ or error).splitlines()[0][:200]
        raise FormatError(f"{path}: torch {torch.__version__} cannot read this graph ({cause})") from error
