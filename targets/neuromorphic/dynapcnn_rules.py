"""Rules of DYNAP-CNN and Speck: a core for each layer of convolution, neurons and sum pool.

Words that a layer takes (sinabs, ``DynapcnnLayer.memory_summary``): kernels ``c * 2**(ceil(log2(k * k)) + ceil(log2(f)))``,
neurons ``f * 2**(ceil(log2 y) + ceil(log2 x))``, for c input and f output channels, kernels of k x k and images of y x x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from edgekit.nir.nodes import pair
from edgekit.nir.semantics import kind
from edgekit.targets.neuromorphic.breaches import Breach, over
from edgekit.targets.neuromorphic.chips import Chip, Core
from edgekit.targets.neuromorphic.layers import Layer, Network

__all__ = ["rules"]

_SOURCE = "sinabs 3.1.3, validate_memory_speck.py and DynapcnnLayer"


def rules(found: Chip, net: Network, used: dict[str, tuple[int, int]], cores: dict[str, int]) -> Iterator[Breach]:
    """DYNAP-CNN and Speck: a core for each layer of convolution, neurons and sum pool."""
    limits, wanted = found.limits, list[tuple[Layer, Core]]()
    used["layers"] = (len(net.neurons), limits["layers"].value)
    excess = len(net.neurons) - limits["layers"].value
    yield from over("", "layers of neurons are", limits["layers"], len(net.neurons), f"remove {excess} layers")
    for name in net.flat.inputs:
        side = max(net.shapes[name][1:], default=1)
        yield from over(
            name, "the input's larger side is", limits["input_side"], side, f"crop or pool it to {limits['input_side'].value}"
        )
    for layer in net.neurons:
        convolutions = [n for n in layer.through if kind(net.flat.nodes[n]) in ("Conv2d", "Affine", "Linear")]
        if len(convolutions) != 1 or any(kind(net.flat.nodes[n]) in ("Conv1d", "Threshold", "Scale") for n in layer.through):
            what = ", ".join(kind(net.flat.nodes[n]) for n in layer.through) or "nothing"
            yield Breach(
                layer.name,
                "before neurons stands",
                "one Conv2d or Affine, and sum pools",
                what,
                "merge them, or put neurons in between",
                found.title,
            )
            continue
        yield from _through(found, net, layer)
        memory = _memory(net, layer, convolutions[0])
        wanted.append((layer, memory))
        yield from _memory_breaches(found, layer, memory)
        yield from over(
            layer.name, "output channels are", limits["channels"], layer.shape[0], f"leave {limits['channels'].value}"
        )
        if len(layer.sources) > 1:
            yield Breach(
                layer.name, "layers heard are", "1", str(len(layer.sources)), "add them up in one layer before", found.title
            )
    placed = _placed([core for _, core in wanted], found.cores)
    if placed is None and not any(_memory_breaches(found, layer, core) for layer, core in wanted if not _fits(core, found.cores)):
        yield Breach(
            "",
            "cores for these layers are",
            "in some order",
            "in none",
            "make a layer's kernels or its image smaller",
            _core_source(found),
        )
    for (layer, _), core in zip(wanted, placed or (), strict=False):
        cores[layer.name] = core


def _core_source(found: Chip) -> str:
    return found.limits["layers"].source


def _through(found: Chip, net: Network, layer: Layer) -> Iterator[Breach]:
    """Kernel, stride, padding and pool of what stands before neurons."""
    for name in layer.through:
        node, which = net.flat.nodes[name], kind(net.flat.nodes[name])
        if which == "Conv2d":
            kernel, stride = np.shape(node.weight)[2:], pair(node.stride)
            if kernel[0] != kernel[1]:
                side = f"{kernel[0]} x {kernel[1]}"
                yield Breach(
                    name,
                    "the kernel is",
                    "square",
                    side,
                    f"fill it up with zeros to {max(kernel)} x {max(kernel)}",
                    _SOURCE,
                )
            if max(kernel) > found.kernels:
                yield Breach(
                    name,
                    "the kernel's side is",
                    str(found.kernels),
                    str(max(kernel)),
                    "use two smaller convolutions",
                    _SOURCE,
                )
            if any(s not in found.strides for s in stride):
                choices = ", ".join(map(str, found.strides))
                nearest = min(found.strides, key=lambda s: abs(s - max(stride)))
                yield Breach(name, "the stride is", choices, str(max(stride)), f"use {nearest}", _SOURCE)
            if int(node.groups) != 1 or max(pair(node.dilation)) != 1:
                yield Breach(
                    name,
                    "groups and dilation are",
                    "1 and 1",
                    f"{int(node.groups)} and {max(pair(node.dilation))}",
                    "write the weights out, with zeros",
                    _SOURCE,
                )
        if which == "AvgPool2d":
            yield Breach(
                name,
                "the pool is",
                "SumPool2d",
                "AvgPool2d",
                "use SumPool2d, the window's size in the weights behind it",
                _SOURCE,
            )
        if which == "SumPool2d":
            sides = pair(node.kernel_size)
            if sides[0] != sides[1] or sides[0] not in found.pools or pair(node.stride) != sides or any(pair(node.padding)):
                what = f"{sides[0]} x {sides[1]}, stride {pair(node.stride)[0]}, padding {pair(node.padding)[0]}"
                yield Breach(
                    name,
                    "the pool is",
                    "1, 2 or 4, square, of its own stride, without padding",
                    what,
                    "use 2 x 2 or 4 x 4",
                    _SOURCE,
                )


def _memory(net: Network, layer: Layer, name: str) -> Core:
    """Words that a layer takes; see the module's text."""
    node, shape = net.flat.nodes[name], net.shapes[name]
    if kind(node) == "Conv2d":
        outputs, inputs, height, width = np.shape(node.weight)
        rows, columns = shape[1:]
    else:  # an Affine is a convolution as large as the image before it
        outputs = np.shape(node.weight)[0]
        inputs, height, width = _image(net, name)
        rows = columns = 1
    kernels = int(inputs) * 2 ** (_log2(height * width) + _log2(outputs))
    biases = int(outputs) if hasattr(node, "bias") and np.any(node.bias) else 0
    return Core(kernels, int(outputs) * 2 ** (_log2(rows) + _log2(columns)), biases)


