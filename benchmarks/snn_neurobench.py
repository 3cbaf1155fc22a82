"""NeuroBench's effective operations of a chain of weights and LIF neurons, in its own environment:
python snn_neurobench.py NETWORK.npz OUT.json

NETWORK.npz: ``spikes`` (T, N, inputs) and ``weight0``, ``weight1``, ... (outputs, inputs); beta 0.9, threshold 1, reset to zero.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import snntorch
import torch
from neurobench.benchmarks import Benchmark
from neurobench.metrics.static import Footprint
from neurobench.metrics.workload import SynapticOperations
from neurobench.models import SNNTorchModel
from neurobench.processors.postprocessors import ChooseMaxCount
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main(network: str, out: str) -> None:
    with np.load(network) as archive:
        given = dict(archive)
    weights = [torch.tensor(given[f"weight{i}"], dtype=torch.float32) for i in range(len(given) - 1)]
    layers: list[nn.Module] = []
    for at, weight in enumerate(weights):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        layers += [linear, snntorch.Leaky(0.9, 1.0, reset_mechanism="zero", reset_delay=False, init_hidden=True)]
        layers[-1].output = at == len(weights) - 1
    spikes = torch.tensor(given["spikes"], dtype=torch.float32).transpose(0, 1)
    loader = DataLoader(TensorDataset(spikes, torch.zeros(len(spikes), dtype=torch.long)), batch_size=len(spikes))
    model = SNNTorchModel(nn.Sequential(*layers))
    found = Benchmark(model, loader, [], [ChooseMaxCount()], [[Footprint], [SynapticOperations]]).run()
    with open(out, "w") as file:
        json.dump(found["SynapticOperations"], file)


if __name__ == "__main__":
    main(*sys.argv[1:])
