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

__all__ = ["SIMULATORS", "lava", "main", "nest", "norse", "sinabs", "snntorch", "spikingjelly", "xylosim"]

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
    """Intel's fixed-point model of Loihi.

    ``arrays`` has ``weights:<layer>:<number of the source>``, ``bias:<layer>`` and ``start:<layer>``, settings the rest.
    """
    from lava.magma.core.run_conditions import RunSteps
    from lava.magma.core.run_configs import Loihi2SimCfg
    from lava.proc.dense.process import DelayDense, Dense
    from lava.proc.io.sink import RingBuffer as Sink
    from lava.proc.io.source import RingBuffer as Source
    from lava.proc.lif.process import LIF

    kinds = {"zero": LIF}
    if any(layer["reset"] == "subtract" for layer in settings["layers"]):
        kinds["subtract"] = _soft_lif()
    found: dict[str, list[Any]] = {}
    layers = settings["layers"]
    steps, silent = len(arrays["spikes"]) + len(layers), np.zeros((len(layers), arrays["spikes"].shape[2]), int)
    for n in range(arrays["spikes"].shape[1]):
        nodes: dict[str, Any] = {"": Source(data=np.concatenate([arrays["spikes"][:, n].astype(int), silent]).T)}
        sinks = {}
        for layer in layers:
            name, count = layer["name"], len(arrays[f"bias:{layer['name']}"])
            neurons = kinds[layer["reset"]](
                shape=(count,), du=layer["du"], dv=layer["dv"], vth=layer["threshold"], v=arrays[f"start:{name}"].astype(int),
                bias_mant=arrays[f"bias:{name}"].astype(int), bias_exp=layer["bias_exp"],
            )  # fmt: skip
            for at, (source, late) in enumerate(layer["sources"]):
                given = {"weights": arrays[f"weights:{name}:{at}"].astype(int), "num_weight_bits": 8}
                given["weight_exp"] = layer["weight_exp"]
                dense = DelayDense(**given, delays=late, max_delay=late) if late else Dense(**given)
                nodes[source].s_out.connect(dense.s_in)
                dense.a_out.connect(neurons.a_in)
            sinks[name] = Sink(shape=(count,), buffer=steps)
            neurons.s_out.connect(sinks[name].a_in)
            nodes[name] = neurons
        neurons.run(RunSteps(steps), Loihi2SimCfg(select_tag="fixed_pt"))
        for name, sink in sinks.items():
            found.setdefault(f"spikes:{name}", []).append(sink.data.get().T.astype(np.uint8))
        neurons.stop()
    lags = {f"lag:{layer['name']}": np.array(layer["lag"]) for layer in layers}
    return {**{name: np.stack(values, 1) for name, values in found.items()}, **lags}


def _soft_lif() -> Any:
    """lava's LIF with a reset of one's own: it subtracts the threshold, as a neuron program of Loihi 2 would."""
    from lava.magma.core.decorator import implements, requires, tag
    from lava.magma.core.model.py.ports import PyOutPort
    from lava.magma.core.model.py.type import LavaPyType
    from lava.magma.core.resources import CPU
    from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol
    from lava.proc.lif.models import AbstractPyLifModelFixed
    from lava.proc.lif.process import LIF

    class SoftLIF(LIF):  # type: ignore[misc]
        pass

    @implements(proc=SoftLIF, protocol=LoihiProtocol)
    @requires(CPU)
    @tag("fixed_pt")
    class PySoftLifModel(AbstractPyLifModelFixed):  # type: ignore[misc]
        s_out = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)
        vth = LavaPyType(int, np.int32, precision=17)

        def scale_threshold(self) -> None:
            self.level = np.left_shift(self.vth, self.vth_shift)
            self.isthrscaled = True

        def spiking_activation(self) -> Any:
            return self.v > self.level

        def reset_voltage(self, spike_vector: Any) -> None:
            self.v[spike_vector] -= self.level

    for made in (SoftLIF, PySoftLifModel):  # lava's processes look classes up in their module
        globals()[made.__name__] = made
        made.__qualname__ = made.__name__
    return SoftLIF


