"""Repair of an ``nn.Module``: the same training as :mod:`edgekit.compress.repair.step`, with values taken by hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from edgekit.compress.passes import PassRecord
from edgekit.compress.ptq.qat import epoch_of
from edgekit.compress.repair.distill import Forward, Values, distance, distill
from edgekit.compress.repair.settings import Repair
from edgekit.data import Source, first_sample, input_count
from edgekit.errors import InputError, ModelError
from edgekit.validation import sentence

__all__ = ["repair_module"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def repair_module(
    student: nn.Module,
    teacher: nn.Module,
    inputs: Source,
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> tuple[nn.Module, PassRecord]:
    """A copy of ``student``, trained without labels to compute what ``teacher`` computes.

    Both run in eval mode: dropout does nothing, batch normalization keeps its statistics. Intermediate values are compared where
    modules of the same name give tensors of the same shape: blocks, or with ``points="layers"`` linear and convolutional layers.

    Args:
        student: a compressed form of ``teacher``, such as :func:`edgekit.compress.lowrank.factorize` returns.
        inputs: see :mod:`edgekit.data`; labels after the inputs are used only with ``labels``.
        options: the settings of :class:`Repair`.

    Returns:
        The trained module, in eval mode, and a record with the loss before and after. If the loss has not fallen, the copy
        is as the student was, and the record has a warning.

    Raises:
        InputError: a wrong setting, or ``weight_penalty``, which only recipes have.
        ModelError: outputs of different shapes.
    """
    try:
        settings = Repair(**options)
    except ValidationError as error:
        raise InputError(f"repair: {sentence(error, Repair)}") from None
    if settings.weight_penalty:
        raise InputError("repair: weight_penalty is for recipes; leave it out")
    torch.manual_seed(settings.seed)
    made, frozen = copy.deepcopy(student).to(settings.device).eval(), copy.deepcopy(teacher).to(settings.device).eval()
    count = input_count(teacher) or len(first_sample(inputs))
    sample = tuple(t.to(settings.device) for t in first_sample(inputs, inputs=count))
    names = _common(made, frozen, settings.points, sample)
    forward = _hooked(made, names), _hooked(frozen, names)
    start = {k: v.clone() for k, v in made.state_dict().items()}
    parameters = [p.requires_grad_(True) for p in made.parameters() if p.is_floating_point()]

    def judged() -> float:
        return distance(*forward, _first(epoch_of(inputs, 64, torch.Generator()), count, 2048), settings)

    before = judged()

    def epoch(order: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        return epoch_of(inputs, settings.train_batch_size, order)

    distill(*forward, [{"params": parameters}], epoch, settings, count, None, progress)
    after = judged()
    warnings: tuple[str, ...] = ()
    if after >= before:
        made.load_state_dict(start)
        warnings = ("repair: training brought the model no nearer to the original, its weights stay; lower learning_rate",)
    figures = {"loss before": before, "loss after": after}
    return made.cpu(), PassRecord(dict.fromkeys(names, "compared with the original"), {}, figures, warnings)


def _first(stream: Iterator[tuple[Tensor, ...]], inputs: int, samples: int) -> Iterator[tuple[Tensor, ...]]:
    done = 0
    for batch in stream:
        yield batch[:inputs]
        done += len(batch[0])
        if done >= samples:
            return


def _common(student: nn.Module, teacher: nn.Module, points: str, sample: Sequence[Tensor]) -> list[str]:
    """Names of modules whose outputs are compared."""
    own = dict(student.named_modules())
    named = [(n, m) for n, m in teacher.named_modules() if n and n in own and not isinstance(m, nn.ModuleList | nn.ModuleDict)]
    blocks = [n for n, m in named if any(True for _ in m.children())]
    layers = [n for n, m in named if isinstance(m, _LAYERS)]
    with torch.no_grad():
        seen = [_watched(m, sample, [*blocks, *layers])[1] for m in (student, teacher)]
        ends = [[t.shape for t in _tensors(m(*sample))] for m in (student, teacher)]
    if ends[0] != ends[1]:
        raise ModelError(f"repair: the student's outputs have shapes {ends[0]}, the teacher's {ends[1]}")

    def same(name: str) -> bool:
        a, b = (s.get(name) for s in seen)
        return a is not None and b is not None and a.shape == b.shape

    chosen = [n for n in blocks if same(n)] if points == "blocks" else []
    return chosen or [n for n in layers if same(n)]


def _hooked(model: nn.Module, names: Sequence[str]) -> Forward:
    def forward(batch: Sequence[Tensor]) -> Values:
        result, found = _watched(model, batch, names)
        return Values(_tensors(result), [found[n] for n in names])

    return forward


def _watched(model: nn.Module, batch: Sequence[Tensor], names: Sequence[str]) -> tuple[Any, dict[str, Tensor]]:
    """The model's result, and the tensors that the named modules return."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            if isinstance(result, Tensor):
                found[name] = result

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [watch(n) for n in names]
    try:
        return model(*batch), found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [t for item in items for t in _tensors(item)]
