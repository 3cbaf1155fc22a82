"""Binary transformer encoders: the paper's identities, gradients, Hugging Face's own model, and the frozen program."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.compress.binary.baked import baked
from edgekit.compress.binary.bipft import (
    BinaryEncoder,
    BinaryEncoderLayer,
    BinaryLinear,
    Elastic,
    binary_weight,
)
from edgekit.compress.binary.cost import encoder_cost
from edgekit.compress.binary.encoder import Encoder, EncoderConfig, from_hugging_face
from edgekit.compress.binary.encoder_training import EncoderTraining, train_encoder
from edgekit.compress.ptq.settings import PTQ
from edgekit.compress.steps import apply
from edgekit.data import Data
from edgekit.errors import InputError, ModelError
from edgekit.recipe import Block

SMALL = EncoderConfig(layers=2, width=24, heads=3, hidden=40, positions=12, features=10, classes=4, pool="mean")
BASE = EncoderConfig(layers=12, width=768, heads=12, hidden=3072, positions=512, vocabulary=30522, types=2)


def frames(count: int = 48, tokens: int = 9) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, tokens, 10, generator=torch.Generator().manual_seed(0))
    return x, (x[:, :, 0].mean(1) > 0).long() + 2 * (x[:, :4, 1].mean(1) > 0).long()


def student(rank: int = 1, config: EncoderConfig = SMALL, **more: Any) -> BinaryEncoder:
    torch.manual_seed(0)
    return BinaryEncoder(Encoder(config), rank, **more)


def test_four_products_make_the_whole_one() -> None:
    """QK' = Q_b K_b' + Q_b R_k' + R_q K_b' + R_q R_k' with exact residuals."""
    q, k = torch.randn(2, 5, 7, 16, generator=torch.Generator().manual_seed(1))
    binarize = Elastic()
    qb, kb = binarize(q).detach(), binarize(k).detach()
    total = qb @ kb.mT + qb @ (k - kb).mT + (q - qb) @ kb.mT + (q - qb) @ (k - kb).mT
    torch.testing.assert_close(total, q @ k.mT, rtol=1e-5, atol=1e-5)


def test_binarizers_give_two_values() -> None:
    w = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) + 0.2
    torch.testing.assert_close(binary_weight(w).abs(), w.abs().mean().expand_as(w))
    assert torch.equal(binary_weight(w) >= 0, w >= w.mean())
    torch.testing.assert_close(binary_weight(w, rows=True).abs(), w.abs().mean(1, keepdim=True).expand_as(w))
    x = torch.rand(4, 5)
    signed, unsigned = Elastic(), Elastic(unsigned=True)
    torch.testing.assert_close(signed(x - 0.5).abs(), 2 * (x - 0.5).abs().mean().expand_as(x))
    values = unsigned(x)
    assert set(values.flatten().tolist()) <= {0.0, float(unsigned.alpha.detach())}
    assert torch.equal(values > 0, x >= unsigned.threshold())
    assert float(Elastic()(torch.zeros(3)).min()) > 0  # sign(0) = +1


def test_gradients_are_those_of_the_surrogates() -> None:
    """Finite differences of the clipped line for x; for alpha the sum of signs (LSQ's rule for unsigned), over sqrt(n)."""
    x = torch.tensor([-3.0, -0.4, 0.2, 0.9, 2.5], requires_grad=True)
    g = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    signed = Elastic()
    signed(x.detach())
    signed.alpha.data.fill_(1.0)
    (signed(x) * g).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and x.grad.tolist() == [0, 2, 3, 4, 0]
    assert float(signed.alpha.grad) == pytest.approx((-1 - 2 + 3 + 4 + 5) / 5**0.5)  # type: ignore[arg-type]
    unsigned, x.grad = Elastic(unsigned=True), None
    unsigned(x.detach().abs())
    unsigned.alpha.data.fill_(1.0)
    (unsigned(x) * g).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and x.grad.tolist() == [0, 0, 3, 4, 0]
    wanted = 3 * (0 - 0.2) + 4 * (1 - 0.9) + 5 * 1
    assert float(unsigned.alpha.grad) == pytest.approx(wanted / 5**0.5)  # type: ignore[arg-type]


