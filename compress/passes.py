"""What a float pass over a captured graph is given and gives back: one graph in, another one out, and a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgekit.compress.capture import Graph
from edgekit.data import Data

__all__ = ["FloatPass", "PassRecord"]


@dataclass(frozen=True)
class PassRecord:
    """What a pass did, for compress.json and reports.

    Attributes:
        layers: layer name to what was changed.
        left: layer name to why it was left alone.
        figures: numbers of the whole pass, such as parameters before and after.
        warnings: sentences for the user.
    """

    layers: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, float | int | str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; what was left alone becomes a table."""
        left = [{"layer": name, "reason": reason} for name, reason in self.left.items()]
        return {**self.figures, "layers": dict(self.layers), "left alone": left}


FloatPass = Callable[[Graph, Any, Data, Graph, Callable[[str, int, int], None] | None], tuple[Graph, PassRecord]]
"""(graph, settings, data, the graph as captured, progress) -> (new graph, record); neither graph given is changed."""
