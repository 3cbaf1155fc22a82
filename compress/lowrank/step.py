"""Low-rank compression of a captured graph: the ``lowrank`` block of a recipe."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from edgekit.compress.canonical import ATEN, arguments, assign_tensor, drop_unused_tensors, pair, traced_value
from edgekit.compress.capture import Graph, tensor_of
from edgekit.compress.lowrank.layers import Layer
from edgekit.compress.lowrank.linformer import shorten
from edgekit.compress.lowrank.metered import PROBES, Costs, Measure, Meter
from edgekit.compress.lowrank.moments import Moments, side_of
from edgekit.compress.lowrank.plan import Factorized, Model, factorize_layers, refusal, schemes_of
from edgekit.compress.lowrank.settings import METERED, LowRank, parse_rank
from edgekit.compress.passes import PassRecord
from edgekit.data import Data, batches
from edgekit.errors import DataError, InputError

__all__ = ["graph_cost", "graph_layers", "graph_moments", "lowrank"]

Progress = Callable[[str, int, int], None]

_PROBES = 64
"""Samples on which sensitivities are measured."""


def lowrank(
    graph: Graph,
    settings: LowRank,
    data: Data,
    original: Graph | None = None,
    progress: Progress | None = None,
    measure: Measure | None = None,
) -> tuple[Graph, PassRecord]:
    """Replace the weighted layers of ``graph`` by chains of thin layers ``name.0``, ``name.1``, ...

    Args:
        data: its calibration part is used by ``svd_data`` and by budgets.
        original: not used.
        measure: for budgets of instructions and latency; edgekit's own way is :func:`edgekit.layer_costs.measure`.

    Raises:
        InputError: a pattern that fits no layer, or a budget that cannot be reached or measured.
        DataError: no calibration data, or NaN and Inf in a layer.
    """
    given = graph
    shortened: dict[str, str] = {}
    alone: dict[str, str] = {}
    if settings.linformer:
        graph, shortened, alone = shorten(graph, settings.linformer)
        if not shortened and not alone:
            raise InputError("lowrank: linformer: the model has no attention (a softmax between two products)")
    found, left = graph_layers(graph)
    _check_patterns(settings, [*found, *left])
    left |= alone
    for name in [f"{n}.{what}" for n in shortened for what in ("keys", "values")]:
        found.pop(name, None)  # thin already
    for name, layer in list(found.items()):
        if reason := refusal(layer, settings):
            left[name] = reason
            del found[name]
    layers = list(found.values())
    moments = graph_moments(graph, layers, settings, data, progress) if settings.solver == "svd_data" else {}
    before, now = graph_cost(given), graph_cost(graph)

    def step(done: int, total: int) -> None:
        if progress:
            progress("factorize", done, total)

    rank = parse_rank(settings.rank)
    less = rank.value * (now[rank.kind] - before[rank.kind]) if rank.kind in ("params", "macs") else 0.0
    model = Model(now["params"], now["size"], now["macs"], _outputs(graph, settings, data), less=less)
    figures: dict[str, float | int | str] = {}
    if rank.kind in METERED:
        if measure is None:
            raise InputError(f"lowrank: {settings.rank} is measured on a target, which needs apply(..., measure=)")
        meter = Meter(measure, settings, data, progress)
        done, refused, figures = _metered(given, graph, layers, moments, meter, model, step)
    else:
        done, refused = factorize_layers(layers, moments, settings, model, step)
    made = _replaced(graph, done)
    after = graph_cost(made)
    figures |= {f"{k} {w}": v[k] for k in ("params", "macs") for w, v in (("before", before), ("after", after))}
    warnings = () if done or shortened else ("lowrank: no layer was factorized; compress.json has the reason for each",)
    if rank.kind in METERED and float(figures[f"{rank.kind} after"]) > rank.value * float(figures[f"{rank.kind} before"]):
        share = float(figures[f"{rank.kind} after"]) / float(figures[f"{rank.kind} before"])
        if share >= 1:
            raise InputError(
                f"lowrank: {settings.rank} of {settings.target} cannot be reached: the best found costs {share:.3f} of the "
                f"model's {rank.kind} when measured; leave out layers that do not pay (exclude), or measure on an idle machine"
            )
        warnings = (
            *warnings,
            f"lowrank: {settings.rank} of {settings.target} was missed: measured, it is {share:.3f} of the model's",
        )
    return made, PassRecord({**shortened, **{n: f.text for n, f in done.items()}}, {**left, **refused}, figures, warnings)


_TRIES = 3
"""Times that a model is measured and its budget made smaller by what it missed: layers cost a little less alone than together."""


def _metered(
    given: Graph,
    graph: Graph,
    layers: Sequence[Layer],
    moments: Mapping[str, Moments],
    meter: Meter,
    model: Model,
    step: Callable[[int, int], None],
) -> tuple[dict[str, Factorized], dict[str, str], dict[str, float | int | str]]:
    """What :func:`factorize_layers` gives for a budget that a target measures, and the measured figures."""
    kind, share = meter.rank.kind, meter.rank.value
    before = meter.model(given)
    now = before.total if graph is given else meter.model(graph).total
    less = share * (now - before.total)
    lines: dict[str, Any] = {}
    tries: list[tuple[Costs, Any]] = []
    while len(tries) < _TRIES:
        model = replace(model, meter=meter, metered=now, less=less, lines=lines)
        try:
            chosen = factorize_layers(layers, moments, meter.settings, model, step)
        except InputError:
            if not tries:
                raise
            break  # what was missed cannot be made up for
        tries.append((meter.model(_replaced(graph, chosen[0])), chosen))
        over = tries[-1][0].total - share * before.total
        if over <= 0:
            break
        less += 1.02 * over
    after, (done, refused) = min(tries, key=lambda found: found[0].total)
    modelled = now + sum(lines[name](f.option) - lines[name].dense for name, f in done.items())
    figures: dict[str, float | int | str] = {f"{kind} before": round(before.total, 2), f"{kind} after": round(after.total, 2)}
    figures |= {f"{kind} after, modelled": round(modelled, 2)}  # by the sum of the layers alone
    figures |= {
        f"{kind} ratio": round(after.total / before.total, 3),
        f"{kind} ratio, modelled": round(modelled / before.total, 3),
    }
    how = f"layers at {PROBES} ranks each, those between interpolated; the model before and after; int8, {before.how}"
    return done, refused, figures | {"measured on": meter.settings.target, "measured how": how}


def graph_layers(graph: Graph) -> tuple[dict[str, Layer], dict[str, str]]:
    """Every layer whose weight is a parameter used by layers of one kind and geometry alone; and the others with the reason."""
    users: dict[int, list[fx.Node]] = {}
    for node in graph.module.graph.nodes:
        if node.op == "get_attr":
            users.setdefault(_storage(tensor_of(graph.module, node)), []).extend(node.users)
    found: dict[str, Layer] = {}
    left: dict[str, str] = {}
    sizes = _input_sizes(graph)
    for node in graph.module.graph.nodes:
        if node.target not in (ATEN.conv2d.default, ATEN.linear.default):
            continue
        name = graph.names[node.name]
        layer = _layer_of(graph, node, sizes[node.name])
        if isinstance(layer, str):
            left[name] = layer
            continue
        shared = users[_storage(layer.weight)]
        others = [u for u in shared if u is not node]
        if any(not _same_use(node, u) for u in others):
            tied = ", ".join(dict.fromkeys(graph.names.get(u.name, u.name) for u in others))
            left[name] = f"its weight is tied to {tied}"
        elif node is shared[0]:
            found[name] = replace(layer, uses=len(shared))
    return found, left


def _layer_of(graph: Graph, node: fx.Node, in_size: tuple[int, int]) -> Layer | str:
    _, weight, bias, *rest = arguments(node)
    for what, value in (("weight", weight), ("bias", bias)):
        if value is not None and not (isinstance(value, fx.Node) and value.op == "get_attr"):
            return f"its {what} is computed at run time"
    w = tensor_of(graph.module, weight).detach()
    b = None if bias is None else tensor_of(graph.module, bias).detach()
    bias_name = "" if bias is None else str(bias.target)
    if not rest:
        return Layer(graph.names[node.name], w, b, in_size=in_size, parameter=str(weight.target), bias_parameter=bias_name)
    stride, padding, dilation = (_two(v) for v in rest[:3])
    return Layer(graph.names[node.name], w, b, stride, padding, dilation, int(rest[3]), in_size, str(weight.target), 1, bias_name)


def _two(value: Any) -> tuple[int, int]:
    first, second = pair(value, 2)
    return first, second


def _storage(value: Tensor) -> int:
    return value.data_ptr()


def _same_use(node: fx.Node, other: fx.Node) -> bool:
    """The other node is the same kind of layer over the same weight, with the same bias and geometry."""
    if other.target != node.target or other.args[1] is None or len(other.args) < 2:
        return False
    a, b = arguments(node), arguments(other)
    bias = all(x is None for x in (a[2], b[2])) or (a[2] is not None and b[2] is not None and a[2].target == b[2].target)
    weight = isinstance(b[1], fx.Node) and b[1].op == "get_attr"
    return bool(weight and bias and [pair(v, 2) for v in a[3:6]] == [pair(v, 2) for v in b[3:6]] and a[6:] == b[6:])


def _input_sizes(graph: Graph) -> dict[str, tuple[int, int]]:
    """fx node name of a weighted layer to height and width of its input; of a linear, (1, rows of one sample)."""
    sizes: dict[str, tuple[int, int]] = {}

    def see(node: fx.Node, x: Tensor, y: Tensor) -> None:
        sizes[node.name] = (x.shape[2], x.shape[3]) if node.target == ATEN.conv2d.default else (1, x[..., 0].numel())

    _watch(graph.module, tuple(x[:1] for x in graph.sample), see)
    return sizes


def _watch(module: fx.GraphModule, batch: Sequence[Tensor], see: Callable[[fx.Node, Tensor, Tensor], None]) -> None:
    """Run a batch and show (node, input, output) of every weighted layer."""

    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.target in (ATEN.conv2d.default, ATEN.linear.default):
                x: Any = n.args[0]
                see(n, self.env[x], result)
            return result

    with torch.no_grad():
        Watcher(module).run(*batch)


def graph_moments(
    graph: Graph, layers: Sequence[Layer], settings: LowRank, data: Data, progress: Progress | None = None
) -> dict[str, Moments]:
    """Layer name to its moments over the first ``settings.samples`` calibration samples; uses of one weight are put together."""
    schemes = schemes_of(settings)
    by_weight = {_storage(layer.weight): layer for layer in layers}
    moments = {layer.name: Moments.empty(layer, side_of(layer, schemes)) for layer in layers}

    def see(node: fx.Node, x: Tensor, y: Tensor) -> None:
        weight: Any = node.args[1]
        layer = by_weight.get(_storage(tensor_of(graph.module, weight))) if weight.op == "get_attr" else None
        if layer is None:
            return
        if not torch.isfinite(y).all():
            raise DataError(f"calibration: NaN or Inf in the output of layer {layer.name}; check the data's range")
        moments[layer.name].add(layer, x, y)

    done = 0
    for batch in _calibration(graph, settings, data, settings.samples):
        _watch(graph.module, batch, see)
        done += len(batch[0])
        if progress:
            progress("calibrate", done, settings.samples)
    return moments


def _calibration(graph: Graph, settings: LowRank, data: Data, samples: int) -> Any:
    from edgekit.compress.ptq.plan import fit

    inputs = len(graph.sample)
    for batch in batches(data.calibration, settings.batch_size, inputs=inputs, what="calibration", samples=samples):
        yield from fit(graph, [batch])


def _outputs(graph: Graph, settings: LowRank, data: Data) -> Callable[[Mapping[str, Tensor]], Sequence[Tensor]]:
    """The model's outputs on the first calibration samples, with weights replaced by name."""

    def outputs(weights: Mapping[str, Tensor]) -> Sequence[Tensor]:
        parts: list[list[Tensor]] = []
        with torch.no_grad():
            for whole in _calibration(graph, settings, data, settings.samples):  # some of each batch: data may be sorted
                batch = tuple(t[: -(-len(t) * _PROBES // settings.samples)] for t in whole)
                result = torch.func.functional_call(graph.module, dict(weights), batch)
                parts.append(list(result) if isinstance(result, tuple | list) else [result])
        return [torch.cat(column).float() for column in zip(*parts, strict=True)]

    return outputs


def graph_cost(graph: Graph) -> dict[str, int]:
    """``params`` (values of all tensors, shared ones once), ``size`` (see :class:`Model`), ``macs`` of one sample."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    tensors = {_storage(t): t for t in (*graph.module.parameters(), *graph.module.buffers())}
    # the counter does not know the processor's fused attention, so its products are computed one by one
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        graph.module(*(x[:1] for x in graph.sample))
    return {
        "params": sum(t.numel() for t in tensors.values()),
        "size": sum(t.numel() * (4 if t.dim() < 2 else 1) for t in tensors.values()),
        "macs": int(counter.get_total_flops()) // 2,
    }


def _replaced(graph: Graph, done: Mapping[str, Factorized]) -> Graph:
    """A copy of the graph with chains in place of layers; a weight that is used twice becomes one chain used twice."""
    by_weight = {_storage(f.layer.weight): f for f in done.values()}
    wanted = {
        n.name: by_weight[_storage(tensor_of(graph.module, n.args[1]))]
        for n in graph.module.graph.nodes
        if n.target in (ATEN.conv2d.default, ATEN.linear.default)
        and n.args[1].op == "get_attr"
        and _storage(tensor_of(graph.module, n.args[1])) in by_weight
    }
    module = copy.deepcopy(graph.module)
    names, sources = dict(graph.names), dict(graph.sources)
    targets = {f.layer.name: _store(module, f) for f in done.values()}
    for node in list(module.graph.nodes):
        if node.name in wanted:
            f = wanted[node.name]
            own = names[node.name]
            made = _chain(module, node, f, targets[f.layer.name])
            line = sources.pop(own, None)
            for i, part in enumerate(made):
                names[part.name] = f"{own}.{i}"
                if line:
                    sources[f"{own}.{i}"] = line
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    drop_unused_tensors(module)
    return replace(graph, module=module, names=names, sources=sources)


def _store(module: fx.GraphModule, f: Factorized) -> list[tuple[str, str]]:
    """Put the parts' tensors into the module; names of weight and bias ("" if none) of each."""
    base = f.layer.parameter.removesuffix("weight").strip("._") or "factor"
    owner: Any = module
    for leaf in base.split("."):  # a tensor of that name would be in the way
        owner = getattr(owner, leaf, None)
        if isinstance(owner, Tensor):
            base = f"{base}_factor"
    found = []
    for i, part in enumerate(f.parts):
        weight, bias = f"{base}.{i}.weight", f"{base}.{i}.bias" if part.bias is not None else ""
        assign_tensor(module, weight, part.weight)
        if part.bias is not None:
            assign_tensor(module, bias, part.bias)
        found.append((weight, bias))
    return found


def _chain(module: fx.GraphModule, node: fx.Node, f: Factorized, targets: list[tuple[str, str]]) -> list[fx.Node]:
    """Nodes of the chain; the last one is ``node`` itself, so that what follows keeps its names."""
    x: Any = node.args[0]
    made: list[fx.Node] = []
    graph, meta = module.graph, dict(node.meta)
    operator: Any = node.target
    for (weight, bias), part in zip(targets, f.parts, strict=True):
        s = part.shape
        with graph.inserting_before(node):
            args: tuple[Any, ...] = (x, graph.get_attr(weight), graph.get_attr(bias) if bias else None)
            if len(s.weight) == 4:
                args = (*args, list(s.stride), list(s.padding), list(s.dilation), s.groups)
            if part is f.parts[-1]:
                node.args, node.kwargs = args, {}
                made.append(node)
            else:
                x = graph.call_function(operator, args)
                x.meta = {**meta, "val": traced_value(x)}
                made.append(x)
    return made


def _check_patterns(settings: LowRank, names: Sequence[str]) -> None:
    for key, patterns in (("include", settings.include), ("exclude", settings.exclude)):
        for pattern in patterns:
            if not any(re.fullmatch(pattern, name) for name in names):
                close = difflib.get_close_matches(pattern, names, 3, 0.3) or list(names[:5])
                raise InputError(f"lowrank: {key}: {pattern!r} fits no layer; layers are called {', '.join(close)}, ...")
