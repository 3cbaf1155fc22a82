"""Deployments against a real sshd: proven, switched, rolled back; what fails leaves the version in use where it was."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_recipe
import torch
from fake_target import altered
from sshd import Server, serving
from typer.testing import CliRunner

from edgekit import deploy as deployments
from edgekit import frozen, pipeline, runfolder
from edgekit.cli import app
from edgekit.deploy import deploy, rollback
from edgekit.devices import agent
from edgekit.errors import DeviceError, FormatError, InputError, ParityError
from edgekit.files import sha256
from edgekit.targets import get

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs of one recipe with other models."""
    folder = tmp_path_factory.mktemp("runs")
    made = []
    for seed in range(3):
        recipe = tiny_recipe.write(folder / str(seed))
        made.append(pipeline.run(recipe, folder / f"run{seed}", seed=seed).folder)
    return made


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("sshd")) as found:
        yield found


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("PATH", f"{running.folder}/bin{os.pathsep}{os.environ['PATH']}")
    yield running
    subprocess.run(["rm", "-rf", str(running.home / "edgekit"), str(running.home / ".config")], check=True)
    assert running.settled() == []


def home(server: Server) -> Path:
    return server.home / "edgekit" / "tiny"


def test_a_dry_run_says_what_it_would_do_and_does_nothing(server: Server, runs: list[Path]) -> None:
    made = deploy(runs[0], server.spec, dry_run=True)
    assert not made.done and made.before is None
    text = "\n".join(made.steps)
    assert "send 5 files" in text and f"put it into {home(server)}/versions/{made.version}" in text and "current" in text
    assert server.settled() == []


def test_versions_follow_each_other_and_come_back(server: Server, runs: list[Path]) -> None:
    first = deploy(runs[0], server.spec)
    assert first.done and first.agreement is None and any("proven there on 32 samples" in s for s in first.steps)
    folder = home(server) / "current"
    assert os.readlink(folder) == f"versions/{first.version}"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (folder / "model.onnx").read_bytes() == (runs[0] / "model.onnx").read_bytes()
    assert all(sha256(folder / name) == digest for name, digest in manifest["files"].items())
    assert manifest["version"] == first.version and (folder / "README.md").read_text().startswith(f"# tiny {first.version}")
    assert deploy(runs[0], server.spec).steps == (f"tiny {first.version} is in use already: nothing to do",)
    with pytest.raises(InputError, match="no version before"):
        rollback(runs[0], server.spec)

    second = deploy(runs[1], server.spec)
    assert second.before == first.version and second.latency_ratio and second.latency_ratio > 0
    ours, theirs = (get("onnx").run(run / "model.onnx", [_stored(run)])[0].argmax(1) for run in (runs[1], runs[0]))
    assert second.agreement == pytest.approx(100 * (ours == theirs).mean())
    third = deploy(runs[2], server.spec)
    assert sorted(p.name for p in (home(server) / "versions").iterdir()) == sorted([second.version, third.version])

    back = rollback(runs[2], server.spec)
    assert back.version == second.version and os.readlink(folder) == f"versions/{second.version}"
    assert rollback(runs[2], server.spec).version == third.version


def _stored(run: Path) -> np.ndarray:
    with np.load(run / "stage_float.npz") as archive:
        return np.asarray(archive["input0"])


def test_a_file_that_computes_something_else_is_not_deployed(server: Server, runs: list[Path], tmp_path: Path) -> None:
    good = deploy(runs[0], server.spec)
    bad = tmp_path / "bad"
    subprocess.run(["cp", "-r", str(runs[1]), str(bad)], check=True)
    with runfolder.staged(bad, keep=True) as work:
        get("onnx").lower(altered(frozen.load(work / "frozen.pt2"), "conv.weight", (1, 0, 1, 1), 70), work / "model.onnx")
    with pytest.raises(ParityError, match=rf"layer conv.*{good.version} stays in use"):
        deploy(bad, server.spec)
    assert [p.name for p in (home(server) / "versions").iterdir()] == [good.version]
    assert os.readlink(home(server) / "current") == f"versions/{good.version}"
    (bad / "model.onnx").write_bytes(b"x")
    with pytest.raises(FormatError, match="altered"):
        deploy(bad, server.spec)


