"""The far end of an ssh connection: one process that holds the device's lock, takes files, runs the runner and cleans up.

It is sent over the connection and run by Python 3.9 or newer with the standard library alone; it never sees a shell. A message
in either direction is a line of JSON, followed by ``size`` raw bytes where it says so. When the connection ends, however that
happens, so does the runner, and everything that the agent made is removed, except the beginning of a file that was on its way:
it lies in ``parts`` and is continued the next time (parts older than a week are removed).

Requests: ``offer`` files by SHA-256 and size (answer: how much of each is there already), ``put`` the rest of one, ``run`` a
request on files under names, ``get`` a result; ``install``, ``versions``, ``fetch``, ``switch``, ``remove`` for deployments
(:mod:`edgekit.deploy`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["HELLO", "Refused", "deployments", "main", "say", "widen"]

HELLO = "EDGEKIT-AGENT 1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
DIGEST = re.compile(r"[0-9a-f]{64}")
PIECE = 1 << 18
WEEK = 7 * 24 * 3600


class Refused(Exception):
    """What cannot be done: a kind for programs and a sentence for people."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def main() -> None:
    """Serve until standard input ends."""
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(1))
    say({"hello": HELLO, "python": sys.executable, "version": ".".join(map(str, sys.version_info[:3]))}, b"\n")
    if sys.version_info < (3, 9):  # noqa: UP036  that of edgekit is not that of the device
        say({"error": {"kind": "missing", "message": "its Python is older than 3.9"}})
        return
    try:
        widen(0)
        with _locked(), _workplace() as (root, work):
            say({"ready": True})
            _serve(root, work)
    except Refused as error:
        say({"error": {"kind": error.kind, "message": str(error)}})
    except BrokenPipeError:  # the connection is gone; there is nobody to tell
        return
    except OSError as error:
        say({"error": _in_words(error)})


def widen(handle: int) -> None:
    """Let a pipe or socket hold a megabyte, so that neither end waits for the other at every 64 kB; as far as that is allowed."""
    import fcntl
    import socket

    with contextlib.suppress(OSError):
        fcntl.fcntl(handle, 1031, 1 << 20)  # F_SETPIPE_SZ, which Python names from 3.10 on
        return
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(handle)) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)


def say(message: dict[str, Any], before: bytes = b"", data: bytes = b"") -> None:
    """One message on standard output."""
    sys.stdout.buffer.write(before + json.dumps(message).encode() + b"\n" + data)
    sys.stdout.buffer.flush()


def _serve(root: str, work: str) -> None:
    verbs: dict[str, Callable[[dict[str, Any], str, str], None]] = {
        "offer": _offer, "put": _put, "run": _run, "get": _get,
        "install": _install, "fetch": _fetch, "versions": _versions, "switch": _switch, "remove": _remove,
    }  # fmt: skip
    while True:
        line = sys.stdin.buffer.readline()
        if not line:
            return
        request = json.loads(line)
        try:
            verbs[request["do"]](request, root, work)
        except Refused as error:
            say({"error": {"kind": error.kind, "message": str(error)}})
        except BrokenPipeError:
            raise
        except OSError as error:
            say({"error": _in_words(error)})


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One edgekit at a time on this machine, whoever it is."""
    import fcntl

    path = os.path.join(tempfile.gettempdir(), "edgekit-device.lock")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        handle = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused("busy", "in use by another edgekit; measurements would disturb each other: try again later") from None
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _workplace() -> Iterator[tuple[str, str]]:
    """The agent's folder, and one below it that is gone at the end."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    root = os.path.join(cache, "edgekit-device")
    os.makedirs(os.path.join(root, "parts"), mode=0o700, exist_ok=True)
    for name in os.listdir(root):  # what a killed agent left; the lock says that none is alive
        if name.startswith("work-"):
            shutil.rmtree(os.path.join(root, name), ignore_errors=True)
    for name in os.listdir(os.path.join(root, "parts")):
        path = os.path.join(root, "parts", name)
        if time.time() - os.path.getmtime(path) > WEEK:
            os.unlink(path)
    work = tempfile.mkdtemp(prefix="work-", dir=root)
    try:
        os.mkdir(os.path.join(work, "files"))
        yield root, work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for path in (os.path.join(root, "parts"), root):
            with contextlib.suppress(OSError):  # where they are empty
                os.rmdir(path)


def _offer(request: dict[str, Any], root: str, work: str) -> None:
    """How many bytes of each file are here; refuses what there is no room for."""
    there, complete, needed = [], [], 0
    for entry in request["files"]:
        digest, size = _digest(entry["sha256"]), int(entry["size"])
        whole, part = os.path.join(work, "files", digest), os.path.join(root, "parts", digest)
        complete.append(os.path.exists(whole))
        begun = os.path.getsize(part) if os.path.exists(part) else 0
        there.append(size if complete[-1] else begun if begun <= size else 0)
        needed += size - there[-1]
    free = shutil.disk_usage(work).free
    if needed > free:
        raise Refused("disk", _no_room(needed, free))
    say({"there": there, "complete": complete})


