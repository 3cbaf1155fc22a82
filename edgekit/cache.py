"""The stage cache: a stage's files by the hash of everything that decides their bytes.

An entry is a folder ``stages/<2 hex>/<key>`` with the files and ``entry.json``, their SHA-256. It appears by one rename, so it is
there whole or not at all, and is checked when it is taken: a damaged entry counts as missing and is removed. The folder is
``$EDGEKIT_CACHE``, else ``$XDG_CACHE_HOME/edgekit``, else ``~/.cache/edgekit``; it can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgekit import environment
from edgekit.errors import InputError
from edgekit.files import cache_folder, sha256, write_json

__all__ = ["code_digest", "folder", "key", "put", "take"]

_ENTRY = "entry.json"


def folder() -> Path:
    """Where the cache is."""
    return cache_folder()


def key(stage: str, inputs: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a stage's inputs (plain JSON values), edgekit's own code, and the versions of all packages it may use."""
    value = {"stage": stage, "inputs": inputs, "edgekit": code_digest(), "versions": environment.versions()}
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def take(entry: str, destination: Path) -> list[str] | None:
    """Copy an entry's files into ``destination`` and return their names; None if there is no whole entry of that key."""
    source = _place(entry)
    try:
        names: dict[str, str] = json.loads((source / _ENTRY).read_text())
        if any(sha256(source / name) != digest for name, digest in names.items()):
            raise ValueError("a file was altered")
    except FileNotFoundError:
        if source.exists():
            shutil.rmtree(source, ignore_errors=True)
        return None
    except (OSError, ValueError, AttributeError):
        shutil.rmtree(source, ignore_errors=True)
        return None
    for name in names:
        _copy(source / name, destination / name)
    return list(names)


def put(entry: str, source: Path, names: Sequence[str]) -> None:
    """Store files of ``source`` under a key; an entry that is already there stays.

    Raises:
        InputError: the cache folder cannot be written.
    """
    place = _place(entry)
    if place.exists():
        return
    temporary = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", suffix=".tmp", dir=place.parent))
        for name in names:
            _copy(source / name, temporary / name)
        write_json(temporary / _ENTRY, {name: sha256(temporary / name) for name in names})
        os.replace(temporary, place)
    except OSError as error:
        if place.exists():  # another process was first; the same key means the same bytes
            return
        raise InputError(f"cannot write the cache {folder()}: {error.strerror}; set EDGEKIT_CACHE to another folder") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 over edgekit's Python and C files: a changed edgekit never reuses what another one made."""
    import edgekit

    root = Path(edgekit.__file__).parent
    roots = {"edgekit": root} | {
        part: Path(found.submodule_search_locations[0])
        for part in ("compress", "targets", "firmware_sim")
        if (found := _spec(f"edgekit.{part}")) is not None and found.submodule_search_locations
    }
    total = hashlib.sha256(edgekit.__version__.encode())
    for part, base in sorted(roots.items()):
        for file in sorted(p for p in base.rglob("*") if p.suffix in (".py", ".c", ".h", ".S")):
            relative = file.relative_to(base).as_posix()
            if part == "edgekit" and relative.split("/")[0] in ("compress", "targets", "firmware_sim"):
                continue
            total.update(f"{part}/{relative}\0".encode() + file.read_bytes())
    return total.hexdigest()


def _spec(name: str) -> Any:
    import importlib.util

    return importlib.util.find_spec(name)


def _place(entry: str) -> Path:
    return folder() / "stages" / entry[:2] / entry


def _copy(source: Path, destination: Path) -> None:
    """A new file, synced; never a link, so nobody can alter the cache through a run folder."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)
    with destination.open("rb") as file:
        os.fsync(file.fileno())
