"""The training of a binary encoder (BiPFT, Xing et al. 2024) by labels, the teacher's probabilities and its hidden values.

A checkpoint after each epoch holds all parameters, buffers, the optimizer's state and that of the order of samples, so a run that
is killed and started again ends with the same weights, to the bit, as one that is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.compress.binary.encoder import Encoder
from edgekit.compress.ptq.qat import epoch_of
from edgekit.data import Source
from edgekit.errors import DataError, InputError, ModelError
from edgekit.files import write_whole

__all__ = ["EncoderTraining", "train_encoder"]

_CHECKPOINT = "encoder.safetensors"


@dataclass(frozen=True)
class EncoderTraining:
    """How a binary encoder learns.

    Attributes:
        epochs, learning_rate, batch_size: AdamW with linear decay.
        hidden: weight of the mean over layers of the squared distance of hidden values to the teacher's.
        logits: weight of the cross entropy with the teacher's class probabilities.
        labels: weight of the cross entropy with the labels.
        seed: of the order of samples.
        device: "cpu" or "cuda"; the encoders come back to the CPU.
    """

    epochs: int = 10
    learning_rate: float = 5e-4
    batch_size: int = 32
    hidden: float = 1.0
    logits: float = 1.0
    labels: float = 1.0
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raise InputError for a device that is not there."""
        if self.device not in ("cpu", "cuda"):
            raise InputError(f"encoder: device {self.device!r}; expected cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("encoder: device cuda was asked for, but torch sees no CUDA device; use device cpu")


@dataclass
class _Run:
    """What a checkpoint holds: everything that the next step depends on."""

    student: Encoder
    optimizer: torch.optim.AdamW
    order: torch.Generator
    facts: dict[str, Any]
    losses: list[float]

    def save(self, folder: Path) -> None:
        from safetensors.torch import save

        tensors = {f"model.{k}": v.detach().cpu().contiguous().clone() for k, v in self.student.state_dict().items()}
        for i, parameter in enumerate(self.student.parameters()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{i}.{key}"] = value.detach().cpu().contiguous().clone()
        tensors["order"] = self.order.get_state()
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"training": json.dumps(self.facts), "losses": json.dumps(self.losses)}
        write_whole(folder / _CHECKPOINT, save(tensors, metadata=metadata))

    def restore(self, folder: Path) -> None:
        """Go on where the checkpoint is, if there is one.

        Raises:
            InputError: it is damaged, or of another training.
        """
        from safetensors import SafetensorError, safe_open

        path = folder / _CHECKPOINT
        if not path.is_file():
            return
        try:
            with safe_open(path, "pt") as file:
                tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
            if json.loads(metadata["training"]) != self.facts:
                raise ValueError(f"it was made with {metadata['training']}, this is {json.dumps(self.facts)}")
            own = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
            self.student.load_state_dict(own)
            self.losses[:] = [float(v) for v in json.loads(metadata["losses"])]
            self.order.set_state(tensors["order"])
        except SafetensorError as error:
            raise InputError(f"{path}: damaged ({error}); delete it") from None
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a checkpoint of this training ({error}); delete it") from None
        for i, parameter in enumerate(self.student.parameters()):
            state = {k.split(".")[2]: v for k, v in tensors.items() if k.startswith(f"adam.{i}.")}
            if state:
                self.optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}


def train_encoder(
    student: Encoder,
    source: Source,
    how: EncoderTraining,
    teacher: Encoder | None = None,
    progress: Callable[[int, int], None] | None = None,
    folder: Path | str | None = None,
) -> list[float]:
    """Train in place on (x, y) batches; the mean loss of each epoch. A float encoder learns in the same way, without a teacher.

    Args:
        progress: called with (steps done, steps).
        folder: a checkpoint is kept here after each epoch and taken from here: a killed call, made again with the same encoder
            and samples, goes on after the last whole epoch and ends with the same weights.

    Raises:
        ModelError: the student has no head.
        DataError: a loss that is not finite.
        InputError: the checkpoint is damaged, or of another training.
    """
    if student.head is None:
        raise ModelError("encoder: training needs a head; give the configuration a number of classes")
    student.to(how.device)
    if teacher is not None:
        teacher.to(how.device)
    optimizer = torch.optim.AdamW(student.parameters(), how.learning_rate, weight_decay=0.01)
    each = sum(1 for _ in epoch_of(source, how.batch_size, torch.Generator()))
    facts = {k: v for k, v in asdict(how).items() if k != "device"} | {"steps": each, "teacher": teacher is not None}
    run = _Run(student, optimizer, torch.Generator().manual_seed(how.seed), facts, [])
    if folder is not None:
        run.restore(Path(folder))
    student.train()
    for epoch in range(len(run.losses), how.epochs):
        run.losses.append(_epoch(run, teacher, source, how, (epoch * each, how.epochs * each), progress))
        if folder is not None:
            run.save(Path(folder))
    for model in (student, teacher):
        if model is not None:
            model.cpu()
    student.eval()
    return run.losses


def _epoch(
    run: _Run,
    teacher: Encoder | None,
    source: Source,
    how: EncoderTraining,
    steps: tuple[int, int],
    progress: Callable[[int, int], None] | None,
) -> float:
    """The mean loss. ``steps``: done before, and in all."""
    before, whole = steps
    total, count = 0.0, 0
    for batch in epoch_of(source, how.batch_size, run.order):
        for group in run.optimizer.param_groups:
            group["lr"] = how.learning_rate * max(0.0, 1 - (before + count) / max(whole, 1))
        loss = _loss(run.student, teacher, tuple(t.to(how.device) for t in batch), how)
        if not torch.isfinite(loss):
            raise DataError(f"encoder: the loss was {float(loss)} in step {before + count}; lower learning_rate")
        run.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        run.optimizer.step()
        total, count = total + float(loss.detach()), count + 1
        if progress:
            progress(before + count, whole)
    return total / max(count, 1)


def _loss(student: Encoder, teacher: Encoder | None, batch: tuple[Tensor, ...], how: EncoderTraining) -> Tensor:
    x, y = batch
    found = student.hidden(x)
    logits = _logits(student, found[-1])
    loss = how.labels * F.cross_entropy(logits, y.long())
    if teacher is not None:
        with torch.no_grad():
            wanted = teacher.hidden(x)
            chances = torch.softmax(_logits(teacher, wanted[-1]), 1)
        loss = loss + how.logits * F.cross_entropy(logits, chances)
        apart = torch.stack([F.mse_loss(a, b) for a, b in zip(found[1:], wanted[1:], strict=True)])
        loss = loss + how.hidden * apart.mean()
    return loss


def _logits(model: Encoder, last: Tensor) -> Tensor:
    assert isinstance(model.head, nn.Module)
    logits: Tensor = model.head(model.pooled(last))
    return logits
