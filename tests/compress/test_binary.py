"""The binary block: what becomes 1-bit, that frozen bits are the trained network's, resuming, and refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import edgekit
from edgekit.compress.binary import Binary, Distill, Stage
from edgekit.compress.binary.choose import Choice, choose, without_relus
from edgekit.compress.binary.shortcuts import with_shortcuts
from edgekit.compress.binary.step import binarize
from edgekit.compress.binary.twin import binary_twin, layers_of, moments, settle
from edgekit.compress.capture import Graph, capture
from edgekit.compress.ptq.binary_units import Signs, packed_layer
from edgekit.compress.ptq.quantize import quantize
from edgekit.compress.ptq.settings import PTQ, Reconstruct
from edgekit.compress.ptq.simulate import simulate
from edgekit.compress.steps import apply
from edgekit.compress.threads import one_thread_if_small
from edgekit.data import Data
from edgekit.errors import DataError, EdgekitError, InputError, ModelError, RecipeError
from edgekit.frozen.binary_ops import unpack_signs
from edgekit.recipe import Block, parse


class Plain(nn.Module):
    """conv, then conv - norm - relu twice, a mean and a linear layer: the two in the middle make a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 12, 3, padding=1)
        self.a, self.norm_a = nn.Conv2d(12, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20)
        self.b, self.norm_b = nn.Conv2d(20, 9, 3, stride=2, padding=1, groups=1), nn.BatchNorm2d(9)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.norm_a(self.a(x)))
        x = F.relu(self.norm_b(self.b(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def data(count: int = 96) -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, 6, 6, generator=generator)
    y = (x[:, 0].mean((1, 2)) > 0).long() + 2 * (x[:, 1, :3].mean((1, 2)) > 0).long()
    return Data(calibration=x[:64], evaluation=(x, y), training=(x, y))


def model(kind: type[nn.Module] = Plain) -> nn.Module:
    torch.manual_seed(0)
    made = kind()
    made.train()
    for _ in range(3):
        made(data().calibration)  # running statistics that are not 0 and 1
    return made.eval()


def block(step: str = "binary", **more: Any) -> Block:
    if step == "ptq":
        return Block("ptq", PTQ(**more))
    return Block("binary", Binary(**{"epochs": 2, "train_batch_size": 32, "seed": 3, **more}))


def ops(program: edgekit.FrozenProgram) -> dict[str, str]:
    return {layer.name: layer.op for layer in program.layers}


def test_a_chain_stays_packed_and_computes_what_the_network_does() -> None:
    found = apply(model(), [block(), block("ptq")], data())
    kinds = ops(found.program)
    assert kinds["a_sign"] == "binarize" and kinds["a"] == "binary_conv2d" and kinds["b"] == "binary_qconv2d"
    assert "b_sign" not in kinds  # it is in a's thresholds
    assert kinds["first"] == "qconv2d" and kinds["head"] == "qlinear"
    assert found.program.unquantized == ()
    x = data().evaluation[0]
    torch.testing.assert_close(found.program.run(x)[0], found.simulation(x), rtol=0, atol=1e-4)
    entry = found.record["passes"][0]
    assert entry["layers"] == {n: "1-bit weights and inputs, reste, 2 epochs" for n in ("a", "b")}
    assert {e["layer"]: e["reason"] for e in entry["left alone"]} == dict.fromkeys(
        ["first", "head"], "first or last layer (keep_first_last)"
    )
    assert [e["o"] for e in entry["log"]] == pytest.approx([1.0, 1 + 2 * (1 - 2**-0.5)])
    assert all(e["estimating_error"] > 0 and e["gradient_instability"] > 0 for e in entry["log"])


def test_frozen_bits_are_the_eager_networks() -> None:
    """Each binary layer, fed with the program's own signs, against the graph's float convolution, bias, ReLU and threshold."""
    graph, _ = binarize(g := capture(model(), (data().calibration,)), Binary(epochs=2, seed=1, relu="keep"), data(), g)
    from edgekit.compress.ptq.freeze import freeze

    program = freeze(*quantize(graph, PTQ(), data()))
    tensors = dict(graph.module.named_parameters())
    one = data().evaluation[0][:1]
    seen = program.trace(one)
    signs = unpack_signs(seen["a_sign"], 12).movedim(-1, 1).float()
    limit = tensors["a.threshold"]
    first = (seen["first"].float() - program.layer("first").out_zero_point) * program.layer("first").out_scale  # type: ignore[operator]
    assert torch.equal(signs, torch.where(first >= limit, 1.0, -1.0))
    y = F.conv2d(signs, tensors["a.weight"], tensors["a.bias"], padding=1)
    found = unpack_signs(seen["a"], 20).movedim(-1, 1)
    clear = (y - tensors["b.threshold"]).abs() > 1e-5  # float sums have rounding errors, integers none
    assert clear.float().mean() > 0.99
    assert torch.equal(torch.where(y >= tensors["b.threshold"], 1, -1)[clear], found[clear].long())


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["none", "relu", "relu6"]))
def test_a_threshold_is_the_sign_of_the_real_layer(seed: int, activation: str) -> None:
    """By exact fractions, for every sum that can be."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(seed)
    signs = torch.where(torch.rand(3, 10, generator=generator) > 0.5, 1, -1).to(torch.int8)
    scale, bias = torch.rand(3, generator=generator) + 1e-3, torch.randn(3, generator=generator).double() * 3
    limit = torch.randn(3, generator=generator) * 2
    found = packed_layer(Signs(signs, scale, bias), activation, Signs(threshold=limit), "layer")
    assert found.threshold is not None
    for c in range(3):
        for total in range(-10, 11):
            real = Fraction(float(scale[c])) * total + Fraction(float(bias[c]))
            real = max(real, Fraction(0)) if activation != "none" else real
            real = min(real, Fraction(6)) if activation == "relu6" else real
            if abs(real - Fraction(float(limit[c]))) > Fraction(1, 10**12):
                assert (total >= int(found.threshold[c])) == (real >= Fraction(float(limit[c])))


class Residual(nn.Module):
    """A sum that two layers read: its ReLU is part of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        y = F.relu(x + self.a(x))
        y = F.relu(y + self.b(y))
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


