"""Capture a PyTorch model as one flat ATen graph that compression passes work on.

``torch.export`` sees functional and module forms alike (``F.relu`` and ``nn.ReLU``), so a pass that works on its graph misses
neither. :func:`capture` then removes what computes nothing at inference, folds batch normalization (Jacob et al. 2018, section
3.2), and writes each thing in one way (:mod:`edgekit.compress.canonical`). The result computes the same function.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from edgekit.compress.canonical import canonicalize
from edgekit.compress.explain import explain_export_error, source_line
from edgekit.errors import ModelError

__all__ = ["Graph", "capture", "capture_exported", "check_finite", "export_float", "layer_names", "shapes_of", "tensor_of"]


@dataclass(frozen=True)
class Graph:
    """A captured model.

    Attributes:
        module: the flat ATen graph, in eval mode; called with one tensor for each input, any batch size if ``dynamic_batch``.
        sample: example inputs, batch first.
        names: fx node name to layer name (that of the source module where it has one).
        sources: layer name to "file.py:line" in the user's model.
        dynamic_batch: False where the model only exports for the sample's batch size.
        unused: layers that have weights and never run, so that they are not in ``module``.
    """

    module: fx.GraphModule
    sample: tuple[Tensor, ...]
    names: Mapping[str, str]
    sources: Mapping[str, str]
    dynamic_batch: bool
    unused: tuple[str, ...] = ()


def tensor_of(module: nn.Module, node: fx.Node) -> Tensor:
    """The tensor behind a ``get_attr`` node."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise TypeError(f"{node.target} is not a tensor")
    return value


def check_finite(model: nn.Module) -> None:
    """Raise ModelError naming the first parameter or buffer that holds NaN or Inf; -Inf in a buffer is an attention mask."""
    masks = {id(value) for value in model.buffers()}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        fine = torch.isfinite(value) | (value == -torch.inf) if id(value) in masks else torch.isfinite(value)
        if value.is_floating_point() and not fine.all():
            bad = int((~fine).sum())
            raise ModelError(f"weights: {name} holds {bad} NaN or Inf values of {value.numel()}; train or load the model again")


def export_float(model: nn.Module, sample: Sequence[Tensor]) -> tuple[ExportedProgram, bool]:
    """The float model exported in eval mode, with a free batch size where the model allows it.

    Returns:
        The program and whether its batch size is free.

    Raises:
        ModelError: the export failed; the message has the reason, the model's source line and a remedy.
    """
    check_finite(model)
    model = model.eval()
    pairs = tuple(torch.cat([x[:1]] * 2) for x in sample)  # torch.export fixes a batch of one
    try:
        free = tuple({0: Dim.AUTO} for _ in pairs)
        shapes = {"args": free} if _variadic(model) else free
        with redirect_stderr(io.StringIO()):  # torch prints the graph of a model that it cannot export
            exported = torch.export.export(model, pairs, strict=False, dynamic_shapes=shapes)
        batch = next(n for n in exported.graph.nodes if n.op == "placeholder" and n.name in exported.graph_signature.user_inputs)
        if not is_concrete_int(batch.meta["val"].shape[0]):  # len(x) in a forward makes a SymInt that is always 2
            return exported, True
    except Exception:  # the static export below gives the message
        pass
    try:
        with redirect_stderr(io.StringIO()):
            return torch.export.export(model, tuple(x[:1] for x in sample), strict=False), False
    except Exception as error:
        raise ModelError(explain_export_error(error)) from error


def capture(model: nn.Module, sample: Sequence[Tensor]) -> Graph:
    """Capture ``model`` as a :class:`Graph`.

    Args:
        model: any exportable module; left as it is, but put into eval mode.
        sample: one tensor for each input, shape (N, ...), N >= 1; only shapes, dtypes and the first sample matter.

    Raises:
        ModelError: NaN weights, a model that cannot be exported, or one that does not return one tensor or a tuple of tensors.
    """
    return capture_exported(*export_float(model, sample), sample=tuple(sample))


def capture_exported(exported: ExportedProgram, dynamic_batch: bool, *, sample: tuple[Tensor, ...]) -> Graph:
    """As :func:`capture`, from an exported program."""
    module = exported.run_decompositions({}).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    flat = _flatten_interface(module)
    canonicalize(flat)
    _refuse_training_behaviour(flat)
    names = layer_names(flat)
    lines = {n.name: source_line(n.meta.get("stack_trace") or "") for n in flat.graph.nodes}
    sources = {name: lines[node] for node, name in names.items() if lines[node]}
    one = tuple(x[:1] for x in sample)
    with torch.no_grad():
        result = flat(*one)
    if not all(isinstance(t, Tensor) for t in (result if isinstance(result, tuple | list) else (result,))):
        raise ModelError(f"the model returns {type(result).__name__}; return one tensor or a tuple of tensors")
    return Graph(flat.eval(), tuple(sample), names, sources, dynamic_batch, _unused_layers(exported))


