"""A device and a target as one: the members of a target module (:mod:`edgekit.targets`), but the file runs on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgekit import targets
from edgekit.artifact import Artifact, Mismatch
from edgekit.devices import naming
from edgekit.frozen import FrozenProgram
from edgekit.targets import get

__all__ = ["OnDevice"]


@dataclass(frozen=True)
class OnDevice:
    """What is read from the file comes from the target's module, what is computed from the device."""

    target: str
    device: Any

    @property
    def NAME(self) -> str:
        """Both names, as tables show them."""
        return f"{self.target} on {self.device.name}"

    @property
    def SUFFIX(self) -> str:
        """The target's."""
        return str(get(self.target).SUFFIX)

    def files(self, path: Path) -> list[Path]:
        """The target's."""
        return targets.files(get(self.target), path)

    def inspect(self, path: Path, program: FrozenProgram) -> Artifact:
        """The target's."""
        found: Artifact = get(self.target).inspect(path, program)
        return found

    @property
    def quantizes(self) -> bool:
        """Whether the device runs other numbers than the file's, as a chip does."""
        return bool(getattr(self.device, "quantizes", False))

    @property
    def notes(self) -> list[str]:
        """What the device told of its last run."""
        return list(getattr(self.device, "told", ()))

    @property
    def wrong(self) -> list[str]:
        """What of its last run may not be."""
        return list(getattr(self.device, "wrong", ()))

    def readback(self, path: Path, program: FrozenProgram) -> list[Mismatch]:
        """The target's."""
        return list(get(self.target).readback(path, program))

    def run(
        self,
        path: Path,
        inputs: Sequence[NDArray[Any]],
        threads: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[NDArray[Any]]:
        """The device's outputs for a batch."""
        with naming(self.device):
            return list(self.device.run(path, self.target, inputs, progress))

    def taps(self, path: Path, program: FrozenProgram, sample: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Each layer's output as the device computed it."""
        with naming(self.device):
            return dict(self.device.taps(path, self.target, program, sample))

    def taps_each(
        self, path: Path, program: FrozenProgram, samples: Sequence[NDArray[Any]]
    ) -> list[dict[str, NDArray[Any]]] | None:
        """:meth:`taps` of every sample by one start of the device; None where it has no such thing."""
        own = getattr(self.device, "taps_each", None)
        if own is None:
            return None
        with naming(self.device):
            return list(own(path, self.target, program, samples))

    def reference(
        self, path: Path, program: FrozenProgram, sample: Sequence[NDArray[Any]]
    ) -> tuple[dict[str, NDArray[Any]], list[NDArray[Any]]] | None:
        """What the device must compute to the last bit; None where it has no such reference."""
        own = getattr(self.device, "reference", None)
        return None if own is None else own(path, self.target, program, sample)
