"""What a user would otherwise put on a microcontroller: the float network in plain C, and emlearn's network; for firmware.py.

Both are built with the same compiler and runtime as the firmware, at -O3 and with fused multiply-adds where the core has them,
and both must compute what the PyTorch model computes before their instructions are counted.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgekit.firmware_sim.boards import BOARDS, CORES
from edgekit.firmware_sim.count import count
from edgekit.firmware_sim.memory import measure
from edgekit.firmware_sim.toolchain import Project, build, find
from edgekit.frozen import FrozenProgram
from edgekit.targets.cortex_m.graph import Firmware, Step, lifetimes
from edgekit.targets.cortex_m.memory import place

FLAGS = ("-ffp-contract=fast",)
EMLEARN = "0.23.2"

_LOOPS = """
static void conv(const float *w, const float *b, const float *x, float *y, int ih, int iw, int ic, int oh, int ow, int oc,
                 int kh, int kw, int sh, int sw, int top, int left, int relu) {
    for (int oy = 0; oy < oh; oy++)
        for (int ox = 0; ox < ow; ox++)
            for (int o = 0; o < oc; o++) {
                float acc = b[o];
                for (int i = 0; i < kh; i++) {
                    const int iy = oy * sh - top + i;
                    if (iy < 0 || iy >= ih) continue;
                    for (int j = 0; j < kw; j++) {
                        const int ix = ox * sw - left + j;
                        if (ix < 0 || ix >= iw) continue;
                        const float *p = x + (iy * iw + ix) * ic, *q = w + ((o * kh + i) * kw + j) * ic;
                        for (int c = 0; c < ic; c++) acc += p[c] * q[c];
                    }
                }
                y[(oy * ow + ox) * oc + o] = relu && acc < 0 ? 0 : acc;
            }
}
static void depthwise(const float *w, const float *b, const float *x, float *y, int ih, int iw, int c, int oh, int ow,
                      int kh, int kw, int sh, int sw, int top, int left, int relu) {
    for (int oy = 0; oy < oh; oy++)
        for (int ox = 0; ox < ow; ox++)
            for (int o = 0; o < c; o++) {
                float acc = b[o];
                for (int i = 0; i < kh; i++) {
                    const int iy = oy * sh - top + i;
                    if (iy < 0 || iy >= ih) continue;
                    for (int j = 0; j < kw; j++) {
                        const int ix = ox * sw - left + j;
                        if (ix < 0 || ix >= iw) continue;
                        acc += x[(iy * iw + ix) * c + o] * w[(i * kw + j) * c + o];
                    }
                }
                y[(oy * ow + ox) * c + o] = relu && acc < 0 ? 0 : acc;
            }
}
static void linear(const float *w, const float *b, const float *x, float *y, int n, int m, int relu) {
    for (int o = 0; o < m; o++) {
        float acc = b[o];
        for (int i = 0; i < n; i++) acc += x[i] * w[o * n + i];
        y[o] = relu && acc < 0 ? 0 : acc;
    }
}
static void add(const float *a, const float *b, float *y, int n, int relu) {
    for (int i = 0; i < n; i++) y[i] = relu && a[i] + b[i] < 0 ? 0 : a[i] + b[i];
}
static void mean(const float *x, float *y, int n, int c) {
    for (int o = 0; o < c; o++) {
        float acc = 0;
        for (int i = 0; i < n; i++) acc += x[i * c + o];
        y[o] = acc / n;
    }
}
"""
"""Every loop as one would write it from the layer's formula; channels last."""


@dataclass(frozen=True)
class Peer:
    """C text with a function ``infer``, the floats it takes and gives, and archives it is linked with."""

    text: str
    inputs: int
    outputs: int
    include: tuple[Path, ...] = ()
    library: str = ""


