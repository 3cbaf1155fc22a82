"""One network on edgekit's frozen program, spikingjelly and snnTorch in turn, in one process:
python snn_speed.py NETWORK.nir OUT.json STEPS BATCH ROUNDS

float32, one thread, the same input, processor time (others may use the machine meanwhile). Each tool runs as its users run it:
spikingjelly all steps at once (``step_mode="m"``) and step by step, snnTorch step by step, edgekit's reference run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nir
import numpy as np
import torch
from snntorch.import_nir import import_from_nir as from_snntorch
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.nir_exchange import import_from_nir as from_spikingjelly
from torch import Tensor

from edgekit.nir import read
from edgekit.nir.to_module import to_program
from edgekit.targets.neuromorphic.dialects import legalize


def main(network: str, out: str, steps: int, batch: int, rounds: int) -> None:
    torch.set_num_threads(1)
    graph = read(Path(network))
    shape = tuple(int(n) for n in graph.nodes["input"].input_type["input"])
    spikes = (torch.rand(steps, batch, *shape, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    ways = {"edgekit": _edgekit(graph, steps), **_spikingjelly(graph), "snntorch": _snntorch(graph)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    counts = {}
    with torch.no_grad():
        for name, way in ways.items():
            counts[name] = float(way(spikes).sum())
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.process_time()
                way(spikes)
                times[name].append(1e3 * (time.process_time() - start))
    Path(out).write_text(json.dumps({"milliseconds": times, "spikes": counts}))


def _edgekit(graph: Any, steps: int) -> Callable[[Tensor], Tensor]:
    program = to_program(graph, steps, encoding="sequence", readout="sequence")

    def way(spikes: Tensor) -> Tensor:
        (found,) = program.run(spikes.transpose(0, 1).contiguous())
        return found

    return way


def _spikingjelly(graph: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    legal = legalize(graph, "spikingjelly").graph
    for node in legal.nodes.values():
        for key, value in vars(node).items():
            if isinstance(value, np.ndarray) and value.dtype == np.float64:
                setattr(node, key, value.astype(np.float32))
    single, many = (from_spikingjelly(legal, dt=1e-3, step_mode=mode).eval() for mode in ("s", "m"))

    def stepwise(spikes: Tensor) -> Tensor:
        state, found = None, []
        for x in spikes:
            y, state = single(x, state)
            found.append(y)
        return torch.stack(found)

    def at_once(spikes: Tensor) -> Tensor:
        functional.reset_net(many)
        y, _ = many(spikes, None)
        return y

    return {"spikingjelly": at_once, "spikingjelly, step by step": stepwise}


def _snntorch(graph: Any) -> Callable[[Tensor], Tensor]:
    legal = legalize(graph, "snntorch").graph
    for node in legal.nodes.values():
        if isinstance(node, nir.Flatten):
            node.start_dim, node.end_dim = 1, -1
    net = from_snntorch(legal).float().eval()

    def way(spikes: Tensor) -> Tensor:
        state, found = None, []
        for x in spikes:
            y, state = net(x, state)
            found.append(y)
        return torch.stack(found)

    return way


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
