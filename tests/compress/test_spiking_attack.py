"""Attacks on frozen spiking programs: the same numbers forward, the bounds kept, the fewest bits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgekit import Data
from edgekit.compress.spiking import Spiking
from edgekit.compress.spiking.attack import PDSG, attack, differentiable, fgsm, pgd, sparse
from edgekit.compress.steps import apply
from edgekit.errors import DataError, InputError, ModelError
from edgekit.frozen import FrozenProgram
from edgekit.recipe import Block


@pytest.fixture(scope="module")
def made() -> tuple[FrozenProgram, Tensor, Tensor]:
    torch.manual_seed(0)
    x = (torch.rand(300, 1, 6, 6) < 0.5).float()
    y = (x[:, 0, :3].sum((1, 2)) > x[:, 0, 3:].sum((1, 2))).long()
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 12), nn.ReLU(), nn.Linear(12, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    data = Data(calibration=x[:100], evaluation=(x[200:], y[200:]))
    return apply(model.eval(), [Block("spiking", Spiking(steps=6))], data).program, x[200:], y[200:]


def test_forward_is_the_program_and_only_gradients_are_made(made: tuple[FrozenProgram, Tensor, Tensor]) -> None:
    program, x, _ = made
    (wanted,) = program.run(x[:10])
    for surrogate in ("pdsg", "triangle"):
        model = differentiable(program, surrogate)
        got = torch.cat([model(x[i : i + 1]) for i in range(10)]).detach()
        assert torch.equal(got, wanted)


def test_the_surrogate_is_a_density() -> None:
    u = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    seen = torch.randn(64, 3, dtype=torch.float64) * 2
    shape = PDSG().observe(seen)
    sigma = float(seen.std(unbiased=False))
    d = shape(u.view(1, -1)).flatten()
    assert float(d.sum() * (u[1] - u[0])) == pytest.approx(1, abs=1e-3)
    assert float(u[d.argmax()]) == pytest.approx(sigma / 2, abs=1e-3)
    assert float(d.max()) == pytest.approx(1 / (math.sqrt(2 * math.pi) * sigma), rel=1e-4)


def test_gradient_attacks_stay_in_their_bounds_and_hurt(made: tuple[FrozenProgram, Tensor, Tensor]) -> None:
    program, x, y = made
    model = differentiable(program)
    for eps in (0.0, 0.2):
        for found in (fgsm(model, x, y, eps), pgd(model, x, y, eps, 4)):
            assert float((found - x).abs().max()) <= eps + 1e-6
            assert float(found.min()) >= 0 and float(found.max()) <= 1
    rows = attack(program, x, y, eps=(0.1, 0.4), steps=5)
    by_size = {(r.attack, r.eps): r.accuracy for r in rows}
    assert rows[0].clean > 85
    assert by_size["pgd", 0.4] < by_size["pgd", 0.1] <= rows[0].clean and by_size["pgd", 0.4] < 30


def test_a_sparse_attack_flips_few_bits(made: tuple[FrozenProgram, Tensor, Tensor]) -> None:
    program, x, y = made
    model = differentiable(program)
    right = [i for i in range(40) if int(model(x[i : i + 1]).argmax()) == int(y[i])][:12]
    for i in right:
        found = sparse(model, x[i : i + 1], int(y[i]), iterations=30)
        changed = int((found.x != x[i : i + 1]).sum())
        assert set(found.x.unique().tolist()) <= {0.0, 1.0} and changed == found.flips
        assert found.success == (int(model(found.x).argmax()) != int(y[i])) and (found.success or changed == 0)
    (row,) = attack(program, x[:12], y[:12], kinds=("sda",), iterations=30)
    assert row.success > 80 and max(row.flips) <= 18


def test_on_a_linear_model_the_largest_weights_are_flipped() -> None:
    w = torch.tensor([0.5, -3.0, 2.0, -0.1, 1.0, -0.2])
    x = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 0.0]])
    model = lambda v: torch.stack([v.flatten(1) @ w, torch.zeros(len(v))], 1)  # noqa: E731
    found = sparse(model, x, 0, k=2)
    assert found.success and found.flips == 1 and found.x.tolist() == [[1, 1, 1, 1, 0, 0]]


def test_a_run_folder_is_attacked(made: tuple[FrozenProgram, Tensor, Tensor], tmp_path: Path) -> None:
    from edgekit.pipeline import export_program
    from edgekit.recipe import in_memory
    from edgekit.robustness import attack_run

    program, x, y = made
    export_program(program, tmp_path / "run", in_memory(compress=[], targets=[]), {"passes": []})
    found = attack_run(tmp_path / "run", ("fgsm", "sda"), eps=(51.0,), samples=20, data=Data(calibration=x, evaluation=(x, y)))
    assert json.loads((tmp_path / "run" / "robustness.json").read_text()) == found
    assert [r["attack"] for r in found["rows"]] == ["fgsm", "sda"] and found["rows"][0]["eps"] == pytest.approx(0.2)
    assert found["rows"][1]["success %"] > 80 and found["rows"][1]["of the input %"] < 60
    with pytest.raises(InputError, match="attack 'magic' is unknown; there are fgsm, pgd, sda"):
        attack_run(tmp_path / "run", ("magic",))
    with pytest.raises(DataError, match="run was made without a recipe that names any"):
        attack_run(tmp_path / "run")
    with pytest.raises(DataError, match="labelled evaluation samples"):
        attack_run(tmp_path / "run", data=Data(calibration=x))


def test_what_cannot_be_attacked_is_said(made: tuple[FrozenProgram, Tensor, Tensor]) -> None:
    program, x, y = made
    with pytest.raises(ModelError, match="attack sda flips bits"):
        attack(program, x * 0.5, y, kinds=("sda",))
