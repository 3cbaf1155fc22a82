"""A real sshd on a high port of 127.0.0.1 with keys of its own and a throw-away home, and the ``ssh`` command that reaches it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SSHD = "/usr/sbin/sshd"


@dataclass(frozen=True)
class Server:
    """``spec`` is the device; ``home`` what its user sees as home; ``folder`` holds keys, configuration and the client."""

    spec: str
    port: int
    home: Path
    folder: Path

    @property
    def user(self) -> str:
        return self.spec.removeprefix("ssh://").partition("@")[0]

    def known_hosts(self, text: str | None = None) -> None:
        """Let the client know this host's key, or ``text`` in its place."""
        key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {key}" if text is None else text)

    def left(self) -> list[str]:
        """Files and folders in the home and in the temporary folder, but for the lock file and ~/.cache itself."""
        usual = ("edgekit-device.lock", "tmp", ".cache")
        return sorted(p.relative_to(self.home).as_posix() for p in self.home.rglob("*") if p.name not in usual)

    def sessions(self) -> int:
        """Processes that still serve a connection."""
        master = int((self.folder / "sshd.pid").read_text())
        return len([pid for pid in _processes() if _parent(pid) == master])

    def logins(self) -> int:
        """Connections that were let in so far."""
        return (self.folder / "sshd.log").read_text(errors="replace").count("Accepted publickey")

    def cut(self) -> None:
        """End this half of every connection, as a cable pulled or a reboot would."""
        for pid in descendants(int((self.folder / "sshd.pid").read_text())):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "sshd":
                    os.kill(pid, signal.SIGKILL)

    def settled(self) -> list[str]:
        """What is left when all connections have ended, and their agents, which outlive a killed sshd a little."""
        deadline = time.monotonic() + 15
        while (self.sessions() or self._working()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not self.sessions()
        return self.left()

    def _working(self) -> bool:
        return any(self.home.glob(".cache/edgekit-device/work-*"))


@contextlib.contextmanager
def serving(folder: Path, home: Path | None = None) -> Iterator[Server]:
    """Start sshd, and put an ``ssh`` that knows it into ``folder/bin``, for the PATH."""
    assert os.path.exists(SSHD), "openssh-server is not installed; run: make tools"
    home = home or folder / "home"
    (home / "tmp").mkdir(parents=True)
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "key.pub", folder / "authorized_keys")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where the unprivileged half lives
    python = folder / "python3"  # the environment of the tests is the device's
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\n"
        f"PidFile {folder}/sshd.pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"PermitRootLogin yes\nSubsystem sftp internal-sftp\nMaxStartups 100\n"
        f'SetEnv "HOME={home}" "TMPDIR={home}/tmp" "PATH={folder}:{os.environ["PATH"]}"\n'
    )
    (folder / "config").write_text(f"IdentityFile {folder}/key\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known_hosts\n")
    (folder / "bin").mkdir()
    for name in ("ssh", "scp"):
        client = folder / "bin" / name
        client.write_text(f'#!/bin/sh\nexec {shutil.which(name)} -F "{folder}/config" "$@"\n')
        client.chmod(0o755)
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not (folder / "sshd.pid").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        assert (folder / "sshd.pid").exists(), (folder / "sshd.log").read_text()
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        server = Server(f"ssh://{user}@127.0.0.1:{port}", port, home, folder)
        server.known_hosts()
        yield server
    finally:
        process.terminate()
        process.wait()


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def descendants(pid: int) -> list[int]:
    """A process's children, theirs, and so on."""
    every = {p: _parent(p) for p in _processes()}
    found, todo = [], [pid]
    while todo:
        todo = [p for p, parent in every.items() if parent in todo]
        found += todo
    return found
