"""Each layer of a file that runs, compared: fed its own inputs with the frozen program, and bit by bit with a reference.

The first comparison (:meth:`FrozenProgram.forced`) is of every file. The second is of those that have an exact model of their
kernels, which says what every layer must be to the last bit, free-running from the network's input: firmware has one in numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekit.frozen import FrozenProgram
from edgekit.frozen.binary_ops import PACKED_OPS
from edgekit.frozen.dynamic_ops import DYNAMIC_OPS
from edgekit.frozen.spiking_ops import REAL_OPS
from edgekit.metrics import HUGE, difference, sqnr_db
from edgekit.parity import LayerParity
from edgekit.recipe import Verify
from edgekit.spike_parity import FLOAT_STEP, SPIKES, explained
from edgekit.stage_table import Arrays, output_lsb, whole_steps
from edgekit.stages import Evaluation

__all__ = ["Comparison", "breaches", "compare_layers", "exact_breaches", "first_inexact"]

OUTPUTS = "the outputs"
"""Name of the program's outputs in :attr:`Comparison.inexact`."""


@dataclass(frozen=True)
class Comparison:
    """What was found of a file's layers.

    Attributes:
        layers: every tapped one, in execution order.
        tap_lsb: largest difference between the file's outputs and those that follow from its layers, in LSBs (output units where
            there is no LSB); None without taps.
        systematic: the largest such difference of one output element after averaging over the samples.
        exact: whether there was a reference that had to be met to the last bit.
        inexact: layer (or :data:`OUTPUTS`) to (values that differ from that reference, values compared).
    """

    layers: tuple[LayerParity, ...]
    tap_lsb: float | None
    systematic: float
    exact: bool = False
    inexact: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def compare_layers(
    program: FrozenProgram,
    module: Any,
    path: Path,
    samples: Evaluation,
    outputs: Arrays,
    settings: Verify,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Every layer fed the target's own inputs, and the file's outputs against those that follow from the taps.

    A runtime may fuse less once an inner tensor is an output, and then round differently here and there; so outputs are judged by
    what does not average out over the samples.

    Args:
        module: members of a target module; with a ``reference`` (see :mod:`edgekit.devices`) all is compared with that too.
        outputs: what the file itself answered for ``samples``.
    """
    found: dict[str, list[NDArray[Any]]] = {}
    expected: dict[str, list[NDArray[Any]]] = {}
    gaps: list[NDArray[Any]] = []
    rounded: dict[str, int] = {}
    counted: dict[str, tuple[int, int]] | None = None
    steps = output_lsb(program)
    for i, taps in enumerate(_taps(module, path, program, samples)):
        one = tuple(x[i : i + 1] for x in samples.inputs)
        arrays = [x.numpy() for x in one]
        tensors = {k: torch.from_numpy(np.array(v)) for k, v in taps.items()}
        forced, following = program.forced_outputs(tensors, *one)
        for key, tap in taps.items():
            found.setdefault(key, []).append(np.asarray(tap).reshape(-1))
            expected.setdefault(key, []).append(forced[key].numpy().reshape(-1))
        for key, count in _rounded(program, tensors, forced, one).items():
            rounded[key] = rounded.get(key, 0) + count
        gaps.append(_signed([y[i] for y in outputs], following, steps))
        if (reference := getattr(module, "reference", None)) and (exact := reference(path, program, arrays)) is not None:
            counted = _differing(counted or {}, exact, taps, [y[i : i + 1] for y in outputs])
        if progress:
            progress(f"{getattr(module, 'SUFFIX', '')[1:] or 'file'} layers", i + 1, len(samples))
    layers = tuple(
        _layer(layer, np.concatenate(found[layer.name]), np.concatenate(expected[layer.name]), settings, rounded.get(layer.name))
        for layer in program.layers
        if layer.name in found
    )
    if counted is not None:
        layers = tuple(replace(x, exact=counted.get(x.layer, (0, 0))[0] == 0) for x in layers)
    stacked = np.stack(gaps)
    largest, systematic = float(np.abs(stacked).max(initial=0.0)), float(np.abs(stacked.mean(axis=0)).max(initial=0.0))
    return Comparison(
        layers,
        whole_steps(largest) if found else None,
        systematic if found else 0.0,
        counted is not None,
        {k: v for k, v in (counted or {}).items() if v[0]},
    )


def breaches(name: str, found: Comparison, first: str | None, settings: Verify) -> list[str]:
    """A sentence for each layer that left tolerance."""
    return [
        f"{name}: layer {x.layer} ({x.op}) differs from the frozen program {_how_much(x, settings)}"
        f"{'; it is the first layer to diverge' if x.layer == first else ''}"
        for x in found.layers
        if not x.within
    ]


def _how_much(x: LayerParity, settings: Verify) -> str:
    if x.rounded is not None:
        of = f"{x.differing:,} of {x.elements:,} spikes when fed the same inputs"
        return f"in {of}; rounding explains {x.rounded:,} of them"
    allowed = 0 if x.op in PACKED_OPS else settings.max_lsb
    return f"by {x.max_lsb:g} LSB (share {x.share:.3g}) when fed the same inputs, {allowed:g} allowed"


def _rounded(
    program: FrozenProgram, taps: Mapping[str, torch.Tensor], forced: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor]
) -> dict[str, int]:
    """For each tapped layer of spikes how many that differ rounding explains."""
    counts = {}
    for layer in program.layers:
        if layer.op not in SPIKES or layer.name not in taps:
            continue
        expected, found = forced[layer.name], taps[layer.name].reshape(forced[layer.name].shape).to(forced[layer.name].dtype)
        counts[layer.name] = 0
        if not torch.equal(expected, found):
            arguments = program.forced_arguments(layer.name, taps, *inputs)
            counts[layer.name] = int((explained(layer, arguments, expected, found) & (expected != found)).sum())
    return counts


def exact_breaches(name: str, found: Comparison) -> list[str]:
    """One sentence, naming the first layer that is not its reference's; later ones follow from it."""
    if not found.inexact:
        return []
    first = first_inexact(found)
    where = f"layer {first[0]}" if first else OUTPUTS
    wrong, of = found.inexact[first[0] if first else OUTPUTS]
    more = f"; so do {len(found.inexact) - 1} after it" if len(found.inexact) > 1 else ""
    return [f"{name}: {where} differs from its bit-exact reference in {wrong} of {of} values, none is allowed{more}"]


def first_inexact(found: Comparison) -> list[str]:
    """The first layer that is not its reference's, or nothing."""
    return [x.layer for x in found.layers if x.layer in found.inexact][:1]


def _taps(module: Any, path: Path, program: FrozenProgram, samples: Evaluation) -> Iterator[dict[str, NDArray[Any]]]:
    """Taps of each sample; all by one call where the module is slow to start and has one for that."""
    every = [x.numpy() for x in samples.inputs]
    found = module.taps_each(path, program, every) if hasattr(module, "taps_each") else None
    for i in range(len(samples)):
        yield module.taps(path, program, [x[i : i + 1] for x in every]) if found is None else found[i]


def _differing(
    before: Mapping[str, tuple[int, int]],
    reference: tuple[Mapping[str, NDArray[Any]], Sequence[NDArray[Any]]],
    taps: Mapping[str, NDArray[Any]],
    outputs: Arrays,
) -> dict[str, tuple[int, int]]:
    """``before`` with one more sample: (values that differ, values compared) of each layer and of the outputs."""
    layers, wanted = reference
    pairs = [(name, np.asarray(taps[name]), np.asarray(layers[name])) for name in taps if name in layers]
    pairs += [(OUTPUTS, np.asarray(y), np.asarray(w)) for y, w in zip(outputs, wanted, strict=True)]
    counted = dict(before)
    for name, ours, theirs in pairs:
        wrong, of = counted.get(name, (0, 0))
        counted[name] = wrong + int((ours.reshape(-1) != theirs.reshape(-1)).sum()), of + theirs.size
    return counted


def _signed(outputs: Arrays, expected: Sequence[Any], steps: Sequence[float | None]) -> NDArray[np.float64]:
    """Differences of one sample's outputs in LSBs; what is no number is HUGE."""
    parts = [
        (np.asarray(y, dtype=np.float64).reshape(-1) - wanted.double().numpy().reshape(-1)) / (step or 1.0)
        for y, wanted, step in zip(outputs, expected, steps, strict=True)
    ]
    gaps: NDArray[np.float64] = np.nan_to_num(np.concatenate(parts), nan=HUGE, posinf=HUGE, neginf=-HUGE)
    return gaps


def _layer(layer: Any, found: NDArray[Any], expected: NDArray[Any], settings: Verify, rounded: int | None = None) -> LayerParity:
    if layer.packed:  # signs: each is right or wrong, there is no step between
        found, expected = np.unpackbits(found.astype(np.uint8)), np.unpackbits(expected.astype(np.uint8))
    if layer.op in REAL_OPS:
        unit = FLOAT_STEP * max(float(np.abs(expected).max(initial=0.0)), 1e-6)
        found, expected = found / unit, expected / unit
    if layer.op in DYNAMIC_OPS:  # in steps of an int8 tensor that just holds the layer's output
        unit = max(float(np.abs(expected).max(initial=0.0)), 1e-6) / 127
        found, expected = found / unit, expected / unit
    gap = difference(found, expected)
    allowed = 0 if layer.packed else settings.max_lsb
    within = gap.largest <= allowed if rounded is None else round(gap.share * gap.elements) <= rounded
    zero_point = layer.out_zero_point or 0
    return LayerParity(
        layer=layer.name,
        op=layer.op,
        weight_bits=layer.weight_bits,
        macs=layer.macs,
        max_lsb=gap.largest,
        share=gap.share,
        sqnr_db=sqnr_db(expected.astype(np.float64) - zero_point, found.astype(np.float64) - zero_point),
        elements=gap.elements,
        within=within,
        rounded=rounded,
    )
