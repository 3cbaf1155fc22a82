"""What a ``.nir`` file holds, layer by layer, and what chips' rules say of it: ``edgekit describe FILE.nir --chip NAME``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import nir
from edgekit.errors import InputError
from edgekit.nir.semantics import FIRING, kind, number_of_steps, rule, step_length
from edgekit.targets.neuromorphic.chip_rules import Fit, check
from edgekit.targets.neuromorphic.layers import Layer, Network, network

__all__ = ["NirDescription", "describe"]


@dataclass(frozen=True)
class NirDescription:
    """A file as a table.

    Attributes:
        file, inputs, outputs, dt: its name, the shapes of its inputs, the names of its outputs, the length of a step.
        inference: what its metadata say of a whole inference: steps, encoding, readout and gain, where they do.
        columns, rows: a row for each layer of neurons, and for an output that neurons do not stand before.
        fits: what each chip's rules say.
    """

    file: str
    inputs: str
    outputs: tuple[str, ...]
    dt: float
    inference: Mapping[str, Any]
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    fits: tuple[Fit, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {
            "file": self.file, "inputs": self.inputs, "outputs": self.outputs, "dt": self.dt, **self.inference, "layers": rows,
            "chips": [fit.to_json() for fit in self.fits],
        }  # fmt: skip


def describe(path: Path, chips: Sequence[str] = ()) -> NirDescription:
    """Read a file, and check it against chips.

    Raises:
        FormatError: it cannot be read; UnsupportedError: its graph cannot be run; InputError: an unknown chip.
    """
    if not Path(path).exists() and Path(path).name == "model.nir" and Path(path).parent.is_dir():
        raise InputError(f"{Path(path).parent}: no model.nir; make it with `edgekit export {Path(path).parent} --target nir`")
    graph = nir.read(path)
    net = network(graph)
    inputs = ", ".join(f"{name} ({_shape(net.shapes[name])})" for name in net.flat.inputs)
    columns = ("layer", "neurons", "shape", "hears", "through", "weights", "reset", "tie", "spikes a step")
    rows = tuple(_row(net, layer) for layer in net.layers)
    fits = tuple(check(graph, name) for name in chips)
    facts: dict[str, Any] = {"steps": number_of_steps(graph)}
    facts |= {
        key: value.item() if isinstance(value, np.generic) else value
        for key in ("encoding", "readout", "gain")
        if (value := graph.metadata.get(key)) is not None
    }
    return NirDescription(Path(path).name, inputs, net.flat.outputs, step_length(graph), facts, columns, rows, fits)


def _row(net: Network, layer: Layer) -> tuple[Any, ...]:
    weights = sum(int(np.size(getattr(net.flat.nodes[name], "weight", ()))) for name in layer.through)
    hears = ", ".join(name + (f" ({delay} late)" if delay else "") for name, delay in layer.sources)
    how = rule(layer.name, layer.node) if kind(layer.node) in FIRING else None
    facts = (how.reset, how.tie, how.max_spikes) if how else (None, None, None)
    through = " ".join(kind(net.flat.nodes[name]) for name in layer.through) or None
    return (layer.name, kind(layer.node), _shape(layer.shape), hears, through, weights, *facts)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "1"
