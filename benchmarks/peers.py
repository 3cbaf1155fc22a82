"""What a user would pick instead: other tools' files of the same network, from the same calibration samples, and how to run them.

Every maker takes (subject, path) and writes a file; settings are each tool's documented int8 route. Calibration is a batch of one
for all, since the exported graphs have that shape.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from subjects import Subject

from edgekit.targets.tflite_convert import quiet

Maker = Callable[[Subject, Path], None]


def ai_edge_quantizer(net: Subject, path: Path, bits: int = 8, last: bool = False, activation_bits: int = 8) -> None:
    """litert-torch's float file, quantized by ai-edge-quantizer's static_wi8_ai8; with 4 bits: convolutions but the first.

    Args:
        last: convert with channel-last input, which removes transposes.
    """
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe
    from ai_edge_quantizer.qtyping import TFLOperationName

    plain = path.with_suffix(".float.tflite")
    order = _last if last else torch.Tensor.contiguous
    model = litert_torch.to_channel_last_io(copy.deepcopy(net.model), args=[0]) if last else copy.deepcopy(net.model)
    litert_torch.convert(model, (order(net.sample[0]),)).export(str(plain))
    tool = quantizer.Quantizer(str(plain), recipe.static_wi8_ai8())
    if bits == 4:
        first = _first_convolution(plain)
        tool.add_static_config(".*", TFLOperationName.CONV_2D, activation_num_bits=activation_bits, weight_num_bits=4)
        tool.add_static_config(first, TFLOperationName.CONV_2D, activation_num_bits=8, weight_num_bits=8)
    name = _input_name(plain)
    found = tool.calibrate({"serving_default": [{name: order(x[None]).numpy()} for x in net.calibration]})
    tool.quantize(found).export_model(str(path), overwrite=True)
    plain.unlink()


def litert_pt2e(net: Subject, path: Path) -> None:
    """PT2E with litert-torch's own quantizer, per-channel static int8."""
    import litert_torch
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig

    quantizer = PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    model = _pt2e(net, quantizer)
    wrapped = litert_torch.to_channel_last_io(model, args=[0])
    config = QuantConfig(pt2e_quantizer=quantizer)
    litert_torch.convert(wrapped, (_last(net.sample[0]),), quant_config=config).export(str(path))


def torchao_xnnpack(net: Subject, path: Path) -> None:
    """PT2E of torchao with ExecuTorch's XNNPACKQuantizer, per-channel static int8."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from executorch.exir import to_edge_transform_and_lower

    model = _pt2e(net, XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)))
    edge = to_edge_transform_and_lower(torch.export.export(model, net.sample), partitioner=[XnnpackPartitioner()])
    path.write_bytes(bytes(edge.to_executorch().buffer))


def onnxruntime_static(
    net: Subject, path: Path, unsigned: bool = False, few: Callable[[Any], dict[str, Any]] | None = None
) -> None:
    """onnxruntime's quantize_static, QDQ, per channel; activations int8 (its default) or uint8.

    Args:
        few: makes overrides for some tensors' types from the float onnx.ModelProto.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, ready = path.with_suffix(".float.onnx"), path.with_suffix(".ready.onnx")
    torch.onnx.export(copy.deepcopy(net.model), net.sample, dynamo=True, verbose=False, external_data=False).save(str(plain))
    quant_pre_process(str(plain), str(ready))

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            name = onnx.load(str(plain)).graph.input[0].name
            self.samples = iter([{name: x[None].numpy()} for x in net.calibration])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.samples, None)

    kind = QuantType.QUInt8 if unsigned else QuantType.QInt8
    quantize_static(
        str(ready), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=kind, weight_type=QuantType.QInt8,
        extra_options={"TensorQuantOverrides": few(onnx.load(str(ready)))} if few else None,
    )  # fmt: skip
    plain.unlink()
    ready.unlink()


def mlperf(net: Subject, path: Path) -> None:
    """The int8 file that MLPerf Tiny ships; its weights are the network's, its calibration is its own."""
    from edgekit import source

    folder = _examples_folder(source)
    shutil.copyfile(folder / {"resnet8": "ic/pretrainedResnet_quant.tflite", "dscnn": "kws/kws_ref_model.tflite"}[net.name], path)


