"""A network run on a simulator in a process and environment of its own; see :mod:`edgekit.devices.simulators`."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.devices import parts, simulator_runner, simulators
from edgekit.errors import DeviceError

__all__ = ["LIMIT", "Simulated", "simulate"]

LIMIT = 600.0
"""Seconds that one simulation may take."""


@dataclass(frozen=True)
class Simulated:
    """What a simulator did.

    Attributes:
        simulator, version: who it was.
        spikes: raster of each layer in the simulator's own time, (T', N, ...), integers.
        lag: the step at which the input's first step takes effect in a layer.
        states: other arrays that it recorded, by name.
    """

    simulator: str
    version: str
    spikes: Mapping[str, NDArray[Any]]
    lag: Mapping[str, int]
    states: Mapping[str, NDArray[Any]]

    def aligned(self, layer: str, steps: int) -> NDArray[Any]:
        """A layer's spikes (steps, N, ...) beside the input's steps."""
        start = self.lag[layer]
        return self.spikes[layer][start : start + steps]


def simulate(
    simulator: str,
    settings: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    nir: Path | None = None,
    limit: float = LIMIT,
) -> Simulated:
    """Run a network on a simulator.

    Args:
        simulator: a name of :data:`edgekit.devices.simulators.SIMULATORS`.
        settings: what :mod:`edgekit.devices.simulator_runner` takes for it, plain JSON values.
        arrays: ``spikes`` (T, N, ...) and what else it takes.
        nir: a ``.nir`` file, for simulators that import one.

    Raises:
        MissingTool: the simulator is not set up.
        DeviceError: it failed or took too long; the message has its last words.
    """
    python, variables = simulators.environment(simulator)
    with tempfile.TemporaryDirectory(prefix="edgekit-sim-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps({"simulator": simulator, "settings": dict(settings)}))
        given: dict[str, Any] = {key: np.asarray(value) for key, value in arrays.items()}
        np.savez(folder / "arrays.npz", **given)
        if nir is not None:
            shutil.copyfile(nir, folder / "model.nir")
        shutil.copyfile(simulator_runner.__file__, folder / "simulator_runner.py")
        command = [*python, str(folder / "simulator_runner.py"), str(folder)]
        try:
            ended = subprocess.run(
                command, env={**variables, "HOME": name}, cwd=folder, capture_output=True, text=True, timeout=limit,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise DeviceError(f"the simulator {simulator} ran for more than {limit:g} seconds and was stopped") from None
        if ended.returncode:
            raise DeviceError(f"the simulator {simulator} failed (exit code {ended.returncode}): {parts.reason(ended.stderr)}")
        return _read(simulator, folder / "result.npz")


def _read(simulator: str, path: Path) -> Simulated:
    try:
        with np.load(path) as archive:
            found = dict(archive)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DeviceError(f"the simulator {simulator} left no result that can be read ({error})") from error
    named = {prefix: _with(found, prefix) for prefix in ("spikes:", "lag:", "state:")}
    lag = {name: int(value) for name, value in named["lag:"].items()}
    return Simulated(simulator, str(found["version"]), named["spikes:"], lag, named["state:"])


def _with(found: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
