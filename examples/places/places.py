"""Places recognized by many small unsupervised spiking networks, each for one stretch of a route.

After Hussaini, Milford and Fischer, "Ensembles of Compact, Region-specific and Regularized Spiking Neural Networks for Scalable
Place Recognition" (ICRA 2023), with their network of conductances replaced by current-based neurons with winner-take-all, and
their roads by synthetic images. A module learns its own places only; neurons that fire for many places elsewhere are found by
showing every reference image to every module, and removed. Run: python examples/places/places.py
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from edgekit.compress.spiking.encoders import poisson

SIDE = 14


@dataclass(frozen=True)
class Module:
    """One network: input weights (neurons, SIDE * SIDE), thresholds (neurons,), place of each neuron (-1: none)."""

    weights: Tensor
    thresholds: Tensor
    places: Tensor


def route(places: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Traverses of a route: two for reference (2, places, SIDE, SIDE), four to choose by and four to be judged by, in a row."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(places, 1, 5, 5, generator=generator)
    clean = F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear", align_corners=True)[:, 0]

    def traverse(noise: float, gain: float) -> Tensor:
        shifted = torch.roll(clean, int(torch.randint(-1, 2, (1,), generator=generator)), 2)
        return (gain * shifted + noise * torch.randn(clean.shape, generator=generator)).clamp(0, 1)

    reference = torch.stack([traverse(0.05, 1.0), traverse(0.05, 0.8)])
    choosing, judging = (torch.cat([traverse(0.1, gain) for gain in (0.9, 0.7, 0.8, 0.6)]) for _ in range(2))
    return reference, choosing, judging


def front(images: Tensor) -> Tensor:
    """Patch-normalized images as spike probabilities (N, SIDE * SIDE): gain and offset of the light do not matter."""
    x = images.unsqueeze(1)
    around = F.pad(x, (2, 2, 2, 2), mode="replicate")
    mean = F.avg_pool2d(around, 5, 1)
    spread = (F.avg_pool2d(around**2, 5, 1) - mean**2).clamp(min=1e-8).sqrt()
    return 0.5 * (((x - mean) / spread).clamp(-1, 1) + 1).flatten(1)


def counts(module: Module, rates: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Spikes of each neuron (N, neurons); in every step the strongest of those above threshold fires and resets all."""
    spikes = poisson(rates * 0.4, steps, generator)
    v = torch.zeros(len(rates), len(module.weights))
    total = torch.zeros_like(v)
    for t in range(steps):
        v = 0.9 * v + spikes[:, t] @ module.weights.T
        over = v - module.thresholds
        winner = over.argmax(1)
        fires = over.gather(1, winner.unsqueeze(1))[:, 0] > 0
        total[fires, winner[fires]] += 1
        v[fires] = 0
    return total


def train(reference: Tensor, places: range, neurons: int, epochs: int, seed: int) -> Module:
    """A module for some places: winners move towards what made them fire, and their thresholds rise a little."""
    generator = torch.Generator().manual_seed(seed)
    images = reference[:, places.start : places.stop].flatten(0, 1)
    labels = torch.arange(places.start, places.stop).repeat(len(reference))
    rates = front(images)
    weights = 0.3 * torch.rand(neurons, SIDE * SIDE, generator=generator)
    module = Module(_normalized(weights), torch.full((neurons,), 6.0), torch.full((neurons,), -1))
    for _ in range(epochs):
        for i in torch.randperm(len(images), generator=generator).tolist():
            seen = counts(module, rates[i : i + 1], 20, generator)[0]
            share = (seen / seen.sum().clamp(min=1)).unsqueeze(1)
            weights = _normalized(module.weights + 0.2 * share * (rates[i] - module.weights))
            thresholds = module.thresholds * 0.999 + 0.05 * seen
            module = replace(module, weights=weights, thresholds=thresholds)
    answers = counts(module, rates, 60, generator)
    means = torch.stack([answers[labels == p].mean(0) for p in places])
    return replace(module, places=torch.where(means.max(0).values > 0, means.argmax(0) + places.start, -1))


def _normalized(weights: Tensor) -> Tensor:
    """Rows of the same sum, so that no neuron wins by size."""
    return weights.clamp(min=0) / weights.clamp(min=0).sum(1, keepdim=True) * 20


def activity(modules: list[Module], reference: Tensor, seed: int = 7) -> list[Tensor]:
    """For how many reference images each neuron of each module fires."""
    rates = front(reference.flatten(0, 1))
    return [(counts(m, rates, 60, torch.Generator().manual_seed(seed)) > 0).sum(0) for m in modules]


def scores(modules: list[Module], query: Tensor, places: int, kept: list[Tensor], seed: int = 11) -> Tensor:
    """Score of each place for each query (N, places): mean spikes of the kept neurons that know it; -inf where none does."""
    found = torch.full((len(query), places), -torch.inf)
    for module, keep in zip(modules, kept, strict=True):
        answers = counts(module, front(query), 60, torch.Generator().manual_seed(seed))
        for place in sorted(set(module.places[keep].tolist())):
            mine = keep & (module.places == place)
            if place >= 0 and bool(mine.any()):
                found[:, place] = torch.maximum(found[:, place], answers[:, mine].mean(1))
    return found


def recall(found: Tensor) -> float:
    """Percent of queries, whole traverses of the route, whose best score is their own place."""
    return 100 * float((found.argmax(1) == torch.arange(len(found)) % found.shape[1]).float().mean())


def mask(active: list[Tensor], threshold: int) -> list[Tensor]:
    """Neurons that fire for fewer reference images than ``threshold``; all for 0.

    Raises:
        ValueError: it leaves none.
    """
    kept = [torch.ones_like(a, dtype=torch.bool) if threshold == 0 else a < threshold for a in active]
    if not any(bool(k.any()) for k in kept):
        raise ValueError(f"threshold {threshold}: every neuron is hyperactive; take a higher one")
    return kept


def choose(modules: list[Module], reference: Tensor, calibration: Tensor, places: int) -> tuple[int, list[Tensor]]:
    """The threshold with the best recall on calibration queries, not those it is judged on."""
    active = activity(modules, reference)
    best = (-1.0, 0)
    for threshold in (0, 4, 6, 8, 12, 16, 24, 32):
        try:
            kept = mask(active, threshold)
        except ValueError:
            continue
        best = max(best, (recall(scores(modules, calibration, places, kept, seed=5)), -threshold))
    return -best[1], mask(active, -best[1])


def main(modules_count: int = 4, each: int = 6, neurons: int = 40, epochs: int = 12) -> dict[str, float]:
    """Train, choose, judge; prints and returns recalls in percent."""
    places = modules_count * each
    reference, calibration, query = route(places)
    modules = [train(reference, range(i * each, (i + 1) * each), neurons, epochs, seed=i) for i in range(modules_count)]
    plain = [torch.ones(neurons, dtype=torch.bool) for _ in modules]
    threshold, kept = choose(modules, reference, calibration, places)
    removed = sum(int((~k).sum()) for k in kept)
    made = {
        "all neurons": recall(scores(modules, query, places, plain)),
        "hyperactive removed": recall(scores(modules, query, places, kept)),
        "threshold": float(threshold),
        "removed": float(removed),
    }
    print(f"{places} places, {modules_count} modules of {neurons} neurons")
    print(f"recall@1 with all neurons {made['all neurons']:.1f} %")
    print(f"recall@1 without {removed} that fire for {threshold} or more reference images {made['hyperactive removed']:.1f} %")
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
