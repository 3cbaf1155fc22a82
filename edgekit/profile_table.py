"""A profile as tables: what the command line and the report both show. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgekit.profile import LayerCost, Profile

__all__ = ["COLUMNS", "FITS", "Table", "figure", "figures", "fit_row", "layer_row", "layers", "text", "title"]

COLUMNS = (
    "layer", "operator", "MACs", "instructions", "a MAC", "of these in libraries", "µs", "synaptic operations", "spikes",
    "share %", "note",
)  # fmt: skip
"""Headings of :func:`layer_row`."""

FITS = ("board or part", "core", "fits", "flash left", "RAM left", "flash", "RAM", "data from")
"""Headings of :func:`fit_row`; sizes in bytes."""

_FIRST = (
    "flash_bytes", "flash_code_bytes", "flash_weights_bytes", "ram_bytes", "arena_bytes", "arena_bound_bytes", "static_ram_bytes",
    "stack_bytes", "stack_reserved_bytes", "least_instructions", "most_instructions", "library_instructions", "boot_instructions",
)  # fmt: skip
_NAMES = {
    "ram": "RAM", "static_ram": "static RAM", "arena_bound": "arena without overlaps, at least", "stack": "stack used",
    "least": "least over the samples", "most": "most over the samples", "library": "in libgcc and libc", "boot": "boot, once",
}  # fmt: skip
_UNITS = ("bytes", "microseconds", "milliseconds", "seconds", "instructions", "percent", "celsius", "mhz", "runs", "nanojoules")


@dataclass(frozen=True)
class Table:
    """Headings and rows of plain values; None where there is nothing."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def title(profile: Profile) -> str:
    """What ran where and what it cost: "cortex-m4 on qemu:mps2-an386: 32,196 instructions an inference, 1.31 a MAC"."""
    total = f"{profile.total:,.0f}" if profile.total >= 100 else f"{profile.total:.3g}"
    each = f", {profile.total / profile.macs:.3f} a MAC" if profile.unit == "instructions" and profile.macs else ""
    return f"{profile.target} on {profile.device}: {total} {profile.unit} an inference{each}"


def layers(profile: Profile) -> Table:
    """The layers, without columns that none has a value for."""
    return _kept(COLUMNS, [layer_row(layer) for layer in profile.layers])


def layer_row(layer: LayerCost) -> tuple[Any, ...]:
    """A layer as a row under :data:`COLUMNS`."""
    counted = layer.instructions
    each = counted / layer.macs if counted is not None and layer.macs else None
    library = layer.library_instructions or None
    share = 100 * layer.share
    spiking = (layer.synaptic_operations, layer.spikes)
    return (
        layer.layer, layer.op, layer.macs or None, counted, each, library, layer.microseconds, *spiking, share, layer.note or None
    )  # fmt: skip


def fit_row(fit: Mapping[str, Any]) -> tuple[Any, ...]:
    """An entry of :attr:`Profile.fits` as a row under :data:`FITS`."""
    sizes = (fit["flash_margin_bytes"], fit["ram_margin_bytes"], fit["flash_bytes"], fit["ram_bytes"])
    return (fit["name"], fit["core"], fit["fits"], *sizes, fit["source"])


def figures(profile: Profile) -> list[tuple[str, str]]:
    """The figures as words, what readers look for first."""
    first = {name: i for i, name in enumerate(_FIRST)}
    names = sorted(profile.figures, key=lambda name: first.get(name, len(first)))
    return [figure(name, profile.figures[name]) for name in names]


def figure(name: str, value: float) -> tuple[str, str]:
    """A figure's name without its unit, and its value with it: ``("flash code", "8,664 bytes")``."""
    words = name.split("_")
    unit = f" {words.pop()}" if len(words) > 1 and words[-1] in _UNITS else ""
    return _NAMES.get("_".join(words), " ".join(words)), text(int(value) if float(value).is_integer() else float(value)) + unit


def text(value: Any, column: str = "") -> str:
    """A value of a table in words: ``text(8664) == "8,664"``; a share has one decimal, so that a column of them lines up."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if column.startswith("share"):
            return f"{value:.1f}"
        return f"{value:.4g}" if abs(value) < 100 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _kept(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    kept = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    return Table(tuple(columns[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows))
