"""Settings of ``repair:`` as they stand in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

__all__ = ["Repair"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Repair:
    """Training of a compressed model against the original one, without labels (PELA, Guo et al. 2024).

    Attributes:
        epochs: passes over the data: the training inputs where the data has them, else the calibration inputs; labels are not
            looked at unless ``labels`` is more than 0.
        learning_rate: of Adam, with cosine decay to zero.
        train_batch_size: samples in a training step.
        features: weight of the squared error of intermediate values, each relative to its variance in the original.
        points: where they are compared: ``blocks``, the sums of residual blocks (all weighted layers where there are none), or
            ``layers``, all weighted layers.
        outputs: weight of the squared error of the model's outputs, relative to their variance.
        labels: weight of the cross entropy with the training labels.
        weight_penalty: weight of what keeps changed layers near their original weights.
        penalty_norm: ``frobenius``: squared relative distance of the product of the parts; ``max``: PELA's
            ``(largest deviation - 0.001)^2``, whose gradient reaches one entry of a layer only.
        device: "cpu" or "cuda".
        seed: of the order of samples.
    """

    epochs: Annotated[int, Field(ge=1)] = 5
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    train_batch_size: Annotated[int, Field(ge=1)] = 64
    features: Annotated[float, Field(ge=0)] = 1.0
    points: Literal["blocks", "layers"] = "blocks"
    outputs: Annotated[float, Field(ge=0)] = 1.0
    labels: Annotated[float, Field(ge=0)] = 0.0
    weight_penalty: Annotated[float, Field(ge=0)] = 0.0
    penalty_norm: Literal["frobenius", "max"] = "frobenius"
    device: Literal["cpu", "cuda"] = "cpu"
    seed: int = 0
