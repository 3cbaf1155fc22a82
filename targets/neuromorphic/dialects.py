"""Graphs in the dialects of simulators' NIR importers: rewritten where that changes nothing, refused where it cannot be said.

Importers disagree on what NIR leaves open (resets, ties, initial state) and take less than NIR holds; most of what does not fit
is read silently as something else. :func:`legalize` writes a graph that an importer reads with the dynamics of the original, and
what no file can carry as settings that the adapter applies after the import:

* leak to ``v_leak`` becomes leak to 0 by moving the origin (thresholds, resets and initial states move along);
* gains (``r``, ``w_in``, ``dt / tau``) that the importer ignores or fixes go into the weights before the neurons;
* thresholds that differ within a layer go into the weights too, where the importer takes one only;
* sum pools become average pools, or the reverse, with the size of the window in the weights behind them;
* a Scale becomes a convolution of 1 x 1 or a diagonal matrix;
* convolutions with groups become such without, with zeros (nir's check of shapes does not know groups);
* an IF of an importer that has none, or another, becomes a LIF that loses 2**-100 of its membrane in a step: nothing in float64;
* a comparison of the other kind (``>`` for ``>=``) becomes a threshold one unit in the last place of float64 further on.

What remains is refused with the node and the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError, UnsupportedError
from edgekit.nir.nodes import pair
from edgekit.nir.semantics import FIRING, INTEGRATING, Flat, flatten, kind, rule, step_length
from edgekit.targets.neuromorphic.layers import network

__all__ = ["DIALECTS", "Dialect", "Legal", "legalize"]

Array = NDArray[np.float64]
_WEIGHTS = ("Affine", "Linear", "Conv1d", "Conv2d")
_FOREVER = 2.0**100
"""Time constant, in steps, of a leak that float64 does not see."""


@dataclass(frozen=True)
class Dialect:
    """What an importer takes.

    Attributes:
        kinds: nodes that it reads as they are meant, once rewritten.
        resets: reset rules that the adapter can set.
        tie: how it compares.
        start: whether the adapter can set an initial membrane.
        pool: the pooling node that it takes; the other one is rewritten.
        gain: what becomes of a LIF's input: "scaled" by dt / tau (``r`` is ignored), "added" as it is, or "either" by ``r``.
        leak: "euler" (1 - dt / tau), or "exponential" (exp(-1 / tau), tau in steps).
        dt: step that the importer insists on; None: it is told.
        sums: whether a node may have several sources.
        many: whether a neuron may spike several times a step.
        no_if, no_linear: an IF is written as a LIF without leak, a Linear as an Affine without bias.
    """

    kinds: tuple[str, ...]
    resets: tuple[str, ...]
    tie: str
    start: bool
    pool: str
    gain: str
    leak: str = "euler"
    dt: float | None = None
    sums: bool = False
    many: bool = False
    no_if: bool = False
    no_linear: bool = False


_COMMON = ("Input", "Output", "Affine", "Linear", "Conv2d", "Scale", "Flatten", "SumPool2d", "AvgPool2d", "IF", "LIF")

DIALECTS: Mapping[str, Dialect] = {
    "spikingjelly": Dialect(
        (*_COMMON, "Conv1d", "CubaLIF"), ("subtract", "zero"), "ge", start=True, pool="AvgPool2d", gain="either", sums=True,
    ),
    "snntorch": Dialect(
        (*_COMMON, "CubaLIF"), ("zero",), "gt", start=False, sums=True, pool="AvgPool2d", gain="added", dt=1e-4, no_if=True,
    ),
    "norse": Dialect(
        _COMMON, ("zero",), "gt", start=False, pool="SumPool2d", gain="scaled", no_if=True, no_linear=True,
    ),
    "sinabs": Dialect(
        _COMMON, ("subtract", "zero"), "ge", start=True, pool="SumPool2d", gain="added", leak="exponential",
        no_linear=True, many=True,
    ),
}  # fmt: skip
"""Simulators whose importers of NIR are used; versions are those of :data:`edgekit.devices.simulators.SIMULATORS`."""


@dataclass(frozen=True)
class Legal:
    """A graph as a simulator's importer has to get it.

    Attributes:
        graph: a ``nir.NIRGraph`` without inner graphs; "." in names of nodes has become "_".
        settings: ``dt``, ``output`` (the node before the output), and ``neurons``: for each its reset, threshold and v_init.
        names: node in the file to node of the original graph, for neurons, in order of execution.
        rewritten: what was changed, a sentence for each node.
    """

    graph: Any
    settings: Mapping[str, Any]
    names: Mapping[str, str]
    rewritten: tuple[str, ...]


@dataclass
class _Work:
    """A graph under change: flat nodes by name, and what was done."""

    name: str
    dialect: Dialect
    flat: Flat
    dt: float
    nodes: dict[str, Any]
    consumers: Mapping[str, tuple[str, ...]]
    done: list[str] = field(default_factory=list)
    neurons: dict[str, dict[str, Any]] = field(default_factory=dict)

    def refuse(self, node: str, reason: str) -> UnsupportedError:
        return UnsupportedError(f"{self.name}: node {node} ({kind(self.flat.nodes[node])}) cannot be expressed: {reason}")


def legalize(graph: Any, dialect: str, dt: float | None = None) -> Legal:
    """Rewrite a graph for a simulator's importer.

    Args:
        dialect: a name of :data:`DIALECTS`.
        dt: length of a step instead of the graph's.

    Raises:
        InputError: there is no such dialect.
        UnsupportedError: something that the simulator cannot express; names the node and the reason.
    """
    if dialect not in DIALECTS:
        raise InputError(f"dialect {dialect!r} is unknown; choose one of: {', '.join(DIALECTS)}")
    flat = flatten(graph)
    consumers = {name: tuple(n for n in flat.nodes if name in flat.sources[n]) for name in flat.nodes}
    work = _Work(dialect, DIALECTS[dialect], flat, step_length(graph, dt), _copies(flat), consumers)
    _check(work)
    if any(kind(node) == "Scale" for node in flat.nodes.values()):
        shapes = network(graph).shapes
        for name in (name for name, node in flat.nodes.items() if kind(node) == "Scale"):
            _as_weights(work, name, shapes[name])
    for name, node in flat.nodes.items():
        if kind(node) in FIRING:
            _neuron(work, name)
    for name, node in flat.nodes.items():
        if kind(node) in ("SumPool2d", "AvgPool2d"):
            _pool(work, name)
        elif kind(node).startswith("Conv") and int(node.groups) != 1:
            work.nodes[name] = _changed(work.nodes[name], weight=_ungrouped(work.nodes[name]), groups=1)
            work.done.append(f"node {name}: {int(node.groups)} groups became one, with zeros")
        elif kind(work.nodes[name]) == "Linear" and work.dialect.no_linear:
            new = work.nodes[name]
            work.nodes[name] = _nir("Affine", weight=new.weight, bias=np.zeros(new.weight.shape[0]))
    return _built(work)


def _copies(flat: Flat) -> dict[str, Any]:
    return {name: _changed(node) for name, node in flat.nodes.items()}


def _changed(node: Any, **fields: Any) -> Any:
    """A node of the same kind with other fields; arrays are float64, sizes Python integers."""
    import nir

    given = {k: v for k, v in vars(node).items() if k not in ("metadata", "input_type", "output_type")}
    given = {k: np.asarray(v, np.float64) if isinstance(v, np.ndarray) and v.dtype.kind == "f" else v for k, v in given.items()}
    which = kind(node)
    if which in ("Input", "Flatten"):
        given["input_type"] = node.input_type
    if which == "Output":
        given["output_type"] = node.output_type
    for key in ("stride", "padding", "dilation", "kernel_size"):
        if key in given and not isinstance(given[key], str | bytes):
            spatial = 1 if which == "Conv1d" else 2
            sizes = pair(given[key], spatial)
            given[key] = np.array(sizes) if which.endswith("Pool2d") else sizes if spatial == 2 else sizes[0]
        elif isinstance(given.get(key), bytes):
            given[key] = given[key].decode()
    if "groups" in given:
        given["groups"] = int(given["groups"])
    return getattr(nir, which)(**(given | fields))


def _nir(which: str, **fields: Any) -> Any:
    import nir

    return getattr(nir, which)(**fields)


def _check(work: _Work) -> None:
    flat, dialect = work.flat, work.dialect
    if flat.feedback:
        _, node = sorted(flat.feedback)[0]
        raise work.refuse(node, f"it is in a cycle, and edgekit runs {work.name} on graphs without cycles only")
    if len(flat.inputs) != 1 or len(flat.outputs) != 1:
        raise work.refuse((*flat.inputs, *flat.outputs)[1], "edgekit runs it on graphs with one input and one output only")
    for name, node in flat.nodes.items():
        if kind(node) in INTEGRATING or kind(node) not in dialect.kinds:
            raise work.refuse(
                name, f"its importer has no such node; it takes {', '.join(k for k in dialect.kinds if k[0] not in 'IO')}"
            )
        if len(flat.sources[name]) > 1 and not dialect.sums:
            raise work.refuse(name, f"it sums {', '.join(flat.sources[name])}; its importer takes chains only")


def _uniform(work: _Work, name: str, what: str, values: Array) -> float:
    found = np.unique(values)
    if len(found) != 1:
        raise work.refuse(name, f"{what} differs between its neurons ({found[0]:g} to {found[-1]:g}), its importer takes one")
    return float(found[0])


def _neuron(work: _Work, name: str) -> None:
    """A neuron with the origin at its leak, gains in the weights, and settings for what a file does not say."""
    node, dialect = work.flat.nodes[name], work.dialect
    p = {k: np.asarray(v, np.float64) for k, v in vars(node).items() if isinstance(v, np.ndarray | float | int)}
    how = rule(name, node)
    if how.max_spikes > 1 and not dialect.many:
        raise work.refuse(name, f"it emits up to {how.max_spikes} spikes a step")
    origin = p.get("v_leak", np.zeros(()))
    threshold = p["v_threshold"] - origin
    start = np.asarray(how.v_init, np.float64) - origin
    reset = _reset(work, name, how.reset, p["v_reset"] - origin)
    if np.any(threshold <= 0):
        raise work.refuse(name, "a threshold is not above its leak")
    rates = _rates(work, name, p)
    scale = _input_scale(work, name, rates, p)
    gain = _gain(kind(node), rates, p, work.dt, scale)
    if len(np.unique(threshold)) > 1:
        gain, start, threshold = gain / threshold, start / threshold, np.ones(())
        work.done.append(f"node {name}: thresholds went into the weights before it")
    level = _uniform(work, name, "v_threshold", threshold)
    if np.any(start) and not dialect.start:
        raise work.refuse(name, "it starts at another membrane than its leak's, which cannot be set")
    if how.tie != dialect.tie:
        level = float(np.nextafter(level, np.inf if how.tie == "gt" else -np.inf))
        work.done.append(f"node {name}: compares by {how.tie}, the threshold is one unit in the last place further on")
    _fold(work, name, gain)
    shape = np.shape(p["v_threshold"])
    work.nodes[name] = _written(work, node, rates, scale, np.full(shape, level))
    started = np.broadcast_to(start, shape).tolist() if np.any(start) else 0.0
    work.neurons[name] = {"reset": reset, "threshold": level, "v_init": started, "keeps": [1 - k for k in rates]}
    work.neurons[name]["most"] = how.max_spikes


def _reset(work: _Work, name: str, reset: str, value: Array) -> str:
    if reset == "value" or (reset == "zero" and np.any(value)):
        if np.any(value):
            raise work.refuse(name, "it is reset to another membrane than its leak's")
        reset = "zero"
    if reset not in work.dialect.resets:
        raise work.refuse(name, f"reset {reset!r}: it does {' and '.join(work.dialect.resets)} only")
    return reset


def _rates(work: _Work, name: str, p: Mapping[str, Array]) -> list[float]:
    """What the membrane (and the current of a CubaLIF) loses in a step, of 1."""
    constants = {"IF": (), "LIF": ("tau",), "CubaLIF": ("tau_mem", "tau_syn")}[kind(work.flat.nodes[name])]
    rates = [work.dt / _uniform(work, name, what, p[what]) for what in constants]
    if any(not 0 < k < 1 for k in rates):
        raise work.refuse(name, f"dt / tau is {max(rates):g}, between 0 and 1 expected")
    return rates or [0.0]


def _gain(which: str, rates: list[float], p: Mapping[str, Array], dt: float, scale: float) -> Array:
    """What the weights are multiplied by, if the importer multiplies the input by ``scale``."""
    if which == "IF":
        return p["r"] * dt / scale
    if which == "LIF":
        return p["r"] * (1.0 if scale == rates[0] else rates[0] / scale)
    return p["r"] * p["w_in"] * rates[0] * rates[1] / scale


def _input_scale(work: _Work, name: str, rates: list[float], p: Mapping[str, Array]) -> float:
    """By what the importer itself multiplies the input of a neuron."""
    gain = work.dialect.gain
    single = kind(work.flat.nodes[name]) == "LIF" and len(np.unique(p["v_threshold"] - p["v_leak"])) == 1
    if gain == "scaled" or (gain == "either" and single and np.all(p["r"] == 1)):
        return rates[0] or 1 / _FOREVER
    return 1.0


def _written(work: _Work, node: Any, rates: list[float], scale: float, threshold: Array) -> Any:
    """The node for the file."""
    dialect, dt, shape = work.dialect, work.dialect.dt or work.dt, threshold.shape
    full = dict.fromkeys(("v_leak", "v_reset"), np.zeros(shape)) | {"v_threshold": threshold}
    if kind(node) == "IF" and not dialect.no_if:
        del full["v_leak"]
        return _nir("IF", r=np.full(shape, 1 / dt if work.name == "spikingjelly" else 1.0), **full)
    taus = [_tau(dialect, k, dt) for k in rates]
    if kind(node) == "CubaLIF":
        mem, syn = taus
        full |= {"tau_mem": np.full(shape, mem), "tau_syn": np.full(shape, syn)}
        return _nir("CubaLIF", r=np.full(shape, mem / dt), w_in=np.full(shape, syn / dt), **full)
    r = taus[0] / dt if scale == 1.0 and dialect.leak == "euler" else 1.0
    return _nir("LIF", tau=np.full(shape, taus[0]), r=np.full(shape, r), **full)


def _tau(dialect: Dialect, rate: float, dt: float) -> float:
    """The time constant with which an importer loses that much in a step."""
    if rate == 0.0:
        return _FOREVER * dt
    return -1 / float(np.log1p(-rate)) if dialect.leak == "exponential" else dt / rate


def _fold(work: _Work, name: str, gain: Array) -> None:
    """Multiply the weights before a neuron."""
    if np.all(gain == 1):
        return
    for before in work.flat.sources[name]:
        if kind(work.nodes[before]) not in _WEIGHTS or work.consumers[before] != (name,):
            raise work.refuse(name, f"a gain of {float(np.ravel(gain)[0]):g} has no weights of its own before it to go into")
        _scale(work, before, gain)
    work.done.append(f"node {name}: its gain went into the weights before it")


def _scale(work: _Work, name: str, gain: Array) -> None:
    node = work.nodes[name]
    outputs = node.weight.shape[0]
    by_output = np.broadcast_to(gain, np.shape(gain) or (1,)).reshape(np.shape(gain)[0] if np.ndim(gain) else 1, -1)
    if np.any(by_output != by_output[:, :1]):
        raise work.refuse(name, "the gain behind it differs between the neurons of a channel")
    factor = np.broadcast_to(by_output[:, 0], (outputs,)) if len(by_output) in (1, outputs) else None
    if factor is None:
        raise work.refuse(name, f"{outputs} outputs, and {len(by_output)} gains behind it")
    weight = np.asarray(node.weight, np.float64) * factor.reshape(-1, *[1] * (np.ndim(node.weight) - 1))
    fields = {"weight": weight} | ({} if not hasattr(node, "bias") else {"bias": np.asarray(node.bias, np.float64) * factor})
    work.nodes[name] = _changed(node, **fields)


def _pool(work: _Work, name: str) -> None:
    """The other kind of pool, the window's size in the weights behind it."""
    node, which = work.flat.nodes[name], kind(work.flat.nodes[name])
    if which == work.dialect.pool:
        return
    if np.any(np.asarray(node.padding)) and work.name in ("norse", "sinabs"):
        raise work.refuse(name, "its importer ignores the padding of a pool")
    factor = float(np.prod(pair(node.kernel_size)))
    factor = factor if which == "SumPool2d" else 1 / factor
    for behind in work.consumers[name]:
        last = behind
        while kind(work.flat.nodes[last]) == "Flatten" and len(work.consumers[last]) == 1:
            last = work.consumers[last][0]
        if kind(work.nodes[last]) not in _WEIGHTS or len(work.flat.sources[last]) > 1:
            raise work.refuse(
                name, f"it becomes an {work.dialect.pool}, and {last} behind it has no weights for the window's size"
            )
        work.nodes[last] = _changed(work.nodes[last], weight=work.nodes[last].weight * factor)
    fields = {key: np.array(pair(getattr(node, key))) for key in ("kernel_size", "stride", "padding")}
    work.nodes[name] = _nir(work.dialect.pool, **fields)
    work.done.append(f"node {name}: {which} became {work.dialect.pool}, the window's size went into the weights behind it")


