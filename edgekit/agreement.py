"""Does a simulator, given a ``.nir`` file, spike as edgekit's interpreter does? ``edgekit verify FILE.nir --device sim:NAME``.

Every neuron's raster is compared step by step; agreement is the number of spikes that differ, and the first node that differs in
order of execution is named: all that follows may only follow from it. Chips are counted too, but their integers cannot be the
float graph's spike for spike; what must be equal there is the vendor's simulator and edgekit's reference of the chip.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import nir
from edgekit.devices import connect, naming, spiking_cost
from edgekit.devices.sim import Rasters, SimulatorDevice
from edgekit.errors import EdgekitError, InputError
from edgekit.files import sha256
from edgekit.nir.semantics import flatten, number_of_steps, with_output
from edgekit.profile import Profile

__all__ = [
    "Agreement", "LayerAgreement", "Spikes", "Verified", "compare", "load_spikes", "profile_file", "random_spikes", "verify_file",
]  # fmt: skip


@dataclass(frozen=True)
class Spikes:
    """Input of a graph: ``values`` (T, N, *shape), labels (N,) or None, and where they are from."""

    values: NDArray[Any]
    labels: NDArray[Any] | None
    source: str


@dataclass(frozen=True)
class LayerAgreement:
    """A neuron node: spikes expected and found, values that differ, of how many, and where the first one does (step, sample,
    neuron); ``lag`` is by how many steps the simulator's raster was moved."""

    name: str
    expected: int
    found: int
    differing: int
    values: int
    lag: int
    first: tuple[int, int, int] | None


@dataclass(frozen=True)
class Agreement:
    """A file on a simulator.

    Attributes:
        file, sha256: what ran.
        simulator, version: where; the version is "" for edgekit itself.
        steps, samples, inputs: what it ran on.
        exact: whether every spike has to be the expected one.
        layers: in order of execution.
        accuracy, expected_accuracy: percent of labelled samples whose most active output neuron is the label, there and as
            expected; None without labels.
        notes: what was rewritten or chosen.
    """

    file: str
    sha256: str
    simulator: str
    version: str
    steps: int
    samples: int
    inputs: str
    exact: bool
    layers: tuple[LayerAgreement, ...]
    accuracy: float | None = None
    expected_accuracy: float | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def differing(self) -> int:
        """Values of all layers that differ."""
        return sum(layer.differing for layer in self.layers)

    @property
    def ok(self) -> bool:
        """Nothing differs that has to be equal."""
        return not self.exact or self.differing == 0

    @property
    def first(self) -> str | None:
        """The first layer, in order of execution, with a spike that differs."""
        return next((layer.name for layer in self.layers if layer.differing), None)

    def verdict(self) -> str:
        """One sentence."""
        total = sum(layer.values for layer in self.layers)
        who = f"{self.simulator} {self.version}".strip()
        if not self.differing:
            return f"{self.file} on {who}: every spike of {len(self.layers)} layers is the expected one ({total:,} compared)"
        what = f"{self.differing:,} of {total:,} values differ, first in layer {self.first}"
        return f"{self.file} on {who}: {what}" + ("" if self.exact else "; the chip's integers are not the float graph's")

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "ok": self.ok, "first": self.first, "differing": self.differing}


def load_spikes(path: Path) -> Spikes:
    """Input from a ``.npy`` (T, N, *shape), or from a ``.npz`` with ``spikes`` and, if there, ``labels`` (N,).

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    path = Path(path)
    try:
        found = np.load(path, allow_pickle=False)
        archive = {"spikes": found} if isinstance(found, np.ndarray) else dict(found)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: no .npy or .npz file that can be read ({error})") from error
    if "spikes" not in archive or archive["spikes"].ndim < 3 or archive["spikes"].dtype.kind not in "biuf":
        raise InputError(f"{path}: expected an array `spikes` of numbers (T, N, ...), found {', '.join(archive) or 'nothing'}")
    spikes, labels = archive["spikes"], archive.get("labels")
    if labels is not None and labels.shape != spikes.shape[1:2]:
        raise InputError(f"{path}: labels have shape {labels.shape}, expected ({spikes.shape[1]},)")
    return Spikes(spikes.astype(np.float64), labels, path.name)


def random_spikes(graph: Any, steps: int | None = None, samples: int = 4, share: float = 0.3, seed: int = 0) -> Spikes:
    """Spikes at random, with ``share`` of the steps of each input neuron, where there is no data.

    Args:
        steps: None: as many as the graph's metadata say, else 32.
    """
    steps = steps or min(1024, number_of_steps(graph) or 32)
    flat = flatten(graph)
    if len(flat.inputs) != 1 or (shape := flat.nodes[flat.inputs[0]].input_type["input"]) is None:
        raise InputError("the graph has several inputs, or one without a shape; edgekit verifies graphs with one input")
    size = (steps, samples, *(int(n) for n in np.atleast_1d(shape)))
    values = (np.random.default_rng(seed).random(size) < share).astype(np.float64)
    return Spikes(values, None, f"random spikes, {share:.0%} of the steps, seed {seed}")


@dataclass(frozen=True)
class Verified:
    """What simulators did with a file, and what kept others from running it: (device, error)."""

    agreements: tuple[Agreement, ...]
    failures: tuple[tuple[str, EdgekitError], ...]

    @property
    def exit_code(self) -> int:
        """1 where a spike differs that may not, else that of the first failure, else 0."""
        if not all(found.ok for found in self.agreements):
            return 1
        return self.failures[0][1].exit_code if self.failures else 0

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values for JSON: one for each device."""
        failed = [{"simulator": device.partition(":")[2], "ok": False, "error": str(error)} for device, error in self.failures]
        return [*(found.to_json() for found in self.agreements), *failed]


