"""Integer spiking layers on emulated Cortex-M boards: instructions of a time step, event-driven, beside the dense layer.

    python benchmarks/snn_firmware.py [board ...]

256 inputs to 256 leaky neurons, spikes at random; currents and spikes are compared with numpy first, and counts repeat exactly. A
step is the synapses and the neurons. Rows of ``results/snn_firmware.json``: board, core, kernel_set, spikes_percent, instructions
(of a step), synapses, neurons, dense (our int8 layer of the same size on the same core, without neurons) and times; fading: what
the second state of current-based neurons costs beside; recurrent: neurons with a 256 x 256 layer from their spikes back to
themselves and currents that fade, recurrent_spikes_percent of which come back.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cortex_m_kernels
import numpy as np
import subjects

from edgekit.firmware_sim.boards import BOARDS, CORES
from edgekit.firmware_sim.count import count
from edgekit.firmware_sim.kernels import KERNEL_SETS, spiking_scratch
from edgekit.firmware_sim.toolchain import Project, build
from edgekit.targets.cortex_m.graph import Step
from edgekit.targets.cortex_m.spiking import KERNELS, REFERENCES

SIZE, STEPS = 256, 10
BOUNDS = {("cortex-m4", 11): 14_900, ("cortex-m55", 11): 4_800}
"""Instructions of a step at a share of spikes, not to be exceeded."""
SHARES = (2, 11, 25, 50)


def layers(share: float) -> tuple[Step, Step, Step, Step, np.ndarray]:
    """The synapses, the neurons, the fading current, the recurrent neurons, and the spikes that come in."""
    rng = np.random.default_rng(0)
    one = {"stride": (1, 1), "pad": (0, 0), "dilation": (1, 1), "groups": 1, "kernel": (1, 1)}
    weight = rng.integers(-127, 128, (SIZE, 1, 1, SIZE)).astype(np.int8)
    values = {"steps": STEPS, "in": (1, 1, SIZE), "out": (1, 1, SIZE), **one}
    synapses = Step("s", "spiking", (0,), 1, values, {"weight": weight, "bias": rng.integers(-50, 50, SIZE).astype(np.int16)})
    constants = {"threshold": np.full(SIZE, 900), "decay": np.full(SIZE, 28672), "v_init": np.zeros(SIZE)}
    values = {"steps": STEPS, "n": SIZE, "x_step": SIZE, "zero": 0, "max_spikes": 1}
    integers = {k: v.astype(np.int16) for k, v in constants.items()}
    neurons = Step("n", "neurons", (1,), 2, values, integers)
    faded = np.full(SIZE, 20000, np.int16)
    fading = Step("f", "fade", (1,), 2, values, {"decay": faded})
    back = {"weight": weight[::-1], "bias": np.zeros(SIZE, np.int16), "decay_syn": faded}
    sizes = {**values, "in": (1, 1, SIZE), "out": (1, 1, SIZE), **one}
    recurrent = Step("r", "recurrent", (1,), 2, sizes, {**integers, **back})
    return synapses, neurons, fading, recurrent, (rng.random((STEPS, SIZE)) < share).astype(np.int8)


def measure(board: str, kernel_set: str, share: int) -> dict[str, object]:
    *steps, x = layers(share / 100)
    synapses, neurons, fading, recurrent = steps
    current = REFERENCES["spiking"](synapses, [x.reshape(-1)])
    spikes = REFERENCES["neurons"](neurons, [current])
    faded, again = (REFERENCES[s.kind](s, [current]) for s in (fading, recurrent))
    parts = []
    for step in steps:
        for c in KERNELS[step.kind].constants(step):
            parts.append(cortex_m_kernels.constant(f"{step.layer}_{c.role}", c.type, c.values))
        (call,) = KERNELS[step.kind].calls(step)
        assert call.struct is not None
        members = [f".{f.name} = {f'{step.layer}_{f.value}' if f.type == '*' else f.value}" for f in call.struct.fields]
        parts.append(f"static const {call.struct.type} {step.layer} = {{{', '.join(members)}}};")
    body = f"""#include "edgekit.h"
{chr(10).join(parts)}
static int8_t x[{x.size}] EK_ARENA, y[{x.size}] EK_ARENA;
static int16_t current[{x.size}] EK_ARENA, faded[{x.size}] EK_ARENA;
static int8_t again[{x.size}] EK_ARENA;
static uint8_t scratch[{spiking_scratch((1, 1), SIZE, 1) + 6 * SIZE}] EK_ARENA;
__attribute__((noinline)) void synapses(void) {{ ek_spiking_s16(&s, x, current, scratch); }}
__attribute__((noinline)) void neurons(void) {{ ek_neurons_s16(&n, current, y, scratch); }}
__attribute__((noinline)) void fading(void) {{ ek_fade_s16(&f, current, faded); }}
__attribute__((noinline)) void recurrent(void) {{ ek_recurrent_s16(&r, current, again, scratch); }}
int ek_main(void) {{
    ek_input(x, sizeof x);
    synapses();
    neurons();
    fading();
    recurrent();
    ek_output(current, sizeof current);
    ek_output(y, sizeof y);
    ek_output(faded, sizeof faded);
    ek_output(again, sizeof again);
    return 0;
}}
"""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "app.c"
        source.write_text(body)
        project = Project(BOARDS[board], (source,), defines=(f"-DEK_SET={KERNEL_SETS.index(kernel_set)}",))
        counts = count(build(project, Path(name)), x.tobytes(), ["synapses", "neurons", "fading", "recurrent"])
    if counts.result.output != b"".join(v.tobytes() for v in (current, spikes, faded, again)):
        raise SystemExit(f"spiking layer on {board} ({kernel_set}) differs from numpy")
    core = BOARDS[board].core
    own = CORES[core].kernel_set
    dense = cortex_m_kernels.measure(cortex_m_kernels.Layer("fc", 0, SIZE, SIZE), board, own)["instructions"]
    assert isinstance(dense, int)
    parts_of = {k: round(v / STEPS) for k, v in counts.marks.items()}
    total = round((counts.marks["synapses"] + counts.marks["neurons"]) / STEPS)
    return {
        "board": board, "core": core, "kernel_set": kernel_set, "spikes_percent": share, "instructions": total, **parts_of,
        "instructions_bound": BOUNDS.get((core, share)) if kernel_set == own else None,
        "dense": dense, "times": round(dense / parts_of["synapses"], 2),
        "recurrent_spikes_percent": round(100 * float((again > 0).mean()), 1),
    }  # fmt: skip


def main(boards: Sequence[str]) -> None:
    rows = []
    for board in boards:
        for kernel_set in dict.fromkeys((CORES[BOARDS[board].core].kernel_set, "portable")):
            for share in SHARES:
                rows.append(measure(board, kernel_set, share))
                print(rows[-1], flush=True)
    subjects.write("snn_firmware", rows, whole="python benchmarks/snn_firmware.py")


if __name__ == "__main__":
    main(sys.argv[1:] or ["mps2-an386", "mps2-an500", "mps3-an547"])
