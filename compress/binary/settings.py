"""Settings of ``binary:`` as they stand in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from edgekit.compress.patterns import check_patterns

__all__ = ["Binary", "Distill", "Kind", "Stage"]

_FORBID = ConfigDict(extra="forbid")

Kind = Literal["binary", "binary_weights", "binary_activations", "ternary_weights", "float"]


@dataclass(frozen=True, config=_FORBID, kw_only=True)
class Stage:
    """A part of the training.

    Attributes:
        epochs: passes over the training data.
        learning_rate: of Adam at the stage's start, with cosine decay to zero.
        weights: ``real``: weights are not binarized yet (with ``estimator: biper`` they are sin(frequency * w)); ``binary``: they
            are, as the layer's kind says.
        activations: ``real``: inputs are not binarized yet; ``binary``: they are.
    """

    epochs: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    weights: Literal["real", "binary"] = "binary"
    activations: Literal["real", "binary"] = "binary"


@dataclass(frozen=True, config=_FORBID, kw_only=True)
class Distill:
    """What is learned from the float model beside the labels.

    Attributes:
        outputs: weight of the distance of the outputs: Kullback-Leibler divergence at ``temperature`` for class scores (training
            data with class labels), else the squared error over its variance.
        temperature: of that softmax.
        features: weight of the squared error of intermediate values, each over its variance in the float model.
        points: where these are compared: ``blocks``, sums of residual blocks (all weighted layers if none), or ``layers``.
        labels: weight of the loss on the labels; 0: they are not looked at.
    """

    outputs: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    features: Annotated[float, Field(ge=0)] = 0.0
    points: Literal["blocks", "layers"] = "blocks"
    labels: Annotated[float, Field(ge=0)] = 1.0


@dataclass(frozen=True, config=_FORBID, kw_only=True)
class Binary:
    """Training of a network with 1-bit layers, started from the float model. ``ptq`` must follow: the rest becomes int8.

    Attributes:
        estimator: how gradients pass the sign. ``ste``: unchanged from -1 to 1 (Hubara et al. 2016); ``polynomial``: times
            2 - 2 abs(x) for activations (Liu et al. 2018, Bi-Real); ``reste``: the power function's slope (Wu et al. 2023);
            ``biper``: weights are sign(sin(frequency * w)), activations as ``polynomial`` (Vargas et al. 2024);
            ``brevitas``: Brevitas's binary and ternary quantizers.
        kind: what becomes of a layer: ``binary``: weights and inputs; ``binary_weights``: weights (inputs int8);
            ``binary_activations``: inputs; ``ternary_weights``: weights -1, 0, +1 (needs ``estimator: brevitas``).
        scopes: regular expression (full match on the layer's name) to kind, ``float`` for none; the first that fits wins.
        keep_first_last: the first and the last layer with weights are not binarized, unless a scope says so.
        scale: of binary weights: ``channel``, the mean size in each output channel, or ``tensor``, one. With ``norm: batch`` it
            is in the normalization all the same.
        norm: ``batch``: each binary layer's output is normalized by its batch statistics and given the mean and spread that the
            float layer had, then trained; ``none``: a learned scale of its input and a bias only.
        shift: a threshold for each input channel instead of 0, started at the channel's mean (ReActNet's RSign, Liu et al. 2020).
        shortcut: add each binary layer's input to its output where the shapes allow it (Bi-Real). A sum that is there stays the
            only one; that of a block of two layers starts from the second layer's input.
        relu: ``keep``, or ``remove`` those after binary layers and after the sums that these go to. A ReLU that only signs read
            is always taken out: with a threshold of its own the sign can do all that it does.
        o_end: last exponent of ``reste``; 1 is ``ste`` with a window of ``clip``.
        o_schedule: of that exponent over the epochs: ``cos``: 1 + (o_end - 1)(1 - cos(pi/2 e/E)), or ``linear``.
        clip: ``reste``: gradients stop where abs(x) > clip.
        linear_below: ``reste``: its slope is constant where abs(x) <= linear_below, where the power function's has a pole.
        frequency: ``biper``: of the sine; ``auto``: for each layer the one that gives ``target_error``.
        target_error: mean distance of sin(frequency * w) from its sign for Laplacian weights, 0.3634 (no less exists) to 1.
        tau: ``biper``: weight of the mean sin^2(frequency * w), the paper's regularizer; it holds weights near a change of sign.
        epochs, learning_rate: one stage of training; ``biper`` makes two of it, the first with real weights and two thirds of the
            epochs.
        stages: stages instead of these, with any estimator.
        train_batch_size: samples in a step.
        weight_decay: of the binary layers' weights.
        distill: learn from the float model too; needs no labels with ``labels: 0``.
        samples: calibration samples for means and spreads.
        device: "cpu" or "cuda".
        seed: of the order of samples.
    """

    estimator: Literal["ste", "polynomial", "reste", "biper", "brevitas"] = "reste"
    kind: Literal["binary", "binary_weights", "binary_activations", "ternary_weights"] = "binary"
    scopes: dict[str, Kind] = Field(default_factory=dict)
    keep_first_last: bool = True
    scale: Literal["channel", "tensor"] = "channel"
    norm: Literal["batch", "none"] = "batch"
    shift: bool = True
    shortcut: bool = False
    relu: Literal["keep", "remove"] = "keep"
    o_end: Annotated[float, Field(ge=1)] = 3.0
    o_schedule: Literal["cos", "linear"] = "cos"
    clip: Annotated[float, Field(gt=0)] = 1.5
    linear_below: Annotated[float, Field(gt=0)] = 0.1
    frequency: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    target_error: Annotated[float, Field(gt=0.3634, lt=1)] = 0.45
    tau: Annotated[float, Field(ge=0)] = 0.0
    epochs: Annotated[int, Field(ge=1)] = 20
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    stages: tuple[Stage, ...] = ()
    train_batch_size: Annotated[int, Field(ge=2)] = 64
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    distill: Distill | None = None
    samples: Annotated[int, Field(ge=1)] = 512
    device: Literal["cpu", "cuda"] = "cpu"
    seed: int = 0

    _patterns = field_validator("scopes")(check_patterns)

    def __post_init__(self) -> None:
        """Raise ValueError for ternary weights with an estimator that has none, and for stages that do not fit."""
        if self.estimator != "brevitas" and "ternary_weights" in (self.kind, *self.scopes.values()):
            raise ValueError("ternary_weights are Brevitas's; set estimator: brevitas")
        fields = type(self).__dataclass_fields__
        ignored = [key for key in ("epochs", "learning_rate") if getattr(self, key) != fields[key].default]
        if self.stages and ignored:
            raise ValueError(f"stages have their own epochs and learning_rate; take {' and '.join(ignored)} out, or into them")
        if self.stages and self.stages[-1].weights == "real":
            raise ValueError("the last stage must have binary weights, for that is what is frozen")
        if self.stages and self.stages[-1].activations == "real":
            raise ValueError("the last stage must have binary activations, for that is what is frozen")

    def training(self) -> tuple[Stage, ...]:
        """The stages, those that ``epochs`` stands for where none are given."""
        if self.stages:
            return self.stages
        if self.estimator != "biper" or self.epochs < 2:
            return (Stage(epochs=self.epochs, learning_rate=self.learning_rate),)
        first = max(1, round(self.epochs * 2 / 3))
        return (
            Stage(epochs=first, learning_rate=self.learning_rate, weights="real"),
            Stage(epochs=max(1, self.epochs - first), learning_rate=self.learning_rate / 2),
        )
