"""ATen operators that each target's converter takes in float: a table, measured by converting, running and comparing each one.

Names are without namespace and overload; composite operators of ``torch.export`` (linear, layer_norm, gelu, ...) and the core
operators that they decompose to are both listed, since a captured model has the former and a frozen program may have the latter.
"""

from __future__ import annotations

__all__ = ["ACCEPTED", "REMEDIES"]

_ALL = ("executorch", "tflite", "onnx")

_COMPOSITE = """
__and__ abs adaptive_avg_pool1d adaptive_avg_pool2d add addcdiv addcmul addmm all amax amin any arange argmax argmin asin atan
atan2 avg_pool1d avg_pool2d baddbmm batch_norm bmm cat ceil celu channel_shuffle chunk clamp clamp_max clamp_min clone contiguous
conv1d conv2d conv3d conv_transpose2d cos cosine_similarity cumsum detach detach_ diagonal div dot dropout einsum elu embedding eq
erf exp expand expand_as expm1 feature_dropout flatten flip floor fmod full full_like gather ge gelu glu group_norm gru gt
hardshrink hardsigmoid hardswish hardtanh im2col index index_select instance_norm layer_norm le leaky_relu lerp lift_fresh_copy
linalg_vector_norm linear log log1p log2 log_sigmoid log_softmax logical_and logical_not logical_or logsumexp lstm lt masked_fill
matmul max max_pool1d max_pool2d maximum mean min minimum mish mm movedim mul narrow ne neg new_zeros numpy_T ones ones_like outer
pad permute pixel_shuffle pixel_unshuffle pow prelu prod reciprocal relu relu6 remainder repeat repeat_interleave reshape rms_norm
roll rot90 round rsqrt rsub scaled_dot_product_attention scatter select selu sigmoid sign silu sin sinh slice softmax softplus
split split_with_sizes sqrt square squeeze stack std sub sum swapaxes t tan tanh threshold tile to transpose tril triu unbind
unflatten unfold unsqueeze upsample_bilinear2d upsample_nearest2d var view where zeros zeros_like
"""

_CORE = """
_adaptive_avg_pool2d _log_softmax _native_batch_norm_legit_no_training _softmax _to_copy _unsafe_view alias bitwise_and
bitwise_not bitwise_or constant_pad_nd convolution copy fill max_pool2d_with_indices native_group_norm native_layer_norm
scalar_tensor
"""

_EXCEPT: dict[str, tuple[str, ...]] = {
    "adaptive_max_pool2d": ("onnx",),
    "logcumsumexp": ("onnx",),
    "sort": ("onnx",),
    "topk": ("executorch", "onnx"),
}

ACCEPTED: dict[str, tuple[str, ...]] = {**dict.fromkeys((*_COMPOSITE.split(), *_CORE.split()), _ALL), **_EXCEPT}
"""ATen operator to the targets that take it. cumprod, median, svd, fft and what else is not here, none takes."""

REMEDIES: dict[str, str] = {
    "adaptive_max_pool2d": "use max_pool2d with the kernel written out",
    "cumprod": "write it as exp(cumsum(log(x)))",
    "logcumsumexp": "write it as log(cumsum(exp(x)))",
}
"""What to write instead of an operator that a target does not take."""