def folded(model: nn.Module, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight (outputs first) and bias of a layer, with the BatchNorm behind it folded in."""
    layer = model.get_submodule(name)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    other = name.removesuffix("conv") + "bn" if name.endswith(".conv") else name.replace("fcs.", "bns.")
    bn = dict(model.named_modules()).get(other) if other != name else None
    if bn is not None:
        gain = bn.weight.detach().double() / torch.sqrt(bn.running_var.double() + bn.eps)
        weight = weight * gain.reshape(-1, *[1] * (weight.dim() - 1))
        bias = (bias - bn.running_mean.double()) * gain + bn.bias.detach().double()
    return weight.float().numpy(), bias.float().numpy()


def float_c(program: FrozenProgram, firmware: Firmware, model: nn.Module) -> Peer:
    """The float network, layer by layer as the firmware has it, float tensors placed by the firmware's own planner."""
    owner, buffers = lifetimes(firmware, [s.reuse for s in firmware.steps])
    sizes = [type(b)(4 * b.size, b.first, b.last) for b in buffers[: len(set(owner))]]
    placed = place(sizes)
    parts, calls = ['#include "edgekit.h"', _LOOPS, f"static uint8_t arena[{placed.size}] EK_ARENA;"], []
    for index, step in enumerate(firmware.steps):
        relu = int(program.layer(step.layer).args.get("activation", "none") == "relu")
        at = [f"(float *)(arena + {placed.offsets[owner[t]]})" for t in (*step.inputs, step.output)]
        names = ""
        if "weight" in step.arrays:
            weight, bias = folded(model, step.layer)
            names = f"w{index}, b{index}, "
            parts += [_array(f"w{index}", _stored(step, weight)), _array(f"b{index}", bias)]
        function, numbers = _call(step, relu)
        calls.append(f"    {function}({names}{', '.join(at)}, {', '.join(map(str, numbers))});")
    first, last = firmware.tensors[firmware.inputs[0].tensor], firmware.tensors[firmware.outputs[0].tensor]
    parts += ["__attribute__((noinline)) void infer(void) {\n" + "\n".join(calls) + "\n}"]
    ends = [placed.offsets[owner[t.index]] for t in (first, last)]
    parts += [_main(f"arena + {ends[0]}", f"arena + {ends[1]}", first.size, last.size)]
    return Peer("\n".join(parts), first.size, last.size)


def _stored(step: Step, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    if step.kind == "linear":
        return weight
    return weight.transpose(2, 3, 0, 1) if step.kind == "depthwise" else weight.transpose(0, 2, 3, 1)


def _call(step: Step, relu: int) -> tuple[str, list[int]]:
    v = step.values
    if step.kind in ("conv2d", "depthwise"):
        if (v["groups"] != 1 and step.kind == "conv2d") or v["dilation"] != (1, 1):
            raise ValueError(f"{step.layer}: the float loops take no groups and no dilation")
        out = v["out"] if step.kind == "conv2d" else v["out"][:2]
        return step.kind.removesuffix("2d"), [*v["in"], *out, *v["kernel"], *v["stride"], *v["pad"], relu]
    rows: Mapping[str, Callable[[], list[int]]] = {
        "linear": lambda: [v["inputs"], v["outputs"], relu],
        "add": lambda: [v["size"], relu],
        "mean": lambda: [v["positions"], v["channels"]],
    }
    return step.kind, rows[step.kind]()


def _array(name: str, values: NDArray[np.float32]) -> str:
    words = ",".join(f"{v:.9g}f" if "." in f"{v:.9g}" or "e" in f"{v:.9g}" else f"{v:.9g}.f" for v in values.ravel().tolist())
    return f"static const float {name}[{values.size}] EK_WEIGHTS = {{{words}}};"


def _main(x: str, y: str, inputs: int, outputs: int) -> str:
    return f"""int ek_main(void) {{
    while (ek_input({x}, {4 * inputs})) {{
        infer();
        ek_output({y}, {4 * outputs});
    }}
    return 0;
}}
"""


def emlearn(firmware: Firmware, model: nn.Module, packages: Path) -> Peer:
    """emlearn's network of the linear layers, as its converter writes it ("loadable", its default)."""
    sys.path.insert(0, str(packages))
    try:
        from emlearn import common, net
    finally:
        sys.path.remove(str(packages))
    layers = [folded(model, s.layer) for s in firmware.steps]
    relu = ["relu"] * (len(layers) - 1) + ["identity"]
    text: str = net.c_generate_net_loadable(relu, [w.T for w, _ in layers], [b for _, b in layers], "model")
    text = text.replace("static const float", "EK_WEIGHTS static const float")
    inputs, outputs = layers[0][0].shape[1], layers[-1][0].shape[0]
    call = f"__attribute__((noinline)) void infer(void) {{ model_regress(x, {inputs}, y, {outputs}); }}"
    memory = f"static float x[{inputs}] EK_ARENA, y[{outputs}] EK_ARENA;"
    whole = "\n".join(['#include "edgekit.h"', text, memory, call, _main("x", "y", inputs, outputs)])
    return Peer(whole, inputs, outputs, (Path(common.get_include_dir()),), "libm.a")


def emlearn_packages(folder: Path) -> Path:
    """A folder with emlearn alone, installed there by pip when it is missing; what it imports here (numpy) is there already."""
    if not (folder / "emlearn").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), f"emlearn=={EMLEARN}"]
        subprocess.run(command, check=True)
    return folder


def cost(make: Callable[[], Peer], board: str, x: NDArray[np.float32], expected: NDArray[np.float32]) -> dict[str, Any]:
    """Instructions, flash and RAM of one inference.

    Args:
        x: the input as the peer reads it (channels last), flat.
        expected: what PyTorch gives; the peer must be within 1e-3 of its largest value.

    Raises:
        UnsupportedError: more memory than the board has.
        ValueError: the peer computes something else.
    """
    peer = make()
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "app.c"
        source.write_text(peer.text)
        archives = [_archive(board, peer.library)] if peer.library else []
        project = Project(BOARDS[board], (source, *archives), peer.include, FLAGS, optimize="-O3")
        built = build(project, Path(name))
        counts, memory = count(built, x.astype(np.float32).tobytes(), ["infer"]), measure(built)
    found = np.frombuffer(counts.result.output, np.float32)
    if not np.abs(found - expected.ravel()).max() <= 1e-3 * np.abs(expected).max():
        raise ValueError(f"{board}: the float program differs from PyTorch")
    return {
        "instructions": counts.marks["infer"], "flash_code": memory.flash_code, "flash_weights": memory.flash_weights,
        "flash": memory.flash, "arena": memory.arena, "ram": memory.ram, "stack_used": counts.result.stack_bytes,
    }  # fmt: skip


def _archive(board: str, library: str) -> Path:
    command: Sequence[str] = [
        find("arm-none-eabi-gcc"),
        *CORES[BOARDS[board].core].flags,
        "-mthumb",
        f"-print-file-name={library}",
    ]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
