"""Transformers on the three host targets: linears and the MLP's GELU as integers, attention and normalization in float.

Truths: torch eager for what the frozen program computes, each runtime itself for what its file computes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.compress.ptq import PTQ, quantize_model
from edgekit.data import Data
from edgekit.frozen import FrozenProgram
from edgekit.stages import Evaluation
from edgekit.targets import get
from edgekit.verify import verify_artifact

pytestmark = pytest.mark.slow
WIDTH, HEADS, TOKENS, FEATURES = 16, 4, 6, 8


class Stock(nn.Module):
    """torch's own encoder layer between an embedding and a head."""

    def __init__(self, activation: str, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, WIDTH)
        self.layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, activation=activation, batch_first=True, norm_first=norm_first
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)
        mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)
        self.register_buffer("mask", mask if norm_first else torch.zeros(TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(self.embed(x), src_mask=self.mask)).mean(1))


class Written(nn.Module):
    """A block written by hand: one projection for q, k and v; attention as products or as one call; norm first or last."""

    def __init__(self, norm_first: bool, fused: bool) -> None:
        super().__init__()
        self.norm_first, self.fused = norm_first, fused
        self.embed, self.qkv, self.out = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down, self.head = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(*t.shape[:2], HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v
        return self.out(y.transpose(1, 2).reshape(x.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.norm_first:
            x = x + self.attend(self.norm1(x))
            x = x + self.down(F.gelu(self.up(self.norm2(x))))
        else:
            x = self.norm1(x + self.attend(x))
            x = self.norm2(x + self.down(F.gelu(self.up(x))))
        return self.head(x[:, 0])


MODELS = {
    "stock, gelu, norm first, masked": partial(Stock, "gelu", True),
    "stock, relu, norm last": partial(Stock, "relu", False),
    "written, norm first, one call": partial(Written, True, True),
    "written, norm last, products": partial(Written, False, False),
}


@pytest.fixture(scope="module", params=list(MODELS))
def frozen(request: pytest.FixtureRequest) -> tuple[FrozenProgram, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[request.param]().eval(), torch.randn(64, TOKENS, FEATURES)
    return quantize_model(model, Data(x), PTQ(samples=64)), model, x[:16]


def test_linears_and_the_gelu_between_them_are_integers_and_the_rest_is_listed(
    frozen: tuple[FrozenProgram, nn.Module, Tensor],
) -> None:
    program, model, x = frozen
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)] + [
        f"{n}.in_proj" for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)
    ]
    assert {layer.name for layer in program.layers if layer.op == "qlinear"} == set(linears)
    assert not {u.op for u in program.unquantized} & {"linear", "gelu", "relu"}
    (found,) = program.run(x)
    with torch.no_grad():
        wanted = model(x)
    assert (found - wanted).square().mean() < 2e-3 * wanted.square().mean()


@pytest.mark.parametrize("target", ["executorch", "tflite", "onnx"])
def test_every_file_computes_the_program(target: str, frozen: tuple[FrozenProgram, nn.Module, Tensor], tmp_path: Path) -> None:
    program, _, x = frozen
    module = get(target)
    if module.available() is not None:
        pytest.skip(module.available())
    path = tmp_path / f"model{module.SUFFIX}"
    artifact = module.lower(program, path)
    assert sum(c.macs for c in artifact.coverage) == program.macs
    assert sum(c.macs for c in artifact.coverage if c.runs == "float") == 2 * TOKENS * TOKENS * WIDTH
    parity = verify_artifact(program, target, path, Evaluation((x,), None, "accuracy", "noise"))
    assert parity.ok and parity.untapped == ()
    assert parity.stage.max_lsb is not None and parity.stage.max_lsb <= 1
    assert all(layer.max_lsb <= 1 for layer in parity.layers)
