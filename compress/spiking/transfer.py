"""Static images help a network that sees events: joint training with aligned features.

He et al., "An Efficient Knowledge Transfer Strategy for Spiking Neural Networks from Static to Event Domain", AAAI 2024. Each
event sample goes with a random static image of its class, repeated as frames; features of both are aligned by CKA with a weight
learned for each step; while training goes on, static images are replaced by the events themselves. The heads are two; the event
head is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekit.compress.spiking.fit import loss_of
from edgekit.compress.spiking.neurons import Decode
from edgekit.compress.spiking.settings import Spiking
from edgekit.compress.spiking.unroll import SpikingNet
from edgekit.errors import DataError, ModelError

__all__ = ["Pairs", "cka", "pairs_of", "sliding_share", "train_transfer"]

_ALIGN, _TET, _LEAST = 0.5, 1e-3, 8


@dataclass(frozen=True)
class Pairs:
    """Event samples (N, T, 2, H, W), static images (M, H, W) from 0 to 1, and the labels of both, int64."""

    events: Tensor
    labels: Tensor
    static: Tensor
    static_labels: Tensor


def cka(a: Tensor, b: Tensor) -> Tensor:
    """Linear centred kernel alignment of two sets of features (B, D), a scalar: 1 for equal ones.

    It does not see rotations, shifts and scale. Small batches overstate it.
    """
    g, h = (_centred(x @ x.T) for x in (a, b))
    found: Tensor = (g * h).sum() / (torch.linalg.norm(g) * torch.linalg.norm(h) + 1e-7)
    return found


def _centred(gram: Tensor) -> Tensor:
    means = gram.mean(0)
    means = means - means.mean() / 2
    return gram - means.unsqueeze(0) - means.unsqueeze(1)


def sliding_share(done: float) -> float:
    """Share of static images replaced by events when a share ``done`` of the training is over: its cube."""
    return min(1.0, max(0.0, done)) ** 3


def pairs_of(data: Pairs, rows: Tensor, share: float, order: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Static frames, event frames (B, T, 2, H, W) and labels for some event samples.

    Raises:
        DataError: a class of events without static images.
    """
    events, labels = data.events[rows], data.labels[rows]
    chosen = []
    for label in labels.tolist():
        same = (data.static_labels == label).nonzero().flatten()
        if not len(same):
            raise DataError(f"transfer: no static image has label {label}, which an event sample has")
        chosen.append(same[int(torch.randint(len(same), (1,), generator=order))])
    frames = data.static[torch.stack(chosen)].unsqueeze(1).unsqueeze(1).expand_as(events).clone()
    replaced = torch.rand(len(rows), generator=order) < share
    frames[replaced] = events[replaced]
    return frames, events, labels


def train_transfer(
    net: SpikingNet, data: Pairs, settings: Spiking, progress: Callable[[int, int], None] | None = None
) -> list[float]:
    """Train a network of frames in place, its own head for events; the mean loss of each epoch.

    Raises:
        ModelError: the network does not end in a linear layer and the mean over frames.
        DataError: fewer event samples than a batch.
    """
    head, decode, features = _ends(net)
    size = min(settings.train_batch_size, len(data.events))
    if size < _LEAST:
        raise DataError(f"transfer: batches of {size} event samples; the alignment of features needs {_LEAST} or more")
    module = net.module
    net.run(net.steps)
    other = {k: nn.Parameter(module.get_parameter(k).detach().clone()) for k in head}
    theta = nn.Parameter(torch.ones(net.steps))
    order = torch.Generator().manual_seed(settings.seed)
    steps = settings.epochs * (len(data.events) // size)
    optimizer = torch.optim.AdamW([*module.parameters(), *other.values(), theta], settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    losses, done = [], 0
    decode.record = True
    module.train()
    with torch.enable_grad():
        for _ in range(settings.epochs):
            total = 0.0
            whole = len(data.events) // size * size
            for rows in torch.split(torch.randperm(len(data.events), generator=order)[:whole], size):
                static, events, labels = pairs_of(data, rows, sliding_share(done / max(steps, 1)), order)
                seen = [_seen(net, decode, features, x, given) for x, given in ((static, other), (events, {}))]
                loss = _loss(seen, labels, torch.sigmoid(theta))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                done, total = done + 1, total + float(loss)
                if progress:
                    progress(done, steps)
            losses.append(total / max(1, len(data.events) // size))
    decode.record, decode.recorded = False, None
    module.eval()
    return losses


def _loss(seen: list[tuple[Tensor, Tensor]], labels: Tensor, w: Tensor) -> Tensor:
    """Classification of both, the event part weighted by 1 - w at each step, and alignment by w."""
    (static_out, static_f), (event_out, event_f) = seen
    steps = len(event_out)
    align = torch.stack([w[t] * (1 - cka(static_f[t], event_f[t]).abs()) for t in range(steps)]).mean()
    static = torch.stack([_tet(o, labels) for o in static_out]).mean()
    events = torch.stack([(1 - w[t]) * _tet(event_out[t], labels) for t in range(steps)]).mean()
    return static + events + _ALIGN * align


def _tet(output: Tensor, labels: Tensor) -> Tensor:
    return (1 - _TET) * loss_of(output, labels) + _TET * (output - 0.5).square().mean()


def _seen(net: SpikingNet, decode: Decode, features: str, x: Tensor, given: dict[str, nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Outputs (T, B, classes) and membranes of the last neurons (T, B, D)."""
    neuron = net.neuron(features)
    neuron.record = True
    torch.func.functional_call(net.module, dict(given), (x,))
    assert decode.recorded is not None and neuron.recorded is not None
    membranes = neuron.recorded.flatten(2)
    neuron.record, neuron.recorded = False, None
    return decode.recorded, membranes


def _ends(net: SpikingNet) -> tuple[list[str], Decode, str]:
    """Parameters of the last linear layer, the mean over frames, and the last layer of neurons."""
    (output,) = (n for n in net.module.graph.nodes if n.op == "output")
    last = output.args[0]
    linear = last.args[0] if last.op == "call_module" else None
    if not net.frames or linear is None or "linear" not in str(linear.target):
        raise ModelError("transfer: expected a network of frames that ends in a linear layer and the mean over frames")
    decode = net.module.get_submodule(str(last.target))
    assert isinstance(decode, Decode)
    return [str(a.target) for a in linear.args[1:] if a is not None], decode, list(net.sites)[-1]
