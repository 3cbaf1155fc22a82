"""The data a recipe works with, and one way to stream it whatever it is stored in.

A *source* is one of:

* a Tensor or ndarray (N, ...): N samples of a model with one input;
* a tuple or list of them, the same N in each: a model with several inputs, or inputs and labels (x, y);
* a ``torch.utils.data.Dataset`` whose items are one of these without N, or an iterable one;
* a ``DataLoader``, or a function without arguments that returns an iterable of batches (B, ...).

:func:`batches` never holds more than one batch of the last two, so memory does not grow with the number of samples.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from edgekit.errors import DataError, EdgekitError, ModelError, cause

__all__ = ["Data", "Source", "batches", "fingerprint", "first_sample", "input_count", "sample_inputs"]

Source = Any
"""Tensor, ndarray, tuple of them, Dataset, DataLoader, or a function returning an iterable of batches (see the module)."""


@dataclass(frozen=True)
class Data:
    """What a ``data:`` factory of a recipe returns.

    Attributes:
        calibration: source of inputs; labels after the inputs are ignored.
        evaluation: (x, y); x a Tensor (N, ...) or a tuple of Tensors, y (N, ...) or None; or a Dataset, DataLoader or function
            of batches (x, y), which is then read into memory. None leaves the task metric out of reports.
        training: source of (x, y) batches for QAT; None where no recipe trains.
        metric: how evaluation is scored, "accuracy" (percent of samples whose largest output is y) or a function
            ``(outputs, y) -> float`` where more is better.
    """

    calibration: Source
    evaluation: Any = None
    training: Source | None = None
    metric: str | Callable[[Tensor, Tensor], float] = "accuracy"

    def __post_init__(self) -> None:
        """Raise DataError for an evaluation that is no pair and for a metric that is none."""
        if self.metric != "accuracy" and not callable(self.metric):
            raise DataError(f"data.metric is {self.metric!r}; expected 'accuracy' or a function (outputs, labels) -> float")
        if self.evaluation is not None:
            object.__setattr__(self, "evaluation", _pair(self.evaluation))


def batches(
    source: Source, batch_size: int = 32, *, inputs: int | None = None, what: str = "data", samples: int | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Stream a source as tuples of tensors (B, ...), B at most ``batch_size``.

    Args:
        source: see the module; batches of a loader larger than ``batch_size`` are split, smaller ones are left as they are.
        inputs: keep and check only the first that many tensors of each batch (drops labels); None keeps all.
        what: how errors call this source.
        samples: no more than these, evenly spread over tensors and datasets, which may be sorted; of a loader or a function,
            whose order is its own, the first ones.

    Raises:
        DataError: no samples, not tensors, lengths that differ, float16/float64 values, NaN or Inf (with the sample's number).
    """
    if batch_size < 1:
        raise DataError(f"{what}: batch size {batch_size}; expected 1 or more")
    count = 0
    for batch in _guarded(source if samples is None else _spread(source, samples), batch_size, what):
        tensors = _checked(_tensors(batch, what)[:inputs], count, what)
        size = len(tensors[0]) if samples is None else min(len(tensors[0]), samples - count)
        for start in range(0, size, batch_size):
            yield tuple(t[start : min(start + batch_size, size)] for t in tensors)
        count += size
        if samples is not None and count >= samples:
            break
    if count == 0:
        raise DataError(f"{what}: it is empty; give at least one sample")


def first_sample(source: Source, *, inputs: int | None = None, what: str = "data") -> tuple[Tensor, ...]:
    """The first sample of a source as tensors (1, ...): what a model is captured with. Raises as :func:`batches`."""
    return next(batches(source, 1, inputs=inputs, what=what))


