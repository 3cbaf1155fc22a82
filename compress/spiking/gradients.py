"""What SLTT saves and what it costs in the gradient: the same network and batch by both rules.

Meng et al. 2023, section 4: the activations that are kept for the backward pass do not grow with the number of steps, and the
gradient points where that of BPTT does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgekit.compress.capture import Graph
from edgekit.compress.spiking.amplitude import fold_amplitudes
from edgekit.compress.spiking.calibrate import calibrate
from edgekit.compress.spiking.fit import Backward, loss_of
from edgekit.compress.spiking.graph import free_batches, survey
from edgekit.compress.spiking.neurons import Neuron, carry, set_steps
from edgekit.compress.spiking.settings import Spiking
from edgekit.compress.spiking.train import by_step
from edgekit.compress.spiking.unroll import SpikingNet, unroll

__all__ = ["compared", "gradient", "through_time"]


def through_time(steps: int) -> Backward:
    """The loss of every step, as SLTT has it, propagated back once through space and time (BPTT)."""

    def backward(module: torch.nn.Module, inputs: Any, target: Tensor, order: torch.Generator) -> Tensor:
        set_steps(module, 1)
        carry(module, True)
        losses = []
        for _ in range(steps):
            result = module(*inputs)
            losses.append(loss_of(result[0] if isinstance(result, tuple | list) else result, target) / steps)
        total = torch.stack(losses).sum()
        total.backward()  # type: ignore[no-untyped-call]
        carry(module, False)
        set_steps(module, steps)
        return total.detach()

    return backward


def gradient(net: SpikingNet, backward: Backward, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """All gradients as one vector, and the most bytes of saved activations at any time."""
    net.module.zero_grad()
    fixed = {p.untyped_storage().data_ptr() for p in net.module.parameters()}
    live = most = 0

    def pack(t: Tensor) -> Any:
        nonlocal live, most
        if t.untyped_storage().data_ptr() in fixed:
            return t
        held = _Held(t)
        live += held.bytes
        most = max(most, live)
        return held

    class _Held:
        def __init__(self, t: Tensor) -> None:
            self.tensor, self.bytes = t, t.numel() * t.element_size()

        def __del__(self) -> None:
            nonlocal live
            live -= self.bytes

    def unpack(held: Any) -> Tensor:
        found: Tensor = held.tensor if isinstance(held, _Held) else held
        return found

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        backward(net.module, (x,), y, torch.Generator().manual_seed(0))
    grads = [p.grad.flatten() for p in net.module.parameters() if p.grad is not None]
    return torch.cat(grads), most


def compared(graph: Graph, x: Tensor, y: Tensor, steps: int, tau: float) -> dict[str, float]:
    """Cosine and largest difference of the gradients of SLTT and BPTT, and the bytes each saves; leaky neurons."""
    graph = free_batches(graph)
    found = survey(graph)
    net = unroll(graph, found, lambda _: Neuron(steps=steps, tau=tau), steps)
    calibrate(net, graph, (x,), Spiking(steps=steps, method="calibrate"))
    fold_amplitudes(net)
    whole, whole_bytes = gradient(net, through_time(steps), x, y)
    space, space_bytes = gradient(net, by_step(steps), x, y)
    return {
        "cosine": float(torch.nn.functional.cosine_similarity(whole, space, 0)),
        "difference": float((whole - space).abs().max()),
        "bptt_bytes": whole_bytes,
        "sltt_bytes": space_bytes,
    }
