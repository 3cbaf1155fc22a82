"""Small transformers in the styles users write, with random affine parameters and an offset in the embeddings (seeded)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Fused q, k, v and torch's own attention, as timm has it."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).reshape(b, t, c))


class Scale(nn.Module):
    """LayerScale (CaiT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class PreNorm(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool = False, scaled: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, causal)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale1, self.scale2 = (Scale(width) if scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1(self.attention(self.norm1(x)))
        return x + self.scale2(self.down(F.gelu(self.up(self.norm2(x)))))


class Vision(nn.Module):
    """ViT: patches by a conv, a class token, learned positions, layer scale; input (N, 3, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 24, 4, 4), nn.Parameter(torch.randn(1, 1, 24))
        self.position = nn.Parameter(torch.randn(1, 17, 24))
        self.blocks = nn.Sequential(PreNorm(24, 4, scaled=True), PreNorm(24, 4, scaled=True))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class Generator(nn.Module):
    """GPT-2: token and position tables, causal attention, the head tied to the token table; input (N, 7) integers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(31, 24), nn.Embedding(7, 24)
        self.blocks = nn.ModuleList([PreNorm(24, 4, causal=True), PreNorm(24, 4, causal=True)])
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 31, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class Reader(nn.Module):
    """BERT with its norms in front: token, position and segment tables, torch's own encoder layer; input (N, 7) integers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.segments = nn.Embedding(31, 24), nn.Embedding(7, 24), nn.Embedding(2, 24)
        layer = nn.TransformerEncoderLayer(24, 4, 48, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(24), enable_nested_tensor=False)
        self.pool, self.head = nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1])) + self.segments(torch.zeros_like(x))
        return self.head(torch.tanh(self.pool(self.layers(h).mean(1))))


def build(kind: type[nn.Module], offset: float = 0.0, seed: int = 0) -> nn.Module:
    """A model in eval mode; ``offset`` is added to every embedding."""
    torch.manual_seed(seed)
    model = kind().eval()
    for m in model.modules():
        if isinstance(m, nn.LayerNorm):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.5)
        elif isinstance(m, Scale):
            m.gamma.data.uniform_(0.5, 1.5)
        elif isinstance(m, nn.Embedding):
            m.weight.data.add_(offset / 2)
        elif isinstance(m, nn.Linear | nn.Conv2d) and m.bias is not None:
            m.bias.data.normal_(0, 0.5)
    return model


def inputs(kind: type[nn.Module], n: int = 6, seed: int = 1) -> Tensor:
    """n inputs of a kind."""
    generator = torch.Generator().manual_seed(seed)
    if kind is Vision:
        return torch.randn(n, 3, 16, 16, generator=generator)
    return torch.randint(0, 31, (n, 7), generator=generator)
