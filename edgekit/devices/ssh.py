"""``ssh://[user@]host[:port]``: a machine reached by the OpenSSH client, over one connection.

Keys and agents only: nothing ever asks for a password. A host key that is not known is explained, never accepted. The command
that is run there is one fixed text; everything else (the interpreter's path, :mod:`edgekit.devices.agent`, requests, files) goes
through standard input, so that nothing a user named is ever part of a shell's line. Options stand behind a question mark:
``ssh://pi@raspberrypi.local?python=/home/pi/venv/bin/python&time_limit=3600``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edgekit.devices import agent, runner
from edgekit.devices.linux import GRACE, Ended, Linux, connected, options
from edgekit.errors import DeviceError, EdgekitError, InputError, MissingTool
from edgekit.files import sha256

__all__ = ["Address", "Connection", "address", "connect", "opened"]

CONNECT = 15
"""Seconds to connect, and to wait for an answer that needs no work there."""
OPTIONS = (
    "-T", "-a", "-x", "-e", "none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", f"ConnectTimeout={CONNECT}",
    "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3", "-o", "ClearAllForwardings=yes", "-o", "LogLevel=INFO",
)  # fmt: skip
# The two lines and the script come from standard input; dash, bash and busybox read them byte by byte and no further.
PROGRAM = "import sys; exec(sys.stdin.buffer.read(int(sys.argv[1])))"
COMMAND = f"""exec sh -c 'IFS= read -r p; IFS= read -r n; exec "$p" -I -c "{PROGRAM}" "$n"'"""
PIECE = 1 << 20


@dataclass(frozen=True)
class Address:
    """Where a device is; ``user`` and ``port`` None: what the user's ssh configuration says."""

    host: str
    user: str | None = None
    port: int | None = None


def address(spec: str) -> tuple[Address, str]:
    """The parts of ``ssh://[user@]host[:port][?options]``, and the options' text.

    Raises:
        InputError: it is no such thing.
    """
    pattern = (
        r"ssh://(?:([A-Za-z0-9_][A-Za-z0-9._-]*)@)?([A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?/?(?:\?(.*))?"
    )
    found = re.fullmatch(pattern, spec)
    if not found or not 0 < int(found[3] or 22) < 65536:
        raise InputError(f"device {spec!r}: expected ssh://user@host, ssh://user@host:port, or those with ?python=PATH behind")
    return Address(found[2].strip("[]"), found[1], int(found[3]) if found[3] else None), found[4] or ""


def connect(spec: str) -> Linux:
    """The machine at the other end.

    Raises:
        InputError: not an address; MissingTool: no ssh here, or no Python or runtime there.
        DeviceError: it cannot be reached, its key is not known, it is in use.
    """
    where, text = address(spec)
    given = options(text, spec)
    name = spec.partition("?")[0].rstrip("/")
    return connected(name, opened(name, where, given.python or "python3"), given)


def opened(name: str, where: Address, python: str = "python3") -> Connection:
    """Connect and start the agent with the interpreter ``python`` there.

    Raises:
        MissingTool: no ssh here, or no such interpreter there; DeviceError: as :func:`connect`.
    """
    if "\n" in python:
        raise InputError(f"device {name}: python={python!r} is no path")
    ssh = ["ssh", *OPTIONS, *(["-p", str(where.port)] if where.port else []), *(["-l", where.user] if where.user else [])]
    errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the connection
    try:
        process = subprocess.Popen(
            [*ssh, "--", where.host, COMMAND], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0
        )
    except OSError as error:
        errors.close()
        raise MissingTool(f"{name}: the OpenSSH client cannot be started ({error.strerror}); install openssh-client") from error
    assert process.stdin is not None
    agent.widen(process.stdin.fileno())
    connection = Connection(name, where, process, errors)
    try:  # the command reads two lines, then Python its program
        source = Path(agent.__file__).read_bytes()
        connection.send(f"{python}\n{len(source)}\n".encode() + source)
        connection.greeted()
    except BaseException:
        connection.close()
        raise
    return connection


