"""What the command line prints: tables on stdout, progress and errors on stderr. Imports no torch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekit.agreement import Agreement
    from edgekit.compare import Comparison
    from edgekit.deploy import Deployment
    from edgekit.frozen.describe import Description
    from edgekit.nir_description import NirDescription
    from edgekit.pipeline import Outcome, Progress
    from edgekit.profile import Profile

__all__ = [
    "error",
    "print_agreements",
    "print_comparison",
    "print_deployment",
    "print_description",
    "print_json",
    "print_nir",
    "print_outcome",
    "print_profile",
    "print_table",
    "progress_bars",
    "size",
    "warning",
]


def error(message: str) -> None:
    """One red "error:" line on stderr."""
    _print(sys.stderr, "[bold red]error:[/] ", message)


def warning(message: str) -> None:
    """One yellow "warning:" line on stderr."""
    _print(sys.stderr, "[yellow]warning:[/] ", message)


def print_json(value: Any) -> None:
    """A JSON document on stdout, nothing else."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], total: Sequence[Any] | None = None) -> None:
    """A table on stdout; numbers stand on the right. Wide cells fold, none is cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from edgekit.profile_table import text

    if title:  # not the table's own, which folds at the table's width
        _print(sys.stdout, "[bold]", title)
    table = Table(show_footer=total is not None, header_style="bold")
    for i, column in enumerate(columns):
        numeric = any(isinstance(row[i], int | float) for row in rows)
        footer = "" if total is None else text(total[i])
        table.add_column(column, justify="right" if numeric else "left", overflow="fold", footer=footer)
    for row in rows:
        table.add_row(*(Text(text(v, c)) for v, c in zip(row, columns, strict=True)))
    wide = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
    wide.print(table)


def print_agreements(found: Sequence[Agreement]) -> None:
    """Rasters of a NIR file on simulators, layer by layer."""
    for one in found:
        rows = [
            [
                r.name,
                r.expected,
                r.found,
                r.differing,
                r.values,
                r.lag,
                "-" if r.first is None else "step {}, sample {}, neuron {}".format(*r.first),
            ]
            for r in one.layers
        ]
        who = f"{one.simulator} {one.version}".strip()
        title = f"{who}: {one.steps} steps of {one.samples} samples ({one.inputs})"
        print_table(title, ["layer", "spikes expected", "found", "differing", "of", "lag", "first"], rows)
        for note in one.notes:
            print(f"  {note}")
        if one.accuracy is not None:
            print(f"  accuracy {one.accuracy:.2f} %, expected {one.expected_accuracy:.2f} %")
        print(one.verdict())


def print_nir(found: NirDescription) -> None:
    """Layers of a NIR file, and what each chip says of it."""
    facts = [
        f"{key} {value if not isinstance(value, float) else f'{value:g}'}" for key, value in found.inference.items() if value
    ]
    said = ", ".join([f"input {found.inputs}", f"output {', '.join(found.outputs)}", f"dt {found.dt:g}", *facts])
    if found.inference["steps"] is None:
        said += "; it does not say how many steps to run"
    print_table(f"{found.file}: {said}", found.columns, found.rows)
    for fit in found.fits:
        used = ", ".join(f"{what} {n:,} of {limit:,}" for what, (n, limit) in fit.used.items())
        print(f"{fit.title}: {'fits' if fit.ok else 'does not fit'} ({used})")
        for breach in fit.breaches:
            print(f"  {breach}  [{breach.source}]")
        for note in fit.notes:
            print(f"  note: {note}")


def print_description(found: Description) -> None:
    """Layers, totals, and what stays float."""
    rows = [
        [r.layer, f"{r.op} {r.kind}".strip(), _shape(r.shape), r.weight_bits, r.activation_bits, r.parameters, r.macs, r.bytes]
        for r in found.rows
    ]
    print_table(
        f"{found.name}: input {', '.join(_shape(s) for s in found.inputs)}",
        ["layer", "operator", "output", "w bits", "a bits", "parameters", "MACs", "bytes"],
        rows,
        ["total", "", "", None, None, found.parameters, found.macs, found.bytes],
    )
    if found.unquantized:
        print_table("left in float", ["layer", "operator", "reason"], found.unquantized)


def print_outcome(outcome: Outcome) -> None:
    """The stage table where the run was verified, what was measured, and the files with their sizes."""
    for message in outcome.warnings:
        warning(message)
    if outcome.parity is not None:
        columns = [outcome.parity.metric or "metric", "same class as float %", "max LSB", "mean LSB", "bytes"]
        rows = [
            [s.name, s.metric, s.agreement_float, s.max_lsb, s.mean_lsb, s.bytes] for s in outcome.parity.stages
        ]  # fmt: skip
        print_table(f"{outcome.parity.program}: {outcome.parity.samples} samples", ["stage", *columns], rows)
        for file in outcome.parity.artifacts:
            if file.exact:
                _print(sys.stdout, "", f"{file.name}: every layer and output equals its bit-exact reference")
            for note in file.notes[1:] if file.chip else ():
                _print(sys.stdout, "[dim]", f"{file.name}: {note}")
        for note in outcome.parity.notes:
            _print(sys.stdout, "[dim]", note)
        for breach in outcome.parity.breaches:
            error(breach)
    for i, found in enumerate(outcome.profiles):
        print_profile(found, again=any(found.fits == earlier.fits for earlier in outcome.profiles[:i]))
    files = sorted(p for p in outcome.folder.iterdir() if p.name.startswith(("model.", "frozen.", "report.")))
    for path in files:
        parts = path.rglob("*") if path.is_dir() else [path]
        _print(sys.stdout, "", f"{path}  {size(sum(p.stat().st_size for p in parts if p.is_file()))}")
    took = ", ".join(f"{s.name} {'cached' if s.state == 'cached' else f'{s.seconds:.1f} s'}" for s in outcome.stages)
    _print(sys.stdout, "[dim]", took)
    if outcome.parity is not None and outcome.ok:
        checked = "every file that was checked" if outcome.parity.unchecked else "every file"
        chips = [a.name for a in outcome.parity.artifacts if a.chip]
        if chips:
            _print(sys.stdout, "", f"{', '.join(chips)}: the chip's numbers, judged by the task within the allowed loss")
        if any(not a.chip for a in outcome.parity.artifacts):
            _print(sys.stdout, "[bold green]", f"{checked} computes what the frozen program computes")
        elif not chips:
            _print(sys.stdout, "", "the recipe has no targets: the frozen program was judged, no file was made")


def print_profile(found: Profile, *, again: bool = False) -> None:
    """Layers with their costs, figures by name, and what the firmware fits on, unless that was shown before (``again``)."""
    from edgekit import profile_table as tables

    table = tables.layers(found)
    _print(sys.stdout, "[bold]", tables.title(found))
    if table.rows:
        print_table("", table.columns, table.rows)
    for name, value in tables.figures(found):
        _print(sys.stdout, "", f"  {name}: {value}")
    if found.fits and not again:
        print_table("fits on (bytes)", tables.FITS, [tables.fit_row(fit) for fit in found.fits])
    for note in filter(None, (found.method, *found.notes)):
        _print(sys.stdout, "[dim]", note)


def print_comparison(rows: Sequence[Comparison]) -> None:
    """Costs of both runs and their ratio; what makes it doubtful as warnings."""
    columns = ["target", "device", "unit", "first", "second", "first / second", "of p90"]
    print_table("", columns, [[r.target, r.device, r.unit, r.first, r.second, r.ratio, r.p90_ratio] for r in rows])
    for row in rows:
        if row.differences:
            warning(f"{row.target} on {row.device}: the machines differ ({'; '.join(row.differences)})")
        for note in row.notes:
            warning(f"{row.target} on {row.device}: {note}")


def print_deployment(made: Deployment) -> None:
    """What was done, or would be, a line each."""
    head = f"{made.name} {made.version} on {made.device}"
    _print(sys.stdout, "[bold]", head if made.done else f"{head}: would")
    for step in made.steps:
        _print(sys.stdout, "", f"  {step}")


def size(count: int) -> str:
    """``size(98345) == "98.3 kB"`` (1 kB is 1000 bytes)."""
    return f"{count} B" if count < 1000 else f"{count / 1000:.1f} kB" if count < 1_000_000 else f"{count / 1e6:.2f} MB"


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Progress | None]:
    """A bar for each thing that runs, on stderr, gone at the end; a line for each stage where stderr is no terminal."""
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        yield _stage_lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bars:
        known: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in known:
                known[what] = bars.add_task(what, total=total or None)
            bars.update(known[what], completed=done, total=total or None)
            if total and done >= total:
                bars.update(known[what], visible=False)

        yield update


def _stage_lines() -> Progress:
    """Prints the seconds since now and a stage's name when it begins, which it says by (name, 0, 0)."""
    start = time.perf_counter()

    def update(what: str, done: int, total: int) -> None:
        if not done and not total:
            print(f"[{time.perf_counter() - start:6.1f} s] {what}", file=sys.stderr, flush=True)

    return update


def _shape(shape: Sequence[int]) -> str:
    """Whole, as in the report: dimension 0 is not the batch in every layer."""
    return "×".join(map(str, shape))


def _print(file: Any, style: str, message: str) -> None:
    """One line; ``message`` is the user's text and never markup; not wrapped, so that it can be searched."""
    from rich.console import Console
    from rich.text import Text

    prefix = Text.from_markup(style) if style.endswith("] ") else Text()
    body = Text(message, style=style.strip("[]") if style and not style.endswith("] ") else "")
    Console(file=file, soft_wrap=True, highlight=False).print(prefix + body)
