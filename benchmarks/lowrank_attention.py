"""Linformer beside low rank and the dense encoder: accuracy on spoken digits, latency by the length of the sequence.

    python benchmarks/lowrank_attention.py [--epochs 12] [--repair 6] [--rounds 60]

Accuracy: an encoder of two pre-norm layers on the recordings as 60 tokens of one log-mel frame each, trained here, then made
smaller and repaired without labels. Latency: one layer of the same shape with random weights, at the recordings' length and at
longer ones, where the attention's products weigh more; beside it what the cost model counts. One thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import peers
import torch
from latency import interleaved
from subjects import ROOT, Subject, log, write
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit import recipe, targets
from edgekit.compress.lowrank import LowRank
from edgekit.compress.lowrank.attention import attention_cost
from edgekit.compress.ptq import PTQ
from edgekit.compress.repair import Repair
from edgekit.compress.steps import apply
from edgekit.data import Data

sys.path.insert(0, str(ROOT / "examples" / "fsdd_transformer"))
from spoken_digits import Layer, spoken  # the example's blocks: width 64, 4 heads, hidden width 128

WIDTH, HIDDEN, FRAMES, RANK = 64, 128, 60, 16
LENGTHS = (60, 240, 960)
PROJECTED = {60: 16, 240: 32, 960: 64}
"""Tokens of a sequence to those that keys and values are projected to."""
Row = dict[str, Any]
NOTES = (
    "Repair saw the 2700 training recordings without their labels.",
    "Latency is that of a file of one layer with random weights, median of interleaved rounds; the MACs ratio is modelled.",
)


class Encoder(nn.Module):
    """(N, tokens, features) to (N, 10)."""

    def __init__(self, tokens: int = FRAMES, features: int = 40, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(features, WIDTH), nn.Parameter(0.02 * torch.randn(1, tokens, WIDTH))
        self.layers = nn.Sequential(*(Layer() for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(x) + self.position)).mean(1))  # type: ignore[no-any-return]


def trained(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model = Encoder().train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * -(-len(x) // 64))
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x[part]), y[part], label_smoothing=0.1))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def blocks(variant: str, tokens: int, repair: int) -> list[recipe.Block]:
    """The compression of a variant; ranks at 16 of a width of 64."""
    every, none = {"min_features": 11}, {"exclude": (".*",)}
    short = {"linformer": PROJECTED[tokens]}
    options: dict[str, Any] = {"low rank": every, "linformer": short | none, "both": short | every}.get(variant, {})
    low = [recipe.Block("lowrank", LowRank(rank=RANK, **options))] if options else []
    return [*low, *([recipe.Block("repair", Repair(epochs=repair))] if low and repair else [])]


VARIANTS = ("dense", "low rank", "linformer", "both")


def accuracies(epochs: int, repair: int) -> Iterator[Row]:
    x, y, x_test, y_test = (t.reshape(len(t), FRAMES, 40) if t.dim() == 3 else t for t in spoken())
    model, data = trained(x, y, epochs), Data(calibration=x[::5], training=(x, y))
    for variant in VARIANTS:
        for repaired in (0, repair) if variant != "dense" else (0,):
            made = apply(model, [*blocks(variant, FRAMES, repaired), recipe.Block("ptq", PTQ(samples=256))], data)
            with torch.no_grad():
                right = (made.program.run(x_test)[0].argmax(1) == y_test).float().mean()
            row: Row = {"part": "accuracy", "model": "encoder, 60 tokens", "variant": f"{variant} int8"}
            yield {**row, "repair_epochs": repaired, "accuracy": round(100 * float(right), 2), "macs": macs(made.program)}


def macs(program: Any) -> int:
    """Integer and float layers together."""
    return int(sum(layer.macs for layer in program.layers) + sum(layer.macs for layer in program.float_layers))


def latencies(rounds: int, names: list[str]) -> Iterator[Row]:
    for tokens in LENGTHS:
        torch.manual_seed(0)
        model, x = Encoder(tokens, WIDTH, 1).eval(), torch.randn(8, tokens, WIDTH)
        net = Subject("encoder", model, x, x, torch.zeros(len(x)))
        modelled = attention_cost(tokens, WIDTH, HIDDEN, RANK, PROJECTED[tokens])
        for target in names:
            module, runs, counted = targets.get(target), {}, {}
            with TemporaryDirectory() as folder:
                for variant in VARIANTS:
                    made = apply(model, [*blocks(variant, tokens, 0), recipe.Block("ptq", PTQ(samples=8))], Data(calibration=x))
                    path = Path(folder) / f"{variant.replace(' ', '_')}{module.SUFFIX}"
                    module.lower(made.program, path, module.Options())
                    give, run, _ = peers.caller(path, net)
                    give(x[:1].numpy())
                    runs[variant], counted[variant] = run, macs(made.program)
                times = interleaved(runs, rounds)
            for variant in VARIANTS:
                ratio = float(np.median(np.array(times[variant]) / np.array(times["dense"])))
                row: Row = {"part": "latency", "model": f"layer, {tokens} tokens", "variant": f"{variant} int8", "target": target}
                row |= {"latency_us": round(1e6 * float(np.median(times[variant])), 1), "latency_ratio": round(ratio, 3)}
                yield {**row, "macs_ratio": round(counted[variant] / counted["dense"], 3), "crossover_tokens": modelled.crossover}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--repair", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--targets", nargs="+", default=["executorch", "tflite"])
    parser.add_argument("--try", action="store_true", dest="tried", help="write nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    parts: tuple[Callable[[], Iterator[Row]], ...] = (
        lambda: accuracies(given.epochs, given.repair),
        lambda: latencies(given.rounds, given.targets),
    )
    for part in parts:
        for row in part():
            log(str(row))
            rows.append(row)
    if not given.tried:
        write("lowrank_attention", rows, NOTES)


if __name__ == "__main__":
    main()
