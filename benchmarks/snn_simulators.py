"""NIR files on simulators and chips, spike by spike:
python benchmarks/snn_simulators.py [--parts ...] [--samples 60] [--simulators nest ...]

Needs every simulator: for n in spikingjelly snntorch norse sinabs nest xylosim lava neurobench; do edgekit setup-sim $n; done
Networks are trained here on scikit-learn's digits (tests/digit_snns.py). Rows of parts that are not run stay as they were.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from subjects import ROOT, log, write

sys.path.insert(0, str(ROOT / "tests"))

import digit_snns
from neuromorphic_nets import conv_net, cuba_net, lif_net, nir, recurrent_net

from edgekit import nir as files
from edgekit.devices import sim, simulators
from edgekit.errors import UnsupportedError
from edgekit.targets.neuromorphic import to_loihi2, to_xylo
from edgekit.targets.neuromorphic.figures import count

Row = dict[str, Any]
FRAMEWORKS = ("spikingjelly", "snntorch", "norse", "sinabs", "nest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--simulators", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    rows = [{"part": part, **row} for part in given.parts for row in PARTS[part](given)]
    write("snn_simulators", rows, NOTES, keep=True, key=("part", "network", "simulator"), whole=WHOLE)


WHOLE = "python benchmarks/snn_simulators.py"
NOTES = (
    "Agreement: values of all rasters (steps x samples x neurons, every layer) that differ from edgekit's float64 interpreter.",
    "Chips: xylosim and lava are given the very numbers that edgekit's integer references run.",
)


def agreement(given: argparse.Namespace) -> list[Row]:
    """Every network on every simulator that can express it."""
    trained = digit_snns.loihi()
    soft = copy.deepcopy(trained.graph)
    for node in soft.nodes.values():
        if isinstance(node, nir.LIF):
            node.metadata = {"reset": "subtract", "tie": "ge"}
    digits = trained.spikes[:, : given.samples].astype(np.float64)
    rng = np.random.default_rng(0)
    images = (rng.random((16, given.samples, 1, 8, 8)) < 0.3).astype(np.float64)
    flat = (rng.random((16, given.samples, 16)) < 0.3).astype(np.float64)
    networks: Mapping[str, tuple[Any, np.ndarray]] = {
        "digits LIF, hard reset": (trained.graph, digits),
        "digits LIF, soft reset": (soft, digits),
        "conv IF, soft reset, v0 0.5": (conv_net(groups=2), images),
        "conv IF, hard reset": (conv_net(reset="zero", start=0.0), images),
        "LIF, r 3, leak to -0.4": (lif_net(tie="gt", r=3.0, leak=-0.4), flat),
        "CubaLIF, hard reset": (cuba_net(), flat),
        "recurrent LIF with a skip": (recurrent_net(), flat),
    }
    return [_agreement(name, simulator, *net) for name, net in networks.items() for simulator in given.simulators]


def _agreement(name: str, simulator: str, graph: Any, spikes: np.ndarray) -> Row:
    log(f"{name} on {simulator}")
    row: Row = {"network": name, "simulator": simulator}
    start = time.perf_counter()
    try:
        found = sim.run(simulator, graph, spikes)
    except UnsupportedError as error:
        return {**row, "refused": str(error).partition("cannot be expressed: ")[2] or str(error)}
    pairs = [(found.spikes[layer], found.expected[layer]) for layer in found.spikes]
    return {
        **row, "version": found.version, "differing": int(sum((a != b).sum() for a, b in pairs)),
        "values": int(sum(a.size for a, _ in pairs)), "spikes": int(sum(b.sum() for _, b in pairs)),
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def chips(given: argparse.Namespace) -> list[Row]:
    """Accuracy on the chip's arithmetic beside float, and the vendor's simulator on the same numbers."""
    rows = []
    cases: Mapping[str, tuple[Callable[[], digit_snns.Trained], str, str]] = {
        "digits 0-7 CubaLIF, trained for 31 spikes a step": (lambda: digit_snns.xylo(31), "xylo", "xylosim"),
        "digits 0-7 CubaLIF, trained for 1 spike a step": (lambda: digit_snns.xylo(1), "xylo", "xylosim"),
        "digits LIF, hard reset": (digit_snns.loihi, "loihi2", "lava"),
    }
    for name, (make, chip, vendor) in cases.items():
        log(f"{name} on {chip} and {vendor}")
        net = make()
        spikes = net.spikes.astype(np.float64)
        expected = files.interpret(net.graph, spikes, record=("last",)).values["last"]
        if chip == "xylo":
            xylo = to_xylo.quantize(net.graph, net.calibration)
            own, notes = to_xylo.rasters(xylo.network, xylo.places, net.spikes)["last"], xylo.notes
        else:
            loihi = to_loihi2.quantize(net.graph, net.calibration)
            own, notes = to_loihi2.rasters(loihi.layers, net.spikes)["last"], loihi.notes
        theirs = sim.run(vendor, net.graph, net.spikes[:, : given.samples])
        pairs = [(theirs.spikes[layer], theirs.expected[layer]) for layer in theirs.spikes]
        rows.append({
            "network": name, "simulator": chip, "accuracy_float": _accuracy(expected, net.labels),
            "accuracy_chip": _accuracy(own, net.labels), "samples": len(net.labels), "vendor": f"{vendor} {theirs.version}",
            "differing": int(sum((a != b).sum() for a, b in pairs)), "values": int(sum(a.size for a, _ in pairs)),
            "remarks": list(notes),
        })  # fmt: skip
    return rows


def _accuracy(raster: np.ndarray, labels: np.ndarray) -> float:
    return round(100 * float((np.asarray(raster, np.float64).sum(0).argmax(1) == labels).mean()), 2)


def neurobench(given: argparse.Namespace) -> list[Row]:
    """Synaptic operations of the digits network, ours and NeuroBench's."""
    net = digit_snns.loihi()
    spikes = net.spikes[:, : given.samples]
    weights = {f"weight{i}": 0.1 * net.graph.nodes[name].weight for i, name in enumerate(("fc1", "fc2"))}
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "network.npz", Path(folder) / "out.json"
        np.savez(path, spikes=spikes, **weights)
        command, variables = simulators.environment("neurobench")
        script = Path(__file__).with_name("snn_neurobench.py")
        subprocess.run([*command, str(script), str(path), str(out)], env=variables, check=True, stdout=sys.stderr)
        theirs = json.loads(out.read_text())
    ours = count(net.graph, spikes.astype(np.float64))
    return [{
        "network": "digits LIF, hard reset", "simulator": "neurobench", "samples": spikes.shape[1], "steps": len(spikes),
        "acs": ours.acs, "acs_theirs": theirs["Effective_ACs"], "dense": ours.dense_macs * ours.steps,
        "dense_theirs": theirs["Dense"], **{f"figure_{name}": value for name, value in ours.figures().items()},
    }]  # fmt: skip


