"""A target whose 'file' is a second frozen program: what verify has to find can be planted in it without any runtime."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekit.artifact import Artifact, Coverage, Mismatch, TensorSpec
from edgekit.frozen import FrozenProgram

SUFFIX, EXTRA = ".fake", "fake"


class FakeTarget:
    """Members of a target module, computed by ``device`` (a frozen program, altered or not)."""

    NAME = "fake"
    SUFFIX, EXTRA = SUFFIX, EXTRA

    def __init__(self, device: FrozenProgram, mismatches: tuple[Mismatch, ...] = (), silent: tuple[str, ...] = ()) -> None:
        self.device, self.mismatches, self.silent = device, mismatches, silent

    def available(self) -> str | None:
        return None

    def readback(self, path: Path, program: FrozenProgram) -> list[Mismatch]:
        return list(self.mismatches)

    def inspect(self, path: Path, program: FrozenProgram) -> Artifact:
        coverage = [Coverage(x.name, x.op.upper(), "int8", x.macs, "int8" if x.macs else "") for x in program.layers]
        spec = TensorSpec("x", program.input_shapes[0], "float32")
        return Artifact(Path(path), "fake", (spec,), (spec,), tuple(coverage), Path(path).stat().st_size, ("made by a test",))

    def run(self, path: Path, inputs: Any, threads: int = 1, progress: Any = None) -> list[np.ndarray]:
        return [y.numpy() for y in self.device.run(*map(torch.from_numpy, inputs), progress=progress)]

    def taps(self, path: Path, program: FrozenProgram, sample: Any) -> dict[str, np.ndarray]:
        traced = self.device.trace(*map(torch.from_numpy, sample))
        return {k: v.numpy() for k, v in traced.items() if v.dtype == torch.int8 and k not in self.silent}


def altered(program: FrozenProgram, tensor: str, index: tuple[int, ...], by: int) -> FrozenProgram:
    """The program with one element of a constant changed, clamped to int8 for weights."""
    exported = copy.deepcopy(program.exported)
    state = {**exported.state_dict, **exported.constants}
    value = state[tensor]
    changed = int(value[index]) + by
    value.data[index] = max(-127, min(127, changed)) if value.dtype == torch.int8 else changed
    return FrozenProgram(exported, program.name)
