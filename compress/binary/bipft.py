"""Binary transformer encoders after BiPFT (Xing et al. 2024), section 3: every product of a matrix with 1-bit operands.

    linear     mean|W| sign(W - mean W)  times  alpha sign(x + shift)       alpha and shift are learned
    scores     Q_b K_b' + [m_q p_k' + p_q m_k' + p_q p_k']                   the bracket estimates what binarization lost
    context    A_b V_b + A_b p_v                                             A_b in {0, alpha}

``m`` and ``p`` are linear maps of the layer's input to ``rank`` numbers a token, shared by all heads; ``p`` starts at 0, so that
at first nothing is estimated. The gradient to weights is the identity, to x it passes where ``|x / alpha| <= 1`` (0 to 1 for
unsigned), to alpha it is the mean of the signs' (LSQ's for unsigned), over the root of the number of values.

Layer normalizations, biases, position and type embeddings, and the head stay in float; the pooler is ``tanh(LN(W_b h) + h)``.
:mod:`edgekit.compress.binary.encoder_training` trains it; :func:`edgekit.compress.binary.baked.baked` gives the trained encoder
as plain operators that freeze to 1-bit ones.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.compress.binary.encoder import Encoder, Layer

__all__ = [
    "BinaryEmbedding",
    "BinaryEncoder",
    "BinaryEncoderLayer",
    "BinaryLinear",
    "BinaryPooler",
    "Elastic",
    "binary_weight",
]

_LEAST = 1e-5


class _Signed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha)
        return torch.where(x >= 0, alpha, -alpha)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, alpha = ctx.saved_tensors
        (g,) = grads
        return g * ((x / alpha).abs() <= 1), (torch.where(x >= 0, g, -g).sum() / x.numel() ** 0.5).view_as(alpha)


class _Unsigned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha)
        return torch.where(x > alpha / 2, alpha, torch.zeros_like(alpha))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, alpha = ctx.saved_tensors
        (g,) = grads
        q = x / alpha
        inside = (q >= 0) & (q <= 1)
        slope = torch.where(inside, (x > alpha / 2).to(x.dtype) - q, (q > 1).to(x.dtype))
        return g * inside, ((slope * g).sum() / x.numel() ** 0.5).view_as(alpha)


class Elastic(nn.Module):
    """An activation's binarizer with a learned size, and with ``features`` a learned shift of each feature (from 0).

    Args:
        unsigned: values 0 and alpha instead of -alpha and alpha.
    """

    def __init__(self, features: int = 0, unsigned: bool = False) -> None:
        super().__init__()
        self.unsigned = unsigned
        self.alpha = nn.Parameter(torch.tensor(1.0))
        self.shift = nn.Parameter(torch.zeros(features)) if features else None
        self.register_buffer("started", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape, features last."""
        if not bool(self.started):
            self.alpha.data.fill_(max((4 if self.unsigned else 2) * float(x.detach().abs().mean()), _LEAST))
            self.started.fill_(True)  # type: ignore[operator]
        x = x if self.shift is None else x + self.shift
        function = _Unsigned if self.unsigned else _Signed
        found: Tensor = function.apply(x, self.size())  # type: ignore[no-untyped-call]
        return found

    def size(self) -> Tensor:
        """alpha, never below 1e-5."""
        return self.alpha.clamp(min=_LEAST)

    def threshold(self) -> Tensor:
        """The bit is ``x >= threshold``: float32, scalar or one for each feature."""
        half = self.size().detach() / 2
        if self.unsigned:
            return torch.nextafter(half, torch.full_like(half, torch.inf))
        return torch.zeros(()) if self.shift is None else -self.shift.detach()


def binary_weight(weight: Tensor, rows: bool = False) -> Tensor:
    """``mean|W| sign(W - mean W)``, one size for the tensor or (``rows``) for each row; gradient 1."""
    size = weight.abs().mean(1, keepdim=True) if rows else weight.abs().mean()
    signs = torch.where(weight - weight.mean() >= 0, size, -size).detach()
    return signs + (weight - weight.detach())


