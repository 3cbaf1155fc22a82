"""MetaAug: its losses, the gradient through the student's step by finite differences, and a whole reconstruction with it."""

from __future__ import annotations

import pytest
import torch
from float_models import Encoder, Modules, build
from torch import nn

from edgekit.compress.capture import capture
from edgekit.compress.ptq import PTQ
from edgekit.compress.ptq.meta_augment import Transform, margin, outer_loss, relations, stepped, student_of, train_transform
from edgekit.compress.ptq.plan import make_plan
from edgekit.compress.ptq.quantize import quantize
from edgekit.compress.ptq.settings import Meta, Reconstruct
from edgekit.compress.ptq.simulate import simulate
from edgekit.compress.ptq.units import find_units
from edgekit.data import Data
from edgekit.errors import DataError


def test_relations_are_0_for_equal_geometry_and_blind_to_lengths() -> None:
    torch.manual_seed(0)
    y = torch.randn(12, 5)
    assert abs(float(relations(y, y))) < 1e-6
    assert abs(float(relations(y * (torch.rand(12, 1) + 0.1), y))) < 1e-6
    assert float(relations(torch.randn(12, 5), y)) > 1e-3


def test_the_margin_is_eps_at_the_identity_and_0_far_from_it() -> None:
    x = torch.randn(4, 3, 5, 5)
    assert float(margin(x, x, 0.3)) == pytest.approx(0.3)
    assert float(margin(x, x + 1, 0.3)) == 0.0
    assert torch.equal(Transform(3)(x), x)


class Toy(nn.Module):
    """One learned layer, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.flatten(1) @ self.weight.T)


def test_the_gradient_through_the_step_against_finite_differences() -> None:
    """A student of one layer takes a plain step on moved inputs; what moves them gets the gradient of the loss after it."""
    torch.manual_seed(1)
    student, target = Toy(), torch.randn(3, 8, dtype=torch.float64)
    x, other = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    shift = torch.randn(8, dtype=torch.float64, requires_grad=True)

    def loss(moved: torch.Tensor, rate: float = 0.3) -> torch.Tensor:
        inner = (student(x + moved) - torch.tanh((x + moved).detach() @ target.T)).square().mean()
        after = stepped(inner, dict(student.named_parameters()), {"weight": rate})
        return (torch.func.functional_call(student, after, (other,)) - torch.tanh(other @ target.T)).square().mean()

    # the step is divided by a constant of the point where it is taken, and targets have no gradient: hold both
    with torch.enable_grad():
        inner = (student(x + shift) - torch.tanh((x + shift).detach() @ target.T)).square().mean()
    (grad,) = torch.autograd.grad(inner, [student.weight])
    size, wanted = float(grad.square().mean().sqrt()) + 1e-12, torch.tanh((x + shift).detach() @ target.T)

    def held(moved: torch.Tensor) -> float:
        inner = (student(x + moved) - wanted).square().mean()
        (g,) = torch.autograd.grad(inner, [student.weight])
        after = {"weight": student.weight - 0.3 * g / size}
        return float((torch.func.functional_call(student, after, (other,)) - torch.tanh(other @ target.T)).square().mean())

    (found,) = torch.autograd.grad(loss(shift), [shift])
    for i in range(8):
        step = torch.zeros(8, dtype=torch.float64)
        step[i] = 1e-5
        numeric = (held(shift.detach() + step) - held(shift.detach() - step)) / 2e-5
        assert float(found[i]) == pytest.approx(numeric, rel=1e-4, abs=1e-9)
    (none,) = torch.autograd.grad(loss(shift, 0.0), [shift])
    assert float(none.abs().max()) == 0.0, "without a step the loss after it does not depend on what was moved"


def test_training_moves_the_transformation_and_leaves_the_student_and_the_model() -> None:
    model, x = build(Modules, 24)
    graph = capture(model, (x[:1],))
    settings = PTQ(weights="int4", observer="minmax", keep_first_last_8bit=False)
    units, left = find_units(graph)
    plan = make_plan(graph, units, left, settings, lambda: [(x,)])
    student = student_of(graph, plan)
    with torch.no_grad():
        assert torch.allclose(student(x), simulate_float_weights(graph, plan, x), atol=1e-4)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    transform = Transform(3)
    with torch.no_grad():
        transform.body[-1].weight.normal_(0, 0.05)
    how = Meta(batch_size=8)
    loss = outer_loss(transform, graph.module, student, x[:8], x[8:16], how, 0.01, 10.0, torch.arange(8).flip(0), 0.7, 4.0)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in transform.parameters())
    assert all(torch.equal(p, before[n]) for n, p in student.named_parameters())
    made = train_transform(
        graph, plan, x, Meta(steps=6, batch_size=8, learning_rate=1e-2), 0.01, 4.0, torch.Generator().manual_seed(0)
    )
    assert float((made(x) - x).abs().max()) > 0


def simulate_float_weights(graph: object, plan: object, x: torch.Tensor) -> torch.Tensor:
    """The plan's quantizers around float weights, by the plain simulation."""
    from edgekit.compress.ptq.simulate import WeightedLayer
    from edgekit.compress.ptq.units import weight_of

    def layer(unit: object, plan: object) -> nn.Module:
        weight, bias = weight_of(graph, unit)  # type: ignore[arg-type]
        return WeightedLayer(unit, weight, bias)  # type: ignore[arg-type]

    return simulate(graph, plan, layer)(x)  # type: ignore[arg-type]


def test_a_reconstruction_with_it_learns_and_is_repeatable() -> None:
    model, x = build(Modules, 32)
    how = Reconstruct(steps=20, augment="meta", meta=Meta(steps=3, batch_size=8))
    settings = PTQ(weights="int4", method="brecq", observer="minmax", samples=32, reconstruct=how)
    plans = [quantize(capture(model, (x[:1],)), settings, Data(x))[1] for _ in range(2)]
    assert all(torch.equal(plans[0].weights[n].integers, plans[1].weights[n].integers) for n in plans[0].weights)


def test_it_takes_images_only() -> None:
    model, x = build(Encoder, 16)
    settings = PTQ(weights="int4", method="brecq", samples=16, reconstruct=Reconstruct(steps=2, augment="meta"))
    with pytest.raises(DataError, match="float images"):
        quantize(capture(model, (x[:1],)), settings, Data(x))
