"""A BERT-style encoder in plain modules: Hugging Face's architecture and weight names, or vectors instead of words as input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.errors import ModelError

__all__ = ["Embeddings", "Encoder", "EncoderConfig", "Layer", "config_of", "from_hugging_face"]


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder.

    Attributes:
        layers, width, heads, hidden: as in BERT ("hidden_size" is ``width``, "intermediate_size" is ``hidden``).
        positions: longest sequence.
        vocabulary: words; 0: the input is vectors of ``features`` numbers, projected to the width.
        types: token types; 0 for none.
        classes: outputs of the head; 0: the sequence and the pooled vector, as BERT gives them.
        pool: ``first``: BERT's pooler on the first token; ``mean``: the mean over tokens.
        eps: of layer normalization.
    """

    layers: int = 2
    width: int = 128
    heads: int = 2
    hidden: int = 512
    positions: int = 512
    vocabulary: int = 0
    features: int = 0
    types: int = 0
    classes: int = 0
    pool: str = "first"
    eps: float = 1e-12

    def __post_init__(self) -> None:
        """Raise ModelError for sizes that do not fit."""
        if self.width % self.heads:
            raise ModelError(f"encoder: width {self.width} is no multiple of {self.heads} heads")
        if bool(self.vocabulary) == bool(self.features):
            raise ModelError("encoder: give either a vocabulary or a number of features")
        if self.pool not in ("first", "mean"):
            raise ModelError(f"encoder: pool {self.pool!r}; expected first or mean")


class Embeddings(nn.Module):
    """Words or vectors, plus positions and types, normalized: (B, L) int64 or (B, L, features) to (B, L, width)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.words = bool(config.vocabulary)
        self.input: nn.Module = (
            nn.Embedding(config.vocabulary, config.width) if self.words else nn.Linear(config.features, config.width)
        )
        self.positions = nn.Parameter(torch.randn(config.positions, config.width) * 0.02)
        self.types = nn.Parameter(torch.zeros(config.types, config.width)) if config.types else None
        self.norm = nn.LayerNorm(config.width, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        y = self.input(x)
        y = y + self.positions[: y.shape[1]]
        y = y if self.types is None else y + self.types[0]
        return self.norm(y)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Self-attention and two linear layers with GELU, each followed by a sum and a normalization."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query, self.key, self.value, self.project = (nn.Linear(config.width, config.width) for _ in range(4))
        self.norm1, self.norm2 = (nn.LayerNorm(config.width, config.eps) for _ in range(2))
        self.up, self.down = nn.Linear(config.width, config.hidden), nn.Linear(config.hidden, config.width)

    def split(self, x: Tensor) -> Tensor:
        """(B, L, width) to (B, heads, L, width / heads)."""
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """What the heads give, joined: (B, L, width)."""
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores if mask is None else scores + mask
        return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, L, width); mask is added to the scores, (B, 1, 1, L)."""
        x = self.norm1(x + self.project(self.attention(x, mask)))
        y: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return y


class Encoder(nn.Module):
    """The float encoder."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.pooler = nn.Linear(config.width, config.width) if config.pool == "first" else None
        self.head = nn.Linear(config.width, config.classes) if config.classes else None

    def hidden(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """The values after each layer, the embeddings' first: each (B, L, width)."""
        found = [self.embeddings(x)]
        for layer in self.layers:
            found.append(layer(found[-1], mask))
        return found

    def pooled(self, y: Tensor) -> Tensor:
        """(B, width)."""
        return y.mean(1) if self.pooler is None else torch.tanh(self.pooler(y[:, 0]))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        """x: (B, L) int64, or (B, L, features); (B, classes), or (B, L, width) and (B, width) without a head."""
        y = self.hidden(x, mask)[-1]
        pooled = self.pooled(y)
        return (y, pooled) if self.head is None else self.head(pooled)


def config_of(settings: Mapping[str, Any], classes: int = 0) -> EncoderConfig:
    """The sizes in a Hugging Face ``config.json`` of model type ``bert``.

    Raises:
        ModelError: another architecture, or an option that is not built here.
    """
    kind, act = settings.get("model_type", "bert"), settings.get("hidden_act", "gelu")
    if kind != "bert" or act != "gelu":
        raise ModelError(f"encoder: model type {kind!r} with activation {act!r}; only bert with gelu is read")
    if settings.get("position_embedding_type", "absolute") != "absolute":
        raise ModelError(f"encoder: position embeddings {settings['position_embedding_type']!r}; only absolute ones are read")
    return EncoderConfig(
        layers=int(settings["num_hidden_layers"]), width=int(settings["hidden_size"]), heads=int(settings["num_attention_heads"]),
        hidden=int(settings["intermediate_size"]), positions=int(settings["max_position_embeddings"]),
        vocabulary=int(settings["vocab_size"]), types=int(settings["type_vocab_size"]), classes=classes,
        eps=float(settings.get("layer_norm_eps", 1e-12)),
    )  # fmt: skip


_LAYER = {
    "attention.self.query": "query", "attention.self.key": "key", "attention.self.value": "value",
    "attention.output.dense": "project", "attention.output.LayerNorm": "norm1", "intermediate.dense": "up",
    "output.dense": "down", "output.LayerNorm": "norm2",
}  # fmt: skip
_TOP = {
    "embeddings.word_embeddings.weight": "embeddings.input.weight",
    "embeddings.position_embeddings.weight": "embeddings.positions",
    "embeddings.token_type_embeddings.weight": "embeddings.types",
    "embeddings.LayerNorm.weight": "embeddings.norm.weight",
    "embeddings.LayerNorm.bias": "embeddings.norm.bias",
    "pooler.dense.weight": "pooler.weight",
    "pooler.dense.bias": "pooler.bias",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
}


def from_hugging_face(settings: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None, classes: int = 0) -> Encoder:
    """An encoder from a Hugging Face ``config.json`` and the model's state dict (read it with ``safetensors``).

    Args:
        weights: names as BertModel has them, a prefix ``bert.`` is taken off; None: random weights. A ``classifier`` is taken
            if it fits ``classes``; heads for words (``cls.``) are not.

    Raises:
        ModelError: another architecture, weights that are missing or of another shape.
    """
    encoder = Encoder(config_of(settings, classes))
    if weights is None:
        return encoder.eval()
    own = encoder.state_dict()
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = _name(key.removeprefix("bert."))
        if name in own:
            found[name] = value.float()
    missing = [n for n in own if n not in found and not n.startswith("head.")]
    if missing:
        raise ModelError(f"encoder: the weights lack {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}")
    wrong = [n for n, v in found.items() if v.shape != own[n].shape]
    if wrong:
        given, wanted = tuple(found[wrong[0]].shape), tuple(own[wrong[0]].shape)
        raise ModelError(f"encoder: {wrong[0]} has shape {given}, the configuration says {wanted}")
    encoder.load_state_dict(found, strict=False)
    return encoder.eval()


def _name(key: str) -> str:
    """Our name of a Hugging Face weight, "" for one that is not ours."""
    if key in _TOP:
        return _TOP[key]
    parts = key.split(".")
    if parts[:2] == ["encoder", "layer"] and ".".join(parts[3:-1]) in _LAYER:
        return f"layers.{parts[2]}.{_LAYER['.'.join(parts[3:-1])]}.{parts[-1]}"
    return ""
