"""Inputs as spikes: a layer of integrate-and-fire neurons in front of everything else, for chips that take nothing but spikes.

The layer gets the input itself as a constant current, starts at half a threshold and subtracts: it emits
``round(x * steps / threshold)`` spikes (ties up), as evenly spread as can be, which is deterministic rate coding
(:func:`edgekit.compress.spiking.encoders.rate`). On the graph it is a ReLU, which changes nothing of values from 0; conversion
and training then treat it as they treat every ReLU. Values below 0 are counted by neurons of their own: ``x`` becomes
``(max(x, 0), max(-x, 0))`` along the channels, and the layers that read it get ``(w, -w)``.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from edgekit.compress.canonical import ATEN
from edgekit.compress.capture import Graph, tensor_of
from edgekit.compress.spiking.graph import operator_name
from edgekit.errors import ModelError

__all__ = ["ENCODER", "with_encoder"]

ENCODER = "encoder"
"""Name of the layer."""


def with_encoder(graph: Graph, batch: tuple[Tensor, ...]) -> Graph:
    """The graph with a ReLU behind its input, and one for what is below 0 where ``batch`` goes there.

    Args:
        batch: calibration samples.

    Raises:
        ModelError: several inputs, or values below 0 that something else than a convolution or a linear layer reads.
    """
    module = copy.deepcopy(graph.module)
    inputs = [n for n in module.graph.nodes if n.op == "placeholder" and n.users]
    if len(inputs) != 1:
        raise ModelError(f"spiking: encoding rate is for models with one input, this one has {len(inputs)}")
    names = dict(graph.names)
    x, readers = inputs[0], list(inputs[0].users)
    if float(batch[0].min()) < 0:
        _signed(module, x, readers, names)
    else:
        with module.graph.inserting_after(x):
            made = module.graph.call_function(ATEN.relu.default, (x,))
        for reader in readers:
            reader.replace_input_with(x, made)
        names[made.name] = ENCODER
    module.graph.lint()
    module.recompile()
    return replace(graph, module=module, names=names)


def _signed(module: fx.GraphModule, x: fx.Node, readers: list[fx.Node], names: dict[str, str]) -> None:
    for reader in readers:
        op = operator_name(reader) if reader.op == "call_function" else ""
        groups = reader.args[6] if op == "conv2d" and len(reader.args) > 6 else 1
        weight = reader.args[1] if op in ("conv2d", "linear") else None
        if groups != 1 or not isinstance(weight, fx.Node) or weight.op != "get_attr":
            name = names.get(reader.name, reader.name)
            raise ModelError(
                f"spiking: encoding rate: the input has values below 0 and {name} ({op}) reads it; "
                "let a convolution without groups or a linear layer be the first, or shift the data to start at 0"
            )
    kind = operator_name(readers[0])
    channels = int(tensor_of(module, readers[0].args[1]).shape[1])  # type: ignore[arg-type]
    both = torch.cat([torch.eye(channels), -torch.eye(channels)])
    module.register_parameter("encoder_signs", nn.Parameter(both if kind == "linear" else both[..., None, None]))
    with module.graph.inserting_before(readers[0]):
        signs = module.graph.get_attr("encoder_signs")
        doubled = module.graph.call_function((ATEN.linear if kind == "linear" else ATEN.conv2d).default, (x, signs))
        made = module.graph.call_function(ATEN.relu.default, (doubled,))
    names |= {doubled.name: f"{ENCODER}_signs", made.name: ENCODER}
    for at, reader in enumerate(readers):
        value = tensor_of(module, reader.args[1])  # type: ignore[arg-type]
        name = f"encoder_weight_{at}"
        module.register_parameter(name, nn.Parameter(torch.cat([value, -value], 1).detach()))
        with module.graph.inserting_before(reader):
            weight = module.graph.get_attr(name)
        reader.args = (made, weight, *reader.args[2:])
