"""Folders of downloaded files in edgekit's cache: each is there whole or not at all, and is checked before it is used again.

A part has ``part.json``: what it was made of, and the SHA-256 of each of its files. It is made in a temporary folder and put in
place by one rename, so an interrupted set-up goes on with the next part, and a damaged part is repaired by making it again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from edgekit.errors import InputError
from edgekit.files import sha256, write_json

__all__ = ["files", "locked", "made", "quiet", "reason", "require_space", "whole"]

Fits = Callable[[Mapping[str, str]], bool]
"""Whether what a part was made of is what this edgekit asks for."""


def made(path: Path, make: Callable[[Path], Mapping[str, str]], fits: Fits) -> str:
    """Check a part; make it if it is absent or damaged.

    Args:
        make: fills the folder that it is given (which it has to make) and returns what it is made of.

    Returns:
        "kept", "made" or "repaired".

    Raises:
        InputError: the folder cannot be written.
    """
    state = "made"
    if path.exists():
        if whole(path, fits):
            return "kept"
        state = "repaired"
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a killed set-up; the lock says nobody is using it
        shutil.rmtree(left)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        made_of = make(work / "part")
        digests = {p.relative_to(work / "part").as_posix(): sha256(p) for p in files(work / "part")}
        write_json(work / "part" / "part.json", {"made_of": made_of, "files": digests})
        if path.exists():
            shutil.rmtree(path)
        os.replace(work / "part", path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; set EDGEKIT_CACHE to another folder") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return state


def whole(path: Path, fits: Fits) -> bool:
    """Whether every file of a part is there with its bytes, and it was made of what this edgekit asks for."""
    try:
        found = json.loads((path / "part.json").read_text())
        return fits(found["made_of"]) and all(sha256(path / name) == digest for name, digest in found["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def files(path: Path) -> Iterator[Path]:
    """Every file below a folder, sorted; links are left out."""
    return (p for p in sorted(path.rglob("*")) if p.is_file() and not p.is_symlink())


def require_space(place: Path, needed: float, fewer: str) -> None:
    """Check that a folder has room for so many bytes; it is made if it is not there.

    Args:
        fewer: what could be left out, for the message.

    Raises:
        InputError: it has not.
    """
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"{place}: {free / 1e6:.0f} MB free, about {needed / 1e6:.0f} MB needed; free some space, choose fewer {fewer}, "
            "or set EDGEKIT_CACHE to another folder"
        )


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """One set-up at a time; a second one waits and then finds everything there."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        with (place / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except PermissionError as error:
        raise InputError(f"cannot write {place}: no permission; set EDGEKIT_CACHE to another folder") from error


def quiet(command: Sequence[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program; what it prints is kept."""
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, stdin=subprocess.DEVNULL)


def reason(text: str) -> str:
    """The line of a program's messages that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("E:", "ERROR"))]
    return (telling or lines or ["no message"])[-1][:300]
