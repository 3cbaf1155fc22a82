"""Which activations share one quantization, which have a fixed one, and which get fewer than 8 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edgekit.compress.ptq.observers import ActQ
from edgekit.compress.ptq.settings import Quantization, bits_of
from edgekit.compress.ptq.units import Unit

__all__ = ["eight_bit_inputs", "few_bits", "fixed_activations", "groups"]

_ROUNDED_TWICE = (
    "activations of few bits: TFLite's packed 4-bit kernels round twice and may be off by a whole level; "
    "`tflite: {pack: false}`, ExecuTorch, ONNX and firmware are not"
)
_FIXED = {"sigmoid": ActQ(1 / 256, -128), "hardsigmoid": ActQ(1 / 256, -128), "tanh": ActQ(1 / 128, 0)}


def fixed_activations(units: Sequence[Unit]) -> dict[str, ActQ]:
    """Outputs whose range is known beforehand (sigmoid, tanh), by fx node name; for 8-bit activations."""
    found = {u.output.name: _FIXED[f] for u in units if (f := u.attributes.get("function")) in _FIXED}
    sums = [u for u in units if u.kind == "binary_qmatmul" and u.attributes["features"] <= 127]
    return found | {u.output.name: ActQ(u.attributes["scale"], 0) for u in sums}  # each sum has an integer of its own


def groups(units: Sequence[Unit]) -> dict[str, str]:
    """Node name to the name of the node whose quantization it shares (union-find over inherited and joined outputs)."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            name = parent[name]
        return name

    fixed = fixed_activations(units)
    packed = {u.output for u in units if u.packed}
    for unit in units:
        for node in {*(() if unit.real else unit.inputs), unit.output} - packed:
            find(node.name)
        shared = unit.inputs[:1] if unit.inherits else unit.inputs if unit.kind == "qconcat" else ()
        for node in shared:
            if unit.kind == "qconcat" and find(node.name) in fixed:
                continue
            parent[find(unit.output.name)] = find(node.name)
    return {name: find(name) for name in list(parent)}


def few_bits(units: Sequence[Unit], settings: Quantization) -> dict[str, float]:
    """Roots of the groups of activations that get fewer than 8 bits, with the least value that each can have.

    These are the inputs of weighted layers that a ReLU made (0), or another function with a least value, or that enter from float
    (-inf) and nothing but weighted layers read as integers; not the model's own inputs. The last weighted layer's input keeps
    8 bits with ``keep_first_last_8bit``.
    """
    if bits_of(settings.activations) >= 8:
        return {}
    shared = groups(units)
    weighted = [u for u in units if u.weight is not None]
    read = {shared[u.inputs[0].name] for u in weighted}
    if settings.keep_first_last_8bit and weighted:
        read.discard(shared[weighted[-1].inputs[0].name])
    made = {u.output.name for u in units}
    least: dict[str, float] = {}
    for u in units:
        if not (u.inherits or u.kind == "qconcat"):
            least[shared[u.output.name]] = min(_least(u), least.get(shared[u.output.name], 0.0))
    other = {root for root, low in least.items() if low == -math.inf}
    entering = [(u, n) for u in units for n in u.inputs if n.name not in made and not u.real]
    other |= {shared[n.name] for u, n in entering if n.op == "placeholder" or not (u.weight is not None or u.inherits)}
    other |= {shared[u.output.name] for u in units if any(n.op == "output" for n in u.output.users)}
    entered = {shared[n.name] for _, n in entering}
    return {root: -math.inf if root in entered else least.get(root, 0.0) for root in read - other}


_LEAST = {"relu": 0.0, "relu6": 0.0, "gelu": -0.17, "silu": -0.2785, "hardswish": -0.375}
"""Least values of functions, rounded outwards."""


def _least(unit: Unit) -> float:
    if unit.activation != "none":
        return 0.0
    return _LEAST.get(str(unit.attributes.get("function")), -math.inf)


def eight_bit_inputs(units: Sequence[Unit], few: Mapping[str, float], settings: Quantization) -> list[str]:
    """Sentences on activations of few bits: what rounds them otherwise, and the layers whose inputs have more than asked for."""
    if bits_of(settings.activations) >= 8:
        return []
    said = [_ROUNDED_TWICE] if few else []
    shared = groups(units)
    weighted = [u for u in units if u.weight is not None]
    inner = weighted[1:-1] if settings.keep_first_last_8bit else weighted
    wide = [u.name for u in inner if shared[u.inputs[0].name] not in few]
    if not wide:
        return said
    names = ", ".join(wide[:5]) + (f" and {len(wide) - 5} more" if len(wide) > 5 else "")
    return [*said, f"activations: {len(wide)} layers keep 8-bit inputs, which neither a ReLU made nor float layers ({names})"]
