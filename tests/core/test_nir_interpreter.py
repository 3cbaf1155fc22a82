"""The NIR interpreter against torch in float64, loops written out, and what the NIR paper's authors recorded."""

from __future__ import annotations

import os
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from edgekit.errors import InputError, UnsupportedError
from edgekit.frozen.ops import OPS
from edgekit.nir import interpret, read

DATA = Path(os.environ.get("EDGEKIT_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data"))
SEEDS = st.integers(0, 2**32 - 1)


def chain(*nodes: Any, shape: tuple[int, ...], **metadata: Any) -> nir.NIRGraph:
    """input -> n0 -> n1 -> ... -> output."""
    named = {"input": nir.Input({"input": np.array(shape)})} | {f"n{i}": node for i, node in enumerate(nodes)}
    after = nodes[-1].output_type["output"] if nodes else shape
    named["output"] = nir.Output({"output": None if after is None else np.array(after)})
    names = list(named)
    return nir.NIRGraph(named, list(pairwise(names)), metadata=metadata, type_check=False)


def value_of(node: Any, x: np.ndarray) -> np.ndarray:
    return interpret(chain(node, shape=x.shape[2:]), x).output


@given(
    SEEDS, st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([1, 2]),
    st.sampled_from([0, 1, (2, 1), "same", "valid"]), st.sampled_from([1, 3]),
)  # fmt: skip
def test_convolutions_equal_torchs(seed: int, groups: int, stride: int, dilation: int, padding: Any, kw: int) -> None:
    rng = np.random.default_rng(seed)
    stride = 1 if padding == "same" else stride
    x, w, b = rng.standard_normal((2, 3, 4, 9, 8)), rng.standard_normal((6, 4 // groups, 2, kw)), rng.standard_normal(6)
    found = value_of(nir.Conv2d((9, 8), w, stride, padding, dilation, groups, b), x)
    t = [torch.from_numpy(v) for v in (x.reshape(6, 4, 9, 8), w, b)]
    with warnings.catch_warnings(action="ignore"):
        wanted = F.conv2d(*t, stride, padding, dilation, groups).numpy()
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=1e-12)
    if not isinstance(padding, tuple):
        line = value_of(nir.Conv1d(8, w[:, :, 0], stride, padding, dilation, groups, b), x[..., 0, :])
        flat = F.conv1d(t[0][:, :, 0], t[1][:, :, 0], t[2], stride, padding, dilation, groups).numpy()
        np.testing.assert_allclose(line.reshape(flat.shape), flat, atol=1e-12)


def test_the_other_stateless_nodes_equal_torchs() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 6, 7))
    t = torch.from_numpy(x.reshape(6, 4, 6, 7))
    pool = [np.array(v) for v in ([3, 2], [2, 1], [1, 1])]
    mean = F.avg_pool2d(t, (3, 2), (2, 1), (1, 1)).numpy()
    assert np.allclose(value_of(nir.AvgPool2d(*pool), x).reshape(mean.shape), mean)
    assert np.allclose(value_of(nir.SumPool2d(*pool), x).reshape(mean.shape), mean * 6)
    assert np.array_equal(value_of(nir.Flatten({"input": np.array([4, 6, 7])}, 1, 2), x), x.reshape(2, 3, 4, 42))
    assert np.array_equal(value_of(nir.Flatten({"input": np.array([4, 6, 7])}, 0, -1), x), x.reshape(2, 3, 168))
    scale = rng.standard_normal((4, 1, 1))
    assert np.array_equal(value_of(nir.Scale(scale), x), x * scale)
    flat = np.round(x[..., 0, 0] * 2) / 2
    assert np.array_equal(value_of(nir.Threshold(np.full(4, 0.5)), flat), flat > 0.5)
    assert np.array_equal(value_of(nir.Threshold(np.full(4, 0.5), metadata={"tie": "ge"}), flat), flat >= 0.5)
    w, b = rng.standard_normal((5, 4)), rng.standard_normal(5)
    assert np.allclose(value_of(nir.Affine(w, b), flat), flat @ w.T + b)
    assert np.allclose(value_of(nir.Linear(w), flat), flat @ w.T)
    many = rng.standard_normal((4, 3, 6))  # four matrices, one for each row of the input
    rows = value_of(nir.Affine(many, rng.standard_normal((4, 3))), x[..., 0, :6] if x.shape[-2] == 4 else x[..., :, 0])
    assert rows.shape == (2, 3, 4, 3)
    assert np.allclose(value_of(nir.Linear(many), x[..., 0])[1, 2, 3], many[3] @ x[1, 2, 3, :, 0])


