"""1-bit layers in a .pte: stored in one bit, run by edgekit's kernels, equal to the frozen program in every layer."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from binary_firmware_nets import attention_net
from binary_nets import ChainNet, PlainNet, ResidualNet, binary_net
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgekit.compress.binary.baked import baked
from edgekit.compress.binary.bipft import BinaryEncoder
from edgekit.compress.binary.encoder import Encoder, EncoderConfig
from edgekit.compress.ptq.settings import PTQ
from edgekit.compress.steps import apply
from edgekit.data import Data
from edgekit.devices.runner import open_program
from edgekit.firmware_sim.binary_library import VARIANTS
from edgekit.frozen import FrozenProgram
from edgekit.recipe import Block
from edgekit.targets import executorch, executorch_binary
from edgekit.targets.cuts import cuts
from edgekit.targets.executorch_binary import pack, unpack
from edgekit.targets.pte_file import FileTensor, read_pte

pytestmark = pytest.mark.slow

NETS = [ChainNet, ResidualNet, PlainNet]


@pytest.fixture(scope="module", params=NETS, ids=lambda n: n.__name__)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[FrozenProgram, torch.Tensor, Path]:
    program, x = binary_net(request.param)
    path = tmp_path_factory.mktemp("pte") / "model.pte"
    executorch.lower(program, path)
    return program, x, path


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program, x = binary_net(ChainNet)
    path = tmp_path_factory.mktemp("chain") / "model.pte"
    executorch.lower(program, path)
    np.save(path.with_suffix(".npy"), x.numpy())
    return path


def differing(program: FrozenProgram, path: Path, x: torch.Tensor) -> dict[str, int]:
    """Values of each layer that are not the frozen program's for the layer's own input, over the samples."""
    wrong: dict[str, int] = {}
    for one in x.split(1):
        taps = executorch.taps(path, program, [one.numpy()])
        forced = program.forced({k: torch.from_numpy(np.array(v)) for k, v in taps.items()}, one)
        for name, tap in taps.items():
            wrong[name] = wrong.get(name, 0) + int((forced[name].numpy() != tap).sum())
    return wrong


def test_every_layer_equals_the_frozen_program(case: tuple[FrozenProgram, torch.Tensor, Path]) -> None:
    program, x, path = case
    wrong = differing(program, path, x)
    binary = {layer.name for layer in program.layers if layer.op.startswith("bin")}
    assert binary <= wrong.keys() and not any(wrong[name] for name in binary)
    (found,) = executorch.run(path, [x.numpy()])
    (wanted,) = program.run(x)
    assert len(np.unique(wanted.numpy())) > 5
    assert np.abs(found - wanted.numpy()).max() < 0.11  # a step: XNNPACK's mean rounds otherwise now and then
    if "mean" not in wrong:
        np.testing.assert_array_equal(found, wanted.numpy())


def test_each_kernel_can_be_cut_out_to_be_timed(case: tuple[FrozenProgram, torch.Tensor, Path], tmp_path: Path) -> None:
    """Each alone, with the file's own signs as input, gives the file's own result."""
    program, x, path = case
    taps = executorch.taps(path, program, [x[:1].numpy()])
    taken = {part.layer: part for part in cuts(path, "executorch", program) if part.op.startswith("edgekit_kernels::")}
    assert [*taken] == [layer.name for layer in program.layers if layer.op.startswith("bin")]
    executorch_binary.load_kernels()
    for name, part in taken.items():
        value = taps.get(program.layer(name).inputs[0], x[:1].numpy())
        (tmp_path / "part.pte").write_bytes(part.data)
        opened = open_program(str(tmp_path / "part.pte"))
        assert [(s.shape, s.dtype) for s in opened.inputs] == list(part.inputs)
        opened.feed([part.samples()[0], np.ascontiguousarray(value.reshape(part.inputs[1][0]))])
        opened.call()
        np.testing.assert_array_equal(opened.fetch()[-1].reshape(taps[name].shape), taps[name], name)


@pytest.mark.slow
def test_heads_that_are_moved_and_flattened_run(tmp_path: Path) -> None:
    """A reshape of a permuted tensor is no view of it."""
    program, x = attention_net()
    executorch.lower(program, tmp_path / "model.pte")
    assert not any(differing(program, tmp_path / "model.pte", x[:3]).values())


@pytest.mark.slow
def test_a_binary_encoder_runs_from_a_file(tmp_path: Path) -> None:
    """Words in, 1-bit linear layers and attention products inside: each equals the frozen program's for the file's own inputs."""
    torch.manual_seed(0)
    config = EncoderConfig(layers=1, width=32, heads=2, hidden=48, positions=12, vocabulary=40, types=2, classes=3)
    student, ids = BinaryEncoder(Encoder(config), rank=1), torch.randint(0, 40, (24, 9))
    student(ids)
    program = apply(baked(student), [Block("ptq", PTQ())], Data(calibration=ids)).program
    path = tmp_path / "model.pte"
    executorch.lower(program, path)
    assert executorch.readback(path, program) == []
    wrong = differing(program, path, ids[:4])
    ones = {layer.name for layer in program.layers if layer.op in ("binary_qlinear", "binary_qmatmul")}
    assert len(ones) == 9 and ones <= wrong.keys() and not any(wrong[name] for name in ones)
    np.testing.assert_allclose(executorch.run(path, [ids.numpy()])[0], program.run(ids)[0].numpy(), atol=0.2)


@pytest.mark.parametrize("variant", VARIANTS[platform.machine()])
def test_each_variant_gives_the_same(case: tuple[FrozenProgram, torch.Tensor, Path], variant: str) -> None:
    _, x, path = case
    (wanted,) = executorch.run(path, [x.numpy()])
    if not executorch_binary.choose_variant(variant):
        pytest.skip(f"this processor has no {variant}")
    try:
        assert executorch_binary.variant() == variant
        np.testing.assert_array_equal(executorch.run(path, [x.numpy()])[0], wanted)
    finally:
        executorch_binary.choose_variant(None)


def test_a_weight_takes_one_bit_in_the_file(case: tuple[FrozenProgram, torch.Tensor, Path]) -> None:
    program, _, path = case
    stored = {n: t.data.nbytes for n, t in read_pte(path).tensors.items() if t.dtype == "uint8" and t.data is not None}
    weights = [layer for layer in program.layers if layer.weight_bits == 1]
    assert sorted(stored.values()) == sorted(layer.args["weight"].numel() for layer in weights)
    bits = sum(layer.args["weight"].numel() for layer in weights) * 8
    signs = sum(layer.parameters - len(layer.args.get("threshold", layer.args.get("bias"))) for layer in weights)
    assert signs <= bits <= (1.0 if isinstance(program, ResidualNet) else 1.1) * signs  # a pixel's channels fill whole bytes
    coverage = {row.layer: row for row in executorch.inspect(path, program).coverage}
    for layer in weights:
        assert (coverage[layer.name].storage, coverage[layer.name].runs) == ("int1", "binary")


def test_chained_layers_hand_on_packed_signs(chain: Path) -> None:
    file = read_pte(chain)
    kinds = [op.kind.partition("::")[2] for op in file.ops if op.kind.startswith("edgekit")]
    assert kinds == ["binarize", "binary_conv2d", "binary_conv2d", "binary_conv2d", "binary_qconv2d"]
    own = [op for op in file.ops if op.kind.startswith("edgekit")]
    for before, after in pairwise(own):
        assert before.outputs[0] == after.inputs[0] and file.tensors[before.outputs[0]].dtype == "uint8"


def altered(path: Path, tensor: FileTensor, at: int, bit: int) -> Path:
    data = bytearray(path.read_bytes())
    data[tensor.at["data"] + at] ^= 1 << bit
    out = path.with_name("altered.pte")
    out.write_bytes(data)
    return out


@pytest.mark.parametrize(("dtype", "field"), [("uint8", "weight"), ("int32", "threshold"), ("int16", "threshold")])
def test_one_altered_bit_is_found_in_its_layer(chain: Path, dtype: str, field: str) -> None:
    program, x = binary_net(ChainNet)
    layer = {"int16": "sign"}.get(dtype, "conv2")
    wanted = program.layer(layer).args[field].numel()
    tensor = next(
        t for t in read_pte(chain).tensors.values() if t.dtype == dtype and t.data is not None and t.data.size == wanted
    )
    bad = altered(chain, tensor, 40, 4)
    found = executorch.readback(bad, program)
    assert [m.layer for m in found] == [layer] and found[0].field.startswith(f"{field}[")
    wrong = differing(program, bad, x)
    assert {name for name, count in wrong.items() if count} == {layer}


@pytest.mark.parametrize("field", ["stride", "padding", "dilation", "groups", "channels"])
def test_another_geometry_is_found(chain: Path, field: str) -> None:
    program, _ = binary_net(ChainNet)
    assert executorch.readback(chain, program) == []
    args: Any = program.layer("conv1").args
    args[field] = args[field] + 1 if isinstance(args[field], int) else [7, 7]
    assert {(m.layer, m.field) for m in executorch.readback(chain, program)} >= {("conv1", field)}


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(1, 20))
def test_packing_is_undone(seed: int, groups: int, outputs: int, taps: int, size: int) -> None:
    weight = np.random.default_rng(seed).integers(0, 256, (groups * outputs, taps, size)).astype(np.uint8)
    packed = pack(torch.from_numpy(weight), groups).numpy()
    np.testing.assert_array_equal(unpack(packed, groups), weight)
    flat, rows = packed.reshape(groups, -1)[-1], weight.reshape(groups, outputs, -1)[-1]  # by the words of binary.h
    for block in range(0, outputs, 8):
        mine = rows[block : block + 8]
        words = mine.shape[1] // 8
        wanted = [mine[o, 8 * j : 8 * j + 8] for j in range(words) for o in range(len(mine))]
        wanted += [mine[o, 8 * words :] for o in range(len(mine))]
        count = mine.size
        np.testing.assert_array_equal(flat[block * rows.shape[1] :][:count], np.concatenate(wanted))


def run_alone(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(p for p in sys.path if p)
    kept = {"PYTHONPATH": paths, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **kept})


def test_without_a_compiler_it_says_so_and_kernels_are_loaded_once(chain: Path, tmp_path: Path) -> None:
    """First no compiler and an empty cache, then the usual cache, then another: a second copy would end the process."""
    code = f"""
