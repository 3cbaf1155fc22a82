"""The parity contract on a fake target (planted faults, folder, stages), without any runtime."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_target import FakeTarget, altered
from nets import images, residual_net
from torch import nn

from edgekit import targets, verify
from edgekit.artifact import Mismatch
from edgekit.data import Data
from edgekit.errors import DataError, FormatError, InputError, MissingTool, ParityError
from edgekit.frozen import FrozenProgram, save
from edgekit.parity import Parity
from edgekit.recipe import Verify
from edgekit.stage_table import output_lsb
from edgekit.stages import (
    Evaluation,
    digest,
    evaluate,
    evaluate_stage,
    evaluation_set,
    load_stage,
    save_stage,
    spread,
)

ANY = Verify(max_accuracy_drop=None)


@pytest.fixture(scope="module")
def program() -> FrozenProgram:
    return residual_net()


@pytest.fixture
def samples(program: FrozenProgram) -> Evaluation:
    x = images(12)
    return Evaluation((x,), program.run(x)[0].argmax(1).numpy(), "accuracy", "test images")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.fake"
    path.write_bytes(b"x" * 321)
    return path


class Float(nn.Module):
    """Stands for the source model: answers like the program, a little off."""

    def __init__(self, program: FrozenProgram) -> None:
        super().__init__()
        self.program, self.conv = program, nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.conv(x)
        return self.program.run(x)[0] + 0.01


def test_an_equal_file_has_no_breach(program: FrozenProgram, samples: Evaluation, file: Path) -> None:
    found = verify.verify_artifact(program, FakeTarget(program), file, samples)
    assert found.ok and found.first_diverging is None and found.tap_lsb == 0.0
    assert found.stage.exact_frozen and found.stage.max_lsb == 0.0 and found.stage.agreement_frozen == 100.0
    assert found.stage.metric == 100.0 and found.stage.sqnr_frozen_db is None and found.stage.bytes == 321
    assert {x.layer for x in found.layers} == {x.name for x in program.layers if x.op != "dequantize"}
    assert all(x.within and x.max_lsb == 0 and x.elements > 0 for x in found.layers)


@pytest.mark.parametrize("layer", ["stem", "block.pw", "head"])
def test_one_altered_weight_shows_in_its_layer_only(program: FrozenProgram, samples: Evaluation, file: Path, layer: str) -> None:
    weight = program.layer(layer).args["weight"]
    index = tuple(0 for _ in weight.shape)
    by = 100 if int(weight[index]) < 0 else -100
    device = altered(program, f"{layer}.weight", index, by)
    found = verify.verify_artifact(program, FakeTarget(device), file, samples, settings=ANY)
    assert [x.layer for x in found.layers if not x.within] == [layer]
    assert found.first_diverging == layer and not found.ok
    assert f"layer {layer}" in found.breaches[0] and "first layer to diverge" in found.breaches[0]
    assert all(x.max_lsb == 0 for x in found.layers if x.layer != layer)


def test_a_fault_behind_an_untapped_layer_is_still_found(program: FrozenProgram, samples: Evaluation, file: Path) -> None:
    """Without an output of its own, the layer is judged through the next tapped one."""
    device = altered(program, "block.dw.bias", (3,), 40000)
    found = verify.verify_artifact(program, FakeTarget(device, silent=("block.dw",)), file, samples, settings=ANY)
    assert "block.dw" in found.untapped
    assert found.first_diverging == "block.pw" and not found.ok


def test_a_file_that_does_not_compute_its_taps(program: FrozenProgram, samples: Evaluation, file: Path) -> None:
    """Taps of a re-lowered program are clean where only the file is damaged: its outputs give it away."""
    target = FakeTarget(program)
    device = altered(program, "head.bias", (0,), 100000)
    target.run = FakeTarget(device).run  # type: ignore[method-assign]
    found = verify.verify_artifact(program, target, file, samples, settings=ANY)
    assert all(x.within for x in found.layers) and found.tap_lsb is not None and found.tap_lsb > 1
    assert "does not compute what its layers compute" in found.breaches[0]


def test_facts_read_back_are_breaches(program: FrozenProgram, samples: Evaluation, file: Path) -> None:
    fact = Mismatch("down", "zero point", "4", "3")
    found = verify.verify_artifact(program, FakeTarget(program, (fact,)), file, samples)
    assert found.breaches == ("fake: layer down: zero point is 4 in the file, 3 in the frozen program",)
    assert found.first_diverging == "down"


def test_nan_outputs_are_a_breach(program: FrozenProgram, samples: Evaluation, file: Path) -> None:
    target = FakeTarget(program)
    target.run = lambda *_, **__: [np.full((12, 10), np.nan, np.float32)]  # type: ignore[method-assign]
    found = verify.verify_artifact(program, target, file, samples, settings=ANY)
    assert not found.ok
    json.dumps(found.stage.__dict__, allow_nan=False)


def test_tolerance_and_accuracy_drop(program: FrozenProgram, samples: Evaluation, file: Path) -> None:
    device = altered(program, "head.bias", (0,), 100000)
    float_outputs = [program.run(*samples.inputs)[0].numpy()]
    loose = Verify(max_lsb=255, max_accuracy_drop=0.5)
    found = verify.verify_artifact(program, FakeTarget(device), file, samples, {"float": float_outputs}, loose)
    assert found.stage.metric is not None and found.stage.metric < 99
    assert len(found.breaches) == 1 and "accuracy fell by" in found.breaches[0] and "from float" in found.breaches[0]
    assert verify.verify_artifact(program, FakeTarget(device), file, samples, None, replace(loose, max_accuracy_drop=100)).ok


def test_what_compression_cost_is_no_files_fault(program: FrozenProgram, samples: Evaluation, file: Path) -> None:
    frozen = program.run(*samples.inputs)[0].numpy()
    labels = (frozen.argmax(1) + 1) % 10  # the frozen program is always wrong, the float model never
    wrong, float_outputs = replace(samples, labels=labels), [np.eye(10, dtype=np.float32)[labels]]
    settings = Verify(max_accuracy_drop=0.5)
    references = {"float": float_outputs, "frozen": [frozen]}
    assert verify.verify_artifact(program, FakeTarget(program), file, wrong, references, settings).ok
    (cost,) = verify._cost_of_compression(references, wrong, settings)
    assert cost.startswith("compression: accuracy fell by 100 from float (100) to the frozen program (0), 0.5 allowed")
    assert not verify._cost_of_compression({"float": [frozen], "frozen": [frozen]}, wrong, settings)


def test_outputs_of_another_shape(program: FrozenProgram, samples: Evaluation, file: Path) -> None:
    with pytest.raises(DataError, match=r"stage float: outputs of shapes \(12, 3\)"):
        verify.stage_row("float", [np.zeros((12, 3))], {"frozen": [np.zeros((12, 10))]}, samples, program)


def test_output_step_is_the_last_scale(program: FrozenProgram) -> None:
    assert output_lsb(program) == (0.25,)


def _run_folder(tmp_path: Path, program: FrozenProgram, monkeypatch: pytest.MonkeyPatch, device: FrozenProgram) -> Path:
    for module in (verify, targets):
        monkeypatch.setattr(module, "TARGETS", {"fake": "fake"})
        monkeypatch.setattr(module, "get", lambda name: FakeTarget(device))
    save(program, tmp_path / "frozen.pt2")
    (tmp_path / "model.fake").write_bytes(b"file")
    return tmp_path


def test_a_run_with_float_stage_and_data(
    tmp_path: Path, program: FrozenProgram, samples: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _run_folder(tmp_path, program, monkeypatch, program)
    data = Data(images(4), (samples.inputs[0], torch.from_numpy(samples.labels)))
    evaluation = evaluation_set(data)
    model = Float(program)
    save_stage(folder, evaluate_stage("float", model, evaluation))
    save_stage(folder, evaluate_stage("compressed", model, evaluation, simulated=True))
    seen: list[tuple[str, int, int]] = []
    parity = verify.verify_run(folder, data, progress=lambda *a: seen.append(a))
    assert parity.ok and [s.name for s in parity.stages] == ["float", "compressed", "frozen", "fake"]
    assert {what for what, _, _ in seen} == {"frozen program", "fake", "fake layers"}
    first, compressed, frozen, fake = parity.stages
    assert first.macs == 14 * 14 * 4 * 27 and first.bytes == 4 * (4 * 27 + 4) and compressed.bytes is None
    assert frozen.macs == sum(x.macs for x in program.layers) and fake.macs == frozen.macs
    assert first.exact_float and first.max_lsb == pytest.approx(0.04, rel=1e-4) and frozen.agreement_float == 100.0
    reference = program.run(*samples.inputs)[0].double()
    noise = 10 * np.log10(float(((reference + 0.01) ** 2).sum() / (0.01**2 * reference.numel())))
    assert frozen.sqnr_float_db == pytest.approx(noise, abs=0.01)
    assert Parity.load(folder / "parity.json") == parity
    text = json.loads((folder / "parity.json").read_text())
    assert text["ok"] is True and text["breaches"] == [] and text["metric"] == "accuracy"
    parity.require()


def test_a_run_alone_uses_the_stored_samples(
    tmp_path: Path, program: FrozenProgram, samples: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _run_folder(tmp_path, program, monkeypatch, program)
    save_stage(folder, evaluate_stage("float", Float(program), samples))
    parity = verify.verify_run(folder)
    assert parity.samples == 12 and parity.stages[0].metric == 100.0 and "data was not given" in parity.notes[0]


def test_a_run_without_data_or_stages(tmp_path: Path, program: FrozenProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = program.layer("down").args["weight"]
    device = altered(program, "down.weight", (0, 0, 0, 0), 100 if int(weight[0, 0, 0, 0]) < 0 else -100)
    folder = _run_folder(tmp_path, program, monkeypatch, device)
    parity = verify.verify_run(folder)
    assert "random inputs" in parity.notes[0] and parity.metric is None and parity.stages[0].name == "frozen"
    assert not parity.ok and parity.artifacts[0].first_diverging == "down"
    with pytest.raises(ParityError, match="layer down"):
        parity.require()


def test_other_data_is_refused(
    tmp_path: Path, program: FrozenProgram, samples: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _run_folder(tmp_path, program, monkeypatch, program)
    save_stage(folder, evaluate_stage("float", Float(program), samples))
    other = Data(images(4), (images(12, seed=5), torch.zeros(12, dtype=torch.long)))
    with pytest.raises(DataError, match="not those the float stage was recorded with"):
        verify.verify_run(folder, other)


def test_samples_are_spread_and_named(
    tmp_path: Path, program: FrozenProgram, samples: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _run_folder(tmp_path, program, monkeypatch, program)
    data = Data(images(4), (samples.inputs[0], torch.from_numpy(samples.labels)))
    parity = verify.verify_run(folder, data, Verify(samples=5, layer_samples=2))
    assert parity.samples == 5 and parity.layer_samples == 2 and "5 of 12" in parity.notes[0]
    assert spread(10, 3).tolist() == [0, 4, 9] and spread(3, None).tolist() == [0, 1, 2] and spread(2, 9).tolist() == [0, 1]


def test_without_labels_only_agreement(tmp_path: Path, program: FrozenProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _run_folder(tmp_path, program, monkeypatch, program)
    parity = verify.verify_run(folder, Data(images(6)))
    assert parity.metric is None and parity.samples == 6 and "calibration samples" in parity.notes[0]
    assert parity.stages[-1].agreement_frozen == 100.0 and parity.stages[-1].metric is None


def test_what_is_missing_is_said(tmp_path: Path, program: FrozenProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FormatError, match="no such file"):
        verify.verify_run(tmp_path)
    folder = _run_folder(tmp_path, program, monkeypatch, program)
    (folder / "model.fake").unlink()
    with pytest.raises(InputError, match="no model file to verify"):
        verify.verify_run(folder, Data(images(2)))
    with pytest.raises(InputError, match=r"no model\.fake"):
        verify.verify_run(folder, Data(images(2)), targets=["fake"])
    (folder / "model.fake").write_bytes(b"")
    monkeypatch.setattr(FakeTarget, "available", lambda self: "fakelib")
    with pytest.raises(MissingTool, match="fakelib"):
        verify.verify_run(folder, Data(images(2)))


def test_a_stage_file_round_trips_and_repeats(tmp_path: Path, program: FrozenProgram, samples: Evaluation) -> None:
    stage = evaluate_stage("float", Float(program), samples)
    path = save_stage(tmp_path, stage)
    first = path.read_bytes()
    found = load_stage(path)
    assert np.array_equal(found.outputs[0], stage.outputs[0]) and np.array_equal(found.inputs[0], samples.inputs[0].numpy())
    assert (found.digest, found.macs, found.bytes, found.metric) == (digest(samples.inputs), stage.macs, stage.bytes, "accuracy")
    torch.manual_seed(0)
    assert save_stage(tmp_path, stage).read_bytes() == first
    path.write_bytes(first[: len(first) // 2])
    with pytest.raises(FormatError, match="stage_float"):
        load_stage(path)


def test_evaluate_matches_one_call_and_keeps_the_mode() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)).train()
    x = images(70)
    found = evaluate(model, (x,), batch_size=32)
    assert model.training
    with torch.no_grad():
        assert np.allclose(found[0], model.eval()(x).numpy(), atol=1e-6)


def test_a_damaged_parity_file(tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    with pytest.raises(FormatError, match="edgekit verify"):
        Parity.load(path)
    path.write_text("{")
    with pytest.raises(FormatError, match="damaged"):
        Parity.load(path)
    path.write_text('{"format": 99}')
    with pytest.raises(FormatError, match=r"newer|99"):
        Parity.load(path)
