"""Setting up the emulated arm64 Linux: what is missing, damaged, interrupted or altered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from edgekit import cli
from edgekit.devices import arm64_root, connect
from edgekit.devices.arm64_cpu import CPUS, write_system_files
from edgekit.devices.emulated_linux import EmulatedLinux
from edgekit.devices.linux import Options
from edgekit.errors import FormatError, InputError, MissingTool, UnsupportedError


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with nothing in it."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "arm64"


def test_missing_programs_are_named_with_their_packages(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(empty))
    with pytest.raises(MissingTool, match=r"apt-get install qemu-user-static apt dpkg$"):
        arm64_root.setup()
    with pytest.raises(MissingTool, match=r"apt-get install qemu-user-static$"):
        connect("qemu-aarch64")
    monkeypatch.setattr("sys.argv", ["edgekit", "setup-sim", "arm64"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 3 and not (empty / "base").exists()


def test_what_cannot_be_set_up_is_refused(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="runtime 'tensorrt' is unknown; choose among: tflite-runtime, ai-edge-litert"):
        arm64_root.setup(["tensorrt"])
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(InputError, match=r"none\.list: no such file; --apt-sources"):
        arm64_root.setup(["tflite-runtime"], empty / "none.list")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10_000_000}))
    with pytest.raises(InputError, match="10 MB free, about 232 MB needed"):
        arm64_root.setup(["tflite-runtime"])


def test_a_device_needs_the_linux_and_a_known_processor(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(MissingTool, match="run: edgekit setup-sim arm64"):
        connect("qemu-aarch64")
    for spec, words in {
        "qemu-aarch64:cpu=pentium": "'pentium' is no CPU; choose one of: cortex-a53",
        "qemu-aarch64:speed=9": "'speed=9' is no option",
        "qemu-aarch64:runtime=tvm": "'tvm' is no runtime",
        "qemu-aarch64:python=/usr/bin/python3": "has one Python",
    }.items():
        with pytest.raises(InputError, match=words):
            connect(spec)


def test_executorch_is_refused_where_its_torch_cannot_start() -> None:
    for cpu in ("cortex-a53", "cortex-a72"):
        with pytest.raises(UnsupportedError, match=rf"atomic instructions of Armv8\.1, which a {cpu} \(Raspberry Pi"):
            connect(f"qemu-aarch64:cpu={cpu}&runtime=executorch")
    everything = {"packages": dict.fromkeys(arm64_root.WHEELS, "1")}
    old, new = (EmulatedLinux("x", None, Options(), everything, cpu).targets for cpu in ("cortex-a72", "cortex-a76"))
    assert old == ("tflite", "onnx") and new == ("executorch", "tflite", "onnx")


def test_a_part_is_there_whole_or_not_at_all(empty: Path) -> None:
    calls: list[str] = []

    def make(into: Path) -> Mapping[str, str]:
        into.mkdir()
        (into / "a").write_text("one")
        (into / "b").write_text("two")
        calls.append("made")
        return dict.fromkeys(arm64_root.PACKAGES, "")

    def killed(into: Path) -> Mapping[str, str]:
        into.mkdir()
        (into / "a").write_text("one")
        raise KeyboardInterrupt

    part = empty / "base"
    with pytest.raises(KeyboardInterrupt):
        arm64_root._part(part, killed)
    assert not part.exists() and list(empty.iterdir()) == []
    (empty / ".base.left.tmp").mkdir()  # what a process that was killed outright leaves
    assert arm64_root._part(part, make) == "made"
    assert [p.name for p in empty.iterdir()] == ["base"]
    assert arm64_root._part(part, make) == "kept" and calls == ["made"]
    (part / "b").write_text("twa")
    assert arm64_root._part(part, make) == "repaired" and (part / "b").read_text() == "two"
    (part / "a").unlink()
    assert arm64_root._part(part, make) == "repaired" and (part / "a").read_text() == "one"
    found = json.loads((part / "part.json").read_text())
    (part / "part.json").write_text(json.dumps(found | {"made_of": {"libc6 2.0": ""}}))  # another edgekit's list of packages
    assert arm64_root._part(part, make) == "repaired"


def test_system_files_describe_the_processor(tmp_path: Path) -> None:
    (tmp_path / "base" / "usr").mkdir(parents=True)
    for cpu in CPUS:
        write_system_files(tmp_path / cpu, cpu, tmp_path / "base")
        write_system_files(tmp_path / cpu, cpu, tmp_path / "base")
    text = (tmp_path / "cortex-a72" / "proc" / "cpuinfo").read_text()
    fields = dict(line.split("\t: ") for line in text.split("\n\n")[0].splitlines() if "\t: " in line)
    assert text.count("processor\t:") == 4 and fields["CPU implementer"] == "0x41"
    assert (fields["CPU part"], fields["CPU variant"], fields["CPU revision"]) == ("0xd08", "0x0", "3")
    newer = (tmp_path / "cortex-a76" / "proc" / "cpuinfo").read_text()
    assert "asimddp" in newer and "asimddp" not in fields["Features"]
    assert (tmp_path / "cortex-a53" / "usr").resolve() == (tmp_path / "base" / "usr").resolve()


@pytest.mark.slow
def test_a_wheel_that_is_not_the_published_one_is_refused(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "typing-extensions"
    made = arm64_root._unpacker(name)
    assert arm64_root._part(empty / "sites" / name, made) == "made"
    assert (empty / "sites" / name / "typing_extensions.py").is_file()
    assert arm64_root._part(empty / "sites" / name, made) == "kept"
    wheel = arm64_root.WHEELS[name]
    monkeypatch.setattr(arm64_root, "WHEELS", {name: replace(wheel, sha256="0" * 64)})
    with pytest.raises(FormatError, match="not the published file"):
        arm64_root._part(empty / "sites" / name, made)
    monkeypatch.setattr(arm64_root, "WHEELS", {name: replace(wheel, version="99.0")})
    with pytest.raises(InputError, match=r"pip cannot download typing-extensions 99\.0"):
        arm64_root._part(empty / "sites" / "other", made)
    assert not (empty / "sites" / "other").exists()
