"""Rules of chips: a graph that fits, and each limit broken by one, with the layer and the smallest edit named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from neuromorphic_nets import chain, conv_net, cuba_net, ends, if_, lif_net, nir
from typer.testing import CliRunner

from edgekit import cli
from edgekit import nir as files
from edgekit.errors import InputError
from edgekit.targets.neuromorphic.chip_rules import check
from edgekit.targets.neuromorphic.chips import CHIPS


def xylo_net(**sizes: Any) -> Any:
    """A network that every Xylo takes."""
    return cuba_net(**{"hidden": 60, "outputs": 8, "reset": "subtract", "tie": "ge", "spikes": 15, "last": {"spikes": 1}} | sizes)


def wide_xylo() -> Any:
    """Three hidden layers of 600 neurons: none of them is as large as what is too much."""
    weights, neurons = xylo_net(hidden=600).nodes["fc1"], xylo_net(hidden=600).nodes["c1"]
    source, sink = ends((16,), (8,))
    between = {f"fc{i}": nir.Linear(np.ones((600, 600))) for i in (2, 3)}
    last = {"fc4": nir.Linear(np.ones((8, 600))), "out": sink}
    return chain(
        {
            "input": source,
            "fc1": weights,
            "c1": neurons,
            "fc2": between["fc2"],
            "c2": neurons,
            "fc3": between["fc3"],
            "c3": neurons,
        }
        | last
    )


def convolution(
    channels: int = 4, kernel: tuple[int, int] = (3, 3), stride: int = 1, groups: int = 1, side: int = 16, inputs: int = 2
) -> Any:
    """One convolution and IF neurons."""
    weight = np.ones((channels, inputs // groups, *kernel))
    rows, columns = ((side - k) // stride + 1 for k in kernel)
    shape = (channels, rows, columns)
    source, sink = ends((inputs, side, side), shape)
    node = nir.Conv2d((side, side), weight, stride, 0, 1, groups, np.zeros(channels))
    return chain({"input": source, "conv": node, "if1": if_(shape, start=0.0), "out": sink})


def test_what_fits_fits() -> None:
    for name in ("xylo-audio-2", "xylo-audio-3", "xylo-imu"):
        found = check(xylo_net(), name)
        assert found.ok and not found.breaches and found.used["inputs"] == (16, 16)
    for name in ("dynapcnn", "speck2f"):
        found = check(conv_net(), name)
        assert found.ok and not found.breaches and len(set(found.cores.values())) == 3
    for name in ("loihi1", "loihi2"):
        assert check(lif_net(), name).breaches == ()


@pytest.mark.parametrize(
    ("chip", "graph", "words"),
    [
        ("xylo-audio-2", lambda: xylo_net(inputs=64), "layer input: input channels are 64, 16 allowed; leave 16"),
        ("xylo-audio-2", lambda: xylo_net(hidden=1001), "layer c1: hidden neurons .* 1,001, 1,000 allowed; remove 1 of"),
        ("xylo-audio-3", lambda: xylo_net(hidden=993), "hidden neurons of all layers are 993, 992 allowed"),
        ("xylo-imu", lambda: xylo_net(hidden=500), "hidden neurons of all layers are 500, 496 allowed; remove 4 of its 500"),
        ("xylo-imu", lambda: xylo_net(hidden=1000), "are 1,000, 496 allowed; remove 504 of its 1,000"),
        ("xylo-imu", wide_xylo, "are 1,800, 496 allowed; remove 1,304, of this largest layer and others"),
        ("xylo-audio-2", lambda: xylo_net(outputs=10), "layer c2: output neurons are 10, 8 allowed; leave out 2 classes"),
        ("xylo-imu", lambda: xylo_net(outputs=17), "output neurons are 17, 16 allowed"),
        ("xylo-audio-2", lambda: xylo_net(spikes=40), "layer c1: spikes a step are 40, 31 allowed"),
        ("xylo-audio-2", lambda: xylo_net(reset="zero"), "layer c1: reset is zero, subtract allowed; train it with"),
        ("xylo-audio-2", lif_net, "layer lif1: neurons are LIF, CubaLIF allowed; train it with CubaLIF"),
        ("xylo-audio-2", lambda: xylo_net(hidden=100, outputs=70), r"layer c1: the largest fan-out is 70, 63 allowed \(this"),
        ("loihi1", conv_net, "layer if1: reset is subtract, zero allowed"),
        ("loihi1", lambda: conv_net(reset="zero", start=0.0), ""),
        ("loihi1", lambda: cuba_net(inputs=5000), "layer c1: neurons heard by a core are 5,000, 4,096 allowed; hear"),
        ("dynapcnn", lambda: convolution(kernel=(3, 5)), "layer conv: the kernel is 3 x 5, square allowed; fill"),
        ("dynapcnn", lambda: convolution(kernel=(17, 17), side=40), "layer conv: the kernel's side is 17, 16 allowed"),
        ("dynapcnn", lambda: convolution(stride=3), "layer conv: the stride is 3, 1, 2, 4, 8 allowed; use 2"),
        ("dynapcnn", lambda: convolution(groups=2), "layer conv: groups and dilation are 2 and 1"),
        ("dynapcnn", lambda: convolution(1100, (1, 1), side=2), "layer if1: output channels are 1,100, 1,024 allowed"),
        ("dynapcnn", lambda: convolution(64, side=128), "layer if1: words for kernels and neurons are .* halve"),
        ("dynapcnn", lambda: convolution(side=200), "layer input: the input's larger side is 200, 128 allowed"),
        ("dynapcnn", lambda: conv_net(pool="AvgPool2d"), "layer pool: the pool is AvgPool2d, SumPool2d allowed; use SumPool2d"),
        ("speck2f", lif_net, "layer lif1: neurons are LIF, IF allowed"),
    ],
)  # fmt: skip
def test_a_broken_rule_names_layer_limit_and_edit(chip: str, graph: Callable[[], Any], words: str) -> None:
    found = check(graph(), chip)
    told = [str(breach) for breach in found.breaches]
    if not words:
        assert told == []
        return
    assert any(re.search(words, line) for line in told), told
    assert found.ok == all("not confirmed" in line for line in told)


def test_layers_are_placed_on_cores_that_hold_them() -> None:
    """16 channels of 16 x 256 words of kernels fill a core of 64 Ki; 256 channels are 16 times too many."""

    def stack(count: int) -> Any:
        source, sink = ends((16, 6, 6), (256, 6 - 2 * count, 6 - 2 * count))
        nodes: dict[str, Any] = {"input": source}
        for at in range(count):
            inputs, side = (16 if at == 0 else 256), 6 - 2 * at
            nodes[f"c{at}"] = nir.Conv2d((side, side), np.ones((256, inputs, 3, 3)), 1, 0, 1, 1, np.zeros(256))
            nodes[f"n{at}"] = if_((256, side - 2, side - 2), start=0.0)
        return chain(nodes | {"out": sink})

    found = check(stack(1), "dynapcnn")
    assert found.ok and found.cores["n0"] in (5, 6)
    told = [str(breach) for breach in check(stack(2), "dynapcnn").breaches]
    assert len(told) == 1 and told[0].startswith("layer n1: words for kernels and neurons are 1,048,576 and 1,024")


def test_every_limit_says_where_it_is_from() -> None:
    assert len(CHIPS) == 7
    for chip in CHIPS.values():
        assert all(limit.source and limit.value > 0 for limit in chip.limits.values())
    doubtful = {(name, what) for name, chip in CHIPS.items() for what, limit in chip.limits.items() if not limit.confirmed}
    assert ("xylo-audio-2", "fan_out") in doubtful and ("xylo-audio-2", "hidden") not in doubtful
    with pytest.raises(InputError, match="chip 'truenorth' is unknown; choose one of: xylo-audio-2"):
        check(lif_net(), "truenorth")


def test_describe_prints_layers_and_what_chips_say(tmp_path: Path) -> None:
    path = tmp_path / "net.nir"
    files.write(path, xylo_net(inputs=64))
    ended = CliRunner().invoke(cli.app, ["describe", str(path), "--chip", "xylo-audio-2", "--json"])
    found = json.loads(ended.stdout)
    assert ended.exit_code == 1 and [row["layer"] for row in found["layers"]] == ["c1", "c2"]
    (chip,) = found["chips"]
    assert not chip["ok"] and chip["breaches"][0]["found"] == "64" and chip["used"]["hidden"] == [60, 1000]
    ended = CliRunner().invoke(cli.app, ["describe", str(path), "--chip", "loihi2", "--chip", "xylo-imu"])
    assert ended.exit_code == 1 and "does not fit" in ended.stdout and "rockpool, syns63300/xylo_mapper.py" in ended.stdout
    ended = CliRunner().invoke(cli.app, ["describe", str(path)])
    assert ended.exit_code == 0 and "it does not say how many steps to run" in ended.stdout
    graph = files.read(path)
    graph.metadata = {**graph.metadata, "steps": 6, "encoding": "sequence", "readout": "accumulate", "gain": 0.5}
    files.write(path, graph)
    ended = CliRunner().invoke(cli.app, ["describe", str(path)])
    assert "steps 6, encoding sequence, readout accumulate, gain 0.5" in ended.stdout