def test_a_delay_is_whole_steps() -> None:
    x = np.arange(1.0, 13.0).reshape(4, 1, 3)
    graph = chain(nir.Delay(np.array([0.0, 1e-3, 2e-3])), shape=(3,), dt=1e-3)
    assert interpret(graph, x).output[:, 0].T.tolist() == [[1, 4, 7, 10], [0, 2, 5, 8], [0, 0, 3, 6]]
    with pytest.raises(UnsupportedError, match=r"node n0 \(Delay\): a delay of 0\.5 steps"):
        interpret(chain(nir.Delay(np.array([5e-4])), shape=(1,), dt=1e-3), x[..., :1])


NEURONS = {
    "LIF": ("tau", "r", "v_leak", "v_threshold", "v_reset"),
    "IF": ("r", "v_threshold", "v_reset"),
    "CubaLIF": ("tau_syn", "tau_mem", "r", "v_leak", "w_in", "v_threshold", "v_reset"),
    "LI": ("tau", "r", "v_leak"),
    "I": ("r",),
    "CubaLI": ("tau_syn", "tau_mem", "r", "v_leak", "w_in"),
}
NAMES = {"LIF": "lif", "IF": "if", "CubaLIF": "cuba_lif", "LI": "li", "I": "i", "CubaLI": "cuba_li"}


@pytest.mark.parametrize("which", NEURONS)
@given(SEEDS, st.sampled_from(["subtract", "zero", "value"]), st.sampled_from(["ge", "gt"]), st.sampled_from([1, 1, 4]))
def test_neurons_equal_the_frozen_operators_in_float64(which: str, seed: int, reset: str, tie: str, most: int) -> None:
    """The operators are compared with loops over single neurons in test_spiking_ops."""
    rng = np.random.default_rng(seed)
    tie = "ge" if most > 1 else tie
    p = {name: rng.integers(-4, 9, (2, 3)) / 4.0 for name in NEURONS[which]}
    p |= {name: rng.uniform(1, 4, (2, 3)) for name in p if name.startswith("tau")}
    fires = which in ("LIF", "IF", "CubaLIF")
    if fires:
        p["v_threshold"] = rng.integers(1, 5, (2, 3)) / 4.0
        p["v_reset"] = np.zeros((2, 3)) if reset == "zero" else p["v_reset"]
    start = rng.integers(-4, 5, (2, 3)) / 4.0
    x = rng.integers(-4, 9, (7, 2, 2, 3)) / 4.0
    metadata = {"reset": reset, "tie": tie, "v_init": start, "max_spikes": most}
    graph = chain(getattr(nir, which)(**p, metadata=metadata), shape=(2, 3), dt=0.5)
    args = [torch.from_numpy(v) for v in (*p.values(), start)]
    tail = (0.5, 7, reset, tie, most) if fires else (0.5, 7)
    wanted = getattr(OPS, f"{NAMES[which]}_sequence").default(torch.from_numpy(x.reshape(14, 2, 3)), *args, *tail)
    assert np.array_equal(interpret(graph, x).output.reshape(14, 2, 3), wanted.numpy())


def recurrent(feedback: np.ndarray, forward: np.ndarray) -> nir.NIRGraph:
    """input -> cell (in a graph of its own: affine -> lif -> rec -> lif) -> output."""
    lif = nir.LIF(*(np.full(3, v) for v in (2.0, 1.5, 0.0, 0.5)), metadata={"reset": "subtract", "tie": "ge"})
    inner = {"in": nir.Input({"input": np.array([2])}), "w": nir.Linear(forward), "lif": lif, "rec": nir.Linear(feedback)}
    inner["out"] = nir.Output({"output": np.array([3])})
    cell = nir.NIRGraph(inner, [("in", "w"), ("w", "lif"), ("lif", "rec"), ("rec", "lif"), ("lif", "out")], type_check=False)
    nodes = {"input": nir.Input({"input": np.array([2])}), "cell": cell, "output": nir.Output({"output": np.array([3])})}
    return nir.NIRGraph(nodes, [("input", "cell"), ("cell", "output")], metadata={"dt": 1.0}, type_check=False)


def test_recurrence_carries_the_spikes_of_the_step_before() -> None:
    rng = np.random.default_rng(1)
    feedback, forward, x = rng.standard_normal((3, 3)), rng.standard_normal((3, 2)), rng.standard_normal((20, 4, 2))
    found = interpret(recurrent(feedback, forward), x, record=None)
    v, s, wanted = np.zeros((4, 3)), np.zeros((4, 3)), []
    for t in range(20):
        v = v + 0.5 * (-v + 1.5 * (x[t] @ forward.T + s @ feedback.T))
        s = (v >= 0.5).astype(float)
        v = v - 0.5 * s
        wanted.append(s)
    assert 10 < np.sum(wanted) < 200
    assert np.array_equal(found.output, np.stack(wanted))
    assert np.array_equal(found.values["cell.lif"], found.output)
    assert np.allclose(found.membranes["cell.lif"][-1], v)