def test_shortcuts_and_relus_are_as_asked_for() -> None:
    kept = apply(model(Residual), [block(), block("ptq")], data())
    assert sum(op == "qadd" for op in ops(kept.program).values()) == 2
    removed = apply(model(Residual), [block(relu="remove", shortcut=True), block("ptq")], data())
    kinds = ops(removed.program)
    assert sum(op == "qadd" for op in kinds.values()) == 2, "each layer has its shortcut already"
    activations = {layer.args["activation"] for layer in removed.program.layers if layer.op in ("qadd", "binary_qconv2d")}
    assert activations == {"none"}
    x = data().evaluation[0]
    torch.testing.assert_close(removed.program.run(x)[0], removed.simulation(x), rtol=0, atol=1e-4)


class Deep(nn.Module):
    """Blocks of two layers, as in ResNets: with a second sum in each the stream would grow by 2 ** 6."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 16, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(12))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        for a, b in zip(self.convs[::2], self.convs[1::2], strict=True):
            x = F.relu(x + b(F.relu(a(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_shortcuts_of_blocks_do_not_double_the_stream() -> None:
    graph = capture(model(Deep), (data().evaluation[0][:1],))
    how = Binary(shortcut=True, epochs=1)
    edited, choice = with_shortcuts(*_without_relus(graph, how))
    assert len(choice.shortcuts) == 6 and sum(n.target == torch.ops.aten.add.Tensor for n in edited.module.graph.nodes) == 12
    found = moments(edited, choice, graph, [(data().evaluation[0],)])
    twin = binary_twin(edited, choice, how, found)
    settle(twin, (data().evaluation[0],))
    layers, seen = layers_of(twin), {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        twin(data().evaluation[0])
    spreads = {name: float(x.std()) for name, x in seen.items()}
    assert max(spreads.values()) < 8 * min(spreads.values()), spreads
    for name, layer in layers.items():  # signs compare with the mean of what is really read
        x = seen[name].movedim(1, -1).flatten(0, -2)
        torch.testing.assert_close(layer.shift * layer.spread, x.mean(0), rtol=1e-3, atol=1e-4)


def _without_relus(graph: Graph, how: Binary) -> tuple[Graph, Choice]:
    choice = choose(graph, how)
    return without_relus(graph, choice, False)[0], choice


def test_signs_of_rows_make_binary_linears() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = (72, 40, 33, 20, 4)
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            for layer in self.layers[:-1]:  # type: ignore[index]
                x = F.relu(layer(x))
            return self.layers[-1](x)  # type: ignore[no-any-return]

    found = apply(model(Rows), [block(estimator="ste"), block("ptq")], data())
    kinds = ops(found.program)
    assert (kinds["layers.1"], kinds["layers.2"]) == ("binary_linear", "binary_qlinear")
    x = data().evaluation[0]
    torch.testing.assert_close(found.program.run(x)[0], found.simulation(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("estimator", ["ste", "polynomial", "biper", "brevitas"])
def test_every_estimator_trains_and_freezes(estimator: str) -> None:
    found = apply(model(), [block(estimator=estimator, epochs=3, learning_rate=3e-3, norm="batch"), block("ptq")], data())
    assert list(ops(found.program).values()).count("binary_conv2d") == 1
    log = found.record["passes"][0]["log"]
    assert log[-1]["loss"] < log[0]["loss"]
    assert [e["stage"] for e in log] == ([0, 0, 1] if estimator == "biper" else [0, 0, 0])
    assert (log[0]["quantization_error"] is not None) == (estimator == "biper")


def test_bipers_frequency_has_the_error_asked_for() -> None:
    found = apply(model(), [block(estimator="biper", epochs=2, learning_rate=1e-9, target_error=0.5), block("ptq")], data())
    # uniform weights of nn.Conv2d, not Laplacian ones: the error is near, not equal
    assert found.record["passes"][0]["log"][-1]["quantization_error"] == pytest.approx(0.5, abs=0.15)


def test_brevitas_ternary_weights_take_two_bits() -> None:
    found = apply(model(), [block(estimator="brevitas", kind="ternary_weights"), block("ptq")], data())
    a = found.program.layer("a")
    assert (a.op, a.weight_bits) == ("qconv2d", 2) and set(a.args["weight"].unique().tolist()) == {-1, 0, 1}
    assert a.weight_bytes == 20 * 12 * 9 // 4 + 2 * 4 * 20
    x = data().evaluation[0]
    torch.testing.assert_close(found.program.run(x)[0], found.simulation(x), rtol=0, atol=1e-4)


def test_scopes_give_kinds() -> None:
    scopes = {"a": "binary_weights", "head": "binary", "b": "float"}
    found = apply(model(), [block(scopes=scopes), block("ptq")], data())
    kinds = ops(found.program)
    assert kinds["a"] == kinds["b"] == "qconv2d" and kinds["head"] == "binary_qlinear"
    assert found.program.layer("a").weight_bits == 2 and found.program.layer("b").weight_bits == 8
    assert set(found.program.layer("a").args["weight"].unique().tolist()) == {-1, 1}


def test_binary_inputs_alone_are_left_in_float_and_named() -> None:
    found = apply(model(), [block(kind="binary_activations"), block("ptq")], data())
    assert any("only signs that nothing but 1-bit layers read" in u.reason for u in found.program.unquantized)
    assert ops(found.program)["a"] == "qconv2d"


def test_a_teacher_needs_no_labels() -> None:
    plain = data()
    unlabelled = Data(calibration=plain.calibration, evaluation=plain.evaluation)
    how = Distill(labels=0, features=1.0, points="layers")
    found = apply(model(), [block(distill=how, epochs=6, learning_rate=1e-2), block("ptq")], unlabelled)
    log = found.record["passes"][0]["log"]
    assert log[-1]["loss"] < log[0]["loss"]
    with pytest.raises(DataError, match=r"no training samples.*distill: \{labels: 0\}"):
        apply(model(), [block(), block("ptq")], unlabelled)


def test_stages_keep_weights_real_first() -> None:
    stages = (Stage(epochs=1, weights="real", activations="real"), Stage(epochs=1))
    ways = Block("binary", Binary(stages=stages, estimator="ste", train_batch_size=32, seed=3))
    found = apply(model(), [ways, block("ptq")], data())
    assert [e["stage"] for e in found.record["passes"][0]["log"]] == [0, 1]
    with pytest.raises(ValueError, match="take epochs out, or into them"):
        block(stages=stages)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("kill_after", [4, 8])
def test_a_killed_training_ends_with_the_same_weights(kill_after: int, tmp_path: Path) -> None:
    """Killed in the first stage's second epoch, and in the second stage."""
    blocks = [block(estimator="biper", epochs=3), block("ptq")]
    whole = apply(model(), blocks, data())

    def progress(what: str, done: int, total: int) -> None:
        assert total == 9
        if what == "binary" and done == kill_after:
            raise _Killed

    with pytest.raises(_Killed):
        apply(model(), blocks, data(), folder=tmp_path, progress=progress)
    steps: list[int] = []
    resumed = apply(
        model(), blocks, data(), folder=tmp_path, progress=lambda what, done, _: steps.append(done) if what == "binary" else None
    )
    assert steps[0] == kill_after // 3 * 3 + 1  # went on after the last whole epoch
    from edgekit.frozen.archive import to_bytes

    assert to_bytes(resumed.program) == to_bytes(whole.program)
    assert resumed.record["passes"][0]["log"] == whole.record["passes"][0]["log"]


