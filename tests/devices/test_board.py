"""``qemu:<board>``: counts, memory, what verify finds there, and every way a user can go wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_recipe
from core.test_cli import call

from edgekit import devices, pipeline, profile
from edgekit.errors import FirmwareFault, FormatError, InputError, MissingTool, UnsupportedError
from edgekit.firmware_sim import count as counting
from edgekit.firmware_sim import toolchain
from edgekit.firmware_sim.boards import BOARDS, CORES
from edgekit.frozen import load
from edgekit.parity import Parity
from edgekit.profile import Settings
from edgekit.targets import cortex_m

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cortex_m.M4.available() is not None, reason="needs arm-none-eabi-gcc and qemu-system-arm"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with firmware for a Cortex-M4 and an M0."""
    recipe = tiny_recipe.write(tmp_path_factory.mktemp("tiny"), "cortex-m4, cortex-m0")
    with recipe.open("a") as file:
        file.write("profile: [qemu:mps2-an386]\n")
    out = recipe.parent / "run"
    code, text = call("run", recipe, "--out", out, "--json")
    assert code == 0 and json.loads(text)["profiles"][0]["device"] == "qemu:mps2-an386"
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy beside it, where its data are found."""
    return Path(shutil.copytree(finished, finished.parent / tmp_path.name))


def board_profile(run: Path, name: str, target: str = "cortex-m4", **settings: Any) -> profile.Profile:
    device = devices.connect(name)
    x = np.load(run / "stage_float.npz")["input0"][:2]
    program = load(run / "frozen.pt2")
    found: profile.Profile = device.profile(run / f"model.{target}" / "model.c", target, program, Settings(**settings), [x])
    return found


def test_a_run_counts_and_verifies_on_its_board(finished: Path) -> None:
    (found,) = profile.load(finished / "profile.json")
    assert (found.target, found.file, found.unit) == ("cortex-m4", "model.cortex-m4/model.c", "instructions")
    assert [layer.layer for layer in found.layers] == ["conv", "max_pool2d", "head"]
    assert sum(layer.instructions or 0 for layer in found.layers) == found.total
    assert found.macs == 8 * 8 * 9 * 4 + 64 * 3 and sum(layer.macs for layer in found.layers) == found.macs
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    assert len(found.fits) > 20 and all(row["fits"] for row in found.fits)
    parity = Parity.load(finished / "parity.json")
    assert [s.name for s in parity.stages[3:]] == ["cortex-m0 on qemu:microbit", "cortex-m4 on qemu:mps2-an386"]
    assert all(a.exact and all(x.exact for x in a.layers) and a.stage.metric is not None for a in parity.artifacts)
    page = (finished / "report.html").read_text()
    assert "cortex-m4 on qemu:mps2-an386: " in page and "equals its bit-exact reference (4 samples)" in page


def test_counts_are_the_same_over_runs_and_from_make(finished: Path, tmp_path: Path) -> None:
    """The second run compiles what was exported by its own Makefile and counts from reset by the timer."""
    first, second = board_profile(finished, "qemu:mps2-an386"), board_profile(finished, "qemu:mps2-an386", num_runs=9, seconds=1)
    assert replace(second, notes=first.notes) == first and second.notes[-1].startswith("num_runs, min_secs: not used")
    assert board_profile(finished, "qemu:mps2-an386", per_layer=False).layers == ()
    folder = tmp_path / "project"
    shutil.copytree(finished / "model.cortex-m4", folder)
    subprocess.run(["make", "-s", "DEFINES=-DEK_TICKS"], cwd=folder, check=True, capture_output=True)
    from edgekit.targets.cortex_m import host
    from edgekit.targets.cortex_m.preparation import to_stored

    facts, built = host.built(finished / "model.cortex-m4")
    x = np.load(finished / "stage_float.npz")["input0"]
    data = to_stored(facts.inputs, [x[:1]])[0].tobytes()
    from edgekit.firmware_sim.qemu import run

    made = toolchain.Firmware(built.project, folder / "firmware.elf")
    seconds = []
    for samples in (1, 3):
        log = run(made, data * samples, extra=["-icount", "shift=6"]).checked().log
        seconds.append((log["ticks_high"] * (1 << 24) + log["ticks_low"]) / BOARDS["mps2-an386"].timer_hz)
    by_timer = (seconds[1] - seconds[0]) / 2 * 1e9 / 64
    assert first.total <= by_timer <= first.total + 400  # input, output and the loop around them
    text = subprocess.run(["arm-none-eabi-size", made.elf], capture_output=True, text=True, check=True).stdout.split()
    flash = int(text[6]) + int(text[7])
    assert abs(flash - first.figures["flash_bytes"]) < 200  # the timer's handler


def test_what_memory_there_is(finished: Path) -> None:
    figures = board_profile(finished, "qemu:mps2-an386").figures
    written = re.search(r"MODEL_ARENA_BYTES (\d+)u", (finished / "model.cortex-m4" / "model.h").read_text())
    assert written and 0 < figures["arena_bytes"] == int(written[1]) <= 1.1 * figures["arena_bound_bytes"]
    assert figures["flash_bytes"] >= figures["flash_code_bytes"] + figures["flash_weights_bytes"]
    assert 0 < figures["stack_bytes"] < figures["stack_reserved_bytes"] == 4096
    assert figures["ram_bytes"] == figures["arena_bytes"] + figures["static_ram_bytes"] + 4096


def test_libraries_are_counted_apart(finished: Path) -> None:
    """Products of 64 bits are calls of libgcc on a Cortex-M0 and instructions on an M4."""
    small, large = board_profile(finished, "qemu:microbit", "cortex-m0"), board_profile(finished, "qemu:mps2-an386")
    assert large.figures["library_instructions"] == 0
    conv = small.layers[0]
    assert conv.library_instructions and 0 < conv.library_instructions < (conv.instructions or 0)
    assert small.figures["library_instructions"] == sum(x.library_instructions or 0 for x in small.layers)


@pytest.mark.slow
@pytest.mark.parametrize("board", BOARDS)
def test_every_board(board: str, finished: Path, tmp_path: Path) -> None:
    core = BOARDS[board].core
    run = Path(shutil.copytree(finished, finished.parent / tmp_path.name))
    code, text = call("profile", run, "--device", f"qemu:{board}", "--json")
    found = json.loads(text)
    assert code == 0 and found["profiles"][0]["target"] == core and found["profiles"][0]["total"] > 0
    assert found["warnings"] == ([] if core in ("cortex-m0", "cortex-m4") else [WARNING.format(core)])
    code, text = call("verify", run, "--device", f"qemu:{board}", "--json")
    (ours,) = [a for a in json.loads(text)["parity"]["artifacts"] if a["device"] == f"qemu:{board}"]
    assert code == 0 and ours["exact"] is True and max(x["max_lsb"] for x in ours["layers"]) <= 1


WARNING = "exported {} first; `edgekit verify` proves what it computes"


def test_a_core_stands_for_its_board() -> None:
    for core in CORES.values():
        assert devices.connect(f"qemu:{core.name}").name == f"qemu:{core.board}"


def test_without_the_plugin_the_timer_counts_and_it_is_said(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = board_profile(finished, "qemu:mps2-an386")

    def missing(program: str) -> str:
        raise MissingTool(f"{program} is not installed")

    monkeypatch.setattr(counting, "find", missing)
    found = board_profile(finished, "qemu:mps2-an386")
    assert found.layers == () and "gcc is not installed" in found.method and "icount" in found.method
    assert exact.total <= found.total <= exact.total + 400
    assert found.figures["flash_bytes"] == exact.figures["flash_bytes"]


def edit(path: Path, pattern: str, change: str | Callable[[re.Match[str]], str]) -> None:
    text, count = re.subn(pattern, change, path.read_text(), count=1, flags=re.DOTALL)
    assert count == 1
    path.write_text(text)


def test_an_altered_weight_is_named_on_the_board(run: Path) -> None:
    edit(run / "model.cortex-m4" / "model.c", r"(int8_t model_1?[0-9]_weights\[\d+\] EK_WEIGHTS = \{\s+)(-?\d+)", r"\g<1>77")
    code, text = call("verify", run, "--device", "qemu:mps2-an386", "--json")
    found = json.loads(text)
    assert code == 1 and found["warnings"] == ["model.cortex-m4/model.c was altered after it was written"]
    assert any("layer conv: weights[0] is 77 in the file" in b for b in found["parity"]["breaches"])
    sentence = "cortex-m4 on qemu:mps2-an386: layer conv differs from its bit-exact reference in"
    assert any(b.startswith(sentence) for b in found["parity"]["breaches"])
    ours = next(a for a in found["parity"]["artifacts"] if a["target"] == "cortex-m4")
    assert ours["first_diverging"] == "conv" and ours["exact"] is False
    other = next(a for a in found["parity"]["artifacts"] if a["target"] == "cortex-m0")
    assert other["exact"] is True and other["breaches"] == []  # kept from before
    with pytest.raises(FormatError, match=r"model\.cortex-m4/model\.c was altered after it was written; run `edgekit verify`"):
        pipeline.profile(run, ["qemu:mps2-an386"])


def test_a_kernel_that_rounds_otherwise_is_found_though_it_stays_within_a_step(run: Path) -> None:
    """Half of a step is no longer added before the shift: no layer leaves the tolerance, all constants are right."""
    edit(run / "model.cortex-m0" / "runtime" / "internal.h", r"\(1 << \(n - 1\)\)\) >> n", "(1 << (n - 2))) >> n")
    code, text = call("verify", run, "--device", "qemu:microbit")
    assert code == 1 and "within" not in text
    parity = Parity.load(run / "parity.json")
    (ours,) = [a for a in parity.artifacts if a.target == "cortex-m0"]
    assert ours.mismatches == () and all(x.within for x in ours.layers) and ours.first_diverging == "conv"
    (breach,) = ours.breaches
    assert re.match(r"cortex-m0 on qemu:microbit: layer conv differs from its bit-exact reference in \d+ of \d+ values", breach)


def test_a_device_of_the_recipe_is_verified_too(finished: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe.write(tmp_path / "tiny", "cortex-m4")
    edit(recipe, r"max_lsb: 1", "max_lsb: 1, devices: [qemu:netduinoplus2, qemu:cortex-m4]")
    outcome = pipeline.run(recipe, tmp_path / "run")
    assert outcome.ok and outcome.parity is not None
    assert [a.device for a in outcome.parity.artifacts] == ["qemu:mps2-an386", "qemu:netduinoplus2"]
    again = pipeline.verify(tmp_path / "run")
    assert again.parity is not None and [a.device for a in again.parity.artifacts] == ["qemu:mps2-an386", "qemu:netduinoplus2"]


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["--device", "qemu:mps9"], 2, "device 'qemu:mps9': no such board; choose one of: qemu:microbit, qemu:mps2-an385"),
        (["--device", "qemu"], 2, "device 'qemu': no such board"),
        (["--device", "qemu:microbit", "--target", "cortex-m4"], 2, "device qemu:microbit runs cortex-m0, not cortex-m4"),
    ],
)
@pytest.mark.parametrize("verb", ["profile", "verify"])
def test_a_wrong_device_is_one_sentence(verb: str, args: list[str], code: int, sentence: str, run: Path) -> None:
    before = tiny_recipe.content(run)
    found, text = call(verb, run, *args)
    assert found == code and sentence in text and "\n" not in text
    assert tiny_recipe.content(run) == before


def test_firmware_that_was_not_exported_is_not_verified(run: Path) -> None:
    with pytest.raises(InputError, match=r"runs cortex-m7; make one with `edgekit export .* --target cortex-m7`"):
        pipeline.verify(run, devices=["qemu:mps2-an500"])


@pytest.mark.parametrize("tool", ["qemu-system-arm", "arm-none-eabi-gcc"])
def test_a_missing_tool_is_named_before_anything_is_done(tool: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shutil.which
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None if name == tool else found(name))
    code, text = call("profile", run, "--device", "qemu:mps2-an386")
    assert code == 3 and tool in text and "apt-get install" in text


def test_files_that_are_gone_are_named(run: Path) -> None:
    (run / "model.cortex-m4" / "runtime" / "pool.c").unlink()
    for verb in (pipeline.profile, pipeline.verify):
        with pytest.raises(FormatError, match=r"runtime/pool\.c"):
            verb(run, ["qemu:mps2-an386"]) if verb is pipeline.profile else verb(run, devices=["qemu:mps2-an386"])
    (run / "frozen.pt2").unlink()
    with pytest.raises(FormatError, match=r"has no frozen\.pt2; make the run again"):
        pipeline.profile(run, ["qemu:mps2-an386"])


def test_an_arena_larger_than_the_board_is_said_in_bytes(finished: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe.write(tmp_path / "tiny", "cortex-m3: {stack_bytes: 8000}")
    folder = pipeline.run(recipe, tmp_path / "run").folder
    before = tiny_recipe.content(folder)
    sentence = r"^stm32vldiscovery: stack, data and arena need \d+ bytes more than its 8192 bytes of RAM; use a smaller"
    for verb in ("profile", "verify"):
        with pytest.raises(UnsupportedError, match=sentence):
            getattr(pipeline, verb)(folder, devices=["qemu:stm32vldiscovery"])
    assert tiny_recipe.content(folder) == before


def test_what_is_built_in_the_folder_changes_nothing(run: Path) -> None:
    """`make` leaves an ELF file and more there; what was found of the firmware still holds."""
    subprocess.run(["make", "-s"], cwd=run / "model.cortex-m4", check=True, capture_output=True)
    outcome = pipeline.verify(run, devices=["qemu:microbit"])
    assert outcome.parity is not None and {a.target for a in outcome.parity.artifacts} == {"cortex-m0", "cortex-m4"}
    pipeline.report(run)
    assert "exported again after this was measured" not in (run / "report.html").read_text()
    edit(run / "model.cortex-m4" / "main.c", "model_run", "model_run ")
    outcome = pipeline.verify(run, devices=["qemu:microbit"])
    assert outcome.parity is not None and {a.target for a in outcome.parity.artifacts} == {"cortex-m0"}
    assert outcome.parity.unchecked == ("cortex-m4",)
    pipeline.report(run)
    assert "exported again after this was measured" in (run / "report.html").read_text()


def test_a_fault_on_the_board_is_a_sentence(run: Path) -> None:
    """A stack that is too small for the network."""
    edit(run / "model.cortex-m4" / "model.json", r'"stack_bytes": 4096', '"stack_bytes": 64')
    code, text = call("verify", run, "--device", "qemu:mps2-an386")
    assert code == FirmwareFault.exit_code and "stack overflow" in text and "raise stack_bytes" in text
