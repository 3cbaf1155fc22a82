"""Devices: where an exported file runs and is measured.

A device is named on the command line by ``--device``: ``scheme`` or ``scheme:rest``, such as ``local`` or ``qemu:mps2-an386``.
:data:`DEVICES` maps a scheme to the module that serves it; the module has one function ``connect(spec) -> device``. A device is
any object with these members (there is no base class):

``name``
    the spec it was made from; where several mean the same device, one of them, so that it is measured once.
``targets``
    names of :data:`edgekit.targets.TARGETS` whose files it can run here, in order of preference.
``run(path, target, inputs, progress=None)``
    outputs for a batch, as the ``run`` of a target module gives them: one float32 array (N, ...) for each output.
``taps(path, target, program, sample)``
    each layer's int8 output, as the ``taps`` of a target module gives them; empty where the device cannot give any.
``taps_each(path, target, program, samples)``
    may be left out: ``taps`` of each of several samples (N, ...) by one start.
``profile(path, target, program, settings, inputs, progress=None)``
    an :class:`edgekit.profile.Profile`. ``inputs`` are a few samples (N, ...), one array for each input of the program: real ones
    where the run has them, since a cost may depend on the data. ``file`` and ``sha256`` are filled in by the caller.
``reference(path, target, program, sample)``
    may be left out: what the device must compute for one sample (1, ...) to the last bit, as (layer to int8 output, outputs as
    ``run`` gives them); ``verify`` demands equality. None where there is no such reference.
``close()``
    release what it holds (connections, folders); idempotent.

A new device is one module with ``connect`` and one row in :data:`DEVICES`; ``edgekit profile``, ``edgekit verify --device`` and
the recipe's ``profile:`` take it from there. Errors are those of :mod:`edgekit.errors`: an unknown name is an InputError that
lists what there is, a missing tool a MissingTool; :func:`naming` adds the device's name where a message lacks it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from edgekit.errors import EdgekitError, InputError

__all__ = ["DEVICES", "connect", "naming"]

DEVICES: dict[str, str] = {
    "local": "edgekit.devices.local",
    "qemu": "edgekit.devices.board",
    "qemu-aarch64": "edgekit.devices.emulated_linux",
    "sim": "edgekit.devices.sim",
    "ssh": "edgekit.devices.ssh",
}
"""Scheme to module; importing one starts nothing and imports no runtime."""


def connect(spec: str) -> Any:
    """The device that ``spec`` names.

    Raises:
        InputError: there is no such device.
        MissingTool: what it needs is not installed.
    """
    scheme = spec.partition(":")[0]
    if scheme not in DEVICES:
        raise InputError(f"device {spec!r} is unknown; choose one of: {', '.join(DEVICES)}")
    return importlib.import_module(DEVICES[scheme]).connect(spec)


@contextlib.contextmanager
def naming(device: Any) -> Iterator[None]:
    """Errors inside say which device they came from."""
    try:
        yield
    except EdgekitError as error:
        own = device.name.partition(":")[2] or device.name
        if own in str(error):
            raise
        raise type(error)(f"{device.name}: {error}") from error
