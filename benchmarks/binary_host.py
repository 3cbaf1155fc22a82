"""Time of a 1-bit layer beside an int8 layer of the same shape, in files that hold nothing else, on this machine's processor.

    python benchmarks/binary_host.py [--rounds 60] [--only "linear"]

For each shape two ExecuTorch files of 2 and of 6 equal layers in a chain, int8 (XNNPACK) and 1-bit (edgekit's kernels, each
variant that the processor has forced in turn), and the int8 ones for LiteRT. A layer's time is a quarter of the difference: what
a call costs once (quantize, dequantize, the first sign) falls out. One thread, all files in turn; of each round the fastest of
ten calls, so that calls which the system interrupted do not count, then the median over the rounds. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch
from subjects import log, write
from torch import Tensor, nn

from edgekit.firmware_sim.binary_library import VARIANTS
from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.frozen.binary_ops import pack_signs
from edgekit.targets import executorch, executorch_binary, tflite
from edgekit.targets.pte_file import read_pte

SHORT, LONG = 2, 6
SHAPES: dict[str, tuple[int, ...]] = {
    "3x3, 64 channels, 16x16": (64, 16, 16),
    "3x3, 256 channels, 8x8": (256, 8, 8),
    "linear 1024, batch 1": (1, 1024),
    "linear 1024, batch 32": (32, 1024),
}
ASKED = {
    ("3x3, 64 channels, 16x16", "avx512"): 3.0, ("3x3, 256 channels, 8x8", "avx512"): 4.5,
    ("linear 1024, batch 1", "avx512"): 6.0, ("linear 1024, batch 32", "avx512"): 4.5, ("linear 1024, batch 1", "avx2"): 3.0,
}  # fmt: skip
"""Shape and variant to how many times faster than XNNPACK's int8 it shall be."""

NOTES = (
    "Layers that hand on packed signs ('chain'), and layers between int8 tensors ('int8 ends': the sign of an int8 tensor, the "
    "1-bit layer, requantized), as in networks with shortcuts; both beside the int8 layer of the same shape.",
    "avx512 is VPOPCNTDQ; avx2 looks nibbles up by byte shuffles; the same file holds for all of them, and gives the same bits.",
)


class Net(nn.Module):
    """A chain of equal layers; kind "int8", "chain" or "int8 ends"."""

    def __init__(self, kind: str, shape: tuple[int, ...], count: int) -> None:
        super().__init__()
        rng = np.random.default_rng(count)
        conv = len(shape) == 3
        size = shape[0] if conv else shape[-1]
        self.quantize = FrozenOp("quantize", 1, {}, scale=0.05, zero_point=0, bits=8)
        sign = {"threshold": torch.zeros(1, dtype=torch.int16)}
        op = {"int8": "q", "chain": "binary_", "int8 ends": "binary_q"}[kind] + ("conv2d" if conv else "linear")
        layers: list[nn.Module] = []
        for i in range(count):
            if kind == "int8 ends" or (kind == "chain" and i == 0):
                layers.append(FrozenOp("binarize", 1, sign, dim=1 if conv else -1))
            last = kind == "chain" and i == count - 1  # the float world outside needs integers again
            layers.append(_layer(rng, op.replace("binary_", "binary_q") if last else op, size, conv))
        self.layers = nn.Sequential(*layers)
        self.dequantize = FrozenOp("dequantize", 1, {}, scale=0.05, zero_point=0)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.dequantize(self.layers(self.quantize(x)))
        return result


def _layer(rng: np.random.Generator, op: str, size: int, conv: bool) -> FrozenOp:
    inputs = 9 * size if conv else size
    more: dict[str, Any] = {}
    if conv:
        more = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
    int8 = {"out_scale": 0.05, "out_zp": 0, "activation": "none", "out_bits": 8}
    bias = torch.zeros(size, dtype=torch.int32)
    if op in ("qconv2d", "qlinear"):
        shape = (size, size, 3, 3) if conv else (size, size)
        scale = torch.full((size,), float(0.02 / inputs**0.5))
        weight = torch.from_numpy(rng.integers(-127, 128, shape).astype(np.int8))
        buffers = {"weight": weight, "weight_scale": scale, "bias": bias}
        return FrozenOp(op, 1, buffers, in_scale=0.05, in_zp=0, weight_bits=8, **int8, **more)
    signs = torch.from_numpy(rng.integers(0, 2, (size, 3, 3, size) if conv else (size, size)).astype(bool))
    buffers = {"weight": pack_signs(signs)}
    more["channels" if conv else "features"] = size
    if op.startswith("binary_q"):
        return FrozenOp(op, 1, buffers | {"weight_scale": torch.full((size,), inputs**-0.5), "bias": bias}, **int8, **more)
    return FrozenOp(op, 1, buffers | {"threshold": bias}, **more)


