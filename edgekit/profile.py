"""What a file costs on a device: plain data with a JSON form (``profile.json``, one entry for each device and target).

A cost is either time, a count of instructions, or a count of synaptic operations, never one called the other: an emulator has
instructions, a machine has time, a spiking network on a simulator has operations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgekit.errors import FormatError
from edgekit.files import write_json

__all__ = ["FORMAT", "LayerCost", "Profile", "Settings", "load", "save"]

FORMAT = 1
"""Version of ``profile.json``."""


@dataclass(frozen=True)
class Settings:
    """How to measure; the names are those of TFLite's benchmark_model.

    Attributes:
        num_threads: threads of the runtime.
        num_runs: timed runs; an emulator that counts needs one.
        warmup_runs: runs before them.
        seconds: at least this long (sustained mode); None: ``num_runs`` only.
        per_layer: also measure each layer.
    """

    num_threads: int = 1
    num_runs: int = 50
    warmup_runs: int = 5
    seconds: float | None = None
    per_layer: bool = True


@dataclass(frozen=True)
class LayerCost:
    """One layer. ``instructions``, ``microseconds``, or ``synaptic_operations`` or ``spikes`` is set, for one sample; ``share``
    is that of the whole, 0 to 1.

    ``library_instructions`` are those of ``instructions`` that the compiler's and C library's functions took.
    """

    layer: str
    op: str
    macs: int
    instructions: int | None = None
    microseconds: float | None = None
    share: float = 0.0
    note: str = ""
    library_instructions: int | None = None
    synaptic_operations: float | None = None
    spikes: float | None = None


@dataclass(frozen=True)
class Profile:
    """One file on one device.

    Attributes:
        device, target: as on the command line.
        file, sha256: the file that ran.
        unit: "instructions", "microseconds", or "synaptic operations" (spiking networks).
        total: cost of one inference in ``unit`` (median where it varies).
        macs: multiply-accumulates for one sample.
        layers: in execution order; empty if not measured.
        figures: further numbers by name, the unit in the name (``p90_microseconds``, ``flash_bytes``, ``stack_bytes``, ...).
        series: a row a second of a sustained run: ``seconds``, ``median_microseconds``, and where known ``temperature_celsius``.
        fingerprint: what identifies the machine and its state; empty for an emulated board.
        fits: boards and parts by name with their margins in bytes, where the target is firmware.
        method: how it was measured, in words.
        notes: what a reader has to know.
    """

    device: str
    target: str
    file: str
    sha256: str
    unit: Literal["instructions", "microseconds", "synaptic operations"]
    total: float
    macs: int
    layers: tuple[LayerCost, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    fits: tuple[Mapping[str, Any], ...] = ()
    method: str = ""
    notes: tuple[str, ...] = ()
    series: tuple[Mapping[str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def load(path: Path) -> tuple[Profile, ...]:
    """The profiles of a ``profile.json``; empty if there is no such file.

    Raises:
        FormatError: the file is damaged or from a newer edgekit.
    """
    try:
        found = json.loads(Path(path).read_text())
        if int(found["format"]) > FORMAT:
            raise FormatError(f"{path}: format {found['format']}, this edgekit reads format {FORMAT}; upgrade edgekit")
        return tuple(
            Profile(
                **{
                    **p,
                    "layers": tuple(LayerCost(**x) for x in p["layers"]),
                    "fits": tuple(p["fits"]),
                    "notes": tuple(p["notes"]),
                    "series": tuple(p.get("series", ())),
                }
            )
            for p in found["profiles"]
        )
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: damaged ({error}); run `edgekit profile` again") from error


def save(path: Path, *profiles: Profile) -> None:
    """Add profiles to a ``profile.json``; one of the same device and target is replaced."""
    known = {(p.device, p.target): p for p in (*load(path), *profiles)}
    write_json(Path(path), {"format": FORMAT, "profiles": [known[k].to_json() for k in sorted(known)]})