class BinaryLinear(nn.Module):
    """A linear layer of 1-bit weights and inputs.

    Its bias is a whole number of its products' size (rounded straight through), as it will be in the frozen program, and sums are
    taken of -1 and +1: a value on a later sign's threshold then falls on the same side in both.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.input = Elastic(layer.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        alpha, size = self.input.size().detach(), self.weight.detach().abs().mean()
        sums = F.linear(self.input(x) / alpha, binary_weight(self.weight) / size)
        return sums * self.step() + self.whole_bias()

    def step(self) -> Tensor:
        """Size of one product: alpha times mean|W|."""
        return self.input.size().detach() * self.weight.detach().abs().mean()

    def whole_bias(self) -> Tensor:
        """The bias as a multiple of :meth:`step`, float32 (out,)."""
        rounded = torch.round(self.bias.detach() / self.step()) * self.step()
        return self.bias + (rounded - self.bias.detach())


class BinaryEmbedding(nn.Module):
    """Rows of two values each; (B, L) int64 to (B, L, width)."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.weight = nn.Parameter(table.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, L) int64."""
        return F.embedding(x, binary_weight(self.weight, rows=True))


class BinaryEncoderLayer(nn.Module):
    """An encoder layer; ``rank`` 0: without estimators of the residuals (BiPFT-A)."""

    def __init__(self, layer: Layer, rank: int) -> None:
        super().__init__()
        self.heads, self.rank = layer.heads, rank
        width = layer.query.in_features
        for name in ("query", "key", "value", "project", "up", "down"):
            self.add_module(name, BinaryLinear(getattr(layer, name)))
        self.norm1, self.norm2 = copy.deepcopy(layer.norm1), copy.deepcopy(layer.norm2)
        self.of_query, self.of_key, self.of_value, self.of_chance = Elastic(), Elastic(), Elastic(), Elastic(unsigned=True)
        if rank:
            self.main = nn.Linear(width, 2 * rank)  # m_q, m_k
            self.rest = nn.Linear(width, 2 * rank + 1)  # p_q, p_k, p_v
            nn.init.normal_(self.main.weight, std=width**-0.5)
            for tensor in (self.main.bias, self.rest.weight, self.rest.bias):
                nn.init.zeros_(tensor)

    def estimates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The bracket of the scores, (B, 1, L, L), and p_v, (B, 1, L, 1)."""
        r = self.rank
        (mq, mk), (pq, pk, pv) = self.main(x).split(r, -1), self.rest(x).split([r, r, 1], -1)
        bracket = mq @ pk.transpose(-1, -2) + pq @ (mk + pk).transpose(-1, -2)
        return bracket.unsqueeze(1), pv.unsqueeze(1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, L, width)."""
        q, k, v = (Layer.split(self, m(x)) for m in (self.query, self.key, self.value))  # type: ignore[arg-type, operator]
        scores = self.of_query(q) @ self.of_key(k).transpose(-1, -2)
        lost, value = self.estimates(x) if self.rank else (None, None)
        scores = (scores if lost is None else scores + lost) / q.shape[-1] ** 0.5
        chances = self.of_chance(torch.softmax(scores if mask is None else scores + mask, -1))
        context = chances @ self.of_value(v)
        context = context if value is None else context + chances @ value
        x = self.norm1(x + self.project(context.transpose(1, 2).flatten(2)))  # type: ignore[operator]
        y: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))  # type: ignore[operator]
        return y


class BinaryPooler(nn.Module):
    """``tanh(LN(W_b h) + h)`` of the first token."""

    def __init__(self, layer: nn.Linear, eps: float) -> None:
        super().__init__()
        self.dense, self.norm = BinaryLinear(layer), nn.LayerNorm(layer.out_features, eps)

    def forward(self, h: Tensor) -> Tensor:
        """(B, width) to (B, width)."""
        return torch.tanh(self.norm(self.dense(h)) + h)


class BinaryEncoder(Encoder):
    """The student of a float encoder; all its weights start as the float ones.

    Args:
        rank: of the residuals' estimators; 0 for none.
        inputs: the projection of vectors to the width becomes binary too (words always do).
    """

    def __init__(self, encoder: Encoder, rank: int = 1, inputs: bool = False) -> None:
        nn.Module.__init__(self)
        self.config = encoder.config
        self.embeddings = copy.deepcopy(encoder.embeddings)
        table = self.embeddings.input
        if isinstance(table, nn.Embedding):
            self.embeddings.input = BinaryEmbedding(table)
        elif inputs:
            assert isinstance(table, nn.Linear)
            self.embeddings.input = BinaryLinear(table)
        self.layers = nn.ModuleList(BinaryEncoderLayer(layer, rank) for layer in encoder.layers)  # type: ignore[arg-type]
        pooler = encoder.pooler
        self.pooler = None if pooler is None else BinaryPooler(pooler, encoder.config.eps)  # type: ignore[assignment]
        self.head = copy.deepcopy(encoder.head)

    def pooled(self, y: Tensor) -> Tensor:
        """(B, width)."""
        return y.mean(1) if self.pooler is None else self.pooler(y[:, 0])
