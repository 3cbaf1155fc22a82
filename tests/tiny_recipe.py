"""A recipe folder that compresses in a second, for tests of the pipeline and the command line."""

from __future__ import annotations

from pathlib import Path

MODEL = """
import torch
from torch import nn
from torch.nn import functional as F

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))

def build(seed=0):
    torch.manual_seed(seed)
    return Tiny()
"""

DATA = """
import torch
from edgekit import Data
from model import build

def load():
    x = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = build()(x).argmax(1)
    return Data(calibration=x[:64], evaluation=(x[64:], y[64:]), training=(x, y))
"""

RECIPE = """\
name: tiny
model: model.py:build
data: data.py:load
compress:
  - ptq: {observer: minmax}
targets: [TARGETS]
verify: {max_lsb: 1, max_accuracy_drop: 10}
"""


def write(folder: Path, targets: str = "onnx") -> Path:
    """Write the three files and return the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(MODEL)
    (folder / "data.py").write_text(DATA)
    (folder / "recipe.yaml").write_text(RECIPE.replace("TARGETS", targets))
    return folder / "recipe.yaml"


def content(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
