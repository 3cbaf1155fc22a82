"""The command line. Exit codes: 0 fine, 1 a check failed, 2 bad input, 3 a tool or extra is missing, 70 a bug in edgekit.

Commands import what they need when they run: ``edgekit --help`` imports no torch.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from edgekit import __version__, console
from edgekit.errors import EdgekitError, InputError

__all__ = ["app", "main"]

app = typer.Typer(
    name="edgekit",
    help="Compress a PyTorch model and lower it, unchanged to the integer, to ExecuTorch, TFLite and ONNX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log, show third parties' messages, and tracebacks of errors.")]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of everything random, instead of the recipe's.")
]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda: where compression runs.")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Take finished stages from the cache, or do all again.")]
Run = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN", show_default=False)]
RecipeFile = Annotated[Path, typer.Argument(help="A recipe.yaml.", metavar="RECIPE", show_default=False)]
Names = Annotated[
    list[str] | None, typer.Option("--target", "-t", help="Only this target (repeat for more); see `edgekit targets`.")
]

Output = Annotated[str | None, typer.Option("--output", help="For a .nir file with several outputs: the one to look at.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeFile,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; runs/<name> if left out.")] = None,
    seed: Seed = None,
    device: Device = None,
    resume: Resume = True,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Do every stage of a recipe: compress, export, verify, profile, report."""
    from edgekit import pipeline

    _finish(json, pipeline.run, recipe, out or _default_out(recipe), seed=seed, device=device, resume=resume)


