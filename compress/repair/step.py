"""The ``repair`` block of a recipe: a captured graph, or a quantization plan, trained against the graph before compression."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgekit.compress.canonical import ATEN, arguments
from edgekit.compress.capture import Graph, tensor_of
from edgekit.compress.lowrank.layers import Layer, Part, Shape, effective_weight
from edgekit.compress.passes import PassRecord
from edgekit.compress.placing import on_device
from edgekit.compress.ptq.plan import Plan, fit
from edgekit.compress.ptq.qat import epoch_of, read_back, trainable_twin
from edgekit.compress.ptq.settings import QAT
from edgekit.compress.repair.distill import Forward, Values, distance, distill, max_penalty, squared_penalty
from edgekit.compress.repair.settings import Repair
from edgekit.data import Data, batches

__all__ = ["points", "repair", "repair_plan", "tapped"]

Progress = Callable[[str, int, int], None]
_WEIGHTED = (ATEN.conv2d.default, ATEN.linear.default)
_JUDGED = 2048
"""Calibration samples on which the state before and after is compared."""


def repair(
    graph: Graph, settings: Repair, data: Data, original: Graph, progress: Progress | None = None
) -> tuple[Graph, PassRecord]:
    """Train a copy of ``graph`` to compute what ``original`` computes.

    The result is never further from the original than before on calibration data: if training does not help, the graph
    comes back as it was, with a warning.

    Raises:
        DataError: see :func:`edgekit.compress.repair.distill.distill`.
    """
    torch.manual_seed(settings.seed)
    student = on_device(copy.deepcopy(graph.module), settings.device)
    teacher = on_device(copy.deepcopy(original.module), settings.device)
    shared = points(original, graph, settings.points)
    parameters = [p.requires_grad_(True) for p in student.parameters() if p.is_floating_point()]
    forward = tapped(student, shared), tapped(teacher, shared)
    penalty = _penalty(original, graph, student, teacher, settings)
    figures, better = _train(forward, [{"params": parameters}], graph, settings, data, penalty, progress)
    changes = {graph.names[n]: "compared with the original" for n in shared}
    student.requires_grad_(False)
    made = replace(graph, module=on_device(student, "cpu")) if better else graph
    return made, PassRecord(changes, {}, figures, () if better else (_NO_HELP,))


_NO_HELP = "repair: training brought the model no nearer to the original, its weights stay as they were; lower learning_rate"


def repair_plan(
    graph: Graph, plan: Plan, settings: Repair, data: Data, original: Graph, progress: Progress | None = None
) -> tuple[Plan, PassRecord]:
    """The same for a quantized model: the twin with Brevitas layers is trained, scales included, and read back into a plan."""
    torch.manual_seed(settings.seed)
    twin, scales = trainable_twin(graph, plan, QAT(seed=settings.seed))
    on_device(twin, settings.device)
    teacher = on_device(copy.deepcopy(original.module), settings.device)
    shared = [n for n in points(original, graph, settings.points) if any(m.target == f"quantize_{n}" for m in twin.graph.nodes)]
    named = list(twin.named_parameters())
    is_scale = {id(p): "scaling_impl" in n or "log_scale" in n for n, p in named}
    groups: list[dict[str, object]] = [
        {"params": [p for _, p in named if p.requires_grad and not is_scale[id(p)]]},
        {"params": [p for _, p in named if p.requires_grad and is_scale[id(p)]], "rate": 10.0},
    ]
    forward = tapped(twin, [f"quantize_{n}" for n in shared]), tapped(teacher, shared)
    figures, better = _train(forward, groups, graph, settings, data, None, progress)
    made = read_back(on_device(twin, "cpu"), plan, scales) if better else plan
    changes = {n: f"weights int{w.bits}, repaired" for n, w in plan.weights.items()}
    return replace(made, changes=changes), PassRecord(changes, {}, figures, () if better else (_NO_HELP,))


def points(original: Graph, graph: Graph, kind: str) -> list[str]:
    """fx names of values that both graphs have: sums of residual blocks (after their activation), or weighted layers."""
    shapes = {n.name: _shape(n) for n in graph.module.graph.nodes}
    found = []
    nodes = [n for n in original.module.graph.nodes if n.op == "call_function"]
    sums = [n for n in nodes if n.target == ATEN.add.Tensor and _is_residual(n)]
    for node in sums if kind == "blocks" and sums else [n for n in nodes if n.target in _WEIGHTED]:
        user = next(iter(node.users)) if len(node.users) == 1 else node
        if user.target in (ATEN.relu.default, ATEN.hardtanh.default):
            node = user
        if not any(u.op == "output" for u in node.users) and shapes.get(node.name) == _shape(node):
            found.append(node.name)
    return found


def _is_residual(node: fx.Node) -> bool:
    """Both operands are values of the model, of one shape, that are computed."""
    parts = node.args[:2]
    return all(isinstance(a, fx.Node) and a.op == "call_function" and _shape(a) == _shape(node) for a in parts)


def _shape(node: fx.Node) -> tuple[Any, ...] | None:
    value = node.meta.get("val")
    return tuple(str(s) if not isinstance(s, int) else s for s in value.shape[1:]) if isinstance(value, Tensor) else None


def tapped(module: fx.GraphModule, names: Sequence[str]) -> Forward:
    """The module as a :data:`Forward`; the tensors are the module's own."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, values)
    outputs = list(result) if isinstance(result, tuple | list) else [result]
    by_name = {str(n.target) if n.op == "call_module" else n.name: v for n, v in values.items()}
    graph.output((*outputs, *(by_name[n] for n in names)))
    tapped = fx.GraphModule(module, graph)

    def forward(batch: Sequence[Tensor]) -> Values:
        found = tapped(*batch)
        return Values(found[: len(outputs)], found[len(outputs) :])

    return forward


