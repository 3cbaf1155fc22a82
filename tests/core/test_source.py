"""Factories and weight files: the user's code runs only when named, and files never execute anything."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgekit import source
from edgekit.compress.ptq import quantize_model
from edgekit.data import Data, fingerprint, sample_inputs
from edgekit.errors import DataError, FormatError, InputError, ModelError

MODEL = """
from torch import nn
from helper import width
def build(seed=1): m = nn.Linear(width, seed); return m
def wrong(): return 3
def broken():
    raise ValueError('no weights here')
value = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m.py").write_text(MODEL)
    (tmp_path / "helper.py").write_text("width = 4")
    (tmp_path / "bad.py").write_text("x = 1\nimport nowhere_to_be_found\n")
    return tmp_path


def test_a_factory_gets_the_seed_and_its_folder_and_leaves_no_modules(folder: Path) -> None:
    model = source.load_model(f"{folder}/m.py:build", seed=7)
    assert isinstance(model, nn.Linear) and model.weight.shape == (7, 4) and not model.training
    again = source.load_model(f"{folder}/m.py:build", seed=7)
    assert torch.equal(model.weight, again.weight)
    import sys

    assert "helper" not in sys.modules and str(folder) not in sys.path


def test_failures_of_factories_are_one_sentence(folder: Path) -> None:
    for spec, kind, words in [
        ("m.py:biuld", InputError, "no function 'biuld'; did you mean 'build'"),
        ("m.py:value", InputError, "no function 'value'"),
        ("m.py:wrong", ModelError, "m.py:wrong returned int; expected a torch.nn.Module"),
        ("m.py:broken", ModelError, r"m.py:broken failed: ValueError: no weights here \(m.py:7\)"),
        ("bad.py:f", InputError, r"cannot be imported: ModuleNotFoundError.*\(bad.py:2\)"),
        ("none.py:f", InputError, "none.py: no such file"),
    ]:
        with pytest.raises(kind, match=words):
            source.load_model(f"{folder}/{spec}")
    with pytest.raises(InputError, match="no such module"):
        source.load_model("nowhere.to_be.found:f")
    with pytest.raises(DataError, match=r"expected an edgekit\.data\.Data"):
        source.load_data(f"{folder}/m.py:wrong")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "nested.pt"])
def test_weights_are_read(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    state = model.state_dict()
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if name == "nested.pt" else state, path)
    other = source.load_weights(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), path)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), state.values(), strict=True))


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_weight_files_never_execute_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(1), "x": Hostile()}, tmp_path / "h.pt")
    with pytest.raises(FormatError, match="never executes"):
        source.load_weights(nn.Linear(1, 1), tmp_path / "h.pt")
    assert not (tmp_path / "executed").exists()


def test_unfit_weight_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(FormatError, match="no such file"):
        source.load_weights(nn.Linear(1, 1), path)
    save_file({"weight": torch.zeros(2, 3), "scale": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="the file lacks bias; the model has no scale"):
        source.load_weights(nn.Linear(3, 2), path)
    save_file(nn.Linear(3, 2).state_dict(), path)
    with pytest.raises(ModelError, match=r"weight has shape \(2, 3\), the model's is \(2, 4\)"):
        source.load_weights(nn.Linear(4, 2), path)
    for name in ("w.safetensors", "t.pt"):
        (tmp_path / name).write_bytes(b"\x10" * 50)
        with pytest.raises(FormatError):
            source.load_weights(nn.Linear(4, 2), tmp_path / name)


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(3, 2), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.factor


def test_the_fingerprint_sees_weights_and_graph() -> None:
    sample = (torch.zeros(1, 3),)
    model, other = Scaled(2.0), Scaled(3.0)
    other.load_state_dict(model.state_dict())
    base = source.model_fingerprint(model, sample)
    assert base == source.model_fingerprint(model, sample)
    assert base != source.model_fingerprint(other, sample)  # the same weights, another graph
    with torch.no_grad():
        model.linear.bias += 1e-3
    assert base != source.model_fingerprint(model, sample)


def test_the_sample_leaves_labels_out() -> None:
    x = torch.randn(5, 3)
    (found,) = sample_inputs(Scaled(1.0), Data((x, torch.arange(5))))
    assert torch.equal(found, x[:1])


@pytest.mark.parametrize("free", [False, True])
def test_a_float_pt2_is_an_ordinary_model(tmp_path: Path, free: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)).eval()
    x = torch.randn(6, 3, 8, 8)
    shapes = ({0: torch.export.Dim.AUTO},) if free else None
    torch.export.save(torch.export.export(model, (x[: 2 if free else 1],), dynamic_shapes=shapes), tmp_path / "m.pt2")
    loaded = source.load_model(str(tmp_path / "m.pt2"))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(x), model(x))
    program = quantize_model(loaded, Data(x))
    assert program.unquantized == () and float((program.run(x)[0].argmax(1) == model(x).argmax(1)).float().mean()) > 0.8


def test_a_metric_is_told_from_another_by_its_code() -> None:
    def metric(outputs: torch.Tensor, y: torch.Tensor) -> float:
        return 1.0

    first = fingerprint(Data(torch.ones(2, 3), metric=metric))

    def metric(outputs: torch.Tensor, y: torch.Tensor) -> float:  # type: ignore[no-redef]
        return 1000.0

    assert fingerprint(Data(torch.ones(2, 3), metric=metric)) != first
    assert fingerprint(Data(torch.ones(2, 3), metric=functools.partial(metric, y=torch.ones(1)))) != first
