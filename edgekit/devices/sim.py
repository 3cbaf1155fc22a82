"""``sim:<name>``: a NIR graph on a simulator, on a chip's arithmetic, or in edgekit's own interpreter.

=================  ==============================================================================================  ============
name               what runs                                                                                       compared with
=================  ==============================================================================================  ============
nir                edgekit's float64 interpreter                                                                   -
spikingjelly,      their own importers of NIR in float64, each in its environment, after                           nir: 0 differ
snntorch, norse,   :func:`edgekit.targets.neuromorphic.dialects.legalize`
sinabs
nest               NEST's engine                                                                                   nir: 0 differ
xylo, loihi2,      the graph quantized to the chip, in edgekit's integer references                                nir: counted
speck
xylosim, lava      the same numbers in the vendors' models of the chips                                            xylo, loihi2: 0
=================  ==============================================================================================  ============

A chip takes spikes. Where the input holds anything else, the host runs the network's first neurons
(:mod:`edgekit.targets.neuromorphic.host`) and sends theirs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import nir
from edgekit.devices import simulators, spiking_cost
from edgekit.devices.simulation import simulate
from edgekit.errors import InputError, MissingTool, UnsupportedError
from edgekit.frozen import FrozenProgram
from edgekit.nir.inference import encode, read_out
from edgekit.nir.semantics import kind
from edgekit.profile import Profile, Settings
from edgekit.targets.neuromorphic import host, loihi2, nest, to_loihi2, to_speck, to_xylo
from edgekit.targets.neuromorphic.dialects import DIALECTS, legalize
from edgekit.targets.neuromorphic.layers import network

__all__ = ["CHIPS", "NAMES", "Rasters", "SimulatorDevice", "connect", "run"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Rasters:
    """What a simulator did with a graph.

    Attributes:
        simulator, version: who it was; the version is "" for edgekit itself.
        spikes: layer to raster (T, N, *shape), aligned to the input.
        expected: what it is compared with, by layer.
        lag: layer to the steps by which it was moved.
        exact: whether every spike has to be the expected one.
        outputs: what the output node gives, (T, N, ...): the simulator's own, or what follows from its spikes.
        notes: what was rewritten, chosen or left out, in sentences.
    """

    simulator: str
    version: str
    spikes: Mapping[str, Array]
    expected: Mapping[str, Array]
    lag: Mapping[str, int]
    exact: bool
    outputs: Array
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SimulatorDevice:
    """A simulator with the members of a device; see :mod:`edgekit.devices`.

    Attributes:
        simulator: a name of :data:`NAMES`.
        told: sentences on what the last call of :meth:`run` did to the graph, and where a chip's spikes differ from the graph's.
        wrong: spikes of the last call that differ where none may.
    """

    name: str
    simulator: str
    told: list[str] = field(default_factory=list, compare=False)
    wrong: list[str] = field(default_factory=list, compare=False)

    @property
    def quantizes(self) -> bool:
        """Whether it runs other numbers than the file's: a chip's."""
        return self.simulator in CHIPS

    @property
    def targets(self) -> tuple[str, ...]:
        """It runs NIR files."""
        return ("nir",)

    def rasters(self, graph: Any, spikes: Array, dt: float | None = None) -> Rasters:
        """Run a graph on input spikes (T, N, *shape); see :func:`run`."""
        return run(self.simulator, graph, spikes, dt)

    def run(
        self, path: Path, target: str, inputs: Sequence[Array], progress: Callable[[int, int], None] | None = None
    ) -> list[Array]:
        """Outputs for a batch, (N, ...) each, as the target ``nir`` gives them."""
        graph, given = self._given(path, inputs)
        found = run(self.simulator, graph, given)
        self.told[:] = [*found.notes, *([] if found.exact else [_shares(found)])]
        self.wrong[:] = _differing(found) if self.quantizes and found.exact else []
        if progress:
            progress(len(inputs[0]), len(inputs[0]))
        return [read_out(graph, found.outputs)]

    def taps(self, path: Path, target: str, program: FrozenProgram, sample: Sequence[Array]) -> dict[str, Array]:
        """What each neuron emits for one sample, in the program's layout, by layer name."""
        return self.taps_each(path, target, program, [x[:1] for x in sample])[0]

    def taps_each(self, path: Path, target: str, program: FrozenProgram, samples: Sequence[Array]) -> list[dict[str, Array]]:
        """As :meth:`taps` for every sample, by one run; of a chip nothing, whose integers are not the program's numbers."""
        if self.quantizes:
            return [{} for _ in samples[0]]
        found = run(self.simulator, *self._given(path, samples))
        layers = {layer.name: layer for layer in program.layers if layer.name in found.spikes}
        return [
            {name: found.spikes[name][:, i].astype(np.float32).reshape(layer.shape) for name, layer in layers.items()}
            for i in range(len(samples[0]))
        ]

    def profile(
        self,
        path: Path,
        target: str,
        program: FrozenProgram,
        settings: Settings,
        inputs: Sequence[Array],
        progress: Callable[[int, int], None] | None = None,
    ) -> Profile:
        """Synaptic operations, spikes and membrane updates of one sample, counted from the simulator's own spikes."""
        graph, given = self._given(path, inputs)
        return spiking_cost.profile(self.name, graph, given, run(self.simulator, graph, given).spikes, settings.per_layer)

    def _given(self, path: Path, inputs: Sequence[Array]) -> tuple[Any, Array]:
        graph = nir.read(path)
        given = encode(graph, inputs, f"{path}: ")
        if len(given) != 1:
            raise UnsupportedError(f"{path}: {len(given)} inputs; edgekit runs simulators on graphs with one")
        return graph, next(iter(given.values()))

    def close(self) -> None:
        """Nothing is held."""


