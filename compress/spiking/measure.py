"""What a spiking network answers after each step, and what it costs: spikes and synaptic operations.

A synaptic operation (SynOp, the effective accumulate of NeuroBench, Yik et al. 2025) is one weight that is not zero added because
of one input that is 1. Operations on anything but zeros and ones (an analogue first layer, averaged spikes) are counted
apart, as multiply-accumulates. What is constant over time is computed once and counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from edgekit.compress.spiking.graph import operator_name
from edgekit.compress.spiking.neurons import Decode
from edgekit.compress.spiking.unroll import SpikingNet

__all__ = ["Course", "course", "points", "run_course"]

_WEIGHTED = ("conv2d", "linear", "conv_transpose2d")


@dataclass(frozen=True)
class Course:
    """What a network did on N samples.

    Attributes:
        outputs: means up to each step, (T, N, ...).
        synops, spikes: for one sample, up to each step (T,).
        macs: effective multiply-accumulates for one sample, up to each step (T,).
        neurons: how many there are.
    """

    outputs: Tensor
    synops: Tensor
    spikes: Tensor
    macs: Tensor
    neurons: int


def course(net: SpikingNet, batches: Sequence[tuple[Tensor, ...]], progress: Callable[[int, int], None] | None = None) -> Course:
    """Run ``net.steps`` steps on every batch."""
    found = []
    for i, batch in enumerate(batches):
        found.append(run_course(net, batch))
        if progress:
            progress(i + 1, len(batches))
    sizes = torch.tensor([float(len(b[0])) for b in batches])
    share = (sizes / sizes.sum()).view(-1, 1)
    synops, spikes, macs = ((torch.stack([getattr(c, k) for c in found]) * share).sum(0) for k in ("synops", "spikes", "macs"))
    return Course(torch.cat([c.outputs for c in found], 1), synops, spikes, macs, found[0].neurons)


def run_course(net: SpikingNet, batch: tuple[Tensor, ...]) -> Course:
    """As :func:`course`, one batch."""
    net.run(net.steps)
    counter = _Counter(net, len(batch[0]))
    with torch.no_grad():
        result = counter.run(*batch)
    steps = counter.kept if counter.kept is not None else _only(result).unsqueeze(0).expand(net.steps, *_only(result).shape)
    count = torch.arange(1, net.steps + 1).view(-1, *[1] * (steps.dim() - 1))
    synops, spikes, macs = (counter.totals[k].cumsum(0) / len(batch[0]) for k in ("synops", "spikes", "macs"))
    return Course(steps.cumsum(0) / count, synops, spikes, macs + counter.once / len(batch[0]), counter.neurons)


def points(steps: int) -> list[int]:
    """1, 2, 4, ... and ``steps``."""
    return sorted({min(1 << i, steps) for i in range(steps.bit_length() + 1)})


def _only(result: Any) -> Tensor:
    first: Tensor = result[0] if isinstance(result, tuple | list) else result
    return first


class _Counter(fx.Interpreter):
    def __init__(self, net: SpikingNet, batch: int) -> None:
        super().__init__(net.module)
        self.net, self.batch = net, batch
        self.totals = {k: torch.zeros(net.steps, dtype=torch.float64) for k in ("synops", "spikes", "macs")}
        self.once = 0.0
        self.neurons = 0
        self.kept: Tensor | None = None
        (output,) = (n for n in net.module.graph.nodes if n.op == "output")
        first = output.args[0][0] if isinstance(output.args[0], tuple | list) else output.args[0]
        self.last = first

    def run_node(self, n: fx.Node) -> Any:
        if n is self.last and n.op == "call_module" and isinstance(self.net.module.get_submodule(str(n.target)), Decode):
            x: Any = n.args[0]
            self.kept = self._by_step(self.env[x])
        if n.op == "call_function" and operator_name(n) in _WEIGHTED:
            self._synapses(n)
        result = super().run_node(n)
        if n.op == "call_module" and str(n.target) in self.net.sites:
            self.totals["spikes"] += self._by_step(result != 0).flatten(1).sum(1)
            self.neurons += result[0].numel()
        return result

    def _by_step(self, folded: Tensor) -> Tensor:
        return folded.reshape(self.net.steps, -1, *folded.shape[1:])

    def _synapses(self, n: fx.Node) -> None:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        x, weight = args[0], args[1]
        bias = [None] if len(args) > 2 else []
        target: Any = n.target
        found = target((x != 0).float(), (weight != 0).float(), *bias, *args[3:], **kwargs).double()
        if len(x) == self.batch and self.net.steps > 1 and not self.net.frames:
            self.once += float(found.sum())
            return
        binary = bool(((x == 0) | (x == 1)).all())
        self.totals["synops" if binary else "macs"] += self._by_step(found).flatten(1).sum(1)
