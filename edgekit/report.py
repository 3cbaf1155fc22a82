"""One self-contained HTML page of a run folder: no script, no network, every value escaped, every number labelled.

"measured" means taken from running a file or from the file itself; "modelled" means counted from shapes and integers. The page is
drawn by ``report.html.jinja`` (inline CSS, charts as inline SVG) and is the same for the same run folder. What is absent from the
folder is named on the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgekit import analyze
from edgekit.errors import FormatError
from edgekit.files import sha256, write_whole
from edgekit.frozen import FrozenProgram, load
from edgekit.parity import ArtifactParity, Parity
from edgekit.report_costs import costs
from edgekit.report_passes import flat, passes_of
from edgekit.report_stages import RUNS, charts, columns, count, coverage, fixed, islands, layers, lsb, size, stage

__all__ = ["render", "write_report"]


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder that holds ``frozen.pt2`` and ``parity.json``; returns its path.

    Raises:
        FormatError: one of the two is missing or damaged.
    """
    path = Path(folder) / "report.html"
    write_whole(path, render(Path(folder)))
    return path


def render(folder: Path) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    program, parity = load(folder / "frozen.pt2"), Parity.load(folder / "parity.json")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(size=size, count=count, fixed=fixed)
    template = environment.from_string(files("edgekit").joinpath("report.html.jinja").read_text(encoding="utf-8"))
    recipe = folder / "recipe.yaml"
    return template.render(
        parity=parity,
        unit=" %" if parity.metric == "accuracy" else "",
        tiles=_tiles(parity, program),
        columns=columns(parity),
        stages=[stage(s, parity) for s in parity.stages],
        charts=charts(parity),
        coverage=[coverage(a) | islands(a, program) for a in parity.artifacts],
        runs=RUNS,
        artifacts=parity.artifacts,
        layers=layers(program, parity),
        totals=_totals(program),
        analysis=_analysis(folder),
        profiles=costs(folder),
        passes=passes_of(record := _json(folder / "compress.json")),
        warnings=record.get("warnings", []) if isinstance(record, Mapping) else [],
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
        unquantized=[(u.layer, u.op, u.reason, program.sources.get(u.layer, "")) for u in program.unquantized],
        environment=flat(_json(folder / "env.json")),
        hashes=_hashes(folder),
    )


def _tiles(parity: Parity, program: FrozenProgram) -> list[dict[str, str]]:
    """The numbers that stand at the top."""
    tiles = []
    by_name = {s.name: s for s in parity.stages}
    files_, judged = [a.stage for a in parity.artifacts], "files"
    if not files_ and "frozen" in by_name:  # a recipe without targets
        files_, judged = [by_name["frozen"]], "frozen program"
    source = by_name.get("float")
    scored = [s.metric for s in files_ if s.metric is not None]
    if scored:
        shown = _range([fixed(v, 2) for v in (min(scored), max(scored))]) + (" %" if parity.metric == "accuracy" else "")
        note = f"float {fixed(source.metric, 2)}, {parity.samples} samples" if source and source.metric is not None else ""
        tiles.append({"label": f"{parity.metric} of the {judged}", "value": shown, "note": note, "how": "measured"})
    sizes = [a.stage.bytes for a in parity.artifacts if a.stage.bytes is not None]
    if sizes:
        smallest = min((a for a in parity.artifacts if a.stage.bytes is not None), key=lambda a: a.stage.bytes or 0)
        ratio = _ratio(smallest, source.bytes) if source and source.bytes else ""
        tiles.append({"label": "smallest file", "value": size(min(sizes)), "note": ratio, "how": "measured"})
    checked = [layer for a in parity.artifacts for layer in a.layers]
    within = sum(layer.within for layer in checked)
    note = f"largest difference {lsb(max((x.max_lsb for x in checked), default=0.0))} LSB, {parity.settings['max_lsb']} allowed"
    if checked:
        tiles.append({"label": "layers within tolerance", "value": f"{within} / {len(checked)}", "note": note, "how": "measured"})
    shares = [1.0 - coverage(a)["shares"]["float"] for a in parity.artifacts]
    if shares:
        value = _range([fixed(100 * v, 1) for v in (min(shares), max(shares))]) + " %"
        note = f"of {count(program.macs)} MACs"
        tiles.append({"label": "MACs in integers", "value": value, "note": note, "how": "modelled"})
    return tiles


def _range(ends: Sequence[str]) -> str:
    return ends[0] if ends[0] == ends[1] else f"{ends[0]}–{ends[1]}"


def _totals(program: FrozenProgram) -> dict[str, int]:
    return {"parameters": program.parameters, "macs": program.macs, "bytes": program.weight_bytes}


def _analysis(folder: Path) -> dict[str, Any] | None:
    """The heat map of sensitivities: heads, and for each layer its cells as (text, heat 0 to 1 or None)."""
    found = analyze.load(folder)
    if found is None:
        return None
    columns = list(zip(*analyze.rows(found), strict=True))
    warm = {i for i, head in enumerate(analyze.HEADS) if head.endswith("dB")}
    scale = [v for i in warm for v in columns[i] if v is not None and v < 100]
    cells = [
        [
            (
                "–" if v is None else str(v),
                analyze.heat(min(v, max(scale)), scale) if i in warm and v is not None and scale else None,
            )
            for i, v in enumerate(row)
        ]
        for row in analyze.rows(found)
    ]
    return {
        "heads": analyze.HEADS,
        "rows": cells,
        "verdict": analyze.verdict(found),
        "notes": found.notes,
        "samples": found.samples,
    }


def _json(path: Path) -> Any:
    """A JSON file of the folder, None if it is not there."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path}: damaged ({error}); make the run again") from error


def _hashes(folder: Path) -> list[tuple[str, int, str]]:
    """Name, bytes and SHA-256 of the folder's files, but the page itself and the manifest, which come later."""
    skipped = {"report.html", "manifest.json"}
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in skipped and not p.name.startswith("."))
    return [(p.relative_to(folder).as_posix(), p.stat().st_size, sha256(p)) for p in found]


def _ratio(artifact: ArtifactParity, before: int) -> str:
    """A file, or the weights alone of a firmware, which has its code with them, against the float weights."""
    weights = artifact.artifact.get("memory", {}).get("flash_weights")
    if weights is None:
        return _times_smaller(before, artifact.stage.bytes or 0)
    return f"its weights {_times_smaller(before, weights)}" if weights else "no weights of its own"


def _times_smaller(before: int, after: int) -> str:
    """How a file compares with the float weights, in words."""
    if after > before:
        return f"{after / before:.1f}× as large as the float weights"
    return f"{before / after:.1f}× smaller than the float weights"