def _steps(net: Any, spikes: Any, start: Any) -> Any:
    """Run a module of (x, state) -> (y, state) step by step; outputs (T, N, ...)."""
    import torch

    outputs, state = [], start
    with torch.no_grad():
        for x in torch.as_tensor(spikes, dtype=torch.float64):
            y, state = net(x, state)
            outputs.append(y)
    return torch.stack(outputs).numpy()


def _graph(folder: str, flatten_batch: bool) -> Any:
    """The file's graph; where an importer's Flatten counts the batch as a dimension, so do the numbers in it."""
    import nir
    import torch

    torch.set_default_dtype(torch.float64)
    graph = nir.read(os.path.join(folder, "model.nir"))
    for node in graph.nodes.values():
        if flatten_batch and isinstance(node, nir.Flatten):
            node.start_dim, node.end_dim = (int(d) + 1 if d >= 0 else int(d) for d in (node.start_dim, node.end_dim))
    return graph


def _recording(net: Any, names: Any) -> dict[str, list[Any]]:
    """Hooks on modules of those names, which keep what each emits in a step and hand it on in float64."""
    kept: dict[str, list[Any]] = {}
    modules = dict(net.named_modules())

    def hook(name: str) -> Any:
        def keep(_module: Any, _given: Any, found: Any) -> Any:
            spikes = (found[0] if isinstance(found, tuple) else found).double()
            kept.setdefault(name, []).append(spikes.detach().clone().numpy())
            return (spikes, *found[1:]) if isinstance(found, tuple) else spikes

        return keep

    for name in names:
        modules[name].register_forward_hook(hook(name))
    return kept


def _found(kept: dict[str, list[Any]], output: Any) -> Arrays:
    rasters = {f"spikes:{name}": np.stack(values).astype(np.int16) for name, values in kept.items()}
    return {**rasters, **{f"lag:{name}": np.array(0) for name in kept}, "state:output": np.asarray(output)}


def spikingjelly(folder: str, settings: dict[str, Any], arrays: Arrays) -> Arrays:
    """SpikingJelly's own importer, in float64."""
    import torch
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    net = import_from_nir(_graph(folder, flatten_batch=False), dt=settings["dt"], dtype=torch.float64)
    modules, batch = dict(net.named_modules()), arrays["spikes"].shape[1]
    for name, how in settings["neurons"].items():
        neuron = modules[name].module
        neuron.v_threshold = how["threshold"]
        if how["reset"] == "subtract":
            neuron.v_reset = None
        if np.any(how["v_init"]):
            start = torch.as_tensor(how["v_init"], dtype=torch.float64)
            neuron.v = start.expand(batch, *start.shape).clone() if start.dim() else float(start)
    kept = _recording(net, settings["neurons"])
    return _found(kept, _steps(net, arrays["spikes"], None))


def snntorch(folder: str, settings: dict[str, Any], arrays: Arrays) -> Arrays:
    """snnTorch's own importer, in float64."""
    import torch
    from snntorch.import_nir import import_from_nir

    net = import_from_nir(_graph(folder, flatten_batch=True)).double()
    modules = dict(net.named_modules())
    for name, how in settings["neurons"].items():
        neuron = modules[name]
        neuron.threshold = torch.tensor(how["threshold"], dtype=torch.float64)
        neuron.beta = torch.tensor(how["keeps"][0], dtype=torch.float64)
        if len(how["keeps"]) > 1:
            neuron.alpha = torch.tensor(how["keeps"][1], dtype=torch.float64)
    kept = _recording(net, settings["neurons"])
    return _found(kept, _steps(net, arrays["spikes"], None))


