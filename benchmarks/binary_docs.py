"""Sections of docs/benchmarks.md about 1-bit and spiking layers in firmware (binary_firmware.json, snn_firmware.json)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["early_exit", "firmware", "spiking"]

_HEAD = """
## 1-bit layers in firmware

Instructions of one layer on emulated boards, beside our fastest int8 kernel of the same layer on the same core; signs are
random, so that neither of the two is rare, which is the slowest case. Packed outputs feed another 1-bit layer; int8 ones are
requantized as the int8 layer's. "vectors" counts 32 outputs at once (128 with Helium), "planes" 32 positions, "rows" one
output after the other; an exported project takes "rows" where there are fewer than 24 positions; "matmul" is a product of two
activations, one head of attention, beside our int8 linear layer with as many inputs and outputs. Below 1 the int8 layer is
quicker: so it is on Helium for most convolutions, and for linear layers with int8 outputs.
"""


def firmware(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each layer, core and kernel."""
    lines = [_HEAD.strip(), "", "| layer | core | kernel | output | instructions | int8 layer | times fewer |", "|---" * 7 + "|"]
    for r in rows:
        kernel = f"{r['kernel']}, {'portable C' if r['kernel_set'] == 'portable' else r['kernel_set']}"
        bound = r["times_bound"]
        missed = bound is not None and r["times"] < bound
        times = f"{'**' if missed else ''}{r['times']:.2f}{'**' if missed else ''}" + (f" (at least {bound:g})" if bound else "")
        cells = [r["layer"], r["core"], kernel, r["output"], f"{r['instructions']:,}", f"{r['int8']:,}", times]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_SPIKING = """
## Spiking layers in firmware

Instructions of a time step of 256 inputs to 256 leaky neurons on emulated boards, for several shares of inputs that spike;
beside them our fastest int8 layer of the same size on the same core, which multiplies every input. "Times" compares the synapses
with it. "Fading current": what the second state of current-based (CUBA) neurons takes beside; "recurrent": such neurons with a
256 x 256 layer from their own spikes, that share of which come back.
"""


def spiking(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each core, kernel set and share of spikes."""
    head = "| core | kernels | spikes % | a step | synapses | neurons | int8 layer | times fewer | fading current | recurrent |"
    lines = [_SPIKING.strip(), "", head, "|---" * 10 + "|"]
    for r in rows:
        bound = r["instructions_bound"]
        mark = "**" if bound is not None and r["instructions"] > bound else ""
        step = f"{mark}{r['instructions']:,}{mark}" + (f" (at most {bound:,})" if bound else "")
        kernels = "portable C" if r["kernel_set"] == "portable" else r["kernel_set"]
        numbers = [f"{r[k]:,}" for k in ("synapses", "neurons", "dense")]
        own = [f"{r['fading']:,}", f"{r['recurrent']:,} ({r['recurrent_spikes_percent']} %)"]
        numbers = [*numbers, f"{r['times']:.2f}", *own]
        lines.append("| " + " | ".join([r["core"], kernels, str(r["spikes_percent"]), step, *numbers]) + " |")
    return "\n".join(lines)


_EARLY = """
### Early exit in streaming firmware

`examples/digits` as a spiking network of 8 steps in integers, one step a call (`stream: true`), with and without Dynamic
Confidence. Steps and accuracy are of 600 samples, instructions the mean of the first 50.
"""


def early_exit(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line with all steps, a line with early exit."""
    lines = [
        _EARLY.strip(),
        "",
        "| core | variant | mean steps | accuracy % | instructions a sample | arena bytes |",
        "|---" * 6 + "|",
    ]
    for r in rows:
        cells = [
            r["core"],
            r["variant"],
            f"{r['steps']:.2f}",
            f"{r['accuracy']:.2f}",
            f"{r['instructions']:,}",
            f"{r['arena_bytes']:,}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
