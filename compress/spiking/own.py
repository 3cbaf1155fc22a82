"""``spiking:`` of a model that is a spiking network of edgekit's parts already: trained, or frozen as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.compress.spiking.delays import POSITION_RATE, Delayed, anneal, optimizer_groups
from edgekit.compress.spiking.fit import fit
from edgekit.compress.spiking.freeze_network import freeze_network
from edgekit.compress.spiking.neurons import Fold, Neuron, neurons_of
from edgekit.compress.spiking.settings import Spiking
from edgekit.compress.spiking.train import rule
from edgekit.data import Data, sample_inputs
from edgekit.errors import DataError, ModelError
from edgekit.frozen import FrozenProgram

__all__ = ["is_network", "own"]

_CHOSEN = (
    "neuron",
    "tau",
    "tau_syn",
    "reset",
    "spikes",
    "surrogate",
    "learn_threshold",
    "stages",
    "frames",
    "schedule",
    "encoding",
    "chip",
    "early_exit",
    "max_pool",
)
"""Settings that the network itself decides."""


def is_network(model: nn.Module) -> bool:
    """Whether a model holds neurons of edgekit's."""
    return any(isinstance(part, Neuron) for part in model.modules())


def own(
    model: nn.Module, settings: Spiking, data: Data, name: str, progress: Callable[[str, int, int], None] | None = None
) -> tuple[nn.Module, FrozenProgram, dict[str, Any]]:
    """The network, trained where the method says so; its frozen program; and the record of what was done.

    Raises:
        ModelError: settings that the network decides, or another method than ``train`` and ``freeze``.
        DataError: nothing to train on.
    """
    _check(settings)
    network = copy.deepcopy(model)
    inputs = sample_inputs(network, data)
    steps = next(iter(neurons_of(network).values())).steps
    if settings.steps not in (steps, Spiking(method="freeze").steps):
        raise ModelError(f"spiking: steps {settings.steps}, and the network runs {steps}; leave it out")
    record: dict[str, Any] = {}
    if settings.method == "train":
        record["loss by epoch"] = [round(x, 4) for x in _train(network, settings, data, steps, len(inputs), progress)]
    network.eval()
    program = freeze_network(network, inputs, name)
    record |= {"network": f"{len(neurons_of(network))} layers of neurons, {steps} steps", "layers": _layers(network, settings)}
    return network, program, record


def _check(settings: Spiking) -> None:
    if settings.method not in ("train", "freeze"):
        raise ModelError(
            f"spiking: the model is a spiking network already (it has neurons), and method {settings.method} makes one of a "
            "network with ReLUs; take method freeze, or train"
        )
    plain = {f.name: getattr(Spiking(method=settings.method), f.name) for f in fields(Spiking)}
    given = [key for key in _CHOSEN if getattr(settings, key) != plain[key]]
    if given:
        raise ModelError(f"spiking: {', '.join(given)}: the model is a spiking network and decides this itself; leave it out")


def _train(
    network: nn.Module, settings: Spiking, data: Data, steps: int, inputs: int, progress: Callable[[str, int, int], None] | None
) -> list[float]:
    if data.training is None:
        raise DataError(
            "spiking: method train trains, and the data has no training samples; return Data(..., training=(x, y)) from the "
            "data factory, or take method freeze"
        )
    delays = [part for part in network.modules() if isinstance(part, Delayed)]
    if delays and settings.rule != "bptt":
        raise ModelError(f"spiking: rule {settings.rule} goes back through one step, and delays are learned over many; take bptt")
    frames = any(isinstance(part, Fold) for part in network.modules())
    torch.manual_seed(settings.seed)

    def clamp() -> None:
        for part in delays:
            part.clamp()

    report = None if progress is None else partial(progress, "train spiking network")
    return fit(
        network, data.training, settings, report, inputs=inputs, backward=rule(settings, steps, frames=frames), after=clamp,
        groups=optimizer_groups(network, settings.learning_rate, POSITION_RATE / settings.learning_rate) if delays else None,
        each_epoch=(lambda epoch: anneal(delays, epoch, settings.epochs)) if delays else None,
    )  # fmt: skip


def _layers(network: nn.Module, settings: Spiking) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    how = f"trained ({settings.rule})" if settings.method == "train" else "frozen as it was"
    for name, part in network.named_modules():
        if isinstance(part, Neuron):
            tau = f", tau {float(part.tau):.4g} steps" if part.leaky else ""
            found[name] = {"threshold": f"{_mean(part.threshold):.4g}{tau}", "correction": how}
        elif isinstance(part, Delayed):
            synapses = part.synapses()
            lengths = sorted(set(synapses.delay.tolist()))
            found[name] = {"synapses": len(synapses.weight), "delays in steps": lengths, "correction": how}
    return found


def _mean(value: Tensor) -> float:
    return float(value.detach().mean())
