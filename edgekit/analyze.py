"""``edgekit analyze``: which layer's quantization hurts, measured on calibration data, as a table, JSON and a heat map.

The measurements are :func:`edgekit.compress.ptq.sensitivity.sensitivity`; a run folder keeps them as ``analysis.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import recipe, runfolder, source
from edgekit.errors import FormatError, InputError
from edgekit.files import write_json

if TYPE_CHECKING:
    from edgekit.compress.ptq.sensitivity import Layer
    from edgekit.stage_runner import Progress

__all__ = ["FILE", "HEADS", "Analysis", "analyze", "heat", "load", "rows", "verdict"]

FILE = "analysis.json"
HEADS = (
    "layer",
    "operator",
    "bits",
    "weights dB",
    "predicted dB",
    "output dB",
    "alone dB",
    "difference",
    "up to here dB",
    "share %",
)
"""Columns of the table; dB: signal to quantization noise at the model's output, more is better."""


@dataclass(frozen=True)
class Analysis:
    """Sensitivity of every integer layer, in execution order, and what it was measured with."""

    layers: tuple[Layer, ...]
    samples: int
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "samples": self.samples,
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "layers": [x.to_json() for x in self.layers],
            "verdict": verdict(self),
        }


def analyze(
    path: Path, *, samples: int = 64, worst: int = 3, seed: int | None = None, progress: Progress | None = None
) -> Analysis:
    """Measure the sensitivity of a recipe's layers; for a run folder, write ``analysis.json`` and its report too.

    Args:
        path: a recipe, or a run folder (its recipe is taken).
        samples: calibration samples that outputs are compared on.
        worst: layers that remedies are tried for.

    Raises:
        InputError: the recipe quantizes nothing.
        EdgekitError: as the stages load and compress.
    """
    path = Path(path)
    if not path.is_dir():
        return _measured(recipe.load(path), samples, worst, seed, progress)
    runfolder.open_run(path, "frozen.pt2", "recipe.yaml")
    found = _measured(recipe.load(path / "recipe.yaml", files=False), samples, worst, seed, progress)
    with runfolder.staged(path, keep=True) as work:
        write_json(work / FILE, found.to_json())
        if (work / "report.html").exists() and (work / "parity.json").exists():
            from edgekit.report import write_report

            write_report(work)
    return found


def _measured(settings: recipe.Recipe, samples: int, worst: int, seed: int | None, progress: Progress | None) -> Analysis:
    from edgekit.compress.capture import capture
    from edgekit.compress.ptq.quantize import calibration_stream, check_patterns
    from edgekit.compress.ptq.sensitivity import sensitivity
    from edgekit.compress.ptq.settings import PTQ, Quantization
    from edgekit.data import sample_inputs

    blocks = [b for b in settings.compress if isinstance(b.settings, Quantization)]
    if not blocks:
        raise InputError("analyze: the recipe has no ptq or qat block; add one, such as `- ptq: {weights: int4}`")
    how = blocks[0].settings
    assert isinstance(how, Quantization)
    if how.activations in ("dynamic", "float"):
        raise InputError(
            f"analyze: with activations {how.activations} no activation is quantized ahead; take static ones to analyze"
        )
    how = how if seed is None else replace(how, seed=seed)
    notes = ["Weights were rounded to nearest, at the recipe's bits, scales and ranges."]
    if skipped := [b.kind for b in settings.compress if b is not blocks[0]]:
        notes.append(f"Not applied before: {', '.join(skipped)}.")
    model, data = source.load_model(settings.model, settings.seed), source.load_data(settings.data, settings.seed)
    graph = capture(model, sample_inputs(model, data))
    check_patterns(graph, how)
    stream = calibration_stream(graph, how, data)
    if isinstance(how, PTQ) and how.mixed is not None:
        from edgekit.compress.ptq.mixed import choose_bits

        how, _ = choose_bits(graph, how, data, stream)

    def step(done: int, total: int) -> None:
        if progress:
            progress("measure layers", done, total)

    found = sensitivity(graph, how, stream, samples=samples, worst=worst, progress=step)
    if not found:
        raise InputError("analyze: the model has no layer that can be quantized")
    return Analysis(found, samples, asdict(how), tuple(notes))


def load(folder: Path) -> Analysis | None:
    """What a run folder's ``analysis.json`` holds; None without one.

    Raises:
        FormatError: it is damaged.
    """
    from edgekit.compress.ptq.sensitivity import Layer, Remedy

    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        names = {f.name for f in fields(Layer)}
        layers = [
            Layer(**{k: v for k, v in x.items() if k in names} | {"remedies": tuple(Remedy(**r) for r in x["remedies"])})
            for x in value["layers"]
        ]
        return Analysis(tuple(layers), value["samples"], value["settings"], tuple(value["notes"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: damaged ({error}); run `edgekit analyze` again") from error


def rows(found: Analysis) -> list[list[Any]]:
    """A row for each layer, in the order of :data:`HEADS`."""
    return [
        [
            x.name, x.kind, x.weight_bits or None, _db(x.weights_db), _db(x.predicted_db), _db(x.output_db), _db(x.alone_db),
            round(x.difference, 4), _db(x.together_db), round(100 * x.share, 1),
        ]
        for x in found.layers
    ]  # fmt: skip


def _db(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def verdict(found: Analysis) -> list[str]:
    """A sentence for each layer that hurts, worst first: its share, what in it hurts, and what helped."""
    from edgekit.compress.ptq.sensitivity import hurting

    said = []
    for x in hurting(found.layers):
        part = "its output" if x.weights_db is None or x.output_db < x.weights_db else "its weights"
        text = f"{x.name}: {100 * x.share:.0f} % of the noise, {x.alone_db:.1f} dB alone, mostly by {part}"
        helped = [f"{r.setting} ({r.alone_db:.1f} dB)" for r in x.remedies[:3]]
        said.append(f"{text}; {'helps: ' + ', '.join(helped) if helped else 'none of the settings tried helps'}")
    return said


def heat(value: float | None, values: Sequence[float]) -> float:
    """0 (the best of ``values``) to 1 (the worst), for a heat map."""
    low, high = min(values), max(values)
    return 0.0 if value is None or high <= low else (high - value) / (high - low)
