"""What a spiking network costs, as a :class:`Profile`: counted from spikes, with the literature's energy beside a dense pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from edgekit.profile import LayerCost, Profile
from edgekit.targets.neuromorphic.figures import PROXY, Cost, count

__all__ = ["profile"]

METHOD = (
    "synaptic operations as NeuroBench counts effective ACs and MACs: weights that are not 0 times inputs that are not 0, over "
    "all steps, mean over the samples"
)


def profile(device: str, graph: Any, inputs: NDArray[Any], spikes: Mapping[str, NDArray[Any]], per_layer: bool = True) -> Profile:
    """Count for rasters that a simulator gave.

    Args:
        inputs: (T, N, *shape).
        spikes: layer to (T, N, ...).
    """
    found = count(graph, inputs, spikes=spikes)
    figures = found.figures()
    return Profile(
        device=device, target="nir", file="", sha256="", unit="synaptic operations", total=figures["synaptic_operations"],
        macs=found.dense_macs, layers=_layers(found) if per_layer else (), figures=figures, method=METHOD,
        notes=(_energy(found, figures), PROXY),
    )  # fmt: skip


def _layers(found: Cost) -> tuple[LayerCost, ...]:
    total = found.acs + found.macs
    return tuple(
        LayerCost(
            row.name, row.op, row.dense_macs, share=(row.acs + row.macs) / total if total else 0.0,
            synaptic_operations=row.acs + row.macs if row.dense_macs else None, spikes=None if row.dense_macs else row.spikes,
            note="inputs other than 0 and 1: multiply-accumulates" if row.macs else "",
        )
        for row in found.layers
    )  # fmt: skip


def _energy(found: Cost, figures: Mapping[str, float]) -> str:
    """One sentence: the proxy, beside the dense baseline and T."""
    own, dense = figures["energy_proxy_nanojoules"], figures["dense_energy_proxy_nanojoules"]
    whole = figures["energy_proxy_with_membranes_nanojoules"]
    share = f", {own / dense:.2f} times as much" if dense else ""
    return (
        f"T = {found.steps}: {own:.4g} nJ of synapses ({whole:.4g} nJ with membranes) "
        f"against {dense:.4g} nJ of one dense pass{share}"
    )
