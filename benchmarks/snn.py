"""Conversion and training of spiking networks, beside spikingjelly's: python benchmarks/snn.py [--parts ...] [--sets ...]

Rows of parts that are not run stay as they were. Trained float networks are kept in runs/benchmarks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import snn_sets
import torch
from subjects import WORK, log, write
from torch import Tensor, nn

from edgekit import Data
from edgekit.compress.spiking import Spiking
from edgekit.compress.spiking.settings import EarlyExit
from edgekit.compress.steps import apply
from edgekit.recipe import Block

Row = dict[str, Any]
SETS = ("mnist", "mnist_max", "cifar10_jpeg", "fsdd")
QCFS = {
    "mnist": {"levels": 8, "epochs": 2},
    "cifar10_jpeg": {"levels": 8, "epochs": 4},
    "fsdd": {"levels": 8, "epochs": 20, "train_batch_size": 32},
}
CALIBRATION = 128


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    for part in given.parts:
        started = time.process_time()
        rows = PARTS[part](given.sets)
        for row in rows:
            row |= {"part": part, "part_seconds": round(time.process_time() - started, 1)}
            log(json.dumps(row, default=float)[:300])
        write("snn", rows, NOTES, keep=True, key=("part", "set", "variant", "steps"), whole="python benchmarks/snn.py")


NOTES = (
    "mnist: the first 20000 and 1000 images; cifar10_jpeg: 15000 and 1000 JPEG images; fsdd: all; nmnist: 1000 and 100",
    f"conversions use the same {CALIBRATION} unlabelled training images",
)


def subject(name: str) -> tuple[nn.Module, Data]:
    """The float network of a set and its data."""
    x, y, xt, yt = snn_sets.samples(name)
    return snn_sets.trained(name, WORK), Data(calibration=x[:CALIBRATION], evaluation=(xt, yt), training=(x, y))


def spiking(model: nn.Module, data: Data, **settings: Any) -> tuple[Any, Row]:
    """The compressed network and the record of its block."""
    made = apply(model, [Block("spiking", Spiking(samples=CALIBRATION, batch_size=100, **settings))], data)
    return made, made.record["passes"][0]


def accuracy(module: nn.Module, data: Data) -> float:
    """Percent of the evaluation samples."""
    return 100 * float((_outputs(module, data).argmax(1) == data.evaluation[1]).float().mean())


def _outputs(module: nn.Module, data: Data) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(b) for b in data.evaluation[0].split(100)])


def _last(record: Row) -> float:
    """Accuracy after the last step, percent of the evaluation samples."""
    return float(record["by steps"][-1]["score"])


def _costs(record: Row) -> Row:
    return {"synops": record["SynOps a sample"], "macs": record["MACs a sample"], "spikes": record["spikes a sample"]}


def qcfs(sets: Sequence[str]) -> list[Row]:
    """Trained staircases at T = L, by correction and schedule, beside the same network without time; trained once."""
    from edgekit.compress.capture import capture
    from edgekit.compress.spiking import qcfs as method
    from edgekit.compress.spiking.amplitude import fold_amplitudes
    from edgekit.compress.spiking.calibrate import activations, correct, threshold_of
    from edgekit.compress.spiking.graph import free_batches, survey
    from edgekit.compress.spiking.measure import course

    rows: list[Row] = []
    for name in [s for s in sets if s in QCFS]:
        model, data = subject(name)
        rows.append({"set": name, "variant": "float", "accuracy": accuracy(model, data)})
        graph = free_batches(capture(model, (data.calibration[:1],)))
        found = survey(graph)
        plain = Spiking(method="qcfs", steps=QCFS[name]["levels"], threshold="percentile", **QCFS[name])
        seen = activations(graph, found.sites, (data.calibration,))
        scales = {s.node: threshold_of(seen[s.node], plain, plain.steps, s.cap) for s in found.sites}
        ann = method.train_staircases(graph, found, plain, scales, data.training)
        without = _outputs(ann.module, data)
        for variant in ("streaming, none", "streaming, bias", "streaming, membrane", "layered, none"):
            schedule, correction = variant.split(", ")
            how = replace(plain, schedule=schedule, correct=correction)
            net = method.as_spiking(ann, graph, found, how)
            correct(net, (data.calibration,), how, method.staircases(ann, (data.calibration,)))
            fold_amplitudes(net)
            run = course(net, [(b,) for b in data.evaluation[0].split(100)])
            y = data.evaluation[1]
            rows.append({
                "set": name, "variant": variant, "steps": plain.steps,
                "accuracy": 100 * float((run.outputs[-1].argmax(1) == y).float().mean()),
                "without_time": 100 * float((without.argmax(1) == y).float().mean()),
                "agreement": 100 * float((without.argmax(1) == run.outputs[-1].argmax(1)).float().mean()),
                "synops": float(run.synops[-1]), "macs": float(run.macs[-1]), "spikes": float(run.spikes[-1]),
            })  # fmt: skip
    return rows


def calibrated(sets: Sequence[str]) -> list[Row]:
    """Networks as they were trained, converted from unlabelled samples."""
    rows = []
    kinds: dict[str, Row] = {
        "max": {"method": "balance", "threshold": "max", "v_init": 0.0},
        "99.9 %": {"method": "balance", "threshold": "percentile"},
        "mmse": {"method": "balance"},
        "mmse, bias": {"method": "calibrate"},
        "mmse, membrane": {"method": "calibrate", "correct": "membrane"},
        "mmse by channel, bias": {"method": "calibrate", "per_channel": True},
    }
    for name in sets:
        model, data = subject(name)
        rows.append({"set": name, "variant": "float", "accuracy": accuracy(model, data)})
        for steps in (8, 16, 32):
            for variant, how in kinds.items():
                if steps != 16 and variant != "mmse, bias":
                    continue
                _, record = spiking(model, data, steps=steps, **how)
                rows.append({
                    "set": name, "variant": variant, "steps": steps, "accuracy": _last(record), **_costs(record)
                })  # fmt: skip
    return rows


def peers(sets: Sequence[str]) -> list[Row]:
    """spikingjelly's conversion of the same networks, with the same samples; needs `edgekit setup-sim spikingjelly`."""
    from edgekit.devices import simulators

    command, variables = simulators.environment("spikingjelly")
    rows = []
    for name in sets:
        _, data = subject(name)
        with tempfile.TemporaryDirectory() as folder:
            given, out = Path(folder) / "x.npz", Path(folder) / "out.json"
            np.savez(given, x=data.calibration.numpy())
            script = Path(__file__).with_name("snn_peer.py")
            subprocess.run(
                [*command, str(script), name, str(WORK / f"snn_{name}_0.pt"), str(given), str(out)], env=variables, check=True,
                stdout=sys.stderr, cwd=script.parent,
            )  # fmt: skip
            rows += [{"set": name, **row, "variant": f"spikingjelly, {row['variant']}"} for row in json.loads(out.read_text())]
    return rows


