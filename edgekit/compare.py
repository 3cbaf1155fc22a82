"""Two runs' profiles side by side, where that says something: times of different machines are compared only on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import InputError
from edgekit.profile import Profile, load

__all__ = ["Comparison", "compare", "compare_runs", "differences"]


@dataclass(frozen=True)
class Comparison:
    """One device and target of both runs.

    Attributes:
        first, second: cost of one inference in ``unit``.
        ratio: first over second; below 1: the first costs less.
        p90_ratio: the same of the 90th percentiles; None for instructions.
        differences: in what the machines differ, "what: first / second"; empty where they are the same.
        notes: what makes the ratio doubtful.
    """

    device: str
    target: str
    unit: str
    first: float
    second: float
    ratio: float
    p90_ratio: float | None
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def compare_runs(first: Path, second: Path, *, force: bool = False) -> tuple[Comparison, ...]:
    """Compare what two run folders were measured at, device by device and target by target.

    Args:
        force: also where the machines differ.

    Raises:
        InputError: nothing was measured in both, or on machines that differ (and not ``force``).
        FormatError: a damaged ``profile.json``.
    """
    one, two = ({(p.device, p.target): p for p in load(Path(folder) / "profile.json")} for folder in (first, second))
    for folder, found in ((first, one), (second, two)):
        if not found:
            raise InputError(f"{folder}: nothing was measured; run `edgekit profile {folder}`")
    both = [key for key in one if key in two]
    if not both:
        names = ["; ".join(f"{t} on {d}" for d, t in found) for found in (one, two)]
        raise InputError(f"{first} was measured with {names[0]}, {second} with {names[1]}: nothing in common; profile the same")
    rows = tuple(compare(one[key], two[key]) for key in both)
    for row in rows:
        if row.differences and not force:
            raise InputError(
                f"{row.target} on {row.device} was measured on machines that differ ({'; '.join(row.differences)}): their times "
                "say nothing about the files; measure both on one machine, or compare all the same with --force"
            )
    return rows


def compare(first: Profile, second: Profile) -> Comparison:
    """Two profiles of one device and target."""
    differing = differences(first.fingerprint.get("machine", {}), second.fingerprint.get("machine", {}))
    if first.unit != second.unit:
        differing = (*differing, f"unit: {first.unit} / {second.unit}")
    p90 = (first.figures.get("p90_microseconds"), second.figures.get("p90_microseconds"))
    return Comparison(
        first.device, first.target, first.unit, first.total, second.total, first.total / second.total if second.total else 0.0,
        p90[0] / p90[1] if p90[0] and p90[1] else None, differing, _doubts(first, second),
    )  # fmt: skip


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, ...]:
    """What is not equal, by name; nested mappings by dotted names."""
    a, b = _flat(first), _flat(second)
    return tuple(f"{k}: {_shown(a.get(k))} / {_shown(b.get(k))}" for k in sorted({*a, *b}) if a.get(k) != b.get(k))


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {f"{prefix}{key}": inner}
    return found


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _doubts(first: Profile, second: Profile) -> tuple[str, ...]:
    """States of the machine, not the machine: load, heat, throttling."""
    found = []
    for name, profile in (("first", first), ("second", second)):
        if (load := profile.figures.get("other_load_percent", 0)) > 10:
            found.append(f"other programs used {load:.0f} % of the machine during the {name}")
        for when in ("before", "after"):
            if throttled := profile.fingerprint.get(when, {}).get("throttled"):
                found.append(f"{throttled} {when} the {name}")
    heat = [p.fingerprint.get("after", {}).get("temperature_celsius") for p in (first, second)]
    if None not in heat and abs(heat[0] - heat[1]) > 10:
        found.append(f"{heat[0]:.0f} °C after the first, {heat[1]:.0f} °C after the second")
    return tuple(found)
