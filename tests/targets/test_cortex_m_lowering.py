"""Frozen operators as firmware steps, in numpy: within one step of the frozen program, and refusals that say what to do."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from cortex_nets import borders, moves, op
from nets import conv, images, linear, residual_net
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.compress.ptq import PTQ, quantize_model
from edgekit.data import Data
from edgekit.errors import UnsupportedError
from edgekit.frozen import FrozenProgram, freeze_module
from edgekit.targets import preflight
from edgekit.targets.cortex_m.preparation import prepare, simulate


def samples(program: FrozenProgram, n: int) -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    kinds = list(zip(program.input_shapes, program.input_dtypes, strict=True))
    return [
        [
            torch.randn(*s, generator=g) if t == torch.float32 else torch.randint(-128, 128, s, generator=g, dtype=t)
            for s, t in kinds
        ]
        for _ in range(n)
    ]


@pytest.mark.parametrize("program", [residual_net(8), residual_net(4), residual_net(2), moves(), borders()], ids=lambda p: p.name)
def test_every_layer_is_within_one_step_when_fed_the_same(program: FrozenProgram) -> None:
    firmware = prepare(program, "portable")
    exact = {"quantize", "qreshape", "qpermute", "qslice", "qpad", "qmax_pool2d", "qlut"}
    for xs in samples(program, 6):
        taps, outputs = simulate(firmware, [x.numpy() for x in xs])
        forced, following = program.forced_outputs({k: torch.from_numpy(v) for k, v in taps.items()}, *xs)
        for layer in program.layers:
            if layer.name in taps:
                gap = np.abs(forced[layer.name].numpy().astype(int) - taps[layer.name]).max()
                assert gap <= (0 if layer.op in exact else 1), layer.name
        for ours, theirs in zip(outputs, following, strict=True):
            assert ours.shape == tuple(theirs.shape) and np.allclose(ours, theirs.float().numpy(), atol=1e-6)


def test_what_costs_nothing_has_no_step() -> None:
    firmware = prepare(residual_net(), "portable")
    assert {"pad", "flatten", "quantize", "dequantize"}.isdisjoint(s.layer for s in firmware.steps)
    assert "pad" not in firmware.taps and "flatten" in firmware.taps
    down = next(s for s in firmware.steps if s.layer == "down")
    assert down.values["pad"] == (0, 0) and down.values["out"] == (8, 8, 16)
    moved = prepare(moves(), "portable")
    assert {"to_last", "to_first", "rows"}.isdisjoint(s.layer for s in moved.steps if s.kind != "gather")


class Flat(nn.Module):
    """A convolution flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        i, a, o = (0.05, -3), (0.07, -128), (0.2, 7)
        self.quantize = op("quantize", q=i, bits=8)
        self.conv = conv(2, 6, 3, i, a)
        self.flatten = op("qreshape", shape=[1, 120], q=a)
        self.head = linear(120, 9, a, o)
        self.dequantize = op("dequantize", q=o)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequantize(self.head(self.flatten(self.conv(self.quantize(x)))))


def test_a_flattened_image_is_not_moved_but_the_weights_are() -> None:
    torch.manual_seed(0)
    program = freeze_module(Flat(), (torch.zeros(1, 2, 4, 5),))
    firmware = prepare(program, "portable")
    assert [s.kind for s in firmware.steps] == ["conv2d", "linear"]
    x = torch.randn(1, 2, 4, 5)
    taps, _ = simulate(firmware, [x.numpy()])
    forced = program.forced({k: torch.from_numpy(v) for k, v in taps.items()}, x)
    assert np.abs(forced["head"].numpy().astype(int) - taps["head"]).max() <= 1


