"""What a target cannot take is said in one sentence with the model's line and a remedy, before any converter runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import residual_net
from torch import Tensor, nn

from edgekit.compress.explain import explain_export_error
from edgekit.compress.ptq import PTQ
from edgekit.compress.ptq.quantize import quantize_model
from edgekit.data import Data
from edgekit.errors import UnsupportedError
from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.targets import get
from edgekit.targets.accepted import ACCEPTED
from edgekit.targets.onnx_rules import RULES
from edgekit.targets.preflight import Problem, check_model, check_program

TARGETS = ("executorch", "tflite", "onnx")
X = (torch.zeros(1, 4),)


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).abs()


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.double() @ x.double().T).float()


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Number(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, : int(x.sum().item())]


class InView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] = 0
        return y


class InInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) + 1


class State(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.hidden.add_(x)
        return self.hidden * 2


class Positions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.nonzero()


class Vectors(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svd(x)[1]


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy())


class Fine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout())
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(torch.cat([self.pool(y), self.pool(F.relu(y + 1))], 0).flatten(1).mean(0, keepdim=True))


class Inside(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(4, 4), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))


def export(model: nn.Module, x: tuple[Tensor, ...] = X, **settings: Any) -> Any:
    return torch.export.export(model.eval(), x, strict=False, **settings)


def line_of(model: type[nn.Module], text: str) -> str:
    """ "file.py:line" of the line of a model's class that holds the text."""
    lines, start = inspect.getsourcelines(model)
    return f"{Path(__file__).name}:{start + next(i for i, line in enumerate(lines) if text in line)}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("model", "text", "reason", "remedy"),
    [
        (Spectrum, "rfft", "fft_rfft gives complex numbers", "before the model"),
        (Double, "double", "to gives float64", "remove .double()"),
        (InView, "y[:, 0] = 0", "fill_ writes in place into a view", "torch.where"),
        (Positions, "nonzero", "shape or value that nonzero gives depends on the data", "mask of the full size"),
        (Vectors, "svd", "operator linalg_svd is not taken by", "replace it by"),
    ],
)
def test_one_sentence_with_line_and_remedy(target: str, model: type[nn.Module], text: str, reason: str, remedy: str) -> None:
    problems = check_model(export(Inside(model())), target)
    assert len(problems) == 1, [str(p) for p in problems]
    (problem,) = problems
    assert problem.layer == "inner" and problem.source == line_of(model, text)
    assert reason in problem.reason and remedy in problem.remedy
    assert str(problem) == f"layer inner ({problem.source}): {problem.reason}; {problem.remedy}" and "\n" not in str(problem)


@pytest.mark.parametrize(
    ("model", "reason"),
    [(State, "it writes to its buffer hidden at each call"), (InInput, "it writes into its input x")],
)
def test_state_and_written_inputs(model: type[nn.Module], reason: str) -> None:
    exported = export(model()).run_decompositions({})
    assert [p.reason for p in check_model(exported, "onnx")] == [reason]


def test_a_dynamic_batch() -> None:
    exported = export(nn.Linear(4, 4), (torch.zeros(2, 4),), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=9)},))
    (problem,) = check_model(exported, "tflite")
    assert str(problem) == "the model: input input has a dynamic batch; capture it without dynamic_shapes, for a batch of one"


def test_a_float64_input() -> None:
    problems = check_model(export(Double(), (torch.zeros(2, 4, dtype=torch.float64),)), "tflite")
    assert [p.reason for p in problems] == ["input x is float64"]


@pytest.mark.parametrize("target", TARGETS)
def test_an_ordinary_model_has_no_problem(target: str) -> None:
    assert check_model(export(Fine(), (torch.zeros(1, 3, 12, 12),)), target) == []
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert check_model(export(encoder, (torch.zeros(1, 5, 8),)), target) == []


@pytest.mark.parametrize(
    ("model", "text", "sentence"),
    [
        (Branch, "if x.sum()", "takes a branch that depends on the values of a tensor; compute both branches"),
        (Number, "int(x.sum().item())", "turns the values of a tensor into a size or a Python number"),
        (Numpy, "", "leaves torch for numpy"),
    ],
)
def test_failures_of_export(model: type[nn.Module], text: str, sentence: str) -> None:
    with pytest.raises(Exception) as failure:
        export(model())
    said = explain_export_error(failure.value)
    assert sentence in said and "\n" not in said
    if text:
        assert said.startswith(line_of(model, text))


def test_an_unknown_failure_of_export() -> None:
    said = explain_export_error(RuntimeError("\n  something odd\nand more"))
    assert said == "torch.export cannot capture the model (something odd)"


def program(*layers: nn.Module, shape: tuple[int, ...] = (1, 4), sources: dict[str, str] | None = None) -> FrozenProgram:
    return freeze_module(nn.Sequential(*layers).eval(), (torch.zeros(shape),), sources=sources)


def quantizer(bits: int = 8) -> FrozenOp:
    return FrozenOp("quantize", 1, {}, scale=0.1, zero_point=0, bits=bits)


def dequantizer() -> FrozenOp:
    return FrozenOp("dequantize", 1, {}, scale=0.1, zero_point=0)


