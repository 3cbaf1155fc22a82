"""ExecuTorch: a frozen program becomes a ``.pte`` file for XNNPACK (or for portable kernels), and is read back, run and tapped.

Lowering never computes a scale: the program's integers go into a quantize/dequantize graph (:mod:`edgekit.targets.qdq`) in the
forms that XNNPACK takes (:mod:`edgekit.targets.executorch_rules`). What the file then holds is read from its bytes
(:mod:`edgekit.targets.pte_file`) and held against the program layer by layer (:mod:`edgekit.targets.pte_compare`).

Limits: activations of 8 bits; 4-bit weights are packed for linear layers only, 4-bit and 2-bit convolutions are stored as int8;
with ``backend="portable"`` weights are stored as int8 and every layer computes in float.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from edgekit.artifact import Artifact, Mismatch, TapFile, TensorSpec
from edgekit.errors import FormatError, InputError, ParityError, UnsupportedError, missing_extra
from edgekit.files import write_whole
from edgekit.frozen import FrozenProgram
from edgekit.frozen.dynamic_ops import DYNAMIC_OPS
from edgekit.targets import preflight, spiking
from edgekit.targets.executorch_binary import load_kernels, needs_kernels
from edgekit.targets.executorch_rules import ATEN_RULES, portable_style, xnnpack_style
from edgekit.targets.pte_compare import compare, coverage, float_constants, io_quantization
from edgekit.targets.pte_file import AGAIN, PteFile, read_pte
from edgekit.targets.pte_layers import Placement, place
from edgekit.targets.pte_taps import choose, spike_taps, tapped
from edgekit.targets.qdq import to_qdq
from edgekit.targets.silu_gate import is_gated

__all__ = [
    "EXTRA", "SUFFIX", "Options", "available", "decode", "encode", "inspect", "lower", "readback", "run", "tap_file", "taps",
]  # fmt: skip

SUFFIX = ".pte"
EXTRA = "executorch"

Backend = Literal["xnnpack", "portable"]


@dataclass(frozen=True)
class Options:
    """How to lower.

    Attributes:
        backend: "xnnpack" (optimized integer kernels) or "portable" (ExecuTorch's reference kernels, slow, everywhere).
    """

    backend: Backend = "xnnpack"

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            raise InputError(f"executorch backend {self.backend!r}: choose one of: {', '.join(get_args(Backend))}")


def available() -> str | None:
    """None if files can be made and run here, else what is missing."""
    if importlib.util.find_spec("executorch") is None:
        return "executorch is not installed; run: pip install 'edgekit[executorch]'"
    return None


def lower(program: FrozenProgram, path: Path, options: Options | None = None) -> Artifact:
    """Write ``path`` and prove from its bytes that it holds the program's integers.

    Raises:
        UnsupportedError: a layer cannot be lowered; named before or by the converter.
        ParityError: the file does not hold what the program says.
        MissingTool: executorch is not installed.
    """
    _require()
    options = options or Options()
    preflight.check_program(program, "executorch")
    made = spiking.plain(program, True)
    write_whole(path, _convert(made, options))
    file = read_pte(path)
    placement = place(file, made)
    if mismatches := spiking.renamed(compare(file, made, placement), program, True):
        more = f" (and {len(mismatches) - 1} more)" if len(mismatches) > 1 else ""
        raise ParityError(f"{path}: {mismatches[0]}{more}")
    return _artifact(path, file, program, placement)


def inspect(path: Path, program: FrozenProgram) -> Artifact:
    """Facts read from the file: interfaces, how each layer runs and is stored, planned memory.

    Raises:
        FormatError: the file is damaged or not an ExecuTorch program.
    """
    file = read_pte(path)
    return _artifact(path, file, program, place(file, spiking.plain(program, True)))


def readback(path: Path, program: FrozenProgram) -> list[Mismatch]:
    """Every integer weight, scale, zero point, bias and geometry of the file that differs from the program; empty if none.

    Raises:
        FormatError: the file is damaged or not an ExecuTorch program.
    """
    file, made = read_pte(path), spiking.plain(program, True)
    return spiking.renamed(compare(file, made, place(file, made)), program, True)


def run(
    path: Path, inputs: Sequence[np.ndarray], threads: int = 1, progress: Callable[[int, int], None] | None = None
) -> list[np.ndarray]:
    """Run the file on the host, one sample at a time.

    Args:
        inputs: for each program input an array (N, ...), float; quantized here where the file takes integers.
        threads: of XNNPACK's pool.
        progress: called with (samples done, N).

    Returns:
        For each output a float32 array (N, ...).

    Raises:
        FormatError: the runtime refuses the file.
        InputError: an input's number or shape does not fit the file.
    """
    outputs = _execute(Path(path).read_bytes(), str(path), encode(path, inputs), threads, progress)
    return decode(path, outputs)


def encode(path: Path, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Float inputs (N, ...) as the file takes them: its types, quantized where it takes integers.

    Raises:
        InputError: an input's number or shape does not fit the file.
    """
    file = read_pte(path)
    quantization = io_quantization(file)
    return [_encode(path, file, n, x, quantization) for n, x in zip(file.inputs, _counted(path, file, inputs), strict=True)]


def decode(path: Path, outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The file's outputs (N, ...) as float32."""
    file = read_pte(path)
    quantization = io_quantization(file)
    return [_decode(y, quantization.get(n)) for n, y in zip(file.outputs, outputs, strict=True)]


def taps(path: Path, program: FrozenProgram, sample: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Each layer's int8 output as this file computes it, in the program's layout (batch of one), by layer name.

    The file itself is run, with the tensors in question made outputs of a copy of it in memory; so an altered weight, scale or
    zero point in the file shows. Layers whose output never exists as int8 are left out.
    """
    tapping = tap_file(path, program)
    assert tapping.data is not None
    return tapping.layers(_execute(tapping.data, str(path), [x[:1] for x in encode(path, sample)], 1, None))


def tap_file(path: Path, program: FrozenProgram) -> TapFile:
    """What :func:`taps` runs, for any runtime of these files."""
    _require()
    file = read_pte(path)
    with _quiet():
        made = spiking.plain(program, True)
        taps = (*choose(file, place(file, made)), *spike_taps(file, program))
        copy, extra = tapped(file, taps), taps

    def layers(outputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        pairs = zip(extra, outputs[len(file.outputs) :], strict=True)
        return {tap.layer: np.ascontiguousarray(value.transpose(tap.order)).reshape(tap.shape) for tap, value in pairs}

    return TapFile(copy, (), layers)


def _require() -> None:
    if available() is not None:
        raise missing_extra("executorch", EXTRA)


def _convert(program: FrozenProgram, options: Options) -> bytes:
    with _quiet():
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

        if options.backend == "portable":
            import executorch.kernels.quantized  # noqa: F401  quantize and dequantize kernels

            style, partitioners, rules = portable_style(), [], None
        else:
            functions = _of_integers(program)
            gated = _gated(program) if "sigmoid" in functions else set()
            style, partitioners, rules = xnnpack_style(gated), [_xnnpack_partitioner(functions)], ATEN_RULES
        try:
            # a linear layer of rank three would be expanded into bmm and an add
            dynamic = any(layer.op in DYNAMIC_OPS for layer in program.layers)  # rows' scales are no core ATen
            config = EdgeCompileConfig(preserve_ops=[torch.ops.aten.linear.default], _check_ir_validity=not dynamic)
            edge = to_edge_transform_and_lower(to_qdq(program, style, rules), partitioner=partitioners, compile_config=config)
            return bytes(edge.to_executorch(ExecutorchBackendConfig()).buffer)
        except Exception as error:
            cause = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UnsupportedError(
                f"program {program.name}: ExecuTorch's converter refuses it ({cause[:300]}); keep the operator out of "
                "the model or use another target"
            ) from error


def _gated(program: FrozenProgram) -> set[tuple[float, int, float, int]]:
    """Scales and zero points, in and out, of the program's SiLUs that become a sigmoid and a product."""
    gated = [layer.args for layer in program.layers if is_gated(layer)]
    return {(a["in_scale"], a["in_zp"], a["out_scale"], a["out_zp"]) for a in gated}


_OF_INTEGERS = {"gelu": "GeluConfig", "hardswish": "HardswishConfig", "sigmoid": "SigmoidConfig", "tanh": "TanhConfig"}
"""Functions that XNNPACK looks up in int8; its partitioner leaves them in float. Its int8 LeakyReLU is a step off: not here."""


def _of_integers(program: FrozenProgram) -> set[str]:
    """Those of :data:`_OF_INTEGERS` that the program has in integers only: one in float between integers would become one too."""
    floats: set[str] = set()
    for node in program.module.graph.nodes:
        ends = [str(n.target) for n in (*node.all_input_nodes, *node.users)]
        if node.op == "call_function" and any(end.startswith(("edgekit.dequantize", "edgekit.quantize")) for end in ends):
            floats.add(str(node.target).split(".")[1])
    return {*_OF_INTEGERS} - floats


def _xnnpack_partitioner(functions: Collection[str] = ()) -> Any:
    """XNNPACK's partitioner, which by itself pads integers in float and computes ``functions`` so; its runtime has int8 forms."""
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    widened = {"ConstantPadConfig", *(_OF_INTEGERS[name] for name in functions)}

    def types(self: Any) -> list[Any]:
        return [ConfigPrecisionType.FP32, ConfigPrecisionType.STATIC_QUANT]

    def config(kind: Any) -> Any:
        name = kind.__name__
        return type(name, (kind,), {"supported_precision_types": types}) if name in widened else kind

    return XnnpackPartitioner(configs=[config(kind) for kind in ALL_PARTITIONER_CONFIGS])


def _artifact(path: Path, file: PteFile, original: FrozenProgram, placement: Placement) -> Artifact:
    program = spiking.plain(original, True)
    rows = spiking.gathered(coverage(file, program, placement), original, True)
    quantization = io_quantization(file)

    def specs(kind: str, numbers: Sequence[int]) -> tuple[TensorSpec, ...]:
        found = []
        for i, n in enumerate(numbers):
            scale, zero_point = quantization.get(n, (None, None))
            found.append(TensorSpec(f"{kind}_{i}", file.tensors[n].shape, file.tensors[n].dtype, scale, zero_point))
        return tuple(found)

    notes = (*(f"{r.layer}: {r.note}" for r in rows if r.note), *float_constants(file, program)[1])
    memory = {"arena_bytes": sum(file.arena), "note": "planned by ExecuTorch; XNNPACK's own workspace comes on top"}
    return Artifact(
        Path(path), "executorch", specs("input", file.inputs), specs("output", file.outputs), rows, file.size, notes, memory
    )


def _counted(path: Path, file: PteFile, inputs: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    if len(inputs) != len(file.inputs):
        raise InputError(f"{path}: {len(inputs)} inputs given, it takes {len(file.inputs)}")
    return inputs


def _encode(path: Path, file: PteFile, number: int, x: np.ndarray, quantization: dict[int, tuple[float, int]]) -> np.ndarray:
    tensor = file.tensors[number]
    x = np.asarray(x)
    if x.shape[1:] != tensor.shape[1:] or not len(x):
        wanted = ", ".join(map(str, ("N >= 1", *tensor.shape[1:])))
        raise InputError(f"{path}, input {file.inputs.index(number)}: shape {x.shape} given, ({wanted}) expected")
    if tensor.dtype == "int8" and number in quantization and x.dtype.kind == "f":
        scale, zero_point = quantization[number]
        x = np.clip(np.round(x / np.float32(scale)) + zero_point, -128, 127)
    return np.ascontiguousarray(x.astype(tensor.dtype))


def _decode(y: np.ndarray, quantization: tuple[float, int] | None) -> np.ndarray:
    if quantization is not None and y.dtype == np.int8:
        return ((y.astype(np.float32) - quantization[1]) * np.float32(quantization[0])).astype(np.float32)
    return y.astype(np.float32)


def _execute(
    program: bytes, where: str, arrays: Sequence[np.ndarray], threads: int, progress: Callable[[int, int], None] | None
) -> list[np.ndarray]:
    _require()
    inputs = [torch.from_numpy(x) for x in arrays]
    with _quiet(), _silent_stderr():
        import executorch.kernels.quantized  # noqa: F401  kernels of what is not delegated
        from executorch.extension.pybindings import portable_lib

        if needs_kernels(program):
            load_kernels()

        try:
            module = portable_lib._load_for_executorch_from_buffer(program)
            if hasattr(portable_lib, "_unsafe_reset_threadpool"):
                portable_lib._unsafe_reset_threadpool(threads)
            # the delegates are only set up at the first call, and what is wrong with the file shows there
            module.forward([x[:1] for x in inputs])
        except RuntimeError as error:
            raise FormatError(f"{where}: the ExecuTorch runtime refuses it ({str(error).splitlines()[0]}); {AGAIN}") from error
    columns: list[list[np.ndarray]] = []
    for i in range(len(inputs[0])):
        columns.append([y.numpy().copy() for y in module.forward([x[i : i + 1] for x in inputs])])
        if progress:
            progress(i + 1, len(inputs[0]))
    return [np.stack(c) if columns[0][j].ndim == 0 else np.concatenate(c) for j, c in enumerate(zip(*columns, strict=True))]


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings or log lines of the converter: what matters of them is read from the file."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The runtime's C++ code writes about CPU features to file descriptor 2 when it starts."""
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)
