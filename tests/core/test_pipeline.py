"""The pipeline: the same inputs give the same bytes, whatever happened before; a failure changes nothing."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_recipe
from tiny_recipe import content

from edgekit import cache, pipeline, runfolder
from edgekit.errors import InputError, MissingTool

pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipe.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed") / "cache"


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, store: Path) -> dict[str, bytes]:
    """A run in a process of its own with an empty cache: the bytes that everything else must equal."""
    out = recipe.parent / "undisturbed"
    assert command(recipe, out, store).wait() == 0
    return content(out)


@pytest.fixture
def warm(undisturbed: dict[str, bytes], store: Path) -> None:
    """This test's cache holds the stages of the undisturbed run."""
    shutil.copytree(store, cache.folder())


DIES = """
import os, signal
fsync = os.fsync
def fsync_or_die(handle):
    if {name!r} in os.readlink(f"/proc/self/fd/{{handle}}"):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(handle)
os.fsync = fsync_or_die
"""
"""The process ends while it writes a file whose temporary name has ``name`` in it."""


def command(recipe: Path, out: Path, cache_folder: Path, seed: str = "0", dies_at: str = "") -> subprocess.Popen[bytes]:
    code = "import torch; torch.set_num_threads(1); from edgekit.cli import main; main()"
    if dies_at:
        code = DIES.format(name=dies_at) + code
    environment = {**os.environ, "EDGEKIT_CACHE": str(cache_folder), "PYTHONHASHSEED": seed}
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", str(recipe), "--out", str(out)],
        env=environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip


FILES = {
    "compress.json", "env.json", "export_onnx.json", "frozen.pt2", "manifest.json", "model.onnx", "parity.json", "recipe.yaml",
    "report.html", "stage_compressed.npz", "stage_float.npz",
}  # fmt: skip


def test_a_run_makes_every_file_and_a_second_one_takes_every_stage_from_the_cache(
    recipe: Path, undisturbed: dict[str, bytes]
) -> None:
    out = recipe.parent / "again"
    first = pipeline.run(recipe, out)
    assert first.ok and {s.state for s in first.stages} == {"made"}
    assert set(content(out)) == FILES and runfolder.altered(out) == []
    assert content(out) == undisturbed  # another process, another hash seed
    second = pipeline.run(recipe, out)
    assert [s.name for s in second.stages if s.state == "made"] == ["load", "report"]
    assert content(out) == undisturbed
    third = pipeline.run(recipe, out, resume=False)
    assert {s.state for s in third.stages} == {"made"}
    assert content(out) == undisturbed


def test_each_verb_works_alone_on_the_folder_of_the_one_before(recipe: Path, undisturbed: dict[str, bytes]) -> None:
    out = recipe.parent / "steps"
    pipeline.compress(recipe, out)
    assert "model.onnx" not in content(out)
    pipeline.export(out)
    assert pipeline.verify(out).ok
    pipeline.report(out)
    assert content(out) == undisturbed


@pytest.mark.usefixtures("warm")
def test_a_moved_run_is_verified_on_the_samples_it_holds(recipe: Path, tmp_path: Path) -> None:
    pipeline.run(recipe, recipe.parent / "moved")
    os.rename(recipe.parent / "moved", tmp_path / "elsewhere")
    outcome = pipeline.verify(tmp_path / "elsewhere")
    assert outcome.ok and "verified on the samples stored in the run" in outcome.warnings[0]


CHANGES: dict[str, tuple[str, str, str, set[str]]] = {
    "settings": ("recipe.yaml", "minmax", "mse", {"float"}),
    "verify settings": ("recipe.yaml", "max_lsb: 1", "max_lsb: 2", {"float", "compress", "lower onnx"}),
    "weights": ("model.py", "manual_seed(seed)", "manual_seed(seed + 1)", set()),
    "graph": ("model.py", "F.relu(", "F.relu6(", set()),
    "data": ("data.py", "manual_seed(1)", "manual_seed(2)", set()),
}


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("change", CHANGES)
def test_a_stage_is_done_again_when_its_inputs_changed(change: str, tmp_path: Path) -> None:
    recipe = tiny_recipe.write(tmp_path / "r")
    assert "made" not in {s.state for s in pipeline.run(recipe, tmp_path / "run").stages[1:-1]}
    name, old, new, kept = CHANGES[change]
    text = (recipe.parent / name).read_text()
    assert old in text
    (recipe.parent / name).write_text(text.replace(old, new))
    found = {s.name for s in pipeline.run(recipe, tmp_path / "run").stages if s.state == "cached"}
    assert found == kept


def kill(process: subprocess.Popen[bytes], when: Callable[[], bool]) -> bool:
    """SIGKILL as soon as ``when`` holds; whether it came before the process was done."""
    while process.poll() is None:
        if when():
            process.kill()
            process.wait()
            return True
        time.sleep(0.002)
    return False


