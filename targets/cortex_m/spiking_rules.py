"""What the integer operators of spiking programs become in firmware: rows of the table of rules.

The steps of time are the first dimension of a tensor, so ``fold_steps`` and ``unfold_steps`` of one sample move nothing, and the
current that ``repeat_steps`` repeats is read once more in each step.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.frozen import Layer
from edgekit.frozen.ops import multiplier
from edgekit.targets.cortex_m.lowering import Builder, constants

__all__ = ["RULES", "current"]


def _wide(build: Builder, layer: Layer, last: bool, width: int) -> int:
    index = build.tensor(layer, layer.shape, last, (1.0, 0), width=width)
    build.of[layer.name] = index
    return index


def _sizes(build: Builder, layer: Layer, source: int) -> dict[str, Any]:
    """Of a layer with weights: a linear layer is a 1x1 convolution of a 1x1 image."""
    shape = build.tensors[source].shape
    if "stride" not in layer.args:
        rows, outputs = prod(layer.shape[:-1]), layer.shape[-1]
        one = {"stride": (1, 1), "pad": (0, 0), "dilation": (1, 1), "groups": 1, "kernel": (1, 1)}
        return {"steps": rows, "in": (1, 1, layer.args["weight"].shape[1]), "out": (1, 1, outputs), **one}
    return {
        "steps": shape[0], "in": (shape[2], shape[3], shape[1]), "out": (layer.shape[2], layer.shape[3], layer.shape[1]),
        "kernel": tuple(layer.args["weight"].shape[2:]), "stride": tuple(layer.args["stride"]),
        "pad": tuple(layer.args["padding"]), "dilation": tuple(layer.args["dilation"]), "groups": int(layer.args["groups"]),
    }  # fmt: skip


def _weights(build: Builder, layer: Layer) -> tuple[int, NDArray[Any], bool]:
    """The tensor a layer reads, its weights (O, kh, kw, C / groups), and whether it is an image."""
    weight: NDArray[Any] = layer.args["weight"].numpy()
    if weight.ndim == 4:
        return build.read(layer.inputs[0], last=True), np.ascontiguousarray(weight.transpose(0, 2, 3, 1)), True
    image = build.flattened.get(layer.inputs[0])
    if image is not None:  # the weights are put in the order of the image
        weight = weight.reshape(len(weight), *build.tensors[image].shape[1:]).transpose(0, 2, 3, 1).reshape(weight.shape)
    source = build.read(layer.inputs[0], last=False) if image is None else image
    return source, np.ascontiguousarray(weight)[:, None, None], False


def _spiking(build: Builder, layer: Layer) -> None:
    source, weight, image = _weights(build, layer)
    arrays = {"weight": weight, "bias": layer.args["bias"].numpy().astype(np.int16)}
    output = _wide(build, layer, image, 2)
    build.step(layer, "spiking", [source], output, values=_sizes(build, layer, source), arrays=arrays, macs=layer.macs)


def current(build: Builder, layer: Layer) -> None:
    """The step of a ``qconv2d`` or ``qlinear`` with 16-bit outputs that are currents."""
    source, weight, image = _weights(build, layer)
    in_zp = int(layer.args["in_zp"])
    bias = layer.args["bias"].numpy().astype(np.int64) - in_zp * weight.reshape(len(weight), -1).sum(1, dtype=np.int64)
    if layer.args["activation"] != "none" or int(layer.args["out_zp"]):
        raise build.refuse(layer, "gives currents with an activation or a zero point", "leave both out")
    scale = multiplier(float(layer.args["in_scale"]), layer.args["weight_scale"], float(layer.args["out_scale"])).numpy()
    arrays = {"weight": weight, "bias": bias.astype(np.int32), "multiplier": scale}
    values = {**_sizes(build, layer, source), "in_zp": in_zp}
    build.step(layer, "current", [source], _wide(build, layer, image, 2), values=values, arrays=arrays, macs=layer.macs)


def _constants_of(layer: Layer, shape: tuple[int, ...], last: bool, *keys: str) -> dict[str, NDArray[np.int16]]:
    """Constants of each neuron (threshold, decay, initial membrane) in stored order, or of each channel if no more are needed."""
    found = {}
    for key, value in constants(layer, *keys).items():
        whole = np.broadcast_to(value.astype(np.int16), shape)
        found[key] = (whole.transpose(1, 2, 0) if last else whole).reshape(-1)
    channels = shape[0] if last else shape[-1]
    if all(
        np.array_equal(v.reshape(-1, channels), np.broadcast_to(v[:channels], (v.size // channels, channels)))
        for v in found.values()
    ):
        found = {k: v[:channels] for k, v in found.items()}
    return {k: np.ascontiguousarray(v) for k, v in found.items()}


def _driven(build: Builder, layer: Layer) -> tuple[int, dict[str, Any]]:
    """The current that neurons or synapses read, and their sizes."""
    steps, name, n = int(layer.args["steps"]), layer.inputs[0], prod(layer.shape[1:])
    if layer.shape[0] != steps or layer.args.get("reset", "zero") not in ("subtract", "zero"):
        raise build.refuse(
            layer, f"has {layer.shape[0] // steps} samples or reset {layer.args.get('reset')}", "freeze it for one sample"
        )
    source = build.read(build.repeats.get(name, name))
    return source, {"steps": steps, "n": n, "x_step": 0 if name in build.repeats else n}


def _rules(layer: Layer) -> dict[str, int]:
    return {"zero": int(layer.args["reset"] == "zero"), "max_spikes": int(layer.args["max_spikes"])}


def _neurons(build: Builder, layer: Layer) -> None:
    source, values = _driven(build, layer)
    last = build.tensors[source].last
    arrays = _constants_of(layer, layer.shape[1:], last, "threshold", "decay", "v_init")
    build.step(layer, "neurons", [source], _wide(build, layer, last, 1), values={**values, **_rules(layer)}, arrays=arrays)


def _fade(build: Builder, layer: Layer) -> None:
    source, values = _driven(build, layer)
    last = build.tensors[source].last
    arrays = _constants_of(layer, layer.shape[1:], last, "decay")
    build.step(layer, "fade", [source], _wide(build, layer, last, 2), values=values, arrays=arrays)


def _recurrent(build: Builder, layer: Layer) -> None:
    source, values = _driven(build, layer)
    tensor, weight = build.tensors[source], layer.args["weight"].numpy()
    image = weight.ndim == 4
    if image and not tensor.last:
        raise build.refuse(layer, "gets currents of an image that is not stored channel-last", "let a convolution make them")
    arrays = _constants_of(layer, layer.shape[1:], tensor.last, "threshold", "decay", "v_init", "decay_syn")
    arrays |= {"weight": weight.transpose(0, 2, 3, 1) if image else weight[:, None, None]}
    arrays |= {"bias": layer.args["bias"].numpy().astype(np.int16)}
    size = (*layer.shape[2:], layer.shape[1]) if image else (1, 1, values["n"])
    kernel = tuple(weight.shape[2:]) if image else (1, 1)
    groups = len(weight) // weight.shape[1]
    values |= {
        "in": size,
        "out": size,
        "kernel": kernel,
        "pad": tuple(k // 2 for k in kernel),
        "groups": groups,
        "stride": (1, 1),
    }
    output = _wide(build, layer, tensor.last, 1)
    build.step(layer, "recurrent", [source], output, values={**values, **_rules(layer)}, arrays=arrays, macs=layer.macs)


def _repeat(build: Builder, layer: Layer) -> None:
    driven = ("qlif_sequence", "qlif_recurrent", "qsynapse_sequence")
    if any(u.op not in driven for u in build.users(layer)) or build.is_output(layer):
        raise build.refuse(layer, "repeats something else than the current of neurons", "give neurons a constant current only")
    build.repeats[layer.name] = layer.inputs[0]


def _fold(build: Builder, layer: Layer) -> None:
    """A program's input with time: ``quantize`` reads it (``rules.py``)."""