def _put(request: dict[str, Any], root: str, work: str) -> None:
    """Append the bytes that follow to a part; at the end it is the file, or nothing."""
    digest, size, start = _digest(request["sha256"]), int(request["size"]), int(request["from"])
    part, failed, left = os.path.join(root, "parts", digest), None, size - start
    total = hashlib.sha256()
    with open(part, "r+b" if start else "wb") as file:
        for piece in iter(lambda: file.read(PIECE) if start else b"", b""):
            total.update(piece)
        file.truncate(start)
        file.seek(start)
        while left:
            piece = sys.stdin.buffer.read(min(left, PIECE))
            if not piece:
                raise SystemExit(1)  # the connection is gone; the part stays
            left -= len(piece)
            if failed is None:
                try:
                    file.write(piece)
                    file.flush()
                except OSError as error:
                    failed = error  # the rest still has to be read
                total.update(piece)
    if failed is None and total.hexdigest() == digest:
        os.replace(part, os.path.join(work, "files", digest))
        say({"done": True})
        return
    os.unlink(part)
    if failed is not None and failed.errno in (errno.ENOSPC, errno.EDQUOT):
        raise Refused("disk", _no_room(size, shutil.disk_usage(work).free))
    if failed is not None:
        raise failed
    raise Refused("damaged", "a file arrived with another SHA-256 than it left with; try again")


def _run(request: dict[str, Any], root: str, work: str) -> None:
    """Run the runner on files under the names of the request, in a folder that stays until the next run."""
    folder = os.path.join(work, "run")
    shutil.rmtree(folder, ignore_errors=True)
    os.mkdir(folder)
    store = os.path.join(work, "files")
    for name in set(os.listdir(store)) - set(request["files"].values()):
        os.unlink(os.path.join(store, name))  # those of earlier runs
    for name, digest in request["files"].items():
        os.link(os.path.join(store, _digest(digest)), os.path.join(folder, _name(name)))
    with open(os.path.join(folder, "stderr"), "w+b") as errors:
        process = subprocess.Popen(
            [sys.executable, "runner.py", "request.json", "--watch"],
            cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        try:
            _follow(process, time.monotonic() + float(request["limit"]))
        finally:
            if process.poll() is None:
                process.kill()
            code = process.wait()
        errors.seek(max(0, os.path.getsize(errors.name) - 4000))
        text = errors.read().decode(errors="replace")
    sizes = {name: os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder) if name not in request["files"]}
    say({"code": code, "stderr": text, "sizes": sizes})


def _follow(process: subprocess.Popen[bytes], deadline: float) -> None:
    """Hand on the runner's lines until it ends, is out of time, or the connection ends."""
    assert process.stdout is not None
    waiting, watched = b"", [0, process.stdout.fileno()]
    while True:
        readable = select.select(watched, [], [], max(0.0, deadline - time.monotonic()))[0]
        if not readable:
            return
        if 0 in readable:  # nothing is ever sent during a run: input that can be read has ended
            raise SystemExit(1)
        piece = os.read(process.stdout.fileno(), 65536)
        if not piece:
            return
        *lines, waiting = (waiting + piece).split(b"\n")
        for line in lines:
            say({"told": line.decode(errors="replace")})


def _get(request: dict[str, Any], root: str, work: str) -> None:
    """Send a file of the last run."""
    _send(os.path.join(work, "run", _name(request["name"])))


def _fetch(request: dict[str, Any], root: str, work: str) -> None:
    """Send a file of a deployed version."""
    home = os.path.join(deployments(), _name(request["name"]))
    _send(os.path.join(home, "versions", _name(request["version"]), _name(request["file"])))


def _send(path: str) -> None:
    with open(path, "rb") as file:
        size, total = os.path.getsize(path), hashlib.sha256()
        say({"size": size})
        while size:
            piece = file.read(min(size, PIECE))
            if not piece:
                raise SystemExit(1)
            size -= len(piece)
            total.update(piece)
            sys.stdout.buffer.write(piece)
    say({"sha256": total.hexdigest()})


def deployments() -> str:
    """The folder of all deployments."""
    return os.path.join(os.path.expanduser("~"), "edgekit")


