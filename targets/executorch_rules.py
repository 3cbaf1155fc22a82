"""How ExecuTorch wants a frozen program: forms that XNNPACK runs as integers in one piece, each with exactly the same values.

Each rule was chosen because the plain form splits the graph or falls back to a kernel outside the delegate:

* an activation after add or mul gets a quantize of its own before it (the clamp of an integer, so still one rounding);
* SiLU becomes a sigmoid and a product of integers where that is within one step of the table, which is faster than floats;
* an average pool with padding becomes pad and pool (XNNPACK never counts padding), concatenation first brings its inputs to
  the output's scale (XNNPACK demands equal ones);
* a strided slice of an image becomes a 1x1 depthwise convolution with weights and scales of one, which is exact:
  ``round(1.0 * (q - z)) + z == q``. XNNPACK's own slice takes no step. Others are reshaped until a plain slice is left;
* float LayerNorm, RMSNorm, matmul, attention and means are written with ``mm``/``bmm``, which XNNPACK takes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekit.frozen.ops import LUT_FUNCTIONS
from edgekit.targets.executorch_binary import RULES as BINARY_RULES
from edgekit.targets.qdq import Style
from edgekit.targets.silu_gate import GATE

__all__ = ["ATEN_RULES", "portable_style", "xnnpack_style"]

_ATEN: Any = torch.ops.aten
_Q: Any = torch.ops.quantized_decomposed
_LARGEST_CONCAT = 5


def portable_style() -> Style:
    """Portable kernels: int8 weights are stored, and every layer computes in float."""
    return Style(integer_weights=True, rules=BINARY_RULES)


def xnnpack_style(gated: Collection[tuple[float, int, float, int]] = ()) -> Style:
    """Rules for XNNPACK. SiLUs of the given scales and zero points (in and out) are :mod:`edgekit.targets.silu_gate`'s.

    Linear weights of four bits or fewer are declared -8..7, which makes it store them as nibbles. Not with an odd number of
    inputs: XNNPACK then reads each row of nibbles half a byte off.
    """
    plain, packed = Style(), Style(weight_range=lambda bits, rank: (-8, 7))
    dq, q = plain.dequantize, plain.quantize

    def linear(
        x: Tensor, w: Tensor, ws: Tensor, b: Tensor, i_s: float, i_z: int, o_s: float, o_z: int, activation: str,
        weight_bits: int, out_bits: int,
    ) -> Tensor:  # fmt: skip
        style = packed if weight_bits <= 4 and w.shape[1] % 2 == 0 else plain
        y = _ATEN.linear.default(dq(x, i_s, i_z), style.weight(w, ws, weight_bits), b.float() * (ws * i_s))
        if activation == "relu":
            y = _ATEN.relu.default(y)
        return q(_ATEN.hardtanh.default(y, 0.0, 6.0) if activation == "relu6" else y, o_s, o_z)

    def lut(x: Tensor, table: Tensor, function: str, i_s: float, i_z: int, o_s: float, o_z: int) -> Tensor:
        if function == "silu" and (i_s, i_z, o_s, o_z) in gated:
            gate = dq(q(_ATEN.sigmoid.default(dq(x, i_s, i_z)), *GATE), *GATE)
            return q(_ATEN.mul.Tensor(dq(x, i_s, i_z), gate), o_s, o_z)
        return q(_FUNCTIONS.get(function, LUT_FUNCTIONS[function])(dq(x, i_s, i_z)), o_s, o_z)

    def again(x: Tensor, op: Callable[..., Tensor], scale: float, zero_point: int, *args: Any) -> Tensor:
        """An operator that moves integers without changing them: same scale in and out."""
        return q(op(dq(x, scale, zero_point), *args), scale, zero_point)

    def activate(x: Tensor, activation: str, scale: float, zero_point: int) -> Tensor:
        if activation == "relu6":
            return again(x, _ATEN.hardtanh.default, scale, zero_point, 0.0, 6.0)
        return again(x, _ATEN.relu.default, scale, zero_point) if activation == "relu" else x

    def add(
        a: Tensor, b: Tensor, a_s: float, a_z: int, b_s: float, b_z: int, o_s: float, o_z: int, activation: str, out_bits: int
    ) -> Tensor:
        y = _ATEN.add.Tensor(dq(a, a_s, a_z), dq(b, b_s, b_z))
        if activation == "relu":  # the one pair that XNNPACK fuses
            return q(_ATEN.relu.default(y), o_s, o_z)
        return activate(q(y, o_s, o_z), activation, o_s, o_z)

    def mul(
        a: Tensor, b: Tensor, a_s: float, a_z: int, b_s: float, b_z: int, o_s: float, o_z: int, activation: str, out_bits: int
    ) -> Tensor:
        return activate(q(_ATEN.mul.Tensor(dq(a, a_s, a_z), dq(b, b_s, b_z)), o_s, o_z), activation, o_s, o_z)

    def avg_pool(
        x: Tensor, i_s: float, i_z: int, o_s: float, o_z: int, kernel: Sequence[int], stride: Sequence[int],
        padding: Sequence[int], ceil_mode: bool, count_include_pad: bool,
    ) -> Tensor:  # fmt: skip
        spans = [n + 2 * p - k for n, p, k in zip(x.shape[2:], padding, kernel, strict=True)]
        ceil_mode = ceil_mode and any(s % t for s, t in zip(spans, stride, strict=True))
        if count_include_pad and any(padding):
            x = again(x, _ATEN.constant_pad_nd.default, i_s, i_z, [padding[1]] * 2 + [padding[0]] * 2, 0.0)
            padding = [0, 0]
        return q(_ATEN.avg_pool2d.default(dq(x, i_s, i_z), kernel, stride, padding, ceil_mode, False), o_s, o_z)

    def concat(xs: Sequence[Tensor], scales: Sequence[float], zps: Sequence[int], o_s: float, o_z: int, dim: int) -> Tensor:
        parts = [x if (s, z) == (o_s, o_z) else q(dq(x, s, z), o_s, o_z) for x, s, z in zip(xs, scales, zps, strict=True)]
        while len(parts) > 1:
            joined = [dq(p, o_s, o_z) for p in parts[:_LARGEST_CONCAT]]
            parts = [q(_ATEN.cat.default(joined, dim), o_s, o_z), *parts[_LARGEST_CONCAT:]]
        return parts[0]

    def slice_(x: Tensor, dim: int, start: int, end: int, step: int, s: float, z: int) -> Tensor:
        dim, size = dim % x.dim(), x.shape[dim % x.dim()]
        start, end, _ = slice(start, end).indices(size)
        if (start, end) != (0, size):
            x = again(x, _ATEN.slice.Tensor, s, z, dim, start, end, 1)
        if step == 1:
            return x
        if x.dim() == 4 and dim >= 2:
            return strided(x, dim, step, s, z)
        count = -(-x.shape[dim] // step)
        if fill := count * step - x.shape[dim]:
            x = again(x, _ATEN.constant_pad_nd.default, s, z, [0, 0] * (x.dim() - 1 - dim) + [0, fill], 0.0)
        before, after = list(x.shape[:dim]), list(x.shape[dim + 1 :])
        x = again(x, _ATEN.view.default, s, z, [*before, count, step, *after])
        x = again(x, _ATEN.slice.Tensor, s, z, dim + 1, 0, 1, 1)
        return again(x, _ATEN.view.default, s, z, [*before, count, *after])

    def strided(x: Tensor, dim: int, step: int, s: float, z: int) -> Tensor:
        channels = x.shape[1]
        one = plain.weight(torch.ones(channels, 1, 1, 1, dtype=torch.int8), torch.ones(channels), 8)
        stride = [step if dim == 2 else 1, step if dim == 3 else 1]
        y = _ATEN.convolution.default(dq(x, s, z), one, None, stride, [0, 0], [1, 1], False, [0, 0], channels)
        return q(y, s, z)

    def dynamic(x: Tensor, w: Tensor, ws: Tensor, b: Tensor, group_size: int, weight_bits: int) -> Tensor:
        """The rows' own scales are computed in the graph; a convert of the delegate takes the pattern."""
        scale, zero = _Q.choose_qparams_per_token_asymmetric(x, torch.int8)
        q8 = _Q.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
        real = _Q.dequantize_per_token(q8, scale, zero, -128, 127, torch.int8, torch.float32)
        if group_size:
            none = torch.zeros(ws.shape, dtype=torch.int32)
            wide = _Q.dequantize_per_channel_group(w, ws, none, -8, 7, torch.int8, group_size, torch.float32)
        else:
            wide = (packed if weight_bits <= 4 and w.shape[1] % 2 == 0 else plain).weight(w, ws, weight_bits)
        y: Tensor = _ATEN.linear.default(real, wide, b)
        return y

    rules: dict[str, Callable[..., Tensor]] = {
        "dynamic_qlinear": dynamic,
        "qlinear": linear, "qlut": lut, "qadd": add, "qmul": mul, "qavg_pool2d": avg_pool, "qconcat": concat, "qslice": slice_,
        **BINARY_RULES,
    }  # fmt: skip
    return Style(rules=rules)


