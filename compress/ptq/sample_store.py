"""Values of all calibration samples, in memory up to a budget, beyond it in memory-mapped files that are gone at the end."""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

__all__ = ["Samples", "Store"]

_RESIDENT = 32 << 20
"""Bytes of mapped files that may be touched before their pages are given back."""


class _Window:
    """The mapped files of one store: their pages count as memory of the process until they are given back."""

    def __init__(self) -> None:
        self.maps: list[mmap.mmap] = []
        self.touched = 0

    def touch(self, count: int) -> None:
        """So many bytes were read or written."""
        self.touched += count
        if self.touched > _RESIDENT:
            for one in self.maps:
                one.madvise(mmap.MADV_DONTNEED)
            self.touched = 0


class Samples:
    """An array (N, ...), in memory or mapped from a file; images are kept and given back channels-last."""

    def __init__(
        self, shape: Sequence[int], folder: str | None, dtype: torch.dtype = torch.float32, window: _Window | None = None
    ) -> None:
        self.shape = (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else tuple(shape)
        kind = torch.empty(0, dtype=dtype).numpy().dtype
        self.bytes = kind.itemsize * math.prod(self.shape)
        self._file = tempfile.TemporaryFile(dir=folder) if folder else None  # noqa: SIM115
        self._window = window or _Window()
        if self._file is None:
            self._values = np.empty(self.shape, kind)
        else:
            self._file.truncate(max(self.bytes, 1))
            self._map = mmap.mmap(self._file.fileno(), max(self.bytes, 1))
            self._window.maps.append(self._map)
            self._values = np.frombuffer(self._map, kind, math.prod(self.shape)).reshape(self.shape)

    @property
    def on_disk(self) -> bool:
        """It is a mapped file."""
        return self._file is not None

    def __len__(self) -> int:
        return self.shape[0]

    def write(self, start: int, values: Tensor) -> None:
        """Store samples ``start`` to ``start + len(values)``."""
        last = values.permute(0, 2, 3, 1) if values.dim() == 4 else values
        self._values[start : start + len(values)] = last.detach().cpu().numpy()
        self._touch(values.nbytes)

    def rows(self, index: Tensor | slice) -> Tensor:
        """A copy of some samples."""
        found = torch.from_numpy(self._values[index if isinstance(index, slice) else index.numpy()].copy())
        self._touch(found.nbytes)
        return found.permute(0, 3, 1, 2) if found.dim() == 4 else found

    def trim(self, count: int) -> None:
        """Forget all but the first ``count`` samples."""
        self.shape = (count, *self.shape[1:])
        self._values = self._values[:count]

    def forget(self) -> None:
        """Its window gives back nothing of it any more."""
        if self._file is not None:
            self._window.maps.remove(self._map)

    def _touch(self, count: int) -> None:
        if self._file is not None:
            self._window.touch(count)


class Store:
    """Named :class:`Samples` within a budget of memory, in bytes; use as a context."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._held: dict[str, Samples] = {}
        self._window = _Window()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held.clear()
        self._window.maps.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def __getitem__(self, name: str) -> Samples:
        return self._held[name]

    def __contains__(self, name: str) -> bool:
        return name in self._held

    @property
    def names(self) -> tuple[str, ...]:
        """What is held."""
        return tuple(self._held)

    def new(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Samples:
        """Room for an array; in memory if the budget still has it."""
        size = math.prod(shape) * dtype.itemsize
        fits = self.used + size <= self.budget
        if not fits and self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="edgekit-samples-")
        made = Samples(shape, None if fits or self._folder is None else self._folder.name, dtype, self._window)
        self.used += size if fits else 0
        self._held[name] = made
        return made

    def drop(self, name: str) -> None:
        """Free an array."""
        gone = self._held.pop(name)
        gone.forget()
        self.used -= 0 if gone.on_disk else gone.bytes