def test_estimators_begin_at_nothing_and_have_a_small_rank() -> None:
    plain, with_rest = student(0), student(1)
    own = plain.state_dict()
    with_rest.load_state_dict({**with_rest.state_dict(), **own})
    x, _ = frames(4)
    assert torch.equal(plain(x), with_rest(x))
    for rank in (1, 2):
        layer = student(rank).layers[0].double()
        assert isinstance(layer, BinaryEncoderLayer)
        for p in layer.parameters():
            p.data.normal_()
        bracket, value = layer.estimates(torch.randn(2, 9, 24).double())
        assert bracket.shape == (2, 1, 9, 9) and value.shape == (2, 1, 9, 1)
        assert int(torch.linalg.matrix_rank(bracket.detach().double()).max()) <= 2 * rank
        layer.zero_grad()
        bracket.sum().backward()  # type: ignore[no-untyped-call]
        assert float(layer.main.weight.grad.abs().max()) > 0  # type: ignore[union-attr, operator]


def trained(rank: int) -> tuple[BinaryEncoder, list[float]]:
    torch.manual_seed(0)
    teacher = Encoder(SMALL)
    train_encoder(teacher, frames(), EncoderTraining(epochs=3))
    made = BinaryEncoder(teacher, rank)
    return made, train_encoder(made, frames(), EncoderTraining(epochs=4, learning_rate=2e-3), teacher)


