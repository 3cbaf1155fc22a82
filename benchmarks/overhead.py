"""What edgekit's lowering costs beside the bare converter of the same quantize/dequantize graph.

    python benchmarks/overhead.py [--models resnet8] [--rounds 9]

Both go from a module (ours: a frozen program) to the file's bytes, in one process after a warm-up, in turn; the ratio is the
median of ours over the median of the converter's, in seconds of processor time, which other processes disturb least. Ours
includes the decomposition, the checks before, the finish of the file, writing, reading it back and comparing every stored number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import peers
import subjects
from subjects import log

from edgekit import targets
from edgekit.frozen import FrozenProgram

GOAL = 1.15
NOTES = [
    "The converters' own time varies by a tenth and more from call to call on this shared machine: a first run of 5 rounds gave "
    "1.19 for DS-CNN in TFLite, where all that edgekit adds to the converter was measured as 0.04 of 2.2 seconds.",
]


def litert(program: FrozenProgram) -> Callable[[], Any]:
    """A bare ``litert_torch.convert`` of the graph that ours converts; made anew, since the converter changes it."""
    import litert_torch
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig

    from edgekit.targets.tflite_convert import trace

    litert_torch.config.show_progress = False
    module, samples = trace(program, True)
    switch = QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)))
    return lambda: litert_torch.convert(module, samples, quant_config=switch).model_content()


def executorch(program: FrozenProgram) -> Callable[[], Any]:
    """A bare ``to_edge_transform_and_lower(torch.export.export(module)).to_executorch()`` with XNNPACK's partitioner."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    from edgekit.targets.executorch_rules import ATEN_RULES, xnnpack_style
    from edgekit.targets.qdq import to_qdq

    module = to_qdq(program, xnnpack_style(), ATEN_RULES).module(check_guards=False)
    sample = tuple(torch.zeros(shape) for shape in program.input_shapes)

    def convert() -> bytes:
        edge = to_edge_transform_and_lower(torch.export.export(module, sample), partitioner=[XnnpackPartitioner()])
        return bytes(edge.to_executorch().buffer)

    return convert


BARE: dict[str, Callable[[FrozenProgram], Callable[[], Any]]] = {"tflite": litert, "executorch": executorch}


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(program: FrozenProgram, target: str, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of ours and of the bare converter for each round, without the warm-up."""
    module = targets.get(target)
    path = subjects.WORK / f"overhead{module.SUFFIX}"
    ours, bare = [], []
    with peers.silent():
        for i in range(rounds + 1):
            for first in (i % 2 == 0, i % 2 == 1):
                if first:
                    ours.append(seconds(lambda: module.lower(program, path)))
                else:
                    bare.append(seconds(BARE[target](program)))
    return ours[1:], bare[1:]


def main() -> None:
    given = subjects.arguments(__doc__ or "", rounds=9)
    subjects.WORK.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in given.models:
        program = subjects.compressed(subjects.subject(name), 8)
        for target in BARE:
            ours, bare = measure(program, target, given.rounds)
            paired = quantiles([a / b for a, b in zip(ours, bare, strict=True)], n=4)
            rows.append({
                "model": name, "variant": "edgekit", "target": target, "device": "host", "weight_bits": 8, "rounds": given.rounds,
                "export_s": round(median(ours), 3), "converter_s": round(median(bare), 3),
                "export_time_ratio": round(median(ours) / median(bare), 3), "export_time_ratio_bound": GOAL,
                "export_time_ratio_quartiles": [round(paired[0], 3), round(paired[2], 3)],
            })  # fmt: skip
            log("  " + ", ".join(f"{k} {v}" for k, v in rows[-1].items()))
    subjects.write("overhead", rows, NOTES)


if __name__ == "__main__":
    main()