def confidence(sets: Sequence[str]) -> list[Row]:
    """Dynamic Confidence: the threshold chosen on held-out training samples, judged on the evaluation samples."""
    rows = []
    for name in [s for s in sets if s != "mnist_max"]:
        model, data = subject(name)
        for steps in (16,):
            _, record = spiking(model, data, steps=steps, early_exit=EarlyExit(max_drop=0.0))
            found = record["early exit"]
            rows.append({
                "set": name, "variant": "calibrate", "steps": steps, "mean_steps": found["mean steps"],
                "fewer": found["fewer steps %"],
                "accuracy": found["score"], "accuracy_all": found["score of all steps"], "oracle": found["oracle mean steps"],
                "p95": found["steps p95"],
            })  # fmt: skip
    return rows


def iir(sets: Sequence[str]) -> list[Row]:
    """Five steps to one, by stages."""
    model, data = subject("mnist")
    part = replace(data, training=tuple(t[:10000] for t in data.training))
    _, record = spiking(model, part, method="train", stages=(5, 4, 3, 2, 1), epochs=1, learning_rate=1e-3, surrogate="linear")
    rows: list[Row] = [{"set": "mnist", "variant": "iir", "steps": s["steps"], "accuracy": s["score"]} for s in record["stages"]]
    return rows


def sltt(sets: Sequence[str]) -> list[Row]:
    """Saved activations and gradients of SLTT beside BPTT, by the number of steps."""
    from edgekit.compress.capture import capture
    from edgekit.compress.spiking.gradients import compared

    model, data = subject("mnist")
    graph = capture(model, (data.calibration[:1],))
    rows = []
    for tau in (1.1, 2.0, 5.0):
        for steps in (1, 2, 4, 8, 16, 32, 64) if tau == 2.0 else (1, 12):
            found = compared(graph, data.calibration[:8], data.training[1][:8], steps, tau)
            rows.append({"set": "mnist", "variant": f"tau {tau}", "steps": steps, **found})
    return rows


def nmnist(sets: Sequence[str]) -> list[Row]:
    """A network trained on 1000 recordings of events, moved by up to two pixels; also with simulated events of MNIST's images."""
    from edgekit.compress.spiking import Frames
    from edgekit.compress.spiking.encoders import camera, saccade

    bins = 10
    x, y, xt, yt = snn_sets.events(bins)
    images, labels, *_ = snn_sets.samples("mnist")
    order = torch.Generator().manual_seed(0)

    def recorded() -> Any:
        for rows in torch.split(torch.randperm(len(x), generator=order), 50):
            dy, dx = (int(v) for v in torch.randint(-2, 3, (2,), generator=order))
            yield torch.roll(x[rows], (dy, dx), (3, 4)), y[rows]

    def both() -> Any:
        drawn = torch.split(torch.randperm(len(images), generator=order)[: len(x)], 50)
        for batch, rows in zip(recorded(), drawn, strict=True):
            video = saccade(torch.nn.functional.pad(images[rows, 0], (3, 3, 3, 3)), bins + 1, 4.0)
            yield batch
            yield camera(video)[:, :, [1, 0]], labels[rows]

    rows: list[Row] = []
    for variant, source, epochs in (("recorded events", recorded, 40), ("and simulated ones of MNIST", both, 24)):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(2, 12, 5, 2, 1), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(384, 10),
        )  # fmt: skip
        data = Data(calibration=x[:100], evaluation=(xt, yt), training=source)
        _, record = spiking(
            Frames(net), data, method="train", frames=True, steps=bins, epochs=epochs, learning_rate=3e-3, train_batch_size=50,
            neuron="plif",
        )  # fmt: skip
        rows.append({"set": "nmnist", "variant": variant, "steps": bins, "accuracy": _last(record), **_costs(record)})
    return rows


PARTS: dict[str, Callable[[Sequence[str]], list[Row]]] = {
    "calibrated": calibrated,
    "peers": peers,
    "qcfs": qcfs,
    "confidence": confidence,
    "iir": iir,
    "sltt": sltt,
    "nmnist": nmnist,
}

if __name__ == "__main__":
    main()