def assert_same(plain: nn.Module, made: BinaryEncoder, x: Tensor) -> None:
    """In float64, whose sums of one size are exact: many values lie on a threshold."""
    import copy

    x = x.double() if x.is_floating_point() else x
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            found, wanted = copy.deepcopy(plain).double()(x), copy.deepcopy(made).double()(x)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_trained_encoder_freezes_to_packed_products(rank: int) -> None:
    made, losses = trained(rank)
    assert losses[-1] < losses[0]
    x, y = frames()
    plain = baked(made)
    assert_same(plain, made, x)
    found = apply(plain, [Block("ptq", PTQ())], Data(calibration=x, evaluation=(x, y)))
    kinds: dict[str, int] = {}
    for layer in found.program.layers:
        kinds[layer.op] = kinds.get(layer.op, 0) + 1
    assert kinds["binary_qlinear"] == 12 and kinds["binary_qmatmul"] == 4
    assert kinds["binarize"] == 12 + 8
    left = {u.op for u in found.program.unquantized}
    assert "linear" not in left and (("matmul" in left) == bool(rank))  # the estimators' thin products stay float
    torch.testing.assert_close(found.program.run(x)[0], found.simulation(x), rtol=0, atol=2e-2)
    agreement = (found.program.run(x)[0].argmax(1) == made(x).argmax(1)).float().mean()
    assert float(agreement) > 0.5  # of four classes: an int8 step may turn a sign, and few weights learned in four epochs
    ones = sum(layer.weight_bytes for layer in found.program.layers if layer.op == "binary_qlinear")
    widths = [(24, 24)] * 4 + [(40, 24), (24, 40)]
    bits = 2 * sum(o * i // 8 for o, i in widths)
    assert ones == bits + 2 * sum(8 * o for o, _ in widths)


def test_a_value_lies_on_the_same_side_of_its_threshold_in_both() -> None:
    """Half of all sums are whole multiples that may fall on a threshold: signs of queries, exact sums of the student's."""
    made, _ = trained(1)
    x, y = frames()
    found = apply(baked(made), [Block("ptq", PTQ(skip=("embeddings.input",)))], Data(calibration=x, evaluation=(x, y)))
    query = made.layers[0].query
    assert isinstance(query, BinaryLinear)
    on = 0
    for i in range(8):
        seen = found.program.trace(x[i : i + 1])["layers.0.query"]
        with torch.no_grad():
            wanted = query(made.embeddings(x[i : i + 1])).double()
        sums = torch.round(wanted / float(query.step().detach()))
        assert torch.equal(seen >= (found.program.layer("layers.0.query").out_zero_point or 0), sums >= 0)
        on += int((sums == 0).sum())
    assert on > 0


def test_products_of_signs_equal_torchs_in_the_program() -> None:
    """A transposed and a plain right operand, signed and unsigned left ones, with and without a factor."""

    class Products(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.view(-1, 2, 5, 9).softmax(-1) - 0.1
            a, b = torch.where(x >= 0.01, 1.0, -1.0), torch.where(x >= 0.02, 1.0, -1.0)
            c, d = torch.where(x >= 0.0, 1.0, 0.0), torch.where(x.transpose(-1, -2) >= 0.03, 1.0, -1.0)
            return torch.matmul(a, b.transpose(-1, -2)).exp() + torch.matmul(c, d).mul(0.25).exp()

    x = torch.randn(20, 90, generator=torch.Generator().manual_seed(0))
    found = apply(Products().eval(), [Block("ptq", PTQ())], Data(calibration=x, evaluation=(x, None)))
    assert [layer.op for layer in found.program.layers].count("binary_qmatmul") == 2
    torch.testing.assert_close(found.program.run(x)[0], Products()(x))  # up to 127 products a sum is an integer of its own


def test_a_sign_that_others_read_too_stays_float() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            signs = torch.where(x >= 0.0, 1.0, -1.0)
            return F.linear(signs, self.weight) + signs[:, :4]

    x = torch.randn(20, 8)
    found = apply(Shared().eval(), [Block("ptq", PTQ())], Data(calibration=x, evaluation=(x, None)))
    assert not [layer for layer in found.program.layers if layer.op.startswith("bin")]
    assert any("only signs that nothing but 1-bit layers" in u.reason for u in found.program.unquantized)


def test_hugging_faces_encoder_is_read() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
    config = transformers.BertConfig(**sizes, max_position_embeddings=16, attn_implementation="eager")
    theirs = transformers.BertModel(config).eval()
    ours = from_hugging_face(config.to_dict(), theirs.state_dict())
    ids = torch.randint(0, 50, (3, 11))
    with torch.no_grad():
        wanted, (sequence, pooled) = theirs(ids), ours(ids)
    torch.testing.assert_close(sequence, wanted.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, wanted.pooler_output, rtol=1e-5, atol=1e-5)
    binary = BinaryEncoder(ours)
    binary(ids)  # sizes start at the first batch
    assert_same(baked(binary), binary.eval(), ids)
    with pytest.raises(ModelError, match=r"lack layers\.0\.query\.weight"):
        weights = {k: v for k, v in theirs.state_dict().items() if "layer.0.attention.self.query" not in k}
        from_hugging_face(config.to_dict(), weights)
    with pytest.raises(ModelError, match=r"has shape \(50, 32\), the configuration says \(60, 32\)"):
        from_hugging_face({**config.to_dict(), "vocab_size": 60}, theirs.state_dict())
    with pytest.raises(ModelError, match="only bert with gelu"):
        from_hugging_face({**config.to_dict(), "model_type": "gpt2"})


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="no multiple of 5 heads"):
        EncoderConfig(width=24, heads=5, features=3)
    with pytest.raises(ModelError, match="either a vocabulary or a number of features"):
        EncoderConfig()


def test_accounting_counts_every_tensor() -> None:
    """Against the modules' own parameters."""
    config = EncoderConfig(layers=2, width=24, heads=3, hidden=40, positions=12, vocabulary=33, types=2, classes=4)
    real = encoder_cost(config, 9, binary=False)
    assert real.float_values == sum(p.numel() for p in Encoder(config).parameters())
    for rank in (0, 1, 2):
        made = BinaryEncoder(Encoder(config), rank)
        cost = encoder_cost(config, 9, binary=True, rank=rank)
        ones = [m for m in made.modules() if isinstance(m, BinaryLinear)]
        weights = sum(m.weight.numel() for m in ones) + made.embeddings.input.weight.numel()  # type: ignore[operator, union-attr]
        assert cost.binary_weights == weights
        scales = len(ones) + 33  # a size of each matrix, and of each row of the table
        assert cost.float_values == sum(p.numel() for p in made.parameters()) - weights + scales
        assert cost.memory == weights // 8 + 4 * cost.float_values


def test_products_are_those_that_torch_counts() -> None:
    from edgekit.frozen.float_layers import count_macs

    x, _ = frames(1)
    cost = encoder_cost(SMALL, 9, binary=False)
    assert (cost.flops - cost.elementwise) // 2 == count_macs(Encoder(SMALL).eval(), x)
    binary = encoder_cost(SMALL, 9, binary=True, rank=1)
    made = student(1)
    made(x)
    assert (binary.bops + binary.flops - binary.elementwise) // 2 == count_macs(made.eval(), x)


def test_bert_base_at_128_tokens() -> None:
    """The figures of the paper's table and of a count by hand: 109.5 M weights, 11.17 G multiply-accumulates."""
    real = encoder_cost(BASE, 128, binary=False)
    one, half = (encoder_cost(BASE, 128, binary=True, side_bytes=b) for b in (4, 2))
    assert real.memory / 2**20 == pytest.approx(417.6, abs=0.1)
    assert one.binary_weights / 8 / 2**20 == pytest.approx(12.99, abs=0.01)
    assert real.products / 2e9 == pytest.approx(11.17, abs=0.01)
    assert one.bops / 64 / 1e9 == pytest.approx(0.349, abs=0.001)
    assert real.memory / one.memory == pytest.approx(26.8, abs=0.1) and real.memory / half.memory == pytest.approx(29.2, abs=0.1)
    assert real.products / one.products == pytest.approx(61, abs=0.5)
    assert round(round(real.operations / 1e9, 1) / round(one.products / 1e9, 1)) == 56  # as the table rounds: 22.4 / 0.4


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [str(Path(sys.argv[1]).parents[1]), str(Path(sys.argv[1]).parent)]
from test_binary_encoder import resumable
resumable(Path(sys.argv[2]), lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done == 5 else None)
"""


def resumable(folder: Path | None, progress: Any = None) -> tuple[BinaryEncoder, list[float]]:
    """Six steps in three epochs, with a teacher."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = BinaryEncoder(teacher := Encoder(SMALL), rank=1)
    how = EncoderTraining(epochs=3, batch_size=24, learning_rate=2e-3)
    return made, train_encoder(made, frames(), how, teacher, progress, folder)


@pytest.mark.slow
def test_a_killed_training_goes_on_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    whole, losses = resumable(None)
    ended = subprocess.run([sys.executable, "-c", _KILLED, __file__, str(tmp_path)], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    kept = (tmp_path / "encoder.safetensors").read_bytes()
    steps: list[int] = []
    made, again = resumable(tmp_path, lambda done, total: steps.append(done))
    assert steps == [5, 6] and again == losses
    for (name, a), b in zip(whole.state_dict().items(), made.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    finished, same = resumable(tmp_path, lambda done, total: steps.append(done))
    assert steps == [5, 6] and same == losses and torch.equal(finished(frames()[0]), whole(frames()[0]))
    torch.set_num_threads(threads)
    with pytest.raises(InputError, match="not a checkpoint of this training"):
        train_encoder(student(), frames(), EncoderTraining(epochs=4), folder=tmp_path)
    (tmp_path / "encoder.safetensors").write_bytes(kept[:1000])
    with pytest.raises(InputError, match=r"encoder.safetensors: damaged"):
        resumable(tmp_path)
