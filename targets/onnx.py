"""ONNX: a frozen program as a QDQ model for onnxruntime.

``torch.onnx.export`` translates what the program left in float and writes one placeholder node for each ``edgekit::`` operator;
:mod:`edgekit.targets.onnx_rules` then replaces each placeholder by the layer's own integers. The file holds no path, no stack
trace and no intermediate shapes, and the same program gives the same bytes. What is in a file is read back by
:mod:`edgekit.targets.onnx_facts`.

On x86 processors without VNNI, onnxruntime's 8-bit matrix kernels saturate 16-bit sums unless the session option
``session.x64quantprecision`` is "1"; :func:`session` sets it there, and so should every other host of these files.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.artifact import Artifact, Mismatch, TapFile
from edgekit.errors import FormatError, InputError, ParityError, UnsupportedError, missing_extra
from edgekit.files import write_whole
from edgekit.frozen import FrozenProgram
from edgekit.targets import onnx_facts, preflight, spiking
from edgekit.targets.binary_int8 import packed
from edgekit.targets.host_form import host_form, renamed, rows
from edgekit.targets.onnx_rules import RULES, Expansion

__all__ = [
    "EXTRA", "SUFFIX", "Options", "available", "decode", "encode", "inspect", "lower", "readback", "run", "session", "tap_file",
    "taps",
]  # fmt: skip

SUFFIX = ".onnx"
EXTRA = "onnx"

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else onnxruntime notes its use in the home folder, from its import on

_PLACEHOLDER = "edgekit"
_OPSET = {8: 21, 4: 21, 2: 25}  # the first with INT4, and with INT2


@dataclass(frozen=True)
class Options:
    """How to write the file.

    Attributes:
        pack: store weights of 4 and 2 bits in 4 and 2 bits (2 bits need opset 25, a recent onnxruntime); else as int8.
        tables: an elementwise function that onnxruntime has no integer kernel for (silu, gelu, tanh, ...) becomes an exact
            look-up of 256 entries, about five times slower than the float function that is written otherwise.
    """

    pack: bool = True
    tables: bool = False


def available() -> str | None:
    """None if the target can be used, else what is missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed; run: pip install 'edgekit[{EXTRA}]'" if missing else None


def lower(program: FrozenProgram, path: Path, options: Options | None = None) -> Artifact:
    """Write ``path`` and read it back.

    Raises:
        UnsupportedError: an operator this target does not take.
        ParityError: the file differs from the program; names the layer.
        MissingTool: onnx, onnxscript or onnxruntime is not installed.
    """
    _require()
    preflight.check_program(program, "onnx")
    write_whole(Path(path), _model(host_form(program), options or Options()).SerializeToString(deterministic=True))
    mismatches = readback(path, program)
    if mismatches:
        raise ParityError(f"{path}: {mismatches[0]} ({len(mismatches)} differences in all)")
    return inspect(path, program)


def inspect(path: Path, program: FrozenProgram) -> Artifact:
    """Facts read from the file, and from the graph that onnxruntime makes of it for this machine.

    Raises:
        FormatError: the file is missing, truncated or not an ONNX model.
    """
    model = onnx_facts.read(path)
    found = onnx_facts.artifact(path, model, _optimized(model, path), host_form(program))
    return replace(found, coverage=rows(program, found.coverage))


def readback(path: Path, program: FrozenProgram) -> list[Mismatch]:
    """Everything in the file that differs from the program: weights, biases, scales, zero points, clamps.

    Raises:
        FormatError: the file is missing, truncated or not an ONNX model.
    """
    return renamed(program, onnx_facts.mismatches(onnx_facts.read(path), host_form(program)))


def run(
    path: Path,
    inputs: Sequence[NDArray[Any]],
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[NDArray[np.float32]]:
    """Run samples one by one.

    Args:
        inputs: one array (N, ...) for each input of the program.
        threads: intra-op threads.
        progress: called with (samples done, N).

    Returns:
        One float32 array (N, ...) for each output.

    Raises:
        FormatError: onnxruntime cannot load the file.
        InputError: the number or shape of the inputs does not fit.
    """
    runner = session(path, threads)
    outputs: list[list[NDArray[Any]]] = []
    total = len(inputs[0]) if inputs else 0
    for i in range(total):
        outputs.append(_call(runner, path, [x[i : i + 1] for x in inputs]))
        if progress:
            progress(i + 1, total)
    return [np.concatenate(column).astype(np.float32) for column in zip(*outputs, strict=True)]


def taps(path: Path, program: FrozenProgram, sample: Sequence[NDArray[Any]]) -> dict[str, NDArray[np.int8]]:
    """Each layer's integers as onnxruntime computed them for one sample (batch of one), int8, by layer name.

    The layers' tensors become outputs of a copy of the file; the shipped file stays as it is.
    """
    tapping = tap_file(path, program)
    assert tapping.data is not None
    runner = _session(tapping.data, path, 1)
    return tapping.layers(_call(runner, path, sample) if runner.get_outputs() else [])


def tap_file(path: Path, program: FrozenProgram) -> TapFile:
    """What :func:`taps` runs."""
    import onnx

    model = onnx_facts.read(path)
    produced = {name for node in model.graph.node for name in node.output}
    names = [n.name for n in host_form(program).layers if n.out_scale is not None and n.name in produced]
    spikes = _spikes(model, program)
    del model.graph.output[:]
    kinds = {**dict.fromkeys(names, onnx.TensorProto.UINT8), **dict.fromkeys(spikes, onnx.TensorProto.FLOAT)}
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items())

    def layers(values: Sequence[NDArray[Any]]) -> dict[str, NDArray[np.int8]]:
        found = dict(zip(kinds, values, strict=True))
        signed = {name: (found[name].astype(np.int16) - 128).astype(np.int8) for name in names}
        return packed(program, signed) | {name: found[node] for node, name in spikes.items()}

    return TapFile(model.SerializeToString(), (), layers)