@pytest.mark.parametrize("more", [
    {"method": "gptq"}, {"method": "brecq", "reconstruct": Reconstruct(steps=3)}, {"bias_correction": True}, {"equalize": True},
    {"weights": "int4"},
])  # fmt: skip
def test_other_methods_of_ptq_leave_the_bits_alone(more: dict[str, Any]) -> None:
    plain = apply(model(), [block(epochs=1), block("ptq")], data())
    other = apply(model(), [block(epochs=1), block("ptq", **more)], data())
    for name in ("a", "b"):
        assert torch.equal(plain.program.layer(name).args["weight"], other.program.layer(name).args["weight"])
    assert ops(plain.program) == ops(other.program)


def test_refusals_say_what_to_do() -> None:
    def fails(error: type[EdgekitError], match: str, *blocks: Block, subject: Data | None = None) -> None:
        with pytest.raises(error, match=match):
            apply(model(), blocks, subject or data())

    fails(InputError, r"`binary` needs `ptq` after it", block())
    fails(InputError, r"`qat` cannot train 1-bit layers", block(epochs=1), Block("qat", edgekit.recipe.QAT()), block("ptq"))
    fails(
        InputError, r"'nowhere' fits no layer with weights; layers are called", block(scopes={"nowhere": "float"}), block("ptq")
    )
    fails(ModelError, r"no layer of the model becomes binary", block(scopes={".*": "float"}), block("ptq"))
    fails(InputError, r"skip: a is a 1-bit layer", block(epochs=1), block("ptq", skip=("a",)))
    wrong = replace(data(), training=(data().training[0], data().training[1] + 7))  # type: ignore[index]
    fails(DataError, r"do not fit an output of shape", block(), block("ptq"), subject=wrong)
    with pytest.raises(RecipeError, match=r"recipe.yaml:4: compress.0: `binary` needs `ptq` after it"):
        parse("model: a.py:b\ndata: a.py:b\ncompress:\n  - binary: {epochs: 1}\n", files=False)
    with pytest.raises(RecipeError, match=r"recipe.yaml:6: compress.2: `lowrank` would undo `binary`"):
        parse("model: a.py:b\ndata: a.py:b\ncompress:\n  - rewrite: {norm: rms}\n  - binary\n  - lowrank\n  - ptq\n", files=False)
    with pytest.raises(RecipeError, match="ternary_weights are Brevitas's"):
        parse("model: a.py:b\ndata: a.py:b\ncompress:\n  - binary: {kind: ternary_weights}\n", files=False)
    with pytest.raises(RecipeError, match="last stage must have binary weights"):
        parse("model: a.py:b\ndata: a.py:b\ncompress:\n  - binary: {stages: [{epochs: 1, weights: real}]}\n", files=False)