def appeared(out: Path, pattern: str) -> Callable[[], bool]:
    """A file of that name is in the run folder or in the one that it is built in."""
    return lambda: any(any(folder.glob(pattern)) for folder in (out, *out.parent.glob(f".{out.name}.*")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "finished"),
    [("stage_float.npz", False), ("model.onnx", False), ("parity.json", False), ("report.html", True)],
)
def test_kill_at_any_moment_and_a_rerun_gives_the_same_bytes(
    moment: str, finished: bool, recipe: Path, undisturbed: dict[str, bytes], store: Path, tmp_path: Path
) -> None:
    out = recipe.parent / f"kill-{moment}"
    if finished:  # the stages before are cached
        shutil.copytree(store, tmp_path / "cache")
    assert kill(command(recipe, out, tmp_path / "cache"), appeared(out, moment))
    assert not out.exists() or content(out) == undisturbed
    assert command(recipe, out, tmp_path / "cache", seed="1").wait() == 0
    assert content(out) == undisturbed
    assert not list(out.parent.glob(f".{out.name}.*"))  # nothing is left beside it


@pytest.mark.slow
@pytest.mark.parametrize("name", [".frozen.pt2.", ".model.onnx.", ".manifest.json."])
def test_killed_while_it_writes_a_file_a_rerun_gives_the_same_bytes(
    name: str, recipe: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = recipe.parent / f"dies-{name.strip('.')}"
    assert command(recipe, out, tmp_path / "cache", dies_at=name).wait() == -signal.SIGKILL
    assert not out.exists()
    assert command(recipe, out, tmp_path / "cache", seed="1").wait() == 0
    assert content(out) == undisturbed
    assert not list(out.parent.glob(f".{out.name}.*"))


@pytest.mark.slow
def test_killed_again_and_again_after_random_times_it_still_ends_with_the_same_bytes(
    recipe: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = recipe.parent / "random"
    for delay in (1.0, 2.5, 4.0, 5.5):
        end = time.monotonic() + delay
        kill(command(recipe, out, tmp_path / "cache"), lambda end=end: time.monotonic() > end)  # type: ignore[misc]
    assert command(recipe, out, tmp_path / "cache").wait() == 0
    assert content(out) == undisturbed


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("name", ["frozen.pt2", "model.onnx", "parity.json", "report.html", "manifest.json"])
def test_a_full_disk_at_any_file_leaves_the_previous_run(
    name: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    pipeline.run(recipe, out)
    before, real = content(out), os.fsync
    stored = content(cache.folder())

    def full(handle: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space left on the device"):
        pipeline.run(recipe, out, resume=name not in ("model.onnx", "parity.json"))
    assert content(out) == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert content(cache.folder()) == stored


@pytest.mark.usefixtures("warm")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_small_disk_and_a_read_only_one(recipe: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        pipeline.run(recipe, disk / "run")
        before = content(disk / "run")
        (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 8192))
        with pytest.raises(InputError, match="no space left"):
            pipeline.run(recipe, disk / "run")
        assert content(disk / "run") == before
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, capture_output=True)
        with pytest.raises(InputError, match="read-only"):
            pipeline.verify(disk / "run")
        assert content(disk / "run") == before
    finally:
        subprocess.run(["umount", str(disk)], check=True, capture_output=True)


def test_a_cache_that_cannot_be_written_is_a_warning(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "file"))
    outcome = pipeline.compress(recipe, tmp_path / "run")
    assert "would have to run again" in outcome.warnings[0] and (tmp_path / "run" / "frozen.pt2").is_file()


def test_a_missing_extra_is_found_before_any_work(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekit.targets import onnx

    monkeypatch.setattr(onnx, "available", lambda: "onnx is not installed")
    with pytest.raises(MissingTool, match=r"target onnx: onnx is not installed; run: pip install 'edgekit\[onnx\]'"):
        pipeline.run(recipe, tmp_path / "run")
    assert not cache.folder().exists()


@pytest.mark.usefixtures("warm")
def test_an_altered_file_is_a_failed_check_that_names_the_layer(recipe: Path, tmp_path: Path) -> None:
    import onnx

    pipeline.run(recipe, tmp_path / "run")
    path = tmp_path / "run" / "model.onnx"
    model = onnx.load(path)
    weight = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4)
    data = bytearray(weight.raw_data)
    data[3] ^= 0x20
    weight.raw_data = bytes(data)
    onnx.save(model, path)
    outcome = pipeline.verify(tmp_path / "run")
    assert not outcome.ok and outcome.parity is not None
    assert any("conv" in breach for breach in outcome.parity.breaches)
    assert "model.onnx was altered after it was written" in outcome.warnings


def test_a_killed_reconstruction_goes_on_at_its_last_finished_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekit.compress.ptq import reconstruct

    recipe = tiny_recipe.write(tmp_path / "own")
    text = recipe.read_text().replace("observer: minmax", "method: brecq, weights: int4, reconstruct: {steps: 3}")
    recipe.write_text(text)
    learn, calls = reconstruct.learn, []

    def killed(*args: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        learn(*args)

    monkeypatch.setattr(reconstruct, "learn", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.compress(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    pipeline.compress(recipe, tmp_path / "run")
    assert len(calls) == 3, "the first block was not learned again"
    once = (tmp_path / "run" / "frozen.pt2").read_bytes()
    pipeline.compress(recipe, tmp_path / "again", resume=False)
    assert len(calls) == 5 and (tmp_path / "again" / "frozen.pt2").read_bytes() == once