def _differing(found: Rasters) -> list[str]:
    """The first layer in which a vendor's simulator differs from edgekit's reference of the chip."""
    for name, raster in found.spikes.items():
        if wrong := int((np.asarray(raster) != np.asarray(found.expected[name])).sum()):
            where = f"{found.simulator} {found.version} and edgekit's reference of the chip"
            return [f"layer {name}: {where} differ in {wrong:,} of {raster.size:,} values, none is allowed"]
    return []


def _shares(found: Rasters) -> str:
    each = []
    for name, raster in found.spikes.items():
        wanted = float(np.asarray(found.expected[name]).sum()) or 1.0
        each.append(f"{name} {float(np.abs(raster.astype(np.float64) - found.expected[name]).sum()) / wanted:.1%}")
    return f"spikes that are at another step or in another number than the graph's, as a share of its own: {', '.join(each)}"


def connect(spec: str) -> SimulatorDevice:
    """The simulator of ``sim:<name>``.

    Raises:
        InputError: there is no such simulator.
        MissingTool: it is not set up.
    """
    name = spec.partition(":")[2]
    if name not in NAMES:
        raise InputError(f"device {spec!r}: no such simulator; choose one of: {', '.join(f'sim:{n}' for n in NAMES)}")
    if name in simulators.SIMULATORS and name not in simulators.installed():
        raise MissingTool(f"device {spec!r}: the simulator is not set up; run: edgekit setup-sim {name}")
    return SimulatorDevice(f"sim:{name}", name)


def run(simulator: str, graph: Any, spikes: Array, dt: float | None = None) -> Rasters:
    """Run a graph on input spikes and give its rasters beside those that are expected.

    Args:
        spikes: (T, N, *shape). Chips are calibrated on the first half of the samples (on all, if there is one).

    Raises:
        UnsupportedError: the simulator cannot express the graph; names the node.
        MissingTool, DeviceError: it is not set up, or it failed.
    """
    return _RUN[simulator](simulator, graph, np.asarray(spikes), dt)


def _reference(graph: Any, spikes: Array, dt: float | None) -> tuple[dict[str, Array], Array]:
    """Rasters of every neuron by the float64 interpreter, and the output."""
    trace = nir.interpret(graph, spikes, dt=dt, record=None)
    return {layer.name: trace.values[layer.name] for layer in network(graph).neurons}, trace.output


def _following(graph: Any, spikes: Array, dt: float | None, rasters: Mapping[str, Array]) -> Array:
    """The output that follows from rasters of neurons."""
    return nir.interpret(graph, spikes, dt=dt, forced=rasters).output


