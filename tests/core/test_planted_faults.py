"""One altered weight, scale, zero point or bias in a real file: verify must name the layer, for all three formats.

The faults are written into copies of the files by this test: with the onnx library, with the generated TFLite classes, and by
bytes at the offsets that the ``.pte`` reader reports. The layer is ``block.pw``: no other has its output scale and zero point.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nets import images, residual_net

from edgekit import verify
from edgekit.frozen import FrozenProgram
from edgekit.parity import ArtifactParity
from edgekit.recipe import Verify
from edgekit.stages import Evaluation
from edgekit.targets import get

pytestmark = pytest.mark.slow

LAYER = "block.pw"
FAULTS = ("weight", "scale", "zero point", "bias")
TARGETS = ("executorch", "tflite", "onnx")


@pytest.fixture(scope="module")
def program() -> FrozenProgram:
    return residual_net()


@pytest.fixture(scope="module")
def samples() -> Evaluation:
    return Evaluation((images(6),), None, "accuracy", "test images")


@pytest.fixture(scope="module", params=TARGETS)
def lowered(request: pytest.FixtureRequest, program: FrozenProgram, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(target, its untouched file)."""
    target = get(request.param)
    path = tmp_path_factory.mktemp("lowered") / f"model{target.SUFFIX}"
    target.lower(program, path)
    return request.param, path


def _flip(weight: np.ndarray) -> np.ndarray:
    """The weight with one element far from what it was."""
    changed = weight.copy()
    changed.flat[7] = -120 if changed.flat[7] > 0 else 120
    return changed


def _break_onnx(data: bytes, program: FrozenProgram, fault: str) -> bytes:
    import onnx

    model = onnx.load_from_string(data)
    zero_point = f"uint8.{program.layer(LAYER).args['out_zp'] + 128}"
    name = {"weight": f"{LAYER}.weight", "bias": f"{LAYER}.bias", "scale": f"{LAYER}.scale", "zero point": zero_point}[fault]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    value = onnx.numpy_helper.to_array(tensor).copy()
    if fault == "weight":
        value = _flip(value)
    elif fault == "bias":
        value.flat[3] += 30000
    else:
        value = (value * np.float32(1.25) if fault == "scale" else value + np.uint8(4)).astype(value.dtype)
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
    return model.SerializeToString()


def _break_tflite(data: bytes, program: FrozenProgram, fault: str) -> bytes:
    from edgekit.targets import tflite_file

    layer, file = program.layer(LAYER), tflite_file.parse(data, "model.tflite")
    graph = file.model.subgraphs[0]
    if fault in ("weight", "bias"):
        wanted = (layer.args["weight"].permute(0, 2, 3, 1) if fault == "weight" else layer.args["bias"]).numpy()
        found = [t for t in file.tensors if t.data is not None and t.data.tobytes() == wanted.tobytes()]
        assert len(found) == 1
        changed = _flip(wanted) if fault == "weight" else wanted + np.array([30000 if i == 3 else 0 for i in range(16)], np.int32)
        file.model.buffers[graph.tensors[found[0].index].buffer].data = np.frombuffer(changed.tobytes(), np.uint8)
        return tflite_file.serialize(file.model)
    found = [t for t in file.tensors if t.scale == np.float32(layer.out_scale) and t.zero_point == layer.out_zero_point]
    assert found
    for tensor in found:
        quantization = graph.tensors[tensor.index].quantization
        if fault == "scale":
            quantization.scale = np.array([tensor.scale * 1.25], np.float32)
        else:
            quantization.zeroPoint = np.array([tensor.zero_point + 4], np.int64)
    return tflite_file.serialize(file.model)


def _break_executorch(data: bytes, program: FrozenProgram, fault: str, path: Path) -> bytes:
    from edgekit.targets.pte_file import read_pte

    layer, file, changed = program.layer(LAYER), read_pte(path), bytearray(data)
    if fault in ("weight", "bias"):
        wanted = (layer.args["weight"].permute(0, 2, 3, 1) if fault == "weight" else layer.args["bias"]).numpy()
        found = [t for t in file.tensors.values() if t.data is not None and t.data.tobytes() == wanted.tobytes()]
        assert len(found) == 1
        new = _flip(wanted) if fault == "weight" else wanted + np.array([30000 if i == 3 else 0 for i in range(16)], np.int32)
        at = found[0].at["data"]
        assert data[at : at + wanted.nbytes] == wanted.tobytes()
        changed[at : at + wanted.nbytes] = new.tobytes()
        return bytes(changed)
    found = [t for t in file.tensors.values() if t.scale == np.float32(layer.out_scale) and t.zero_point == layer.out_zero_point]
    assert found
    for tensor in found:
        assert tensor.scale is not None and tensor.zero_point is not None
        if fault == "scale":
            struct.pack_into("<f", changed, tensor.at["scale"], tensor.scale * 1.25)
        else:
            struct.pack_into("<i", changed, tensor.at["zero_point"], tensor.zero_point + 4)
    return bytes(changed)


def _broken(target: str, path: Path, program: FrozenProgram, fault: str) -> bytes:
    if target == "executorch":
        return _break_executorch(path.read_bytes(), program, fault, path)
    edit: Callable[[bytes, FrozenProgram, str], bytes] = {"onnx": _break_onnx, "tflite": _break_tflite}[target]
    return edit(path.read_bytes(), program, fault)


def _verify(program: FrozenProgram, target: str, path: Path, samples: Evaluation) -> ArtifactParity:
    found: ArtifactParity = verify.verify_artifact(program, target, path, samples, settings=Verify(max_accuracy_drop=None))
    return found


def test_the_untouched_file_is_fine(lowered: tuple[str, Path], program: FrozenProgram, samples: Evaluation) -> None:
    target, path = lowered
    found = _verify(program, target, path, samples)
    assert found.ok, found.breaches
    assert found.stage.agreement_frozen == 100.0 and all(x.max_lsb <= 1 for x in found.layers)
    weighted = {x.name for x in program.layers if x.macs}
    assert weighted <= {x.layer for x in found.layers}
    json_form = found.artifact["coverage"]
    assert {r["layer"] for r in json_form} >= weighted and found.artifact["bytes"] == path.stat().st_size


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(
    lowered: tuple[str, Path], program: FrozenProgram, samples: Evaluation, fault: str, tmp_path: Path
) -> None:
    target, path = lowered
    broken = tmp_path / path.name
    broken.write_bytes(_broken(target, path, program, fault))
    assert broken.read_bytes() != path.read_bytes()
    found = _verify(program, target, broken, samples)
    assert not found.ok and found.first_diverging == LAYER
    assert any(f"layer {LAYER}" in m for m in found.mismatches), "reading the file back finds it"
    outside = [x.layer for x in found.layers if not x.within]
    assert LAYER in outside, "running the file finds it too, without reading a constant"
    if fault in ("weight", "bias"):
        assert outside == [LAYER], "fed the target's own inputs, no other layer differs"
    else:  # the add that follows reads the altered numbers with the program's scale
        assert set(outside) <= {LAYER, "add"}
