"""Settings of spiking networks (``spiking:``) as they stand in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from edgekit.compress.patterns import check_patterns

__all__ = ["EarlyExit", "Spiking"]

_FORBID = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_FORBID, kw_only=True)
class EarlyExit:
    """Dynamic Confidence (Li et al. 2023): a sample stops at the first step whose confidence exceeds a threshold.

    Attributes:
        max_drop: largest loss of the task metric, and largest share of answers that differ from those after all steps, in points,
            on held-out training samples; on calibration samples where there are no labels.
        samples: samples that the threshold is chosen on.
    """

    max_drop: Annotated[float, Field(ge=0)] = 0.0
    samples: Annotated[int, Field(ge=10)] = 1000


@dataclass(frozen=True, config=_FORBID, kw_only=True)
class Spiking:
    """A spiking network of the model: every ReLU becomes a layer of neurons, run over ``steps`` time steps.

    Attributes:
        method: ``balance``: thresholds from activations; ``calibrate``: and layer-by-layer correction (Li et al. 2021); both
            from unlabelled data. ``qcfs``: train the activations that neurons compute (Bu et al. 2022), convert, and correct.
            ``train``: train the spiking network itself by surrogate gradients. ``auto``: the cheapest that meets the budget.
            A model that is made of edgekit's neurons already is trained by ``train``, or frozen as it is by ``freeze``.
        steps: time steps of one inference.
        threshold: ``max``: the largest activation; ``percentile``; ``mmse``: the least squared error at ``steps`` steps.
        percentile: of ``threshold: percentile``, in percent.
        per_channel: one threshold for each channel, for ``balance`` and ``calibrate``.
        v_init: membrane before the first step, in thresholds.
        correct: what ``calibrate`` and ``qcfs`` correct after the thresholds: ``bias``; ``membrane``: the initial membrane of
            each neuron (a table as large as the activation); ``weights``: and then the bias; ``none``.
        weight_steps: optimizer steps for each layer of ``correct: weights``.
        max_pool: ``average``: an average pool instead (``qcfs`` and ``train`` learn it); ``count``: the maximum of spike
            counts, exact, which no chip computes; ``auto``: average where the method trains, else count.
        allow: regular expressions (full match) of layers without a spiking form that may be computed on the mean over time;
            any other is an error.
        schedule: ``streaming``: all layers take part in every step. ``layered``: a layer fires when all steps of the one before
            are in, which makes a network trained by ``qcfs`` exact; its latency is ``steps`` for each layer, no simulator or
            chip format takes it, and there is no early exit.
        encoding: ``direct``: the first layers get the input as a constant current, once for all steps. ``rate``: a layer of
            neurons makes spikes of it (deterministic rate coding) and everything behind it is fed by spikes, as chips need it.
        levels: levels of the trained activation of ``qcfs``; ``steps`` if left out.
        neuron: of ``train``: integrate-and-fire, leaky (``lif``), or leaky with a learned time constant (``plif``); ``cuba`` and
            ``cuba_plif``: these with a synapse whose current stays for a while, and both time constants learned.
        tau: time constant of leaky neurons, in steps.
        tau_syn: time constant of the synapses of ``cuba`` neurons, in steps; 2 if left out.
        reset: of ``train``: ``subtract`` (soft) or ``zero`` (hard); conversion needs subtract.
        spikes: most spikes of a neuron in a step.
        learn_threshold: thresholds of ``train`` are learned.
        surrogate: derivative of a spike.
        rule: of ``train``: ``bptt``; ``sltt``: gradients through space only, memory of one step (Meng et al. 2023); ``sltt_k``:
            in ``backward_steps`` of the steps only.
        backward_steps: of ``sltt_k``; 1 if left out.
        stages: of ``train``: numbers of steps trained one after the other, each from the weights, thresholds and leaks of the
            one before (IIR-SNN, Chowdhury et al. 2022), such as [5, 3, 1]; the last one is frozen, in place of ``steps``.
        chip: of ``train``: weights and decays are trained on the grid of ``xylo`` (8 bits a neuron, decays by bit shifts; neuron
            cuba), ``loihi2`` (8 bits a layer, decays in 4096ths) or ``speck`` (8 bits a layer; neuron if).
        frames: the input holds the steps, (N, T, ...), as event frames; the model is an ``edgekit.compress.spiking.Frames``.
        epochs, learning_rate, train_batch_size: of ``qcfs`` and of each stage of ``train``: Adam, cosine decay to zero.
        target_accuracy: budget of ``auto``: the task metric, in its unit, on held-out training samples.
        max_timesteps: budget of ``auto``.
        max_synops: budget of ``auto``: SynOps for one sample, and the MACs of averaged spikes and analogue layers with them.
        early_exit: choose a threshold at which a sample stops early.
        weights: ``float``, or the integer form: weights of so many bits, int16 currents and membranes, which firmware runs.
        samples: calibration samples used.
        batch_size: samples of a batch in measurements.
        seed: seed of everything random.
        device: "cpu" or "cuda": where ``qcfs`` and ``train`` learn.
    """

    method: Literal["balance", "calibrate", "qcfs", "train", "auto", "freeze"] = "calibrate"
    steps: Annotated[int, Field(ge=1, le=1024)] = 8
    threshold: Literal["max", "percentile", "mmse"] = "mmse"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.9
    per_channel: bool = False
    v_init: Annotated[float, Field(ge=0, lt=1)] = 0.5
    correct: Literal["none", "bias", "membrane", "weights"] = "bias"
    weight_steps: Annotated[int, Field(ge=1)] = 200
    max_pool: Literal["auto", "average", "count"] = "auto"
    allow: tuple[str, ...] = ()
    schedule: Literal["streaming", "layered"] = "streaming"
    encoding: Literal["direct", "rate"] = "direct"
    levels: Annotated[int, Field(ge=1, le=255)] | None = None
    neuron: Literal["if", "lif", "plif", "cuba", "cuba_plif"] = "if"
    tau: Annotated[float, Field(gt=1)] = 2.0
    tau_syn: Annotated[float, Field(ge=1)] | None = None
    reset: Literal["subtract", "zero"] = "subtract"
    spikes: Annotated[int, Field(ge=1, le=127)] = 1
    learn_threshold: bool = True
    surrogate: Literal["triangle", "rectangle", "sigmoid", "arctangent", "linear"] = "triangle"
    rule: Literal["bptt", "sltt", "sltt_k"] = "bptt"
    backward_steps: Annotated[int, Field(ge=1)] | None = None
    stages: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = ()
    chip: Literal["xylo", "loihi2", "speck"] | None = None
    frames: bool = False
    epochs: Annotated[int, Field(ge=1)] = 5
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    train_batch_size: Annotated[int, Field(ge=1)] = 64
    target_accuracy: float | None = None
    max_timesteps: Annotated[int, Field(ge=1, le=1024)] | None = None
    max_synops: Annotated[float, Field(gt=0)] | None = None
    early_exit: EarlyExit | None = None
    weights: Literal["float", "int8", "int4", "int2"] = "float"
    samples: Annotated[int, Field(ge=1)] = 128
    batch_size: Annotated[int, Field(ge=1)] = 64
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"

    _patterns = field_validator("allow")(check_patterns)

    @model_validator(mode="after")
    def _together(self) -> Spiking:
        budget = [k for k in ("target_accuracy", "max_timesteps", "max_synops") if getattr(self, k) is not None]
        if self.method == "auto" and not budget:
            raise ValueError("method auto needs a budget: give target_accuracy, max_timesteps or max_synops")
        if self.method != "auto" and budget:
            raise ValueError(f"{' and '.join(budget)}: a budget is for method auto; {self.method} runs `steps` steps")
        if self.method != "train" and (self.neuron != "if" or self.reset != "subtract" or self.stages):
            raise ValueError("neuron, reset and stages are for method train: a converted neuron integrates and subtracts")
        if problem := _off_chip(self):
            raise ValueError(f"chip {self.chip}: {problem}")
        if self.schedule == "layered" and (self.method in ("train", "auto") or self.early_exit is not None):
            raise ValueError("schedule layered is for balance, calibrate and qcfs without early_exit")
        if self.frames and self.method != "train":
            raise ValueError("frames is for method train: a converted network gets a constant input")
        if self.frames and self.encoding != "direct":
            raise ValueError("encoding rate is for inputs without steps; frames hold what each step gets")
        if self.backward_steps is not None and self.rule != "sltt_k":
            raise ValueError(f"backward_steps is for rule sltt_k; {self.rule} goes back through every step")
        if self.tau_syn is not None and not self.neuron.startswith("cuba"):
            raise ValueError(f"tau_syn is for neurons cuba and cuba_plif; {self.neuron} has no synaptic current")
        if self.backward_steps is not None and self.backward_steps > min((self.steps, *self.stages)):
            raise ValueError(f"backward_steps {self.backward_steps} of {min((self.steps, *self.stages))} steps; give fewer")
        return self


def _off_chip(settings: Spiking) -> str:
    """What of the settings the chip to train for does not have; "" if all fits."""
    neuron, reset = settings.neuron, settings.reset
    if settings.chip is None:
        return ""
    if settings.method != "train":
        return "its grid is for method train; a converted network is quantized after the fact, `edgekit verify RUN -d sim:NAME`"
    if settings.chip == "xylo" and (not neuron.startswith("cuba") or reset != "subtract" or settings.spikes > 31):
        return "its neurons are neuron: cuba with reset: subtract and up to 31 spikes a step"
    if settings.chip == "loihi2" and settings.spikes > 1:
        return "its neurons spike once a step; leave spikes at 1"
    if settings.chip == "speck" and neuron != "if":
        return "its neurons are neuron: if, without a leak"
    return ""
