"""The run folder: everything a recipe made, with a manifest, replaced in one step or left as it was.

:func:`staged` hands out a hidden folder beside the run folder. Files are made there; when all went well the two folders change
places in one system call (Linux; elsewhere by two renames), so a reader sees the old run or the new one, never a mixture. When
anything fails, or the process is killed, the old run is still there; what a killed process left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgekit.errors import EdgekitError, FormatError, InputError
from edgekit.files import sha256, write_json

__all__ = ["FORMAT", "MANIFEST", "altered", "names", "open_run", "staged"]

FORMAT = 1
"""Version of ``manifest.json``; a larger number is from a newer edgekit."""

MANIFEST = "manifest.json"


def names(folder: Path) -> dict[str, str]:
    """SHA-256 of each file by its name in the run folder, from the manifest.

    Raises:
        FormatError: the manifest is missing, damaged, or from a newer edgekit.
    """
    path = Path(folder) / MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        number, files = int(found["format"]), {str(k): str(v) for k, v in found["files"].items()}
    except (FileNotFoundError, NotADirectoryError):
        raise FormatError(
            f"{folder}: not a run folder (no {MANIFEST}); make one with `edgekit compress` or `edgekit run`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: damaged ({error}); make the run again") from None
    if number > FORMAT:
        raise FormatError(f"{path}: format {number}, this edgekit reads format {FORMAT}; upgrade edgekit")
    return files


def altered(folder: Path) -> list[str]:
    """Files of the run that are missing or whose bytes are not those of the manifest."""
    folder = Path(folder)
    return [name for name, digest in names(folder).items() if not (folder / name).is_file() or sha256(folder / name) != digest]


def open_run(folder: Path, *needed: str) -> Path:
    """The folder, after a check that it is a run with the files ``needed``, unaltered.

    Raises:
        FormatError: it is not a run folder, or one of ``needed`` is missing or altered.
    """
    known = names(folder)
    for name in needed:
        path = Path(folder) / name
        if name not in known or not path.is_file():
            raise FormatError(f"{folder}: has no {name}; make the run again with `edgekit run` or `edgekit compress`")
        if sha256(path) != known[name]:
            raise FormatError(f"{path}: was altered after it was written (checksum differs); make the run again")
    return Path(folder)


@contextlib.contextmanager
def staged(folder: Path, *, keep: bool = False) -> Iterator[Path]:
    """A folder to build a run in; it takes the place of ``folder`` when the block ends without an error.

    Args:
        folder: the run folder; it need not exist. Files in it that no run made are carried over.
        keep: begin with the run that is there (for ``export``, ``verify`` and ``report``).

    Raises:
        InputError: ``folder`` holds something else than a run, or nothing can be written there.
    """
    folder = Path(os.path.abspath(folder))
    with _writing(folder, every=True, keep=keep):
        old = _previous(folder)
        if keep and not os.access(folder, os.W_OK):  # else found out at the end, when all is done
            raise PermissionError(errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES, "cannot be written")
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.{os.getpid()}.", suffix=".tmp", dir=folder.parent))
        lock = _locked(staging)
    try:
        with _writing(folder, keep=keep):
            os.chmod(staging, 0o755)
            carried = _fill(folder, staging, old, keep)
            yield staging
            written = sorted(p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file())
            made = {name: sha256(staging / name) for name in written if name not in carried and name != MANIFEST}
            files = {
                name: old[name] if keep and _untouched(folder, name, digest, old) else digest for name, digest in made.items()
            }
            write_json(staging / MANIFEST, {"format": FORMAT, "files": files})
            _replace(staging, folder)
    except EdgekitError as error:  # users know the run folder, not the one it is built in
        if str(staging) not in str(error):
            raise
        raise type(error)(str(error).replace(str(staging), str(folder))) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _untouched(folder: Path, name: str, digest: str, old: dict[str, str]) -> bool:
    """The file is as it was found, though that is not what was once made: it stays known as altered."""
    return old.get(name, digest) != digest and (folder / name).is_file() and sha256(folder / name) == digest


def _previous(folder: Path) -> dict[str, str]:
    """Manifest of the run that is at ``folder``; empty if there is nothing."""
    if not os.path.lexists(folder):
        return {}
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(f"{folder}: exists and is not a folder; choose another --out")
    if not any(folder.iterdir()):
        return {}
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: holds files but is not a run folder (no {MANIFEST}); choose another --out or empty it")
    return names(folder)


def _fill(folder: Path, staging: Path, old: dict[str, str], keep: bool) -> set[str]:
    """Link into ``staging`` what stays of the old folder; returns the names that no run made."""
    carried: set[str] = set()
    if not folder.is_dir():
        return carried
    for path in sorted(p for p in folder.rglob("*") if p.is_file() or p.is_symlink()):
        name = path.relative_to(folder).as_posix()
        ours = name in old or name == MANIFEST
        if ours and not keep:
            continue
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        if ours or path.is_symlink():
            shutil.copy2(path, staging / name, follow_symlinks=False)  # a copy: whoever writes into it must not reach the old run
        else:
            os.link(path, staging / name)
        if not ours:
            carried.add(name)
    return carried


def _replace(staging: Path, folder: Path) -> None:
    """``staging`` becomes ``folder``; what was there is afterwards at ``staging``, or gone."""
    handle = os.open(folder.parent, os.O_RDONLY)
    try:
        if not folder.exists():
            os.rename(staging, folder)
        elif not _exchange(staging, folder):
            aside = staging.with_name(staging.name.removesuffix(".tmp") + ".old.tmp")
            os.rename(folder, aside)
            try:
                os.rename(staging, folder)
            except OSError:
                os.rename(aside, folder)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders by ``renameat2(RENAME_EXCHANGE)``; False where the system has none."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    at_current, rename_exchange = -100, 2
    if call(at_current, os.fsencode(a), at_current, os.fsencode(b), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _sweep(folder: Path) -> None:
    """Remove what killed processes left beside ``folder``, and put back an old run that was left halfway through two renames."""
    for path in sorted(folder.parent.glob(f".{folder.name}.*.tmp")):
        if _alive(path.name.removeprefix(f".{folder.name}.").partition(".")[0]):
            continue
        lock = _locked(path)  # a live process of another container has a number we cannot see, but holds its lock
        if lock is None:
            continue
        if path.name.endswith(".old.tmp") and not folder.exists():
            os.rename(path, folder)
        else:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return int(process) != os.getpid()


def _locked(path: Path) -> int | None:
    """An exclusive lock on a folder until the descriptor is closed or the process ends; None if another process holds it."""
    import fcntl

    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


_REASONS = {
    errno.ENOSPC: "no space left on the device; free some or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "no permission to write there; choose another folder",
    errno.EPERM: "no permission to write there; choose another folder",
    errno.EFBIG: "a file grew over the limit of this process; raise the limit or choose another folder",
    errno.EBUSY: "it is a mount point; choose a folder below it",
    errno.EEXIST: "a part of the path is a file; choose another folder",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.ENAMETOOLONG: "its name is too long; choose a shorter one",
}


@contextlib.contextmanager
def _writing(folder: Path, every: bool = False, keep: bool = False) -> Iterator[None]:
    """OSErrors that mean 'cannot be written' as one sentence; others pass, unless ``every``: where only the folder is touched.

    ``keep``: the folder is a run that something is added to, so that no other can be chosen.
    """
    try:
        yield
    except EdgekitError:
        raise
    except OSError as error:
        if error.errno not in _REASONS and not every:
            raise
        reason = _REASONS.get(error.errno or 0, "no folder can be made there; choose another folder")
        if keep:
            reason = f"{reason.partition(';')[0]}; copy the run folder to where you can write, and go on with the copy"
        raise InputError(f"cannot write {folder}: {reason}") from error