def _spikes(model: Any, program: FrozenProgram) -> dict[str, str]:
    """Tensors of the file that are spikes, to their layers: what joins or casts them, counted off in the file and the program."""
    written = spiking.written_out(program)
    layers = {node: name for name, node in written.neurons.items()}
    found: dict[str, str] = {}
    for target, op in (("aten.cat.default", "Concat"), ("aten._to_copy.default", "Cast")):
        nodes = [n.name for n in written.program.module.graph.nodes if str(n.target) == target]
        outputs = [n.output[0] for n in model.graph.node if n.op_type == op]
        if len(nodes) == len(outputs):
            found |= {o: layers[n] for n, o in zip(nodes, outputs, strict=True) if n in layers}
    return found


def encode(path: Path, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Inputs (N, ...) as the file takes them.

    Raises:
        InputError: the number or shape of the inputs does not fit.
    """
    import onnx

    wanted = onnx_facts.read(path).graph.input
    if len(inputs) != len(wanted):
        raise InputError(f"{path}: {len(inputs)} inputs given, the file takes {len(wanted)}")
    encoded = []
    for value, x in zip(wanted, inputs, strict=True):
        shape = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        if tuple(x.shape[1:]) != shape[1:]:
            raise InputError(f"{path}, input {value.name}: shape {tuple(x.shape)} given, (N, {str(shape[1:])[1:]} expected")
        encoded.append(np.ascontiguousarray(x, onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)))
    return encoded


def decode(path: Path, outputs: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
    """The file's outputs (N, ...) as float32."""
    return [y.astype(np.float32) for y in outputs]


def session(path: Path, threads: int = 1) -> Any:
    """An onnxruntime session with the options that keep its integers exact.

    Raises:
        FormatError: onnxruntime cannot load the file.
    """
    _require()
    try:
        return _session(Path(path).read_bytes(), path, threads)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or error}") from error


def _require() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, EXTRA)


def _session(data: bytes, path: Path, threads: int, optimized: Path | None = None) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    if not _vnni():
        settings.add_session_config_entry("session.x64quantprecision", "1")
    if optimized is not None:
        settings.optimized_model_filepath = str(optimized)
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        return onnxruntime.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        reason = str(error).splitlines()[0][:200]
        raise FormatError(f"{path}: onnxruntime {onnxruntime.__version__} cannot load it ({reason})") from error


def _vnni() -> bool:
    """Whether 8-bit products are summed without saturation: any processor but an x86 one that does not state VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i686"):
        return True
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False


def _optimized(model: Any, path: Path) -> Any:
    """The graph that onnxruntime runs, before processor-specific layouts."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "optimized.onnx"
        _session(model.SerializeToString(), path, 1, file)
        return onnx_facts.read(file)


def _call(runner: Any, path: Path, sample: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    wanted = runner.get_inputs()
    if len(sample) != len(wanted):
        raise InputError(f"{path}: {len(sample)} inputs given, the file takes {len(wanted)}")
    feed: dict[str, NDArray[Any]] = {}
    for spec, value in zip(wanted, sample, strict=True):
        if list(value.shape) != list(spec.shape):
            raise InputError(f"{path}, input {spec.name}: shape {tuple(value.shape)} given, {tuple(spec.shape)} expected")
        feed[spec.name] = np.ascontiguousarray(value, dtype=_DTYPES.get(spec.type, np.float32))
    result: list[NDArray[Any]] = runner.run(None, feed)
    return result


_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}