def frozen(kind: str, shape: tuple[int, ...], count: int) -> tuple[FrozenProgram, Tensor]:
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    return freeze_module(Net(kind, shape, count), (x,)), x


def opened_pte(path: Path, x: Tensor) -> Callable[[], Any]:
    import executorch.kernels.quantized  # noqa: F401
    from executorch.extension.pybindings import portable_lib

    if executorch_binary.needs_kernels(path.read_bytes()):
        executorch_binary.load_kernels()
    module = portable_lib._load_for_executorch(str(path))
    portable_lib._unsafe_reset_threadpool(1)
    return lambda: module.forward([x])


def opened_tflite(path: Path, x: Tensor) -> Callable[[], Any]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    value = tflite.encode(path, [x.numpy()])[0]
    interpreter.set_tensor(given["index"], value)
    return interpreter.invoke  # type: ignore[no-any-return]


def files(folder: Path, shape: tuple[int, ...]) -> tuple[dict[tuple[str, str, int], Callable[[], Any]], dict[str, int]]:
    """(kind, variant, layers) to a call; and bytes of the weights of one layer in each kind of .pte, read from the file."""
    calls: dict[tuple[str, str, int], Callable[[], Any]] = {}
    stored: dict[str, int] = {}
    there = [v for v in VARIANTS[platform.machine()] if executorch_binary.choose_variant(v)]
    executorch_binary.choose_variant(None)
    for kind in ("int8", "chain", "int8 ends"):
        for count in (SHORT, LONG):
            program, x = frozen(kind, shape, count)
            path = folder / f"{kind.replace(' ', '_')}{count}.pte"
            executorch.lower(program, path)
            wanted = program.run(x)[0].numpy()
            got = executorch.run(path, [x.numpy()])[0]
            assert np.array_equal(got, wanted) or kind == "int8", "a file that is not right has no time"
            tensors = [t for t in read_pte(path).tensors.values() if t.data is not None and len(t.shape) > 1]
            stored[kind] = sum(t.data.nbytes for t in tensors if t.data is not None) // count
            call = opened_pte(path, x)
            for variant in ["xnnpack"] if kind == "int8" else there:
                calls[kind, variant, count] = call
            if kind == "int8":
                tflite.lower(program, path.with_suffix(".tflite"))
                calls[kind, "litert", count] = opened_tflite(path.with_suffix(".tflite"), x)
    return calls, stored


def layer_times(calls: dict[tuple[str, str, int], Callable[[], Any]], rounds: int) -> dict[tuple[str, str], float]:
    """(kind, variant) to microseconds of one layer."""
    times: dict[tuple[str, str, int], list[int]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            if key[0] != "int8":
                executorch_binary.choose_variant(key[1])
            for _ in range(3):
                call()
            found = []
            for _ in range(10):
                before = perf_counter_ns()
                call()
                found.append(perf_counter_ns() - before)
            times[key].append(min(found))
    executorch_binary.choose_variant(None)
    medians = {key: float(np.median(t)) / 1e3 for key, t in times.items()}
    return {(k, v): (medians[k, v, LONG] - medians[k, v, SHORT]) / (LONG - SHORT) for k, v, count in calls if count == LONG}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--only", default="", help="shapes whose name has this in it")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, shape in SHAPES.items():
        if given.only not in name:
            continue
        with TemporaryDirectory() as folder:
            calls, stored = files(Path(folder), shape)
            found = layer_times(calls, given.rounds)
        for (kind, variant), micros in found.items():
            row = {"model": name, "kind": kind, "variant": variant, "latency_us": round(micros, 2), "weight_bytes": stored[kind]}
            row["times_faster_than_xnnpack"] = round(found["int8", "xnnpack"] / micros, 2)
            row["times_faster_than_litert"] = round(found["int8", "litert"] / micros, 2)
            if kind == "chain" and (name, variant) in ASKED:
                row["at_least"] = ASKED[name, variant]
            rows.append(row)
            log(
                f"{name:26s} {kind:10s} {variant:9s} {micros:8.2f} us  {row['times_faster_than_xnnpack']:6.2f} times XNNPACK int8"
            )
    write("binary_host", rows, NOTES, keep=bool(given.only), key=("model", "kind", "variant"))


if __name__ == "__main__":
    main()
