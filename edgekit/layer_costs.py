"""What a program and its layers cost on a target, for budgets of ``lowrank``: instructions of firmware, time of files here."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from edgekit import devices, targets
from edgekit.compress.lowrank.metered import Costs
from edgekit.errors import EdgekitError, InputError
from edgekit.frozen import FrozenProgram
from edgekit.profile import Settings

__all__ = ["measure"]


def measure(program: FrozenProgram, target: str, kind: str, sample: Sequence[Tensor]) -> Costs:
    """Lower a program, and run it where its target runs: a core's emulated board, or this machine.

    Args:
        kind: "instructions" of a firmware target, or "latency" (microseconds) of a file.

    Raises:
        InputError: the target has no such cost. EdgekitError: the program cannot be lowered or run; says why.
    """
    firmware = target.startswith("cortex-m")
    if firmware != (kind == "instructions"):
        other = f"instructions are counted for cortex-m targets; take latency:... for {target}"
        raise InputError(
            f"lowrank: {other if kind == 'instructions' else 'an emulated board has no time; take instructions:...'}"
        )
    module = targets.get(target)
    plain = Settings(num_runs=1 if firmware else 200, warmup_runs=1 if firmware else 20)
    with TemporaryDirectory(prefix="edgekit-") as folder:
        path = Path(folder) / f"model{module.SUFFIX}"
        try:
            module.lower(program, path)
            with contextlib.closing(devices.connect(f"qemu:{target}" if firmware else "local")) as device:
                found = device.profile(path, target, program, plain, [x.numpy() for x in sample])
        except EdgekitError as error:
            raise type(error)(f"lowrank: a budget of {kind} is measured on {target}, which failed: {error}") from error
    layers = {x.layer: float((x.instructions if firmware else x.microseconds) or 0.0) for x in found.layers}
    if not layers:
        raise InputError(f"lowrank: a budget of {kind} needs costs of layers, and {target} has none: {' '.join(found.notes)}")
    return Costs(found.total, layers, f"{found.unit} on {found.device}: {found.method}")
