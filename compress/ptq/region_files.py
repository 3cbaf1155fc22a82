"""Finished regions of a reconstruction on disk, so that an interrupted one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from edgekit.compress.ptq.observers import ActQ
from edgekit.compress.ptq.plan import WeightQ
from edgekit.files import write_whole

__all__ = ["read_region", "write_region"]

Found = tuple[Mapping[str, WeightQ], Mapping[str, ActQ], tuple[float, float, float]]


def write_region(
    path: Path, weights: Mapping[str, WeightQ], activations: Mapping[str, ActQ], figures: tuple[float, float, float]
) -> None:
    """Store a region's weights by layer name, activations by node name, and its errors."""
    from safetensors.torch import save

    tensors = {"figures": torch.tensor(figures, dtype=torch.float64)}
    for i, w in enumerate(weights.values()):
        tensors |= {f"{i}.integers": w.integers, f"{i}.scale": w.scale, f"{i}.bias": w.bias}
        tensors |= {} if w.zero is None else {f"{i}.zero": w.zero}
    about = {
        "bits": {name: w.bits for name, w in weights.items()},
        "activations": {name: [q.scale, q.zero_point, q.bits, q.few, q.floor] for name, q in activations.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save({k: v.contiguous() for k, v in tensors.items()}, {"about": json.dumps(about)}))


def read_region(path: Path, layers: Sequence[str]) -> Found | None:
    """What :func:`write_region` stored; None if there is no such file, it is damaged, or it has other layers."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if list(about["bits"]) != list(layers):
            return None
        weights = {
            name: WeightQ(tensors[f"{i}.integers"], tensors[f"{i}.scale"], bits, tensors[f"{i}.bias"], tensors.get(f"{i}.zero"))
            for i, (name, bits) in enumerate(about["bits"].items())
        }
        before, after, learned = tensors["figures"].tolist()
        return weights, {name: ActQ(*values) for name, values in about["activations"].items()}, (before, after, learned)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