@pytest.mark.parametrize("target", TARGETS)
def test_sixteen_bit_activations(target: str) -> None:
    sixteen = program(quantizer(16), dequantizer(), sources={"0": "net.py:7"})
    if target == "tflite":
        check_program(sixteen, target)
        return
    with pytest.raises(UnsupportedError) as failure:
        check_program(sixteen, target)
    assert str(failure.value) == (
        f"target {target}, layer 0 (net.py:7): its activations have 16 bits, {target} takes 8; "
        "set activations: int8; the target tflite takes int16"
    )


@pytest.mark.parametrize("target", TARGETS)
def test_a_float_operator_in_a_frozen_program(target: str) -> None:
    with pytest.raises(UnsupportedError, match=r"layer 1: fft_rfft gives complex numbers"):
        check_program(program(dequantized(), Spectrum()), target)


def dequantized() -> nn.Module:
    return nn.Sequential(quantizer(), dequantizer())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((quantizer(),), "its integers go to the program's output; put a dequantize operator between"),
        ((quantizer(), nn.Flatten(0), dequantizer()), "its integers go to the float operator"),
    ],
)
def test_integers_that_leave_the_quantized_part(layers: tuple[nn.Module, ...], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        check_program(program(*layers), "onnx")


@pytest.mark.parametrize("target", TARGETS)
def test_a_full_program_passes(target: str) -> None:
    check_program(residual_net(4), target)


def test_every_frozen_operator_has_a_rule() -> None:
    from edgekit.frozen import ops
    from edgekit.frozen.binary_ops import BINARY_OPS
    from edgekit.frozen.dynamic_ops import DYNAMIC_OPS
    from edgekit.targets.spiking_rules import UNLOWERED, spiking_rules

    registered = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("edgekit::")
    }
    assert {"qconv2d", "qlinear", "quantize"} <= registered and hasattr(ops.OPS, "qconv2d")
    spiking = set(spiking_rules()) | UNLOWERED
    others = BINARY_OPS | DYNAMIC_OPS | spiking  # rules of their own, in binary_int8, executorch_rules and tflite_dynamic
    assert others <= registered and registered - others == set(RULES)


def test_problem_of_the_model_itself() -> None:
    assert str(Problem("", "", "", "reason", "remedy")) == "the model: reason; remedy"


TAKEN: list[Callable[[Tensor], Tensor]] = [
    torch.abs, torch.exp, torch.rsqrt, torch.tanh, F.gelu, F.silu, F.hardswish, F.leaky_relu, F.softplus, torch.erf, torch.floor,
    lambda x: x.clamp(0.6, 1.2),
    lambda x: torch.where(x > 1, x, x * 2), lambda x: x.masked_fill(x > 1, 0.0), lambda x: x.cumsum(1),
    lambda x: x.flatten(1) + 1,
    lambda x: x.transpose(1, 2) * 2, lambda x: torch.stack([x, x * 2], 1), lambda x: x.chunk(2, 1)[1] + 1,
    lambda x: x.flip(1) + 1, lambda x: x.repeat(1, 2, 1) + 1, lambda x: x.mean(1), lambda x: x.amax(1), lambda x: x.var(1),
    lambda x: x.softmax(1), lambda x: x.logsumexp(1),
    lambda x: x @ x.transpose(1, 2), lambda x: torch.einsum("bij,bkj->bik", x, x),
    lambda x: F.layer_norm(x, (8,)), lambda x: F.pad(x, [1, 1]), lambda x: x.argmax(1).float(),
]  # fmt: skip


class All(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [f(x) for f in TAKEN]


def converted(target: str, exported: Any, x: Tensor) -> list[Any]:
    """What the target's own converter and runtime make of a float model."""
    if target == "onnx":
        import onnxruntime

        data = torch.onnx.export(exported, (), dynamo=True, verbose=False).model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(data)
        return list(session.run(None, {session.get_inputs()[0].name: x.numpy()}))
    if target == "tflite":
        import litert_torch

        return list(litert_torch.convert(All().eval(), (x,))(x))
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import portable_lib

    data = to_edge_transform_and_lower(exported).to_executorch().buffer
    return [y.numpy() for y in portable_lib._load_for_executorch_from_buffer(data).forward([x])]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_what_the_table_takes_converts(target: str) -> None:
    x = torch.rand(1, 6, 8) + 0.5
    exported = export(All(), (x,))
    assert check_model(exported, target) == []
    for found, expected in zip(converted(target, exported, x), All()(x), strict=True):
        torch.testing.assert_close(torch.as_tensor(found).reshape(expected.shape), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("target", "taken"), [("executorch", False), ("tflite", False), ("onnx", True)])
def test_an_operator_that_one_target_takes(target: str, taken: bool) -> None:
    class Sort(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort(1)[0]

    problems = check_model(export(Sort()), target)
    assert not problems if taken else "lower to onnx, or replace it" in problems[0].remedy
    assert ACCEPTED["sort"] == ("onnx",)


class Bessel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.special.bessel_j0(self.first(x)))


@pytest.mark.parametrize("target", TARGETS)
def test_lowering_says_what_the_check_says(target: str, tmp_path: Path) -> None:
    frozen = quantize_model(Bessel().eval(), Data(torch.randn(16, 4)), PTQ(observer="minmax"))
    with pytest.raises(UnsupportedError) as checked:
        check_program(frozen, target)
    with pytest.raises(
        UnsupportedError, match=r"layer special_bessel_j0 \(test_preflight\.py:\d+\): operator special_"
    ) as lowered:
        get(target).lower(frozen, tmp_path / "model")
    assert str(lowered.value) == str(checked.value)
    assert list(tmp_path.iterdir()) == []