# name -> (runtime, weight bits, maker, models it is for)
_ALL = ("resnet20", "resnet8", "dscnn")
PEERS: dict[str, tuple[str, int, Maker, tuple[str, ...]]] = {
    "ai-edge-quantizer static_wi8_ai8": ("tflite", 8, ai_edge_quantizer, _ALL),
    "ai-edge-quantizer static_wi8_ai8, channel-last": ("tflite", 8, partial(ai_edge_quantizer, last=True), _ALL),
    "litert-torch PT2E, channel-last": ("tflite", 8, litert_pt2e, _ALL),
    "MLPerf Tiny's int8 file": ("tflite", 8, mlperf, ("resnet8", "dscnn")),
    "torchao PT2E + XNNPACKQuantizer": ("executorch", 8, torchao_xnnpack, _ALL),
    "onnxruntime quantize_static": ("onnx", 8, onnxruntime_static, _ALL),
    "onnxruntime quantize_static, uint8 activations": ("onnx", 8, partial(onnxruntime_static, unsigned=True), _ALL),
    "ai-edge-quantizer, int4 convolutions": ("tflite", 4, partial(ai_edge_quantizer, bits=4), _ALL),
    "ai-edge-quantizer, int4 convolutions, channel-last": ("tflite", 4, partial(ai_edge_quantizer, bits=4, last=True), _ALL),
}


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing of the other tools on the terminal but their errors."""
    with quiet(), warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        yield
        logging.captureWarnings(False)


def caller(path: Path, net: Subject) -> tuple[Callable[[np.ndarray], Any], Callable[[], np.ndarray], str]:
    """(give one NCHW float sample, run it and return the raw output, in words how it takes input) for any file, one thread."""
    return {".tflite": _tflite, ".pte": _pte, ".onnx": _onnx}[path.suffix](path, net)


def outputs(path: Path, net: Subject) -> np.ndarray:
    """Outputs (N, classes) of a file for every sample, one by one; integers as they are (argmax is the same)."""
    give, run, _ = caller(path, net)
    found = []
    for x in net.x.numpy():
        give(x[None])
        found.append(np.asarray(run()).astype(np.float32).copy())
    return np.concatenate(found)


def _tflite(path: Path, net: Subject) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    with quiet():
        interpreter = Interpreter(str(path), num_threads=1)
        interpreter.allocate_tensors()
    entry, leave = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    last = tuple(entry["shape"][1:]) != tuple(net.x.shape[1:])

    def give(x: np.ndarray) -> None:
        x = x.transpose(0, 2, 3, 1) if last else x
        if entry["dtype"] != np.float32:
            scale, zero_point = entry["quantization"]
            limits = np.iinfo(entry["dtype"])
            x = np.clip(np.rint(x / scale) + zero_point, limits.min, limits.max)
        interpreter.set_tensor(entry["index"], np.ascontiguousarray(x.astype(entry["dtype"])))

    def run() -> Any:
        interpreter.invoke()
        return interpreter.get_tensor(leave["index"])

    return give, run, f"{np.dtype(entry['dtype']).name}, {'channel-last' if last else 'channel-first'}"


def _pte(path: Path, net: Subject) -> Any:
    from edgekit.targets.executorch import _quiet, _silent_stderr

    with _quiet(), _silent_stderr():
        import executorch.kernels.quantized  # noqa: F401  quantize at the input
        from executorch.extension.pybindings import portable_lib

        program = path.read_bytes()
        module = portable_lib._load_for_executorch_from_buffer(program)
        portable_lib._unsafe_reset_threadpool(1)
        module.forward([net.sample[0]])
    held: dict[str, Any] = {"program": program}  # the module points into it

    def give(x: np.ndarray) -> None:
        held["inputs"] = [torch.from_numpy(np.ascontiguousarray(x))]

    return give, lambda: module.forward(held["inputs"])[0].numpy(), "float32, channel-first"


def _onnx(path: Path, net: Subject) -> Any:
    from edgekit.targets.onnx import session

    runner = session(path, 1)  # the same session options for everybody
    name = runner.get_inputs()[0].name
    held: dict[str, np.ndarray] = {}

    def give(x: np.ndarray) -> None:
        held[name] = np.ascontiguousarray(x)

    return give, lambda: runner.run(None, held)[0], "float32, channel-first"


def _pt2e(net: Subject, quantizer: Any) -> torch.nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(torch.export.export(copy.deepcopy(net.model), net.sample).module(check_guards=False), quantizer)
    with torch.no_grad():
        for x in net.calibration:
            prepared(x[None])
    return convert_pt2e(prepared, fold_quantize=False) if "litert" in type(quantizer).__module__ else convert_pt2e(prepared)


def _last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _interpreter(path: Path) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(str(path))


def _input_name(path: Path) -> str:
    return next(iter(_interpreter(path).get_signature_list()["serving_default"]["inputs"]))


def _first_convolution(path: Path) -> str:
    """A regular expression that only the first convolution's output tensor matches."""
    import re

    interpreter = _interpreter(path)
    op = next(o for o in interpreter._get_ops_details() if o["op_name"] == "CONV_2D")
    return re.escape(interpreter._get_tensor_details(op["outputs"][0], 0)["name"])


def _examples_folder(source: Any) -> Path:
    from subjects import ROOT

    return Path(source._factory(f"{ROOT}/examples/mlperf_tiny/samples.py:folder")()) / "mlperf_tiny"
