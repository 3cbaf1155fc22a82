"""A binary transformer of BERT-tiny's size on spoken digits: accuracy with and without estimators of the residuals, and its cost.

    python benchmarks/binary_encoder.py                    # all rows, about 8 minutes of one core
    python benchmarks/binary_encoder.py --ranks 1 --seeds 0 --keep teacher.safetensors

Tokens are two frames of the log-mel spectrogram (30 of 80 numbers); 2700 recordings to learn from, 300 to judge by. The float
encoder is trained here; the binary ones start from it and learn from labels, its probabilities and its hidden values. ``rank`` 0
is without estimators. Budgets are short (``epochs`` in each row). The last rows are BERT-base's cost, as papers quote it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from subjects import ROOT, arguments, log, write
from torch import Tensor, nn

from edgekit import Data
from edgekit.compress.binary.baked import baked
from edgekit.compress.binary.bipft import BinaryEncoder
from edgekit.compress.binary.cost import Cost, encoder_cost
from edgekit.compress.binary.encoder import Encoder, EncoderConfig
from edgekit.compress.binary.encoder_training import EncoderTraining, train_encoder
from edgekit.compress.ptq.settings import PTQ
from edgekit.compress.steps import apply
from edgekit.frozen import FrozenProgram
from edgekit.recipe import Block

TINY = EncoderConfig(layers=2, width=128, heads=2, hidden=512, positions=30, features=80, classes=10, pool="mean")
BASE = EncoderConfig(layers=12, width=768, heads=12, hidden=3072, positions=512, vocabulary=30522, types=2)
KEY = ("model", "variant", "rank", "seed")


def frames() -> dict[str, tuple[Tensor, Tensor]]:
    """Parts "train" and "test": (N, 30, 80) float32, normalized by the training part, and labels."""
    folder = Path(os.environ.get("EDGEKIT_DATA") or ROOT.parent / "shared" / "data") / "datasets"
    with np.load(folder / "fsdd_logmel.npz") as file:
        raw = {k: torch.from_numpy(file[f"x_{k}"]).float() for k in ("train", "test")}
        labels = {k: torch.from_numpy(file[f"y_{k}"]).long() for k in ("train", "test")}
    mean, std = raw["train"].mean(), raw["train"].std()
    return {k: (((x - mean) / std).reshape(len(x), 61, 40)[:, :60].reshape(-1, 30, 80), labels[k]) for k, x in raw.items()}


def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    x, y = part
    with torch.no_grad():
        found = torch.cat([model(chunk).argmax(1) for chunk in x.split(100)])
    return 100 * float((found == y).float().mean())


def teacher(data: dict[str, tuple[Tensor, Tensor]], epochs: int, keep: str) -> Encoder:
    torch.manual_seed(0)
    model = Encoder(TINY)
    if keep and Path(keep).is_file():
        model.load_state_dict(load_file(keep))
        return model.eval()
    train_encoder(model, data["train"], EncoderTraining(epochs=epochs, learning_rate=1e-3))
    if keep:
        save_file(model.state_dict(), keep)
    return model


def programs_row(program: FrozenProgram, part: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Accuracy of the frozen program, its bytes, and the share of products on 1-bit operands."""
    x, y = part
    correct = 100 * float((program.run(x)[0].argmax(1) == y).float().mean())
    ones = sum(layer.macs for layer in program.layers if layer.op.startswith("binary_"))
    return {"accuracy": correct, "bytes": program.weight_bytes, "macs": program.macs, "binary_macs": ones}


def cost_row(model: str, variant: str, rank: int, cost: Cost) -> dict[str, Any]:
    return {
        "model": model, "variant": variant, "rank": rank, "seed": 0, "operations": cost.operations, "products": cost.products,
        "memory": cost.memory, "binary_weights": cost.binary_weights, "float_values": cost.float_values,
    }  # fmt: skip


def rows(ranks: list[int], seeds: list[int], epochs: int, keep: str) -> Iterator[dict[str, Any]]:
    data = frames()
    real = teacher(data, max(epochs, 5), keep)
    calibrated = Data(calibration=data["train"][0][:256], evaluation=data["test"])
    head = {"model": "bert-tiny", "rank": 0, "seed": 0}
    cost = encoder_cost(TINY, 30, binary=False)
    yield {**head, "variant": "float", "accuracy": accuracy(real, data["test"]), "bytes": cost.memory, "epochs": max(epochs, 5)}
    plain = apply(real, [Block("ptq", PTQ())], calibrated).program
    yield {**head, "variant": "int8 (ptq)", **programs_row(plain, data["test"]), "epochs": 0}
    for seed in seeds:
        for rank in ranks:
            torch.manual_seed(seed)
            made = BinaryEncoder(real, rank)
            losses = train_encoder(made, data["train"], EncoderTraining(epochs=epochs, seed=seed), real)
            found = apply(baked(made), [Block("ptq", PTQ())], calibrated).program
            yield {
                **head, "variant": "binary", "rank": rank, "seed": seed, "epochs": epochs, "loss": losses[-1],
                "trained_accuracy": accuracy(made, data["test"]), **programs_row(found, data["test"]),
            }  # fmt: skip
    yield cost_row("bert-tiny", "cost, float", 0, cost)
    for rank in (0, 1):
        yield cost_row("bert-tiny", "cost, binary", rank, encoder_cost(TINY, 30, binary=True, rank=rank))
    yield cost_row("bert-base, 128 tokens", "cost, float", 0, encoder_cost(BASE, 128, binary=False))
    for side in (4, 2):
        found_cost = encoder_cost(BASE, 128, binary=True, side_bytes=side)
        yield cost_row("bert-base, 128 tokens", f"cost, binary, {side} bytes a float", 1, found_cost)


_NOTES = (
    "operations = FLOPs + BOPs / 64, 2 for a multiply-accumulate; products: without elementwise work; memory: all tensors",
    "frozen binary programs keep the input projection and the head in int8, normalization and softmax in float",
)


def main() -> None:
    options = arguments("a binary encoder", ("bert-tiny",), ranks=[0, 1], seeds=[0, 1, 2], epochs=5, keep="")
    for row in rows(options.ranks, options.seeds, options.epochs, options.keep):
        log(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
        write("binary_encoder", [row], _NOTES, keep=True, key=KEY, whole="python benchmarks/binary_encoder.py")


if __name__ == "__main__":
    main()