@app.command()
def compress(
    recipe: RecipeFile,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; runs/<name> if left out.")] = None,
    seed: Seed = None,
    device: Device = None,
    resume: Resume = True,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compress the recipe's model into a frozen program (frozen.pt2)."""
    from edgekit import pipeline

    _finish(json, pipeline.compress, recipe, out or _default_out(recipe), seed=seed, device=device, resume=resume)


@app.command()
def export(
    run: Run,
    target: Names = None,
    io: Annotated[str | None, typer.Option("--io", help="Inputs and outputs of the file: int8 or float (tflite).")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", help="Another option of the target, key=value.")] = None,
    resume: Resume = True,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Lower a run's frozen program to its targets, or to those named."""
    from edgekit import pipeline

    _finish(json, pipeline.export, run, _chosen(run, target, io, option), resume=resume)


@app.command("import")
def import_nir(
    file: Annotated[Path, typer.Argument(help="A .nir file of a spiking network.", metavar="FILE", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder.")],
    target: Names = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Time steps, where the file does not say them.")] = None,
    encoding: Annotated[str | None, typer.Option("--encoding", help="repeat: inputs (N, ...); sequence: (N, T, ...).")] = None,
    readout: Annotated[str | None, typer.Option("--readout", help="accumulate: outputs summed over the steps; sequence.")] = None,
    dt: Annotated[float | None, typer.Option("--dt", help="Length of a step, in the unit of the time constants.")] = None,
    reset: Annotated[str | None, typer.Option("--reset", help="For neurons that do not say it: subtract, zero or value.")] = None,
    tie: Annotated[
        str | None, typer.Option("--tie", help="For neurons that do not say it: a spike at v ge or gt threshold.")
    ] = None,
    weights: Annotated[
        str, typer.Option("--weights", help="float, or the integer form that firmware runs: int8, int4, int2.")
    ] = "float",
    inputs: Annotated[
        Path | None, typer.Option("--inputs", help="Of the integer form: values (T, N, ...) as .npy or .npz that set its scales.")
    ] = None,
    json: Json = False,
    output: Output = None,
    verbose: Verbose = False,
) -> None:
    """Make a run of a NIR file: the frozen program of its network, and files of it."""
    from edgekit.in_memory import export_program
    from edgekit.nir import read
    from edgekit.nir.semantics import with_output
    from edgekit.nir.to_module import to_program

    facts = {key: value for key, value in (("reset", reset), ("tie", tie)) if value is not None}
    program = to_program(
        with_output(read(file), output), steps, name=file.stem, encoding=encoding, readout=readout, dt=dt, facts=facts
    )
    made: Any = program
    if weights != "float":
        from edgekit.nir_integers import integer_form

        made = integer_form(program, weights, inputs)
    _finish(json, export_program, made, out, list(target or []))


@app.command()
def step(
    run: Run,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder.")],
    target: Names = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make a run of one time step of a spiking program: the state goes in and comes out with each call."""
    from edgekit.frozen import load
    from edgekit.frozen.one_step import stepping
    from edgekit.in_memory import export_program

    _finish(json, export_program, stepping(load(run)), out, list(target or []))


@app.command()
def verify(
    run: Run,
    target: Names = None,
    device: Annotated[
        list[str] | None, typer.Option("--device", "-d", help="Run the files there instead (repeat for more), as for profile.")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option("--inputs", help="For a .nir file: spikes (T, N, ...) as .npy, or .npz with labels.")
    ] = None,
    output: Output = None,
    seed: Seed = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Prove that every file of a run computes what its frozen program computes; or run a .nir file on simulators."""
    if run.suffix == ".nir":
        from edgekit import agreement

        made = agreement.verify_file(run, device or ["sim:nir"], inputs, output=output)
        console.print_json(made.to_json()) if json else console.print_agreements(made.agreements)
        for _, problem in () if json else made.failures:
            console.error(str(problem))
        raise typer.Exit(made.exit_code)
    from edgekit import pipeline

    _finish(json, pipeline.verify, run, target, device, seed=seed)


@app.command()
def profile(
    run: Run,
    device: Annotated[
        list[str] | None, typer.Option("--device", "-d", help="Where to measure (repeat for more); the recipe's if left out.")
    ] = None,
    target: Names = None,
    num_threads: Annotated[int, typer.Option("--num_threads", "--num-threads", min=1, help="Threads of the runtime.")] = 1,
    num_runs: Annotated[int, typer.Option("--num_runs", "--num-runs", min=1, help="Timed runs.")] = 50,
    warmup_runs: Annotated[int, typer.Option("--warmup_runs", "--warmup-runs", min=0, help="Runs before them.")] = 5,
    min_secs: Annotated[
        float | None, typer.Option("--min_secs", "--min-secs", min=0, help="Go on for at least this many seconds.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="Also measure each layer.")] = True,
    inputs: Annotated[Path | None, typer.Option("--inputs", help="For a .nir file: spikes (T, N, ...) as .npy or .npz.")] = None,
    output: Output = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure what a run's files cost on a device: time, or instructions where it is emulated, and memory.

    Of a .nir file, or of a run's on a device sim:NAME: synaptic operations, spikes and membrane updates.
    """
    if run.suffix == ".nir":
        from edgekit import agreement

        made = agreement.profile_file(run, device or ["sim:nir"], inputs, layers, output)
        if json:
            console.print_json([one.to_json() for one in made])
        for one in () if json else made:
            console.print_profile(one)
        return
    from edgekit import pipeline
    from edgekit.profile import Settings

    settings = Settings(num_threads, num_runs, warmup_runs, min_secs, layers)
    _finish(json, pipeline.profile, run, device, target, settings)


@app.command()
def compare(
    run: Run,
    other: Annotated[Path, typer.Argument(help="Another run folder.", metavar="OTHER", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Also where they were measured on machines that differ.")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compare what two runs were measured at; times of machines that differ only with --force."""
    from edgekit.compare import compare_runs

    rows = compare_runs(run, other, force=force)
    console.print_json([row.to_json() for row in rows]) if json else console.print_comparison(rows)


@app.command()
def analyze(
    path: Annotated[Path, typer.Argument(help="A recipe.yaml or a run folder.", metavar="RECIPE|RUN", show_default=False)],
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration samples that outputs are compared on.")] = 64,
    worst: Annotated[int, typer.Option("--worst", min=0, help="Layers that remedies are tried for.")] = 3,
    seed: Seed = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure which layer's quantization hurts the output, and what would help; a run folder's report gets a heat map."""
    from edgekit import analyze as sensitivity

    with console.progress_bars(quiet=json) as progress:
        found = sensitivity.analyze(path, samples=samples, worst=worst, seed=seed, progress=progress)
    if json:
        console.print_json(found.to_json())
        return
    console.print_table(f"{found.samples} calibration samples", sensitivity.HEADS, sensitivity.rows(found))
    for line in (*sensitivity.verdict(found), *found.notes):
        print(line)


@app.command()
def attack(
    run: Run,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", help="fgsm, pgd or sda (repeat for more); fgsm and pgd if left out.")
    ] = None,
    eps: Annotated[
        list[float] | None, typer.Option("--eps", help="Size in 255ths of the input's range (repeat for more).")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of pgd.")] = 10,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Evaluation samples that are attacked.")] = 100,
    seed: Seed = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Attack a run's spiking program: what accuracy is left, and how many bits of a binary input it takes."""
    from edgekit import robustness

    with console.progress_bars(quiet=json) as progress:
        found = robustness.attack_run(
            run, kind or ("fgsm", "pgd"), eps=eps or (2.0, 8.0), steps=steps, samples=samples, seed=seed, progress=progress
        )
    if json:
        console.print_json(found)
        return
    rows = found["rows"]
    console.print_table(f"{rows[0]['samples']} evaluation samples", list(rows[0]), [list(r.values()) for r in rows])


@app.command()
def predict(
    path: Annotated[Path, typer.Argument(help="A recipe.yaml or a run folder.", metavar="RECIPE|RUN", show_default=False)],
    target: Names = None,
    tables: Annotated[
        Path | None, typer.Option("--tables", help="Folder of tables of another machine, made by benchmarks/costs.py.")
    ] = None,
    seed: Seed = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Predict the size and speed of a recipe's files before compressing, from tables of measured operators."""
    from edgekit import predict as predictions

    with console.progress_bars(quiet=json) as progress:
        found = predictions.predict(path, targets=target, seed=seed, tables=tables, progress=progress)
    if json:
        console.print_json(found.to_json())
        return
    console.print_table("predicted, not measured", predictions.HEADS, predictions.rows(found))
    for line in predictions.remarks(found):
        print(line)


@app.command()
def deploy(
    run: Run,
    device: Annotated[str, typer.Option("--device", "-d", help="ssh://user@host[:port].", show_default=False)],
    target: Annotated[str | None, typer.Option("--target", "-t", help="Which file; the first that the device runs.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the deployment; the recipe's name if left out.")] = None,
    service: Annotated[bool, typer.Option("--service", help="Also a systemd user unit that answers samples over HTTP.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing, say what would be done.")] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Go back to the version before.")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Put a run's file on a device: proven there first, switched to in one step."""
    from edgekit import deploy as deployments

    with console.progress_bars(quiet=json) as progress:
        if rollback:
            made = deployments.rollback(run, device, name=name)
        else:
            made = deployments.deploy(
                run, device, target=target, name=name, with_service=service, dry_run=dry_run, progress=progress
            )
    console.print_json(made.to_json()) if json else console.print_deployment(made)


@app.command()
def report(run: Run, json: Json = False, verbose: Verbose = False) -> None:
    """Write one page (report.html) about a verified run."""
    from edgekit import pipeline

    _finish(json, pipeline.report, run)


@app.command()
def describe(
    program: Annotated[Path, typer.Argument(help="A frozen program (.pt2), a .nir file or a run folder.", metavar="FILE")],
    chip: Annotated[
        list[str] | None,
        typer.Option(
            "--chip",
            help="Also check a .nir file against a chip's rules (repeat for more): xylo-audio-2, xylo-audio-3, xylo-imu, "
            "dynapcnn, speck2f, loihi1, loihi2.",
        ),
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Print the layers of a frozen program: shapes, bits, parameters, MACs, bytes; or of a .nir file, and what chips it fits."""
    if program.suffix == ".nir" or chip:
        from edgekit import nir_description

        about = nir_description.describe(program / "model.nir" if program.is_dir() else program, chip or ())
        console.print_json(about.to_json()) if json else console.print_nir(about)
        raise typer.Exit(0 if all(fit.ok for fit in about.fits) else 1)
    if program.suffix in (".pte", ".tflite", ".onnx"):
        made = f"describe its run folder instead, `edgekit describe {program.parent}`, or its frozen.pt2"
        raise InputError(f"{program}: describe reads frozen programs (.pt2), .nir files and run folders; {made}")
    from edgekit.frozen import load
    from edgekit.frozen.describe import describe as describe_program
    from edgekit.runfolder import open_run

    found = describe_program(load(open_run(program, "frozen.pt2") / "frozen.pt2" if program.is_dir() else program))
    console.print_json(found.to_json()) if json else console.print_description(found)


@app.command()
def targets(json: Json = False, verbose: Verbose = False) -> None:
    """List the targets, and which of them can be used here."""
    from edgekit.doctor import targets as installed

    found = installed()
    if json:
        console.print_json(found)
        return
    rows = [[t["name"], t["suffix"], "yes" if t["missing"] is None else f"no: {t['missing']}", t["options"]] for t in found]
    console.print_table("targets", ["target", "file", "installed", "options"], rows)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option("--model", help="file.py:factory, package.module:factory, or a .pt2.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Factory of the data, for a sample input.")] = None,
    shape: Annotated[str | None, typer.Option("--shape", help="Input shape with batch instead, such as 1,3,32,32.")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Print versions, tools and extras, and what each target would do with a model."""
    from edgekit import doctor as checks

    found = checks.examine(model, data, shape)
    if json:
        console.print_json(found)
    else:
        checks.show(found)


@app.command(name="setup-sim")
def setup_sim(
    system: Annotated[
        str, typer.Argument(help="arm64, or a simulator: spikingjelly, snntorch, norse, sinabs, nest, xylosim, lava, neurobench.")
    ] = "arm64",
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            help="arm64: tflite-runtime, ai-edge-litert, onnxruntime or executorch (repeat for more); all if left out.",
        ),
    ] = None,
    apt_sources: Annotated[
        Path | None,
        typer.Option("--apt-sources", help="arm64: a sources.list of Debian 12, if apt here is set to something else."),
    ] = None,
    python: Annotated[Path | None, typer.Option("--python", help="lava: a Python 3.10, if none is found.")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make, check or repair the emulated arm64 Linux, or a neuromorphic simulator, in the cache folder."""
    from edgekit.devices import arm64_root, simulators
    from edgekit.errors import InputError

    if system != "arm64" and system not in simulators.SIMULATORS:
        raise InputError(f"system {system!r} is unknown; choose one of: arm64, {', '.join(simulators.SIMULATORS)}")
    if (system == "arm64" and python is not None) or (system != "arm64" and (runtime or apt_sources)):
        raise InputError("--runtime and --apt-sources are for arm64, --python is for lava")
    with console.progress_bars(quiet=json) as bars:
        said = None if json else lambda what, done, total: None if done else print(f"{what} ...", file=sys.stderr)
        shown = bars if sys.stderr.isatty() else said
        if system == "arm64":
            found = arm64_root.setup(runtime, apt_sources, progress=shown)
        else:
            found = simulators.setup(system, python, progress=shown)
    if json:
        console.print_json(found)
    elif system == "arm64":
        console.print_table("arm64 Linux", ["part", "what was done"], list(found["parts"].items()))
        print(f"{found['folder']}  {console.size(found['bytes'])}, runs: {', '.join(found['runtimes'])}")
    else:
        print(f"{system}: {found['state']}, {', '.join(f'{p} {v}' for p, v in found['packages'].items())}")
        print(f"{found['folder']}  {console.size(found['bytes'])}")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where recipe.yaml goes.")] = Path(),
    model: Annotated[
        str | None, typer.Option("--model", help="file.py:factory or a .pt2; a starter is written if left out.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="file.py:factory that returns an edgekit.data.Data.")] = None,
    weights: Annotated[str, typer.Option("--weights", help="int8 or int4.")] = "int8",
    target: Names = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a recipe that runs; asks for what is not given."""
    from edgekit import init as starter

    ask = None if yes or json or not sys.stdin.isatty() else typer.prompt
    written = starter.write(folder, model=model, data=data, weights=weights, targets=target, ask=ask, force=force)
    if json:
        console.print_json({"written": [str(p) for p in written]})
        return
    print("wrote " + ", ".join(str(p) for p in written))
    print(f"next: edgekit run {written[0]}")


def main() -> None:
    """Entry point of the ``edgekit`` command."""
    verbose = any(a in ("-v", "--verbose") for a in sys.argv[1:])
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    else:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    try:
        app()
    except EdgekitError as error:
        if verbose:
            import traceback

            traceback.print_exc()
        console.error(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(0)
    except Exception:
        import traceback

        traceback.print_exc()
        console.error("this is a bug in edgekit; please report it with the lines above")
        sys.exit(70)


def _finish(json: bool, verb: Any, *args: Any, **kwargs: Any) -> None:
    """Run a verb of the pipeline with progress, print its outcome, and exit with 1 if a check failed."""
    try:
        with console.progress_bars(quiet=json) as progress:
            outcome = verb(*args, **kwargs, progress=progress)
    except KeyboardInterrupt:
        console.error("interrupted; the run folder is as it was, and finished stages are kept")
        raise typer.Exit(130) from None
    if json:
        console.print_json(_plain(outcome))
    else:
        console.print_outcome(outcome)
    if not outcome.ok:
        raise typer.Exit(1)


def _plain(outcome: Any) -> dict[str, Any]:
    from edgekit.runfolder import names

    return {
        "run": str(outcome.folder),
        "ok": outcome.ok,
        "files": names(outcome.folder),
        "stages": [{"name": s.name, "state": s.state, "seconds": s.seconds} for s in outcome.stages],
        "parity": None if outcome.parity is None else outcome.parity.to_json(),
        "profiles": [p.to_json() for p in outcome.profiles],
        "warnings": list(outcome.warnings),
    }


def _default_out(path: Path) -> Path:
    from edgekit import recipe

    return Path("runs") / recipe.load(path).name


def _chosen(run: Path, names: list[str] | None, io: str | None, options: list[str] | None) -> Any:
    """Targets of the command line; None for the recipe's own."""
    from edgekit import recipe
    from edgekit.errors import InputError

    given: dict[str, Any] = {} if io is None else {"io": io}
    for text in options or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--option {text!r}: expected key=value")
        given[key] = {"true": True, "false": False}.get(value.lower(), value)
    if names is None:
        if given:
            raise InputError("--io and --option need a --target to apply to")
        return None
    return [recipe.target(name, given) for name in names]