def _unfold(build: Builder, layer: Layer) -> None:
    source = build.tensors[build.read(layer.inputs[0], last=False)]
    build.of[layer.name] = build.tensor(layer, layer.shape, False, (1.0, 0), source.base, width=source.width)


def _delay(build: Builder, layer: Layer) -> None:
    steps, source = int(layer.args["steps"]), build.read(layer.inputs[0])
    last = build.tensors[source].last
    delay = _constants_of(layer, layer.shape[1:], last, "delay")["delay"].astype(np.uint16)
    values = {"steps": steps, "n": prod(layer.shape[1:]), "longest": max(layer.args["lengths"])}
    build.step(layer, "delay", [source], _wide(build, layer, last, 1), values=values, arrays={"delay": delay})


def _pool(build: Builder, layer: Layer) -> None:
    source = build.read(layer.inputs[0], last=True)
    steps, channels, height, width = build.tensors[source].shape
    values = {
        "steps": steps, "in": (height, width, channels), "out": (layer.shape[2], layer.shape[3], channels),
        "kernel": tuple(layer.args["kernel"]), "stride": tuple(layer.args["stride"]), "pad": tuple(layer.args["padding"]),
    }  # fmt: skip
    build.step(layer, "spike_pool", [source], _wide(build, layer, True, 1), values=values)


def _add_currents(build: Builder, layer: Layer) -> None:
    a = build.read(layer.inputs[0])
    last = build.tensors[a].last
    b = build.read(layer.inputs[1], last=last)
    build.step(layer, "add_currents", [a, b], _wide(build, layer, last, 2), values={"n": prod(layer.shape)})


def _add_spikes(build: Builder, layer: Layer) -> None:
    x = build.read(layer.args["x"])
    last = build.tensors[x].last
    s = build.read(layer.args["s"], last=last)
    amplitude = constants(layer, "amplitude")["amplitude"].astype(np.int16)
    if len(layer.shape) == 4 and not last:
        raise build.refuse(
            layer, "adds spikes to currents of an image that is not stored channel-last", "let a convolution make them"
        )
    values = {"n": prod(layer.shape)}
    build.step(layer, "add_spikes", [x, s], _wide(build, layer, last, 2), values=values, arrays={"amplitude": amplitude})


def _accumulate(build: Builder, layer: Layer) -> None:
    source = build.read(layer.inputs[0])
    values = {"steps": int(layer.args["steps"]), "n": prod(layer.shape), "spikes": build.tensors[source].width == 1}
    last = build.tensors[source].last
    build.step(layer, "accumulate", [source], _wide(build, layer, last, 4), values=values)


RULES: dict[str, Callable[[Builder, Layer], None]] = {
    "fold_steps": _fold,
    "unfold_steps": _unfold,
    "repeat_steps": _repeat,
    "spiking_linear": _spiking,
    "spiking_conv2d": _spiking,
    "spike_sum_pool2d": _pool,
    "delay_steps": _delay,
    "qlif_sequence": _neurons,
    "qlif_recurrent": _recurrent,
    "qsynapse_sequence": _fade,
    "qaccumulate": _accumulate,
    "add_currents": _add_currents,
    "add_spikes": _add_spikes,
}
"""Operator to its rule."""
