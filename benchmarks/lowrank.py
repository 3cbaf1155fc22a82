"""Low-rank compression: output errors, accuracy with and without repair, a peer at equal rank, instructions, speed and memory.

    python benchmarks/lowrank.py [--parts errors accuracy peer instructions tool] [--epochs 12]

Parts (each replaces its own rows of benchmarks/results/lowrank.json):

    errors        plain and data-aware SVD of every layer of three networks at a quarter and half of the break-even rank
    accuracy      ResNet-20 at half the multiply-accumulates, the transformer of examples/ at 1/2 and 1/4 of its parameters
    peer          greenformer 0.2.2 (post-training SVD) at equal ranks: error, accuracy, seconds. It is imported from the folder
                  $GREENFORMER (pip install --no-deps --target), with stand-ins for two imports that its SVD does not use
    instructions  firmware on an emulated Cortex-M4: dense, low-rank and int8 layers, counted, not timed
    tool          all linear layers of a BERT-base-sized encoder: seconds and peak memory in a process of its own

Latency ratios are in benchmarks/lowrank_latency.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from subjects import RESULTS, ROOT, log, write
from torch import Tensor, nn

from edgekit import recipe, source
from edgekit.compress.capture import Graph, capture
from edgekit.compress.lowrank import LowRank, factorize
from edgekit.compress.lowrank.layers import run_parts
from edgekit.compress.lowrank.moments import Moments
from edgekit.compress.lowrank.split import split_layer
from edgekit.compress.lowrank.step import _watch, graph_cost, graph_layers, graph_moments, lowrank
from edgekit.compress.ptq import PTQ
from edgekit.compress.repair import Repair
from edgekit.compress.repair.step import repair
from edgekit.compress.steps import apply
from edgekit.data import Data

RECIPES = {
    "resnet20": "cifar_resnet20/recipe.yaml",
    "dscnn": "mlperf_tiny/dscnn.yaml",
    "transformer": "fsdd_transformer/recipe.yaml",
}
Row = dict[str, Any]
NOTES = (
    "Repair saw the training images or recordings without their labels: ResNet-20 the 4000 lossless CIFAR-10 images, shifted and "
    "mirrored, for 12 passes; the transformer its 2700 recordings for 36.",
    "The parts were run one after the other; each part's rows come from one run.",
)


def load(name: str) -> tuple[nn.Module, Data, Graph]:
    settings = recipe.load(ROOT / "examples" / RECIPES[name])
    model, data = source.load_model(settings.model), source.load_data(settings.data)
    return model, data, capture(model, (data.calibration[:2],))


def accuracy(module: nn.Module, data: Data) -> float:
    assert data.evaluation is not None
    x, y = data.evaluation
    with torch.no_grad():
        found = torch.cat([module(part) for part in x.split(100)]).flatten(1).argmax(1)
    return round(100 * float((found == y).float().mean()), 2)


def errors() -> Iterator[Row]:
    """Measured on the calibration samples by running the split layers, not read from the solver."""
    for name in RECIPES:
        _, data, graph = load(name)
        settings = LowRank(samples=128, scheme="ced")
        found, _ = graph_layers(graph)
        layers = [layer for layer in found.values() if min(layer.rows, layer.columns) >= 4]
        moments = graph_moments(graph, layers, settings, Data(calibration=data.calibration))
        values: dict[str, tuple[Tensor, Tensor]] = {}

        def see(node: Any, x: Tensor, y: Tensor, graph: Graph = graph, values: dict[str, Any] = values) -> None:
            values[graph.names[node.name]] = (x, y)

        _watch(graph.module, (data.calibration[:128],), see)
        for layer in layers:
            for share in (0.25, 0.5):
                rank = max(1, int(share * layer.break_even))
                row: Row = {"part": "errors", "model": name, "layer": layer.name, "rank": rank}
                row |= {"rows": layer.rows, "columns": layer.columns}
                x, y = values[layer.name]
                for solver, seen in (("svd", None), ("svd_data", moments[layer.name])):
                    row[f"error_{solver}"] = measured(layer, seen, solver, rank, x, y)
                yield row


def measured(layer: Any, moments: Moments | None, solver: str, rank: int, x: Tensor, y: Tensor) -> float:
    split = split_layer(
        layer, moments, solver=solver, schemes=("ced",), multiple=1, iterations=1, seed=0, exact=rank
    )  # fmt: skip
    with torch.no_grad():
        found = run_parts(split.build(split.options[0]), x)
    return float((found.double() - y.double()).square().sum() / (y.double() - y.double().mean()).square().sum())


def varied(x: Tensor, y: Tensor) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """ResNet's usual augmentation of the training images: shifts by up to 4 pixels and mirroring; labels come along unused."""
    generator = torch.Generator().manual_seed(0)

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        wide = nn.functional.pad(x, (4, 4, 4, 4))
        for part in torch.randperm(len(x), generator=generator).split(64):
            i, j = (int(torch.randint(0, 9, (), generator=generator)) for _ in range(2))
            images = wide[part, :, i : i + 32, j : j + 32]
            yield (images.flip(3) if torch.rand((), generator=generator) < 0.5 else images), y[part]

    return stream


