"""NIR: a frozen spiking program becomes a ``.nir`` file for simulators and chips, and is read back and run in float64.

What NIR has no field for (reset and tie rule, initial membrane, dt, steps, encoding, readout) stands in the file's metadata
(:mod:`edgekit.nir.semantics`, :mod:`edgekit.nir.from_program`). It is run by edgekit's own interpreter, without a simulator.

Limits: spiking programs in float; no maximum pool, no integer neurons.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.artifact import Artifact, Coverage, Mismatch, TensorSpec
from edgekit.errors import ParityError
from edgekit.frozen import FrozenProgram
from edgekit.nir import Trace, interpret, read, write
from edgekit.nir.from_program import to_nir
from edgekit.nir.inference import encode, read_out
from edgekit.nir.semantics import FIRING, INTEGRATING, flatten, kind

__all__ = ["EXTRA", "SUFFIX", "Options", "available", "inspect", "lower", "readback", "run", "taps"]

SUFFIX = ".nir"
EXTRA = "neuromorphic"

_BATCH = 16
"""Samples interpreted at once."""


@dataclass(frozen=True)
class Options:
    """There is nothing to choose."""


def available() -> str | None:
    """None if files can be made and run here, else what is missing."""
    if importlib.util.find_spec("nir") is None:
        return "nir is not installed; run: pip install 'edgekit[neuromorphic]'"
    return None


def lower(program: FrozenProgram, path: Path, options: Options | None = None) -> Artifact:
    """Write ``path`` and prove by reading it back that it holds the program.

    Raises:
        UnsupportedError: a layer that NIR cannot hold; names it.
        ParityError: the file does not hold what the program says.
        MissingTool: nir is not installed.
    """
    write(path, to_nir(program))
    if mismatches := readback(path, program):
        raise ParityError(f"{path}: {mismatches[0]}")
    return inspect(path, program)


def inspect(path: Path, program: FrozenProgram) -> Artifact:
    """Facts read from the file: its inputs and outputs, its nodes, and the layers they are.

    Raises:
        FormatError, UnsupportedError: the file is damaged, or holds nodes that NIR 1.0.8 does not have.
    """
    graph = read(path)
    flat = flatten(graph)
    macs = {x.name: x.macs for x in program.counted}
    rows = tuple(
        Coverage(name, kind(node), "float", macs.get(name, 0), "float32" if hasattr(node, "weight") else "")
        for name, node in flat.nodes.items()
        if kind(node) not in ("Input", "Output")
    )
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.op] = counts.get(row.op, 0) + 1
    facts = {k: _plain(v) for k, v in graph.metadata.items() if np.ndim(v) == 0}
    notes = (
        f"one step of {', '.join(f'{count} {op}' for op, count in sorted(counts.items()))}; "
        f"metadata: {', '.join(f'{k} {v}' for k, v in sorted(facts.items()))}",
    )
    inputs = tuple(TensorSpec(n, (1, *_ints(flat.nodes[n].input_type["input"])), "float32") for n in flat.inputs)
    outputs = tuple(TensorSpec(n, (1, *_ints(flat.nodes[n].output_type["output"])), "float32") for n in flat.outputs)
    return Artifact(Path(path), "nir", inputs, outputs, rows, Path(path).stat().st_size, notes)


def readback(path: Path, program: FrozenProgram) -> list[Mismatch]:
    """Every number, rule and connection of the file that differs from the program's; empty if none.

    Raises:
        FormatError, UnsupportedError: the file is damaged, or holds nodes that NIR 1.0.8 does not have.
    """
    return list(_differences(read(path), to_nir(program)))


def run(
    path: Path, inputs: Sequence[np.ndarray], threads: int = 1, progress: Callable[[int, int], None] | None = None
) -> list[np.ndarray]:
    """Run the file for its number of steps in float64.

    Args:
        inputs: for each input an array (N, ...), or (N, T, ...) where the file's encoding is "sequence".
        progress: called with (samples done, N).

    Returns:
        For each output a float32 array, (N, ...), or (N, T, ...) where the readout is "sequence".

    Raises:
        FormatError: the file does not say how to run it.
        InputError: inputs that do not fit.
    """
    graph = read(path)
    found: list[list[np.ndarray]] = []
    for i in range(0, len(inputs[0]), _BATCH):
        trace = interpret(graph, encode(graph, [x[i : i + _BATCH] for x in inputs], f"{path}: "))
        found.append([read_out(graph, y) for y in trace.outputs.values()])
        if progress:
            progress(min(i + _BATCH, len(inputs[0])), len(inputs[0]))
    return [np.concatenate(column) for column in zip(*found, strict=True)]


def taps(path: Path, program: FrozenProgram, sample: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """What each neuron of the file emits for one sample, in the program's layout (T, ...), by layer name."""
    graph = read(path)
    trace: Trace = interpret(graph, encode(graph, [x[:1] for x in sample], f"{path}: "), record=None)
    layers = {layer.name: layer for layer in program.layers}
    return {
        name: trace.values[name].astype(np.float32).reshape(layers[name].shape)
        for name, node in graph.nodes.items()
        if kind(node) in FIRING + INTEGRATING and name in layers and trace.values[name].size == np.prod(layers[name].shape)
    }


