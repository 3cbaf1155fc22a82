"""A frozen program through litert-torch: one fx trace of quantize/dequantize operators, one conversion, silently.

Every traced node carries the name of the frozen layer it belongs to (nodes that stay float: "~" and the fx node's name), which
the converter keeps in its tensor names; :mod:`edgekit.targets.tflite_finish` turns those into the final names.

Three facts of litert-torch 0.10 shape this file: weights must come as float constants with quantize and dequantize in the graph;
``quant_config`` must be given, else the result is a float graph with QUANTIZE and DEQUANTIZE around every operator; and then any
float operator (GELU, MEAN, TRANSPOSE_CONV, ...) beside a QUANTIZE or DEQUANTIZE becomes an int8 one. So each border between the
integer and the float part carries a :data:`BARRIER`, an operator without an int8 form, which the finish takes out again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgekit.errors import UnsupportedError, missing_extra
from edgekit.frozen import FrozenProgram
from edgekit.frozen.dynamic_ops import DYNAMIC_OPS
from edgekit.targets import qdq

__all__ = ["BARRIER", "convert", "quiet", "trace"]

BARRIER = "|"
"""What the label of a barrier, a FLOOR that is only there while the converter runs, begins with."""

_Q: Any = torch.ops.quantized_decomposed


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Records nodes into ``graph`` under the current ``layer``; tensors become buffers of ``root``."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        super().__init__(graph)
        self.root, self.layer, self.constants, self.channels = root, "", 0, 0

    def constant(self, value: Tensor) -> fx.Proxy:
        name = f"c{self.constants}"
        self.constants += 1
        self.root.register_buffer(name, value.detach().clone())
        return self.create_proxy("get_attr", name, (), {})

    def create_arg(self, a: Any) -> Any:
        return self.constant(a).node if isinstance(a, Tensor) else super().create_arg(a)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(*args, **kwargs)
        proxy.node.meta["nn_module_stack"] = {"layer": ("", self.layer)}  # the converter writes "<layer>;" into its locations
        return proxy

    def barrier(self, value: fx.Proxy, name: str) -> fx.Proxy:
        """The value behind an operator that no quantization pattern of the converter crosses."""
        layer, self.layer = self.layer, f"{BARRIER}{name}"
        stopped = self.create_proxy("call_function", torch.ops.aten.floor.default, (value,), {})
        self.layer = layer
        return stopped


@dataclass(frozen=True)
class _TracedStyle(qdq.Style):
    """Weights as float constants, quantized and dequantized by traced nodes; everything before that is computed now."""

    tracer: _Tracer | None = None

    def weight(self, weight: Tensor, scale: Tensor, bits: int) -> Any:
        assert self.tracer is not None
        real = self.tracer.constant(weight.float() * scale.view(-1, *[1] * (weight.dim() - 1)))
        args = (self.tracer.constant(scale), self.tracer.constant(torch.zeros(len(weight), dtype=torch.int64)), 0, -128, 127)
        return _Q.dequantize_per_channel(_Q.quantize_per_channel(real, *args, torch.int8), *args, torch.int8)


def _reshape(x: Tensor, shape: Sequence[int], scale: float, zero_point: int) -> Tensor:
    """reshape, not view: the converter's layout pass has changed the strides by then."""
    style = qdq.Style()
    return style.quantize(torch.ops.aten.reshape.default(style.dequantize(x, scale, zero_point), shape), scale, zero_point)


def _lut(x: Tensor, table: Tensor, function: str, i_s: float, i_z: int, o_s: float, o_z: int) -> Tensor:
    """A placeholder that stays one int8 operator whatever the scales; the finish puts the function or the table in its place."""
    style = qdq.Style()
    return style.quantize(torch.ops.aten.gelu.default(style.dequantize(x, i_s, i_z)), o_s, o_z)


def _float_linear(
    tracer: _Tracer, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, group_size: int, weight_bits: int
) -> Any:
    """A float linear layer; the finish puts its integers in place of these weights."""
    real = tracer.constant(weight.float() * weight_scale.view(-1, 1))
    return torch.ops.aten.linear.default(x, real, tracer.constant(bias))


def _avg_pool(
    style: _TracedStyle, plain: Callable[..., Tensor], x: Tensor, i_s: float, i_z: int, o_s: float, o_z: int,
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool, count_include_pad: bool,
) -> Tensor:  # fmt: skip
    """Average pooling to another scale is a depthwise convolution with ones: TFLite's pool cannot rescale."""
    if (i_s, i_z) == (o_s, o_z) or ceil_mode or (any(padding) and not count_include_pad) or style.tracer is None:
        return plain(x, i_s, i_z, o_s, o_z, kernel, stride, padding, ceil_mode, count_include_pad)
    channels, area = style.tracer.channels, kernel[0] * kernel[1]
    weight = style.weight(torch.ones(channels, 1, *kernel, dtype=torch.int8), torch.full((channels,), 1.0 / area), 8)
    y = torch.ops.aten.convolution.default(
        style.dequantize(x, i_s, i_z), weight, torch.zeros(channels), stride, padding, [1, 1], False, [0, 0], channels
    )
    return style.quantize(y, o_s, o_z)