def compressed(name: str, rank: str, epochs: int, rate: float, more: Callable[..., Any] | None = None) -> Iterator[Row]:
    """Float, low-rank by both solvers, repaired, repaired and int8; the training labels are not looked at."""
    _, data, graph = load(name)
    base = graph_cost(graph)
    start: Row = {"part": "accuracy", "model": name}
    yield {**start, "variant": "float", "accuracy": accuracy(graph.module, data), "params": base["params"], "macs": base["macs"]}
    unlabelled = Data(data.calibration, None, more(*data.training) if more else data.training)
    for variant, options in (("svd", {"solver": "svd"}), ("svd_data ced", {"scheme": "ced"}), ("svd_data", {})):
        began = time.perf_counter()
        made, record = lowrank(graph, LowRank(rank=rank, samples=600, **options), unlabelled)  # type: ignore[arg-type]
        cost = graph_cost(made)
        row = {**start, "variant": f"{rank} {variant}", "accuracy": accuracy(made.module, data), **cost}
        row.pop("size")
        yield {**row, "seconds": round(time.perf_counter() - began, 1), "layers": len(record.layers)}
    began = time.perf_counter()
    fixed, record = repair(made, Repair(epochs=epochs, learning_rate=rate), unlabelled, graph)
    seconds = round(time.perf_counter() - began)
    row = {**row, "variant": f"{rank} svd_data, repaired", "accuracy": accuracy(fixed.module, data), "seconds": seconds}
    yield {**row, "epochs": epochs, **{k.replace(" ", "_"): v for k, v in record.figures.items()}}
    blocks = [recipe.Block("ptq", PTQ(samples=256))]
    simulation = apply(fixed.module, blocks, data).simulation
    yield {**row, "variant": f"{rank} svd_data, repaired, int8", "accuracy": accuracy(simulation, data), "seconds": None}


def accuracies(epochs: int) -> Iterator[Row]:
    yield from compressed("resnet20", "macs:0.5", epochs, 1e-3, varied)
    for rank in ("params:0.5", "params:0.25"):
        yield from compressed("transformer", rank, 3 * epochs, 1e-3)


def greenformer() -> Any:
    folder = os.environ.get("GREENFORMER", "")
    if not (Path(folder) / "greenformer").is_dir():
        raise SystemExit("set GREENFORMER to the folder of `pip install --no-deps --target FOLDER greenformer==0.2.2`")
    sys.path.insert(0, folder)
    for name, members in (("matrix_fact", {}), ("transformers.modeling_utils", {"Conv1D": type("Conv1D", (), {})})):
        stand_in = types.ModuleType(name)
        stand_in.__dict__.update(members)
        sys.modules[name] = stand_in
    from greenformer import auto_fact  # type: ignore[import-not-found]

    return auto_fact


