"""The ``rewrite`` block of a recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

from edgekit.compress.canonical import drop_unused_tensors
from edgekit.compress.capture import Graph
from edgekit.compress.passes import PassRecord
from edgekit.compress.rewrite.fuse import fuse_layers, write_out_attention
from edgekit.compress.rewrite.norms import rewrite_norms
from edgekit.compress.rewrite.settings import Rewrite
from edgekit.data import Data
from edgekit.errors import ModelError

__all__ = ["rewrite"]


def rewrite(
    graph: Graph,
    settings: Rewrite,
    data: Data | None = None,
    original: Graph | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Graph, PassRecord]:
    """A graph that computes the same function; the given one stays as it is.

    Raises:
        ModelError: ``norm`` is asked for and not one LayerNorm can be rewritten; the message says why.
    """
    names = dict(graph.names)
    made = replace(graph, module=copy.deepcopy(graph.module), names=names)
    changed = fuse_layers(made, names) if settings.fuse else {}
    left: dict[str, str] = {}
    if settings.attention:
        more, kept = write_out_attention(made, names)
        changed, left = {**changed, **more}, {**left, **kept}
    if settings.norm != "none":
        more, kept = rewrite_norms(made, settings.norm, names)
        if not more:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:3]) or "it has no LayerNorm"
            raise ModelError(f"rewrite: the model is no Pre-LN transformer ({why}); leave out `norm`")
        changed, left = {**changed, **more}, {**left, **kept}
    made.module.graph.eliminate_dead_code()
    made.module.graph.lint()
    made.module.recompile()
    drop_unused_tensors(made.module)
    alive = {n.name for n in made.module.graph.nodes}
    return replace(made, names={n: name for n, name in names.items() if n in alive}), PassRecord(changed, left)
