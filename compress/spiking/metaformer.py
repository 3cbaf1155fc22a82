"""Blocks of Meta-SpikeFormer (spike-driven transformer V2): every product has spikes as one of its operands.

Yao et al., "Spike-driven Transformer V2: Meta Spiking Neural Network Architecture Inspiring the Design of Next-generation
Neuromorphic Chips", ICLR 2024. Values are folded sequences (T*N, C, H, W); residual sums are of membranes, before the neurons.
``fuse_repconv`` makes one 3 x 3 convolution of each three that train.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgekit.compress.spiking.neurons import Decode, Neuron, Repeat

__all__ = ["Attention", "ChannelConv", "ConvBlock", "MetaSpikeFormer", "Mixer", "RepConv", "SepConv", "fuse_repconv"]

MakeNeuron = Callable[[float], Neuron]
"""Threshold to a layer of neurons."""


def _standard(steps: int, surrogate: str) -> MakeNeuron:
    """The paper's: tau 2 with decayed input, hard reset without gradient."""
    return lambda threshold: Neuron(
        threshold, steps=steps, tau=2.0, r="one", reset="zero", detach_reset=True, surrogate=surrogate
    )


def _conv(inputs: int, outputs: int, kernel: int, **more: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, bias=False, **more), nn.BatchNorm2d(outputs))


class SepConv(nn.Module):
    """Spikes, 1 x 1 to twice the channels, spikes, 7 x 7 depthwise, 1 x 1 back."""

    def __init__(self, channels: int, neuron: MakeNeuron) -> None:
        super().__init__()
        wide = 2 * channels
        self.first, self.second = neuron(1.0), neuron(1.0)
        self.expand = _conv(channels, wide, 1)
        self.depthwise = nn.Conv2d(wide, wide, 7, padding=3, groups=wide, bias=False)
        self.project = _conv(wide, channels, 1)

    def forward(self, u: Tensor) -> Tensor:
        x = self.expand(self.first(u))
        found: Tensor = self.project(self.depthwise(self.second(x)))
        return found