import os
import numpy as np
from edgekit.errors import MissingTool
from edgekit.targets import executorch

x, usual = np.load({str(chain.with_suffix(".npy"))!r}), os.environ.get("EDGEKIT_CACHE")
os.environ |= {{"CXX": "absent-compiler", "EDGEKIT_CACHE": {str(tmp_path)!r}}}
try:
    executorch.run({str(chain)!r}, [x])
except MissingTool as error:
    print(error.exit_code, error)
del os.environ["CXX"], os.environ["EDGEKIT_CACHE"]
if usual:
    os.environ["EDGEKIT_CACHE"] = usual
first = executorch.run({str(chain)!r}, [x])[0]
os.environ["EDGEKIT_CACHE"] = {str(tmp_path)!r}
assert (executorch.run({str(chain)!r}, [x])[0] == first).all()
print("fine")
"""
    done = run_alone(code)
    lines = done.stdout.splitlines()
    assert (done.returncode, lines[-1:]) == (0, ["fine"]), done.stderr[-2000:]
    assert lines[0].startswith("3 absent-compiler is not installed") and "apt-get install" in lines[0]
    assert not list(tmp_path.iterdir())


def test_nets_are_of_every_operator() -> None:
    nets: list[type[nn.Module]] = list(NETS)
    ops = {layer.op for kind in nets for layer in binary_net(kind)[0].layers}
    assert ops >= executorch_binary.KERNELS.keys()
