"""Files are written whole or not at all: temporary name in the same folder, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekit.errors import InputError

__all__ = ["cache_folder", "joint_sha256", "sha256", "write_json", "write_whole"]


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$EDGEKIT_CACHE``, else ``$XDG_CACHE_HOME/edgekit``, else ``~/.cache/edgekit``."""
    if given := os.environ.get("EDGEKIT_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgekit"


def write_whole(path: Path, data: bytes | str) -> None:
    """Replace ``path`` by ``data`` in one step; what was there stays if anything fails.

    Raises:
        InputError: no space left, no permission, or a folder that cannot be made.
    """
    path = Path(path)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        reason = {
            errno.ENOSPC: "no space left on the device; free some or choose another folder",
            errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.EACCES: "no permission to write there; choose another folder",
        }.get(error.errno or 0, error.strerror or str(error))
        raise InputError(f"cannot write {path}: {reason}") from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with sorted keys, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    total = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def joint_sha256(paths: Sequence[Path]) -> str:
    """Hex SHA-256 of several files: of the bytes of a single one, else of their names in the common folder and all bytes."""
    if len(paths) == 1:
        return sha256(paths[0])
    base = Path(os.path.commonpath(paths))
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(f"{path.relative_to(base).as_posix()}\0{sha256(path)}\n".encode())
    return total.hexdigest()
