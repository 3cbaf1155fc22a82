"""1-bit layers in ExecuTorch: custom operators ``edgekit_kernels::*``, with kernels of a C library loaded into the runtime.

A ``.pte`` with them holds a weight in one bit, in the order that the kernels read (``firmware_sim/binary/binary.h``), made at
lowering. The kernels are compiled when such a file is first run, against the headers in executorch's wheel, and kept in the
cache; they do not come with any ExecuTorch runtime. Layers that follow each other hand on packed signs.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekit.errors import EdgekitError, MissingTool, missing_extra
from edgekit.firmware_sim import binary_library
from edgekit.firmware_sim.binary_library import BINARY
from edgekit.frozen.ops import OPS, activation_bounds

__all__ = [
    "KERNELS", "LIBRARY", "NAMESPACE", "RULES", "choose_variant", "installed_package", "kernel_library", "load_kernels",
    "needs_kernels", "pack", "package_version", "unpack", "variant",
]  # fmt: skip

NAMESPACE = "edgekit_kernels"
LIBRARY = "libedgekit_kernels.so"
"""File name of the kernels; the runner on a device looks for it beside the ``.pte``."""

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
_END = "Tensor weight_scale, Tensor bias, float out_scale, int out_zp, int low, int high"
KERNELS: Mapping[str, str] = {
    "binarize": "Tensor x, Tensor threshold, int dim",
    "binary_conv2d": f"Tensor x, Tensor weight, int channels, Tensor threshold, {_GEOMETRY}",
    "binary_qconv2d": f"Tensor x, Tensor weight, int channels, {_END}, {_GEOMETRY}",
    "binary_linear": "Tensor x, Tensor weight, int features, Tensor threshold",
    "binary_qlinear": f"Tensor x, Tensor weight, int features, {_END}",
    "binary_qmatmul": (
        "Tensor a, Tensor b, int features, bool a_unsigned, float scale, float out_scale, int out_zp, int low, int high"
    ),
}
"""Operator to its arguments, those of the frozen operator of that name but for the clamp in place of an activation."""

_library: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def _shape(name: str) -> Callable[..., Tensor]:
    """What comes out, of the frozen operator with the same leading arguments."""

    def fake(*args: Any) -> Tensor:
        op = getattr(OPS, name).default
        if name == "binary_qmatmul":
            return op(*args[:6], 0, 8)  # type: ignore[no-any-return]
        if name.startswith("binary_q"):
            return op(*args[:6], 0, "none", *args[9:], 8)  # type: ignore[no-any-return]
        return op(*args)  # type: ignore[no-any-return]

    return fake


for _name, _arguments in KERNELS.items():
    _library.define(f"{_name}({_arguments}) -> Tensor")
    _library.define(f"{_name}.out({_arguments}, *, Tensor(a!) out) -> Tensor(a!)")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _shape(_name), lib=_library)

_K: Any = getattr(torch.ops, NAMESPACE)


def pack(weight: Tensor, groups: int = 1) -> Tensor:
    """A weight's bytes in the kernels' order: blocks of 8 outputs, one 64-bit word of each in turn; same shape and size."""
    outputs = weight.shape[0] // groups
    rows = weight.reshape(groups, outputs, -1)
    full, words = outputs // 8 * 8, rows.shape[-1] // 8 * 8
    parts = [_blocks(rows[:, :full], 8, words)] if full else []
    parts += [_blocks(rows[:, full:], outputs - full, words)] if outputs > full else []
    return torch.cat(parts, 1).reshape(weight.shape)


def _blocks(rows: Tensor, outputs: int, words: int) -> Tensor:
    """(groups, n * outputs, bytes) to (groups, all bytes)."""
    groups, count = rows.shape[0], rows.shape[1] // outputs
    blocks = rows.reshape(groups, count, outputs, -1)
    heads = blocks[..., :words].reshape(groups, count, outputs, words // 8, 8).permute(0, 1, 3, 2, 4)
    return torch.cat([heads.reshape(groups, count, -1), blocks[..., words:].reshape(groups, count, -1)], 2).reshape(groups, -1)


def unpack(packed: np.ndarray, groups: int = 1) -> np.ndarray:
    """The inverse of :func:`pack`, for what was read from a file."""
    places = pack(torch.arange(packed.size).reshape(packed.shape), groups).numpy()
    weight = np.empty_like(packed)
    weight.reshape(-1)[places.reshape(-1)] = packed.reshape(-1)
    return weight


def _conv(
    x: Tensor, weight: Tensor, channels: int, threshold: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    return _K.binary_conv2d(x, pack(weight, groups), channels, threshold, stride, padding, dilation, groups)  # type: ignore[no-any-return]


def _qconv(
    x: Tensor, weight: Tensor, channels: int, weight_scale: Tensor, bias: Tensor, out_scale: float, out_zp: int,
    activation: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, out_bits: int,
) -> Tensor:  # fmt: skip
    clamp = activation_bounds(activation, out_scale, out_zp)
    end = (weight_scale, bias, out_scale, out_zp, *clamp)
    return _K.binary_qconv2d(x, pack(weight, groups), channels, *end, stride, padding, dilation, groups)  # type: ignore[no-any-return]


def _qlinear(
    x: Tensor, weight: Tensor, features: int, weight_scale: Tensor, bias: Tensor, out_scale: float, out_zp: int,
    activation: str, out_bits: int,
) -> Tensor:  # fmt: skip
    clamp = activation_bounds(activation, out_scale, out_zp)
    return _K.binary_qlinear(x, pack(weight), features, weight_scale, bias, out_scale, out_zp, *clamp)  # type: ignore[no-any-return]


RULES: Mapping[str, Callable[..., Tensor]] = {
    "binarize": lambda x, threshold, dim: _K.binarize(x, threshold, dim),
    "binary_conv2d": _conv,
    "binary_qconv2d": _qconv,
    "binary_linear": lambda x, weight, features, threshold: _K.binary_linear(x, pack(weight), features, threshold),
    "binary_qlinear": _qlinear,
    "binary_qmatmul": lambda a, b, features, a_unsigned, scale, out_scale, out_zp, out_bits: _K.binary_qmatmul(
        a, b, features, a_unsigned, scale, out_scale, out_zp, -128, 127
    ),
}
"""Rules of :class:`edgekit.targets.qdq.Style`: the frozen operator's arguments to the kernel's."""


def needs_kernels(program: bytes) -> bool:
    """Whether a ``.pte`` calls these kernels."""
    return f"{NAMESPACE}::".encode() in program


def kernel_library(machine: str | None = None, package: Path | None = None, python: tuple[int, int] | None = None) -> Path:
    """The kernels as a shared library for an ExecuTorch runtime, compiled if it is not in the cache.

    Args:
        machine: as ``platform.machine()`` says it; None: this one.
        package: folder of an executorch package of the runtime's version, for its headers; None: the one installed here.
        python: version of the Python there; None: of this one.

    Raises:
        MissingTool: no compiler, no executorch, or a wheel without headers.
        EdgekitError: it does not compile.
    """
    machine, python = machine or platform.machine(), python or sys.version_info[:2]
    headers = (package or installed_package()) / "include"
    if not (headers / "executorch").is_dir():
        raise MissingTool(f"{headers}: this executorch has no headers to compile 1-bit kernels against; install executorch 1.4.1")
    types = headers / "executorch" / "runtime" / "core" / "portable_type" / "c10"
    flags = ["-std=c++20", "-DC10_USING_CUSTOM_GENERATED_MACROS", "-isystem", str(headers), "-isystem", str(types)]
    host = f"_portable_lib.cpython-{python[0]}{python[1]}-{machine}-linux-gnu.so"
    source, version = BINARY / "executorch.cpp", package_version(headers.parent)
    return binary_library.library(LIBRARY.removesuffix(".so"), machine, [source], flags, host, version)


def package_version(package: Path) -> str:
    """Version of an executorch package, "" if there is none."""
    found = sorted(package.parent.glob("executorch-*.dist-info"))
    return found[0].name.removeprefix("executorch-").removesuffix(".dist-info") if found else ""


def installed_package() -> Path:
    """Folder of the executorch that is installed here.

    Raises:
        MissingTool: there is none.
    """
    spec = importlib.util.find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        raise missing_extra("executorch", "executorch")
    return Path(next(iter(spec.submodule_search_locations)))


def load_kernels() -> None:
    """Give the kernels to the ExecuTorch runtime of this process; nothing if it has them.

    Raises:
        MissingTool: no compiler, or no executorch.
        EdgekitError: they cannot be compiled or loaded.
    """
    from executorch.extension.pybindings import portable_lib  # the runtime has to be there before its kernels

    # a second copy, from another path, would register them again and end the process
    if not any(name.startswith(f"{NAMESPACE}::") for name in portable_lib._get_operator_names()):
        _loaded()


@cache
def _loaded() -> ctypes.CDLL:
    path = kernel_library()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise EdgekitError(
            f"{path}: the 1-bit kernels cannot be loaded ({error}); delete the file, it will be made again"
        ) from error


def variant() -> str:
    """Name of the kernels' variant that this process uses; they are loaded if need be."""
    load_kernels()
    name = _loaded().edgekit_binary_isa
    name.restype = ctypes.c_char_p
    return str(name().decode())


def choose_variant(name: str | None) -> bool:
    """Use another variant from now on (None: the best); False if the processor does not have it."""
    load_kernels()
    return int(_loaded().edgekit_binary_choose_isa(None if name is None else name.encode())) == 0
