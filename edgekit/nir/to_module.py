"""A NIR graph as an ``nn.Module`` and as a frozen program.

Layers without state run once for all steps (time is folded into the batch, see :mod:`edgekit.frozen.spiking_ops`), neurons as
sequence operators. The nodes of a cycle are written out step by step with the single-step operators.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.errors import InputError, UnsupportedError
from edgekit.frozen import FrozenOp, FrozenProgram, Unquantized, freeze_module
from edgekit.nir.file import require
from edgekit.nir.interpreter import interpret
from edgekit.nir.nodes import paddings, pair
from edgekit.nir.rules import NEURONS
from edgekit.nir.semantics import FIRING, Flat, check_threshold, check_times, flatten, kind, number_of_steps, rule, step_length

__all__ = ["Cell", "NirModule", "looped", "to_module", "to_program"]

_OPS = {name: op for op, (name, _) in NEURONS.items()}
_FIELDS = {name: fields for name, fields in NEURONS.values()}


def to_module(
    graph: Any,
    steps: int | None = None,
    *,
    encoding: str | None = None,
    readout: str | None = None,
    dt: float | None = None,
    facts: Mapping[str, Any] | None = None,
) -> NirModule:
    """A module that runs ``steps`` steps of a graph in float32.

    Args:
        graph: a ``nir.NIRGraph`` with one input.
        steps: time steps; None: as the graph's metadata say.
        encoding: "repeat" for inputs (N, ...), "sequence" for (N, T, ...); None: the metadata's, else "sequence".
        readout: "accumulate" or "sequence"; None: the metadata's, else "accumulate".
        dt: length of a step instead of the graph's.
        facts: metadata for neurons that have none.

    Raises:
        InputError: no number of steps, or an encoding or readout that is none.
        UnsupportedError: a graph that cannot be run; names the node.
    """
    known = graph.metadata
    count = number_of_steps(graph, steps)
    if count is None:
        raise InputError("the NIR graph does not say how many time steps to run; give them (--steps)")
    encoding = str(encoding or known.get("encoding", "sequence"))
    readout = str(readout or known.get("readout", "accumulate"))
    if encoding not in ("repeat", "sequence") or readout not in ("accumulate", "sequence"):
        raise InputError(f"encoding {encoding!r}, readout {readout!r}: expected repeat or sequence; accumulate or sequence")
    flat = flatten(graph)
    if len(flat.inputs) != 1:
        raise UnsupportedError(f"the graph has {len(flat.inputs)} inputs ({', '.join(flat.inputs)}); a program of it takes one")
    shape = flat.nodes[flat.inputs[0]].input_type["input"]
    if shape is None:
        raise UnsupportedError(f"node {flat.inputs[0]}: the shape of the input is not given")
    length = step_length(graph, dt)
    gain = float(known.get("gain", 1.0))
    return NirModule(flat, count, length, tuple(int(n) for n in np.atleast_1d(shape)), encoding, readout, gain, facts or {})


def to_program(graph: Any, steps: int | None = None, *, name: str | None = None, **options: Any) -> FrozenProgram:
    """The frozen program of a graph, float32, for a batch of one; arguments as of :func:`to_module`."""
    module = to_module(graph, steps, **options)
    for n, node in module.flat.nodes.items():
        check_times(n, node, module.dt)
        if kind(node) in FIRING:
            check_threshold(n, node, module.facts)
    one = np.zeros((1, 1, *module.shape))
    interpret(graph, one, dt=module.dt, facts=module.facts)  # says in a sentence what of the graph does not fit together
    called = str(name or graph.metadata.get("name", "nir"))
    left = [
        Unquantized(n, kind(node).lower(), "a spiking program in float: weights and currents are float32")
        for n, node in ((n, module.flat.nodes[n]) for group in module.flat.groups for n in group)
        if kind(node) in ("Affine", "Linear", "Conv1d", "Conv2d", "Scale", "AvgPool2d", "SumPool2d", "Threshold")
    ]
    return freeze_module(module, (module.sample(),), name=called, unquantized=left)


class NirModule(nn.Module):
    """Runs a flat graph; submodules are called as its nodes. Made by :func:`to_module`."""

    def __init__(
        self, flat: Flat, steps: int, dt: float, shape: tuple[int, ...], encoding: str, readout: str, gain: float,
        facts: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        self.flat, self.steps, self.dt, self.shape, self.encoding, self.facts = flat, steps, dt, shape, encoding, facts
        self.loops: dict[str, str] = {}
        for group in flat.groups:
            if (found := looped(flat, group)) is not None:
                self.loops[found[0]] = found[1]
                self._put(found[0], _recurrent(*found, flat, dt, steps, facts))
                continue
            for n in group:
                self._place(n, _cell if flat.is_cycle(group) else _layer)
        enter = FrozenOp("repeat_steps", 1, {}, steps=steps) if encoding == "repeat" else FrozenOp("fold_steps", 1, {})
        self.encode = enter
        self.outside = {"encoding": encoding, "readout": readout, **({"gain": gain} if readout == "accumulate" else {})}
        leave = ("accumulate", {"gain": gain, "steps": steps}) if readout == "accumulate" else ("unfold_steps", {"steps": steps})
        self.readout = nn.ModuleList(FrozenOp(leave[0], 1, {}, **leave[1]) for _ in flat.outputs)

    def _place(self, name: str, make: Callable[..., nn.Module]) -> None:
        self._put(name, make(name, self.flat.nodes[name], self.dt, self.steps, self.facts))

    def _put(self, name: str, part: nn.Module) -> None:
        owner: nn.Module = self
        *path, leaf = _module_name(name).split(".")
        for step in path:
            if not hasattr(owner, step):
                owner.add_module(step, nn.Module())
            owner = getattr(owner, step)
        owner.add_module(leaf, part)

    def sample(self) -> Tensor:
        """A batch of one of zeros."""
        return torch.zeros(1, *([self.steps] if self.encoding == "sequence" else []), *self.shape)

    def layer(self, name: str) -> nn.Module:
        """The submodule of a node."""
        return self.get_submodule(_module_name(name))

    def graph(self) -> Any:
        """The ``nir.NIRGraph`` with the weights as they are now, cycles too; all that a run needs is in the metadata.

        Raises:
            MissingTool: nir is not installed.
        """
        require()
        import nir

        ends = {*self.flat.inputs, *self.flat.outputs}
        passing = {n for n, node in self.flat.nodes.items() if kind(node) in ("Input", "Output") and n not in ends}

        def origins(name: str) -> list[str]:
            """What feeds a node, through the inputs and outputs of inner graphs."""
            return [o for s in self.flat.sources[name] for o in (origins(s) if s in passing else [s])]

        nodes = {name: self._node(name, node) for name, node in self.flat.nodes.items() if name not in passing}
        edges = [(source, name) for name in nodes for source in origins(name)]
        return nir.NIRGraph(nodes, edges, metadata={"dt": self.dt, "steps": self.steps, **self.outside}, type_check=False)

    def _node(self, name: str, node: Any) -> Any:
        neurons = {back: neuron for neuron, back in self.loops.items()}
        made, layer = copy.deepcopy(node), self.layer(neurons.get(name, name))
        for field in ("weight", "bias"):
            value = getattr(layer, field, None)
            if isinstance(value, Tensor) and hasattr(made, field):
                setattr(made, field, value.detach().cpu().numpy().copy())
        if kind(node) in _OPS:
            facts = rule(name, node, self.facts).metadata()
            made.metadata = {**made.metadata, **(facts if hasattr(node, "v_threshold") else {"v_init": facts["v_init"]})}
        return made

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        values: dict[str, Tensor] = {self.flat.inputs[0]: self.encode(x)}
        for group in self.flat.groups:
            neuron = next((n for n in group if n in self.loops), "")
            if neuron:
                outside = [values[s] for s in self.flat.sources[neuron] if s != self.loops[neuron]]
                values[neuron] = self.layer(neuron)(_total(outside))
            elif self.flat.is_cycle(group):
                self._cycle(group, values)
            elif group[0] not in values:
                values[group[0]] = self.layer(group[0])(_total([values[s] for s in self.flat.sources[group[0]]]))
        found = [read(values[n]) for read, n in zip(self.readout, self.flat.outputs, strict=True)]
        return found[0] if len(found) == 1 else tuple(found)

    def _cycle(self, group: Sequence[str], values: dict[str, Tensor]) -> None:
        """The nodes of a cycle, step after step; an edge of feedback gives 0 at the first."""
        outside = {s: values[s].chunk(self.steps) for n in group for s in self.flat.sources[n] if s not in group}
        states: dict[str, tuple[Tensor, ...]] = {}
        before: dict[str, Tensor] = {}
        rows: dict[str, list[Tensor]] = {n: [] for n in group}
        for t in range(self.steps):
            now: dict[str, Tensor] = {}
            for n in group:
                feedback = [s for s in self.flat.sources[n] if (s, n) in self.flat.feedback]
                parts = [outside[s][t] if s in outside else now[s] for s in self.flat.sources[n] if s not in feedback]
                parts += [before[s] for s in feedback if s in before]
                x, part = _total(parts), self.layer(n)
                if isinstance(part, Cell):
                    now[n], states[n] = part(x, states.get(n) or part.start(x))
                else:
                    now[n] = part(x)
                rows[n].append(now[n])
            before = now
        values.update({n: torch.cat(found) for n, found in rows.items()})


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _module_name(name: str) -> str:
    """A node's name as that of a submodule; those that the module has itself get a mark."""
    return (
        f"{name}_"
        if name.split(".")[0] in ("encode", "readout", "flat", "steps", "dt", "shape", "encoding", "facts", "outside", "training")
        else name
    )


