"""Streaming spiking firmware with and without early exit: steps, accuracy, instructions; digits on a Cortex-M4.

    python benchmarks/snn_exit.py

Dynamic Confidence is chosen by `early_exit` on training samples held out. Steps and accuracy are of all 600 evaluation samples on
the emulated board, instructions the mean of the first 50. Rows of ``results/snn_exit.json``: model, variant, core, steps,
accuracy, instructions, arena_bytes; every figure repeats exactly.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import subjects

import edgekit
from edgekit.compress.spiking.confidence import exit_of
from edgekit.firmware_sim.count import count
from edgekit.targets import get
from edgekit.targets.cortex_m import host
from edgekit.targets.cortex_m.early_exit import run_early
from edgekit.targets.cortex_m.preparation import to_stored

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"
CORE, COUNTED = "cortex-m4", 50
RECIPE = """name: digits-exit
model: {digits}/model.py:build
data: {digits}/data.py:load
compress:
  - spiking: {{weights: int8, method: calibrate, steps: 8, correct: bias, early_exit: {{max_drop: 0.2}}}}
targets: []
verify: {{max_accuracy_drop: null}}
seed: 0
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(RECIPE.format(digits=DIGITS))
        command = [sys.executable, "-m", "edgekit", "run", str(folder / "recipe.yaml"), "--out", str(folder / "run")]
        subprocess.run(command, check=True)
        program, rule = edgekit.load(folder / "run"), exit_of(json.loads((folder / "run" / "compress.json").read_text()))
        sys.path.insert(0, str(DIGITS))
        import data

        x, y = (np.asarray(v) for v in data.load().evaluation)
        target = get(CORE)
        options = target.Options(stream=True, exit_threshold=rule.threshold, exit_temperature=rule.temperature)
        artifact = target.lower(program, folder / f"model{target.SUFFIX}", options)
        outputs, steps = run_early(artifact.path, [x])
        (whole,) = target.run(artifact.path, [x])
        rows = []
        for variant, found, taken, define in (
            ("all steps", whole, 8.0, ()),
            ("early exit", outputs, steps.mean(), ("-DMODEL_EXIT=1",)),
        ):
            facts, built = host.built(artifact.path.parent, *define)
            samples = b"".join(v.tobytes() for i in range(COUNTED) for v in to_stored(facts.inputs, [x[i : i + 1]]))
            counts = count(built, samples, [step[0] for step in facts.steps])
            rows.append({
                "model": "digits-spiking", "variant": variant, "core": CORE, "steps": round(float(taken), 3),
                "accuracy": round(100 * float((found.argmax(1) == y).mean()), 3),
                "instructions": round(sum(counts.marks.values()) / COUNTED), "arena_bytes": artifact.memory["arena"],
            })  # fmt: skip
    notes = [f"threshold {rule.threshold:.5f}, temperature {rule.temperature:.4f}; instructions of the first {COUNTED} samples"]
    subjects.write("snn_exit", rows, notes)


if __name__ == "__main__":
    main()
