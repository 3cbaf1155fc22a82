"""TFLite: a frozen program as a full-integer .tflite file, its facts read back, and its runs on LiteRT.

Converted by litert-torch, run by ai-edge-litert with XNNPACK, which requantizes in float with one rounding as the frozen program
does; LiteRT's builtin kernels (packed INT4 convolutions) round twice and may differ by 1 in the last place, layer by layer.

    >>> artifact = lower(program, Path("model.tflite"), Options(io="float"))
    >>> run(artifact.path, [images])[0].shape
    (8, 10)

Activations of 16 bits run on LiteRT's 16x8 kernels (:mod:`edgekit.targets.tflite_wide`), which keep 15 bits of a multiplier: up
to 1 step of 65536 from the program, layer by layer.

Limits: batch of one; weights of 4 bits packed for convolutions and linear layers, of 2 bits for linear layers, else stored as
int8 (the artefact's coverage says which).
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.artifact import Artifact, Mismatch, TapFile
from edgekit.errors import FormatError, InputError, ParityError, UnsupportedError, missing_extra
from edgekit.files import write_whole
from edgekit.frozen import FrozenProgram, Layer
from edgekit.frozen.dynamic_ops import DYNAMIC_OPS
from edgekit.targets import preflight, spiking
from edgekit.targets import tflite_facts as facts
from edgekit.targets.binary_int8 import packed
from edgekit.targets.host_form import host_form, renamed, rows
from edgekit.targets.tflite_convert import convert, quiet
from edgekit.targets.tflite_file import AGAIN, Tensor, TfliteFile, parse, read, serialize
from edgekit.targets.tflite_finish import finish
from edgekit.targets.tflite_wide import is_wide, twin, widen

__all__ = [
    "EXTRA", "SUFFIX", "Options", "available", "decode", "encode", "inspect", "lower", "readback", "run", "tap_file", "taps",
]  # fmt: skip

_RANGES = {"INT8": (-128, 127), "INT16": (-32768, 32767)}
"""Integer activations."""

SUFFIX = ".tflite"
EXTRA = "tflite"


@dataclass(frozen=True)
class Options:
    """How the file is made.

    Attributes:
        io: "int8": inputs and outputs are the program's integers (int16 where it has 16 bits); "float": the file quantizes and
            dequantizes itself.
        channel_last: image inputs are (1, H, W, C), which saves a transpose; else (1, C, H, W) as in the program.
        pack: store 4 and 2 bit weights packed where the runtime takes it; packed convolutions are smaller and slower.
    """

    io: Literal["int8", "float"] = "int8"
    channel_last: bool = True
    pack: bool = True

    def __post_init__(self) -> None:
        if self.io not in ("int8", "float"):
            raise InputError(f"tflite io {self.io!r}: expected int8 or float")


def available() -> str | None:
    """None if programs can be lowered and run here, else what is missing."""
    missing = [name for name in ("litert_torch", "ai_edge_litert") if importlib.util.find_spec(name) is None]
    return None if not missing else f"{' and '.join(missing).replace('_', '-')} not installed: pip install 'edgekit[{EXTRA}]'"


def lower(program: FrozenProgram, path: Path, options: Options | None = None) -> Artifact:
    """Convert, finish, write, and read back; nothing is written unless every stored number is the program's.

    Raises:
        UnsupportedError: a layer that TFLite or its converter cannot take.
        ParityError: the converter made something else of a layer; the message names it.
    """
    options = options or Options()
    _refuse(program)
    preflight.check_program(program, "tflite")
    original, program = program, host_form(program)
    wide = is_wide(program)
    made = twin(program) if wide else program
    content = convert(made, options.channel_last)
    content = finish(
        content, made, channel_last=options.channel_last, float_io=options.io == "float", packed=options.pack and not wide
    )
    content = widen(content, program.name) if wide else content
    file = parse(content, Path(path).name)
    wrong = facts.compare(file, program)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ParityError(f"the TFLite converter changed the program: {renamed(original, wrong)[0]}{more}")
    write_whole(path, content)
    return _artifact(Path(path), parse(Path(path).read_bytes(), Path(path).name), original)


def _refuse(program: FrozenProgram) -> None:
    """What would fail unclearly in the converter."""
    wide = is_wide(program)
    for layer in program.layers:
        if wide and (layer.out_zero_point or {layer.args[k] for k in ("out_bits", "bits") if k in layer.args} - {16}):
            what = "does not have 16 bits with zero point 0 as other layers have"
            raise _unsupported(program, layer.name, what, "set activations: int16 for the whole model, or int8")
        if layer.op == "qavg_pool2d" and any(layer.args["padding"]) and not layer.args["count_include_pad"]:
            kernel, stride, padding = (tuple(layer.args[k]) for k in ("kernel", "stride", "padding"))
            if stride != (1, 1) or any(k != 2 * p + 1 for k, p in zip(kernel, padding, strict=True)):
                raise _unsupported(program, layer.name, "averages without its padding", "set count_include_pad=True")
    names = {layer.node for layer in program.layers}
    for node in program.module.graph.nodes:
        if node.op != "call_function" or node.name in names:
            continue
        target, value = str(node.target), node.meta.get("val")
        stack = node.meta.get("nn_module_stack") or {}
        layer = next(reversed(stack.values()))[0] if stack else node.name
        if "fft" in target or (hasattr(value, "is_complex") and value.is_complex()):
            raise _unsupported(program, layer, f"computes {target} on complex numbers", "move the transform out of the model")
        if hasattr(value, "dtype") and str(value.dtype) == "torch.float64":
            raise _unsupported(program, layer, f"computes {target} in float64", "cast to float32")
        if "_local_scalar_dense" in target or "nonzero" in target:
            raise _unsupported(program, layer, f"has a result whose shape depends on the data ({target})", "use torch.where")


def _unsupported(program: FrozenProgram, layer: str, what: str, remedy: str) -> UnsupportedError:
    place = program.sources.get(layer)
    return UnsupportedError(f"layer {layer}{f' ({place})' if place else ''} {what}, which TFLite does not take: {remedy}")


def inspect(path: Path, program: FrozenProgram) -> Artifact:
    """The facts of a file that was lowered from this program.

    Raises:
        FormatError: a damaged file, or not a .tflite file.
    """
    file = read(path)
    with _damage(path):
        return _artifact(Path(path), file, program)


def readback(path: Path, program: FrozenProgram) -> list[Mismatch]:
    """Weights, weight scales, biases, activation scales and zero points of the file that are not the program's."""
    file = read(path)
    with _damage(path):
        return renamed(program, facts.compare(file, host_form(program)))


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """A file that parses and still makes no sense is damaged or another program's."""
    try:
        yield
    except (IndexError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise FormatError(f"{Path(path).name} is damaged or was made from another program; {AGAIN}") from error


def _artifact(path: Path, file: TfliteFile, program: FrozenProgram) -> Artifact:
    form = host_form(program)
    return Artifact(
        path=path,
        target="tflite",
        inputs=tuple(facts.spec(file.tensors[i]) for i in file.inputs),
        outputs=tuple(facts.spec(file.tensors[i]) for i in file.outputs),
        coverage=rows(program, facts.coverage(file, form, _delegated(path, file))),
        bytes=file.size,
        notes=facts.notes(file, form),
        memory=facts.memory(file),
    )


def _interpreter(path: Path, threads: int = 1, keep: bool = False) -> Any:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise missing_extra("ai-edge-litert", EXTRA) from error
    with quiet():
        try:
            interpreter = Interpreter(str(path), num_threads=threads, experimental_preserve_all_tensors=keep)
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise FormatError(f"LiteRT cannot load {Path(path).name}: {str(error).splitlines()[0]}") from error
    return interpreter


def _delegated(path: Path, file: TfliteFile) -> frozenset[int]:
    """Positions of the operators that XNNPACK runs: those between a delegate node's inputs and outputs."""
    inside: set[int] = set()
    for node in _interpreter(path)._get_ops_details():
        if node["op_name"] != "DELEGATE":
            continue
        border, todo = set(map(int, node["inputs"])), list(map(int, node["outputs"]))
        while todo:
            op = file.producer.get(todo.pop())
            if op is not None and op.index not in inside:
                inside.add(op.index)
                todo += [i for i in op.inputs if i not in border]
    return frozenset(inside)


def run(
    path: Path, inputs: Sequence[NDArray[Any]], threads: int = 1, progress: Callable[[int, int], None] | None = None
) -> list[NDArray[np.float32]]:
    """The file's outputs for a batch, one sample at a time.

    Args:
        inputs: one float array (N, ...) for each input of the program, in the program's layout (N, C, H, W).
        threads: of the interpreter.
        progress: called with (done, total) after each sample.

    Returns:
        one float32 array (N, ...) for each output, integers dequantized with the file's own scale.

    Raises:
        FormatError: a damaged file; InputError: inputs that do not fit it.
    """
    file, encoded = read(path), encode(path, inputs)
    interpreter = _interpreter(path, threads)
    results: list[list[NDArray[Any]]] = [[] for _ in file.outputs]
    total = len(encoded[0]) if encoded else 0
    for i in range(total):
        _feed(interpreter, file, [x[i : i + 1] for x in encoded])
        for kept, index in zip(results, file.outputs, strict=True):
            kept.append(interpreter.get_tensor(index))
        if progress is not None:
            progress(i + 1, total)
    return decode(path, [np.concatenate(r) if r else np.zeros((0,), np.float32) for r in results])


def encode(path: Path, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Float inputs (N, ...) in the program's layout, as the file takes them: its types and layouts.

    Raises:
        InputError: inputs that do not fit the file.
    """
    file = read(path)
    _fits(file, path, inputs)
    encoded = []
    for x, index, last in zip(inputs, file.inputs, facts.channel_last_inputs(file), strict=True):
        value, tensor = np.asarray(x), file.tensors[index]
        if last:
            value = value.transpose(0, 2, 3, 1)
        if tensor.dtype in _RANGES:
            value = _integers(value, tensor)
        encoded.append(np.ascontiguousarray(value, np.dtype(tensor.numpy_dtype)))
    return encoded


def decode(path: Path, outputs: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
    """The file's outputs (N, ...) as float32, integers dequantized with the file's own scale."""
    file = read(path)
    return [_real(y, file.tensors[i]) for y, i in zip(outputs, file.outputs, strict=True)]


def _fits(file: TfliteFile, path: Path, inputs: Sequence[NDArray[Any]]) -> None:
    if len(inputs) != len(file.inputs):
        raise InputError(f"{Path(path).name} has {len(file.inputs)} inputs, {len(inputs)} were given")
    for x, index, last in zip(inputs, file.inputs, facts.channel_last_inputs(file), strict=True):
        stored = file.tensors[index].shape
        wanted = (stored[3], stored[1], stored[2]) if last else stored[1:]
        if tuple(x.shape[1:]) != wanted:
            raise InputError(f"{Path(path).name} takes samples of shape {wanted}, found {tuple(x.shape[1:])}")


def _feed(interpreter: Any, file: TfliteFile, sample: Sequence[NDArray[Any]]) -> None:
    for x, index in zip(sample, file.inputs, strict=True):
        interpreter.set_tensor(index, x)
    interpreter.invoke()


def _integers(value: NDArray[Any], tensor: Tensor) -> NDArray[Any]:
    """``edgekit::quantize``: float32 product with the reciprocal scale, half to even."""
    if value.dtype == np.dtype(tensor.numpy_dtype):
        return value
    scaled = np.rint(value.astype(np.float32) * np.float32(1.0 / (tensor.scale or 1.0)))
    clipped: NDArray[Any] = np.clip(scaled + (tensor.zero_point or 0), *_RANGES[tensor.dtype])
    return clipped


def _real(value: NDArray[Any], tensor: Tensor) -> NDArray[np.float32]:
    if tensor.dtype in _RANGES:
        value = (value.astype(np.float32) - np.float32(tensor.zero_point or 0)) * np.float32(tensor.scale or 1.0)
    return value.astype(np.float32)


def taps(path: Path, program: FrozenProgram, sample: Sequence[NDArray[Any]]) -> dict[str, NDArray[np.int8]]:
    """Each frozen layer's int8 output as LiteRT computed it for one sample, in the program's layout.

    Args:
        sample: one array (1, ...) for each input, in the program's layout.

    Layers merged into a neighbour are left out.
    """
    file, tapping = read(path), tap_file(path, program)
    interpreter = _interpreter(path, keep=True)
    _feed(interpreter, file, encode(path, sample))
    return tapping.layers([interpreter.get_tensor(i) for i in (*file.outputs, *tapping.tensors)])


def tap_file(path: Path, program: FrozenProgram, copied: bool = False) -> TapFile:
    """What :func:`taps` reads, for any runtime of these files: the file itself with its tensors kept.

    Args:
        copied: a copy that has the tensors as outputs instead: tflite-runtime 2.14 does not keep what a sum is written over.
    """
    file = read(path)
    channel_last = facts.layouts(file)
    kept = [(x, t.index) for x in host_form(program).layers if (t := file.by_name.get(x.name)) is not None and _kept(x, t)]
    spikes = [(program.layer(name), f"~{node}") for name, node in spiking.written_out(program).neurons.items()]
    kept += [(x, t.index) for x, name in spikes if (t := file.by_name.get(name)) is not None]

    def layers(results: Sequence[NDArray[Any]]) -> dict[str, NDArray[np.int8]]:
        pairs = zip(kept, results[len(file.outputs) :], strict=True)
        found = {x.name: _in_program_layout(value, x, channel_last.get(index)) for (x, index), value in pairs}
        present = {name: value for name, value in found.items() if value is not None}
        return packed(program, present)

    inner = tuple(index for _, index in kept)
    if not copied:
        return TapFile(None, inner, layers)
    every = [*file.outputs, *(i for i in inner if i in file.producer and i not in file.outputs)]
    file.model.subgraphs[0].outputs = np.array(every, np.int32)
    file.model.signatureDefs = None

    def from_outputs(results: Sequence[NDArray[Any]]) -> dict[str, NDArray[np.int8]]:
        known = dict(zip(every, results, strict=True))
        kept[:] = [(x, index) for x, index in kept if index in known]
        return layers([*results[: len(file.outputs)], *(known[index] for _, index in kept)])

    return TapFile(serialize(file.model), (), from_outputs)


def _kept(layer: Layer, tensor: Tensor) -> bool:
    """Whether a tensor is the layer's own result: integers, or float32 where the layer gives that."""
    return tensor.dtype in _RANGES or (layer.op in DYNAMIC_OPS and tensor.dtype == "FLOAT32")


def _in_program_layout(value: NDArray[Any], layer: Layer, channel_last: bool | None) -> NDArray[np.int8] | None:
    """A stored activation in the layer's shape; None if it is neither that shape nor its channel-last form."""
    shape = layer.shape
    if value.ndim == 4 and len(shape) == 4:
        fits_last = value.shape == (shape[0], shape[2], shape[3], shape[1])
        if fits_last and (value.shape != shape or channel_last):
            return np.ascontiguousarray(value.transpose(0, 3, 1, 2))
        return value.copy() if value.shape == shape else None
    return value.reshape(shape).copy() if value.size == int(np.prod(shape)) else None
