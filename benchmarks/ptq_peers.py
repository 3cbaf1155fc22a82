"""Few-bit quantization by other tools, at edgekit's bits on edgekit's samples: accuracy, processor time, memory.

    python benchmarks/ptq_peers.py [--models dscnn] [--widths W4A4] [--peers "Brevitas GPFQ"] [--samples 50]

First and last layer have 8-bit weights; the model's input, residual additions' inputs and the last layer's input have 8-bit
activations, as in benchmarks/ptq_front.py, whose rows of the same network, width and seed stand beside these in the table. What
has no file is judged as fake quantization in PyTorch; a tool that refuses a width has its own words as the row. Each row is made
in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peers
import ptq_brevitas
import subjects
import torch
from subjects import Subject, log, one_line
from torch import nn

WIDTHS = {"W4A8": (4, 8), "W4A4": (4, 4)}
Outputs = Callable[[], np.ndarray]
Made = tuple[Outputs, Path | None]
"""How to get the outputs (N, classes) for the judged samples, and the file they are of, if there is one."""


def brevitas(net: Subject, weight_bits: int, activation_bits: int, method: str) -> Made:
    """Calibration and rounding by Brevitas; see ``ptq_brevitas``."""
    return partial(_eager, ptq_brevitas.compressed(net, weight_bits, activation_bits, method), net), None


def torchao(net: Subject, weight_bits: int, activation_bits: int) -> Made:
    """PT2E with XNNPACKQuantizer of so many bits (int8 containers); the reference graph, fake quantization.

    No kernel takes such ranges: XNNPACK would run the same graph, with int8 weights.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    limit = (1 << (weight_bits - 1)) - 1
    config = get_symmetric_quantization_config(is_per_channel=True, weight_qmin=-limit, weight_qmax=limit)
    exported = torch.export.export(net.model, (net.calibration[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    prepared = prepare_pt2e(exported.module(check_guards=False), XNNPACKQuantizer().set_global(config))
    _widths(prepared, activation_bits)
    with torch.no_grad():
        for batch in net.calibration.split(32):
            prepared(batch)
    return partial(_eager, convert_pt2e(prepared), net), None


def _widths(prepared: Any, activation_bits: int) -> None:
    """8 bits for the weights of the first and last layer and for activations that no ReLU made, few for the others."""
    convs = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
    nodes = list(prepared.graph.nodes)
    layers = [n for n in nodes if n.target in convs]
    for node in (layers[0], layers[-1]):
        observer = prepared.get_submodule(str(node.args[1].target))
        observer.quant_min, observer.quant_max = -127, 127
    relus = [n for n in nodes if n.target in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)]
    for node in relus[:-1]:  # the last one's output is the last layer's input
        for user in (u for u in node.users if u.op == "call_module"):
            observer = prepared.get_submodule(str(user.target))
            observer.quant_min, observer.quant_max = -(1 << (activation_bits - 1)), (1 << (activation_bits - 1)) - 1


def ai_edge_quantizer(net: Subject, weight_bits: int, activation_bits: int) -> Made:
    """Its static recipe with 4-bit convolutions but the first; refuses 4-bit depthwise ones, which stay 8-bit."""
    path = _path(net, f"w{weight_bits}a{activation_bits}.tflite")
    peers.ai_edge_quantizer(net, path, weight_bits, activation_bits=activation_bits)
    return partial(peers.outputs, path, net), path


def onnxruntime(net: Subject, weight_bits: int, activation_bits: int) -> Made:
    """quantize_static, QDQ, per channel, with 4-bit types for the inner weights and for what ReLUs make."""
    path = _path(net, f"w{weight_bits}a{activation_bits}.onnx")
    peers.onnxruntime_static(net, path, few=partial(_overrides, activation_bits=activation_bits))
    return partial(peers.outputs, path, net), path


def _overrides(model: Any, activation_bits: int) -> dict[str, Any]:
    from onnxruntime.quantization import QuantType

    layers = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    found: dict[str, Any] = {n.input[1]: [{"quant_type": QuantType.QInt4, "axis": 0}] for n in layers[1:-1]}
    if activation_bits < 8:
        relus = [n for n in model.graph.node if n.op_type == "Relu"]
        found |= {n.output[0]: [{"quant_type": QuantType.QUInt4}] for n in relus[:-1]}
    return found


PEERS: dict[str, Callable[[Subject, int, int], Made]] = {
    **{f"Brevitas {m}": partial(brevitas, method=m) for m in ("nearest", "gptq", "gpfq", "learned round")},
    "torchao PT2E + XNNPACKQuantizer": torchao,
    "ai-edge-quantizer": ai_edge_quantizer,
    "onnxruntime quantize_static": onnxruntime,
}


def _path(net: Subject, name: str) -> Path:
    path = subjects.WORK / f"ptq-peer-{net.name}-{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _eager(model: nn.Module, net: Subject) -> np.ndarray:
    with torch.no_grad():
        return torch.cat([torch.as_tensor(model(x)) for x in net.x.split(50)]).numpy()


def made(name: str, width: str, peer: str, seed: int, samples: int | None) -> dict[str, Any]:
    """A row."""
    torch.set_num_threads(1)
    net = subjects.subject(name, seed, samples)
    torch.manual_seed(seed)
    weight_bits, activation_bits = WIDTHS[width]
    row: dict[str, Any] = {
        "model": name, "variant": peer, "device": "host", "seed": seed, "weight_bits": weight_bits,
        "activation_bits": activation_bits, "calibration": len(net.calibration),
    }  # fmt: skip
    start = time.process_time()
    try:
        with peers.silent():
            outputs, path = PEERS[peer](net, weight_bits, activation_bits)
            row["processor_s"] = round(time.process_time() - start, 1)
            row["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            row["accuracy"] = net.accuracy(outputs())
    except Exception as error:
        return {**row, "target": "refused", "remarks": f"{type(error).__name__}: {one_line(error)}"}
    return {
        **row,
        "target": path.suffix.removeprefix(".") if path else "fake-quant",
        **({"bytes": path.stat().st_size} if path else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(subjects.RECIPES), choices=list(subjects.RECIPES))
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, help="judge so many only, record nothing")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, width, peer, seed = given.child
        print(json.dumps(made(name, width, peer, int(seed), given.samples)))
        return
    rows: list[dict[str, Any]] = []
    for name in given.models:
        for seed in given.seeds:
            for width in given.widths:
                for peer in given.peers:
                    command = [sys.executable, __file__, "--child", name, width, peer, str(seed)]
                    command += ["--samples", str(given.samples)] if given.samples else []
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                    rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
                    log("  " + ", ".join(f"{k} {v}" for k, v in rows[-1].items() if k != "device"))
                    if given.samples is None:
                        subjects.write("ptq_peers", rows, NOTES, keep=True, key=KEY)


KEY = ("model", "variant", "weight_bits", "activation_bits", "seed")
NOTES = [
    "Calibration: 1024 of the 4000 CIFAR-10 training images, 200 of the 1000 keywords, the same as ours.",
    "Brevitas: weights of least squared error for each channel; GPTQ and GPFQ with columns in order of activation energy; "
    f"learned rounding with {ptq_brevitas.ROUND_STEPS} steps a layer, as ours has; biases corrected and left in float; what "
    "ReLUs make unsigned, its scale of least squared error (with the default percentiles it is weaker at 4 bits).",
    "torchao: int8 containers with 4-bit ranges, histogram observers. ai-edge-quantizer and onnxruntime: files, run in "
    "their runtimes; ai-edge-quantizer keeps depthwise convolutions at 8 bits.",
]


if __name__ == "__main__":
    main()