def _hardsigmoid(x: Tensor) -> Any:
    return _ATEN.hardtanh.default(_ATEN.add.Tensor(_ATEN.mul.Tensor(x, 1.0 / 6.0), 0.5), 0.0, 1.0)


def _elu(x: Tensor) -> Any:
    negative = _ATEN.mul.Tensor(_ATEN.relu.default(_ATEN.mul.Tensor(x, -1.0)), -1.0)
    return _ATEN.add.Tensor(_ATEN.relu.default(x), _ATEN.sub.Tensor(_ATEN.exp.default(negative), 1.0))


_FUNCTIONS: Mapping[str, Callable[[Tensor], Any]] = {"hardsigmoid": _hardsigmoid, "elu": _elu}
"""Table functions whose plain form XNNPACK does not take."""


def _mean_last(x: Tensor) -> Any:
    """Mean over the last dimension, kept, as a matrix product: shape (..., d) to (..., 1)."""
    d = x.shape[-1]
    flat = _ATEN.view.default(x, [-1, d])
    return _ATEN.view.default(_ATEN.mm.default(flat, torch.full((d, 1), 1.0 / d)), [*x.shape[:-1], 1])


def _mean(x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    dims = sorted(d % x.dim() for d in dim) if dim else list(range(x.dim()))
    if x.dim() == 4 and dims == [2, 3] and dtype in (None, x.dtype):
        if keepdim:
            return NotImplemented  # already the form that XNNPACK takes
        y = _ATEN.mean.dim(x, [-1, -2], True)
        return _ATEN.view.default(y, list(x.shape[:2]))
    if len(dims) != 1 or dtype not in (None, x.dtype):
        return NotImplemented
    order = [d for d in range(x.dim()) if d != dims[0]] + dims
    moved = x if order == sorted(order) else _ATEN.permute.default(x, order)
    kept = [1 if d == dims[0] else n for d, n in enumerate(x.shape)]
    return _ATEN.view.default(_mean_last(moved), kept if keepdim else [n for d, n in enumerate(x.shape) if d != dims[0]])


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> Any:
    if len(shape) != 1:
        return NotImplemented
    centred = _ATEN.sub.Tensor(x, _mean_last(x))
    spread = _mean_last(_ATEN.mul.Tensor(centred, centred))
    y = _ATEN.mul.Tensor(centred, _ATEN.rsqrt.default(_ATEN.add.Tensor(spread, eps)))
    y = y if weight is None else _ATEN.mul.Tensor(y, weight)
    return y if bias is None else _ATEN.add.Tensor(y, bias)


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Any:
    if len(shape) != 1:
        return NotImplemented
    spread = _mean_last(_ATEN.mul.Tensor(x, x))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = _ATEN.mul.Tensor(x, _ATEN.rsqrt.default(_ATEN.add.Tensor(spread, eps)))
    return y if weight is None else _ATEN.mul.Tensor(y, weight)


def _matmul(a: Tensor, b: Tensor) -> Any:
    if a.dim() < 2 or b.dim() < 2 or (a.dim() == b.dim() == 2):
        return _ATEN.mm.default(a, b) if a.dim() == b.dim() == 2 else NotImplemented
    if b.dim() == 2:
        flat = _ATEN.mm.default(_ATEN.reshape.default(a, [-1, a.shape[-1]]), b)
        return _ATEN.reshape.default(flat, [*a.shape[:-1], b.shape[-1]])
    batch = torch.Size(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
    full = (t if t.shape[:-2] == batch else _ATEN.expand.default(t, [*batch, *t.shape[-2:]]) for t in (a, b))
    flat_a, flat_b = (_ATEN.reshape.default(t, [-1, *t.shape[-2:]]) for t in full)
    return _ATEN.reshape.default(_ATEN.bmm.default(flat_a, flat_b), [*batch, a.shape[-2], b.shape[-1]])


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if enable_gqa or dropout:
        return NotImplemented
    scores = _matmul(query, _ATEN.transpose.int(key, -2, -1))
    scores = _ATEN.mul.Tensor(scores, query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    if mask is not None:
        # a finite floor: XNNPACK's softmax of -inf rows is not defined, and exp(-1e9) is zero all the same
        mask = torch.where(mask, 0.0, -1e9) if mask.dtype == torch.bool else mask
        scores = _ATEN.add.Tensor(scores, mask)
    return _matmul(torch.softmax(scores, -1), value)


ATEN_RULES: Mapping[Any, Callable[..., Any]] = {
    _ATEN.layer_norm.default: _layer_norm,
    _ATEN.rms_norm.default: _rms_norm,
    _ATEN.matmul.default: _matmul,
    _ATEN.mean.dim: _mean,
    _ATEN.scaled_dot_product_attention.default: _attention,
}
"""Float ATen operators in the forms that XNNPACK takes; used as decompositions, so each gives the same values up to rounding."""