def test_the_simulation_has_the_programs_own_thresholds() -> None:
    """Equal in every class, also where a value lies on its threshold: the input is quantized to few values."""
    graph, _ = binarize(g := capture(model(), (data().calibration,)), Binary(epochs=1), data(), g)
    found, plan = quantize(graph, PTQ(), data())
    x = torch.round(data().evaluation[0])
    from edgekit.compress.ptq.freeze import freeze

    torch.testing.assert_close(freeze(found, plan).run(x)[0], simulate(found, plan)(x), rtol=0, atol=1e-4)


def test_rounding_to_eight_bits_keeps_every_sign_of_the_layer_before() -> None:
    """Against the exact sums of the first layer, scaled: half of the values within half a step below 0 would turn otherwise."""
    graph, _ = binarize(g := capture(model(), (data().calibration,)), Binary(epochs=1), data(), g)
    from edgekit.compress.ptq.freeze import freeze

    tensors = dict(graph.module.named_parameters())
    assert not tensors["a.threshold"].any()
    program = freeze(*quantize(graph, PTQ(), data()))
    args, near = program.layer("first").args, 0
    for i in range(24):
        seen = program.trace(data().evaluation[0][i : i + 1])
        x = seen[program.layer("first").inputs[0]].double() - args["in_zp"]
        sums = F.conv2d(x, args["weight"].double(), padding=1) * (args["in_scale"] * args["weight_scale"].double()).view(-1, 1, 1)
        real = sums + tensors["first.bias"].double().view(-1, 1, 1)
        clear = real.abs() > args["in_scale"] * float(args["weight_scale"].max())
        near += int((clear & (real < 0) & (real > -args["out_scale"] / 2)).sum())
        found = unpack_signs(seen["a_sign"], 12).movedim(-1, 1)
        assert torch.equal(found[clear] > 0, (real >= 0)[clear])
    assert near > 10


def test_small_layers_are_trained_on_one_thread() -> None:
    graph = capture(model(), (data().calibration[:1],))  # type: ignore[index]
    before = torch.get_num_threads()
    with one_thread_if_small(graph, 64):
        assert torch.get_num_threads() == 1
    with one_thread_if_small(graph, 1 << 25):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
