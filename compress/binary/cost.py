"""Operations and memory of an encoder, float and binary, with the conventions stated.

* a product counts 2 operations for each multiply-accumulate: FLOPs in float, BOPs where both operands have 1 bit;
  ``operations = FLOPs + BOPs / 64`` (a machine word of 64 signs counts as one operation);
* elementwise work is FLOPs: sums, biases, scales and signs 1 each, softmax 5, layer normalization 8, GELU and tanh 8;
* memory is bytes of ALL tensors: 1 bit a binary weight, and float ones (scales, shifts, biases, normalizations, positions) in 4
  bytes or, ``side_bytes`` 2, in half precision.

The embeddings' look-up is no operation. Published factors round: BERT-base at 128 tokens is quoted with 22.5 G / 0.4 G = 56
(the table of BiT, Liu et al. 2022), and 28 times less memory, between what a float and a half-precision side give here.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.compress.binary.encoder import EncoderConfig

__all__ = ["Cost", "encoder_cost"]

_SOFTMAX, _NORM, _CURVE = 5, 8, 8


@dataclass(frozen=True)
class Cost:
    """What one encoder costs for one sequence.

    Attributes:
        flops, bops: operations, see the module.
        elementwise: the part of ``flops`` that is no product.
        binary_weights: weights of 1 bit.
        float_values: numbers stored in float.
        memory: bytes.
    """

    flops: int
    bops: int
    elementwise: int
    binary_weights: int
    float_values: int
    memory: int

    @property
    def operations(self) -> float:
        """``flops + bops / 64``."""
        return self.flops + self.bops / 64

    @property
    def products(self) -> float:
        """The same without elementwise work."""
        return self.operations - self.elementwise


def encoder_cost(config: EncoderConfig, tokens: int, *, binary: bool, rank: int = 1, side_bytes: int = 4) -> Cost:
    """The cost of an encoder with BERT's pooler (where ``pool`` is first) and its head.

    Args:
        binary: BiPFT's form; else float32.
        rank: of the residuals' estimators, 0 for none.
        side_bytes: bytes of a number that stays in float in the binary encoder.
    """
    n, d, h, f, layers = tokens, config.width, config.heads, config.hidden, config.layers
    pooled = config.pool == "first"
    matrices = layers * (4 * d * d + 2 * d * f) + (d * d if pooled else 0)
    per_token = layers * (4 * d * d + 2 * d * f)
    macs = n * per_token + layers * 2 * n * n * d + (d * d if pooled else 0)
    float_macs = d * config.classes + (n * config.features * d if config.features else 0)
    embedding = config.vocabulary * d
    biases = layers * (4 * d + f + d) + (d if pooled else 0)
    norms = 2 * d * (1 + 2 * layers) + (2 * d if pooled and binary else 0)
    places = (config.positions + config.types) * d
    side = biases + norms + places + d * config.classes + config.classes + (config.features + 1) * d * bool(config.features)
    each = n * (4 * d + f + d) + n * 2 * d + h * n * n * (_SOFTMAX + 1) + n * f * _CURVE + 2 * n * d * _NORM
    elementwise = layers * each + n * d * (2 + _NORM) + (2 + _CURVE) * d * pooled
    if not binary:
        values = matrices + embedding + side
        return Cost(2 * (macs + float_macs) + elementwise, 0, elementwise, 0, values, 4 * values)
    estimators = layers * (4 * rank + bool(rank)) * (d + 1)
    extra = layers * n * ((4 * rank + bool(rank)) * d + 2 * rank * n + h * n * bool(rank))
    shifts = layers * (5 * d + f) + (d if pooled else 0)
    alphas = layers * (6 + 4) + (1 if pooled else 0)
    scales = layers * 6 + config.vocabulary + (1 if pooled else 0)
    signs = layers * (n * (5 * d + f) + 3 * n * d + h * n * n)
    values = side + estimators + shifts + alphas + scales
    weights = matrices + embedding
    memory = -(-weights // 8) + side_bytes * values
    work = elementwise + signs
    return Cost(2 * (float_macs + extra) + work, 2 * macs, work, weights, values, memory)
