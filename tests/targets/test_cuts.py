"""Layers cut out of a file: together they are the file, and each computes what it computes there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from device_files import lowered
from nets import images, residual_net

from edgekit.devices.runner import open_program
from edgekit.targets import get, tflite_file
from edgekit.targets.cuts import EMPTY, cuts

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("target", ["onnx", pytest.param("tflite", marks=pytest.mark.slow)])
def test_every_cut_computes_its_layer_from_the_layers_before(target: str, tmp_path: Path) -> None:
    path, program = lowered(tmp_path, target), residual_net()
    sample = [images(1).numpy()]
    taps = {k: v for k, v in get(target).taps(path, program, sample).items()}
    encoded = get(target).encode(path, sample)
    parts = cuts(path, target, program)
    assert parts[0].layer == EMPTY and parts[0].op in ("", "Identity")
    names = [part.layer for part in parts[1:]]
    assert set(taps) - {"quantize"} <= set(names) and len(set(names)) == len(names)
    checked = 0
    for part in parts:
        (tmp_path / "part").write_bytes(part.data)
        opened = open_program(str(tmp_path / "part"), target)
        assert [(s.shape, s.dtype) for s in opened.inputs] in (
            [(s, d) for s, d in part.inputs],
            [(s, d) for s, d in part.inputs][::-1],
        )
        given = [_result(s.name, s.shape, taps, encoded, target) for s in opened.inputs]
        if part.layer in taps and all(x is not None for x in given):
            opened.feed(given)
            opened.call()
            (found,) = opened.fetch()
            wanted = taps[part.layer]
            as_int8 = (found.astype(np.int16) - 128).astype(np.int8) if target == "onnx" else found
            if as_int8.ndim == 4 and target == "tflite":
                as_int8 = as_int8.transpose(0, 3, 1, 2)
            # fused neighbours may round otherwise than the tapped copy by one step
            assert np.abs(as_int8.reshape(wanted.shape).astype(int) - wanted.astype(int)).max() <= 1, part.layer
            checked += 1
        opened.feed(part.samples())
        opened.call()
    assert checked >= 8


def _result(
    name: str, shape: tuple[int, ...], taps: dict[str, np.ndarray], encoded: list[np.ndarray], target: str
) -> np.ndarray | None:
    """The tapped layer ``name`` as the file stores it; the network's input where there is no such layer."""
    if name not in taps:
        return encoded[0] if encoded[0].shape == shape else None
    value = taps[name]
    if target == "onnx":
        return (value.astype(np.int16) + 128).astype(np.uint8)
    if value.ndim == 4 and len(shape) == 4:
        value = value.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(value) if value.shape == shape else None


@pytest.mark.slow
def test_every_operator_of_a_file_is_in_a_cut(tmp_path: Path) -> None:
    path, program = lowered(tmp_path, "tflite"), residual_net()
    file = tflite_file.read(path)
    kinds = sorted(op.kind for part in cuts(path, "tflite", program) for op in tflite_file.parse(part.data, "part").ops)
    assert kinds == sorted(op.kind for op in file.ops)
    assert all(len(part.data) < path.stat().st_size for part in cuts(path, "tflite", program))


@pytest.mark.slow
def test_the_parts_of_a_delegate_compute_their_layers(tmp_path: Path) -> None:
    path, program = lowered(tmp_path, "executorch"), residual_net()
    taps = get("executorch").taps(path, program, [images(1).numpy()])
    parts = cuts(path, "executorch", program)
    assert parts[0].layer == EMPTY and {part.layer for part in parts[1:]} >= {x.name for x in program.layers if x.macs}
    whole, checked = path.stat().st_size, 0
    for part in parts:
        assert len(part.data) < whole
        (tmp_path / "part.pte").write_bytes(part.data)
        opened = open_program(str(tmp_path / "part.pte"))
        assert [(s.shape, s.dtype) for s in opened.inputs] == list(part.inputs)
        given = part.samples()
        named = program.layer(part.layer).inputs if part.layer in taps and program.layer(part.layer).macs else ()
        if len(named) == 1 and named[0] in taps:
            value = taps[named[0]]
            if value.ndim == 4 and value.shape != part.inputs[0][0]:
                value = value.transpose(0, 2, 3, 1)
            given = [np.ascontiguousarray(value.reshape(part.inputs[0][0]))]
        opened.feed(given)
        opened.call()
        if named:
            (found,) = opened.fetch()
            wanted = taps[part.layer]
            found = found.transpose(0, 3, 1, 2) if found.ndim == 4 and found.shape != wanted.shape else found
            assert np.abs(found.reshape(wanted.shape).astype(int) - wanted.astype(int)).max() <= 2, part.layer  # rounded scales
            checked += 1
    assert checked >= 4


def test_a_target_that_cannot_be_cut_gives_none(tmp_path: Path) -> None:
    assert cuts(tmp_path / "x.c", "cortex-m4", residual_net()) == ()
