"""Low-rank compression of an ``nn.Module``, in one call: the same module with chains of thin layers in place of its layers.

The manner is that of Greenformers' ``auto_fact`` (Cahyawijaya et al. 2021): the result is an ordinary module of the same class,
to be trained, saved or exported further. A recipe's ``lowrank`` block works on the captured graph instead, where batch
normalization is folded and functional layers are seen too.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from edgekit.compress.lowrank.layers import Layer, Part
from edgekit.compress.lowrank.moments import Moments, side_of
from edgekit.compress.lowrank.plan import Factorized, Model, factorize_layers, refusal, schemes_of
from edgekit.compress.lowrank.settings import BUDGETS, METERED, LowRank, parse_rank
from edgekit.compress.passes import PassRecord
from edgekit.data import Source, batches, input_count
from edgekit.errors import DataError, InputError
from edgekit.validation import sentence

__all__ = ["factorize"]

_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d)
_PROBES = 64
_UNKNOWN_SIZE = 64
"""Height and width assumed where no calibration sample shows them; only the edges' share of the cost depends on it."""


def factorize(
    model: nn.Module,
    rank: int | float | str = "energy:0.95",
    calibration: Source | None = None,
    *,
    in_place: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> tuple[nn.Module, PassRecord]:
    """Replace linear and convolutional layers by ``nn.Sequential`` of thin ones, wherever that saves weights and work.

    Args:
        rank: as in :class:`LowRank`: 32, 0.5, "energy:0.95", "params:0.5", "macs:0.5", "size:200KB".
        calibration: inputs (see :mod:`edgekit.data`); with them the error of each layer's output is minimized, else its weight's.
        in_place: change ``model`` itself; else it stays as it is, and shares no tensor with the result.
        options: the other settings of :class:`LowRank`.

    Returns:
        The module, and what was done to which layer and why others were left alone.

    Raises:
        InputError: a wrong setting, a budget without calibration data, or one that cannot be reached.
        DataError: calibration data that the model cannot take.

    Example:
        >>> small, record = factorize(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), rank=0.5)
        >>> record.layers
        {'0': '64 x 64 to rank 16 (linear), 50% of the weights, relative error ...'}
    """
    options.setdefault("solver", "svd" if calibration is None else "svd_data")
    try:
        settings = LowRank(rank=rank, **options)
    except ValidationError as error:
        raise InputError(f"factorize: {sentence(error, LowRank)}") from None
    if settings.linformer:
        raise InputError("factorize: linformer works on the captured graph; take a recipe's lowrank block")
    if parse_rank(settings.rank).kind in METERED:
        raise InputError(
            f"factorize: {settings.rank} is measured on a target, which a recipe's lowrank block does: `edgekit run`, or "
            "edgekit.compress_model(model, data, {'lowrank': {...}})"
        )
    if calibration is None and (settings.solver == "svd_data" or parse_rank(settings.rank).kind in BUDGETS):
        raise InputError("factorize: solver svd_data and budgets need calibration data; give calibration=")
    stream = None if calibration is None else _stream(model, settings, calibration)
    seen = _Seen(model, stream) if stream else None
    found, left = _layers(model, seen)
    for name, (layer, _) in list(found.items()):
        if reason := refusal(layer, settings):
            left[name] = reason
            del found[name]
    layers = [layer for layer, _ in found.values()]
    moments = _moments(model, found, settings, stream, progress) if stream and settings.solver == "svd_data" else {}

    def step(done: int, total: int) -> None:
        if progress:
            progress("factorize", done, total)

    whole = None
    if stream and seen:
        whole = Model(*_sizes(model), seen.macs, _outputs(model, stream, settings.samples))
    done, refused = factorize_layers(layers, moments, settings, whole, step)
    chains: dict[int, nn.Module] = {}
    for name, f in done.items():
        chain = _chain(found[name][1][0], f)
        chains |= {id(m): chain for m in found[name][1]}
    before = _sizes(model)[0]
    result = _put(model, chains) if in_place else copy.deepcopy(model, dict(chains))
    figures = {"params before": before, "params after": _sizes(result)[0]}
    return result, PassRecord({n: f.text for n, f in done.items()}, {**left, **refused}, figures)


def _layers(model: nn.Module, seen: _Seen | None) -> tuple[dict[str, tuple[Layer, list[nn.Module]]], dict[str, str]]:
    """Layer name to the layer and the modules that share its weight; and why other layers cannot be factorized."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    found: dict[str, tuple[Layer, list[nn.Module]]] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, _KINDS):
            continue
        if type(module) not in _KINDS:
            left[name or type(module).__name__] = f"{type(module).__name__} may use its weight in its own way"
            continue
        layer = _layer_of(name, module, seen)
        if isinstance(layer, str):
            left[name] = layer
            continue
        sharing = owners[id(module.weight)]
        strangers = [n for n, m in sharing if not _alike(module, m)]
        if strangers:
            left[name] = f"its weight is tied to {', '.join(strangers)}"
        elif sharing[0][1] is module:
            found[layer.name] = (layer, [m for _, m in sharing])
    return found, left


def _alike(a: nn.Module, b: nn.Module) -> bool:
    return type(a) is type(b) and a.bias is b.bias and a.extra_repr() == b.extra_repr()


def _layer_of(name: str, module: nn.Module, seen: _Seen | None) -> Layer | str:
    value: Any = module.weight
    weight: Tensor = value.detach()
    bias: Any = module.bias
    bias = None if bias is None else bias.detach()
    parameter, own = (f"{name}.{leaf}" if name else leaf for leaf in ("weight", "bias"))
    own = own if bias is not None else ""
    size, uses = seen.of(module) if seen else ((_UNKNOWN_SIZE, _UNKNOWN_SIZE), 1)
    if uses == 0:
        return "the model never calls it"
    if isinstance(module, nn.Linear):
        return Layer(
            name or "model", weight, bias, in_size=size if seen else (1, 1), parameter=parameter, uses=uses, bias_parameter=own
        )
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    if module.padding_mode != "zeros":
        return f"its padding_mode is {module.padding_mode}"
    padding: Any = module.padding
    if isinstance(padding, str):
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if padding == "same" and any(s % 2 for s in spans):
            return "its padding is 'same' with an even kernel"
        padding = tuple(s // 2 if padding == "same" else 0 for s in spans)
    stride, dilation = module.stride, module.dilation
    if isinstance(module, nn.Conv1d):
        weight, stride, padding, dilation = weight.unsqueeze(2), (1, *stride), (0, *padding), (1, *dilation)
        size = size if seen else (1, _UNKNOWN_SIZE)
    return Layer(name or "model", weight, bias, stride, padding, dilation, module.groups, size, parameter, uses, own)  # type: ignore[arg-type]


def _chain(module: nn.Module, f: Factorized) -> nn.Sequential:
    """The thin layers as modules of the layer's own kind, dtype, device and mode."""
    weight: Any = module.weight
    parts = [_thin(module, part) for part in f.parts]
    chain = nn.Sequential(*parts).to(weight.device, weight.dtype).train(module.training)
    return chain.requires_grad_(weight.requires_grad)


def _thin(module: nn.Module, part: Part) -> nn.Module:
    s, bias = part.shape, part.bias is not None
    made: Any
    if isinstance(module, nn.Linear):
        made = nn.Linear(s.weight[1], s.weight[0], bias)
        values = part.weight
    else:
        flat = isinstance(module, nn.Conv1d)
        kind: Any = nn.Conv1d if flat else nn.Conv2d
        geometry = [v[1:] if flat else v for v in (s.weight[2:], s.stride, s.padding, s.dilation)]
        made = kind(s.weight[1] * s.groups, s.weight[0], *geometry, s.groups, bias)
        values = part.weight.squeeze(2) if flat else part.weight
    with torch.no_grad():
        made.weight.copy_(values)
        if part.bias is not None:
            made.bias.copy_(part.bias)
    result: nn.Module = made
    return result


def _put(model: nn.Module, chains: Mapping[int, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in chains:
                parent._modules[name] = chains[id(child)]
    return chains.get(id(model), model)


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Values of all parameters and buffers, and their bytes with 8-bit weights (see :class:`Model`)."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() for t in tensors), sum(t.numel() * (4 if t.dim() < 2 else 1) for t in tensors)


_Stream = Callable[[int], Any]


def _stream(model: nn.Module, settings: LowRank, calibration: Source) -> _Stream:
    """Batches of so many calibration samples, spread over all, on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def stream(samples: int) -> Any:
        inputs = input_count(model)
        for batch in batches(calibration, settings.batch_size, inputs=inputs, what="calibration", samples=samples):
            yield tuple(t.to(device) for t in batch)

    return stream


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Seen:
    """What one sample shows: each layer's input size and number of calls, and the model's multiply-accumulates."""

    def __init__(self, model: nn.Module, stream: _Stream) -> None:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        self.sizes: dict[int, tuple[int, int]] = {}
        self.calls: Counter[int] = Counter()

        def hook(module: nn.Module, args: tuple[Tensor, ...], _: Any) -> None:
            x = args[0]
            self.calls[id(module.weight)] += 1
            size = (1, x[..., 0].numel()) if isinstance(module, nn.Linear) else (1, *x.shape[2:])[-2:]
            self.sizes[id(module)] = size

        handles = [m.register_forward_hook(hook) for m in model.modules() if type(m) in _KINDS]
        try:
            with _evaluating(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                _call(model, next(iter(stream(1))))
        finally:
            for handle in handles:
                handle.remove()
        self.macs = int(counter.get_total_flops()) // 2

    def of(self, module: nn.Module) -> tuple[tuple[int, int], int]:
        return self.sizes.get(id(module), (1, 1)), self.calls[id(module.weight)]


def _call(model: nn.Module, batch: Sequence[Tensor]) -> Any:
    try:
        return model(*batch)
    except (RuntimeError, TypeError, ValueError) as error:
        shapes = [tuple(t.shape) for t in batch]
        raise DataError(f"calibration: the model cannot take samples of shape {shapes} ({str(error).splitlines()[0]})") from error


def _moments(
    model: nn.Module,
    found: Mapping[str, tuple[Layer, list[nn.Module]]],
    settings: LowRank,
    stream: _Stream,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, Moments]:
    schemes = schemes_of(settings)
    moments = {n: Moments.empty(layer, side_of(layer, schemes)) for n, (layer, _) in found.items()}

    def watch(layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            if not torch.isfinite(y).all():
                raise DataError(f"calibration: NaN or Inf in the output of layer {layer.name}; check the data's range")
            x = args[0]
            if isinstance(module, nn.Conv1d):
                x, y = x.unsqueeze(2), y.unsqueeze(2)
            moments[layer.name].add(layer, x.float(), y.float())

        return hook

    handles = [m.register_forward_hook(watch(layer)) for layer, modules in found.values() for m in modules]
    done = 0
    try:
        with _evaluating(model):
            for batch in stream(settings.samples):
                _call(model, batch)
                done += len(batch[0])
                if progress:
                    progress("calibrate", done, settings.samples)
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _outputs(model: nn.Module, stream: _Stream, samples: int) -> Callable[[Mapping[str, Tensor]], Sequence[Tensor]]:
    shapes = {n: p.shape for n, p in model.named_parameters(remove_duplicate=False)}

    def outputs(weights: Mapping[str, Tensor]) -> Sequence[Tensor]:
        given = {n: w.reshape(shapes[n]) for n, w in weights.items()}
        parts: list[list[Tensor]] = []
        with _evaluating(model):
            for whole in stream(samples):  # some of each batch: data may be sorted
                batch = tuple(t[: -(-len(t) * _PROBES // samples)] for t in whole)
                result = torch.func.functional_call(model, given, batch)
                parts.append([t for t in _tensors(result) if t.is_floating_point()])
        return [torch.cat(column).float().cpu() for column in zip(*parts, strict=True)]

    return outputs


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [t for item in items for t in _tensors(item)]
