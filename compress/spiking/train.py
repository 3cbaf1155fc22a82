"""Training spiking networks by surrogate gradients: through time, through space only, and down to fewer steps.

* ``bptt``: the whole sequence at once; memory grows with the number of steps.
* ``sltt``: every step is propagated back as soon as it is computed, the carried membrane a constant: memory of one step
  (Meng et al., "Towards Memory- and Time-Efficient Backpropagation for Training Spiking Neural Networks", ICCV 2023).
* ``sltt_k``: the same in K steps drawn anew for each batch.
* :func:`shorten`: trained at fewer and fewer steps, each from the weights, thresholds and leaks before (IIR-SNN: Chowdhury,
  Rathi and Roy, "Towards Ultra Low Latency Spiking Neural Networks for Vision and Sequential Tasks Using Temporal Pruning",
  ECCV 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from edgekit.compress.spiking.chip_grid import on_grid, place
from edgekit.compress.spiking.fit import Backward, fit, loss_of, whole
from edgekit.compress.spiking.neurons import carry, detach_state, set_steps
from edgekit.compress.spiking.settings import Spiking
from edgekit.compress.spiking.unroll import SpikingNet
from edgekit.data import Source

__all__ = ["by_step", "rule", "shorten", "train"]


def by_step(steps: int, chosen: int | None = None, *, frames: bool = False, online: bool = True) -> Backward:
    """The backward of SLTT: the loss of a step is ``loss(output of the step) / steps``, propagated back at once.

    Args:
        chosen: how many steps, drawn at random for each batch, are propagated back; None: all (SLTT-K).
        frames: step t gets ``x[:, t:t+1]`` of every input (N, T, ...); else each step gets the whole input.
        online: False keeps all steps' graphs and goes back once, which gives the same gradients and saves no memory.
    """

    def backward(module: nn.Module, inputs: Sequence[Tensor], target: Tensor, order: torch.Generator) -> Tensor:
        set_steps(module, 1)
        carry(module, True)
        picked = set(range(steps)) if chosen is None else set(torch.randperm(steps, generator=order)[:chosen].tolist())
        total, pending = torch.zeros(()), []
        for t in range(steps):
            detach_state(module)
            with nullcontext() if t in picked else torch.no_grad():
                result = module(*(x[:, t : t + 1] if frames else x for x in inputs))
                loss = loss_of(result[0] if isinstance(result, tuple | list) else result, target) / steps
            if t in picked and online:
                loss.backward()  # type: ignore[no-untyped-call]
            elif t in picked:
                pending.append(loss)
            total = total + loss.detach().cpu()
        if pending:
            torch.stack(pending).sum().backward()  # type: ignore[no-untyped-call]
        carry(module, False)
        set_steps(module, steps)
        return total

    return backward


def rule(settings: Spiking, steps: int, *, frames: bool | None = None) -> Backward:
    """The backward that the settings name, for that many steps; ``frames`` in place of the settings'."""
    if settings.rule == "bptt":
        return whole
    return by_step(
        steps,
        (settings.backward_steps or 1) if settings.rule == "sltt_k" else None,
        frames=settings.frames if frames is None else frames,
    )


def train(
    net: SpikingNet, training: Source, settings: Spiking, progress: Callable[[int, int], None] | None = None
) -> list[float]:
    """Train a network over its steps, in place; the mean loss of each epoch."""
    net.run(net.steps)
    backward = rule(settings, net.steps)
    if settings.chip is not None:
        backward = on_grid(backward, net, settings.chip)
    losses = fit(net.module, training, settings, progress, inputs=len(net.sample), backward=backward)
    if settings.chip is not None:
        place(net, settings.chip)
    return losses


def shorten(
    net: SpikingNet,
    training: Source,
    settings: Spiking,
    done: Callable[[SpikingNet], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SpikingNet:
    """Train at every number of steps of ``settings.stages`` in turn, in place.

    Args:
        done: called after each stage with the network of that stage.

    Returns:
        The network of the last stage.
    """
    for steps in settings.stages or (settings.steps,):
        net = replace(net, steps=steps)
        train(net, training, settings, progress)
        if done:
            done(net)
    return net
