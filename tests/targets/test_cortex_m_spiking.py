"""Integer spiking programs in firmware: the frozen program's spikes and sums to the last bit, on each kernel set."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spiking_nets import conv_program, dense_program, recurrent_program, residual_program
from torch import Tensor, nn

from edgekit.compress.spiking.confidence import Exit, replay
from edgekit.compress.spiking.integer import integer_program
from edgekit.errors import InputError, UnsupportedError
from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.targets import cortex_m, get
from edgekit.targets.cortex_m.confidence import Rule, rule_of, sure
from edgekit.targets.cortex_m.early_exit import run_early
from edgekit.targets.cortex_m.preparation import prepare, simulate

pytestmark = pytest.mark.slow

needs_tools = pytest.mark.skipif(cortex_m.M4.available() is not None, reason="needs arm-none-eabi-gcc and qemu-system-arm")
STEPS = 6


def _synapse(outputs: int, *reduced: int, spikes_max: int = 1, **window: Any) -> FrozenOp:
    span = 20000 // (int(np.prod(reduced)) * spikes_max * 2)
    buffers = {
        "weight": torch.randint(-min(span, 127), min(span, 127) + 1, (outputs, *reduced), dtype=torch.int8),
        "weight_scale": torch.ones(outputs),
        "bias": torch.randint(-50, 50, (outputs,), dtype=torch.int16),
    }
    op = "spiking_conv2d" if window else "spiking_linear"
    return FrozenOp(op, 1, buffers, **window, spikes_max=spikes_max, weight_bits=8)


def _neurons(shape: tuple[int, ...], decay: str, reset: str = "subtract", max_spikes: int = 1) -> FrozenOp:
    decays = {"none": [32767], "all": [28000, 31000], "some": [20000, 32767]}[decay]
    picked = torch.tensor(decays, dtype=torch.int16)[torch.randint(0, len(decays), shape)]
    buffers = {
        "threshold": torch.randint(100, 400, shape, dtype=torch.int16),
        "decay": picked,
        "v_init": torch.randint(-100, 100, shape, dtype=torch.int16),
    }
    return FrozenOp("qlif_sequence", 1, buffers, steps=STEPS, reset=reset, max_spikes=max_spikes)


class Wide(nn.Module):
    """Layers wider than the kernels' blocks, with what they leave over; every decay, reset and count of spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.fold = FrozenOp("fold_steps", 1, {})
        self.quantize = FrozenOp("quantize", 1, {}, scale=1.0, zero_point=0, bits=3)
        self.fc1, self.n1 = _synapse(70, 45, spikes_max=3), _neurons((70,), "all")
        self.fc2, self.n2 = _synapse(39, 70), _neurons((39,), "some", "zero")
        self.fc3, self.n3 = _synapse(64, 39), _neurons((64,), "none", max_spikes=4)
        self.fc4, self.sum = _synapse(5, 64, spikes_max=4), FrozenOp("qaccumulate", 1, {}, steps=STEPS)
        self.dequantize = FrozenOp("dequantize", 1, {}, scale=0.01, zero_point=0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n3(self.fc3(self.n2(self.fc2(self.n1(self.fc1(self.quantize(self.fold(x))))))))
        return self.dequantize(self.sum(self.fc4(x)))


class Ending(nn.Module):
    """Ends in neurons, as most NIR files do: what is summed are spikes, not currents."""

    def __init__(self) -> None:
        super().__init__()
        self.fold = FrozenOp("fold_steps", 1, {})
        self.quantize = FrozenOp("quantize", 1, {}, scale=1.0, zero_point=0, bits=2)
        self.fc1, self.n1 = _synapse(20, 12), _neurons((20,), "all")
        self.fc2, self.n2 = _synapse(5, 20), _neurons((5,), "some", "zero", max_spikes=3)
        self.sum = FrozenOp("qaccumulate", 1, {}, steps=STEPS)
        self.dequantize = FrozenOp("dequantize", 1, {}, scale=1.0, zero_point=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequantize(self.sum(self.n2(self.fc2(self.n1(self.fc1(self.quantize(self.fold(x))))))))


class Images(nn.Module):
    """Grouped and strided convolutions of 36 and 32 channels on spikes, and a flattened image."""

    def __init__(self) -> None:
        super().__init__()
        window = {"padding": [1, 1], "dilation": [1, 1]}
        self.fold = FrozenOp("fold_steps", 1, {})
        self.quantize = FrozenOp("quantize", 1, {}, scale=1.0, zero_point=0, bits=2)
        self.c1, self.n1 = _synapse(36, 3, 3, 3, stride=[1, 1], groups=1, **window), _neurons((36, 1, 1), "all")
        self.c2, self.n2 = _synapse(64, 18, 3, 3, stride=[2, 2], groups=2, **window), _neurons((64, 3, 3), "some")
        self.flatten = FrozenOp("qreshape", 1, {}, shape=[STEPS, 576], scale=1.0, zero_point=0)
        self.fc, self.sum = _synapse(4, 576), FrozenOp("qaccumulate", 1, {}, steps=STEPS)
        self.dequantize = FrozenOp("dequantize", 1, {}, scale=0.01, zero_point=0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n2(self.c2(self.n1(self.c1(self.quantize(self.fold(x))))))
        return self.dequantize(self.sum(self.fc(self.flatten(x))))


def _made(name: str) -> tuple[FrozenProgram, Tensor]:
    torch.manual_seed(0)
    if name == "wide":
        x = torch.poisson(torch.full((2, STEPS, 45), 0.3)).clamp(-4, 3)
        x[1, :, ::7] = -2  # what is no count is added up all the same
        return freeze_module(Wide(), (x,), name="wide"), x
    if name == "ending":
        x = (torch.rand(2, STEPS, 12) < 0.4).float()
        return freeze_module(Ending(), (x,), name="ending"), x
    if name == "images":
        x = (torch.rand(2, STEPS, 3, 6, 5) < 0.3).float()
        return freeze_module(Images(), (x,), name="images"), x
    if name == "residual":
        program, x = residual_program()
    elif name == "recurrent":
        program, x = recurrent_program("lif", v_threshold=0.7)
    elif name == "recurrent images":  # constant currents of images, synapses that fade, several spikes
        program, x = recurrent_program("cuba_lif", image=True, v_threshold=0.3, max_spikes=2)
    elif name == "cuba":
        program, x = dense_program("cuba_lif", v_threshold=0.7, v_init=0.25)
    elif name == "converted":
        program, x = conv_program("lif", v_threshold=0.15, v_init=0.1)
    else:
        program, x = dense_program("if", reset="zero", v_init=0.25)
    return integer_program(program, (x,))[0], x[:2]


NETS = ("wide", "ending", "images", "residual", "converted", "recurrent", "recurrent images", "cuba", "dense")


@pytest.mark.parametrize("name", NETS)
def test_the_reference_is_the_frozen_program(name: str) -> None:
    program, x = _made(name)
    firmware = prepare(program, "portable")
    for i in range(len(x)):
        taps, (output,) = simulate(firmware, [x[i : i + 1].numpy()])
        expected = program.trace(x[i : i + 1])
        assert {"spiking", "recurrent" if "recurrent" in name else "neurons"} <= {s.kind for s in firmware.steps}
        assert len(taps) >= 5
        for key, values in taps.items():
            assert np.array_equal(expected[key].numpy(), values), key
        assert np.array_equal(output, program.run(x[i : i + 1])[0].numpy())


@needs_tools
@pytest.mark.parametrize("core", [pytest.param("cortex-m3", marks=pytest.mark.slow), "cortex-m4", "cortex-m55"])
@pytest.mark.parametrize("name", NETS[:8])
def test_firmware_gives_the_spikes_of_the_frozen_program(name: str, core: str, tmp_path: Path) -> None:
    program, x = _made(name)
    target = get(core)
    artifact = target.lower(program, tmp_path / f"model{target.SUFFIX}")
    path, notes = artifact.path, {c.layer: c.note for c in artifact.coverage}
    repeated = {"converted": "conv1_steps", "residual": "stem_steps", "recurrent images": "fc1_steps"}
    assert "each step" in notes[repeated[name]] if name in repeated else "order of the input" in str(notes)
    (found,) = target.run(path, [x.numpy()])
    assert np.array_equal(found, program.run(x)[0].numpy())
    taps, expected = target.taps(path, program, [x[:1].numpy()]), program.trace(x[:1])
    assert len(taps) >= 5 and [k for k, v in taps.items() if not np.array_equal(expected[k].numpy(), v)] == []
    spikes = taps["spike1" if "spike1" in taps else "n1"]
    assert spikes.dtype == np.int8 and 0.01 < (spikes > 0).mean() < 0.9


FAULTS = {
    "flipped weight": (r"(model_\d+_weights\[\d+\] EK_WEIGHTS = \{\s+)-?\d+", r"\g<1>55", "weights[0]"),
    "wrong decay": (r"(model_\d+_decay\[\d+\] EK_WEIGHTS = \{\s+)-?\d+", r"\g<1>1234", "decay[0]"),
    "other reset": (r"(const ek_neurons .*?\.zero = )0", r"\g<1>1", "ek_neurons.zero"),
}


@needs_tools
def test_a_planted_fault_of_spiking_firmware_is_read_back_and_named(tmp_path: Path) -> None:
    program, _ = _made("converted")
    target = get("cortex-m4")
    path = target.lower(program, tmp_path / f"model{target.SUFFIX}").path
    source = path if path.suffix == ".c" else path / "model.c"
    sound = source.read_text()
    layers = {"weights[0]": "conv1", "decay[0]": "spike1", "ek_neurons.zero": "spike1"}
    for pattern, text, field in FAULTS.values():
        source.write_text(re.sub(pattern, text, sound, count=1, flags=re.S))
        assert source.read_text() != sound
        found = target.readback(path, program)
        assert [m.layer for m in found] == [layers[field]] and field in found[0].field
    source.write_text(sound)
    assert target.readback(path, program) == []


@needs_tools
@pytest.mark.parametrize(
    ("name", "core"),
    [
        ("residual", "cortex-m4"),
        ("dense", "cortex-m3"),
        ("ending", "cortex-m4"),
        ("wide", "cortex-m55"),
        ("recurrent", "cortex-m55"),
        ("cuba", "cortex-m3"),
        ("recurrent images", "cortex-m4"),
    ],
)
def test_one_step_a_call_gives_what_all_steps_give(name: str, core: str, tmp_path: Path) -> None:
    program, x = _made(name)
    target = get(core)
    artifact = target.lower(program, tmp_path / f"model{target.SUFFIX}", target.Options(stream=True))
    whole = prepare(program, "portable")
    assert artifact.memory["arena"] < (0.6 if name in ("residual", "dense", "wide") else 0.9) * whole.arena
    (found,) = target.run(artifact.path, [x.numpy()])
    assert np.array_equal(found, program.run(x)[0].numpy())  # two samples: the state starts anew
    taps, expected = target.taps(artifact.path, program, [x[:1].numpy()]), program.trace(x[:1])
    assert taps.keys() == simulate(whole, [x[:1].numpy()])[0].keys()
    assert [k for k, v in taps.items() if not np.array_equal(expected[k].numpy(), v)] == []
    assert target.readback(artifact.path, program) == []
    text = artifact.path.read_text()
    assert ("ek_recurrent_step_s16" if "recurrent" in name else "ek_neurons_step_s16") in text and "model_run" not in text


@needs_tools
@pytest.mark.parametrize(("name", "core", "threshold"), [("residual", "cortex-m4", 0.3), ("wide", "cortex-m3", 0.6)])
def test_firmware_stops_where_the_frozen_program_is_sure(name: str, core: str, threshold: float, tmp_path: Path) -> None:
    program, x = _made(name)
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 1.5
    x = images if name == "residual" else torch.cat([x, x.flip(2)])
    target, temperature = get(core), 0.5 if name == "residual" else 20.0
    options = target.Options(stream=True, exit_threshold=threshold, exit_temperature=temperature)
    if name == "residual":  # as `early_exit` of a recipe chose it
        program, options = replace(program, exit=Exit(temperature, threshold)), target.Options(stream=True)
    artifact = target.lower(program, tmp_path / f"model{target.SUFFIX}", options)
    outputs, steps = run_early(artifact.path, [x.numpy()])
    rule = rule_of(prepare(program, "portable", True), temperature, threshold)
    end = next(layer for layer in program.layers if layer.op == "qaccumulate")
    scale = np.float32(program.layers[-1].args["scale"])
    real = []
    for i in range(len(x)):
        sums = program.trace(x[i : i + 1])[end.inputs[0]].int().cumsum(0).numpy()
        stops = np.flatnonzero(sure(rule, sums))
        taken = int(stops[0]) + 1 if len(stops) else len(sums)
        assert steps[i] == taken
        total = (sums[taken - 1].astype(np.float32) * scale).astype(np.float64)
        assert np.array_equal(outputs[i], (total * (len(sums) / taken)).astype(np.float32))
        real.append(torch.from_numpy(sums * float(scale) * len(sums)))
    taken, _ = replay(torch.stack(real, 1), Exit(temperature, threshold))  # the rule in floats, of the same sums
    assert taken.tolist() == steps.tolist() and len(set(steps)) > 2
    assert np.array_equal(target.run(artifact.path, [x.numpy()])[0], program.run(x)[0].numpy())  # verify sees all steps


def test_integer_confidence_is_softmax() -> None:
    rng = np.random.default_rng(0)
    sums = rng.integers(-(2**31), 2**31, (4000, 10)) // 2 ** rng.integers(0, 31, (4000, 1))
    seen = 0
    for temperature, threshold in ((3.0, 0.9), (40.0, 0.5), (1.0, 0.99), (5.0, 1.01)):
        scale = round(0.01 / temperature * np.log2(np.e) * 2**24)
        found = sure(Rule(0, 10, scale, int(np.ceil(2**24 / threshold))), sums)
        shifted = (sums - sums.max(1, keepdims=True)) * 0.01 / temperature
        confidence = 1 / np.exp(shifted).sum(1)
        clear = np.abs(confidence - threshold) > 1e-3
        assert np.array_equal(found[clear], (confidence > threshold)[clear]) and clear.mean() > 0.98
        seen += int(found.sum())
    assert 1000 < seen < 11000


def test_early_exit_needs_a_stream_and_a_sum(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected positive numbers, and stream: true"):
        get("cortex-m4").Options(exit_threshold=0.5)
    with pytest.raises(UnsupportedError, match="needs stream: true and one output that is summed"):
        rule_of(prepare(_made("dense")[0], "portable", True), 1.0, 0.5)
    with pytest.raises(UnsupportedError, match="early exit takes 2 to 255 outputs and a scale"):
        rule_of(prepare(_made("residual")[0], "portable", True), 1e-12, 0.5)


def test_only_spiking_programs_stream() -> None:
    layer = nn.Sequential(
        FrozenOp("quantize", 1, {}, scale=1.0, zero_point=0, bits=8), FrozenOp("dequantize", 1, {}, scale=1.0, zero_point=0)
    )
    program = freeze_module(layer, (torch.zeros(1, 4),), name="plain")
    with pytest.raises(UnsupportedError, match="plain has no integer neurons; leave out `stream`"):
        prepare(program, "portable", stream=True)


def test_float_neurons_are_refused() -> None:
    program, _ = dense_program("lif")
    with pytest.raises(UnsupportedError, match=r"layer spike1 .*float .lif_sequence.*weights: int8"):
        prepare(program, "portable")