def speed(given: argparse.Namespace) -> list[Row]:
    """One convolutional LIF network of 28 x 28 inputs, 16 steps, batches of 1 and 32."""
    rng = np.random.default_rng(0)
    lif = lambda shape: nir.LIF(  # noqa: E731
        np.full(shape, 2e-3), np.ones(shape), np.zeros(shape), np.ones(shape), metadata={"reset": "zero", "tie": "ge"}
    )
    graph = conv_net()
    graph.nodes = {
        "input": nir.Input({"input": np.array([1, 28, 28])}),
        "conv1": nir.Conv2d((28, 28), rng.normal(0.1, 0.5, (16, 1, 3, 3)), 1, 1, 1, 1, np.zeros(16)),
        "lif1": lif((16, 28, 28)),
        "conv2": nir.Conv2d((28, 28), rng.normal(0.02, 0.3, (32, 16, 3, 3)), 2, 1, 1, 1, np.zeros(32)),
        "lif2": lif((32, 14, 14)),
        "flat": nir.Flatten({"input": np.array([32, 14, 14])}, 0, -1),
        "fc": nir.Affine(rng.normal(0, 0.1, (10, 6272)), np.zeros(10)),
        "lif3": lif((10,)),
        "out": nir.Output({"output": np.array([10])}),
    }
    names = list(graph.nodes)
    graph.edges = list(itertools.pairwise(names))
    rows = []
    command, variables = simulators.environment("spikingjelly")
    places = [str(simulators.folder(name)) for name in ("spikingjelly", "snntorch")]
    variables = {**variables, "PYTHONPATH": os.pathsep.join([*places, str(ROOT)])}
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "network.nir", Path(folder) / "out.json"
        files.write(path, graph)
        script = Path(__file__).with_name("snn_speed.py")
        for batch in (1, 32):
            log(f"speed, batch {batch}")
            words = [str(path), str(out), "16", str(batch), str(given.rounds if batch == 1 else max(3, given.rounds // 3))]
            subprocess.run([*command, str(script), *words], env=variables, check=True, stdout=sys.stderr)
            found = json.loads(out.read_text())
            ours = found["milliseconds"]["edgekit"]
            for name, times in found["milliseconds"].items():
                ratios = [theirs / own for theirs, own in zip(times, ours, strict=True)]
                rows.append({
                    "network": f"conv LIF 28 x 28, 16 steps, batch {batch}", "simulator": name, "milliseconds": median(times),
                    "ratio": median(ratios), "spikes": found["spikes"][name],
                })  # fmt: skip
    return rows


PARTS: Mapping[str, Callable[[argparse.Namespace], list[Row]]] = {
    "agreement": agreement,
    "chips": chips,
    "neurobench": neurobench,
    "speed": speed,
}

if __name__ == "__main__":
    main()
