"""Low rank, then 1 bit: the thin layers are binarized like any others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.compress.binary import Binary
from edgekit.compress.lowrank import LowRank
from edgekit.compress.ptq import PTQ
from edgekit.compress.steps import apply
from edgekit.data import Data
from edgekit.recipe import Block


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.head = nn.Conv2d(2, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.wide(F.relu(self.first(x)))).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize(("scopes", "wanted"), [({}, (1, 1)), ({r"wide\.0": "float"}, (8, 1))])
def test_both_thin_layers_become_binary_unless_a_scope_says_otherwise(scopes: dict[str, str], wanted: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(96, 2, 6, 6)
    y = (x[:, 0].mean((1, 2)) > 0).long()
    blocks = [
        Block("lowrank", LowRank(rank=0.5, scheme="ced", exclude=("first",), samples=64)),
        Block("binary", Binary(epochs=1, train_batch_size=32, scopes=scopes)),  # type: ignore[arg-type]
        Block("ptq", PTQ(samples=64)),
    ]
    made = apply(model, blocks, Data(calibration=x[:64], evaluation=(x, y), training=(x, y)))
    layers = {layer.name: layer for layer in made.program.layers}
    rank = int(0.5 * 32 * 288 / (32 + 288)) // 4 * 4
    parts = [layers["wide.0"], layers["wide.1"]]
    assert tuple(layer.weight_bits for layer in parts) == wanted
    assert [layer.op.startswith("binary") for layer in parts] == [bits == 1 for bits in wanted]
    assert [layer.macs for layer in parts] == [36 * 288 * rank, 36 * rank * 32]
    assert layers["first"].weight_bits == layers["head"].weight_bits == 8 and made.program.unquantized == ()
    torch.testing.assert_close(made.program.run(x)[0], made.simulation(x), rtol=0, atol=1e-4)
    lowrank, binary, _ = made.record["passes"]
    assert list(lowrank["layers"]) == ["wide"] and set(binary["layers"]) == {
        f"wide.{i}" for i, bits in enumerate(wanted) if bits == 1
    }
