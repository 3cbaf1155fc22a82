"""What edgekit's lowering costs beside the bare converter of the same quantize/dequantize graph.

    python benchmarks/overhead.py [--models resnet8] [--rounds 5]

One process, one warm-up of each, then both in turn; the ratio is the median of ours over the median of the converter's. Ours
includes the checks before, the finish of the file, writing, reading it back and comparing every stored number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import peers
import subjects
from subjects import log

from edgekit import targets
from edgekit.frozen import FrozenProgram

GOAL = 1.15


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
    """A bare ``to_edge_transform_and_lower(...).to_executorch()`` with XNNPACK's partitioner."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    from edgekit.targets.executorch_rules import ATEN_RULES, xnnpack_style
    from edgekit.targets.qdq import to_qdq

    exported = to_qdq(program, xnnpack_style(), ATEN_RULES)
    return lambda: bytes(to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


BARE: dict[str, Callable[[FrozenProgram], Callable[[], Any]]] = {"tflite": litert, "executorch": executorch}


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


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
    given = subjects.arguments(__doc__ or "", rounds=5)
    subjects.WORK.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in given.models:
        program = subjects.compressed(subjects.subject(name), 8)
        for target in BARE:
            ours, bare = measure(program, target, given.rounds)
            rows.append({
                "model": name, "variant": "edgekit", "target": target, "device": "host", "weight_bits": 8, "rounds": given.rounds,
                "export_s": round(median(ours), 3), "converter_s": round(median(bare), 3),
                "export_time_ratio": round(median(ours) / median(bare), 3), "export_time_ratio_bound": GOAL,
            })  # fmt: skip
            log("  " + ", ".join(f"{k} {v}" for k, v in rows[-1].items()))
    subjects.write("overhead", rows)


if __name__ == "__main__":
    main()
