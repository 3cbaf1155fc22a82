"""Files with 1-bit layers on devices: the kernels go with them, compiled for the processor and the ExecuTorch there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from arm64 import arm64_executorch as arm64_executorch
from binary_nets import ChainNet, PlainNet, binary_net

from edgekit import devices
from edgekit.devices import arm64_root, kernels, runner
from edgekit.devices.linux import File
from edgekit.errors import MissingTool
from edgekit.frozen import FrozenProgram
from edgekit.targets import executorch


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[FrozenProgram, torch.Tensor, Path]:
    program, x = binary_net(ChainNet)
    path = tmp_path_factory.mktemp("chain") / "model.pte"
    executorch.lower(program, path)
    return program, x, path


def same(name: str, case: tuple[FrozenProgram, torch.Tensor, Path]) -> None:
    """The outputs and every layer there are the frozen program's, by one start of the runner."""
    program, x, path = case
    device = devices.connect(name)
    tap = executorch.tap_file(path, program)
    assert tap.data is not None
    inputs = executorch.encode(path, [x.numpy()])
    _, ((outputs, _), (every, _)) = device.ask("run", [File(path, "executorch", inputs), File(tap.data, "executorch", inputs)])
    device.close()
    np.testing.assert_array_equal(executorch.decode(path, outputs)[0], program.run(x)[0].numpy())
    layers = tap.layers([y[:1] for y in every])
    forced = program.forced({k: torch.from_numpy(np.array(v)) for k, v in layers.items()}, x[:1])
    for layer in program.layers:
        if layer.op.startswith("bin"):
            np.testing.assert_array_equal(layers[layer.name], forced[layer.name].numpy(), layer.name)


def test_on_this_machine(chain: tuple[FrozenProgram, torch.Tensor, Path]) -> None:
    same("local", chain)


@pytest.mark.slow
@pytest.mark.usefixtures("arm64_executorch")
def test_on_an_emulated_arm64_linux(chain: tuple[FrozenProgram, torch.Tensor, Path]) -> None:
    same("qemu-aarch64:runtime=executorch", chain)
    machine = {"machine": "aarch64", "python": "3.11", "packages": {"executorch": arm64_root.WHEELS["executorch"].version}}
    made = kernels.library("a Pi", machine, [chain[2]])
    assert made is not None and made.read_bytes()[18] == 183  # e_machine of aarch64


def test_an_executorch_without_headers_here_is_named(chain: tuple[FrozenProgram, torch.Tensor, Path]) -> None:
    machine = {"machine": "aarch64", "python": "3.11", "packages": {"executorch": "0.3.0"}}
    with pytest.raises(MissingTool, match=r"a Pi: the file has 1-bit layers.*\(0\.3\.0\)"):
        kernels.library("a Pi", machine, [chain[2]])
    assert kernels.library("a Pi", machine, [chain[2].with_suffix(".tflite")]) is None


def test_the_runner_says_when_the_kernels_are_not_beside_the_file(tmp_path: Path) -> None:
    class NoKernels:
        def _get_operator_names(self) -> list[str]:
            return ["aten::add.out"]

    path = tmp_path / "model.pte"
    program, _ = binary_net(PlainNet)
    executorch.lower(program, path)
    with pytest.raises(runner.Refused, match=r"libedgekit_kernels\.so.*not beside it") as caught:
        runner._load_kernels(NoKernels(), str(path))
    assert caught.value.kind == "missing"