def _channels(node: fx.Node) -> int:
    value = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
    return int(value.shape[1]) if value is not None and value.dim() > 1 else 0


def trace(program: FrozenProgram, channel_last: bool) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The program as a module of float operators between quantize and dequantize, and example inputs for it.

    Args:
        channel_last: four-dimensional inputs become (N, H, W, C).
    """
    root, graph = nn.Module(), fx.Graph()
    tracer = _Tracer(graph, root)
    own: dict[str, Callable[..., Tensor]] = {"qreshape": _reshape, "qlut": _lut}
    style = _TracedStyle(integer_weights=False, rules=own, tracer=tracer)
    rules = qdq.rules(style)
    rules |= dict.fromkeys(DYNAMIC_OPS, partial(_float_linear, tracer))
    rules["qavg_pool2d"] = partial(_avg_pool, style, rules["qavg_pool2d"])
    names = {layer.node: layer.name for layer in program.layers}
    integers = {layer.node for layer in program.layers if layer.op not in DYNAMIC_OPS}
    values: dict[fx.Node, Any] = {}
    stopped: dict[fx.Node, Any] = {}
    samples: list[Tensor] = []

    def across(node: fx.Node) -> Any:
        """A value on the other side of the border between the integer and the float part, or between a layer of integer weights
        and float activations and anything else: the converter merges constants of neighbours there."""
        if node not in stopped:
            stopped[node] = tracer.barrier(values[node], node.name)
        return stopped[node]

    def real(node: fx.Node) -> Any:
        """What a float operator reads."""
        return across(node) if node.name in names else values[node]

    def integer(node: fx.Node) -> Any:
        """What a frozen layer reads."""
        return values[node] if node.name in integers or node.op != "call_function" else across(node)

    for node in program.module.graph.nodes:
        tracer.layer = names.get(node.name, f"~{node.name}")
        if node.op == "placeholder":
            sample = torch.zeros(node.meta["val"].shape, dtype=node.meta["val"].dtype)
            values[node] = tracer.create_proxy("placeholder", node.name, (), {})
            if channel_last and sample.dim() == 4:
                sample = sample.permute(0, 2, 3, 1).contiguous()
                values[node] = torch.ops.aten.permute.default(values[node], [0, 3, 1, 2])
            samples.append(sample)
        elif node.op == "get_attr":
            values[node] = _attribute(program.module, str(node.target))
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda n: tracer.create_arg(values[n])))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), integer if node.name in names else real)
            if node.name in names:
                tracer.channels = _channels(node)
                values[node] = rules[node.target._schema.name.split("::")[1]](*args, **kwargs)
            else:
                # an image may lie channel-last here, which a view cannot flatten
                target = torch.ops.aten.reshape.default if node.target is torch.ops.aten.view.default else node.target
                values[node] = tracer.create_proxy(node.op, target, args, kwargs)
    return fx.GraphModule(root, graph).eval(), tuple(samples)


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def convert(program: FrozenProgram, channel_last: bool) -> bytes:
    """The converter's .tflite bytes.

    Raises:
        UnsupportedError: the converter does not know an operator, or fails.
    """
    with quiet():
        try:
            import litert_torch
            from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
            from litert_torch.quantize.quant_config import QuantConfig
        except ImportError as error:
            raise missing_extra("litert-torch", "tflite") from error
        _register_pad()
        module, samples = trace(program, channel_last)
        # the quantizer itself never runs: this only switches the converter to integer kernels
        switch = QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)))
        shown, litert_torch.config.show_progress = litert_torch.config.show_progress, False
        try:
            content: bytes = litert_torch.convert(module, samples, quant_config=switch).model_content()
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
            raise UnsupportedError(
                f"{program.name} cannot become TFLite: the converter stopped with {reason[:300]!r}; "
                "replace that operator in the model or quantize the layer it belongs to"
            ) from error
        finally:
            litert_torch.config.show_progress = shown
    return content


def _pad_channel_last(x: Tensor, pad: list[int], value: float = 0) -> Tensor:
    """constant_pad_nd of an NHWC tensor with NCHW's pad list (last dimension first: W, H, C, N)."""
    full = [*pad, *[0] * (8 - len(pad))]
    padded: Tensor = torch.ops.aten.constant_pad_nd.default(x, [*full[4:6], *full[0:4], *full[6:8]], value)
    return padded


def _register_pad() -> None:
    """Teach the converter's layout pass to keep pads channel-last: it has no rule of its own (litert-torch 0.10).

    Without it every pad stands between two TRANSPOSEs and never merges into the convolution's SAME padding. The registry is not
    a public interface: where it has changed, the file still computes the same and its artefact counts the TRANSPOSEs.
    """
    with contextlib.suppress(ImportError, AttributeError, TypeError):
        from litert_torch._convert.fx_passes.optimize_layout_transposes_pass import layout_rewrite

        pad = torch.ops.aten.constant_pad_nd.default
        if not layout_rewrite.rewriters.get(pad):
            layout_rewrite.rewriters.register(pad)(lambda node: setattr(node, "target", _pad_channel_last))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines or C++ messages from third-party code inside the block (file descriptor 2 goes nowhere)."""
    level = logging.root.manager.disable
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            logging.disable(level)