def test_a_connection_lost_while_sending_changes_nothing(
    server: Server, runs: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    good = deploy(runs[0], server.spec)
    plain = deployments._files

    def padded(work: Path, *args: object) -> tuple[dict[str, Path], str]:
        files, version = plain(work, *args)  # type: ignore[arg-type]
        (tmp_path / "weights").write_bytes(np.random.default_rng(0).bytes(8 << 20))
        return {**files, "weights": tmp_path / "weights"}, version

    def cut(what: str, done: int, total: int) -> None:
        if what == "send" and done > total // 2:
            server.cut()

    monkeypatch.setattr(deployments, "_files", padded)
    with pytest.raises(DeviceError, match=r"lost|ended"):
        deploy(runs[1], server.spec, progress=cut)
    assert [p.name for p in (home(server) / "versions").iterdir()] == [good.version]
    assert os.readlink(home(server) / "current") == f"versions/{good.version}"
    server.settled()
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{server.folder}/bin{os.pathsep}{os.environ['PATH']}")
    subprocess.run(["rm", "-rf", str(server.home / ".cache")], check=True)  # the part that would be continued


@pytest.mark.parametrize("folder", ["plain", "a b %h $HOME"])
def test_systemd_takes_the_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """Written by the agent for such a home and Python; systemd-analyze also checks that the program of ExecStart is there."""
    if shutil.which("systemd-analyze") is None:
        pytest.fail("systemd-analyze is not installed; `make test` installs it, or: apt-get install systemd")
    home, python = tmp_path / folder, tmp_path / folder / "python"
    home.mkdir()
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    unit = tmp_path / "config/systemd/user/edgekit-tiny.service"
    verify = [str(shutil.which("systemd-analyze")), "--user", "verify", str(unit)]
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        said = agent._service({"name": "tiny", "unit": deployments.UNIT.format(name="tiny")}, str(home))
    assert "is in place, but systemctl cannot be run" in said
    done = subprocess.run(verify, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")  # of what it does not know it only warns
    python.unlink()
    assert "is not executable" in subprocess.run(verify, capture_output=True, text=True).stderr


def test_the_service_answers_what_the_frozen_program_says(server: Server, runs: list[Path]) -> None:
    systemctl = server.folder / "systemctl"
    systemctl.write_text(f'#!/bin/sh\necho "$@" >> {server.folder}/calls\n')
    systemctl.chmod(0o755)
    made = deploy(runs[0], server.spec, with_service=True)
    assert made.steps[-1] == "edgekit-tiny.service runs"
    calls = (server.folder / "calls").read_text().splitlines()
    assert calls == ["--user daemon-reload", "--user enable edgekit-tiny.service", "--user restart edgekit-tiny.service"]
    unit = (server.home / ".config/systemd/user/edgekit-tiny.service").read_text()
    assert re.search(rf'^ExecStart="/\S+" "{home(server)}/current/service.py"$', unit, flags=re.MULTILINE)

    command = [sys.executable, str(home(server) / "current" / "service.py"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(url) as answer:
            facts = json.load(answer)
        assert facts["version"] == made.version and facts["inputs"][0]["shape"] == [1, 1, 8, 8]
        x = _stored(runs[0])[:1]
        (wanted,) = frozen.load(runs[0] / "frozen.pt2").run(torch.from_numpy(x))
        body = io.BytesIO()
        np.save(body, x)
        assert _post(url, body.getvalue())[1]["outputs"][0] == wanted.reshape(-1).tolist()
        body = io.BytesIO()
        np.savez(body, input0=x)
        assert _post(url, body.getvalue())[1]["outputs"][0] == wanted.reshape(-1).tolist()
        assert _post(url, pickle.dumps(x))[0] == 400
        code, value = _post(url, b"\x93NUMPY")
        assert code == 400 and value["error"]
        assert _post(url, b"")[0] == 413
        assert _post(url + "other", b"x")[0] == 404
    finally:
        process.terminate()
        process.wait()
    model = home(server) / "current" / "model.onnx"
    model.write_bytes(model.read_bytes() + b"x")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "is not the file that was deployed" in done.stderr
    systemctl.write_text("#!/bin/sh\necho no bus >&2; exit 1\n")
    assert "daemon-reload failed: no bus" in deploy(runs[1], server.spec, with_service=True).steps[-1]
    systemctl.unlink()


def _post(url: str, body: bytes) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(url.rstrip("/") + "/predict" if not url.endswith("other") else url, data=body)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_what_cannot_be_deployed_is_refused(server: Server, runs: list[Path]) -> None:
    with pytest.raises(InputError, match="deployed over ssh"):
        deploy(runs[0], "local")
    with pytest.raises(InputError, match="tflite cannot be deployed: the run has onnx; export it first"):
        deploy(runs[0], server.spec, target="tflite")
    for name in ("../x", "a b", "-x", "$(x)", "x;y"):
        with pytest.raises(InputError, match="a name has letters"):
            deploy(runs[0], server.spec, name=name)


def test_the_command_line(server: Server, runs: list[Path]) -> None:
    def call(*more: str) -> Any:
        return CliRunner().invoke(app, ["deploy", str(runs[0]), "--device", server.spec, *more])

    done = call("--dry-run")
    assert done.exit_code == 0 and "would" in done.stdout and "send 5 files" in done.stdout
    done = call("--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["done"] is True
    assert isinstance(call("--rollback").exception, InputError)
