"""The ssh device against a real sshd, and everything that goes wrong on the way: one sentence each, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from device_files import lowered
from nets import images, residual_net
from sshd import Server, descendants, serving

from edgekit import devices
from edgekit.devices.ssh import Connection, address, opened
from edgekit.errors import DeviceError, EdgekitError, InputError, MissingTool
from edgekit.frozen import FrozenProgram
from edgekit.profile import Settings
from edgekit.targets import get

pytestmark = pytest.mark.slow
X = images(3).numpy()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("sshd")) as found:
        yield found


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("PATH", f"{running.folder}/bin{os.pathsep}{os.environ['PATH']}")
    assert running.settled() == []
    yield running
    running.known_hosts()
    assert running.settled() == []


@pytest.fixture(scope="module")
def program() -> FrozenProgram:
    return residual_net()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lowered(tmp_path_factory.mktemp("file"), "onnx")


def connection(server: Server) -> Connection:
    return opened(server.spec, address(server.spec)[0])


def test_it_gives_what_the_targets_own_run_gives(server: Server, path: Path, program: FrozenProgram) -> None:
    (server.home / ".bashrc").write_text("echo a shell that talks; printf 'and does not end its line'")
    before = server.logins()
    device, seen, target = devices.connect(server.spec), [], get("onnx")
    assert device.name == server.spec and "onnx" in device.targets
    (found,) = device.run(path, "onnx", [X], lambda done, total: seen.append((done, total)))
    assert np.array_equal(found, target.run(path, [X])[0]) and seen[-1] == (3, 3)
    taps, wanted = device.taps(path, "onnx", program, [X]), target.taps(path, program, [X[:1]])
    assert taps.keys() == wanted.keys() and all(np.array_equal(taps[k], wanted[k]) for k in wanted)
    profile = device.profile(path, "onnx", program, Settings(num_runs=25), [X])
    assert profile.device == server.spec and profile.figures["timed_runs"] == 25
    assert server.logins() == before + 1 and server.sessions() == 1  # one connection for all of it
    device.close()
    device.close()
    (server.home / ".bashrc").unlink()


def test_a_key_that_is_not_known_is_explained_and_not_accepted(server: Server) -> None:
    server.known_hosts("")
    with pytest.raises(DeviceError, match=r"host key is not known.*ssh-keygen -lf.*answer yes"):
        devices.connect(server.spec)
    other = f"[127.0.0.1]:{server.port} {(server.folder / 'key.pub').read_text()}"
    server.known_hosts(other)
    with pytest.raises(DeviceError, match=rf"host key is not the one you know.*ssh-keygen -R '\[127.0.0.1\]:{server.port}'"):
        devices.connect(server.spec)
    assert (server.folder / "known_hosts").read_text() == other


def test_a_key_that_is_not_taken_and_a_machine_that_is_not_there_are_said(server: Server) -> None:
    with pytest.raises(DeviceError, match=r"takes none of your keys.*ssh-copy-id"):
        devices.connect(f"ssh://nobody@127.0.0.1:{server.port}")
    with pytest.raises(DeviceError, match=r"cannot be reached.*Connection refused"):
        devices.connect("ssh://pi@127.0.0.1:1")


@pytest.mark.parametrize(
    "spec",
    ["ssh://", "ssh://-oProxyCommand=touch@h", "ssh://-lroot", "ssh://a b@h", "ssh://a@h;x", "ssh://a@h:0", "ssh://a@h:99999",
     "ssh://a@$(x)", "ssh:host", "ssh://a@h?speed=1", "ssh://a@h?python=x\ny"],
)  # fmt: skip
def test_what_is_no_address_is_refused(spec: str) -> None:
    with pytest.raises(InputError):
        devices.connect(spec)


def test_addresses() -> None:
    assert address("ssh://pi@raspberrypi.local")[0].host == "raspberrypi.local"
    assert (address("ssh://pi@h:2222?python=/x")[0].port, address("ssh://pi@h:2222?python=/x")[1]) == (2222, "python=/x")
    assert address("ssh://[fe80::1]")[0].host == "fe80::1" and address("ssh://[fe80::1]")[0].user is None


@pytest.mark.parametrize(
    "name", ["; touch pwned", "$(touch pwned)", "`touch pwned`", "' ; touch pwned ; '", '"; touch pwned; "', "-c"]
)
def test_no_name_reaches_a_shell(name: str, server: Server, path: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgekitError, match=server.spec):
        devices.connect(f"{server.spec}?python={name}")
    evil = tmp_path / f"{name.replace('/', '')}.onnx"
    evil.write_bytes(path.read_bytes())
    device = devices.connect(server.spec)
    assert len(device.run(evil, "onnx", [X])[0]) == 3
    device.close()
    homes = [server.home, Path.home(), Path.cwd(), tmp_path, server.home / "tmp"]
    assert not [home for home in homes if (home / "pwned").exists()]


def test_the_agent_takes_no_path_for_a_name(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    link = connection(server)
    digest = link.put({"file": tmp_path / "file"})["file"]
    for name in ("../../evil", "/tmp/evil", ".evil", "", "a/b", "a\nb"):
        with pytest.raises(InputError, match="is no name"):
            link.request({"do": "run", "files": {name: digest}, "limit": 1})
        with pytest.raises(InputError, match="is no name"):
            link.request({"do": "install", "name": name, "version": "1", "files": {}})
        with pytest.raises(InputError, match="is no name"):
            link.request({"do": "get", "name": name})
    with pytest.raises(InputError, match="not a SHA-256"):
        link.request({"do": "offer", "files": [{"sha256": "../x", "size": 1}]})
    link.close()


def test_a_second_user_is_refused_until_the_first_is_done(server: Server) -> None:
    link = connection(server)
    with pytest.raises(DeviceError, match="in use by another edgekit"):
        devices.connect(server.spec)
    link.close()
    server.settled()
    connection(server).close()


def test_python_without_a_runtime_and_no_python_are_said(server: Server) -> None:
    bare = server.folder / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # no site-packages
    bare.chmod(0o755)
    with pytest.raises(MissingTool, match="no such Python there"):
        devices.connect(f"{server.spec}?python=/nowhere/python3")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(server.folder / "venv")], check=True)
    with pytest.raises(
        MissingTool, match=r"has none of executorch, ai-edge-litert, tflite-runtime, onnxruntime; install one there"
    ):
        devices.connect(f"{server.spec}?python={server.folder}/venv/bin/python")


@pytest.mark.parametrize("end", ["client", "server"])
def test_a_connection_killed_in_mid_upload_goes_on_where_it_was(end: str, server: Server, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(np.random.default_rng(0).bytes(24 << 20))
    link = connection(server)

    def cut(done: int, total: int) -> None:
        if done >= total // 2:
            if end == "client":
                link.process.kill()
            else:
                server.cut()

    with pytest.raises(DeviceError, match=r"connection was lost|connection ended"):
        link.put({"big": big}, cut)
    link.close()
    left = server.settled()
    assert len(left) == 3 and left[2].startswith(".cache/edgekit-device/parts/")
    part = server.home / left[2]
    begun = part.stat().st_size
    assert 0 < begun < big.stat().st_size and big.read_bytes().startswith(part.read_bytes())

    link, seen = connection(server), []
    digests = link.put({"big": big}, lambda done, total: seen.append(done))
    assert seen[0] > begun and seen[-1] == big.stat().st_size
    assert link.request({"do": "offer", "files": [{"sha256": digests["big"], "size": 24 << 20}]})["complete"] == [True]
    link.close()


def test_a_part_that_was_altered_is_not_taken_for_the_file(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"a" * 5000)
    link = connection(server)
    digest = link.put({"file": file})["file"]
    link.close()
    server.settled()
    parts = server.home / ".cache" / "edgekit-device" / "parts"
    parts.mkdir(parents=True)
    (parts / digest).write_bytes(b"b" * 100)
    link = connection(server)
    with pytest.raises(DeviceError, match="another SHA-256"):
        link.put({"file": file})
    assert link.put({"file": file})["file"] == digest  # the part is gone, so it works
    link.close()


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(home)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (not root)")
    try:
        with serving(tmp_path, home) as server:
            monkeypatch.setenv("PATH", f"{server.folder}/bin{os.pathsep}{os.environ['PATH']}")
            big = tmp_path / "big"
            big.write_bytes(bytes(16 << 20))
            link = connection(server)
            with pytest.raises(DeviceError, match=r"no room on its disk: 16.8 MB are to be sent, 12.\d MB are free"):
                link.put({"big": big})
            big.write_bytes(bytes(9 << 20))
            filler = home / "filler"

            def fill(done: int, total: int) -> None:
                if not filler.exists() and done > total // 3:
                    filler.write_bytes(bytes(5 << 20))

            with pytest.raises(DeviceError, match="no room on its disk"):
                link.put({"big": big}, fill)
            filler.unlink()
            assert not list((home / ".cache/edgekit-device/parts").iterdir())
            link.put({"big": big})  # the connection is as good as before
            link.close()
            assert server.settled() == []
    finally:
        subprocess.run(["umount", "--lazy", str(home)], check=True)


def test_a_killed_runner_is_said_and_the_connection_goes_on(server: Server, path: Path, program: FrozenProgram) -> None:
    device = devices.connect(server.spec)

    def kill() -> None:
        os.kill(_runner(server), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(DeviceError, match="the runner was killed"):
        device.profile(path, "onnx", program, Settings(seconds=30), [X])
    thread.join()
    assert len(device.run(path, "onnx", [X])[0]) == 3
    device.close()


def test_a_connection_lost_in_a_run_ends_the_runner(server: Server, path: Path, program: FrozenProgram) -> None:
    device = devices.connect(server.spec)
    found: list[int] = []

    def cut() -> None:
        found.append(_runner(server))
        server.cut()

    thread = threading.Thread(target=cut)
    thread.start()
    with pytest.raises(DeviceError, match=r"connection was lost|connection ended"):
        device.profile(path, "onnx", program, Settings(seconds=30), [X])
    thread.join()
    device.close()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{found[0]}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{found[0]}")


def test_a_run_ends_at_its_time_limit(server: Server, path: Path, program: FrozenProgram) -> None:
    device = devices.connect(f"{server.spec}?time_limit=2")
    with pytest.raises(DeviceError, match=r"not done within 2 s.*time_limit="):
        device.profile(path, "onnx", program, Settings(num_runs=10_000_000), [X])
    device.close()


def _runner(server: Server) -> int:
    """The number of the process that runs the runner, as soon as there is one."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for pid in descendants(int((server.folder / "sshd.pid").read_text())):
            try:
                if b"request.json" in Path(f"/proc/{pid}/cmdline").read_bytes() and _times(pid) > 0.1:
                    return pid
            except OSError:
                continue
        time.sleep(0.05)
    raise AssertionError("no runner")


def _times(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
