"""A captured graph over time: rectifiers become neurons, and everything else runs once for all steps.

Each value is either constant over time, (N, ...), or a sequence folded into the batch, (T*N, ...). What comes before the first
neurons is computed once. An operator without a spiking form that is allowed gets the mean over time, and what follows it is
constant again until the next neurons. Outputs are means over time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgekit.compress.capture import Graph, tensor_of
from edgekit.compress.spiking.graph import Site, Survey, operator_name
from edgekit.compress.spiking.neurons import CountedMax, Decode, Fold, Neuron, Repeat, set_steps
from edgekit.errors import ModelError

__all__ = ["SpikingNet", "frame_ends", "outputs", "producers", "unroll"]


@dataclass(frozen=True)
class SpikingNet:
    """A network over time.

    Attributes:
        module: (N, ...) in and out; neurons are its submodules. Its parameters are its own copies.
        sites: submodule name of each layer of neurons to the activation it stands for, in order.
        names: fx node name of ``module`` to layer name.
        sample, sources: as of the captured graph.
        decoded: layers computed on the mean over time.
        frames: the input holds the steps, (N, T, ...), and the model folds them itself
            (:class:`edgekit.compress.spiking.Frames`).
    """

    module: fx.GraphModule
    sites: Mapping[str, Site]
    names: dict[str, str]
    sample: tuple[Tensor, ...]
    sources: Mapping[str, str]
    steps: int
    decoded: tuple[str, ...] = ()
    frames: bool = False

    def neuron(self, name: str) -> Neuron:
        """The layer of neurons of that submodule name."""
        found = self.module.get_submodule(name)
        assert isinstance(found, Neuron)
        return found

    def run(self, steps: int) -> None:
        """Let a call of ``module`` take that many steps."""
        set_steps(self.module, steps)


def unroll(
    graph: Graph,
    found: Survey,
    make: Callable[[Site], nn.Module],
    steps: int,
    *,
    frames: bool = False,
    layered: bool = False,
) -> SpikingNet:
    """The graph over ``steps`` steps, with ``make(site)`` in the place of each rectifier; parameters are copied.

    Args:
        layered: neurons get the mean over time of their current at every step: the layer before has run all its steps.
    """
    builder = _Unroller(graph, found, make, steps, frames, layered)
    module = builder.build()
    return SpikingNet(module, builder.sites, builder.names, graph.sample, graph.sources, steps, tuple(builder.decoded), frames)


class _Unroller:
    def __init__(
        self, graph: Graph, found: Survey, make: Callable[[Site], nn.Module], steps: int, frames: bool, layered: bool
    ) -> None:
        self.layered = layered
        self.graph, self.make, self.steps, self.frames = graph, make, steps, frames
        self.site_of = {s.node: s for s in found.sites}
        self.refused = {x.node for x in found.left}
        self.pools = set(found.pools)
        self.frame_ends = frame_ends(graph) if frames else {}
        self.root = nn.Module()
        self.out = fx.Graph()
        self.constant: dict[fx.Node, fx.Node] = {}
        self.sequence: dict[fx.Node, fx.Node] = {}
        self.sites: dict[str, Site] = {}
        self.names: dict[str, str] = {}
        self.decoded: list[str] = []
        self.count = 0

    def build(self) -> fx.GraphModule:
        for node in self.graph.module.graph.nodes:
            if node.op == "output":
                self.out.output(fx.map_arg(node.args[0], self._constant))
            elif node.op == "get_attr":
                self._copy_tensor(node)
            elif node.op == "placeholder":
                self.constant[node] = self.out.node_copy(node)
            elif node.name in self.site_of:
                self._site(node, self.site_of[node.name])
            else:
                self._operator(node)
        module = fx.GraphModule(self.root, self.out)
        module.graph.eliminate_dead_code()  # what a fold of frames has replaced
        module.recompile()
        return module

    def _copy_tensor(self, node: fx.Node) -> None:
        *path, leaf = str(node.target).split(".")
        owner = self.root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if not hasattr(owner, leaf):
            value = tensor_of(self.graph.module, node).detach().clone()
            owner.register_parameter(leaf, nn.Parameter(value)) if value.is_floating_point() else owner.register_buffer(
                leaf, value
            )
        self.constant[node] = self.out.get_attr(str(node.target))

    def _call(self, kind: str, part: nn.Module, x: fx.Node) -> fx.Node:
        name = f"{kind}_{self.count}"
        self.count += 1
        self.root.add_module(name, part)
        return self.out.call_module(name, (x,))

    def _constant(self, node: fx.Node) -> fx.Node:
        """The value without time; a sequence is averaged, but for one of frames, whose model does so itself."""
        if node not in self.constant:
            if self.frames:
                return self.sequence[node]
            self.constant[node] = self._call("decode", Decode(self.steps), self.sequence[node])
        return self.constant[node]

    def _over_time(self, node: fx.Node) -> fx.Node:
        if node not in self.sequence:
            if self.frames:
                return self.constant[node]
            self.sequence[node] = self._call("repeat", Repeat(self.steps), self.constant[node])
        return self.sequence[node]

    def _site(self, node: fx.Node, site: Site) -> None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        current = self._over_time(x)
        if self.layered and x in self.sequence and x not in self.constant:
            current = self._call("repeat", Repeat(self.steps), self._constant(x))
        made = self._call("neurons", self.make(site), current)
        self.sites[str(made.target)] = site
        self.names[made.name] = site.name
        self.sequence[node] = made

    def _operator(self, node: fx.Node) -> None:
        if node.name in self.frame_ends:
            source, kind = self.frame_ends[node.name]
            if kind == "fold":
                self.constant[node] = self._call("fold", Fold(), self.constant[source])
            else:
                self.constant[node] = self._call("decode", Decode(self.steps), self.sequence[source])
            return
        moving = any(i in self.sequence for i in node.all_input_nodes if i.op != "get_attr")
        if moving and node.name in self.pools:
            x = node.args[0]
            assert isinstance(x, fx.Node)
            self.sequence[node] = self._call("pool", CountedMax(self.steps, tuple(node.args[1:])), self._over_time(x))
            self.names[self.sequence[node].name] = self.graph.names.get(node.name, node.name)
            return
        if moving and node.name in self.refused:
            self.decoded.append(self.graph.names.get(node.name, node.name))
            moving = False
        table = self.sequence if moving else self.constant

        def value(n: fx.Node) -> fx.Node:
            return self.constant[n] if n.op == "get_attr" else self._over_time(n) if moving else self._constant(n)

        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        made = self.out.create_node(node.op, node.target, args, kwargs)
        made.meta = {"nn_module_stack": node.meta.get("nn_module_stack")}
        self.names[made.name] = self.graph.names.get(node.name, node.name)
        table[node] = made


def frame_ends(graph: Graph) -> dict[str, tuple[fx.Node, str]]:
    """Where :class:`edgekit.compress.spiking.Frames` folds the frames of an input, and where it takes their mean.

    fx node name of the last operator of each to the value that goes in, and "fold" or "mean".

    Raises:
        ModelError: the model is none.
    """
    folds, means = {}, {}
    for node in graph.module.graph.nodes:
        before = node.args[0] if node.args else None
        if node.op != "call_function" or not isinstance(before, fx.Node):
            continue
        op, first = operator_name(node), before.args[0] if before.args else None
        if op == "reshape" and operator_name(before) == "permute" and isinstance(first, fx.Node) and first.op == "placeholder":
            folds[node.name] = (first, "fold")
        if op == "mean" and [int(d) for d in node.args[1]] == [0] and operator_name(before) in ("reshape", "unflatten"):
            assert isinstance(first, fx.Node)
            means[node.name] = (first, "mean")
    if len(folds) != 1 or len(means) != 1:
        raise ModelError(
            "spiking: frames: true needs a model that is an edgekit.compress.spiking.Frames, with one input (N, T, ...)"
        )
    return {**folds, **means}


def producers(net: SpikingNet) -> dict[str, fx.Node]:
    """Submodule name of neurons to the conv2d or linear whose bias and weight alone set their current, where there is one."""
    found: dict[str, fx.Node] = {}
    for node in net.module.graph.nodes:
        if node.op != "call_module" or str(node.target) not in net.sites:
            continue
        source = _weighted(node.args[0])
        if source is not None:
            found[str(node.target)] = source
    return found


def _weighted(node: Any) -> fx.Node | None:
    """The layer behind a current: itself, behind a repeat, or one operand of a sum; used by nobody else."""
    if not isinstance(node, fx.Node) or len(node.users) > 1:
        return None
    if node.op == "call_module" and str(node.target).startswith("repeat_"):
        return _weighted(node.args[0])
    op = operator_name(node)
    if op in ("conv2d", "linear"):
        weight = node.args[1]
        return node if isinstance(weight, fx.Node) and weight.op == "get_attr" and len(weight.users) == 1 else None
    if op == "add":
        return next((w for a in node.args if (w := _weighted(a)) is not None), None)
    if op in ("squeeze", "unsqueeze"):
        return _weighted(node.args[0])
    return None


def outputs(net: SpikingNet, batch: Sequence[Tensor]) -> Tensor:
    """First output of a batch."""
    with torch.no_grad():
        found = net.module(*batch)
    result: Tensor = found[0] if isinstance(found, tuple | list) else found
    return result