def input_count(model: nn.Module) -> int | None:
    """How many tensors ``model.forward`` needs; None where its signature does not say (then data must hold inputs only)."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        graph = getattr(model, "graph", None)
        return None if graph is None else sum(n.op == "placeholder" for n in graph.nodes)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def sample_inputs(model: nn.Module, data: Data) -> tuple[Tensor, ...]:
    """The first calibration sample, (1, ...) for each of the model's inputs.

    Raises:
        DataError: as :func:`batches`, or fewer tensors than the model takes.
        ModelError: the model takes no input.
    """
    count = input_count(model)
    if count == 0:
        raise ModelError("the model's forward takes no input; edgekit needs at least one tensor")
    sample = first_sample(data.calibration, inputs=count, what="calibration data")
    if count is not None and len(sample) < count:
        raise DataError(f"calibration data: a batch has {len(sample)} tensors, the model takes {count} inputs")
    return sample


def fingerprint(data: Data, seed: int = 0) -> str:
    """SHA-256 over every value of every source, streamed; the torch seed is set meanwhile so that a shuffling loader repeats."""
    total = hashlib.sha256(_metric_text(data.metric).encode())
    for name in ("calibration", "evaluation", "training"):
        source = getattr(data, name)
        if source is None:
            continue
        if name == "evaluation":
            x, y = source
            source = (*(x if isinstance(x, tuple) else (x,)), *(() if y is None else (y,)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for batch in batches(source, 256, what=name):
                for tensor in batch:
                    total.update(f"{name}{tensor.dtype}{tuple(tensor.shape[1:])}".encode())
                    total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _metric_text(metric: Any) -> str:
    """What tells one metric from another: its name, or the code, constants and bound values of a function."""
    if isinstance(metric, str):
        return metric
    if isinstance(metric, functools.partial):
        return f"partial {_metric_text(metric.func)} {metric.args!r} {sorted(metric.keywords.items())!r}"
    code = getattr(metric, "__code__", None) or getattr(type(metric).__dict__.get("__call__"), "__code__", None)
    if code is None:
        return repr(metric)
    closure = [repr(c.cell_contents) for c in getattr(metric, "__closure__", None) or ()]
    constants = [c.co_code.hex() if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return (
        f"{code.co_qualname} {code.co_code.hex()} {constants} {code.co_names} {closure} {getattr(metric, '__defaults__', None)!r}"
    )


def _pair(evaluation: Any) -> tuple[Tensor | tuple[Tensor, ...], Tensor | None]:
    """Evaluation as (inputs, labels); a loader, dataset or function is read whole, the last tensor of its batches the labels."""
    if isinstance(evaluation, DataLoader | Dataset) or callable(evaluation):
        columns = [torch.cat(part) for part in zip(*batches(evaluation, 256, what="evaluation"), strict=True)]
        return (tuple(columns[:-1]), columns[-1]) if len(columns) > 1 else (tuple(columns), None)
    if not isinstance(evaluation, tuple | list) or len(evaluation) != 2:
        found = f"{len(evaluation)} values" if isinstance(evaluation, tuple | list) else type(evaluation).__name__
        raise DataError(f"evaluation: found {found}; expected a pair (inputs, labels), or a loader of batches (inputs, labels)")
    x, y = evaluation
    try:
        inputs = tuple(torch.as_tensor(t) for t in (x if isinstance(x, tuple | list) else (x,)))
        labels = None if y is None else torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"evaluation: inputs and labels must be tensors or arrays ({cause(error)})") from error
    if labels is not None and any(len(t) != len(labels) for t in inputs if t.ndim and labels.ndim):
        raise DataError(f"evaluation: {len(inputs[0])} inputs and {len(labels)} labels; they must have the same number")
    return inputs if isinstance(x, tuple | list) else inputs[0], labels


def _spread(source: Source, samples: int) -> Source:
    """Every so manieth sample of what has a known length and is longer."""
    tensors = (source,) if isinstance(source, Tensor | np.ndarray) else source
    whole = isinstance(tensors, tuple | list) and bool(tensors) and all(isinstance(t, Tensor | np.ndarray) for t in tensors)
    sizes = {t.shape[0] if t.ndim else 0 for t in tensors} if whole else set()
    sized = isinstance(source, Dataset) and not isinstance(source, IterableDataset) and hasattr(source, "__len__")
    total = sizes.pop() if len(sizes) == 1 else len(source) if sized else 0
    if total <= samples:
        return source
    chosen = [i * total // samples for i in range(samples)]
    return Subset(source, chosen) if sized else tuple(t[chosen] for t in tensors)


def _guarded(source: Source, batch_size: int, what: str) -> Iterator[Any]:
    """Batches as the source has them; a failure of the user's code becomes one sentence."""
    count = 0
    try:
        for batch in _raw(source, batch_size, what):
            yield batch
            count += 1
    except (EdgekitError, GeneratorExit):
        raise
    except Exception as error:
        raise DataError(f"{what}: the source failed after {count} batches: {cause(error)}") from error


def _raw(source: Source, batch_size: int, what: str) -> Iterable[Any]:
    """Batches as the source has them, unchecked."""
    if isinstance(source, Tensor | np.ndarray):
        source = (source,)
    if isinstance(source, tuple | list) and source and all(isinstance(t, Tensor | np.ndarray) for t in source):
        sizes = [t.shape[0] if t.ndim else 0 for t in source]
        if len(set(sizes)) > 1:
            raise DataError(f"{what}: its tensors have {', '.join(map(str, sizes))} samples; they must have the same number")
        return ([t[i : i + batch_size] for t in source] for i in range(0, sizes[0], batch_size))
    if isinstance(source, DataLoader):
        return source
    if isinstance(source, IterableDataset):
        return DataLoader(source, batch_size=batch_size)
    if isinstance(source, Dataset):
        return DataLoader(source, batch_size=batch_size, shuffle=False)
    if callable(source):
        found = source()
        if isinstance(found, Iterable):
            return found
    if isinstance(source, Iterator):
        raise DataError(f"{what}: a {type(source).__name__} can be read only once; give a function that returns a new one")
    raise DataError(
        f"{what}: found {type(source).__name__}; expected a Tensor or ndarray (N, ...), a tuple of them, a Dataset, a "
        "DataLoader, or a function without arguments that returns an iterable of batches"
    )


def _tensors(batch: Any, what: str) -> tuple[Tensor, ...]:
    parts = batch if isinstance(batch, tuple | list) else (batch,)
    found = []
    for part in parts:
        if isinstance(part, np.ndarray):
            part = torch.from_numpy(np.ascontiguousarray(part))
        if not isinstance(part, Tensor):
            raise DataError(f"{what}: a batch holds {type(part).__name__}; expected a tensor (batch, ...) or a tuple of them")
        found.append(part)
    if not found:
        raise DataError(f"{what}: a batch without tensors; expected at least one")
    return tuple(found)


def _checked(tensors: tuple[Tensor, ...], start: int, what: str) -> tuple[Tensor, ...]:
    sizes = {t.shape[0] if t.ndim else 0 for t in tensors}
    if len(sizes) > 1:
        raise DataError(f"{what}: a batch's tensors have {sorted(sizes)} samples; they must have the same number")
    for t in tensors:
        if t.dtype in (torch.float64, torch.float16, torch.bfloat16) or t.is_complex():
            raise DataError(f"{what}: values are {str(t.dtype).removeprefix('torch.')}; convert them to float32 (`x.float()`)")
        if t.is_floating_point() and not torch.isfinite(t).all():
            row = int((~torch.isfinite(t.reshape(len(t), -1))).any(1).nonzero()[0])
            raise DataError(f"{what}: sample {start + row} has NaN or Inf; remove it or clean the values")
    return tensors