def _as_weights(work: _Work, name: str, shape: tuple[int, ...]) -> None:
    """A Scale as a convolution of 1 x 1, or as a Linear with a diagonal."""
    scale = np.broadcast_to(np.asarray(work.flat.nodes[name].scale, np.float64), shape).reshape(shape[0], -1)
    if np.any(scale != scale[:, :1]) or len(shape) not in (1, 3):
        raise work.refuse(name, "it differs within a channel, and there is no such node")
    diagonal = np.diag(scale[:, 0])
    if len(shape) == 1:
        work.nodes[name] = _nir("Linear", weight=diagonal)
    else:
        fields = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "bias": np.zeros(shape[0])}
        work.nodes[name] = _nir("Conv2d", input_shape=shape[1:], weight=diagonal[..., None, None], **fields)
    work.done.append(f"node {name}: a Scale became weights, one for each channel")


def _ungrouped(node: Any) -> Array:
    """Weights of a convolution with groups for all channels, (outputs, inputs, ...)."""
    weight, groups = np.asarray(node.weight, np.float64), int(node.groups)
    outputs, inputs = len(weight) // groups, weight.shape[1]
    full = np.zeros((len(weight), groups * inputs, *weight.shape[2:]))
    for g in range(groups):
        full[g * outputs : (g + 1) * outputs, g * inputs : (g + 1) * inputs] = weight[g * outputs : (g + 1) * outputs]
    return full


def _built(work: _Work) -> Legal:
    import nir

    safe = {name: name.replace(".", "_") for name in work.nodes}
    edges = [(safe[a], safe[b]) for b in work.nodes for a in work.flat.sources[b]]
    graph = nir.NIRGraph({safe[n]: node for n, node in work.nodes.items()}, edges, metadata={"dt": work.dt}, type_check=False)
    settings = {
        "dt": work.dialect.dt or work.dt,
        "neurons": {safe[n]: found for n, found in work.neurons.items()},
    }
    order = [name for group in work.flat.groups for name in group if name in work.neurons]
    return Legal(graph, settings, {safe[n]: n for n in order}, tuple(work.done))
