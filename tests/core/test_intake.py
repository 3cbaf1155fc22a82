"""What a hostile or unlucky user hands in: each mistake is one sentence, before any work; nothing doubtful passes silently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_recipe
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgekit import intake, pipeline, runfolder
from edgekit import recipe as recipes
from edgekit.compress import apply
from edgekit.compress.capture import capture
from edgekit.compress.ptq import PTQ, quantize_model
from edgekit.data import Data, batches, sample_inputs
from edgekit.errors import DataError, EdgekitError, FormatError, InputError, ModelError, cause
from edgekit.metrics import score
from edgekit.recipe import Block
from edgekit.stages import evaluate, evaluation_set

X = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(64) % 3
LINE = r"\(test_intake.py:\d+\)"


class Net(nn.Module):
    """A small network whose parts tests replace."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))


class Changed(Net):
    """Net with its answer changed."""

    def __init__(self, change: Callable[[nn.Module, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        self.change = change
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.change(self, Net.forward(self, x))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(3))


def not_finite() -> nn.Module:
    model = Net()
    model.conv.weight.data[0, 0, 0, 0] = torch.nan
    return model


def no_eval() -> nn.Module:
    model = Net()

    def train(mode: bool = True) -> nn.Module:
        raise RuntimeError("training only")

    model.train = train  # type: ignore[method-assign]
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "float64": (lambda: Net().double(), "conv.weight is float64, edgekit works on float32 models"),
    "half": (lambda: Net().half(), "conv.weight is float16"),
    "bfloat16": (lambda: Net().bfloat16(), "conv.weight is bfloat16"),
    "lazy": (lazy, "0.weight has no data yet"),
    "meta": (lambda: Net().to("meta"), "conv.weight has no data yet"),
    "nan": (not_finite, "conv.weight holds 1 NaN or Inf values of 36"),
    "no evaluation mode": (no_eval, f"cannot be put into evaluation mode on the CPU: RuntimeError: training only {LINE}"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_used_is_named(name: str) -> None:
    make, words = MODELS[name]
    with pytest.raises(ModelError, match=f"^m.py:build.*{words}|{words}"):
        intake.check_model(make(), "m.py:build")


def test_a_usable_model_is_left_as_it_is() -> None:
    model = Net().train()
    assert intake.check_model(model, "m") is model and not model.training


def training_only(model: nn.Module, y: Tensor) -> Tensor:
    assert model.training, "only for training"
    return y


SAMPLES: dict[str, tuple[Callable[[nn.Module, Tensor], Any], Tensor, str]] = {
    "training only": (training_only, X, rf"float32 \(1, 1, 8, 8\): AssertionError: only for training {LINE}"),
    "wrong size": (lambda m, y: y, torch.zeros(2, 1, 9, 16), r"float32 \(1, 1, 9, 16\): RuntimeError: mat1 and mat2 shapes"),
    "integers": (lambda m, y: y, torch.zeros(2, 1, 8, 8).byte(), r"uint8 \(1, 1, 8, 8\): RuntimeError: Input type"),
    "nothing": (lambda m, y: None, X, "returns nothing; expected a Tensor"),
    "a number": (lambda m, y: (y, 3), X, "returns Tensor, int; expected a Tensor"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_that_the_model_does_not_take_is_named(name: str) -> None:
    change, x, words = SAMPLES[name]
    with pytest.raises(ModelError, match=words):
        intake.check_sample(Changed(change).eval(), (x[:1],), "the model")


def test_a_dictionary_of_outputs_is_taken_in_its_order() -> None:
    model = Changed(lambda m, y: {"scores": y, "rest": (y * 2, [y + 1])}).eval()
    found = evaluate(model, (X[:5],))
    program = quantize_model(model, Data(X))
    for mine, y in zip(program.run(X[:5]), found, strict=True):
        assert mine.shape == y.shape and float((mine - torch.from_numpy(y)).abs().max()) < 0.1


class NoInput(nn.Module):
    def forward(self) -> Tensor:
        return torch.zeros(1)


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


def test_inputs_are_counted() -> None:
    with pytest.raises(ModelError, match="takes no input"):
        sample_inputs(NoInput(), Data(X))
    with pytest.raises(DataError, match="a batch has 1 tensors, the model takes 2 inputs"):
        sample_inputs(Two(), Data(X))


TRAINING: dict[str, tuple[Callable[[nn.Module, Tensor], Any], str]] = {
    "dropout": (lambda m, y: F.dropout(y, 0.5, training=True), r"test_intake.py:\d+: native_dropout is random"),
    "noise": (lambda m, y: y + torch.randn_like(y), r"test_intake.py:\d+: randn_like is random"),
    "batch norm": (
        lambda m, y: m.get_submodule("norm")(y),
        r"test_intake.py:\d+: layer norm normalizes by the statistics of the",
    ),
}


@pytest.mark.parametrize("name", TRAINING)
def test_what_depends_on_chance_or_on_the_batch_is_refused(name: str) -> None:
    change, words = TRAINING[name]
    with pytest.raises(ModelError, match=words):
        capture(Changed(change, norm=nn.BatchNorm1d(3, track_running_stats=False)), (X[:1],))


def test_a_layer_that_never_runs_is_named() -> None:
    made = apply(Changed(lambda m, y: y, aux=nn.Linear(4, 4)), [Block("ptq", PTQ())], Data(X))
    assert made.record["warnings"] == ["layers that have weights and never run are not in the program: aux"]
    assert not capture(Net(), (X[:1],)).unused


DOUBTFUL: dict[str, tuple[Tensor, list[str]]] = {
    "fine": (X, []),
    "few": (X[:3], ["calibration: 3 sample(s) only, ranges from so few are often too narrow; give 100 or more"]),
    "one again and again": (X[:1].expand(64, -1, -1, -1), ["calibration: all 64 samples are equal; give samples that differ"]),
    "zeros": (
        torch.zeros(64, 1, 8, 8),
        ["calibration: all 64 samples are equal; give samples that differ", "input x: it was constant (0) during calibration"],
    ),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_degenerate_calibration_data_is_a_warning(name: str) -> None:
    x, words = DOUBTFUL[name]
    assert apply(Net(), [Block("ptq", PTQ())], Data(x)).record["warnings"] == words


def test_a_layer_that_always_gives_zero_is_a_warning() -> None:
    model = Net()
    nn.init.constant_(model.conv.bias, -100.0)  # type: ignore[arg-type]
    found = apply(model, [Block("ptq", PTQ())], Data(X)).record["warnings"]
    assert found == ["layer relu: its output was constant (0) during calibration"]


@pytest.mark.parametrize(
    ("factor", "words"),
    [(1.0, ""), (1000.0, "99.* % of the evaluation values are outside"), (0.01, "use a small part of the range")],
)
def test_evaluation_far_outside_of_calibration_is_a_warning(factor: float, words: str) -> None:
    data = Data(X, (X * factor, Y))
    found = intake.range_warnings(quantize_model(Net(), data), evaluation_set(data))
    assert len(found) == bool(words)
    if words:
        with pytest.raises(AssertionError, match=f"input x.*{words}.*calibration gave -.*calibrate on samples like"):
            raise AssertionError(found[0])


EVALUATIONS: dict[str, tuple[Any, str]] = {
    "no pair": (X, "found Tensor; expected a pair"),
    "three": ((X, Y, Y), "found 3 values; expected a pair"),
    "fewer labels": ((X, Y[:9]), "64 inputs and 9 labels"),
    "words": ((X, ["cat"] * 64), "must be tensors or arrays"),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_that_is_no_pair_is_named(name: str) -> None:
    evaluation, words = EVALUATIONS[name]
    with pytest.raises(DataError, match=words):
        Data(X, evaluation)


def test_an_evaluation_may_be_a_loader() -> None:
    wanted = evaluation_set(Data(X, (X, Y)))
    for source in (DataLoader(TensorDataset(X, Y), 7), TensorDataset(X, Y), lambda: [(X[:9], Y[:9]), (X[9:], Y[9:])]):
        found = evaluation_set(Data(X, source))
        assert torch.equal(found.inputs[0], wanted.inputs[0])
        assert found.labels is not None and wanted.labels is not None and (found.labels == wanted.labels).all()
    assert evaluation_set(Data(X, (X, None))).labels is None


LABELS: dict[str, tuple[Any, str]] = {
    "too large": (Y + 1, "go from 1 to 3, the model has 3 outputs; expected classes 0 to 2"),
    "negative": (Y - 1, "go from -1 to 1"),
    "one-hot": (F.one_hot(Y), "expected integer classes of shape"),
    "real": (Y.float(), "expected integer classes of shape"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_are_no_classes_are_named(name: str) -> None:
    labels, words = LABELS[name]
    with pytest.raises(DataError, match=words):
        score("accuracy", torch.eye(3).repeat(22, 1)[:64].numpy(), labels.numpy())


def test_a_metric_that_fails_is_named() -> None:
    with pytest.raises(DataError, match=r"data\.metric is 'f1'; expected 'accuracy' or a function"):
        Data(X, metric="f1")
    for metric, words in ((lambda a, b: 1 / 0, f"ZeroDivisionError: division by zero {LINE}"), (lambda a, b: "x", "ValueError")):
        with pytest.raises(DataError, match=f"<lambda> failed on outputs of shape .*{words}"):
            score(metric, X.numpy(), Y.numpy())  # type: ignore[arg-type]


def test_a_source_that_fails_is_named() -> None:
    def broken() -> Any:
        yield X
        raise PermissionError(13, "no entry")

    with pytest.raises(DataError, match=f"training: the source failed after 1 batches: PermissionError: .*no entry {LINE}"):
        list(batches(broken, what="training"))
    with pytest.raises(DataError, match="a generator can be read only once; give a function"):
        list(batches((x for x in X), what="training"))


def test_a_model_that_fails_on_evaluation_samples_is_named() -> None:
    class Table(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.eye(4)[x]

    with pytest.raises(ModelError, match=f"fails on evaluation samples 64 to 69: IndexError: .* {LINE}"):
        evaluate(Table(), (torch.cat([torch.zeros(64), torch.full((6,), 9)]).long(),))


def test_the_cause_names_the_last_line_of_the_users_own_code() -> None:
    try:
        torch.zeros(2) @ torch.zeros(3)
    except RuntimeError as error:
        assert cause(error).endswith(f"(test_intake.py:{error.__traceback__.tb_lineno})")  # type: ignore[union-attr]


def test_cuda_that_is_not_there_or_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    recipe = tiny_recipe.write(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="torch sees no CUDA device; use cpu"):
        pipeline.compress(recipe, tmp_path / "run", device="cuda")
    trained = tmp_path / "trained.yaml"
    trained.write_text(recipe.read_text().replace("ptq: {observer: minmax}", "qat: {device: cuda}"))
    with pytest.raises(InputError, match="torch sees no CUDA device; use cpu"):
        pipeline.compress(trained, tmp_path / "run")
    with monkeypatch.context() as there:
        there.setattr(torch.cuda, "is_available", lambda: True)
        (note,) = pipeline.device_notes(recipes.load(recipe), "cuda")
        assert (
            note
            == "device cuda is not used: only qat, repair, spiking training and the methods adaround and brecq of ptq learn on it"
        )
        assert pipeline.device_notes(recipes.load(trained), "cuda") == []
    with pytest.raises(EdgekitError, match="device 'tpu': expected cpu or cuda"):
        pipeline.compress(recipe, tmp_path / "run", device="tpu")
    with pytest.raises(EdgekitError, match="seed 4294967296: expected 0 to 4294967295"):
        pipeline.compress(recipe, tmp_path / "run", seed=2**32)


@pytest.mark.parametrize(
    ("path", "words"),
    [("/proc/x", "no folder can be made there"), ("n" * 300, "its name is too long"), ("/dev/null/x", "is a file")],
)
def test_a_place_where_no_run_can_be_is_named(path: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"cannot write .*{words}"), runfolder.staged(tmp_path / path):
        raise AssertionError("nothing may run")


def test_a_file_that_cannot_be_read_does_not_hide_what_is_wrong_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    pipeline.run(tiny_recipe.write(tmp_path), tmp_path / "run")
    (tmp_path / "run" / "model.tflite").write_bytes(b"no flatbuffer at all")
    outcome = pipeline.verify(tmp_path / "run")
    assert outcome.parity is not None and not outcome.ok
    assert [a.target for a in outcome.parity.artifacts] == ["onnx"] and outcome.parity.artifacts[0].ok
    (breach,) = outcome.parity.breaches
    assert breach.startswith("tflite: model.tflite could not be checked: ")
    alone = pipeline.verify(tmp_path / "run", ["tflite"])
    assert alone.parity is not None and any("model.tflite could not be checked" in b for b in alone.parity.breaches)


def test_a_file_that_is_gone_is_a_breach_until_it_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    pipeline.run(tiny_recipe.write(tmp_path), tmp_path / "run")
    exported = json.loads((tmp_path / "run" / "export_onnx.json").read_text())
    facts = {**exported, "target": "tflite", "path": "model.tflite"}  # as an export of model.tflite leaves them
    (tmp_path / "run" / "export_tflite.json").write_text(json.dumps(facts))
    for _ in range(2):
        outcome = pipeline.verify(tmp_path / "run")
        assert outcome.parity is not None
        (breach,) = outcome.parity.breaches
        assert breach.startswith("tflite: model.tflite is gone; export it again with `edgekit export")
    assert "model.tflite is gone" in (tmp_path / "run" / "report.html").read_text()  # the page follows


def test_no_page_is_written_about_a_file_that_was_altered_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    pipeline.run(tiny_recipe.write(tmp_path), tmp_path / "run")
    with (tmp_path / "run" / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(FormatError, match=r"model\.onnx is not the file that was verified"):
        pipeline.report(tmp_path / "run")
