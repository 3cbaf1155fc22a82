"""The table of a frozen program's layers, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from edgekit.frozen.float_layers import FloatLayer
from edgekit.frozen.program import FrozenProgram, Layer

__all__ = ["Description", "Row", "describe"]


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        layer: dotted name.
        op: operator, such as "qconv2d".
        kind: "depthwise", "grouped", "float" for an operator that stays in float, or "".
        shape: output shape, batch of one first.
        weight_bits, activation_bits: None where there is none; activations are the output's.
        parameters: number of weights and biases.
        macs: multiply-accumulates for one sample.
        bytes: packed weights, int32 biases, float32 scales; what a float operator stores.
        source: "file.py:line" in the model, "" if unknown.
        input_bits: bits of the activations that it multiplies.
        state_updates: membrane updates for one sample, neurons times time steps.
    """

    layer: str
    op: str
    kind: str
    shape: tuple[int, ...]
    weight_bits: int | None
    activation_bits: int | None
    parameters: int
    macs: int
    bytes: int
    source: str
    input_bits: int | None = None
    state_updates: int = 0

    @property
    def label(self) -> str:
        """What it multiplies: "w8a8", "w1a1", "a1" without weights, "float32"."""
        if self.kind == "float":
            return "float32"
        weight = "" if self.weight_bits is None else f"w{self.weight_bits}"
        return weight + (f"a{self.input_bits}" if self.input_bits else "")


@dataclass(frozen=True)
class Description:
    """Rows in execution order, their totals, and what stays float as (layer, op, reason).

    ``macs_by_bits``: multiply-accumulates by label, "w8a8" and so on ("a1": signs or single spikes), "float32" for float ones.
    """

    name: str
    inputs: tuple[tuple[int, ...], ...]
    rows: tuple[Row, ...]
    parameters: int
    macs: int
    bytes: int
    macs_by_bits: dict[str, int]
    unquantized: tuple[tuple[str, str, str], ...]
    state_updates: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def describe(program: FrozenProgram) -> Description:
    """Layers of a program with shapes, bits, parameters, multiply-accumulates, bytes, and the totals."""
    rows = tuple(
        _float_row(x, program.sources.get(x.name, "")) if isinstance(x, FloatLayer) else _row(x, program.sources.get(x.name, ""))
        for x in program.listed
    )
    by_bits: dict[str, int] = {}
    for row in rows:
        if row.macs:
            by_bits[row.label] = by_bits.get(row.label, 0) + row.macs
    return Description(
        program.name,
        program.input_shapes,
        rows,
        sum(r.parameters for r in rows),
        sum(r.macs for r in rows),
        sum(r.bytes for r in rows),
        by_bits,
        tuple((u.layer, u.op, u.reason) for u in program.unquantized),
        sum(r.state_updates for r in rows),
    )


def _row(layer: Layer, source: str) -> Row:
    return Row(
        layer.name, layer.op, _kind(layer), layer.shape, layer.weight_bits, layer.activation_bits, layer.parameters, layer.macs,
        layer.weight_bytes, source, layer.input_bits, layer.state_updates,
    )  # fmt: skip


def _float_row(layer: FloatLayer, source: str) -> Row:
    return Row(
        layer.name, layer.op, "float", layer.shape, None, None, layer.parameters, layer.macs, layer.weight_bytes, source
    )  # fmt: skip


def _kind(layer: Layer) -> str:
    groups, weight = int(layer.args.get("groups", 1)), layer.args.get("weight")
    if groups == 1 or not isinstance(weight, Tensor):
        return ""
    return "depthwise" if weight.shape[1] == 1 else "grouped"