def _train(
    forward: tuple[Forward, Forward], groups: Sequence[dict[str, object]], graph: Graph, settings: Repair, data: Data,
    penalty: Callable[[], Tensor] | None, progress: Progress | None,
) -> tuple[dict[str, float | int | str], bool]:  # fmt: skip
    student, teacher = forward
    inputs = len(graph.sample)
    source = data.calibration if data.training is None else data.training
    size = settings.train_batch_size if graph.dynamic_batch else 1

    def judged() -> float:
        chosen = batches(data.calibration, 64, inputs=inputs, what="calibration")
        return distance(student, teacher, _first(fit(graph, chosen), _JUDGED), settings)

    def step(done: int, total: int) -> None:
        if progress:
            progress("repair", done, total)

    before = judged()
    distill(student, teacher, groups, lambda order: epoch_of(source, size, order), settings, inputs, penalty, step)
    after = judged()
    return {"loss before": before, "loss after": after}, after < before


def _first(stream: Any, samples: int) -> Any:
    done = 0
    for batch in stream:
        yield batch
        done += len(batch[0])
        if done >= samples:
            return


def _penalty(
    original: Graph, graph: Graph, student: fx.GraphModule, teacher: fx.GraphModule, settings: Repair
) -> Callable[[], Tensor] | None:
    """Mean over the layers that were changed of what keeps them near their original weight."""
    if not settings.weight_penalty:
        return None
    norm = {"frobenius": squared_penalty, "max": max_penalty}[settings.penalty_norm]
    pairs = list(_changed(original, graph))

    def penalty() -> Tensor:
        found = [norm(_product(student, chain), tensor_of(teacher, source).double()) for source, chain in pairs]
        return settings.weight_penalty * torch.stack(found).mean().float()

    return penalty if pairs else None


def _changed(original: Graph, graph: Graph) -> Any:
    """(weight of a layer in the original, nodes of the chain that replaced it) for every layer that is no longer the same."""
    before = {n.name: n for n in original.module.graph.nodes}
    for node in graph.module.graph.nodes:
        source = before.get(node.name)
        if node.target not in _WEIGHTED or source is None or source.target != node.target:
            continue
        chain = [node]
        while chain[0].args[0].name not in before and chain[0].args[0].target == node.target:
            chain.insert(0, chain[0].args[0])
        weight: Any = source.args[1]
        old = tensor_of(original.module, weight)
        own: Any = node.args[1]
        if len(chain) > 1 or not torch.equal(old, tensor_of(graph.module, own)):
            yield weight, chain


def _product(module: nn.Module, chain: Sequence[fx.Node]) -> Tensor:
    """The one weight that a chain stands for, with its gradient."""
    parts = []
    for node in chain:
        _, weight, _, *rest = arguments(node)
        value = tensor_of(module, weight)
        groups = int(rest[3]) if rest else 1
        parts.append(Part(Shape(tuple(value.shape), groups=groups), value))
    if len(parts) == 1:
        return parts[0].weight.double()
    first, last = parts[0].weight, parts[-1].weight
    if first.dim() == 2:
        return last.double() @ first.double()
    inputs, groups = first.shape[1], parts[0].shape.groups
    kernel = [max(p.weight.shape[i] for p in parts) for i in (2, 3)]
    whole = Layer("", torch.empty(last.shape[0], inputs, *kernel), None, groups=groups)
    return effective_weight(whole, tuple(parts))