def norse(folder: str, settings: dict[str, Any], arrays: Arrays) -> Arrays:
    """Norse's own importer, in float64."""
    import torch
    from norse.torch.utils.import_nir import from_nir

    net = from_nir(_graph(folder, flatten_batch=True), dt=settings["dt"], ignore_warnings=True).double()
    modules = dict(net.named_modules())
    for name, how in settings["neurons"].items():
        p = modules[name].p
        shape = torch.as_tensor(p.v_leak).shape
        rate = torch.full(shape, (1 - how["keeps"][0]) / settings["dt"], dtype=torch.float64)
        given = {"tau_mem_inv": rate, "v_th": torch.full(shape, how["threshold"], dtype=torch.float64)}
        modules[name].p = p._replace(**given, v_leak=torch.zeros(shape, dtype=torch.float64)) if how["keeps"][0] < 1 else p
    kept = _recording(net, settings["neurons"])
    return _found(kept, _steps(net, arrays["spikes"], None))


def sinabs(folder: str, settings: dict[str, Any], arrays: Arrays) -> Arrays:
    """sinabs's own importer, in float64; it takes all steps at once."""
    import types

    sys.modules.setdefault("pylab", types.ModuleType("pylab"))  # it draws; nothing here does
    import sinabs.activation as activation
    import sinabs.nir
    import torch

    graph = _graph(folder, flatten_batch=False)
    for node in graph.nodes.values():
        for key in ("tau", "v_leak", "r", "v_threshold"):
            if hasattr(node, key):
                setattr(node, key, torch.as_tensor(getattr(node, key)))
    steps, batch = arrays["spikes"].shape[:2]
    net = sinabs.nir.from_nir(graph, batch_size=batch).double()
    modules = dict(net.named_modules())
    for name, how in settings["neurons"].items():
        neuron = modules[name]
        neuron.spike_fn, neuron.min_v_mem = activation.SingleSpike, None
        if how["most"] > 1:
            neuron.spike_fn = activation.MaxSpike(how["most"])
        neuron.reset_fn = activation.MembraneSubtract() if how["reset"] == "subtract" else activation.MembraneReset()
        shape = graph.nodes[name].v_threshold.shape
        neuron.spike_threshold.data = torch.tensor(how["threshold"], dtype=torch.float64)
        start = torch.as_tensor(how["v_init"], dtype=torch.float64).expand(batch, *shape).clone()
        neuron.register_buffer("v_mem", start)
    kept = _recording(net, settings["neurons"])
    spikes = torch.as_tensor(arrays["spikes"], dtype=torch.float64).transpose(0, 1).flatten(0, 1)
    with torch.no_grad():
        output = net(spikes)
    output = output[0] if isinstance(output, tuple) else output

    def unfolded(x: Any) -> Any:
        return np.swapaxes(np.asarray(x).reshape(batch, steps, *np.shape(x)[1:]), 0, 1)

    return _found({name: list(unfolded(values[0])) for name, values in kept.items()}, unfolded(output))


def nest(folder: str, settings: dict[str, Any], arrays: Arrays) -> Arrays:
    """NEST's ``iaf_psc_delta``, one sample after the other, a step of 1 ms; see edgekit.targets.neuromorphic.nest."""
    import nest as engine

    engine.set_verbosity("M_ERROR")
    spikes = np.asarray(arrays["spikes"], np.float64).reshape(*arrays["spikes"].shape[:2], -1)
    rasters: dict[str, list[Any]] = {layer["name"]: [] for layer in settings["layers"]}
    for n in range(spikes.shape[1]):
        for name, raster in _one_sample(engine, settings, arrays, spikes[:, n]).items():
            rasters[name].append(raster)
    found = {}
    for layer in settings["layers"]:
        stacked = np.stack(rasters[layer["name"]], 1)
        found[f"spikes:{layer['name']}"] = stacked.reshape(*stacked.shape[:2], *layer["shape"])
        found[f"lag:{layer['name']}"] = np.array(layer["lag"])
    return found