def _differences(found: Any, expected: Any) -> Iterator[Mismatch]:
    for name in sorted(set(found.nodes) | set(expected.nodes)):
        if name not in found.nodes or name not in expected.nodes:
            states = ["there", "not there"] if name in found.nodes else ["not there", "there"]
            yield Mismatch(name, "node", *states)
            continue
        a, b = found.nodes[name], expected.nodes[name]
        if kind(a) != kind(b):
            yield Mismatch(name, "kind", kind(a), kind(b))
            continue
        for field in vars(b):
            if field not in ("input_type", "output_type", "metadata"):
                yield from _field(name, field, getattr(a, field), getattr(b, field))
        yield from _metadata(name, a.metadata, b.metadata)
    for edge in sorted({(str(a), str(b)) for a, b in found.edges} ^ {(str(a), str(b)) for a, b in expected.edges}):
        there = edge in {(str(a), str(b)) for a, b in found.edges}
        yield Mismatch(edge[1], f"edge from {edge[0]}", *(("there", "not there") if there else ("not there", "there")))
    yield from _metadata("of the graph", found.metadata, expected.metadata)


def _metadata(name: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Mismatch]:
    for key in sorted(set(found) | set(expected)):
        if key not in found or key not in expected:
            states = ["not there", _words(expected[key])] if key in expected else [_words(found[key]), "not there"]
            yield Mismatch(name, f"metadata {key}", *states)
        else:
            yield from _field(name, f"metadata {key}", found[key], expected[key])


def _field(name: str, field: str, found: Any, expected: Any) -> Iterator[Mismatch]:
    if isinstance(found, str | type(None)) or isinstance(expected, str | type(None)):
        if found != expected:
            yield Mismatch(name, field, _words(found), _words(expected))
        return
    a, b = np.asarray(found), np.asarray(expected)
    if a.ndim < 2 and b.ndim < 2 and 1 in (a.size, b.size):  # a stride of 1 may stand as (1, 1)
        a, b = np.broadcast_arrays(a, b)
    if a.shape != b.shape:
        yield Mismatch(name, field, f"of shape {a.shape}", f"of shape {b.shape}")
    elif not np.array_equal(a, b):
        wrong = np.argwhere(np.atleast_1d(a != b))
        at = tuple(int(i) for i in wrong[0]) if a.ndim else ()
        place = f"{field}[{', '.join(map(str, at))}]" if at else field
        more = f" ({len(wrong)} of {a.size} values differ)" if len(wrong) > 1 else ""
        yield Mismatch(name, place, f"{a[at]:.9g}{more}", f"{b[at]:.9g}")


def _words(value: Any) -> str:
    return str(value) if np.ndim(value) == 0 else f"an array of shape {np.shape(value)}"


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _ints(value: Any) -> tuple[int, ...]:
    return () if value is None else tuple(int(n) for n in np.atleast_1d(value))