def _image(net: Network, name: str) -> tuple[int, int, int]:
    """Channels, height and width before an Affine, looking through a Flatten."""
    before = net.flat.sources[name][0]
    while kind(net.flat.nodes[before]) == "Flatten":
        before = net.flat.sources[before][0]
    shape = net.shapes[before]
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (int(np.prod(shape, dtype=int)), 1, 1)


def _log2(value: int) -> int:
    return max(0, math.ceil(math.log2(value)))


def _fits(core: Core, there: tuple[Core, ...]) -> bool:
    return any(core.kernels <= c.kernels and core.neurons <= c.neurons and core.biases <= c.biases for c in there)


def _memory_breaches(found: Chip, layer: Layer, core: Core) -> list[Breach]:
    if _fits(core, found.cores):
        return []
    source = _core_source(found)
    limit = " or ".join(dict.fromkeys(f"{c.kernels:,} and {c.neurons:,}" for c in found.cores))
    edit = "halve its channels, or its image by a stride or pool of 2"
    return [
        Breach(layer.name, "words for kernels and neurons are", limit, f"{core.kernels:,} and {core.neurons:,}", edit, source)
    ]


def _placed(wanted: list[Core], there: tuple[Core, ...]) -> list[int] | None:
    """A core for each layer (an augmenting path for each); None where there is none."""
    owner: dict[int, int] = {}

    def place(layer: int, seen: set[int]) -> bool:
        for core, room in enumerate(there):
            one = wanted[layer]
            if core in seen or not (one.kernels <= room.kernels and one.neurons <= room.neurons and one.biases <= room.biases):
                continue
            seen.add(core)
            if core not in owner or place(owner[core], seen):
                owner[core] = layer
                return True
        return False

    if not all(place(layer, set()) for layer in range(len(wanted))):
        return None
    cores = {layer: core for core, layer in owner.items()}
    return [cores[layer] for layer in range(len(wanted))]
