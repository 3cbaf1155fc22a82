"""A model and its data where they come in: what would fail deep inside later, or pass silently, is said here in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from edgekit.compress.capture import check_finite
from edgekit.errors import InputError, ModelError, cause
from edgekit.frozen import FrozenProgram
from edgekit.stages import Evaluation, output_tensors

__all__ = ["check_device", "check_model", "check_sample", "range_warnings"]

_CLIPPED = 0.05
"""Share of evaluation values outside the calibrated range from which the user is warned; clipping observers leave under 1 %."""
_USED = 1 / 16
"""Share of the calibrated range below which the evaluation values use too few steps (under 16 of 256)."""


def check_model(model: nn.Module, name: str) -> nn.Module:
    """The model, on the CPU and in evaluation mode, after checks of its parameters.

    Args:
        name: how errors call it.

    Raises:
        ModelError: parameters without data, not float32, or not finite; or it cannot be moved or put into evaluation mode.
    """
    for key, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta or is_lazy(value):
            raise ModelError(f"{name}: {key} has no data yet; load its weights, or run the model once on a sample")
        if (value.is_floating_point() and value.dtype != torch.float32) or value.is_complex():
            kind = str(value.dtype).removeprefix("torch.")
            raise ModelError(f"{name}: {key} is {kind}, edgekit works on float32 models; return model.float()")
    try:
        model = model.cpu().eval()
    except Exception as error:
        raise ModelError(f"{name}: cannot be put into evaluation mode on the CPU: {cause(error)}") from error
    check_finite(model)
    return model


def check_sample(model: nn.Module, sample: Sequence[Tensor], name: str) -> None:
    """Run the model on the first calibration sample.

    Raises:
        ModelError: it does not take this sample, or returns something else than tensors.
    """
    try:
        with torch.no_grad():
            result = model(*sample)
    except Exception as error:
        given = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in sample)
        raise ModelError(f"{name} does not take the first calibration sample, {given}: {cause(error)}") from error
    output_tensors(result)


def check_device(device: str | None) -> None:
    """Raise InputError for a device that edgekit does not know or torch does not see."""
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"device {device!r}; expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch sees no CUDA device; use cpu")


def range_warnings(program: FrozenProgram, evaluation: Evaluation) -> list[str]:
    """A sentence for each input whose evaluation values do not lie in the range that calibration found."""
    layers = {layer.node: layer for layer in program.layers}
    places = [n for n in program.module.graph.nodes if n.op == "placeholder"]
    found = []
    for node, x in zip(places, evaluation.inputs, strict=True):
        quantize = next((layers[u.name] for u in node.users if u.name in layers and layers[u.name].op == "quantize"), None)
        if quantize is None:
            continue
        scale, zero, half = quantize.args["scale"], quantize.args["zero_point"], 1 << (quantize.args["bits"] - 1)
        low, high = scale * (-half - zero), scale * (half - 1 - zero)
        outside = float(((x < low - scale) | (x > high + scale)).float().mean())
        spans = (
            f"evaluation values go from {float(x.min()):.3g} to {float(x.max()):.3g}, calibration gave {low:.3g} to {high:.3g}"
        )
        if outside > _CLIPPED:
            found.append(f"input {node.name}: {100 * outside:.3g} % of the evaluation values are outside the range ({spans})")
        elif float(x.max() - x.min()) < _USED * (high - low):
            found.append(f"input {node.name}: the evaluation values use a small part of the range ({spans})")
    return [f"{text}; calibrate on samples like those it will see" for text in found]