def peer(given: tuple[str, ...] = ()) -> Iterator[Row]:
    """Both on the same float modules at the ranks greenformer chooses: a share of ITS limit, which leaves out kernel taps."""
    auto_fact = greenformer()
    for name in given or ("transformer", "resnet20"):
        model, data, _ = load(name)
        assert data.evaluation is not None
        x = data.evaluation[0]
        with torch.no_grad():
            wanted = torch.cat([model(p) for p in x.split(100)])
        for share in (0.25, 0.5, 0.75):
            torch.manual_seed(0)
            began = time.perf_counter()
            theirs = auto_fact(model, rank=share, solver="svd", num_iter=10, deepcopy=True, fact_led_unit=False)
            seconds = time.perf_counter() - began
            ranks = dict(_their_ranks(theirs))
            for variant, made, spent in (("greenformer svd", theirs, seconds), *ours(model, ranks, data)):
                with torch.no_grad():
                    found = torch.cat([made(p) for p in x.split(100)])
                error = float((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
                row = {"part": "peer", "model": name, "variant": variant, "share": share, "accuracy": accuracy(made, data)}
                yield {**row, "output_error": error, "params": sum(p.numel() for p in made.parameters()), "seconds": spent}


def _their_ranks(module: nn.Module) -> Iterator[tuple[str, int]]:
    for name, m in module.named_modules():
        if type(m).__name__ in ("LED", "CED"):
            weight = next(iter(m.parameters()))
            yield name, int(weight.shape[0])


def ours(model: nn.Module, ranks: dict[str, int], data: Data) -> Iterator[tuple[str, nn.Module, float]]:
    for solver in ("svd", "svd_data"):
        began = time.perf_counter()
        made: nn.Module = model
        for rank in sorted(set(ranks.values())):
            chosen = tuple(n.replace(".", r"\.") for n, r in ranks.items() if r == rank)
            options = {"solver": solver, "include": chosen, "min_features": 1, "scheme": "ced", "samples": 256}
            made, _ = factorize(made, rank, data.calibration if solver == "svd_data" else None, **options)
        yield f"edgekit {solver}", made, time.perf_counter() - began


class Head(nn.Module):
    """One layer, flattened, so that a firmware can be made of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).flatten(1)  # type: ignore[no-any-return]


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "linear 256x256": (nn.Linear(256, 256), (256,), 64),
    "linear 64x64": (nn.Linear(64, 64), (64,), 16),
    "conv 3x3 64->64, 8x8": (nn.Conv2d(64, 64, 3, padding=1), (64, 8, 8), 28),
    "conv 3x3 16->16, 32x32": (nn.Conv2d(16, 16, 3, padding=1), (16, 32, 32), 8),
    "conv 1x1 64->64, 16x16": (nn.Conv2d(64, 64, 1), (64, 16, 16), 16),
    "conv 3x3 3->16, 32x32": (nn.Conv2d(3, 16, 3, padding=1), (3, 32, 32), 4),
}
"""A layer, its input, and the rank at about half the work."""


def instructions() -> Iterator[Row]:
    """Whole int8 firmware of one layer on the emulated M4 board, dense and split; there is no float kernel to compare with."""
    from tempfile import TemporaryDirectory

    from edgekit import targets
    from edgekit.devices.board import connect
    from edgekit.profile import Settings

    target, board = targets.get("cortex-m4"), connect("qemu:cortex-m4")
    for name, (layer, shape, rank) in LAYERS.items():
        torch.manual_seed(0)
        x = torch.randn(64, *shape)
        for variant in ("dense", "ced", "spatial"):
            if variant == "spatial" and not (isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)):
                continue
            blocks = [recipe.Block("ptq", PTQ(samples=64))]
            if variant != "dense":
                own = rank if variant == "ced" else spatial_rank(layer)
                options = LowRank(rank=own, scheme=variant, min_features=1)  # type: ignore[arg-type]
                blocks.insert(0, recipe.Block("lowrank", options))
            program = apply(Head(layer).eval(), blocks, Data(calibration=x)).program
            with TemporaryDirectory() as folder:
                path = Path(folder) / f"model{target.SUFFIX}"
                target.lower(program, path, target.Options())
                found = board.profile(path, "cortex-m4", program, Settings(), [x[:1].numpy()])
                own = [c for c in found.layers if c.layer.startswith("layer")]
                yield {
                    "part": "instructions", "model": name, "variant": f"{variant} int8", "board": board.name,
                    "macs": sum(p.macs for p in program.layers), "weight_bytes": sum(p.weight_bytes for p in program.layers),
                    "instructions": sum(c.instructions or 0 for c in own), "arena_bytes": int(found.figures["arena_bytes"]),
                }  # fmt: skip


def spatial_rank(layer: nn.Module) -> int:
    """The multiple of 4 nearest to half of the work: rank (3 in + 3 out) is 9 in out / 2."""
    assert isinstance(layer, nn.Conv2d)
    return max(4, round(9 * layer.in_channels * layer.out_channels / 2 / 3 / (layer.in_channels + layer.out_channels) / 4) * 4)


BERT = """
import resource, sys, time, torch
from torch import nn
from edgekit.compress.lowrank import factorize
torch.set_num_threads({threads})
torch.manual_seed(0)
blocks = nn.ModuleList([nn.ModuleDict({{"q": nn.Linear(768, 768), "k": nn.Linear(768, 768), "v": nn.Linear(768, 768),
    "o": nn.Linear(768, 768), "up": nn.Linear(768, 3072), "down": nn.Linear(3072, 768)}}) for _ in range(12)])
bytes_ = sum(p.numel() * 4 for p in blocks.parameters())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
began, spent = time.perf_counter(), time.process_time()
small, record = factorize(blocks, 0.5)
seconds, cpu = time.perf_counter() - began, time.process_time() - spent
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(seconds, cpu, bytes_, before, peak, len(record.layers), record.figures["params after"])
"""


def tool() -> Iterator[Row]:
    for threads in (1, 2):
        found = subprocess.run([sys.executable, "-c", BERT.format(threads=threads)], capture_output=True, text=True, check=True)
        seconds, cpu, size, before, peak, layers, after = (float(v) for v in found.stdout.split())
        yield {
            "part": "tool", "model": "BERT-base-sized encoder", "variant": f"{threads} threads", "layers": int(layers),
            "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
            "model_mb": round(size / 1e6), "peak_mb": round(peak / 1e6),
            "more_than_before_mb": round((peak - before) / 1e6), "peak_of_model": round((peak - before) / size, 2),
            "params": int(after),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"errors": errors, "peer": peer, "instructions": instructions, "tool": tool}
    parser.add_argument("--parts", nargs="+", choices=[*parts, "accuracy"], default=[*parts, "accuracy"])
    parser.add_argument("--epochs", type=int, default=12)
    given = parser.parse_args()
    sys.argv[1:] = []  # rows of other parts are kept, so the file is what the whole command makes
    torch.set_num_threads(1)
    path = RESULTS / "lowrank.json"
    for part in given.parts:
        rows = []
        for row in accuracies(given.epochs) if part == "accuracy" else parts[part]():
            log(json.dumps(row))
            rows.append(row)
        kept = json.loads(path.read_text())["rows"] if path.is_file() else []
        write("lowrank", [r for r in kept if r["part"] != part] + rows, NOTES)


if __name__ == "__main__":
    main()
