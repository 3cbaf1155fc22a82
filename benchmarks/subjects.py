"""The networks that are measured, from the examples' recipes, and the files of benchmark results."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit import environment, recipe, source
from edgekit.compress.steps import apply
from edgekit.files import write_json
from edgekit.frozen import FrozenProgram

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "runs" / "benchmarks"
RECIPES = {
    "resnet20": ("cifar_resnet20/recipe.yaml", "cifar_resnet20/w4a8.yaml"),
    "resnet8": ("mlperf_tiny/resnet8.yaml", "mlperf_tiny/resnet8_w4a8.yaml"),
    "dscnn": ("mlperf_tiny/dscnn.yaml", "mlperf_tiny/dscnn_w4a8.yaml"),
}

MORE = {
    "mobilenet": ("mlperf_tiny/mobilenet.yaml", ""),
    "autoencoder": ("mlperf_tiny/autoencoder.yaml", ""),
}
"""Networks without labels, for what is measured of a file only; "": no recipe with 4 bits, the one with 8 is taken for both."""


@dataclass(frozen=True)
class Subject:
    """A network with the samples everybody is given.

    Attributes:
        calibration: (N, ...) float32; seed 0: the recipe's own, other seeds: as many others from the training samples.
        x, y: (1000, ...) samples and labels that every file is judged on.
    """

    name: str
    model: nn.Module
    calibration: Tensor
    x: Tensor
    y: Tensor

    @property
    def sample(self) -> tuple[Tensor]:
        return (self.calibration[:1].contiguous(),)

    def accuracy(self, outputs: np.ndarray) -> float:
        """Percent."""
        return round(100 * float((outputs.reshape(len(self.y), -1).argmax(1) == self.y.numpy()).mean()), 4)


def subject(name: str, seed: int = 0, samples: int | None = None) -> Subject:
    """Load a network and its samples; ``samples`` of the evaluation set, for trying a script out."""
    settings = settings_of(name, 8)
    data = source.load_data(settings.data)
    calibration, (x, y) = data.calibration, data.evaluation
    if seed:
        drawn = torch.randperm(len(data.training[0]), generator=torch.Generator().manual_seed(seed))
        calibration = data.training[0][drawn[: len(calibration)]]
    return Subject(name, source.load_model(settings.model), calibration, x[:samples], y[:samples])


@lru_cache
def settings_of(name: str, bits: int) -> recipe.Recipe:
    """The example's recipe, read once: a file that is edited meanwhile must not change half of a run's rows."""
    eight, four = (RECIPES | MORE)[name]
    settings = recipe.load(ROOT / "examples" / (four if bits == 4 and four else eight))
    if bits == 4 and not four:
        blocks = [dataclasses.replace(b, settings=dataclasses.replace(b.settings, weights="int4")) for b in settings.compress]
        return dataclasses.replace(settings, compress=tuple(blocks))
    return settings


def in_words(name: str, bits: int) -> str:
    """The settings of the recipe that are not the defaults."""
    words = []
    for block in settings_of(name, bits).compress:
        plain = type(block.settings)()
        for field in dataclasses.fields(plain):
            value = getattr(block.settings, field.name)
            if value != getattr(plain, field.name):
                words.append(f"{field.name} {value}")
    return ", ".join(words) or "defaults"


def compressed(net: Subject, bits: int, seed: int = 0) -> FrozenProgram:
    """The frozen program that the example's recipe makes of the network; ``bits`` of the weights, 8 or 4."""
    settings = recipe.replace(settings_of(net.name, bits), seed=seed)
    data = source.load_data(settings.data)
    made = apply(net.model, settings.compress, type(data)(calibration=net.calibration), name=net.name)
    return made.program


KEY = ("model", "variant", "target", "weight_bits", "activation_bits", "seed")


def write(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    notes: Iterable[str] = (),
    keep: bool = False,
    key: Sequence[str] = KEY,
    whole: str = "",
) -> None:
    """Write ``results/<name>.json``; ``keep``: earlier rows with another ``key`` stay, and so does their command.

    Args:
        whole: the command that makes all rows, recorded instead of those that made some of them each (rows that repeat exactly).
    """
    command, path = " ".join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]), RESULTS / f"{name}.json"
    if keep and path.is_file():
        earlier = json.loads(path.read_text())
        new = {tuple(r.get(k) for k in key): r for r in rows}
        merged = [new.pop(tuple(r.get(k) for k in key), r) for r in earlier["rows"]]
        rows = [*merged, *new.values()]
        command = earlier["command"] if earlier["command"].endswith(command) else f"{earlier['command']}; then {command}"
    known = {**environment.describe(), "threads": 1}
    value = {"rows": list(rows), "environment": known, "command": whole or command, "notes": list(notes)}
    write_json(path, json.loads(json.dumps(value, default=float)))


def arguments(what: str, models: Sequence[str] = tuple(RECIPES), **more: Any) -> argparse.Namespace:
    """Common options; ``models``: what can be named and is the default; ``more``: name to default value."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--models", nargs="+", choices=list(models), default=list(models))
    for name, default in more.items():
        kind = type(default[0]) if isinstance(default, list) else (int if default is None else type(default))
        parser.add_argument(
            f"--{name.replace('_', '-')}", default=default, type=kind, nargs="+" if isinstance(default, list) else None
        )
    torch.set_num_threads(1)
    return parser.parse_args()


def one_line(error: BaseException) -> str:
    """An error as a remark, without folders."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"/\S*/", "", text)[:200]


def log(text: str) -> None:
    """To the terminal, at once."""
    print(text, file=sys.stderr, flush=True)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