@dataclass(frozen=True)
class _OnChip:
    """What a chip is given: a graph and the spikes of its input as counts (T, N, inputs), what is expected of it, notes."""

    graph: Any
    spikes: Array
    dt: float | None
    expected: dict[str, Array]
    notes: tuple[str, ...]


def _given_to_chip(simulator: str, graph: Any, spikes: Array, dt: float | None) -> _OnChip:
    values, _ = _reference(graph, spikes, dt)
    notes: tuple[str, ...] = ()
    if not host.counted(spikes):
        found = host.parts(graph, simulator)
        whole = network(graph)
        notes = (f"{found.sentence()}: {host.share(whole, found.host):.1%} of the multiply-accumulates of a dense pass",)
        graph, spikes = found.chip, values.pop(found.sender)
    return _OnChip(graph, spikes.reshape(*spikes.shape[:2], -1).astype(np.int64), dt, values, notes)


def _interpreter(simulator: str, graph: Any, spikes: Array, dt: float | None) -> Rasters:
    values, outputs = _reference(graph, spikes, dt)
    return Rasters(simulator, "", values, values, dict.fromkeys(values, 0), True, outputs)


def _importer(simulator: str, graph: Any, spikes: Array, dt: float | None) -> Rasters:
    values, _ = _reference(graph, spikes, dt)  # first: it says in a sentence what does not fit
    legal = legalize(graph, simulator, dt)
    with tempfile.TemporaryDirectory(prefix="edgekit-nir-") as folder:
        path = Path(folder) / "model.nir"
        nir.write(path, legal.graph)
        found = simulate(simulator, legal.settings, {"spikes": spikes}, path)
    rasters = {original: found.aligned(name, len(spikes)) for name, original in legal.names.items()}
    lag = {original: found.lag[name] for name, original in legal.names.items()}
    expected = {name: values[name] for name in rasters}
    return Rasters(simulator, found.version, rasters, expected, lag, True, found.states["output"], legal.rewritten)


def _nest(simulator: str, graph: Any, spikes: Array, dt: float | None) -> Rasters:
    values, _ = _reference(graph, spikes, dt)
    made = nest.populations(graph, dt)
    found = simulate("nest", made.settings, {**made.arrays, "spikes": spikes})
    rasters = {name: found.aligned(name, len(spikes)) for name in made.names}
    expected = {name: values[name] for name in made.names}
    outputs = _following(graph, spikes, dt, rasters)
    return Rasters(simulator, found.version, rasters, expected, found.lag, True, outputs, made.rewritten)


_CALIBRATED = 64
"""Most samples that a chip's numbers are chosen on."""


