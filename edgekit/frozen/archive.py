"""Save and load frozen programs as ``.pt2`` without ever executing code from the file.

The file is a standard ``torch.export`` archive plus one member, ``extra/edgekit.json``: format number, edgekit version, a SHA-256
over everything else, and the program's own facts. Plain ``torch.export.load`` unpickles ``data/sample_inputs`` and any tensor
marked ``use_pickle``, and evaluates strings of the graph; :func:`load` hands torch a copy in which the first is empty, and
refuses whatever :mod:`edgekit.frozen.screen` does not know to be harmless.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2

from edgekit.errors import FormatError
from edgekit.files import write_whole
from edgekit.frozen import binary_ops, dynamic_ops, ops  # noqa: F401  registers the operators before torch reads a graph of them
from edgekit.frozen.program import Exit, FrozenProgram, Unquantized
from edgekit.frozen.screen import Refused, screen_graph, screen_members, screen_payloads

__all__ = ["FORMAT", "load", "read_exported", "save", "to_bytes"]

FORMAT = 1
"""Version of ``edgekit.json``; a file with a larger number is from a newer edgekit."""

_FACTS = "extra/edgekit.json"
_GRAPH = "models/model.json"
_SAMPLE = "data/sample_inputs/model.pt"
_FIXED_DATE = (1980, 1, 1, 0, 0, 0)


def save(program: FrozenProgram, path: Path) -> None:
    """Write the program to ``path`` (``.pt2``), whole or not at all; the same program gives the same bytes."""
    write_whole(path, to_bytes(program))


def to_bytes(program: FrozenProgram) -> bytes:
    """The bytes of the ``.pt2`` file."""
    buffer = io.BytesIO()
    torch.export.save(program.exported, buffer)
    members = _members(buffer.getvalue())
    facts: dict[str, Any] = {
        "format": FORMAT,
        "edgekit": _version(),
        "torch": str(torch.__version__).split("+")[0],
        "name": program.name,
        "unquantized": [[u.layer, u.op, u.reason] for u in program.unquantized],
        "sources": dict(sorted(program.sources.items())),
    }
    if program.exit is not None:
        facts["exit"] = [program.exit.temperature, program.exit.threshold]
    facts["sha256"] = _digest(members, facts)
    members[_FACTS] = json.dumps(facts, indent=1, sort_keys=True).encode()
    return _pack(members)


def load(path: Path) -> FrozenProgram:
    """Read a frozen program.

    Args:
        path: a ``.pt2`` file, or a run folder that holds ``frozen.pt2``.

    Raises:
        FormatError: the file is missing, truncated, altered, not from edgekit, from a newer edgekit, or carries pickled objects.
    """
    path = Path(path)
    path = path / "frozen.pt2" if path.is_dir() else path
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
    if facts.pop("sha256", None) != _digest(members, facts):
        raise FormatError(f"{path}: its contents were altered after it was written (checksum differs); make it again")
    try:
        return FrozenProgram(
            _load_exported(path, members),
            str(facts["name"]),
            tuple(Unquantized(*map(str, u)) for u in facts["unquantized"]),
            {str(k): str(v) for k, v in facts["sources"].items()},
            Exit(*map(float, facts["exit"])) if "exit" in facts else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{path}: {_FACTS} is damaged ({type(error).__name__}: {error}); make the file again with `edgekit compress`"
        ) from error


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


def _members(data: bytes) -> dict[str, bytes]:
    """Archive members by name below the archive's root folder, sorted."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = [(i.filename.split("/", 1)[-1], i) for i in archive.infolist() if not i.is_dir()]
        screen_members([name for name, _ in files])
        if any(i.compress_type != zipfile.ZIP_STORED or i.file_size > len(data) for _, i in files):
            raise Refused("members are compressed, which torch.export never does")
        return {name: archive.read(i) for name, i in sorted(files, key=lambda pair: pair[0])}


def _read(path: Path) -> dict[str, bytes]:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file") from error
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return _members(data)
    except Refused as error:
        raise FormatError(f"{path}: {error}; edgekit does not load it") from error
    except Exception as error:  # zipfile raises a dozen kinds for damaged bytes
        raise FormatError(f"{path}: truncated or not a .pt2 archive ({error}); make it again with `edgekit compress`") from error


def _digest(members: dict[str, bytes], facts: dict[str, Any]) -> str:
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
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
    safe = {name: b"" if name == _SAMPLE else data for name, data in members.items() if not name.startswith("extra/")}
    try:
        for name in [n for n in safe if n.endswith("_config.json")]:
            screen_payloads(name, safe[name])
        safe[_GRAPH] = screen_graph(safe[_GRAPH])
    except KeyError as error:
        raise FormatError(f"{path}: not a .pt2 of torch.export.save (no {_GRAPH})") from error
    except Refused as error:
        raise FormatError(f"{path}: {error}; edgekit does not load it") from error
    try:
        loaded: ExportedProgram = load_pt2(io.BytesIO(_pack(safe))).exported_programs["model"]
        return loaded
    except Exception as error:
        cause = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0][:200]
        raise FormatError(f"{path}: torch {torch.__version__} cannot read this graph ({cause})") from error