def test_a_loop_over_two_layers_is_cut_where_it_returns() -> None:
    """a -> b in the same step, b -> a in the next."""

    def unit(size: int) -> Any:
        return nir.IF(np.ones(size), np.ones(size), metadata={"reset": "subtract", "tie": "ge"})

    nodes = {
        "input": nir.Input({"input": np.array([1])}), "z": unit(1), "go": nir.Linear(np.array([[1.0]])), "a": unit(1),
        "back": nir.Linear(np.array([[0.5]])), "output": nir.Output({"output": np.array([1])}),
    }  # fmt: skip
    edges = [("input", "z"), ("z", "go"), ("go", "a"), ("a", "back"), ("back", "z"), ("a", "output")]
    found = interpret(
        nir.NIRGraph(nodes, edges, type_check=False), np.array([1.0, 0, 0.5, 0, 0, 0]).reshape(6, 1, 1), record=None
    )
    assert found.values["z"].ravel().tolist() == [1, 0, 1, 0, 0, 0]
    assert found.values["a"].ravel().tolist() == [1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.edges.append(("lost", "n0")), "there is no node lost"),
        (lambda g: g.edges.remove(("input", "n0")), "node n0 gets no value"),
        (lambda g: g.nodes["n0"].metadata.update(reset="soft"), r"node n0 \(LIF\): metadata reset is 'soft'"),
        (lambda g: g.nodes["n0"].metadata.update(reset="zero", v_init="x"), "node n0 .*v_init or max_spikes is no number"),
        (lambda g: g.nodes["n0"].metadata.update(v_init=np.zeros(5)), "node n0: its v_init does not fit"),
        (lambda g: g.nodes["n0"].metadata.update(max_spikes=3), "max_spikes 3 needs tie ge"),
        (lambda g: g.metadata.update(dt=0.0), "dt is 0.0, a positive number expected"),
        (lambda g: g.nodes.update(n0=nir.Affine(np.zeros((3, 3)), np.zeros(3))), r"node n0 \(Affine\) does not take a value"),
        (lambda g: g.nodes.update(n0=nir.I(np.ones((2, 2)))), "node n0: its parameters do not fit"),
        (lambda g: g.nodes.update(n0=chain(shape=(2,), dt=1), n1=type("Foo", (), {})()), "node n1 is a Foo"),
    ],
)
def test_a_graph_that_cannot_be_run_is_refused_by_its_node(change: Any, message: str) -> None:
    graph = chain(nir.LIF(*(np.ones(2) for _ in range(4))), shape=(2,))
    change(graph)
    with pytest.raises(UnsupportedError, match=message):
        interpret(graph, np.zeros((3, 1, 2)))


def test_inputs_are_checked() -> None:
    graph = chain(nir.I(np.ones(2)), shape=(2,))
    with pytest.raises(InputError, match=r"input input: shape \(3, 2\) given, \(T, N, 2\) expected"):
        interpret(graph, np.zeros((3, 2)))
    with pytest.raises(InputError, match="inputs x given, the graph has input"):
        interpret(graph, {"x": np.zeros((3, 1, 2))})


def paper(name: str) -> Path:
    path = DATA / "neuromorphic" / "nir_paper" / name
    if not path.exists():
        pytest.skip("the NIR paper's files are not here; set EDGEKIT_DATA")
    return path


@pytest.mark.parametrize(("trace", "tolerance"), [("lif_norse", 1e-7), ("lif_exact", 7e-3)])
def test_lif_traces_of_the_nir_paper_are_reproduced(trace: str, tolerance: float) -> None:
    """Columns: input, membrane, spikes. norse takes Euler steps as we do; "exact" solves the equation."""
    stimulus, membrane, spikes = np.loadtxt(paper(f"{trace}.csv"), delimiter=",").T
    found = interpret(read(paper("lif_norse.nir")), stimulus.reshape(-1, 1, 1), dt=1e-4, record=None)
    assert np.array_equal(found.output.ravel(), spikes) and spikes.sum() == 4
    assert np.abs(found.membranes["1"].ravel() - membrane).max() < tolerance


def test_the_papers_spiking_cnn_classifies_events() -> None:
    """A few of the test samples, 1 ms steps; benchmarks/snn_nir.py runs all of them."""
    graph = read(paper("cnn_sinabs.nir"))
    z = np.load(DATA / "datasets" / "nmnist_small.npz")
    right = 0
    for i in range(6):
        part = slice(z["offsets_test"][i], z["offsets_test"][i + 1])
        frames = np.zeros((300, 1, 2, 34, 34))
        step = np.minimum(z["t_test"][part] // 1000, 299)
        np.add.at(frames, (step, 0, z["p_test"][part], z["y_test"][part], z["x_test"][part]), 1)
        right += int(interpret(graph, frames).output.sum(0)[0].argmax() == z["label_test"][i])
    assert right == 6