def _calibration(spikes: Array) -> Array:
    return spikes[:, : min(_CALIBRATED, max(1, spikes.shape[1] // 2))]


def _xylo(simulator: str, graph: Any, spikes: Array, dt: float | None) -> Rasters:
    given = _given_to_chip(simulator, graph, spikes, dt)
    flat = given.spikes
    graph, told = to_xylo.with_output_neurons(given.graph, _calibration(flat), dt)
    if told:
        entry = next(node for node in graph.nodes.values() if kind(node) == "Input").input_type["input"]
        values, _ = _reference(graph, flat.reshape(*flat.shape[:2], *(int(n) for n in np.atleast_1d(entry))), dt)
        given = replace(given, graph=graph, expected=values, notes=(*given.notes, *told))
    made = to_xylo.quantize(given.graph, _calibration(flat), dt)
    rasters = to_xylo.rasters(made.network, made.places, flat)
    lag = {name: late for name, (*_, late) in made.places.items()}
    shifts = f"weights shifted by {made.shift} and {made.shift_out} (outputs)"
    how = f"{shifts}, {made.clip:.0%} of the largest weight of a hidden neuron is the range of its 8 bits"
    notes = (how, _fitted(given, made.difference), *made.notes)
    if simulator == "xylosim":
        arrays = {f.name: value for f in fields(made.network) if isinstance(value := getattr(made.network, f.name), np.ndarray)}
        settings = {name: getattr(made.network, name) for name in ("shift_in", "shift_rec", "shift_out")}
        silent = np.zeros((max(lag.values()), *flat.shape[1:]), flat.dtype)
        found = simulate("xylosim", settings, {**arrays, "spikes": np.concatenate([flat, silent])})
        theirs = {
            name: found.spikes[which][late : late + len(flat), :, first : first + size]
            for name, (which, first, size, late) in made.places.items()
        }
        return _on_chip(simulator, found.version, given, theirs, rasters, lag, notes)
    return _on_chip(simulator, "", given, rasters, given.expected, lag, notes)


def _loihi2(simulator: str, graph: Any, spikes: Array, dt: float | None) -> Rasters:
    given = _given_to_chip(simulator, graph, spikes, dt)
    made = to_loihi2.quantize(given.graph, _calibration(given.spikes), dt)
    traces = dict(zip((one.name for one in made.layers), loihi2.run(made.layers, given.spikes), strict=True))
    rasters = {name: trace.aligned(len(given.spikes)) for name, trace in traces.items()}
    lag = {name: trace.lag for name, trace in traces.items()}
    chosen = ", ".join(f"{one.name} {one.weight_exp} and {made.clips[one.name]:.0%}" for one in made.layers)
    how = f"exponent of the weights and share of the largest weight that is the range of 8 bits: {chosen}"
    notes = (how, _fitted(given, made.difference), *made.notes)
    if simulator == "lava":
        found = simulate("lava", *to_loihi2.for_lava(made.layers, traces, given.spikes))
        theirs = {name: found.aligned(name, len(given.spikes)) for name in rasters}
        return _on_chip(simulator, found.version, given, theirs, rasters, found.lag, notes)
    return _on_chip(simulator, "", given, rasters, given.expected, lag, notes)


def _speck(simulator: str, graph: Any, spikes: Array, dt: float | None) -> Rasters:
    given = _given_to_chip(simulator, graph, spikes, dt)
    made = to_speck.quantize(given.graph, _calibration(given.spikes), dt)
    rasters = to_speck.rasters(made.layers, given.spikes)
    chosen = ", ".join(f"{one.name} {one.threshold} and {made.clips[one.name]:.0%}" for one in made.layers)
    how = f"threshold in units of the weights and share of the largest weight that is the range of 8 bits: {chosen}"
    notes = (how, _fitted(given, made.difference), *made.notes)
    return _on_chip(simulator, "", given, rasters, given.expected, dict.fromkeys(rasters, 0), notes)


def _fitted(given: _OnChip, difference: float) -> str:
    samples = _calibration(given.spikes).shape[1]
    return f"calibrated on {samples} samples: {difference:.2%} of the spikes differ in number"


def _on_chip(
    simulator: str, version: str, given: _OnChip, rasters: Mapping[str, Array], expected: Mapping[str, Array],
    lag: Mapping[str, int], notes: tuple[str, ...],
) -> Rasters:  # fmt: skip
    """Rasters in the graph's shapes. A vendor's simulator (it has a version) has to agree in every spike."""
    shapes, ends = network(given.graph).shapes, given.spikes.shape[:2]
    found, wanted = ({n: x.reshape(*ends, *shapes[n]) for n, x in group.items()} for group in (rasters, expected))
    entry = next(name for name, node in given.graph.nodes.items() if kind(node) == "Input")
    outputs = _following(given.graph, given.spikes.reshape(*ends, *shapes[entry]), given.dt, found)
    notes = (*given.notes, *notes)
    return Rasters(simulator, version, found, {n: wanted[n] for n in found}, lag, bool(version), outputs, notes)


_RUN: Mapping[str, Callable[[str, Any, Array, float | None], Rasters]] = {
    "nir": _interpreter,
    **dict.fromkeys(DIALECTS, _importer),
    "nest": _nest,
    "xylo": _xylo,
    "xylosim": _xylo,
    "loihi2": _loihi2,
    "lava": _loihi2,
    "speck": _speck,
}

NAMES = tuple(_RUN)
"""What may stand behind ``sim:``."""

CHIPS = ("xylo", "xylosim", "loihi2", "lava", "speck")
"""Those that run a graph quantized to a chip."""