class Awkward(nn.Module):
    """A log_softmax inside, which stays in float."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.log_softmax(self.first(x), -1))


def test_a_float_layer_is_refused_by_name_line_and_remedy() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    program = quantize_model(Awkward().eval(), Data(x), PTQ(observer="minmax"))
    with pytest.raises(
        UnsupportedError,
        match=r"layer log_softmax.* \(test_cortex_m_lowering\.py:\d+\) stays in float: log_softmax.*return the logits",
    ):
        prepare(program, "portable")
    with pytest.raises(UnsupportedError, match="log_softmax"):
        preflight.check_program(program, "cortex-m4")


class Encoded(nn.Module):
    """Attention, layer normalizations and a mean in float, and the reshapes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(self.first(x)).mean(1))


def test_all_float_layers_are_named_and_none_that_only_moves_numbers() -> None:
    torch.manual_seed(0)
    program = quantize_model(Encoded().eval(), Data(torch.randn(16, 5, 8)), PTQ(observer="minmax"))
    with pytest.raises(UnsupportedError) as failure:
        preflight.check_program(program, "cortex-m4")
    line, norm = r"\(test_cortex_m_lowering\.py:\d+: ", r"\(test_cortex_m_lowering\.py:\d+: layer_norm\)"
    assert re.fullmatch(
        rf"layers \w+ {line}scaled_dot_product_attention\), encoder\.norm1 {norm}, encoder\.norm2 {norm}, "
        rf"mean {line}mean, only a mean [^)]*\) and 2 more stay in float, .*: for layer_norm, use batch normalization.*",
        str(failure.value),
    )


def test_two_float_layers_of_one_operator_have_their_own_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.one, self.two = nn.LayerNorm(8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.two(self.b(self.one(self.a(x)))))

    program = quantize_model(Twice().eval(), Data(torch.randn(16, 8)), PTQ(observer="minmax"))
    with pytest.raises(UnsupportedError, match=r"^layers one \(.*layer_norm\), two \(.*layer_norm\) stay in float"):
        prepare(program, "portable")


def test_16_bit_activations_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    program = quantize_model(model.eval(), Data(torch.randn(32, 1, 8, 8)), PTQ(activations="int16", observer="minmax"))
    with pytest.raises(UnsupportedError, match=r"layer .* has 16-bit activations.*set activations: int8"):
        prepare(program, "portable")


def test_sums_and_sizes_that_kernels_cannot_hold_are_refused() -> None:
    torch.manual_seed(0)
    i, o = (0.05, 0), (1e-6, 0)
    layer = linear(64, 4, i, (0.2, 0))
    layer.attributes |= {"out_scale": o[0]}
    program = freeze_module(nn.Sequential(op("quantize", q=i, bits=8), layer, op("dequantize", q=o)), (torch.zeros(1, 64),))
    with pytest.raises(UnsupportedError, match=r"layer 1 has a scale that makes the multiplier .* not below 256"):
        prepare(program, "portable")
    layer = linear(66000, 2, i, (0.2, 0))
    program = freeze_module(
        nn.Sequential(op("quantize", q=i, bits=8), layer, op("dequantize", q=(0.2, 0))), (torch.zeros(1, 66000),)
    )
    with pytest.raises(UnsupportedError, match=r"layer 1 .*(in_n 66000|pass 30 bits)"):
        prepare(program, "portable")


def test_a_refusal_names_the_source_line() -> None:
    program = replace(residual_net(), sources={"block.pw": "model.py:12"})
    layer = program.layer("block.pw")
    from edgekit.targets.cortex_m.lowering import refusal

    assert str(refusal(program, layer.name, "is odd", "make it even")).startswith("layer block.pw (model.py:12) is odd, which")


def test_kernel_sets_differ_in_scratch_only() -> None:
    program, x = residual_net(4), images(1).numpy()
    sets = [prepare(program, name) for name in ("portable", "dsp", "mve")]
    assert len({f.arena for f in sets}) > 1
    found = [simulate(f, [x])[1][0] for f in sets]
    assert all(np.array_equal(found[0], y) for y in found[1:])
