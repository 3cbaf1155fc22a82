"""What a target makes of a frozen program: a file and the facts read back from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Artifact", "Coverage", "Mismatch", "TapFile", "TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of an artefact: shape with batch, numpy dtype name, and scale and zero point if it is integer."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True)
class Coverage:
    """How one frozen layer runs in the artefact.

    Attributes:
        layer: frozen layer's name, or the file's own op name for an op the program does not have.
        op: operator in the file, such as CONV_2D, QLinearConv, XNNConv2d.
        runs: "delegated", "int8", "int16", "float", or "binary" (1-bit kernels of edgekit's own).
        macs: multiply-accumulates for one sample.
        storage: how the weights are stored: "int8", "int4", "int2", "int1", "float32"; "" without weights.
        note: why, where it is not what was asked for.
    """

    layer: str
    op: str
    runs: str
    macs: int = 0
    storage: str = ""
    note: str = ""


@dataclass(frozen=True)
class Mismatch:
    """A fact read from a file that differs from the frozen program: which layer, which field, and both values in words."""

    layer: str
    field: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.field} is {self.found} in the file, {self.expected} in the frozen program"


@dataclass(frozen=True)
class TapFile:
    """How to see a file's inner results: what to run in its place, and what the results are.

    Attributes:
        data: bytes of a copy that has inner results as outputs; None: run the file itself.
        tensors: numbers of the tensors to read after a run, besides the outputs (TFLite).
        layers: from all that one run gave (outputs, then tensors, batch of one) to each layer's int8 output, in the program's
            layout, by layer name.
    """

    data: bytes | None
    tensors: tuple[int, ...]
    layers: Callable[[Sequence[Any]], dict[str, Any]]


@dataclass(frozen=True)
class Artifact:
    """A lowered file. ``path`` holds it; everything else was read back from it."""

    path: Path
    target: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    coverage: tuple[Coverage, ...]
    bytes: int
    notes: tuple[str, ...] = ()
    memory: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; the path as the file's name only."""
        return {**asdict(self), "path": self.path.name}

    @property
    def share_of_macs(self) -> dict[str, float]:
        """Share of the multiply-accumulates by how they run, for example {"delegated": 1.0}."""
        total = sum(c.macs for c in self.coverage) or 1
        shares: dict[str, float] = {}
        for c in self.coverage:
            if c.macs:
                shares[c.runs] = shares.get(c.runs, 0.0) + c.macs / total
        return shares
