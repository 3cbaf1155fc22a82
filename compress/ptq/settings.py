"""Settings of post-training quantization (``ptq:``) and quantization-aware training (``qat:``) as they stand in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from edgekit.compress.patterns import check_patterns

__all__ = ["PTQ", "QAT", "Meta", "Mixed", "Quantization", "Reconstruct", "WeightType", "bits_of", "stored_bits"]

_FORBID = ConfigDict(extra="forbid")

WeightType = Literal["int8", "int4", "int2"]


def bits_of(kind: str) -> int:
    """``bits_of("int4") == 4``; 8 for "dynamic" activations, which are int8 while they are multiplied, 32 for "float"."""
    return {"dynamic": 8, "float": 32}.get(kind) or int(kind.removeprefix("int"))


def stored_bits(kind: str) -> int:
    """Bits that activations of this type take in a frozen program: 8 for everything below."""
    return max(8, bits_of(kind))


@dataclass(frozen=True, config=_FORBID, kw_only=True)
class Quantization:
    """What both kinds of quantization share.

    Attributes:
        weights: integer type of weights; per output channel (see ``per_channel``), symmetric.
        activations: integer type of activations. int16 (zero point 0) is taken by the target ``tflite`` alone. int4
            and int2: what ReLUs and the like make, or float layers, and a weighted layer other than the last reads has 16 or
            4 levels, stored as int8 (no smaller and no faster here); all else keeps int8, and is named. dynamic: linear layers
            quantize each row of their input to int8 while they run, without calibration ("8da8w", "8da4w"); float: they do not
            (weight only). Everything but linear layers then stays float. For transformers; ``ptq`` with ``nearest`` or ``gptq``
            only.
        group_size: with activations dynamic or float, so many inputs of a linear layer share a weight scale; a multiple of 32 for
            ExecuTorch. Left out: one scale for each output channel.
        observer: how the range of an activation is chosen from calibration data. ``minmax``: the extremes; ``moving_average``:
            their exponential mean over batches; ``percentile``: cuts both tails; ``mse``: the clip with the least error;
            ``entropy``: the clip with the least Kullback-Leibler divergence (Migacz 2017).
        percentile: share of values kept by ``percentile``, in percent.
        symmetric_activations: zero point 0 for signed activations (those after a ReLU keep their full range).
        per_channel: one weight scale for each output channel; false: one for the tensor.
        weight_scale: ``max``: the largest weight; ``mse``: the scale with the least squared error for each channel.
        keep_first_last_8bit: the first and the last weighted layer keep 8-bit weights whatever ``weights`` says.
        scopes: regular expression (full match on the layer's name) to weight type; the first that fits wins, before all else.
        skip: regular expressions (full match) of layers left in float.
        samples: calibration samples used, spread evenly over tensors and datasets; the first ones of a loader.
        batch_size: calibration batch.
        seed: seed of everything random.
    """

    weights: WeightType = "int8"
    activations: Literal["int8", "int16", "int4", "int2", "dynamic", "float"] = "int8"
    group_size: Annotated[int, Field(ge=2)] | None = None
    observer: Literal["minmax", "moving_average", "percentile", "mse", "entropy"] = "mse"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    symmetric_activations: bool = False
    per_channel: bool = True
    weight_scale: Literal["max", "mse"] = "max"
    keep_first_last_8bit: bool = True
    scopes: dict[str, WeightType] = Field(default_factory=dict)
    skip: tuple[str, ...] = ()
    samples: Annotated[int, Field(ge=1)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 32
    seed: int = 0

    _patterns = field_validator("scopes", "skip")(check_patterns)


@dataclass(frozen=True, config=_FORBID, kw_only=True)
class Meta:
    """How ``augment: meta`` trains its transformation of images before reconstruction (MetaAug, Pham et al. 2024).

    Attributes:
        steps: of the transformation's optimizer; each runs the whole model several times and differentiates twice.
        batch_size: images that are moved, and as many others that judge, in a step.
        learning_rate: of the transformation (Adam, gradients clipped to a norm of 0.1).
        rate: length of the student's own step for rounding gates and biases.
        scale_rate: likewise for the logarithms of activation scales.
        validation: weight of the prediction difference after the student's step.
        margin: weight of what keeps the transformation from being the identity.
        eps: mean squared change beyond which that is 0, in units of the images' variance.
        relations: weight of what keeps images as similar to each other as they were, to the float model.
    """

    steps: Annotated[int, Field(ge=1)] = 100
    batch_size: Annotated[int, Field(ge=2)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    rate: Annotated[float, Field(ge=0)] = 1e-2
    scale_rate: Annotated[float, Field(ge=0)] = 1e-3
    validation: Annotated[float, Field(ge=0)] = 5.0
    margin: Annotated[float, Field(ge=0)] = 0.5
    eps: Annotated[float, Field(ge=0)] = 0.1
    relations: Annotated[float, Field(ge=0)] = 1000.0


@dataclass(frozen=True, config=_FORBID, kw_only=True)
class Reconstruct:
    """How ``method: adaround`` and ``method: brecq`` learn: each layer or block by gradient on its own output's error.

    Attributes:
        steps: optimizer steps for each layer or block.
        batch_size: samples in a step.
        learning_rate: of the rounding gates (Adam).
        drop: probability with which an activation stays float while learning (QDrop); 0: all are quantized.
        learn_scales: activation scales learn too (LSQ).
        rounding: weight of the term that drives gates to 0 or 1, beside an error in units of the output's variance.
        held_out: share of the calibration samples that is not learned from; where the error on them does not fall, the layer or
            block keeps what it had before.
        prediction: weight of the prediction difference (PD-Quant, Liu et al. 2023): how far the model's output, computed by the
            float layers after the block, is from the float model's; 0: none. Costs all those layers in every step.
        temperature: of the softmax that predictions are compared with; outputs that are no class scores are compared by square.
        search_scales: choose each activation scale of a block by the prediction difference before learning, among nine.
        correction_steps: steps that move a block's float inputs towards the statistics of its batch norms (PD-Quant's
            distribution correction), for each batch; 0: none.
        correction_anchor: how little they may move: smaller holds them closer.
        augment: add as many changed samples to those that are learned from: ``flip`` (mirrored), ``mixup``, ``cutmix``,
            or ``meta``, by a transformation that is learned for it.
        meta: how ``augment: meta`` learns.
        memory_mb: memory for cached inputs and outputs of blocks; what is more is mapped from temporary files.
    """

    steps: Annotated[int, Field(ge=1)] = 1000
    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.5
    learn_scales: bool = True
    rounding: Annotated[float, Field(ge=0)] = 0.01
    held_out: Annotated[float, Field(gt=0, le=0.5)] = 0.125
    prediction: Annotated[float, Field(ge=0)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 4.0
    search_scales: bool = False
    correction_steps: Annotated[int, Field(ge=0)] = 0
    correction_anchor: Annotated[float, Field(gt=0)] = 0.02
    augment: Literal["none", "flip", "mixup", "cutmix", "meta"] = "none"
    meta: Meta = Field(default_factory=Meta)
    memory_mb: Annotated[int, Field(ge=1)] = 1024


@dataclass(frozen=True, config=_FORBID, kw_only=True)
class Mixed:
    """Bits chosen for each weighted layer: the least noise at the model's output within a budget, or the fewest bytes within an
    accuracy. Give one of ``size``, ``bops`` and ``max_accuracy_drop``, or ``instructions`` or ``latency``, or one of each group.

    Attributes:
        choices: weight types to choose from; with a ``target``, those that it stores as they are.
        size: bytes of weights, as a share of those that 8-bit weights take.
        bops: bit operations (multiply-accumulates times weight bits times activation bits), as a share of those of int8.
        instructions: instructions of the weighted layers on a Cortex-M ``target``, as a share of int8's, modelled from the
            shipped table (`edgekit predict` says how far off it was). More than 1 is a sensible limit beside ``size``.
        latency: time of the weighted layers on a host ``target``, likewise; the table is of one machine.
        target: the target that costs and storage are of; the recipe's if it has one only.
        max_accuracy_drop: largest loss of the task metric on labelled training samples, rounded to nearest, in its unit.
        samples: calibration samples that noise is measured on.
        labelled: training samples that the metric is taken on.
    """

    choices: Annotated[tuple[WeightType, ...], Field(min_length=1)] = ("int8", "int4")
    size: Annotated[float, Field(gt=0, le=1)] | None = None
    bops: Annotated[float, Field(gt=0, le=1)] | None = None
    instructions: Annotated[float, Field(gt=0)] | None = None
    latency: Annotated[float, Field(gt=0)] | None = None
    target: str = ""
    max_accuracy_drop: Annotated[float, Field(ge=0)] | None = None
    samples: Annotated[int, Field(ge=1)] = 64
    labelled: Annotated[int, Field(ge=1)] = 512

    def __post_init__(self) -> None:
        def given(*names: str) -> list[str]:
            return [k for k in names if getattr(self, k) is not None]

        first, second = given("size", "bops", "max_accuracy_drop"), given("instructions", "latency")
        if len(first) > 1 or (not first and not second):
            raise ValueError(
                "give exactly one of size, bops and max_accuracy_drop, or instructions or latency of a target; "
                f"found {' and '.join(first) or 'none'}"
            )
        if len(second) > 1:
            raise ValueError("give instructions for a Cortex-M target or latency for a host target, not both")


@dataclass(frozen=True, config=_FORBID, kw_only=True)
class PTQ(Quantization):
    """Post-training quantization.

    Attributes:
        method: how weights are rounded. ``nearest``; ``gptq`` (Frantar et al. 2022) and ``gpfq`` (Lybrand and Saab 2021): column
            by column, each error compensated by what is left; ``learned_round`` (AdaRound, Nagel et al. 2020): by gradient.
            ``adaround`` and ``brecq`` (Li et al. 2021) reconstruct each layer, or each block found on the graph: rounding,
            biases and activation scales together, as ``reconstruct`` says.
        equalize: cross-layer equalization before quantization (Nagel et al. 2019).
        smooth: SmoothQuant (Xiao et al. 2023): how much of the range of what a layer normalization gives to linear layers moves
            into their weights before quantization, 0 to 1 (0.5 is usual); left out: none moves.
        bias_correction: correct each bias by the mean error that quantization made (Nagel et al. 2019).
        learned_round_steps: optimizer steps of ``learned_round`` for each layer.
        reconstruct: settings of ``adaround`` and ``brecq``.
        mixed: choose the bits of each layer's weights instead of ``weights``; ``scopes`` and ``keep_first_last_8bit`` go before.
        asymmetric_weights: weights have zero points, as in much of the literature. For research, in simulation: no target's
            kernels take them, so freezing refuses.
        device: "cpu" or "cuda": where ``adaround`` and ``brecq`` learn.
    """

    method: Literal["nearest", "gptq", "gpfq", "learned_round", "adaround", "brecq"] = "nearest"
    equalize: bool = False
    smooth: Annotated[float, Field(ge=0, le=1)] | None = None
    bias_correction: bool = False
    learned_round_steps: Annotated[int, Field(ge=1)] = 200
    reconstruct: Reconstruct = Field(default_factory=Reconstruct)
    mixed: Mixed | None = None
    asymmetric_weights: bool = False
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        if self.method not in ("adaround", "brecq") and self.reconstruct != Reconstruct():
            raise ValueError(f"reconstruct is of method adaround and brecq; with method {self.method} it would do nothing")
        if self.asymmetric_weights and self.method not in ("nearest", "adaround", "brecq"):
            raise ValueError(f"asymmetric_weights goes with nearest, adaround and brecq, found method {self.method}")
        if self.activations not in ("dynamic", "float"):
            if self.group_size is not None:
                raise ValueError(
                    "group_size is for activations dynamic and float; with integers there is a scale for each channel"
                )
            return
        if self.method not in ("nearest", "gptq"):
            raise ValueError(f"activations {self.activations} takes method nearest or gptq, found {self.method}")
        for key in ("equalize", "bias_correction", "mixed"):
            if getattr(self, key):
                raise ValueError(f"activations {self.activations} does not go with {key}")


@dataclass(frozen=True, config=_FORBID, kw_only=True)
class QAT(Quantization):
    """Quantization-aware training with Brevitas layers, started from post-training ranges; needs labelled training data.

    Attributes:
        epochs: passes over the training data.
        learning_rate: of Adam, with cosine decay to zero.
        train_batch_size: samples in a training step.
        device: "cpu" or "cuda".
    """

    epochs: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    train_batch_size: Annotated[int, Field(ge=1)] = 32
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        if self.activations in ("dynamic", "float") or self.group_size is not None:
            raise ValueError("qat trains integer activations; activations dynamic and float and group_size are ptq's")