def _install(request: dict[str, Any], root: str, work: str) -> None:
    """Put files that were sent into a new version of a deployment, whole or not at all; nothing uses it yet."""
    home = os.path.join(deployments(), _name(request["name"]))
    versions, version = os.path.join(home, "versions"), _name(request["version"])
    os.makedirs(versions, exist_ok=True)
    staging, final = os.path.join(versions, f".{version}.{os.getpid()}"), os.path.join(versions, version)
    if not os.path.exists(final):
        os.mkdir(staging)
        try:
            for name, digest in request["files"].items():
                shutil.copyfile(os.path.join(work, "files", _digest(digest)), os.path.join(staging, _name(name)))
            os.rename(staging, final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    say({"path": final})


def _versions(request: dict[str, Any], root: str, work: str) -> None:
    """Names of the versions of a deployment, the current and the previous one, and what a version's manifest says."""
    home = os.path.join(deployments(), _name(request["name"]))
    found = sorted(n for n in _listed(os.path.join(home, "versions")) if not n.startswith("."))
    manifests = {}
    for name in found:
        with contextlib.suppress(OSError, ValueError), open(os.path.join(home, "versions", name, "manifest.json")) as file:
            manifests[name] = json.load(file)
    links = {"current": _link(home, "current"), "previous": _link(home, "previous")}
    say({"home": home, "versions": found, "manifests": manifests, **links})


def _switch(request: dict[str, Any], root: str, work: str) -> None:
    """Make a version the current one in one step, and remember the one before; then tell a service to start again."""
    home, version = os.path.join(deployments(), _name(request["name"])), _name(request["version"])
    if not os.path.isdir(os.path.join(home, "versions", version)):
        raise Refused("request", f"there is no version {version} of {request['name']}")
    before = _link(home, "current")
    if before and before != version:
        _point(home, "previous", before)
    _point(home, "current", version)
    say({"before": before, "service": _service(request, home)})


def _service(request: dict[str, Any], home: str) -> str:
    """Install or restart the user's systemd unit; what came of it in words, "" where there is none."""
    unit = f"edgekit-{request['name']}.service"
    folder = os.path.join(
        os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config"), "systemd", "user"
    )
    path, commands = os.path.join(folder, unit), [["restart", unit]]
    if request.get("unit"):
        os.makedirs(folder, exist_ok=True)
        with open(path + ".new", "w") as file:
            program = _quoted(sys.executable).replace("$$", "$")  # systemd puts no variables into the name of the program
            file.write(request["unit"].replace("@HOME@", _quoted(home)).replace("@PYTHON@", program))
        os.replace(path + ".new", path)
        commands = [["daemon-reload"], ["enable", unit], ["restart", unit]]
    elif not os.path.exists(path):
        return ""
    for command in commands:
        try:
            done = subprocess.run(["systemctl", "--user", *command], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            return f"{unit} is in place, but systemctl cannot be run ({error})"
        if done.returncode:
            reason = (done.stderr.strip() or "no reason given").splitlines()[0][:200]
            return f"{unit} is in place, but systemctl --user {' '.join(command)} failed: {reason}"
    return f"{unit} runs"


def _quoted(path: str) -> str:
    """A path between double quotes of a systemd unit."""
    return path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")


def _remove(request: dict[str, Any], root: str, work: str) -> None:
    """Remove a version that is not in use."""
    home, version = os.path.join(deployments(), _name(request["name"])), _name(request["version"])
    if version in (_link(home, "current"), _link(home, "previous")):
        raise Refused("request", f"version {version} of {request['name']} is in use")
    shutil.rmtree(os.path.join(home, "versions", version))
    for path in (os.path.join(home, "versions"), home, deployments()):
        with contextlib.suppress(OSError):  # where they are empty
            os.rmdir(path)
    say({"done": True})


def _point(home: str, name: str, version: str) -> None:
    """A link to a version, replaced in one step."""
    temporary = os.path.join(home, f".{name}.{os.getpid()}")
    os.symlink(os.path.join("versions", version), temporary)
    os.replace(temporary, os.path.join(home, name))


def _link(home: str, name: str) -> str | None:
    try:
        return os.path.basename(os.readlink(os.path.join(home, name)))
    except OSError:
        return None


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise Refused("request", f"{text!r} is no name for a file or version")
    return text


def _digest(text: str) -> str:
    if not DIGEST.fullmatch(text):
        raise Refused("request", "not a SHA-256")
    return text


def _no_room(needed: int, free: int) -> str:
    return f"no room on its disk: {needed / 1e6:,.1f} MB are to be sent, {free / 1e6:,.1f} MB are free; remove something there"


def _in_words(error: OSError) -> dict[str, str]:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return {"kind": "disk", "message": "no room on its disk; remove something there"}
    return {"kind": "file", "message": f"{error.filename or 'a file'} there: {error.strerror or error}"}


if __name__ == "__main__":
    main()
