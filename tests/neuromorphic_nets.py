"""Small NIR graphs for simulators and chips: chains of LIF, IF and CubaLIF neurons, convolutions, a recurrent one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

nir = pytest.importorskip("nir")

DT = 1e-3


def chain(nodes: dict[str, Any], dt: float = DT) -> Any:
    """Nodes joined one after the other."""
    names = list(nodes)
    return nir.NIRGraph(nodes, list(itertools.pairwise(names)), metadata={"dt": dt}, type_check=False)


def ends(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> tuple[Any, Any]:
    """Input and output nodes."""
    return nir.Input({"input": np.array(inputs)}), nir.Output({"output": np.array(outputs)})


def lif(count: int, reset: str = "zero", tie: str = "ge", tau: float = 10 * DT, r: float = 1.0, leak: float = 0.0) -> Any:
    """LIF neurons whose threshold is 1 above their leak."""
    facts = {"reset": reset if leak == 0 else "value", "tie": tie}
    fields = {"tau": tau, "r": r, "v_leak": leak, "v_threshold": 1.0 + leak, "v_reset": leak}
    return nir.LIF(**{name: np.full(count, value) for name, value in fields.items()}, metadata=facts)


def if_(shape: tuple[int, ...], reset: str = "subtract", start: float = 0.5) -> Any:
    """IF neurons that add their input as it is."""
    facts = {"reset": reset, "tie": "ge", "v_init": start}
    return nir.IF(r=np.full(shape, 1 / DT), v_threshold=np.ones(shape), v_reset=np.zeros(shape), metadata=facts)


def cuba(
    count: int, reset: str = "zero", tie: str = "gt", spikes: int = 1, tau_syn: float = 3 * DT, tau_mem: float = 8 * DT
) -> Any:
    """CubaLIF neurons."""
    fields = {"tau_syn": tau_syn, "tau_mem": tau_mem, "r": 2.0, "v_leak": 0.0, "v_threshold": 0.7, "v_reset": 0.0, "w_in": 1.5}
    facts = {"reset": reset, "tie": tie, "max_spikes": spikes}
    return nir.CubaLIF(**{name: np.full(count, value) for name, value in fields.items()}, metadata=facts)


def lif_net(seed: int = 0, **neurons: Any) -> Any:
    """16 inputs, 20 and 6 LIF neurons."""
    rng = np.random.default_rng(seed)
    gain = 5 / neurons.get("r", 1.0)
    first = nir.Affine(rng.normal(0.2, 1, (20, 16)) * gain, rng.normal(0, 0.3, 20))
    second = nir.Linear(rng.normal(0, 1.2, (6, 20)) * gain)
    source, sink = ends((16,), (6,))
    return chain(
        {"input": source, "fc1": first, "lif1": lif(20, **neurons), "fc2": second, "lif2": lif(6, **neurons), "out": sink}
    )


def cuba_net(seed: int = 0, inputs: int = 16, hidden: int = 20, outputs: int = 6, last: Any = None, **neurons: Any) -> Any:
    """Inputs, hidden and output CubaLIF neurons, without biases; ``last``: the output's own parameters."""
    rng = np.random.default_rng(seed)
    first, second = nir.Linear(rng.normal(0.3, 1, (hidden, inputs))), nir.Linear(rng.normal(0.2, 1.2, (outputs, hidden)))
    source, sink = ends((inputs,), (outputs,))
    behind = cuba(outputs, **(neurons | (last or {})))
    return chain({"input": source, "fc1": first, "c1": cuba(hidden, **neurons), "fc2": second, "c2": behind, "out": sink})


def conv_net(seed: int = 0, reset: str = "subtract", start: float = 0.5, pool: str = "SumPool2d", groups: int = 1) -> Any:
    """1 x 8 x 8 inputs, two convolutions with a pool between them, a linear layer; IF neurons."""
    rng = np.random.default_rng(seed)
    source, sink = ends((1, 8, 8), (5,))
    window = getattr(nir, pool)(np.array([2, 2]), np.array([2, 2]), np.array([0, 0]))
    gain = 4.0 if pool == "AvgPool2d" else 1.0
    return chain({
        "input": source,
        "conv1": nir.Conv2d((8, 8), rng.normal(0.1, 0.4, (4, 1, 3, 3)), 1, 1, 1, 1, rng.normal(0, 0.1, 4)),
        "if1": if_((4, 8, 8), reset, start),
        "pool": window,
        "conv2": nir.Conv2d((4, 4), rng.normal(0, 0.15, (6, 4 // groups, 3, 3)) * gain, 1, 1, 1, groups, rng.normal(0, 0.1, 6)),
        "if2": if_((6, 4, 4), reset, start),
        "flat": nir.Flatten({"input": np.array([6, 4, 4])}, 0, -1),
        "fc": nir.Affine(rng.normal(0, 0.3, (5, 96)), rng.normal(0, 0.1, 5)),
        "if3": if_((5,), reset, start),
        "out": sink,
    })  # fmt: skip


def scaled_net(seed: int = 0) -> Any:
    """As conversion leaves networks: spikes of an amplitude (a Scale) of their own for each channel or neuron."""
    graph, rng = conv_net(seed), np.random.default_rng(seed)
    graph.nodes["scale1"] = nir.Scale(rng.uniform(0.8, 1.2, (4, 1, 1)) * np.ones((4, 8, 8)))
    graph.nodes["scale2"] = nir.Scale(rng.uniform(0.8, 1.2, 96))
    moved = {("if1", "pool"): "scale1", ("flat", "fc"): "scale2"}
    graph.edges = [e for a, b in graph.edges for e in ([(a, moved[a, b]), (moved[a, b], b)] if (a, b) in moved else [(a, b)])]
    return graph


def recurrent_net(seed: int = 0) -> Any:
    """16 inputs, 20 LIF neurons that hear themselves, 6 outputs that hear the inputs too."""
    rng = np.random.default_rng(seed)
    source, sink = ends((16,), (6,))
    nodes = {
        "input": source, "fc1": nir.Affine(rng.normal(0.5, 3, (20, 16)), rng.normal(0, 0.3, 20)),
        "lif": lif(20, tie="gt", tau=5 * DT), "rec": nir.Linear(rng.normal(0, 1.5, (20, 20))),
        "fc2": nir.Linear(rng.normal(0, 4, (6, 20))), "last": lif(6, tie="gt", tau=5 * DT),
        "skip": nir.Linear(rng.normal(0, 3, (6, 16))), "out": sink,
    }  # fmt: skip
    edges = [("input", "fc1"), ("fc1", "lif"), ("lif", "rec"), ("rec", "lif"), ("lif", "fc2"), ("fc2", "last")]
    edges += [("input", "skip"), ("skip", "last"), ("last", "out")]
    return nir.NIRGraph(nodes, edges, metadata={"dt": DT}, type_check=False)


def spikes(*shape: int, share: float = 0.3, seed: int = 0) -> np.ndarray:
    """Random spikes, float64 (T, N, ...)."""
    return (np.random.default_rng(seed).random(shape) < share).astype(np.float64)
