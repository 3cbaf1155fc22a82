"""``edgekit doctor`` and ``edgekit targets``: what is installed, and what each target would do with a model."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

from edgekit import cache, console, environment
from edgekit.errors import EdgekitError, InputError

__all__ = ["examine", "show", "targets"]

TOOLS = {
    "arm-none-eabi-gcc": "builds firmware (cortex-m0 to cortex-m55)",
    "qemu-system-arm": "runs and measures firmware (devices qemu:mps2-an386, ...)",
    "gcc": "builds the emulator's instruction counter",
    "g++": "builds the 1-bit kernels of .pte files, when one is first run here",
    "aarch64-linux-gnu-g++": "the same for arm64 devices",
    "chromium": "draws the report page in a test",
}
"""Programs that edgekit may use, and for what."""


def targets() -> list[dict[str, Any]]:
    """Every target: name, file suffix, extra, options, and what is missing (None: it can be used)."""
    from edgekit.targets import TARGETS, get

    found = []
    for name in TARGETS:
        module = get(name)
        options = ", ".join(f"{f.name}={_default(f)}" for f in dataclasses.fields(module.Options))
        missing = module.available()
        remedy = missing if missing is None or not module.EXTRA else f"{missing}; pip install 'edgekit[{module.EXTRA}]'"
        found.append({"name": name, "suffix": module.SUFFIX, "extra": module.EXTRA, "options": options, "missing": remedy})
    return found


def examine(model: str | None = None, data: str | None = None, shape: str | None = None) -> dict[str, Any]:
    """Everything that ``doctor`` prints, as plain values.

    Args:
        model: a factory or ``.pt2``; without it only the installation is looked at.
        data: a data factory, for a sample input; or give ``shape``, comma-separated with batch.

    Raises:
        InputError: the model cannot be loaded, or nothing says what its input looks like.
    """
    from edgekit.devices import simulators

    found: dict[str, Any] = {
        "environment": environment.describe(),
        "targets": targets(),
        "tools": {name: shutil.which(name) is not None for name in TOOLS},
        "simulators": {name: name in simulators.installed() for name in simulators.SIMULATORS},
        "cache": {"folder": str(cache.folder()), "bytes": _bytes(cache.folder())},
    }
    if model is not None:
        found["model"] = _model(model, data, shape)
    return found


def show(found: dict[str, Any]) -> None:
    """The result of :func:`examine` as tables."""
    about = found["environment"]
    rows = [[name, version or "not installed"] for name, version in about["packages"].items()]
    rows = [["edgekit", about["edgekit"]], ["python", about["python"]], *rows]
    console.print_table(
        f"{about['system']} {about['machine']}, {about['processor']}, {about['cores']} cores", ["package", "version"], rows
    )
    console.print_table(
        "targets",
        ["target", "installed"],
        [[t["name"], "yes" if t["missing"] is None else f"no: {t['missing']}"] for t in found["targets"]],
    )
    rows = [[name, there, TOOLS[name]] for name, there in found["tools"].items()]
    console.print_table("tools", ["program", "found", "used for"], rows)
    there = [name for name, set_up in found["simulators"].items() if set_up]
    missing = ", ".join(name for name in found["simulators"] if name not in there)
    print(f"simulators: {', '.join(there) or 'none'}" + (f"; `edgekit setup-sim` makes {missing}" if missing else ""))
    print(f"cache: {found['cache']['folder']}, {console.size(found['cache']['bytes'])}; it may be deleted at any time")
    if "model" in found:
        rows = [
            [r["target"], "takes it" if r["takes"] else "cannot take it", "\n".join(r["why"])] for r in found["model"]["targets"]
        ]
        about = found["model"]
        share = 100 * about["float_macs"] / (about["macs"] or 1)
        title = (
            f"model: {about['parameters']:,} parameters, {about['macs']:,} multiply-accumulates, {share:.1f} % of them in float"
        )
        console.print_table(title, ["target", "model", "why"], rows)
        if found["model"]["float"]:
            console.print_table("would stay in float", ["layer", "operator", "reason"], found["model"]["float"])


def _model(spec: str, data: str | None, shape: str | None) -> dict[str, Any]:
    """What each target would do with a model: the float graph is pre-flighted, then quantized with the ranges of one sample."""
    import torch

    from edgekit import source
    from edgekit.compress.capture import export_float
    from edgekit.compress.ptq import PTQ, quantize_model
    from edgekit.data import Data
    from edgekit.frozen import load
    from edgekit.targets import TARGETS, preflight

    problems: dict[str, list[str]] = {name: [] for name in TARGETS}
    if spec.endswith(".pt2") and _is_frozen(Path(spec)):
        program = load(Path(spec))
    else:
        model = source.load_model(spec)
        sample = _sample(model, data, shape)
        export_float(model, sample)  # says what is wrong with a model that cannot be captured
        exported = torch.export.export(model, sample, strict=False)
        problems = {name: [str(p) for p in preflight.check_model(exported, name)] for name in TARGETS}
        settings = PTQ(observer="minmax", samples=1)
        program = quantize_model(model, Data(sample if len(sample) > 1 else sample[0]), settings)
    for name, found in problems.items():
        try:
            preflight.check_program(program, name)
        except EdgekitError as error:
            found += [] if found else [str(error)]
    return {
        "parameters": program.parameters,
        "macs": program.macs,
        "float_macs": sum(x.macs for x in program.float_layers),
        "float": [[u.layer, u.op, u.reason] for u in program.unquantized],
        "targets": [{"target": name, "takes": not found, "why": found} for name, found in problems.items()],
    }


def _sample(model: Any, data: str | None, shape: str | None) -> tuple[Any, ...]:
    """A sample input from a data factory, or standard-normal values of the shape given."""
    import torch

    from edgekit import source
    from edgekit.data import sample_inputs

    if data is not None:
        return sample_inputs(model, source.load_data(data))
    if shape is None:
        raise InputError("doctor --model needs --data file.py:factory or --shape such as 1,3,32,32 (several inputs: a;b)")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*(;[1-9]\d*(,[1-9]\d*)*)*", shape):
        raise InputError(
            f"--shape is {shape!r}; expected whole numbers from 1, batch first, such as 1,3,32,32 (several inputs: a;b)"
        )
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*map(int, one.split(",")), generator=generator) for one in shape.split(";"))


def _is_frozen(path: Path) -> bool:
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("extra/edgekit.json") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default is not dataclasses.MISSING else "..."


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else 0
