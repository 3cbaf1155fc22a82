"""The NIR paper's files in edgekit's interpreter: LIF traces, and the spiking CNN on N-MNIST; both from $EDGEKIT_DATA.

python benchmarks/snn_nir.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from snn_sets import DATA
from subjects import write

from edgekit.nir import interpret, read

PAPER = DATA.parent / "neuromorphic" / "nir_paper"
STEP_US = 1000
STEPS = 300
RULES: dict[str, dict[str, Any]] = {
    "as the file says (reset to 0, v > threshold)": {},
    "as sinabs runs it (subtract, v >= threshold)": {"reset": "subtract", "tie": "ge"},
}


def traces() -> list[dict[str, Any]]:
    """One LIF neuron, recorded by the paper's authors: norse takes Euler steps, "exact" solves the equation."""
    graph, rows = read(PAPER / "lif_norse.nir"), []
    for name in ("norse", "exact"):
        stimulus, membrane, spikes = np.loadtxt(PAPER / f"lif_{name}.csv", delimiter=",").T
        found = interpret(graph, stimulus.reshape(-1, 1, 1), dt=1e-4, record=None)
        rows.append(
            {
                "part": "trace", "variant": name, "steps": len(spikes), "spikes": int(spikes.sum()),
                "differing": int((found.output.ravel() != spikes).sum()),
                "membrane": float(np.abs(found.membranes["1"].ravel() - membrane).max()),
            }
        )  # fmt: skip
    return rows


def frames(z: Any, i: int) -> np.ndarray:
    """Events of a test sample as counts, (T, 1, 2, 34, 34)."""
    part = slice(z["offsets_test"][i], z["offsets_test"][i + 1])
    found = np.zeros((STEPS, 1, 2, 34, 34))
    step = np.minimum(z["t_test"][part] // STEP_US, STEPS - 1)
    np.add.at(found, (step, 0, z["p_test"][part], z["y_test"][part], z["x_test"][part]), 1)
    return found


def cnn() -> list[dict[str, Any]]:
    """The paper's convolutional network on the 100 test samples."""
    graph, z = read(PAPER / "cnn_sinabs.nir"), np.load(DATA / "nmnist_small.npz")
    labels = z["label_test"]
    right = dict.fromkeys(RULES, 0)
    for i in range(len(labels)):
        x = frames(z, i)
        for name, facts in RULES.items():
            right[name] += int(interpret(graph, x, facts=facts).output.sum(0)[0].argmax() == labels[i])
    return [
        {"part": "cnn", "variant": k, "steps": STEPS, "samples": len(labels), "accuracy": 100 * n / len(labels)}
        for k, n in right.items()
    ]


def section(rows: Any) -> str:
    """For docs/benchmarks.md."""
    lines = [
        "## NIR files of others",
        "",
        "The files of the NIR paper (Pedersen et al. 2024), run by edgekit's interpreter in float64.",
        "",
    ]
    lines += ["| recorded by | steps | spikes | differing | largest difference of the membrane |", "|---|---|---|---|---|"]
    for r in rows:
        if r["part"] == "trace":
            lines.append(f"| {r['variant']} | {r['steps']} | {r['spikes']} | {r['differing']} | {r['membrane']:.1e} |")
    lines += ["", "The paper's spiking CNN (cnn_sinabs.nir) on N-MNIST, 1 ms steps:", ""]
    lines += ["| rules | accuracy % | samples |", "|---|---|---|"]
    lines += [f"| {r['variant']} | {r['accuracy']:.1f} (at least 96) | {r['samples']} |" for r in rows if r["part"] == "cnn"]
    return "\n".join(lines)


if __name__ == "__main__":
    assert Path(PAPER).is_dir(), f"{PAPER}: the NIR paper's files are not there; set EDGEKIT_DATA"
    write("snn_nir", [*traces(), *cnn()])
