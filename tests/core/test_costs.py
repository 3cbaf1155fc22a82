"""Tables of costs: the shipped ones against their own measurements and counted kernels, works against a hand count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from float_models import Modules, build
from torch import nn

from edgekit import costs
from edgekit.compress.ptq import PTQ
from edgekit.compress.steps import apply
from edgekit.costs import Work
from edgekit.data import Data
from edgekit.errors import FormatError, InputError
from edgekit.frozen.work import weighted, works
from edgekit.recipe import Block

SHIPPED = costs.targets()


def test_every_firmware_and_host_target_has_a_table() -> None:
    assert {f"cortex-m{n}" for n in (0, 3, 4, 7, 55)} <= set(SHIPPED)


@pytest.mark.parametrize("target", SHIPPED)
def test_a_table_says_what_it_was_made_from_and_how_far_off_it_is(target: str) -> None:
    table = costs.table(target)
    assert table.target == target and table.machine and table.method
    assert table.unit == ("instructions" if target.startswith("cortex-m") else "microseconds")
    assert table.nets and all(n["measured"] > 0 for n in table.nets)
    assert table.largest_error is not None and table.error is not None and table.error <= table.largest_error
    if target.startswith("cortex-m"):
        assert table.largest_error < 0.06


@pytest.mark.parametrize("target", [t for t in SHIPPED if t.startswith("cortex-m")])
def test_the_fit_gives_the_measured_layers_back(target: str) -> None:
    table = costs.table(target)
    rows = json.loads((costs.TABLES / f"{target}.json").read_text())["rows"]
    layers = [(Work(**r["works"][0]), r["cost"]) for r in rows if r["bytes"] == 0 and r["cost"] > 5000]
    assert len(layers) > 60
    errors = sorted(abs((table.cost(w) or 0) / cost - 1) for w, cost in layers)
    assert errors[len(errors) // 2] < 0.03 and errors[int(0.9 * len(errors))] < 0.2


def test_a_kernel_counted_by_another_script() -> None:
    """fc 256x256 and conv 3x3 16x16x32->32 on a Cortex-M4, by benchmarks/cortex_m_kernels.py: not among the table's layers."""
    recorded = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "firmware.json").read_text())["rows"]
    table = costs.table("cortex-m4")
    for name, work in (
        ("fc 256x256", weighted((1, 256), (256, 256), 1, 8)),
        ("fc 256x256 int4", weighted((1, 256), (256, 256), 1, 4)),
        ("conv 3x3 16x16x32->32", weighted((1, 32, 16, 16), (32, 32, 3, 3), 1, 8)),
        ("conv 1x1 16x16x64->64", weighted((1, 64, 16, 16), (64, 64, 1, 1), 1, 8)),
        ("depthwise 3x3 16x16x64", weighted((1, 64, 16, 16), (64, 1, 3, 3), 64, 8)),
    ):
        (counted,) = {
            r["instructions"]
            for r in recorded
            if r.get("kernel") == name and r["board"] == "mps2-an386" and r["kernel_set"] == "dsp"
        }
        assert table.cost(work) == pytest.approx(counted, rel=0.1), name


def test_works_of_a_program_against_a_hand_count() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 4, 1), nn.Flatten()
    )
    x = torch.randn(4, 3, 10, 10)
    block = Block("ptq", PTQ(weights="int4", keep_first_last_8bit=False))
    found = [w for _, w in works(apply(model.eval(), [block], Data(calibration=x)).program) if w.kind in costs.WEIGHTED]
    assert found == [
        Work("conv", 4, 8 * 25, 300, 8, 27, 9),
        Work("depthwise", 4, 8 * 25, 200, 8, 9, 9),
        Work("pointwise", 4, 4 * 25, 200, 4, 8, 1),
    ]
    assert [w.macs for w in found] == [200 * 27, 200 * 9, 100 * 8]


def test_a_float_clamp_is_part_of_the_layer_before_it() -> None:
    model, x = build(Modules, 4)
    from edgekit.compress.rewrite import Rewrite

    program = apply(model, [Block("rewrite", Rewrite(fuse=False))], Data(calibration=x)).program
    kinds = [w.kind for _, w in works(program)]
    assert "relu" not in kinds and kinds.count("conv") + kinds.count("pointwise") + kinds.count("depthwise") == 3
    assert all(w.bits == costs.FLOAT for _, w in works(program))


def test_what_targets_store() -> None:
    assert costs.stored_bits("executorch", "conv", 4) == 8 and costs.stored_bits("executorch", "linear", 2) == 4
    assert costs.stored_bits("tflite", "depthwise", 4) == 4 and costs.stored_bits("tflite", "conv", 2) == 4
    assert costs.stored_bits("cortex-m0", "conv", 2) == 2 and costs.stored_bits("onnx", "conv", 32) == 32


def test_onnx_computes_few_bit_weights_as_int8() -> None:
    table = costs.table("onnx")
    assert table.cost(weighted((1, 16, 8, 8), (16, 16, 3, 3), 1, 4)) == table.cost(weighted((1, 16, 8, 8), (16, 16, 3, 3), 1, 8))


def test_an_unknown_kind_has_no_cost_and_is_named() -> None:
    table, strange = costs.table("cortex-m4"), Work("fft", 32, 10, 10)
    assert table.cost(strange) is None
    assert table.total([strange]) == (table.call, [strange])


def test_damaged_or_missing_tables(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no table of costs"):
        costs.table("tflite", tmp_path)
    text = (costs.TABLES / "cortex-m4.json").read_text()
    (tmp_path / "cortex-m4.json").write_text(text[: len(text) // 2])
    with pytest.raises(FormatError, match="damaged"):
        costs.table("cortex-m4", tmp_path)
    value = json.loads(text)
    value["kinds"]["conv/8"]["terms"][1] = -1.0
    (tmp_path / "cortex-m0.json").write_text(json.dumps(value))
    with pytest.raises(FormatError, match="negative"):
        costs.table("cortex-m0", tmp_path)
