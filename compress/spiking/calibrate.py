"""Thresholds, biases, initial membranes and weights of a converted network, from unlabelled samples.

Thresholds: the largest activation, a percentile of it (Rueckauer et al. 2017), or the threshold whose staircase has the least
squared error (MMSE). Then, layer by layer and each measured behind those already corrected, the mean of what the neurons do is
brought to that of the activation: by the bias, by the initial membrane of each neuron, or by new weights (Li et al., "A Free
Lunch From ANN: Towards Efficient, Accurate Spiking Neural Networks Calibration", ICML 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from edgekit.compress.capture import Graph
from edgekit.compress.spiking.graph import Site, operator_name
from edgekit.compress.spiking.input_layer import ENCODER
from edgekit.compress.spiking.neurons import Neuron
from edgekit.compress.spiking.settings import Spiking
from edgekit.compress.spiking.unroll import SpikingNet, producers
from edgekit.errors import DataError

__all__ = ["Layer", "activations", "balance", "calibrate", "correct", "staircase", "threshold_of"]

_GRID = 95
"""Thresholds tried by MMSE: the largest activation times 1, 0.99, ..., 0.06 (the reference's grid)."""
_SMALLEST = 1e-6


@dataclass
class Layer:
    """What was done to a layer of neurons, and what came of it on the calibration samples.

    Attributes:
        error: mean absolute difference of the neurons' mean output from the activation, in shares of the mean activation.
        gap_before, gap: the same of the means of channels over the samples, without and with the correction.
        rate: spikes of a neuron and step, mean.
    """

    name: str
    threshold: str
    correction: str = "none"
    error: float = 0.0
    gap_before: float = 0.0
    gap: float = 0.0
    rate: float = 0.0
    note: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """For compress.json."""
        measured = {
            "mean gap before %": round(100 * self.gap_before, 2), "mean gap %": round(100 * self.gap, 2),
            "error %": round(100 * self.error, 2), "spikes a neuron and step": round(self.rate, 4), **self.figures,
        }  # fmt: skip
        known = measured if self.figures else {}
        return {"layer": self.name, "threshold": self.threshold, "correction": self.correction, **known, "note": self.note}


def activations(graph: Graph, sites: Sequence[Site], batch: Sequence[Tensor]) -> dict[str, Tensor]:
    """fx node name of each site to the activation (N, ...) on a batch.

    Raises:
        DataError: NaN or Inf.
    """
    wanted = {s.node: s.name for s in sites}
    seen: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in wanted:
                if not torch.isfinite(value).all():
                    raise DataError(f"calibration: NaN or Inf in layer {wanted[n.name]}; check the data's range")
                seen[n.name] = value
            return value

    with torch.no_grad():
        Recorder(graph.module).run(*batch)
    return seen


def staircase(a: Tensor, threshold: Tensor, steps: int, v_init: float = 0.5) -> Tensor:
    """Mean output of an integrate-and-fire neuron over ``steps`` steps of the constant current ``a``.

    ``v_init`` in thresholds: 0.5 rounds to the nearest level.
    """
    return torch.floor(a * (steps / threshold) + v_init).clamp(0, steps) * (threshold / steps)


def threshold_of(a: Tensor, settings: Spiking, steps: int, cap: float) -> Tensor:
    """The threshold of a layer with activation ``a`` (N, C, ...): shape (), or (C, 1, ...) with ``per_channel``."""
    columns = a.transpose(0, 1).flatten(1) if settings.per_channel else a.reshape(1, -1)
    largest = columns.max(1).values.clamp(max=cap)
    if settings.threshold == "percentile":
        largest = _percentile(columns, settings.percentile).clamp(max=cap)
    elif settings.threshold == "mmse":
        largest = _least_squares(columns, largest, steps, settings.v_init)
    whole = columns.max().clamp(min=_SMALLEST)
    largest = torch.where(largest > _SMALLEST, largest, whole)  # a channel that never fires gets the layer's threshold
    return largest.reshape(-1, *[1] * (a.dim() - 2)) if settings.per_channel else largest.reshape(())


def _percentile(columns: Tensor, percent: float) -> Tensor:
    """Exact, without torch.quantile's limit on the number of values."""
    k = max(1, min(columns.shape[1], round(columns.shape[1] * percent / 100)))
    return columns.kthvalue(k, 1).values


def _least_squares(columns: Tensor, largest: Tensor, steps: int, v_init: float) -> Tensor:
    if columns.shape[1] > 200_000:
        columns = columns[:, :: columns.shape[1] // 100_000]
    best, error = largest, torch.full_like(largest, torch.inf)
    for i in range(_GRID):
        tried = largest * (1 - 0.01 * i)
        found = (staircase(columns, tried.clamp(min=_SMALLEST).view(-1, 1), steps, v_init) - columns).square().mean(1)
        best, error = torch.where(found < error, tried, best), torch.minimum(found, error)
    return best


def balance(net: SpikingNet, seen: Mapping[str, Tensor], settings: Spiking) -> None:
    """Set threshold, amplitude and initial membrane of every layer from the activations alone.

    A spike of a neuron that may spike ``spikes`` times a step stands for that part of the threshold.
    """
    for name, site in net.sites.items():
        neuron = net.neuron(name)
        levels = net.steps * neuron.spikes
        _set(neuron, threshold_of(seen[site.node], settings, levels, site.cap) / neuron.spikes, settings)


def _set(neuron: Neuron, threshold: Tensor, settings: Spiking) -> None:
    neuron.threshold.data = threshold
    neuron.v_init = threshold * settings.v_init
    neuron.amplitude = threshold


def calibrate(net: SpikingNet, graph: Graph, batch: Sequence[Tensor], settings: Spiking) -> list[Layer]:
    """Thresholds and corrections of every layer, in place, from the activations of ``graph``, the network without time."""
    seen = activations(graph, list(net.sites.values()), batch)
    if net.frames:  # one value of each frame, and neurons have one mean over them
        seen = {k: v.reshape(net.steps, -1, *v.shape[1:]).mean(0) for k, v in seen.items()}
    balance(net, seen, settings)
    return correct(net, batch, settings, seen)


def correct(net: SpikingNet, batch: Sequence[Tensor], settings: Spiking, seen: Mapping[str, Tensor]) -> list[Layer]:
    """The corrections alone, of a network whose thresholds are set, towards the activations ``seen``."""
    walk = _Walk(net, seen, settings)
    net.run(net.steps)
    with torch.no_grad():
        walk.run(*batch)
    return walk.layers


class _Walk(fx.Interpreter):
    """Runs the network over time and corrects each layer of neurons when it comes to it."""

    def __init__(self, net: SpikingNet, seen: Mapping[str, Tensor], settings: Spiking) -> None:
        super().__init__(net.module)
        self.net, self.seen, self.settings = net, seen, settings
        self.producers = producers(net)
        self.inputs: dict[fx.Node, tuple[Any, ...]] = {}
        self.learned = _alone(net, self.producers) if settings.correct == "weights" else {}
        self.layers: list[Layer] = []

    def run_node(self, n: fx.Node) -> Any:
        if n in self.learned.values():
            self.inputs[n] = self.fetch_args_kwargs_from_env(n)[0]
        if n.op != "call_module" or str(n.target) not in self.net.sites:
            return super().run_node(n)
        name, (current,) = str(n.target), self.fetch_args_kwargs_from_env(n)[0]
        return self._correct(name, current)

    def _correct(self, name: str, current: Tensor) -> Tensor:
        site, neuron = self.net.sites[name], self.net.neuron(name)
        wanted = self.seen[site.node]
        layer = Layer(site.name, _text(neuron.threshold))
        out: Tensor = neuron(current)
        if neuron.leaky or neuron.reset == "zero" or neuron.spikes > 1:
            out = self._matched(neuron, current, wanted)
            layer.threshold = _text(neuron.threshold)
        producer = self.producers.get(name)
        layer.gap_before = self._gap(producer, out, wanted)
        if name in self.learned:
            current = self._weights(neuron, self.learned[name], wanted, layer)
            out = neuron(current)
        if site.name == ENCODER:
            layer.correction = "none (deterministic rate coding)"
        elif self.settings.correct in ("bias", "weights"):
            out = self._bias(neuron, producer, current, out, wanted, layer)
        elif self.settings.correct == "membrane":
            neuron.v_init = neuron.v_init + self.net.steps * (wanted - self._mean(out)).mean(0)
            layer.correction = "initial membrane of each neuron"
            out = neuron(current)
        layer.error, layer.gap = self._error(out, wanted), self._gap(producer, out, wanted)
        rates = self._mean(out) / (neuron.threshold if neuron.amplitude is None else neuron.amplitude)
        layer.rate = float(rates.mean())
        silent = float((rates.amax(0) == 0).float().mean())
        full = float((rates.mean(0) > 0.95).float().mean())
        layer.figures = {"silent neurons %": round(100 * silent, 1), "saturated neurons %": round(100 * full, 1)}
        self.layers.append(layer)
        return out

    def _matched(self, neuron: Neuron, current: Tensor, wanted: Tensor) -> Tensor:
        """The threshold, of a few times what a spike stands for, whose mean output is nearest to the activation."""
        start, first = neuron.threshold.data.clone(), neuron.v_init.clone()
        tried = []
        for share in (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0):
            neuron.threshold.data, neuron.v_init = start * share, first * share
            tried.append((self._error(neuron(current), wanted), share))
        best = min(tried)[1]
        neuron.threshold.data, neuron.v_init = start * best, first * best
        out: Tensor = neuron(current)
        return out

    def _mean(self, folded: Tensor) -> Tensor:
        return folded.reshape(self.net.steps, -1, *folded.shape[1:]).mean(0)

    def _error(self, out: Tensor, wanted: Tensor) -> float:
        return float((self._mean(out) - wanted).abs().mean() / wanted.abs().mean().clamp(min=_SMALLEST))

    def _gap(self, producer: fx.Node | None, out: Tensor, wanted: Tensor) -> float:
        means = (wanted - self._mean(out)).mean(self._axes(producer, wanted))
        return float(means.abs().mean() / wanted.abs().mean().clamp(min=_SMALLEST))

    def _bias(
        self, neuron: Neuron, producer: fx.Node | None, current: Tensor, out: Tensor, wanted: Tensor, layer: Layer
    ) -> Tensor:
        """b += mean(activation) - mean(output), for each channel."""
        gap = (wanted - self._mean(out)).mean(self._axes(producer, wanted), keepdim=True)[0]
        if producer is None:
            neuron.v_init = neuron.v_init + self.net.steps * gap
            layer.correction = "initial membrane of each channel (no bias of its own to correct)"
            moved: Tensor = neuron(current)
            return moved
        self._add_bias(producer, gap.flatten())
        layer.correction = "weights and bias" if layer.correction == "weights" else "bias"
        corrected: Tensor = neuron(current + gap)
        return corrected

    @staticmethod
    def _axes(producer: fx.Node | None, wanted: Tensor) -> list[int]:
        """All but that of channels, the last one behind a linear layer."""
        channels = wanted.dim() - 1 if producer is not None and operator_name(producer) == "linear" else 1
        return [i for i in range(wanted.dim()) if i != channels]

    def _add_bias(self, producer: fx.Node, gap: Tensor) -> None:
        module = self.net.module
        bias = producer.args[2] if len(producer.args) > 2 else None
        if isinstance(bias, fx.Node):
            module.get_parameter(str(bias.target)).data += gap
            return
        name = f"{str(producer.args[1].target).replace('.', '_')}_correction"  # type: ignore[union-attr]
        module.register_parameter(name, torch.nn.Parameter(gap))
        with module.graph.inserting_before(producer):
            made = module.graph.get_attr(name)
        self.env[made] = gap
        producer.args = (*producer.args[:2], made, *producer.args[3:])
        module.recompile()

    def _weights(self, neuron: Neuron, producer: fx.Node, wanted: Tensor, layer: Layer) -> Tensor:
        """New weights by gradient on the staircase's error, from the mean input of the layer; kept only where the error falls."""
        x, _, *rest = self.inputs.pop(producer)
        constant = len(x) == len(wanted)
        mean = x if constant else self._mean(x)
        parameter = self.net.module.get_parameter(str(producer.args[1].target))  # type: ignore[union-attr]
        target: Any = producer.target
        weight = _fit_weight(
            neuron, lambda w, rows: target(mean[rows], w, *rest), parameter, wanted, self.net.steps, self.settings
        )
        if weight is None:
            layer.note = "weights kept: the error did not fall"
        else:
            parameter.data = weight
            layer.correction = "weights"
        made: Tensor = target(x, parameter, *rest)
        return made.repeat(self.net.steps, *[1] * (made.dim() - 1)) if constant else made


def _alone(net: SpikingNet, producers: Mapping[str, fx.Node]) -> dict[str, fx.Node]:
    """The layers of neurons whose current is that of one weighted layer, with it."""
    found = {}
    for node in net.module.graph.nodes:
        if node.op == "call_module" and str(node.target) in producers:
            x = node.args[0]
            source = x.args[0] if str(x.target).startswith("repeat_") else x
            if source is producers[str(node.target)]:
                found[str(node.target)] = source
    return found


def _fit_weight(neuron: Neuron, current: Any, start: Tensor, wanted: Tensor, steps: int, settings: Spiking) -> Tensor | None:
    """The weight after Adam steps with a straight-through staircase (section 2.5 of the method); None if no better."""
    weight = start.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([weight], settings.learning_rate * 0.1)
    threshold = neuron.threshold.detach()
    order = torch.Generator().manual_seed(settings.seed)

    def loss(rows: Tensor | slice, w: Tensor) -> Tensor:
        z = current(w, rows)
        clipped = torch.minimum(z.clamp(min=0), threshold)
        out = clipped + (staircase(z, threshold, steps, settings.v_init) - clipped).detach()
        return (out - wanted[rows]).square().mean()

    with torch.no_grad():
        before = float(loss(slice(None), weight))
    with torch.enable_grad():
        for _ in range(settings.weight_steps):
            rows = torch.randperm(len(wanted), generator=order)[:32]
            optimizer.zero_grad()
            loss(rows, weight).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        return weight.detach() if float(loss(slice(None), weight)) < before else None


def _text(threshold: Tensor) -> str:
    if threshold.numel() == 1:
        return f"{float(threshold):.4g}"
    return f"{float(threshold.min()):.3g} to {float(threshold.max()):.3g} ({threshold.numel()} channels)"
