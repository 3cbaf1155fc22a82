"""What stays in float is counted: multiply-accumulates, parameters and bytes against hand counts, wherever they are shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit import doctor
from edgekit.compress.ptq import PTQ, quantize_model
from edgekit.data import Data
from edgekit.frozen import FrozenProgram, load, save
from edgekit.frozen.describe import Row, describe
from edgekit.stages import evaluate_stage, evaluation_set


class Recurrent(nn.Module):
    """(N, 6, 8): a recurrent layer and a linear one."""

    def __init__(self, kind: type[nn.RNNBase], **settings: bool) -> None:
        super().__init__()
        self.memory = kind(8, 12, batch_first=True, **settings)
        self.head = nn.Linear(24 if settings.get("bidirectional") else 12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x)[0][:, -1])


class Upscale(nn.Module):
    """(N, 3, 8, 8): a convolution, a grouped transposed one, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.out = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.up(F.relu(self.down(x)))))


class Tokens(nn.Module):
    """(N, 6) of token numbers: an embedding tied to the last linear layer, attention, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (p(x).reshape(*x.shape[:2], 4, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.norm(x + self.out(y)) @ self.embed.weight.T


def frozen(model: nn.Module, x: Tensor, **settings: object) -> FrozenProgram:
    torch.manual_seed(0)
    return quantize_model(model.eval(), Data(x), PTQ(samples=8, **settings))  # type: ignore[arg-type]


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, object], dict[str, tuple[int, int, int]]]] = {
    # layer: (multiply-accumulates, parameters, bytes)
    "lstm": (
        lambda: Recurrent(nn.LSTM), (6, 8), {},
        {"memory": (6 * 4 * 12 * (8 + 12), 4 * 12 * (8 + 12 + 2), 4 * 4 * 12 * (8 + 12 + 2))},
    ),
    "gru, both ways": (
        lambda: Recurrent(nn.GRU, bidirectional=True), (6, 8), {},
        {"memory": (2 * 6 * 3 * 12 * (8 + 12), 2 * 3 * 12 * (8 + 12 + 2), 2 * 4 * 3 * 12 * (8 + 12 + 2))},
    ),
    "transposed convolution": (
        Upscale, (3, 8, 8), {}, {"up": (4 * 4 * 8 * 3 * 2 * 2, 8 * 3 * 2 * 2 + 6, 4 * (8 * 3 * 2 * 2 + 6))},
    ),
    "skipped": (
        Upscale, (3, 8, 8), {"skip": ("out",)},
        {"up": (1536, 102, 408), "out": (8 * 8 * 6 * 4, 4 * 6 + 4, 4 * (4 * 6 + 4))},
    ),
    "tokens": (
        Tokens, (6,), {},
        {
            "embed": (0, 20 * 16, 4 * 20 * 16),
            "scaled_dot_product_attention": (2 * 4 * 6 * 6 * 4, 0, 0),
            "norm": (0, 32, 128),
            "matmul": (6 * 16 * 20, 0, 0),  # its weights are the embedding's
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_hand_counts(case: str, tmp_path: Path) -> None:
    make, shape, settings, wanted = CASES[case]
    x = torch.randint(0, 20, (8, *shape)) if case == "tokens" else torch.randn(8, *shape)
    model = make()
    program = frozen(model, x, **settings)
    found = describe(program)
    rows: dict[str, Row] = {row.layer: row for row in found.rows if row.kind == "float"}
    counted = {name: (row.macs, row.parameters, row.bytes) for name, row in rows.items() if row.macs or row.parameters}
    assert counted == wanted
    assert rows.keys() - wanted.keys() <= {layer for layer, _, _ in found.unquantized} <= {row.layer for row in found.rows}
    assert found.macs == program.macs == sum(x.macs for x in program.layers) + sum(n for n, _, _ in wanted.values())
    assert found.macs_by_bits["float32"] == sum(n for n, _, _ in wanted.values())
    assert found.bytes == program.weight_bytes
    assert found.parameters == program.parameters == sum(p.numel() for p in model.parameters())
    save(program, tmp_path / "frozen.pt2")
    assert describe(load(tmp_path / "frozen.pt2")) == found, "names and counts survive the file"


@pytest.mark.parametrize("case", ["lstm", "tokens"])
def test_the_float_stage_counts_fused_kernels_too(case: str) -> None:
    make, shape, _, _ = CASES[case]
    x = torch.randint(0, 20, (8, *shape)) if case == "tokens" else torch.randn(8, *shape)
    model = make().eval()
    stage = evaluate_stage("float", model, evaluation_set(Data(x), 1))
    assert stage.macs == frozen(model, x).macs


def test_torchs_own_encoder_layer_is_counted_in_full() -> None:
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True), torch.randn(8, 6, 8)
    linears, products = 6 * (8 * 24 + 8 * 8 + 2 * 8 * 16), 2 * 2 * 6 * 6 * 4
    found = describe(frozen(layer, x))
    assert found.macs_by_bits == {"w8a8": linears, "float32": products}
    assert evaluate_stage("float", layer, evaluation_set(Data(x), 1)).macs == linears + products


def test_doctor_says_the_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.py").write_text(
        "from torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(6, 4, 1))\n"
    )
    found = doctor.examine(f"{tmp_path / 'm.py'}:build", shape="1,3,8,8")
    up = 4 * 4 * 8 * 6 * 4
    assert (found["model"]["macs"], found["model"]["float_macs"]) == (4 * 4 * 8 * 27 + up + 8 * 8 * 6 * 4, up)
    doctor.show(found)
    assert f"{100 * up / found['model']['macs']:.1f} % of them in float" in " ".join(capsys.readouterr().out.split())
    json.dumps(found)
