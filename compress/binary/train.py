"""The training of a network with binary layers: stages, indicators, checkpoints.

A checkpoint after each epoch holds all parameters, buffers and optimizer state; the order of samples in an epoch depends on the
seed and the epoch's number only. So a run that is killed and started again ends with the same weights as one that is not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from edgekit.compress.binary.estimators import estimating_error, exponent
from edgekit.compress.binary.settings import Binary, Distill, Stage
from edgekit.compress.binary.twin import layers_of
from edgekit.compress.capture import Graph
from edgekit.compress.ptq.qat import epoch_of
from edgekit.compress.repair.distill import Forward
from edgekit.data import Source
from edgekit.errors import DataError, InputError
from edgekit.files import write_whole

__all__ = ["Epoch", "train_twin"]

_CHECKPOINT = "binary.safetensors"


@dataclass(frozen=True)
class Epoch:
    """One line of the training log.

    Attributes:
        stage, epoch: counted from 0; ``epoch`` over all stages.
        loss: mean over the epoch.
        o: ReSTE's exponent, None with another estimator.
        estimating_error: ``sum_layers || f(w; o_end) - sign(w) ||_2`` (ReSTE's first indicator; for BiPer of the sine).
        gradient_instability: ``sum_layers var(|dL/dw|)`` of the last step (the second).
        quantization_error: mean over layers of ``|sin(frequency w) - sign|`` (BiPer), None else.
    """

    stage: int
    epoch: int
    loss: float
    o: float | None
    estimating_error: float
    gradient_instability: float
    quantization_error: float | None


def train_twin(
    twin: fx.GraphModule,
    forward: tuple[Forward, Forward | None],
    graph: Graph,
    settings: Binary,
    source: Source,
    folder: Path | None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Epoch]:
    """Train in place; the log of all epochs.

    Args:
        twin: on the settings' device.
        forward: the twin and, with ``distill``, the float model, each giving outputs and the values that are compared.
        folder: checkpoints are kept here and taken from here.

    Raises:
        DataError: no batches, targets that do not fit, or a loss that is not finite.
    """
    size = settings.train_batch_size if graph.dynamic_batch else 1
    steps = sum(1 for _ in _full(epoch_of(source, size, torch.Generator()), size))
    if steps == 0:
        raise DataError(f"binary: fewer than {size} training samples; lower train_batch_size")
    stages = settings.training()
    total = sum(s.epochs for s in stages)
    log, done = _resume(twin, settings, folder)
    first = 0
    for number, stage in enumerate(stages):
        if done < first + stage.epochs:
            optimizer = _optimizer(twin, stage, settings)
            if folder is not None and done > first:
                _load_optimizer(optimizer, folder)
            for epoch in range(max(done - first, 0), stage.epochs):
                _enter(twin, stage, settings, first + epoch, total)
                order = torch.Generator().manual_seed(settings.seed * 1_000_003 + first + epoch)
                run = _Run(twin, forward, graph, settings, stage, optimizer, epoch, steps)
                said = None if progress is None else _offset(progress, (first + epoch) * steps, total * steps)
                loss = run.epoch(_full(epoch_of(source, size, order), size), said)
                log.append(_entry(twin, settings, number, first + epoch, loss))
                if folder is not None:
                    _save(twin, optimizer, log, folder)
        first += stage.epochs
    _enter(twin, stages[-1], settings, total, total)
    twin.eval()
    return log


def _full(stream: Iterator[tuple[Tensor, ...]], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches of more than half the size: statistics of a few samples would disturb the normalizations."""
    return (batch for batch in stream if len(batch[0]) > size // 2)


def _offset(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int], None]:
    return lambda step: progress(before + step, total)


def _enter(twin: nn.Module, stage: Stage, settings: Binary, epoch: int, total: int) -> None:
    for layer in layers_of(twin).values():
        layer.real_weights, layer.real_activations = stage.weights == "real", stage.activations == "real"
        layer.o = exponent(epoch / total, settings.o_end, settings.o_schedule) if settings.estimator == "reste" else 1.0


def _optimizer(twin: nn.Module, stage: Stage, settings: Binary) -> torch.optim.Adam:
    latent = {id(layer.weight): layer for layer in layers_of(twin).values()}
    groups: list[dict[str, Any]] = []
    for parameter in twin.parameters():
        if not parameter.requires_grad:
            continue
        layer = latent.get(id(parameter))
        rate = 1.0
        if layer is not None and settings.estimator == "biper":  # a step in w turns the phase by frequency times as much
            rate = 1 / max(1.0, float(layer.phase().detach().abs().mean()))
        decay = settings.weight_decay if layer is not None else 0.0
        groups.append({"params": [parameter], "lr": stage.learning_rate * rate, "weight_decay": decay})
    optimizer = torch.optim.Adam(groups)
    for group in optimizer.param_groups:
        group["initial"] = group["lr"]
    return optimizer


@dataclass
class _Run:
    """One epoch of one stage."""

    twin: fx.GraphModule
    forward: tuple[Forward, Forward | None]
    graph: Graph
    settings: Binary
    stage: Stage
    optimizer: torch.optim.Adam
    number: int
    steps: int

    def epoch(self, stream: Iterator[tuple[Tensor, ...]], progress: Callable[[int], None] | None) -> float:
        self.twin.train()
        total, count = 0.0, 0
        with torch.enable_grad():
            for batch in stream:
                share = (self.number * self.steps + count) / (self.stage.epochs * self.steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = group["initial"] * (1 + math.cos(math.pi * share)) / 2
                loss = self._loss(tuple(t.to(self.settings.device) for t in batch))
                if not torch.isfinite(loss):
                    raise DataError(f"binary: the loss was {float(loss)} in epoch {self.number}; lower learning_rate")
                self.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                total, count = total + float(loss.detach()), count + 1
                if progress:
                    progress(count)
        return total / max(count, 1)

    def _loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        inputs, how = len(self.graph.sample), self.settings.distill
        student, teacher = self.forward
        found = student(batch[:inputs])
        target = batch[inputs] if len(batch) > inputs else None
        loss = torch.zeros((), device=batch[0].device)
        if how is None or how.labels:
            loss = loss + (1.0 if how is None else how.labels) * _task(found.outputs, target)
        if how is not None and teacher is not None:
            with torch.no_grad():
                wanted = teacher(batch[:inputs])
            scores = target is not None and not target.is_floating_point()
            for a, b in zip(found.outputs, wanted.outputs, strict=True):
                loss = loss + how.outputs * (_divergence(a, b, how) if scores else _relative(a, b))
            if how.features and found.features:
                parts = [_relative(a, b) for a, b in zip(found.features, wanted.features, strict=True)]
                loss = loss + how.features * torch.stack(parts).mean()
        if self.settings.estimator == "biper" and self.settings.tau:
            parts = [layer.regularizer() for layer in layers_of(self.twin).values() if layer.binary_weights]
            loss = loss + self.settings.tau * torch.stack(parts).sum()
        return loss


def _task(outputs: Sequence[Tensor], target: Tensor | None) -> Tensor:
    if target is None:
        raise DataError("binary: the training data has no labels; return Data(..., training=(x, y)), or set distill: {labels: 0}")
    if len(outputs) != 1:
        raise DataError(
            f"binary: the model has {len(outputs)} outputs; set distill: {{labels: 0}} to learn from the float model only"
        )
    (y,) = outputs
    if target.is_floating_point():
        if target.shape != y.shape:
            raise DataError(f"training: targets have shape {tuple(target.shape)}, the model gives {tuple(y.shape)}")
        return F.mse_loss(y, target)
    if y.dim() != 2 or target.dim() != 1 or int(target.max()) >= y.shape[1] or int(target.min()) < 0:
        raise DataError(
            f"training: class labels of shape {tuple(target.shape)} from {int(target.min())} to {int(target.max())} do not fit "
            f"an output of shape {tuple(y.shape)}; expected shape (batch,) and labels below the number of outputs"
        )
    return F.cross_entropy(y, target.long())


def _divergence(found: Tensor, wanted: Tensor, how: Distill) -> Tensor:
    t = how.temperature
    return F.kl_div(F.log_softmax(found / t, 1), F.log_softmax(wanted / t, 1), reduction="batchmean", log_target=True) * t * t


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    return F.mse_loss(found, wanted) / wanted.var().clamp(min=1e-12)


def _entry(twin: nn.Module, settings: Binary, stage: int, epoch: int, loss: float) -> Epoch:
    layers = [layer for layer in layers_of(twin).values() if layer.binary_weights]
    error = instability = 0.0
    wave: list[float] = []
    for layer in layers:
        w = layer.weight.detach()
        z = torch.sin(layer.phase()).detach() if settings.estimator == "biper" else w
        error += estimating_error(z, settings.o_end)
        if layer.weight.grad is not None and layer.weight.numel() > 1:
            instability += float(layer.weight.grad.abs().var())
        wave.append(float((1 - z.abs()).mean()))
    o = next((layer.o for layer in layers), None) if settings.estimator == "reste" else None
    biper = sum(wave) / len(wave) if settings.estimator == "biper" and wave else None
    return Epoch(stage, epoch, loss, o, error, instability, biper)


def _save(twin: nn.Module, optimizer: torch.optim.Adam, log: Sequence[Epoch], folder: Path) -> None:
    from safetensors.torch import save

    tensors = {f"model.{k}": v.detach().cpu().contiguous().clone() for k, v in twin.state_dict().items()}
    for i, group in enumerate(optimizer.param_groups):
        for key, value in optimizer.state.get(group["params"][0], {}).items():
            tensors[f"adam.{i}.{key}"] = value.detach().cpu().contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    rates = [group["initial"] for group in optimizer.param_groups]
    facts = {"log": json.dumps([vars(e) for e in log]), "rates": json.dumps(rates)}
    write_whole(folder / _CHECKPOINT, save(tensors, metadata=facts))


def _resume(twin: nn.Module, settings: Binary, folder: Path | None) -> tuple[list[Epoch], int]:
    """The log of the epochs that are done, their number; the twin's state is put back."""
    if folder is None or not (folder / _CHECKPOINT).is_file():
        return [], 0
    tensors, facts = _read(folder)
    own = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    try:
        twin.load_state_dict(own)
        log = [Epoch(**e) for e in json.loads(facts["log"])]
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / _CHECKPOINT}: not a checkpoint of this training ({error}); delete it") from None
    return log, len(log)


def _load_optimizer(optimizer: torch.optim.Adam, folder: Path) -> None:
    tensors, facts = _read(folder)
    for i, (group, rate) in enumerate(zip(optimizer.param_groups, json.loads(facts["rates"]), strict=True)):
        group["initial"], parameter = rate, group["params"][0]
        state = {k.split(".")[2]: v for k, v in tensors.items() if k.startswith(f"adam.{i}.")}
        if state:
            optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}


def _read(folder: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / _CHECKPOINT, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{folder / _CHECKPOINT}: damaged ({error}); delete it") from None