def _tensor(value: Any) -> Tensor:
    return torch.from_numpy(np.array(value, np.float32))


def _small(value: Any, shape: tuple[int, ...]) -> Tensor:
    """A neuron's constants, as one number or one a channel where that says the same."""
    full = np.broadcast_to(np.asarray(value, np.float32), shape)
    if full.size and np.all(full == full.flat[0]):
        return torch.tensor(float(full.flat[0]))
    channel = full[(slice(None), *[slice(0, 1)] * (len(shape) - 1))]
    return _tensor(channel if np.array_equal(np.broadcast_to(channel, shape), full) else full)


def _neuron_parts(name: str, node: Any, facts: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    how, shape = rule(name, node, facts), tuple(np.shape(node.r))
    buffers = {field: _small(getattr(node, field), shape) for field in _FIELDS[kind(node)]}
    buffers["v_init"] = _small(how.v_init, shape)
    rules = {"reset": how.reset, "tie": how.tie, "max_spikes": how.max_spikes}
    return buffers, rules if "v_threshold" in buffers else {}


def _layer(name: str, node: Any, dt: float, steps: int, facts: Mapping[str, Any]) -> nn.Module:
    """A node outside of cycles."""
    if kind(node) == "Delay":
        from edgekit.nir.interpreter import whole_steps

        delay = torch.from_numpy(whole_steps(name, node, dt).astype(np.int32))
        return FrozenOp("delay_steps", 1, {"delay": delay}, lengths=sorted(set(delay.reshape(-1).tolist())), steps=steps)
    if kind(node) not in _OPS:
        return _stateless(name, node)
    buffers, rules = _neuron_parts(name, node, facts)
    return FrozenOp(_OPS[kind(node)], 1, buffers, dt=dt, steps=steps, **rules)


def looped(flat: Flat, group: Sequence[str]) -> tuple[str, str] | None:
    """The neuron and the layer of a cycle that a recurrent operator computes: spikes through one layer back to their neurons."""
    if len(group) != 2:
        return None
    neuron, back = sorted(group, key=lambda n: kind(flat.nodes[n]) not in FIRING)
    node, readers = flat.nodes[back], [n for n, sources in flat.sources.items() if back in sources]
    if kind(flat.nodes[neuron]) not in FIRING or flat.sources[back] != (neuron,) or readers != [neuron]:
        return None
    if neuron in flat.sources[neuron] or len(flat.sources[neuron]) < 2 or kind(node) not in ("Affine", "Linear", "Conv2d"):
        return None
    if kind(node) != "Conv2d":
        return (neuron, back) if np.ndim(node.weight) == 2 else None
    size = np.shape(node.weight)[2:]
    same = paddings(node.padding, size, pair(node.dilation)) == [(n // 2, n // 2) for n in size]
    plain = {*pair(node.stride), *pair(node.dilation)} == {1} and all(n % 2 for n in size)
    return (neuron, back) if same and plain else None


def _recurrent(neuron: str, back: str, flat: Flat, dt: float, steps: int, facts: Mapping[str, Any]) -> nn.Module:
    node, layer = flat.nodes[neuron], flat.nodes[back]
    buffers, rules = _neuron_parts(neuron, node, facts)
    buffers["weight"] = _tensor(layer.weight)
    if kind(layer) == "Affine" or np.any(getattr(layer, "bias", 0)):
        buffers["bias"] = _tensor(layer.bias)
    none = {} if "bias" in buffers else {"bias": None}
    op = _OPS[kind(node)].replace("_sequence", "_recurrent")
    return FrozenOp(op, 1, buffers, dt=dt, steps=steps, feedback=back, **rules, **none)


def _cell(name: str, node: Any, dt: float, steps: int, facts: Mapping[str, Any]) -> nn.Module:
    """A node of a cycle."""
    if kind(node) == "Delay":
        raise UnsupportedError(f"node {name}: a Delay inside a cycle has no form in a program; the interpreter runs it")
    return Cell(name, node, dt, facts) if kind(node) in _OPS else _stateless(name, node)


class Cell(nn.Module):
    """A neuron, one step a call: ``(x, state) -> (output, state)``."""

    def __init__(self, name: str, node: Any, dt: float, facts: Mapping[str, Any]) -> None:
        super().__init__()
        buffers, rules = _neuron_parts(name, node, facts)
        self.v_init: Tensor
        self.register_buffer("v_init", buffers.pop("v_init"))
        self.cuba, self.fires = "tau_syn" in buffers, bool(rules)
        if self.cuba:
            self.synapse = FrozenOp("synapse", 2, {k: buffers[k] for k in ("tau_syn", "w_in")}, dt=dt)
        tau = buffers.get("tau", buffers.get("tau_mem"))
        if tau is None:
            self.charge = FrozenOp("if_charge", 2, {"r": buffers["r"]}, dt=dt)
        else:
            self.charge = FrozenOp("lif_charge", 2, {"tau": tau, "r": buffers["r"], "v_leak": buffers["v_leak"]}, dt=dt)
        if self.fires:
            self.fire = FrozenOp(
                "fire", 1, {"v_threshold": buffers["v_threshold"]}, tie=rules["tie"], max_spikes=rules["max_spikes"]
            )
            after = {k: buffers[k] for k in ("v_threshold", "v_reset")}
            self.reset = FrozenOp("fire_reset", 2, after, reset=rules["reset"])

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        """The state before the first step."""
        v = torch.zeros_like(x) + self.v_init
        return (v, torch.zeros_like(x)) if self.cuba else (v,)

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        v, *current = state
        if self.cuba:
            current = [self.synapse(x, current[0])]
            x = current[0]
        v = self.charge(x, v)
        if not self.fires:
            return v, (v, *current)
        s = self.fire(v)
        return s, (self.reset(v, s), *current)


class _Pool(nn.Module):
    def __init__(self, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], divisor: int | None) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding, self.divisor = list(kernel), list(stride), list(padding), divisor

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.kernel, self.stride, self.padding, divisor_override=self.divisor)


class _Elementwise(nn.Module):
    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor], constant: Tensor) -> None:
        super().__init__()
        self.constant: Tensor
        self.compute = compute
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.constant)


