"""Latency of low-rank layers, of RMSNorm and of other exact rewrites as ratios to the model as it came, in ExecuTorch and TFLite.

    python benchmarks/lowrank_latency.py [--rounds 200] [--targets executorch tflite] [--only SiLU [--keep]]

One thread, the files of one model interleaved, the ratio is the median over rounds. Below 1: faster than the model as it came.
Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lowrank as counted
import numpy as np
import peers
import torch
from latency import interleaved
from subjects import Subject, log, write
from torch import Tensor, nn

from edgekit import recipe, targets
from edgekit.compress.lowrank import LowRank
from edgekit.compress.ptq import PTQ
from edgekit.compress.rewrite import Rewrite
from edgekit.compress.steps import apply
from edgekit.data import Data

Blocks = list[recipe.Block]
NOTES = (
    "A float file of low-rank layers beside the dense float file, and the same in int8; what is timed is the runtime's call.",
    "The encoder is the shape of a small ViT or BERT: 6 pre-norm layers of 192 features, 64 tokens, random weights.",
)


class Branches(nn.Module):
    """RepVGG's block in training form, and a stem so that it is not the first layer."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.wide, self.narrow = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.Conv2d(width, width, 1, bias=False)
        self.norms, self.head = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3)), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        a, b, c = self.norms
        x = torch.relu(a(self.wide(x)) + b(self.narrow(x)) + c(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Written(nn.Module):
    """Two convolutions with an activation written out between them."""

    def __init__(self, kind: str, width: int = 48) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1), kind
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = torch.sigmoid(x) if self.kind == "SiLU" else nn.functional.relu6(x + 3) / 6
        return self.head(self.b(x * gate).mean((2, 3)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """(N, 64, 192) to (N, 64, 192): pre-norm layers with the attention written out."""

    def __init__(self, width: int = 192, heads: int = 3, depth: int = 6) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in range(4 * depth))
        self.ups = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))
        self.downs = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(depth))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
            h = self.norms[2 * i](x)
            q, k, v, out = self.projections[4 * i : 4 * i + 4]
            parts = [p(h).reshape(*h.shape[:2], self.heads, -1).transpose(1, 2) for p in (q, k, v)]
            weights = torch.softmax(parts[0] @ parts[1].transpose(-2, -1) * 0.125, -1)
            x = x + out((weights @ parts[2]).transpose(1, 2).reshape(h.shape))
            x = x + down(torch.relu(up(self.norms[2 * i + 1](x))))
        return self.head(self.norms[-1](x))  # type: ignore[no-any-return]


def cases() -> Iterator[tuple[str, nn.Module, Tensor, dict[str, Blocks]]]:
    """Model name, module, samples, and variant to compression."""
    int8 = [recipe.Block("ptq", PTQ(samples=32))]
    for name, (layer, shape, rank) in counted.LAYERS.items():
        ranks = {"ced": rank}
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            ranks["spatial"] = counted.spatial_rank(layer)
        variants: dict[str, Blocks] = {"dense float": [], "dense int8": int8}
        for scheme, r in ranks.items():
            low = [recipe.Block("lowrank", LowRank(rank=r, scheme=scheme, min_features=1))]  # type: ignore[arg-type]
            variants |= {f"{scheme} float": low, f"{scheme} int8": [*low, *int8]}
        torch.manual_seed(0)
        yield name, counted.Head(layer).eval(), torch.randn(32, *shape), variants
    torch.manual_seed(0)
    rms = [recipe.Block("rewrite", Rewrite(norm="rms"))]
    low = [recipe.Block("lowrank", LowRank(rank=0.5))]
    variants = {"dense float": [], "dense int8": int8, "RMSNorm float": rms, "RMSNorm int8": [*rms, *int8]}
    yield "pre-LN encoder", Encoder().eval(), torch.randn(32, 64, 192), variants | {"ced float": low, "ced int8": [*low, *int8]}


def rewrites() -> Iterator[tuple[str, nn.Module, Tensor, dict[str, Blocks]]]:
    """The same for the fusing rewrites: the model as it was written, and as it is after them."""
    int8 = [recipe.Block("ptq", PTQ(samples=32))]
    plain, fused = ([recipe.Block("rewrite", Rewrite(fuse=fuse))] for fuse in (False, True))
    variants = {"as written float": plain, "as written int8": [*plain, *int8]}
    variants |= {"rewritten float": fused, "rewritten int8": [*fused, *int8]}
    torch.manual_seed(0)
    maps = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    yield "RepVGG block 48, 32x32", Branches().eval(), torch.randn(32, 3, 32, 32), variants
    yield "linear behind linear, 256", maps.eval(), torch.randn(32, 256), variants
    yield "SiLU written out, 48, 32x32", Written("SiLU").eval(), torch.randn(32, 3, 32, 32), variants
    yield "hardswish written out, 48, 32x32", Written("hardswish").eval(), torch.randn(32, 3, 32, 32), variants


def rows_of(target: str, rounds: int, only: str | None) -> Iterator[dict[str, Any]]:
    module = targets.get(target)
    for name, model, x, variants in (*cases(), *rewrites()):
        if only and only not in name:
            continue
        runs: dict[str, Callable[[], Any]] = {}
        net = Subject(name, model, x, x, torch.zeros(len(x)))
        with TemporaryDirectory() as folder:
            for variant, blocks in variants.items():
                path = Path(folder) / f"{variant.replace(' ', '_')}{module.SUFFIX}"
                exact = blocks or [recipe.Block("rewrite", Rewrite(fuse=False))]
                module.lower(apply(model, exact, Data(calibration=x)).program, path, module.Options())
                if not runs:  # what a runtime sets up with its first file must not count against that one
                    held = peers.caller(path, net)
                    held[0](x[:1].numpy())
                    held[1]()
                give, run, _ = peers.caller(path, net)
                give(x[:1].numpy())
                runs[variant] = run
            times = interleaved(runs, rounds)
        start = next(iter(runs)).removesuffix(" float")
        for variant in runs:
            base = f"{start} int8" if variant.endswith("int8") else f"{start} float"
            ratio = np.array(times[variant]) / np.array(times[base])
            low, high = np.percentile(ratio, [25, 75])
            row = {
                "model": name,
                "variant": variant,
                "target": target,
                "latency_us": round(1e6 * float(np.median(times[variant])), 1),
            }
            row |= {"latency_ratio": round(float(np.median(ratio)), 3), "latency_ratio_to": base}
            yield {**row, "latency_ratio_quartiles": [round(float(low), 3), round(float(high), 3)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["executorch", "tflite"])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--only", help="models whose name has this text; nothing is written without --keep")
    parser.add_argument(
        "--keep", action="store_true", help="with --only: write these rows over the earlier ones, keep all others"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for target in given.targets:
        for row in rows_of(target, given.rounds, given.only):
            log(str(row))
            rows.append(row)
    if not given.only or given.keep:
        write("lowrank_latency", rows, NOTES, keep=given.keep)


if __name__ == "__main__":
    main()