def verify_file(
    path: Path, devices: Sequence[str], inputs: Path | None = None, dt: float | None = None, output: str | None = None
) -> Verified:
    """Run a ``.nir`` file on simulators. What keeps one of them from running it does not keep the others.

    Args:
        devices: such as ``sim:nest``.
        inputs: see :func:`load_spikes`; without it random spikes.
        output: the one to look at, where the graph has several.

    Raises:
        InputError: a device that is no simulator, or inputs that cannot be read.
        FormatError, UnsupportedError: the file cannot be read.
    """
    graph = _read(path, output)
    for spec in devices:
        if not spec.startswith("sim:"):
            raise InputError(f"{Path(path).name} is a NIR file and {spec} no simulator; use --device sim:NAME")
    given = random_spikes(graph) if inputs is None else load_spikes(inputs)
    agreements, failures = [], []
    for spec in dict.fromkeys(devices):
        try:
            (device,) = _simulators(path, [spec])
            with naming(device):
                agreements.append(compare(Path(path), device.rasters(graph, given.values, dt), given))
        except EdgekitError as error:
            failures.append((spec, error))
    return Verified(tuple(agreements), tuple(failures))


def _read(path: Path, output: str | None) -> Any:
    """A file's graph with one output.

    Raises:
        InputError: it has several and none is chosen; FormatError, UnsupportedError: it cannot be read, or has no such output.
    """
    graph = with_output(nir.read(path), output)
    if len(names := flatten(graph).outputs) > 1:
        raise InputError(f"{path}: the graph has {len(names)} outputs ({', '.join(names)}); choose one by --output NAME")
    return graph


def profile_file(
    path: Path, devices: Sequence[str], inputs: Path | None = None, per_layer: bool = True, output: str | None = None
) -> list[Profile]:
    """What a ``.nir`` file costs, counted from the spikes that simulators give it.

    Raises:
        as :func:`verify_file`, and what keeps a simulator from running it.
    """
    graph = _read(path, output)
    given = random_spikes(graph) if inputs is None else load_spikes(inputs)
    found = []
    for device in _simulators(path, devices):
        with naming(device):
            spikes = device.rasters(graph, given.values).spikes
        made = spiking_cost.profile(device.name, graph, given.values, spikes, per_layer)
        source = f"{given.values.shape[1]} samples of {given.source}"
        found.append(replace(made, file=Path(path).name, sha256=sha256(path), notes=(*made.notes, source)))
    return found


def _simulators(path: Path, devices: Sequence[str]) -> list[SimulatorDevice]:
    found = [connect(spec) for spec in dict.fromkeys(devices)]
    if other := [device.name for device in found if not isinstance(device, SimulatorDevice)]:
        raise InputError(f"{Path(path).name} is a NIR file and {other[0]} no simulator; use --device sim:NAME")
    return found


def compare(path: Path, found: Rasters, given: Spikes) -> Agreement:
    """Count where rasters differ from those that are expected."""
    layers = tuple(_layer(name, raster, found.expected[name], found.lag[name]) for name, raster in found.spikes.items())
    last = next(reversed(list(found.spikes)), None)
    accuracy = [None, None] if last is None else [_accuracy(r[last], given.labels) for r in (found.spikes, found.expected)]
    return Agreement(
        file=path.name, sha256=sha256(path), simulator=found.simulator, version=found.version, steps=len(given.values),
        samples=given.values.shape[1], inputs=given.source, exact=found.exact, layers=layers, accuracy=accuracy[0],
        expected_accuracy=accuracy[1], notes=found.notes,
    )  # fmt: skip


def _layer(name: str, found: NDArray[Any], expected: NDArray[Any], lag: int) -> LayerAgreement:
    a = found.reshape(*found.shape[:2], -1).astype(np.int64)
    b = expected.reshape(*expected.shape[:2], -1).astype(np.int64)
    differing = np.argwhere(a != b)
    first = tuple(int(i) for i in differing[0]) if len(differing) else None
    return LayerAgreement(name, int(b.sum()), int(a.sum()), len(differing), a.size, lag, first)  # type: ignore[arg-type]


def _accuracy(raster: NDArray[Any], labels: NDArray[Any] | None) -> float | None:
    if labels is None:
        return None
    counts = np.asarray(raster, np.float64).sum(0).reshape(raster.shape[1], -1)
    return 100 * float((counts.argmax(1) == labels).mean())