def _one_sample(engine: Any, settings: dict[str, Any], arrays: Arrays, spikes: Any) -> dict[str, Any]:
    steps, layers = len(spikes), settings["layers"]
    engine.ResetKernel()
    engine.set(resolution=1.0, local_num_threads=1)
    nodes = {settings["input"]: engine.Create("spike_generator", spikes.shape[1])}
    for channel in range(spikes.shape[1]):
        sent = np.flatnonzero(spikes[:, channel])
        nodes[settings["input"]][channel].set(spike_times=(sent + 1.0).tolist(), spike_weights=spikes[sent, channel].tolist())
    for layer in layers:
        p = {key: arrays[f"{key}:{layer['name']}"] for key in ("tau", "threshold", "leak", "reset", "start")}
        group = engine.Create("iaf_psc_delta", len(p["tau"]))
        group.set(
            E_L=p["leak"], V_th=p["threshold"], V_reset=p["reset"], tau_m=p["tau"], C_m=p["tau"], t_ref=0.0, V_min=-1e300,
            V_m=p["start"],
        )  # fmt: skip
        nodes[layer["name"]] = group
    recorders = {}
    for layer in layers:
        group = nodes[layer["name"]]
        for at, source in enumerate(layer["sources"]):
            _connect(engine, nodes[source["name"]], group, arrays[f"weights:{layer['name']}:{at}"], source["delay"])
        constant = engine.Create("spike_generator", 1, {"spike_times": (np.arange(steps) + float(layer["lag"])).tolist()})
        _connect(engine, constant, group, arrays[f"bias:{layer['name']}"][:, None], 1)
        recorders[layer["name"]] = engine.Create("spike_recorder")
        engine.Connect(group, recorders[layer["name"]])
    last = max(layer["lag"] for layer in layers)
    for time in range(1, last + 1):  # a layer's membranes begin when the first step's spikes arrive
        engine.Simulate(1.0)
        for layer in layers:
            if layer["lag"] == time:
                nodes[layer["name"]].set(V_m=arrays[f"start:{layer['name']}"])
    engine.Simulate(float(steps))
    rasters = {}
    for layer in layers:
        events, first = recorders[layer["name"]].events, nodes[layer["name"]][0].global_id
        raster = np.zeros((steps + last, len(nodes[layer["name"]])), np.int16)
        times = np.rint(events["times"]).astype(int) - 1
        kept = (times >= layer["lag"]) & (times < steps + layer["lag"])
        senders = np.asarray(events["senders"], int)  # of a silent layer it is an empty array of floats
        np.add.at(raster, (times[kept], senders[kept] - first), 1)
        rasters[layer["name"]] = raster
    return rasters


def _connect(engine: Any, before: Any, behind: Any, weights: Any, delay: int) -> None:
    to, source = np.nonzero(weights)
    if len(to):
        ids = (np.array(before.tolist())[source], np.array(behind.tolist())[to])
        spec = {"weight": weights[to, source], "delay": np.full(len(to), float(delay))}
        engine.Connect(*ids, "one_to_one", spec)


SIMULATORS = {
    "xylosim": (xylosim, "xylosim"), "lava": (lava, "lava-nc"), "spikingjelly": (spikingjelly, "spikingjelly"),
    "snntorch": (snntorch, "snntorch"), "norse": (norse, "norse"), "sinabs": (sinabs, "sinabs"), "nest": (nest, "nest-simulator"),
}  # fmt: skip
"""Name to (function, package)."""


def main(folder: str) -> None:
    """Do what the folder's request asks, and write ``result.npz``."""
    with open(os.path.join(folder, "request.json")) as file:
        request = json.load(file)
    run, package = SIMULATORS[request["simulator"]]
    with np.load(os.path.join(folder, "arrays.npz")) as archive:
        arrays = dict(archive)
    found = run(folder, request["settings"], arrays)
    np.savez(os.path.join(folder, "result.npz"), version=np.array(metadata.version(package)), **found)


if __name__ == "__main__":
    main(sys.argv[1])
