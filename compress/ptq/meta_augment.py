"""A learned image transformation T for calibration (MetaAug, Pham et al. 2024): student learns on T(x), T so that it helps on x.

One differentiable step of the quantized student on transformed images, then a loss of the stepped student on the images as they
are; its gradient, through the step, trains T. Three terms (section 3 of the paper):

* validation: prediction difference between the float model and the stepped student on other, untransformed images;
* margin: ``relu(eps - mean((T(x) - x)^2))``, which keeps T from being the identity;
* relations: probabilistic knowledge transfer (Passalis and Tefas 2018) between what the float model says of mixed-up T(x) and of
  equally mixed-up x, which keeps their geometry.

Other than the authors' code: T is a small residual network trained from the identity on, once for the whole student and not for
each block; the step is a gradient divided by its root mean square, since the first step of Adam has no gradient of its own; and
both sides of the relations are mixed by the same pairs and shares. The student's parameters are left as they were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn import functional as F

from edgekit.compress.capture import Graph
from edgekit.compress.ptq.observers import ActQ
from edgekit.compress.ptq.plan import Plan
from edgekit.compress.ptq.prediction import prediction_difference
from edgekit.compress.ptq.settings import Meta
from edgekit.compress.ptq.simulate import simulate
from edgekit.compress.ptq.soft import SoftLayer, rounding_loss
from edgekit.compress.ptq.units import Unit, weight_of

__all__ = ["Transform", "margin", "outer_loss", "relations", "stepped", "student_of", "train_transform"]


class Transform(nn.Module):
    """A residual network of three 3x3 convolutions from images to images (N, C, H, W); the identity at first."""

    def __init__(self, channels: int, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )  # fmt: skip
        nn.init.zeros_(self.body[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.body[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x: float images."""
        found: Tensor = x + self.body(x)
        return found


class _Quantizer(nn.Module):
    """An activation's quantizer with straight-through gradients of every order."""

    def __init__(self, q: ActQ, activation: str) -> None:
        super().__init__()
        low, high = q.bounds(activation)
        self.low, self.high = low - q.zero_point, high - q.zero_point
        self.log_scale = nn.Parameter(torch.tensor(math.log(q.scale)))

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape."""
        scale = self.log_scale.exp()
        inside = (x / scale).clamp(self.low, self.high)
        return (inside + (inside.round() - inside).detach()) * scale


def student_of(graph: Graph, plan: Plan) -> fx.GraphModule:
    """The whole plan with soft weights and learned scales, differentiable twice."""

    def layer(unit: Unit, plan: Plan) -> nn.Module:
        return SoftLayer(unit, weight_of(graph, unit)[0], plan.weights[unit.name])

    return simulate(graph, plan, layer, lambda _, q, activation: _Quantizer(q, activation))


def stepped(loss: Tensor, parameters: Mapping[str, Tensor], rates: Mapping[str, float]) -> dict[str, Tensor]:
    """The parameters after one step down ``loss``, as a function of whatever the loss depends on.

    Args:
        rates: of each parameter; the gradient is divided by its root mean square, a constant here.
    """
    grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
    found = {}
    for (name, p), g in zip(parameters.items(), grads, strict=True):
        size = None if g is None else g.detach().square().mean().sqrt() + 1e-12
        found[name] = p if g is None else p - rates[name] * g / size
    return found


def margin(x: Tensor, moved: Tensor, eps: float) -> Tensor:
    """``relu(eps - mean((moved - x)^2))``."""
    return F.relu(eps - (moved - x).square().mean())


def relations(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the rows' similarities: 0 where both have the same cosines; (N, features) each."""

    def share(y: Tensor) -> Tensor:
        unit = F.normalize(y, dim=1)
        cosine = (1 + unit @ unit.T) / 2
        return cosine / cosine.sum(1, keepdim=True)

    p, q = share(student), share(teacher)
    return (q * ((q + 1e-7) / (p + 1e-7)).log()).sum(1).mean()


def outer_loss(
    transform: nn.Module, teacher: nn.Module, student: nn.Module, x: Tensor, validation: Tensor, how: Meta, rounding: float,
    beta: float, pairs: Tensor, share: float, temperature: float,
) -> Tensor:  # fmt: skip
    """The loss that trains the transformation, through one step of the student on transformed images.

    Args:
        x, validation: float images (N, C, H, W); the second ones are not transformed.
        pairs, share: which image each one is mixed with for the relations, and its own part.
    """
    moved = transform(x)
    parameters = {n: p for n, p in student.named_parameters() if p.requires_grad}
    rates = {n: how.scale_rate if n.endswith("log_scale") else how.rate for n in parameters}
    with torch.no_grad():
        wanted, said = _first(teacher(moved)), _first(teacher(validation))
    found = _first(student(moved))
    loss = (found - wanted).square().mean() / wanted.var().clamp(min=1e-12)
    layers = [m for m in student.modules() if isinstance(m, SoftLayer)]
    loss = loss + rounding * rounding_loss(layers, beta)
    after = stepped(loss, parameters, rates)
    judged = _first(functional_call(student, after, (validation,)))
    total = how.validation * prediction_difference([judged], [said], temperature) / temperature**2
    scale = float(x.detach().var().clamp(min=1e-12))
    total = total + how.margin * margin(x, moved, how.eps * scale) / scale
    if how.relations:
        mixed = [_first(teacher(share * v + (1 - share) * v[pairs])).flatten(1) for v in (moved, x)]
        total = total + how.relations * relations(mixed[0], mixed[1].detach())
    return total


def _first(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def train_transform(
    graph: Graph, plan: Plan, x: Tensor, how: Meta, rounding: float, temperature: float, generator: torch.Generator
) -> Transform:
    """A transformation trained on calibration images (N, C, H, W); nothing else changes.

    Args:
        rounding: weight of the regularizer of the inner loss.
        temperature: of the predictions that are compared.
    """
    torch.manual_seed(int(torch.randint(1 << 31, (), generator=generator)))
    transform, student, teacher = Transform(x.shape[1]), student_of(graph, plan), graph.module
    optimizer = torch.optim.Adam(transform.parameters(), how.learning_rate)
    size = min(how.batch_size, len(x))
    for step in range(how.steps):
        first, second = (torch.randint(len(x), (size,), generator=generator) for _ in range(2))
        pairs = torch.randperm(size, generator=generator)
        share = 0.5 + 0.5 * float(torch.rand((), generator=generator))
        beta, weight = 20 - 18 * step / how.steps, rounding if step >= 0.2 * how.steps else 0.0
        loss = outer_loss(
            transform, teacher, student, x[first], x[second], how, weight, beta, pairs, share, temperature
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(transform.parameters(), 0.1)
        optimizer.step()
    return transform