class ChannelConv(nn.Module):
    """Spikes, 3 x 3 to four times the channels, spikes, 3 x 3 back; 1 x 1 both in a transformer block (its MLP)."""

    def __init__(self, channels: int, neuron: MakeNeuron, kernel: int = 3) -> None:
        super().__init__()
        self.first, self.second = neuron(1.0), neuron(1.0)
        self.expand = _conv(channels, 4 * channels, kernel, padding=kernel // 2)
        self.project = _conv(4 * channels, channels, kernel, padding=kernel // 2)

    def forward(self, u: Tensor) -> Tensor:
        found: Tensor = self.project(self.second(self.expand(self.first(u))))
        return found


class ConvBlock(nn.Module):
    """u + SepConv(u), then + ChannelConv."""

    def __init__(self, channels: int, neuron: MakeNeuron) -> None:
        super().__init__()
        self.separable, self.channel = SepConv(channels, neuron), ChannelConv(channels, neuron)

    def forward(self, u: Tensor) -> Tensor:
        u = u + self.separable(u)
        found: Tensor = u + self.channel(u)
        return found


class RepConv(nn.Module):
    """1 x 1, batch norm, 3 x 3 depthwise over a border of what the norm makes of 0, 1 x 1, batch norm; fused: one 3 x 3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, groups=channels, bias=False)
        self.last, self.end = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.fused: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is not None:
            one: Tensor = self.fused(x)
            return one
        y = self.norm(self.first(x))
        _, shift = _affine(self.norm)
        border = shift.view(1, -1, 1, 1).expand(len(y), -1, y.shape[2] + 2, y.shape[3] + 2).clone()
        border[:, :, 1:-1, 1:-1] = y
        found: Tensor = self.end(self.last(self.depthwise(border)))
        return found

    def kernel(self) -> tuple[Tensor, Tensor]:
        """Weight (C, C, 3, 3) and bias (C,) of the one convolution, in float64."""
        scale, shift = _affine(self.norm)
        out_scale, out_shift = _affine(self.end)
        first = self.first.weight[:, :, 0, 0].double() * scale.double().view(-1, 1)
        middle, last = (
            self.depthwise.weight[:, 0].double(),
            self.last.weight[:, :, 0, 0].double() * out_scale.double().view(-1, 1),
        )
        weight = torch.einsum("om,mhw,mi->oihw", last, middle, first)
        bias = last @ (middle.sum((1, 2)) * shift.double()) + out_shift.double()
        return weight, bias


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in evaluation mode."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def fuse_repconv(model: nn.Module, *, norms: bool = True) -> int:
    """Make each RepConv one 3 x 3 convolution, in place, for evaluation; how many there were.

    Args:
        norms: fold the batch norm that follows it in a Sequential, too.
    """
    found = [m for m in model.modules() if isinstance(m, RepConv)]
    with torch.no_grad():
        for part in found:
            weight, bias = part.kernel()
            channels = len(bias)
            part.fused = nn.Conv2d(channels, channels, 3, padding=1)
            part.fused.weight.copy_(weight)
            part.fused.bias.copy_(bias)  # type: ignore[union-attr]
            del part.first, part.norm, part.depthwise, part.last, part.end
        for sequence in [m for m in model.modules() if isinstance(m, nn.Sequential) and norms]:
            _fold_following(sequence)
    return len(found)


def _fold_following(sequence: nn.Sequential) -> None:
    for i, part in enumerate(sequence):
        after = sequence[i + 1] if i + 1 < len(sequence) else None
        if isinstance(part, RepConv) and isinstance(after, nn.BatchNorm2d) and part.fused is not None:
            scale, shift = _affine(after)
            assert part.fused.bias is not None
            part.fused.weight.mul_(scale.view(-1, 1, 1, 1))
            part.fused.bias.mul_(scale).add_(shift)
            sequence[i + 1] = nn.Identity()


class Attention(nn.Module):
    """Spike-driven self-attention: binary queries, keys and values.

    Args:
        form: "sdsa3": ``spikes(Q (K^T V) / 8)`` by heads, linear in the number of tokens; "sdsa1": Q masks the channels in which
            the sum over tokens of K * V makes a neuron fire.
    """

    def __init__(self, channels: int, heads: int, neuron: MakeNeuron, form: Literal["sdsa1", "sdsa3"] = "sdsa3") -> None:
        super().__init__()
        self.heads, self.form = heads, form
        self.head, self.out = neuron(1.0), neuron(0.5)
        self.q, self.k, self.v = (nn.Sequential(RepConv(channels), nn.BatchNorm2d(channels)) for _ in range(3))
        self.q_spikes, self.k_spikes, self.v_spikes = neuron(1.0), neuron(1.0), neuron(1.0)
        self.project = nn.Sequential(RepConv(channels), nn.BatchNorm2d(channels))

    def forward(self, u: Tensor) -> Tensor:
        s = self.head(u)
        q, k, v = self.q_spikes(self.q(s)), self.k_spikes(self.k(s)), self.v_spikes(self.v(s))
        found: Tensor = self.project(self.mixed(q, k, v))
        return found

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Spikes of queries, keys and values (T*N, C, H, W) to spikes of the same shape."""
        if self.form == "sdsa1":
            mask: Tensor = self.out((k * v).sum((2, 3), keepdim=True))
            return q * mask
        shape = q.shape
        q, k, v = (t.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3) for t in (q, k, v))  # type: ignore[no-untyped-call]
        counts = (q @ (k.transpose(2, 3) @ v)) * 0.125
        spikes: Tensor = self.out(counts.transpose(2, 3).reshape(shape))
        return spikes


class Mixer(nn.Module):
    """A transformer block: u + attention, then + MLP."""

    def __init__(self, channels: int, heads: int, neuron: MakeNeuron, form: Literal["sdsa1", "sdsa3"] = "sdsa3") -> None:
        super().__init__()
        self.attention = Attention(channels, heads, neuron, form)
        self.mlp = ChannelConv(channels, neuron, 1)

    def forward(self, u: Tensor) -> Tensor:
        u = u + self.attention(u)
        found: Tensor = u + self.mlp(u)
        return found


class MetaSpikeFormer(nn.Module):
    """The whole network: images (N, inputs, H, W), H and W multiples of 16, repeated ``steps`` times, to logits (N, classes).

    Args:
        dims: channels of the stages.
        depths: conv blocks of stages 1a, 1b and 2, transformer blocks of stages 3 and 4.
        form: of attention. "sdsa3" fires at eight coincidences of Q, K and V, which images of few tokens do not reach; a silent
            attention makes gradients explode in the batch norms behind it. "sdsa1" fires at one.
        surrogate: derivative of a spike.
    """

    def __init__(
        self,
        classes: int,
        dims: tuple[int, int, int, int] = (16, 32, 48, 64),
        depths: tuple[int, int, int, int, int] = (1, 1, 1, 2, 1),
        heads: int = 4,
        steps: int = 4,
        inputs: int = 3,
        form: Literal["sdsa1", "sdsa3"] = "sdsa3",
        surrogate: str = "sigmoid",
    ) -> None:
        super().__init__()
        neuron = _standard(steps, surrogate)
        d1, d2, d3, d4 = dims
        half = d1 // 2
        self.repeat, self.decode = Repeat(steps), Decode(steps)

        def down(i: int, o: int, stride: int) -> list[nn.Module]:
            return [neuron(1.0), _conv(i, o, 3, stride=stride, padding=1)]

        def convs(n: int, c: int) -> list[nn.Module]:
            return [ConvBlock(c, neuron) for _ in range(n)]

        def mixers(n: int, c: int) -> list[nn.Module]:
            return [Mixer(c, heads, neuron, form) for _ in range(n)]

        self.body = nn.Sequential(
            _conv(inputs, half, 7, stride=2, padding=3), *convs(depths[0], half),
            *down(half, d1, 2), *convs(depths[1], d1),
            *down(d1, d2, 2), *convs(depths[2], d2),
            *down(d2, d3, 2), *mixers(depths[3], d3),
            *down(d3, d4, 1), *mixers(depths[4], d4),
        )  # fmt: skip
        self.last, self.head = neuron(1.0), nn.Linear(d4, classes)

    def forward(self, x: Tensor) -> Tensor:
        u = self.body(self.repeat(x)).mean((2, 3))
        found: Tensor = self.decode(self.head(self.last(u)))
        return found