class _Products(nn.Module):
    """A matrix for each leading index, as NIR's Affine may have."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        y = (self.weight @ x.unsqueeze(-1)).squeeze(-1)
        return y if self.bias is None else y + self.bias


def _stateless(name: str, node: Any) -> nn.Module:
    what = kind(node)
    if what in ("Input", "Output"):
        return nn.Identity()
    if what in ("Affine", "Linear"):
        return _affine(_tensor(node.weight), _tensor(node.bias) if what == "Affine" else None)
    if what in ("Conv1d", "Conv2d"):
        return _conv(name, node)
    if what == "Scale":
        return _Elementwise(torch.mul, _tensor(node.scale))
    if what == "Threshold":
        compare = torch.ge if rule(name, node).tie == "ge" else torch.gt
        return _Elementwise(lambda x, level: compare(x, level).to(x.dtype), _tensor(node.threshold))
    if what == "Flatten":
        start, end = int(node.start_dim), int(node.end_dim)
        return nn.Flatten(start + 1 if start >= 0 else start, end + 1 if end >= 0 else end)
    kernel = pair(node.kernel_size)
    return _Pool(kernel, pair(node.stride), pair(node.padding), None if what == "AvgPool2d" else 1)


def _affine(weight: Tensor, bias: Tensor | None) -> nn.Module:
    if weight.dim() > 2:
        return _Products(weight, bias)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _conv(name: str, node: Any) -> nn.Module:
    weight, spatial = _tensor(node.weight), np.ndim(node.weight) - 2
    groups, dilation = int(node.groups), pair(node.dilation, spatial)
    pads = paddings(node.padding, weight.shape[2:], dilation)
    padding: Any = "same" if any(before != after for before, after in pads) else tuple(p for p, _ in pads)
    made: Any = nn.Conv1d if spatial == 1 else nn.Conv2d
    layer: nn.Module = made(
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), pair(node.stride, spatial), padding, dilation,
        groups, bool(np.any(node.bias)),
    )  # fmt: skip
    layer.weight = nn.Parameter(weight)
    if layer.bias is not None:
        layer.bias = nn.Parameter(_tensor(node.bias))
    return layer
