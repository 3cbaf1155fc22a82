"""Files on the emulated arm64 Linux: outputs and layers beside the frozen program's, instructions, and what goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from arm64 import arm64 as arm64
from arm64 import arm64_executorch as arm64_executorch
from device_files import lowered
from nets import ResidualNet, images, residual_net

from edgekit.devices import connect, emulated_linux
from edgekit.errors import FormatError
from edgekit.frozen import freeze_module
from edgekit.profile import Settings
from edgekit.targets import get

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("arm64")]
OLD = "qemu-aarch64:runtime=tflite-runtime"
X = images(4).numpy()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lowered(tmp_path_factory.mktemp("arm64"), "tflite")


def test_it_is_an_arm64_linux_without_this_machines_packages(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import importlib.util as u, os, platform, struct, sys, numpy\n"
        "print(platform.machine(), struct.calcsize('P'), sys.version_info[:2], numpy.__version__, u.find_spec('torchao'))\n"
        "print([l for l in open('/proc/cpuinfo') if 'part' in l][0].split()[-1], os.environ.get('SECRET'), sys.argv[1:])\n"
        "sys.exit(7)\n"
    )
    command = ["-m", "edgekit.devices.emulated_linux", "--cpu", "cortex-a72", str(script), "a b", "--c"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env={**os.environ, "SECRET": "x"})
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines() == ["aarch64 8 (3, 11) 1.26.4 None", "0xd08 None ['a b', '--c']"]


def test_outputs_and_layers_are_the_frozen_programs(model: Path) -> None:
    program, device = residual_net(), connect(OLD)
    told: list[tuple[int, int]] = []
    (found,) = device.run(model, "tflite", [X], progress=lambda done, total: told.append((done, total)))
    (wanted,) = program.run(images(4))
    step = program.layer("head").out_scale
    assert step and found.shape == wanted.shape and told[-1] == (4, 4)
    # its builtin kernels round twice: a step in a layer, two or three at the end of a network
    assert np.abs(found - wanted.numpy()).max() <= 3 * step + 1e-6
    taps = device.taps(model, "tflite", program, [X])
    assert len(taps) >= len(program.layers) // 2
    forced = program.forced({name: torch.from_numpy(value) for name, value in taps.items()}, images(4)[:1])
    for name, value in taps.items():
        assert np.abs(value.astype(int) - forced[name].numpy().astype(int)).max() <= 1, name


def test_an_altered_weight_shows_in_its_layer(model: Path, tmp_path: Path) -> None:
    program, data = residual_net(), bytearray(model.read_bytes())
    weight = program.layer("head").args["weight"].numpy().tobytes()
    at = data.index(weight)
    data[at : at + len(weight)] = bytes(len(weight))
    altered = tmp_path / "model.tflite"
    altered.write_bytes(data)
    taps = connect(OLD).taps(altered, "tflite", program, [X])
    forced = program.forced({name: torch.from_numpy(value) for name, value in taps.items()}, images(4)[:1])
    worst = {name: int(np.abs(v.astype(int) - forced[name].numpy().astype(int)).max()) for name, v in taps.items()}
    assert worst.pop("head") > 1 and max(worst.values()) <= 1


def test_instructions_are_counted_and_are_not_time(model: Path) -> None:
    program = residual_net()
    first = connect(OLD).profile(model, "tflite", program, Settings(num_runs=5), [X])
    again = connect(OLD).profile(model, "tflite", program, Settings(num_runs=5), [X])
    assert first.unit == "instructions" and first.macs == sum(x.macs for x in program.layers)
    assert abs(first.total - again.total) < 0.01 * first.total
    # an int8 multiply-accumulate with NEON takes well under ten instructions, and 16 lanes never do more than 32 of them in one
    assert first.macs / 32 < first.total < 10 * first.macs + 100_000
    assert first.figures["least_instructions"] > 0.9 * first.total
    assert not any("second" in name for name in first.figures) and first.figures["load_instructions"] > first.total
    assert any("not time" in note for note in first.notes)


def test_an_older_processor_computes_the_same_integers(model: Path) -> None:
    """The A53 has no dot product, so other kernels run on it."""
    device = connect(f"{OLD}&cpu=cortex-a53")
    assert device.name == "qemu-aarch64:cpu=cortex-a53&runtime=tflite-runtime" and device.cpu == "cortex-a53"
    (old,) = device.run(model, "tflite", [X])
    (new,) = connect(OLD).run(model, "tflite", [X])
    assert np.array_equal(old, new)


class Ungated(ResidualNet):
    """Without the sigmoid, which a .pte computes in float, and without means halfway between two steps, which go either way."""

    def __init__(self) -> None:
        super().__init__()
        self.mean.attributes["out_scale"] = self.flatten.attributes["scale"] = self.head.attributes["in_scale"] = 0.0213

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(self.pad(self.stem(self.quantize(x))))
        x = self.add(x, self.block.pw(self.block.dw(x)))
        x = self.cat(self.maxpool(x), self.avgpool(x))
        return self.dequantize(self.head(self.flatten(self.mean(x))))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("arm64_executorch")
def test_executorch_computes_the_hosts_integers_there(tmp_path: Path) -> None:
    """Outputs and layers by one start, of which importing torch is nearly all."""
    torch.manual_seed(0)
    program, module, path = freeze_module(Ungated(), (images(1),), name="ungated"), get("executorch"), tmp_path / "model.pte"
    module.lower(program, path)
    tap = module.tap_file(path, program)
    inputs = module.encode(path, [X])
    sent = [emulated_linux.File(path, "executorch", inputs), emulated_linux.File(tap.data, "executorch", inputs)]
    _, ((outputs, _), (everything, _)) = connect("qemu-aarch64:runtime=executorch").ask("run", sent)
    (there,), (here,) = module.decode(path, outputs), module.run(path, [X])
    assert len(np.unique(here)) > 10 and np.array_equal(there, here)
    layers = tap.layers([y[:1] for y in everything])
    on_host = module.taps(path, program, [X[:1]])
    assert {"stem", "down", "block.dw", "block.pw", "add", "cat", "head"} <= layers.keys()
    assert all(np.array_equal(layers[name], on_host[name]) for name in layers) and layers.keys() == on_host.keys()
    forced = program.forced({name: torch.from_numpy(value) for name, value in layers.items()}, images(4)[:1])
    worst = {name: int(np.abs(v.astype(int) - forced[name].numpy().astype(int)).max()) for name, v in layers.items()}
    assert worst.pop("avgpool") <= 1 and not any(worst.values())  # XNNPACK computes that pooling in float


def test_a_damaged_file_is_refused_in_one_sentence(model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "model.tflite"
    damaged.write_bytes(model.read_bytes()[:-200])
    device = connect(OLD)
    inputs = get("tflite").encode(model, [X])
    with pytest.raises(FormatError, match=r"qemu-aarch64.*tflite-runtime 2\.14\.0 refuses"):
        device.ask("run", [emulated_linux.File(damaged, "tflite", inputs)])