def _model(program: FrozenProgram, options: Options) -> Any:
    bits = min((layer.weight_bits or 8 for layer in program.layers), default=8) if options.pack else 8
    model = _exported(program, _OPSET[bits])
    expansion = Expansion(options.pack, options.tables)
    graph = model.graph
    names = _names(graph, program)
    for node in graph.node:
        inputs = [names.get(name, name) for name in node.input]
        if node.domain == _PLACEHOLDER:
            layer = program.layers[node.attribute[0].i]
            RULES[layer.op](expansion, layer, inputs)
            continue
        node.input[:] = inputs
        node.output[:] = [names.get(name, name) for name in node.output]
        expansion.nodes.append(node)
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    return _assembled(model, expansion, program.name)


def _assembled(model: Any, expansion: Expansion, name: str) -> Any:
    """A new model of the expanded nodes and of what they use, without metadata."""
    import onnx

    from edgekit import __version__

    graph = model.graph
    used = {i for node in expansion.nodes for i in node.input} | {o.name for o in graph.output}
    kept = [*expansion.initializers.values(), *(t for t in graph.initializer if t.name not in expansion.initializers)]
    kept = [tensor for tensor in kept if tensor.name in used]
    for message in (*expansion.nodes, *kept, *graph.input, *graph.output):
        message.ClearField("doc_string")
        message.ClearField("metadata_props")
    for node in expansion.nodes:
        if node.domain == "" and node.name.startswith("node_"):
            node.ClearField("name")
    result = onnx.helper.make_model(
        onnx.helper.make_graph(expansion.nodes, name, graph.input, graph.output, kept),
        producer_name="edgekit",
        producer_version=__version__,
        ir_version=max(model.ir_version, 10),
        opset_imports=[o for o in model.opset_import if o.domain != _PLACEHOLDER],
        functions=list(model.functions),
    )
    return result


def _names(graph: Any, program: FrozenProgram) -> dict[str, str]:
    """New tensor names: a layer's output gets the layer's name, any other tensor that has a layer's name another one."""
    names = {n.output[0]: program.layers[n.attribute[0].i].name for n in graph.node if n.domain == _PLACEHOLDER}
    taken = {layer.name for layer in program.layers}
    others = [v.name for v in (*graph.input, *graph.initializer)] + [
        name for node in graph.node if node.domain != _PLACEHOLDER for name in node.output
    ]
    for name in others:
        new = name
        while new in taken:
            new += "_"
        if new != name:
            names[name] = new
            taken.add(new)
    return names


def _exported(program: FrozenProgram, opset: int) -> Any:
    """What ``torch.onnx.export`` makes of the program, with a placeholder node for each ``edgekit::`` operator."""
    import torch

    with _quiet():
        try:
            exported = torch.onnx.export(
                program.exported, (), dynamo=True, opset_version=opset, verbose=False, custom_translation_table=_placeholders()
            )
        except Exception as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0][:300]
            raise UnsupportedError(
                f"program {program.name}: torch.onnx cannot translate an operator that was left in float ({reason}); "
                "quantize it, or replace it in the model"
            ) from error
    assert exported is not None
    model = exported.model_proto
    found = sum(node.domain == _PLACEHOLDER for node in model.graph.node)
    if found != len(program.layers):
        raise ParityError(f"program {program.name}: {len(program.layers)} layers went into torch.onnx, {found} came out")
    return model


def _placeholders() -> dict[Callable[..., Any], Callable[..., Any]]:
    """``torch.onnx`` translations: the i-th ``edgekit::`` node becomes a placeholder with the attribute i and its activations."""
    import onnx
    import onnxscript

    from edgekit.frozen.ops import OPS

    schema_type = onnx.defs.OpSchema
    one, many = schema_type.FormalParameterOption.Single, schema_type.FormalParameterOption.Variadic
    schema = schema_type(
        "Layer", _PLACEHOLDER, 1,
        inputs=[schema_type.FormalParameter("x", "T", param_option=many, is_homogeneous=False)],
        outputs=[schema_type.FormalParameter("y", "T", param_option=one)],
        type_constraints=[("T", ["tensor(float)", "tensor(int8)", "tensor(int16)"], "")],
        attributes=[schema_type.Attribute("index", schema_type.AttrType.INT, "")],
    )  # fmt: skip
    placeholder = onnxscript.values.Op(onnxscript.values.Opset(_PLACEHOLDER, 1), "Layer", schema)
    count = iter(range(1 << 30))

    def translation(overload: Any) -> Callable[..., Any]:
        keys = [a.name for a in overload._schema.arguments]

        def translate(*args: Any) -> Any:
            inputs: list[Any] = []
            for key, value in zip(keys, args, strict=False):
                if key in ("x", "a", "b", "xs"):
                    inputs += value if isinstance(value, list | tuple) else [value]
            return placeholder(*inputs, index=next(count))

        return translate

    return {(overload := getattr(OPS, name).default): translation(overload) for name in RULES}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Third-party warnings and prints stay away from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
