"""The transformer example from end to end: accuracy, size and the share that stays in float, in each format.

python benchmarks/transformer.py: runs examples/fsdd_transformer/recipe.yaml (trained when first used) and takes its stage table,
each file being run on the 300 held-back recordings and verified layer by layer; seed 0.
"""

from __future__ import annotations

from typing import Any

import subjects
import torch
from subjects import log

import edgekit
from edgekit.frozen import load
from edgekit.parity import ArtifactParity, Stage


def row(stage: Stage, file: ArtifactParity | None) -> dict[str, Any]:
    """A stage's figures, and what verify found out about a file."""
    variant = stage.name if file is None else "edgekit"
    found = {"model": "fsdd_transformer", "variant": variant, "target": stage.name, "device": "host", "weight_bits": 8, "seed": 0}
    found |= {"accuracy": stage.metric, "bytes": stage.bytes, "macs": stage.macs, "max_lsb": stage.max_lsb}
    if file is not None:
        rows = file.artifact["coverage"]
        share = sum(r["macs"] for r in rows if r["runs"] == "float") / sum(r["macs"] for r in rows)
        largest = max(layer.max_lsb for layer in file.layers)
        found |= {"float_macs": round(share, 4), "layer_lsb": largest, "breaches": len(file.breaches)}
    log("  " + ", ".join(f"{k} {v}" for k, v in found.items() if v is not None))
    return {k: v for k, v in found.items() if v is not None}


def main() -> None:
    subjects.arguments(__doc__ or "")
    torch.set_num_threads(1)
    folder = subjects.WORK / "fsdd_transformer"
    outcome = edgekit.run(subjects.ROOT / "examples" / "fsdd_transformer" / "recipe.yaml", folder)
    assert outcome.parity is not None
    files = {a.target: a for a in outcome.parity.artifacts}
    rows = [row(stage, files.get(stage.name)) for stage in outcome.parity.stages]
    program = load(folder / "frozen.pt2")
    kept = sorted({x.op for x in program.float_layers if x.macs or x.parameters})
    subjects.write("transformer", rows, [f"With products or weights in float: {', '.join(kept)}."])


if __name__ == "__main__":
    main()
