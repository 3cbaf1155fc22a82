"""Environments of simulators: made by pip from local wheels, checked, repaired, and refused where something is wrong."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgekit import cli
from edgekit.devices import simulators
from edgekit.devices.simulators import Package, Simulator
from edgekit.errors import FormatError, InputError, MissingTool


def wheel(folder: Path, code: str) -> str:
    """A wheel of one module, ``tinysim`` 1.0; its SHA-256."""
    folder.mkdir(exist_ok=True)
    path, about = folder / "tinysim-1.0-py3-none-any.whl", "tinysim-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tinysim.py", code)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tinysim\nVersion: 1.0\nRequires-Dist: absent\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", f"tinysim.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Simulator:
    """A simulator of one package, which pip finds in a folder and nowhere else."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    digest = wheel(tmp_path / "wheels", "ANSWER = 42\n")
    one = Simulator({"tinysim": Package("1.0", ("0" * 64, digest))}, "for this test", "import tinysim", megabytes=0.1)
    monkeypatch.setattr(simulators, "SIMULATORS", {"tinysim": one})
    return one


def test_an_environment_is_made_kept_and_repaired(tiny: Simulator) -> None:
    with pytest.raises(MissingTool, match="tinysim is not set up; run: edgekit setup-sim tinysim"):
        simulators.environment("tinysim")
    assert simulators.setup("tinysim")["state"] == "made" and simulators.installed() == ("tinysim",)
    python, variables = simulators.environment("tinysim")
    ran = subprocess.run([*python, "-c", "import tinysim, numpy; print(tinysim.ANSWER)"], env=variables, capture_output=True)
    assert ran.stdout == b"42\n"
    assert simulators.setup("tinysim")["state"] == "kept"
    (simulators.folder("tinysim") / "tinysim.py").write_text("ANSWER = 41\n")
    assert simulators.setup("tinysim")["state"] == "repaired"
    assert (simulators.folder("tinysim") / "tinysim.py").read_text() == "ANSWER = 42\n"


def test_a_package_that_is_not_the_published_one_is_refused(tiny: Simulator, tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "ANSWER = 43\n")
    with pytest.raises(FormatError, match=r"tinysim .* is not the published file \(SHA-256 differs\)"):
        simulators.setup("tinysim")
    assert simulators.installed() == () and not simulators.folder("tinysim").exists()


def test_what_cannot_be_imported_is_not_kept(tiny: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = wheel(tmp_path / "wheels", "import a_module_that_nobody_has\n")
    one = Simulator({"tinysim": Package("1.0", (digest,))}, "", "import tinysim", megabytes=0.1)
    monkeypatch.setattr(simulators, "SIMULATORS", {"tinysim": one})
    with pytest.raises(InputError, match=r"cannot be imported: .*a_module_that_nobody_has"):
        simulators.setup("tinysim")
    assert simulators.installed() == ()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="pip cannot install tinysim"):
        simulators.setup("tinysim")


def test_another_python_is_found_or_asked_for(tiny: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = next(iter(tiny.packages.values())).sha256
    other = Simulator({"tinysim": Package("1.0", digest)}, "", "import tinysim", python=(2, 6), megabytes=0.1)
    monkeypatch.setattr(simulators, "SIMULATORS", {"tinysim": other})
    with pytest.raises(MissingTool, match=r"tinysim needs Python 2\.6, .* --python PATH"):
        simulators.setup("tinysim")
    with pytest.raises(InputError, match=r"is no Python 2\.6, which tinysim needs"):
        simulators.setup("tinysim", Path(sys.executable))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["neuron"], "system 'neuron' is unknown; choose one of: arm64, spikingjelly"),
        (["nest", "--python", "python3"], "runs in edgekit's own Python"),
        (["nest", "--runtime", "onnxruntime"], "--python is for lava"),
        (["arm64", "--python", "python3"], "--python is for lava"),
    ],
)
def test_the_command_line_says_what_is_wrong(words: list[str], message: str) -> None:
    ended = CliRunner().invoke(cli.app, ["setup-sim", *words])
    assert isinstance(ended.exception, InputError) and message in str(ended.exception)


def test_the_table_is_complete() -> None:
    for name, one in simulators.SIMULATORS.items():
        assert one.about and "import" in one.check, name
        assert all(len(digest) == 64 for package in one.packages.values() for digest in package.sha256)
