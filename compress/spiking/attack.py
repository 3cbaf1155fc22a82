"""How robust a spiking network is: gradient attacks by a surrogate that needs no tuning, and sparse attacks on binary frames.

Lun et al., "Towards Effective and Sparse Adversarial Attack on Spiking Neural Networks via Breaking Invisible Surrogate
Gradients", CVPR 2025. PDSG: the derivative of a spike is a normal density whose width is the spread of the membranes seen so far.
SDA: flip as few bits of a binary input as possible. The network attacked is the frozen program itself; only gradients are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgekit.compress.spiking.neurons import SURROGATES, Decode, Fold, Neuron, Observing, Repeat, Surrogate
from edgekit.errors import ModelError
from edgekit.frozen import FrozenProgram

__all__ = ["PDSG", "Attacked", "Sparse", "attack", "differentiable", "fgsm", "pgd", "sparse"]

Forward = Callable[[Tensor], Tensor]


class PDSG(Observing):
    """Potential-dependent surrogate gradient: the density of N(sigma / 2, sigma) at v - threshold.

    sigma is the standard deviation of the membranes of steps 0 to t, for each channel. In units of the threshold, as here, the
    shape is the same.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.total: Tensor | None = None
        self.square: Tensor | None = None

    def observe(self, u: Tensor) -> Callable[[Tensor], Tensor]:
        axes = [0, *range(2, u.dim())]  # images keep the channel; vectors have one spread for all
        axes = axes if u.dim() > 2 else [0, 1]
        total = u.sum(axes, keepdim=True, dtype=torch.float64)
        square = u.square().sum(axes, keepdim=True, dtype=torch.float64)
        self.total = total if self.total is None else self.total + total
        self.square = square if self.square is None else self.square + square
        self.count += u.numel() / total.numel()
        variance = (self.square / self.count - (self.total / self.count) ** 2).clamp(min=0)
        sigma = variance.sqrt().to(u.dtype)
        sigma = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
        return lambda x: torch.exp(-((x - sigma / 2) ** 2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)

    def forget(self) -> None:
        """Before another input."""
        self.count, self.total, self.square = 0.0, None, None


def differentiable(program: FrozenProgram, surrogate: str = "pdsg") -> Forward:
    """The program as a function with gradients, (N, ...) to logits (N, classes); the same numbers forward.

    Raises:
        ModelError: the program has integer neurons or other operators without a gradient.
    """
    module = _trainable(program, surrogate)
    neurons = [m for m in module.modules() if isinstance(m, Neuron)]

    def forward(x: Tensor) -> Tensor:
        for n in neurons:
            if isinstance(n.surrogate, PDSG):
                n.surrogate.forget()
        with torch.enable_grad():
            result: Any = module(x)
        found: Tensor = result[0] if isinstance(result, tuple | list) else result
        return found

    return forward


def _trainable(program: FrozenProgram, surrogate: str) -> fx.GraphModule:
    """The program's graph with modules that have gradients in the place of its operators over time."""
    source = program.module
    root, graph, values = nn.Module(), fx.Graph(), dict[fx.Node, fx.Node]()
    layers = {x.node: x for x in program.layers}
    for node in source.graph.nodes:
        if node.op == "get_attr":
            value: Any = source
            for part in str(node.target).split("."):
                value = getattr(value, part)
            name = f"constant_{len(values)}"
            root.register_buffer(name, value.detach())
            values[node] = graph.get_attr(name)
        elif node.name in layers:
            name = f"part_{len(values)}"
            root.add_module(name, _part(layers[node.name].op, layers[node.name].args, surrogate, layers[node.name].name))
            values[node] = graph.call_module(name, (values[node.args[0]],))
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
    return fx.GraphModule(root, graph).eval()


def _part(op: str, args: Any, surrogate: str, layer: str) -> nn.Module:
    if op == "repeat_steps":
        return Repeat(int(args["steps"]))
    if op == "fold_steps":
        return Fold()
    if op == "accumulate":
        steps = int(args["steps"])
        if abs(args["gain"] * steps - 1) < 1e-9:
            return Decode(steps)
    if op in ("if_sequence", "lif_sequence", "cuba_lif_sequence"):
        return _Program(args, PDSG() if surrogate == "pdsg" else SURROGATES[surrogate])
    raise ModelError(
        f"layer {layer}: {op} has no gradient; attacks take spiking programs of float neurons without recurrence or delays"
    )


class _Program(Neuron):
    """A neuron with the arithmetic of its operator."""

    def __init__(self, args: Any, surrogate: Surrogate) -> None:
        tau = args.get("tau", args.get("tau_mem"))
        leaky = tau is not None
        super().__init__(
            args["v_threshold"], args["v_init"], steps=int(args["steps"]), tau=1.5 if leaky else None, reset=args["reset"],
            spikes=int(args["max_spikes"]), tau_syn=2.0 if "tau_syn" in args else None,
        )  # fmt: skip
        rate = args["dt"] / tau.double() if leaky else args["r"].double() * args["dt"]
        self.register_buffer("rate", rate.float())
        self.register_buffer("gain", args["r"].float())
        self.register_buffer("leak", args["v_leak"].float() if leaky else torch.tensor(0.0))
        if "tau_syn" in args:
            self.register_buffer("rise", (args["dt"] / args["tau_syn"].double()).float())
            self.register_buffer("w_in", args["w_in"].float())
        self.surrogate = surrogate

    def receive(self, i: Tensor) -> Tensor:
        if self.tau_syn is None:
            return i
        before = torch.zeros_like(i) if self.current is None else self.current
        self.current = before + self.get_buffer("rise") * (self.get_buffer("w_in") * i - before)
        return self.current

    def integrate(self, v: Tensor, i: Tensor) -> Tensor:
        rate, gain, leak = (self.get_buffer(k) for k in ("rate", "gain", "leak"))
        return v + rate * ((leak - v) + gain * i) if self.leaky else v + rate * i


def fgsm(model: Forward, x: Tensor, y: Tensor, eps: float, low: float = 0.0, high: float = 1.0) -> Tensor:
    """One step of size ``eps`` along the sign of the loss's gradient, within ``low`` and ``high``."""
    return (x + eps * _gradient(model, x, y).sign()).clamp(low, high)


def pgd(
    model: Forward, x: Tensor, y: Tensor, eps: float, steps: int = 10, low: float = 0.0, high: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """``steps`` steps of ``eps / 4`` from a random start, each brought back to within ``eps`` (Madry et al. 2018)."""
    found = (x + eps * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(low, high)
    for _ in range(steps):
        found = found + eps / 4 * _gradient(model, found, y).sign()
        found = torch.minimum(torch.maximum(found, x - eps), x + eps).clamp(low, high)
    return found


def _gradient(model: Forward, x: Tensor, y: Tensor) -> Tensor:
    given = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        (found,) = torch.autograd.grad(nn.functional.cross_entropy(model(given), y, reduction="sum"), given)
    return found


@dataclass(frozen=True)
class Sparse:
    """Outcome of a sparse attack on one sample: its input, whether it is misclassified now, and how many bits were flipped."""

    x: Tensor
    success: bool
    flips: int


def sparse(model: Forward, x: Tensor, y: int, *, k: int = 10, iterations: int = 500, batch: int = 64) -> Sparse:
    """Sparse dynamic attack on a binary sample (1, ...): flip bits until it is misclassified, then take back what is not needed.

    Args:
        k: candidates of the first iteration; each later one looks at as many more.
    """
    margin = _margin(model, y)
    flat, chosen = x.clone(), torch.zeros(x.numel(), dtype=torch.bool)
    effects: dict[int, float] = {}
    for n in range(iterations):
        loss, gradient = _margin_gradient(margin, flat)
        if loss <= 0:
            break
        candidates = _candidates(gradient, flat, chosen, (n + 1) * k)
        for start in range(0, len(candidates), batch):
            part = candidates[start : start + batch]
            tried = flat.flatten().repeat(len(part), 1)
            rows = torch.arange(len(part))
            tried[rows, part] = 1 - tried[rows, part]
            with torch.no_grad():
                change = margin(tried.reshape(len(part), *x.shape[1:])) - loss
            effects |= {int(i): float(c) for i, c in zip(part, change, strict=True) if c <= 0}
        accepted = torch.tensor([i for i in effects if not chosen[i]], dtype=torch.int64)
        chosen[accepted] = True
        flat = _flipped(x, chosen)
    if float(margin(flat)) > 0:
        return Sparse(x, False, 0)
    return _reduced(margin, x, chosen, effects)


def _margin(model: Forward, y: int) -> Forward:
    def margin(x: Tensor) -> Tensor:
        logits = model(x)
        others = logits.masked_fill(torch.arange(logits.shape[1]) == y, -torch.inf)
        return (logits[:, y] - others.amax(1)).clamp(min=0)

    return margin


def _margin_gradient(margin: Forward, x: Tensor) -> tuple[float, Tensor]:
    given = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        loss = margin(given)
        (gradient,) = torch.autograd.grad(loss.sum(), given)
    return float(loss.detach()), gradient.flatten()


def _candidates(gradient: Tensor, x: Tensor, chosen: Tensor, k: int) -> Tensor:
    """The k bits whose flip lowers the loss most to first order; those without a gradient come last, in a fixed random order."""
    bits = x.flatten()
    helps = ((bits == 1) & (gradient > 0)) | ((bits == 0) & (gradient < 0))
    size = torch.where(helps, gradient.abs(), torch.zeros_like(gradient))
    zero = gradient == 0
    smallest = size[size > 0].min() if bool((size > 0).any()) else torch.tensor(1.0)
    filler = torch.rand(len(size), generator=torch.Generator().manual_seed(0)) * smallest
    size = torch.where(zero, filler, size)
    size[chosen] = 0
    found = size.topk(min(k, len(size))).indices
    return found[size[found] > 0]


def _flipped(x: Tensor, chosen: Tensor) -> Tensor:
    flat = x.flatten().clone()
    flat[chosen] = 1 - flat[chosen]
    return flat.reshape(x.shape)


def _reduced(margin: Forward, x: Tensor, chosen: Tensor, effects: dict[int, float]) -> Sparse:
    """Take back the longest run of flips with the least effect that leaves the sample misclassified, by bisection."""
    order = sorted(chosen.nonzero().flatten().tolist(), key=lambda i: abs(effects[i]))

    def without(count: int) -> Tensor:
        mask = chosen.clone()
        mask[torch.tensor(order[:count], dtype=torch.int64)] = False
        return mask

    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        if float(margin(_flipped(x, without(middle)))) <= 0:
            low = middle
        else:
            high = middle - 1
    kept = without(low)
    return Sparse(_flipped(x, kept), True, int(kept.sum()))


@dataclass(frozen=True)
class Attacked:
    """Accuracies in percent; flips are of successful sparse attacks."""

    attack: str
    eps: float | None
    samples: int
    clean: float
    accuracy: float
    flips: tuple[int, ...] = ()

    @property
    def success(self) -> float:
        """Share of the right answers that are wrong now, in percent."""
        return 100 * (self.clean - self.accuracy) / self.clean if self.clean else 0.0

    def row(self, inputs: int) -> dict[str, Any]:
        """Plain values; ``inputs``: numbers of one sample."""
        by_size = sorted(self.flips)
        middle = by_size[len(by_size) // 2] if by_size else None
        return {
            "attack": self.attack, "eps": self.eps, "samples": self.samples, "accuracy": round(self.clean, 3),
            "attacked": round(self.accuracy, 3), "success %": round(self.success, 2), "median flips": middle,
            "of the input %": None if middle is None else round(100 * middle / inputs, 3),
        }  # fmt: skip


def attack(
    program: FrozenProgram, x: Tensor, y: Tensor, *, kinds: tuple[str, ...] = ("fgsm", "pgd"),
    eps: tuple[float, ...] = (2 / 255, 8 / 255),
    steps: int = 10, low: float = 0.0, high: float = 1.0, surrogate: str = "pdsg", iterations: int = 100, seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Attacked]:  # fmt: skip
    """Attack a spiking program on samples (N, ...) with labels (N,); in fixed batches, as the surrogate sees a whole batch.

    Args:
        kinds: "fgsm", "pgd", and "sda" for inputs of 0 and 1.
        eps: sizes of the first two, in the input's unit.

    Raises:
        ModelError: as :func:`differentiable`; or "sda" on inputs that are not binary.
    """
    model, say = differentiable(program, surrogate), progress or (lambda *_: None)
    clean = _right(model, x, y)
    found = []
    for kind in [k for k in kinds if k != "sda"]:
        for size in eps:
            parts = []
            generator = torch.Generator().manual_seed(seed)
            for i, (a, b) in enumerate(zip(x.split(50), y.split(50), strict=True)):  # type: ignore[no-untyped-call]
                if kind == "fgsm":
                    parts.append(fgsm(model, a, b, size, low, high))
                else:
                    parts.append(pgd(model, a, b, size, steps, low, high, generator))
                say(f"{kind} {size:.4f}", min(len(x), 50 * (i + 1)), len(x))
            right = _right(model, torch.cat(parts), y)
            found.append(Attacked(kind, size, len(x), _percent(clean), _percent(right)))
    if "sda" in kinds:
        if not bool(((x == 0) | (x == 1)).all()):
            raise ModelError("attack sda flips bits; the inputs are not all 0 or 1, take fgsm or pgd")
        outcomes = []
        for i in clean.nonzero().flatten().tolist():
            outcomes.append(sparse(model, x[i : i + 1], int(y[i]), iterations=iterations))
            say("sda", len(outcomes), int(clean.sum()))
        failed = sum(not o.success for o in outcomes)
        flips = tuple(o.flips for o in outcomes if o.success)
        found.append(Attacked("sda", None, len(x), _percent(clean), 100 * failed / len(x), flips))
    return found


def _right(model: Forward, x: Tensor, y: Tensor) -> Tensor:
    parts = [model(part).detach().argmax(1) for part in torch.split(x, 50)]
    return torch.cat(parts) == y


def _percent(right: Tensor) -> float:
    return 100 * float(right.float().mean())