_RANDOM = frozenset({
    "native_dropout", "bernoulli", "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "normal",
    "normal_functional", "uniform", "exponential", "poisson", "multinomial", "rrelu_with_noise",
})  # fmt: skip
"""Not torch's tag of seeded operators: attention and LSTM bear it without being random in evaluation mode."""


def _refuse_training_behaviour(module: fx.GraphModule) -> None:
    """ModelError for what makes an output depend on chance or on the other samples of its batch."""
    for node in module.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        line = source_line(node.meta.get("stack_trace") or "")
        where = f"{line}: " if line else ""
        if _operator(node) in _RANDOM:
            raise ModelError(
                f"{where}{_operator(node)} is random also in evaluation mode, so no file can equal the model; "
                "for dropout write training=self.training, else make the values beforehand"
            )
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if _uses_batch_statistics(node) and stack and "BatchNorm" in str(stack[-1][1]):
            raise ModelError(
                f"{where}layer {stack[-1][0]} normalizes by the statistics of the batch also in evaluation mode; "
                "train it with track_running_stats=True"
            )


def _uses_batch_statistics(node: fx.Node) -> bool:
    """A batch_norm without running statistics, or in training mode."""
    if "batch_norm" not in str(node.target) or "no_training" in str(node.target):
        return False
    return node.target != torch.ops.aten.batch_norm.default or node.args[3] is None or bool(node.args[5])


def _unused_layers(exported: ExportedProgram) -> tuple[str, ...]:
    """Modules with parameters none of which the graph reads, in the model's order."""
    users = {n.name: len(n.users) for n in exported.graph.nodes if n.op == "placeholder"}
    targets = exported.graph_signature.inputs_to_parameters
    read = {_storage(exported.state_dict[target]) for key, target in targets.items() if users.get(key, 0)}
    used: dict[str, bool] = {}
    for target in targets.values():  # of tied weights the graph reads one
        owner = target.rpartition(".")[0]
        used[owner] = used.get(owner, False) or _storage(exported.state_dict[target]) in read
    return tuple(name for name, read in used.items() if not read and name)


def _storage(value: Tensor) -> tuple[int, torch.Size]:
    return value.data_ptr(), value.shape


def layer_names(module: fx.GraphModule) -> dict[str, str]:
    """fx node name to layer name: the parameter's path, or the module's path plus the operator; unique."""
    weights = {n: _weight_path(n) for n in module.graph.nodes if n.op == "call_function"}
    parents = {p.rpartition(".")[0] for n in module.graph.nodes for p, _ in (n.meta.get("nn_module_stack") or {}).values()}
    taken = {w for w in weights.values() if w}
    names: dict[str, str] = {}
    used: set[str] = set()
    for node, weight in weights.items():
        base = weight or _module_path(node, parents)
        if not weight and base in taken:
            base = f"{base}_{_operator(node)}"
        while any(u.startswith(f"{base}.") or base.startswith(f"{u}.") for u in used | (set() if weight else taken)):
            base = "_".join(base.rsplit(".", 1)) if "." in base else f"{base}_{_operator(node)}"  # no layer inside a layer
        name, count = base, 2
        while name in used:
            name, count = f"{base}_{count}", count + 1
        used.add(name)
        names[node.name] = name
    return names


def _variadic(model: nn.Module) -> bool:
    code = getattr(type(model).forward, "__code__", None)
    return bool(code and code.co_flags & 0x04)


def _weight_path(node: fx.Node) -> str:
    """Module path of the weight that this node multiplies with, "" if it has none."""
    weight = node.args[1] if len(node.args) > 1 else None
    if isinstance(weight, fx.Node) and weight.op == "get_attr" and str(weight.target).endswith("weight"):
        return str(weight.target).removesuffix("weight").strip("._") or "weight"
    for group in node.args:  # a recurrent layer has a list of them
        if isinstance(group, list | tuple) and group and all(isinstance(g, fx.Node) and g.op == "get_attr" for g in group):
            return str(group[0].target).rpartition(".")[0]  # type: ignore[union-attr]
    return ""


def _operator(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).split(".")[1].strip("_")
    return str(getattr(target, "__name__", target))


def _module_path(node: fx.Node, parents: set[str]) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values())) if stack else ("", "")
    if str(path).startswith("_empty"):
        path = ""
    leaf = str(kind).startswith("torch.nn.modules.") and path not in parents
    return str(path) if leaf and path else f"{path}.{_operator(node)}".strip(".")


def _flatten_interface(module: fx.GraphModule) -> fx.GraphModule:
    """Replace the pytree calling convention of an unlifted export by plain positional tensors."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, values)
    outputs = [o for o in (result if isinstance(result, tuple | list) else (result,)) if o is not None]
    graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    for node in graph.nodes:
        if node.op == "placeholder" and node.args:
            node.args = ()
    return fx.GraphModule(module, graph)


def shapes_of(graph: Graph, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor for a batch of that many."""
    shapes: dict[str, tuple[int, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                shapes[n.name] = tuple(value.shape)
            return value

    with torch.no_grad():
        Recorder(graph.module).run(*(torch.cat([x[:1]] * batch) for x in graph.sample))
    return shapes
