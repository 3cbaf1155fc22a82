"""Runs a network on one neuromorphic simulator; a file of its own that needs the simulator, numpy, and nothing of edgekit.

    python simulator_runner.py FOLDER

``FOLDER/request.json`` names the simulator and its settings, ``arrays.npz`` has the inputs ``spikes`` (T, N, ...) and what
else the network is made of, ``model.nir`` is there for simulators that read NIR. ``result.npz`` gets a raster for each layer,
``spikes:<layer>`` (T', N, ...) in the simulator's own time, ``lag:<layer>`` (the step of it at which the input's first step
takes effect), and the simulator's ``version``. It runs under Python 3.10 too (lava).
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from typing import Any

import numpy as np

Arrays = dict[str, Any]


def xylosim(folder: str, settings: dict[str, Any], arrays: Arrays) -> Arrays:
    """SynSense's C++ model of the Xylo chip; ``arrays`` has the fields of a XyloNetwork."""
    from xylosim.v2 import XyloLayer, XyloSynapse

    def synapses(weights: Any) -> list[Any]:
        return [
            [
                XyloSynapse(int(to), int(current), int(weights[source, to, current]))
                for to, current in zip(*np.nonzero(weights[source]), strict=True)
            ]
            for source in range(len(weights))
        ]

    a = arrays
    hidden = len(a["weights_out"])
    lists = (synapses(a["weights_in"]), synapses(a["weights_rec"]), synapses(a["weights_out"][..., None]))  # kept alive below
    layer = XyloLayer(
        synapses_in=lists[0], synapses_rec=lists[1], synapses_out=lists[2], aliases=[[] for _ in range(hidden)],
        threshold=a["threshold"].tolist(), threshold_out=a["threshold_out"].tolist(), has_bias=True, bias=a["bias"].tolist(),
        bias_out=a["bias_out"].tolist(), weight_shift_inp=settings["shift_in"], weight_shift_rec=settings["shift_rec"],
        weight_shift_out=settings["shift_out"], dash_mem=a["dash_mem"].tolist(), dash_mem_out=a["dash_mem_out"].tolist(),
        dash_syns=a["dash_syn"].tolist(), dash_syns_out=[[d] for d in a["dash_syn_out"].tolist()], name="network",
    )  # fmt: skip
    found: dict[str, list[Any]] = {name: [] for name in ("hidden", "output", "v_hidden", "v_output", "i_hidden", "i_output")}
    for n in range(a["spikes"].shape[1]):
        layer.reset_all()
        found["output"].append(np.array(layer.evolve(a["spikes"][:, n].tolist()), np.uint8))
        found["hidden"].append(np.array(layer.rec_recurrent_spikes, np.uint8))
        recorded = {"v_hidden": layer.rec_v_mem, "v_output": layer.rec_v_mem_out}
        recorded |= {"i_hidden": layer.rec_i_syn, "i_output": layer.rec_i_syn_out}
        for name, values in recorded.items():
            found[name].append(np.array(values, np.int16).T)
    stacked = {name: np.stack(values, 1) for name, values in found.items()}
    del lists
    states = {f"state:{name}": stacked[name] for name in stacked if name[1] == "_"}
    rasters = {"spikes:hidden": stacked["hidden"], "spikes:output": stacked["output"]}
    return {**rasters, "lag:hidden": np.array(0), "lag:output": np.array(1), **states}


def lava(folder: str, settings: dict[str, Any], arrays: Arrays) -> Arrays:
    """Intel's fixed-point model of Loihi; ``arrays`` has ``weights:<layer>`` and ``bias:<layer>``, settings the rest."""
    from lava.magma.core.run_conditions import RunSteps
    from lava.magma.core.run_configs import Loihi2SimCfg
    from lava.proc.dense.process import Dense
    from lava.proc.io.sink import RingBuffer as Sink
    from lava.proc.io.source import RingBuffer as Source
    from lava.proc.lif.process import LIF

    found: dict[str, list[Any]] = {}
    layers, steps = settings["layers"], len(arrays["spikes"]) + len(settings["layers"])
    for n in range(arrays["spikes"].shape[1]):
        silent = np.zeros((len(layers), arrays["spikes"].shape[2]), int)
        before: Any = Source(data=np.concatenate([arrays["spikes"][:, n].astype(int), silent]).T)
        sinks, neurons = {}, None
        for layer in layers:
            name, weights = layer["name"], arrays[f"weights:{layer['name']}"].astype(int)
            dense = Dense(weights=weights, num_weight_bits=8, weight_exp=layer["weight_exp"])
            neurons = LIF(
                shape=(len(weights),), du=layer["du"], dv=layer["dv"], vth=layer["threshold"],
                bias_mant=arrays[f"bias:{name}"].astype(int), bias_exp=layer["bias_exp"],
            )  # fmt: skip
            sinks[name] = Sink(shape=(len(weights),), buffer=steps)
            before.s_out.connect(dense.s_in)
            dense.a_out.connect(neurons.a_in)
            neurons.s_out.connect(sinks[name].a_in)
            before = neurons
        before.run(RunSteps(steps), Loihi2SimCfg(select_tag="fixed_pt"))
        for name, sink in sinks.items():
            found.setdefault(f"spikes:{name}", []).append(sink.data.get().T.astype(np.uint8))
        before.stop()
    lags = {f"lag:{layer['name']}": np.array(at) for at, layer in enumerate(layers, 1)}
    return {**{name: np.stack(values, 1) for name, values in found.items()}, **lags}


SIMULATORS = {"xylosim": (xylosim, "xylosim"), "lava": (lava, "lava-nc")}
"""Name to (function, package)."""


def main(folder: str) -> None:
    with open(os.path.join(folder, "request.json")) as file:
        request = json.load(file)
    run, package = SIMULATORS[request["simulator"]]
    with np.load(os.path.join(folder, "arrays.npz")) as archive:
        arrays = dict(archive)
    found = run(folder, request["settings"], arrays)
    np.savez(os.path.join(folder, "result.npz"), version=np.array(metadata.version(package)), **found)


if __name__ == "__main__":
    main(sys.argv[1])
