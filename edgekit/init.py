"""``edgekit init``: a recipe that runs. Without a model it writes a starter, trained in two seconds, to replace by one's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgekit.errors import InputError
from edgekit.files import write_whole

__all__ = ["write"]

Ask = Callable[..., Any]
"""As ``typer.prompt``: (question, default=...) -> answer."""

_RECIPE = """\
name: {name}
model: {model}
data: {data}
compress:
  - {compress}
targets: [{targets}]
verify: {{max_lsb: 1, max_accuracy_drop: {drop}}}
seed: 0
"""

_STARTER = '''\
"""A starter: which quarter of a small image is bright? Replace build() by your model and load() by your data."""

import torch
from edgekit import Data
from torch import Tensor, nn
from torch.nn import functional as F


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise (count, 1, 12, 12) with one bright quarter, and its number 0 to 3."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 12, 12, generator=generator)
    y = torch.randint(4, (count,), generator=generator)
    for i, quarter in enumerate(y.tolist()):
        row, column = 6 * (quarter // 2), 6 * (quarter % 2)
        x[i, :, row : row + 6, column : column + 6] += 0.3
    return x, y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return self.head(x.flatten(1))


def build(seed: int = 0) -> nn.Module:
    """The float model, trained. Load weights of your own with edgekit.load_weights(model, "weights.safetensors")."""
    torch.manual_seed(seed)
    model, (x, y) = Net(), images(1024, seed)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(60):
        part = slice(64 * (step % 16), 64 * (step % 16) + 64)
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    return model.eval()


def load() -> Data:
    """Calibration inputs, and (inputs, labels) that the result is judged on and could be trained on."""
    return Data(calibration=images(256, 1)[0], evaluation=images(500, 2), training=images(1024, 0))
'''


def write(
    folder: Path,
    *,
    model: str | None = None,
    data: str | None = None,
    weights: str = "int8",
    targets: Sequence[str] | None = None,
    ask: Ask | None = None,
    force: bool = False,
) -> list[Path]:
    """Write ``recipe.yaml`` (and ``starter.py`` where no model is given) and return the files, the recipe first.

    Args:
        folder: made if it does not exist.
        model, data: factories; both or none. They are loaded once, so that the recipe is known to run.
        weights: "int8" or "int4".
        targets: names; None: every target that is installed, but the Cortex-M cores.
        ask: asks for what is not given; None: takes the defaults.
        force: replace files that are there.

    Raises:
        InputError: a file is there, a value is wrong, or the model or data cannot be loaded.
    """
    from edgekit.targets import GENERAL, get

    folder = Path(folder)
    installed = [name for name in GENERAL if get(name).available() is None]
    if ask is not None:
        model = model or ask("Model (file.py:factory or .pt2; empty: a starter to edit)", default="", show_default=False) or None
        if model and not data:
            data = ask("Data (file.py:factory)")
        weights = ask("Weights, int8 or int4", default=weights)
        given = ask("Targets", default=", ".join(targets or installed) or "onnx")
        targets = [t.strip() for t in given.replace(",", " ").split()]
    if weights not in ("int8", "int4"):
        raise InputError(f"weights {weights!r}; expected int8 or int4")
    if (model is None) != (data is None):
        raise InputError("give both --model and --data, or none of them for a starter")
    for name in targets or ():
        get(name)
    files = _files(folder, model, data, weights, list(targets or installed), force)
    for path, text in files.items():
        write_whole(path, text)
    return list(files)


def _files(folder: Path, model: str | None, data: str | None, weights: str, targets: list[str], force: bool) -> dict[Path, str]:
    """File to text, after checks of everything they name."""
    recipe = folder / "recipe.yaml"
    files = {recipe: ""}
    if model is None or data is None:
        files[folder / "starter.py"] = _STARTER
        names = {"model": "starter.py:build", "data": "starter.py:load", "name": "starter"}
    else:
        _try(model, data)
        names = {"model": _relative(model, folder), "data": _relative(data, folder), "name": _name(model)}
    for path in files:
        if path.exists() and not force:
            raise InputError(f"{path}: is there already; choose another folder or give --force")
    files[recipe] = _RECIPE.format(
        **names,
        compress=f"static_wi{weights.removeprefix('int')}_ai8",
        targets=", ".join(targets),
        drop=1.0 if weights == "int8" else 3.0,
    )
    return files


def _try(model: str, data: str) -> None:
    """Load both and run one sample, so that a mistake shows now."""
    from edgekit import source
    from edgekit.data import sample_inputs
    from edgekit.intake import check_sample

    module = source.load_model(model)
    check_sample(module, sample_inputs(module, source.load_data(data)), model)


def _relative(spec: str, folder: Path) -> str:
    """A spec that names a file, as seen from the recipe's folder."""
    file, colon, factory = spec.rpartition(":")
    file, tail = (file, colon + factory) if colon else (spec, "")
    return spec if not Path(file).is_file() else os.path.relpath(file, folder) + tail


def _name(model: str) -> str:
    stem = Path(model.rpartition(":")[0] or model).stem.rpartition(".")[2]
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in stem).strip("._-")
    return kept[:64] or "model"
