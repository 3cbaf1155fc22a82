"""Firmware on emulated boards: instructions, flash and RAM of the MLPerf Tiny networks, beside float C and emlearn's network.

    python benchmarks/firmware.py [--parts costs kernels sets flips] [--boards mps2-an386 ...] [--models resnet8 ...]

Instructions are counted by the emulator and repeat exactly; they are not time. Every firmware must equal its numpy reference bit
by bit, and every float program PyTorch, or its figures do not count. Rows of ``results/firmware.json`` have a ``kind``: "network"
and "kernel" (one inference), "set" (whole evaluation sets on the board), "flips" (bits turned over in flash).
emlearn is installed by pip into a folder of its own under runs/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cortex_m_kernels
import firmware_peers as peers
import numpy as np
import subjects
import torch
from torch import nn

from edgekit import metrics, recipe, source
from edgekit.compress.steps import apply
from edgekit.data import Data
from edgekit.errors import UnsupportedError
from edgekit.firmware_sim.boards import BOARDS, CORES
from edgekit.firmware_sim.count import count
from edgekit.firmware_sim.kernels import KERNEL_SETS
from edgekit.frozen import FrozenProgram
from edgekit.targets import cortex_m, get
from edgekit.targets.cortex_m import host
from edgekit.targets.cortex_m.preparation import in_program_layout, prepare, simulate, specs, to_stored

sys.path.insert(0, str(subjects.ROOT / "tests"))
import bit_flips

MODELS = ("resnet8", "dscnn", "mobilenet", "autoencoder", "resnet8_w4a8", "dscnn_w4a8")
REFERENCES = {
    "resnet8": "ic/pretrainedResnet_quant.tflite",
    "dscnn": "kws/kws_ref_model.tflite",
    "mobilenet": "vww/vww_96_int8.tflite",
    "autoencoder": "ad/ad01_int8.tflite",
}
BOUNDS = {
    ("resnet8", "cortex-m4"): 1.35,
    ("resnet8", "cortex-m55"): 0.30,
    ("dscnn", "cortex-m4"): 1.9,
    ("dscnn", "cortex-m55"): 0.55,
}
"""Instructions per multiply-accumulate of the whole network, not to be exceeded."""
FLIPS = 1000


class Subject:
    """A network of examples/mlperf_tiny: float model, data, frozen program."""

    def __init__(self, name: str) -> None:
        settings = recipe.load(subjects.ROOT / "examples" / "mlperf_tiny" / f"{name}.yaml")
        self.name = name
        self.data: Data = source.load_data(settings.data)
        self.model: nn.Module = source.load_model(settings.model)
        self.program: FrozenProgram = apply(self.model, settings.compress, self.data, name=name).program

    @property
    def samples(self) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.data.evaluation
        return x, y


def costs(net: Subject, board: str, arena: int | None) -> Iterator[dict[str, Any]]:
    """One row for each kernel set and, for int8 weights, each peer; what does not fit says so."""
    for kernel_set in dict.fromkeys((CORES[BOARDS[board].core].kernel_set, "portable")):
        yield _row(net.name, board, "edgekit", kernel_set, partial(_ours, net, board, kernel_set, arena))
    if net.name.endswith("w4a8"):
        return
    x = net.samples[0][:1]
    with torch.no_grad():
        expected = net.model(x).numpy()
    stored = x.permute(0, 2, 3, 1).contiguous().numpy() if x.dim() == 4 else x.numpy()
    firmware = prepare(net.program, "portable")
    made = {"float C, -O3": partial(peers.float_c, net.program, firmware, net.model)}
    if net.name == "autoencoder":
        folder = peers.emlearn_packages(subjects.WORK / "emlearn")
        made[f"emlearn {peers.EMLEARN}, -O3"] = partial(peers.emlearn, firmware, net.model, folder)
    for variant, make in made.items():
        yield _row(net.name, board, variant, "", partial(peers.cost, make, board, stored, expected))


def _row(model: str, board: str, variant: str, kernel_set: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    core = BOARDS[board].core
    head = {"kind": "network", "model": model, "board": board, "core": core, "variant": variant, "kernel_set": kernel_set}
    try:
        row = head | work()
    except UnsupportedError as error:
        return head | {"does_not_fit": subjects.one_line(error)}
    row["macs"] = MACS[model]
    row["instructions_per_mac"] = round(row["instructions"] / row["macs"], 4)
    subjects.log(
        f"{model:12} {board:17} {variant:22} {kernel_set:9} {row['instructions']:>12,} {row['instructions_per_mac']:.3f}/MAC"
    )
    return row


MACS: dict[str, int] = {}


def _ours(net: Subject, board: str, kernel_set: str, arena: int | None) -> dict[str, Any]:
    core = BOARDS[board].core
    options = cortex_m.Options(board=board, kernels=kernel_set)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as name:
        artifact = get(core).lower(net.program, Path(name) / "model.c", options)
        facts, built = host.built(Path(name))
        x = net.samples[0][:1].numpy()
        data = b"".join(v.tobytes() for v in to_stored(facts.inputs, [x]))
        counts = count(built, data, [step[0] for step in facts.steps])
        seconds = _building(Path(name), data) if kernel_set == CORES[core].kernel_set else {}
    firmware = prepare(net.program, kernel_set)
    spec = specs(firmware, firmware.outputs)[0]
    expected = simulate(firmware, [x])[0][spec.name]
    if not np.array_equal(in_program_layout(spec, np.frombuffer(counts.result.output, np.int8)), expected):
        raise SystemExit(f"{net.name} on {board} ({kernel_set}) differs from its numpy reference")
    own = kernel_set == CORES[core].kernel_set
    return {
        "instructions": sum(counts.marks.values()), **artifact.memory,
        "instructions_per_mac_bound": BOUNDS.get((net.name, core)) if own else None,
        "tflm_arena": arena, **seconds,
    }  # fmt: skip


def _building(folder: Path, data: bytes) -> dict[str, float]:
    """Wall and processor seconds to compile everything, boot and run one sample, nothing kept from before."""
    code = (
        "import json, os, sys, time; from pathlib import Path; from edgekit.targets.cortex_m import host;"
        "folder, data = Path(sys.argv[1]), sys.stdin.buffer.read();"
        "before, begin = os.times(), time.perf_counter(); host.boot(folder, data, 1);"
        "wall, after = time.perf_counter() - begin, os.times();"
        "print(json.dumps([wall, sum(after[:4]) - sum(before[:4])]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], input=data, capture_output=True, check=True)
    wall, processor = json.loads(done.stdout)
    return {"wall_seconds": round(wall, 2), "processor_seconds": round(processor, 2)}


def tflm_arena(model: str) -> int | None:
    """Bytes of arena that TensorFlow Lite for Microcontrollers says it takes for MLPerf's int8 file; None without the package."""
    if model not in REFERENCES:
        return None
    path = Path(os.environ.get("EDGEKIT_DATA") or subjects.ROOT.parent / "shared" / "data") / "mlperf_tiny" / REFERENCES[model]
    code = (
        "import sys; from tflite_micro import runtime;"
        "runtime.Interpreter.from_file(sys.argv[1], arena_size=1 << 20).print_allocations()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    found = re.search(r"Arena allocation total (\d+) bytes", done.stdout + done.stderr)
    return int(found[1]) if found else None


def kernels(boards: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Single layers on the boards that have bounds for them."""
    for layer in cortex_m_kernels.LAYERS:
        for board in boards:
            core = BOARDS[board].core
            for kernel_set in dict.fromkeys(("portable", CORES[core].kernel_set)):
                row = cortex_m_kernels.measure(layer, board, kernel_set)
                yield {"kind": "kernel", "core": core, "variant": "edgekit", **row}


def sets(net: Subject, board: str, limit: int | None) -> dict[str, Any]:
    """The whole evaluation set on the emulated board, beside the frozen program and the float model."""
    x, y = net.samples
    x, y = x[:limit], y[:limit]
    with tempfile.TemporaryDirectory() as name:
        path = get(BOARDS[board].core).lower(net.program, Path(name) / "model.c", cortex_m.Options(board=board)).path
        begin = time.perf_counter()
        (outputs,) = get(BOARDS[board].core).run(path, [x.numpy()])
        seconds = time.perf_counter() - begin
    (frozen,) = net.program.run(x)
    with torch.no_grad():
        floats = torch.cat([net.model(part) for part in torch.split(x, 100)])
    scale = float(net.program.layers[-1].args["scale"])
    steps = np.abs(np.rint((outputs - frozen.numpy()) / scale))
    judge = [metrics.score(net.data.metric, values, y.numpy()) for values in (outputs, frozen.numpy(), floats.numpy())]
    row = {
        "kind": "set", "model": net.name, "board": board, "core": BOARDS[board].core, "variant": "edgekit",
        "kernel_set": CORES[BOARDS[board].core].kernel_set, "samples": len(x), "metric": metrics.metric_name(net.data.metric),
        "on_board": judge[0], "frozen": judge[1], "float": judge[2],
        "same_class_as_frozen": metrics.top1_agreement(outputs, frozen.numpy()),
        "equal_outputs": 100 * float((steps == 0).mean()), "max_lsb": float(steps.max()), "mean_lsb": float(steps.mean()),
        "seconds": round(seconds, 1),
    }  # fmt: skip
    subjects.log(" ".join(f"{k}={v}" for k, v in row.items()))
    return row


def flips(net: Subject, board: str, n: int) -> dict[str, Any]:
    """Random single-bit flips in the constants of the flashed image."""
    with tempfile.TemporaryDirectory() as name:
        path = get(BOARDS[board].core).lower(net.program, Path(name) / "model.c", cortex_m.Options(board=board)).path
        facts, built = host.built(path.parent)
        found = list(bit_flips.flips(built, bytes(sum(s.size for s in facts.inputs)), n, Path(name)))
    row = {"kind": "flips", "model": net.name, "board": board, "core": BOARDS[board].core, "variant": "edgekit", "kernel_set": ""}
    row |= bit_flips.summary(found)
    subjects.log(" ".join(f"{k}={v}" for k, v in row.items()))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--boards", nargs="+", choices=list(BOARDS), default=list(BOARDS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--samples", type=int, help="of each evaluation set, for trying the script out")
    parser.add_argument("--flips", type=int, default=FLIPS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    assert KERNEL_SETS[0] == "portable"
    nets = [Subject(name) for name in options.models] if {*options.parts} - {"kernels"} else []
    MACS.update({net.name: prepare(net.program, "portable").macs for net in nets})
    rows: list[dict[str, Any]] = []
    if "costs" in options.parts:
        arenas = {net.name: tflm_arena(net.name) for net in nets}
        rows += [row for net in nets for board in options.boards for row in costs(net, board, arenas[net.name])]
    if "kernels" in options.parts:
        rows += kernels([b for b in ("mps2-an386", "mps3-an547") if b in options.boards])
    if "sets" in options.parts:
        rows += [sets(net, "mps2-an386", options.samples) for net in nets if net.name in REFERENCES]
    if "flips" in options.parts:
        rows += [flips(net, "mps2-an386", options.flips) for net in nets if net.name == "resnet8"]
    subjects.write("firmware", rows, NOTES, keep=True, key=KEY, whole="python benchmarks/firmware.py")


KEY = ("kind", "model", "kernel", "board", "variant", "kernel_set")
PARTS = ("costs", "kernels", "sets", "flips")
NOTES = (
    "TFLM's arena is what its interpreter records for MLPerf's int8 file (with the structs of a 64-bit host); "
    "it holds no scratch of optimized kernels, ours does.",
)


if __name__ == "__main__":
    main()