class Connection:
    """One ssh process and the agent at its other end: a way for :class:`edgekit.devices.linux.Linux`."""

    def __init__(self, name: str, where: Address, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self.name, self.where, self.process, self.errors = name, where, process, errors
        self.waiting = b""

    def execute(self, folder: Path, results: Sequence[str], limit: float, told: Callable[[str], None]) -> Ended:
        """Send the files of ``folder``, run the runner there, fetch ``results`` into the folder."""
        files = {path.name: path for path in sorted(folder.iterdir())} | {"runner.py": Path(runner.__file__)}
        digests = self.put(files)
        self.ask({"do": "run", "files": digests, "limit": limit + GRACE})
        while "told" in (answer := self.answer(limit + GRACE + CONNECT)):
            told(answer["told"])
        for name in results:
            if name in answer["sizes"]:
                self.get(name, folder / name)
        return Ended(answer["code"], answer["stderr"])

    def put(self, files: Mapping[str, Path], progress: Callable[[int, int], None] | None = None) -> dict[str, str]:
        """Send files that are not there yet; their SHA-256 by name.

        A file is there whole and of that SHA-256, or not at all; what was sent before a connection broke is not sent again.
        """
        digests = {name: sha256(path) for name, path in files.items()}
        every = {digests[name]: path for name, path in files.items()}
        entries: list[dict[str, Any]] = [{"sha256": digest, "size": path.stat().st_size} for digest, path in every.items()]
        self.ask({"do": "offer", "files": entries})
        offered = self.answer(CONNECT)
        there = offered["there"]
        total, done = sum(e["size"] for e in entries), sum(there)
        for entry, path, start, complete in zip(entries, every.values(), there, offered["complete"], strict=True):
            if complete:
                continue
            self.ask({"do": "put", **entry, "from": start})
            with path.open("rb") as file:
                file.seek(start)
                while piece := file.read(PIECE):
                    self.send(piece)
                    done += len(piece)
                    if progress:
                        progress(done, total)
            self.answer(CONNECT + entry["size"] / 1e6)
        return digests

    def get(self, name: str, path: Path) -> None:
        """Fetch a result of the last run, whole or not at all."""
        self.ask({"do": "get", "name": name})
        self._received(name, path)

    def fetch(self, name: str, version: str, file: str, path: Path) -> None:
        """Fetch a file of a deployed version, whole or not at all."""
        self.ask({"do": "fetch", "name": name, "version": version, "file": file})
        self._received(file, path)

    def _received(self, name: str, path: Path) -> None:
        """What the agent sends as an answer."""
        left, total, part = self.answer(CONNECT)["size"], hashlib.sha256(), path.with_name(path.name + ".part")
        try:
            with part.open("wb") as file:
                while left:
                    piece = self.waiting[:left] or self._read(min(left, PIECE), CONNECT)
                    self.waiting = self.waiting[len(piece) :] if self.waiting else b""
                    file.write(piece)
                    total.update(piece)
                    left -= len(piece)
            if self.answer(CONNECT)["sha256"] != total.hexdigest():
                raise DeviceError(f"{self.name}: {name} arrived damaged; try again")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def request(self, message: Mapping[str, Any], seconds: float = CONNECT) -> dict[str, Any]:
        """Ask the agent and wait for its answer."""
        self.ask(message)
        return self.answer(seconds)

    def ask(self, message: Mapping[str, Any]) -> None:
        """Send a message to the agent."""
        self.send(json.dumps(message).encode() + b"\n")

    def send(self, data: bytes) -> None:
        """Send bytes; a connection that is gone is one sentence."""
        assert self.process.stdin is not None
        view = memoryview(data)
        try:
            while view:
                view = view[self.process.stdin.write(view) or 0 :]
        except OSError:
            raise self._lost() from None

    def answer(self, seconds: float) -> dict[str, Any]:
        """The agent's next message.

        Raises:
            EdgekitError: it refused, was silent for ``seconds``, or the connection ended.
        """
        deadline = time.monotonic() + seconds
        while b"\n" not in self.waiting:
            self.waiting += self._read(65536, deadline - time.monotonic())
        line, _, self.waiting = self.waiting.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise _refused(self.name, **message["error"])
        return message

    def greeted(self) -> None:
        """Wait for the agent; whatever a login shell prints before it is passed over."""
        deadline = time.monotonic() + 2 * CONNECT
        while agent.HELLO.encode() not in self.waiting.rpartition(b"\n")[0]:
            self.waiting += self._read(65536, deadline - time.monotonic())
            if len(self.waiting) > 1 << 20:
                raise DeviceError(f"{self.name}: its login shell prints without end; quiet it for connections without a terminal")
        _, hello, after = self.waiting.partition(b'{"hello": "' + agent.HELLO.encode())
        self.waiting = hello + after
        self.answer(CONNECT)
        self.answer(CONNECT)

    def _read(self, size: int, seconds: float) -> bytes:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], max(0.0, seconds))[0]:
            raise DeviceError(f"{self.name}: no answer for too long; the device is overloaded or the connection stalls")
        data = os.read(self.process.stdout.fileno(), size)
        if not data:
            raise self._lost()
        return data

    def _lost(self) -> EdgekitError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(CONNECT)
        self.errors.seek(0)
        return _explained(self.name, self.where, self.process.returncode, self.errors.read().decode(errors="replace"))

    def close(self) -> None:
        """End the connection; the agent cleans up after itself."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self.process.wait(CONNECT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


_KINDS: Mapping[str, type[EdgekitError]] = {"missing": MissingTool, "request": InputError}


def _refused(name: str, kind: str, message: str) -> EdgekitError:
    return _KINDS.get(kind, DeviceError)(f"{name}: {message}")


def _explained(name: str, where: Address, code: int | None, errors: str) -> EdgekitError:
    """What ssh said, as one sentence with what to do."""
    login = f"{f'{where.user}@' if where.user else ''}{where.host}"
    port = f" -p {where.port}" if where.port else ""
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "it said nothing")[:200]
    if "IDENTIFICATION HAS CHANGED" in errors:
        host = f"'[{where.host}]:{where.port}'" if where.port else where.host
        return DeviceError(
            f"{name}: its host key is not the one you know: it was installed anew, or another machine answers in its place; "
            f"if you are sure of the first, run: ssh-keygen -R {host}"
        )
    if "Host key verification failed" in errors:
        return DeviceError(
            f"{name}: its host key is not known and is not accepted unseen; connect once with `ssh{port} {login}`, compare the "
            "fingerprint with what `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` prints on the device, and answer yes"
        )
    if "Permission denied" in errors:
        return DeviceError(f"{name}: it takes none of your keys (passwords are not used); run: ssh-copy-id{port} {login}")
    if code == 127 or "not found" in last:
        return MissingTool(f"{name}: no such Python there ({last}); give another with ?python=PATH")
    if code == 255:
        return DeviceError(f"{name}: cannot be reached, or the connection was lost ({last})")
    return DeviceError(f"{name}: the connection ended (exit code {code}: {last})")
