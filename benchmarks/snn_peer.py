"""spikingjelly's conversion of a network, in the simulator's own environment: python snn_peer.py NAME WEIGHTS CALIBRATION OUT"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from snn_sets import network, samples
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.ann2snn import Converter, LocalThresholdBalancingRecipe, RateCodingRecipe

torch.set_num_threads(1)
NAME, WEIGHTS, CALIBRATION, OUT = sys.argv[1:]


def main() -> None:
    x, y = samples(NAME)[2:]
    calibration = torch.from_numpy(np.load(CALIBRATION)["x"])
    loader = [(part, torch.zeros(len(part))) for part in calibration.split(32)]
    recipes = {
        "max": lambda: RateCodingRecipe(dataloader=loader, mode="max"),
        "99.9 %": lambda: RateCodingRecipe(dataloader=loader, mode="99.9%"),
        "local threshold balancing": lambda: LocalThresholdBalancingRecipe(dataloader=loader),
    }
    rows = []
    for variant, recipe in recipes.items():
        net = network(NAME)
        net.load_state_dict(torch.load(WEIGHTS, weights_only=True))
        try:
            spiking = Converter(recipe()).convert(net.eval())
            rows += _scores(variant, spiking, x, y)
        except Exception as error:
            rows.append({"variant": variant, "remark": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"})
    Path(OUT).write_text(json.dumps(rows))


def _scores(variant: str, net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[dict[str, object]]:
    right = {8: 0, 16: 0, 32: 0}
    with torch.no_grad():
        for rows in torch.arange(len(x)).split(200):
            functional.reset_net(net)
            total = 0
            for t in range(1, 33):
                total = total + net(x[rows])
                if t in right:
                    right[t] += int((total.argmax(1) == y[rows]).sum())
    return [{"variant": variant, "steps": t, "accuracy": round(100 * n / len(x), 3)} for t, n in right.items()]


if __name__ == "__main__":
    main()
