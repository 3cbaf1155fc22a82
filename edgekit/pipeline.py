"""The stages of a recipe: load -> compress -> freeze -> lower (each target) -> verify -> profile (each device) -> report.

:func:`run` does them all into one run folder; :func:`compress`, :func:`export`, :func:`verify`, :func:`profile` and
:func:`report` do one each, all but the first on the run folder of the one before. A stage's files are kept in the stage cache
(:mod:`edgekit.cache`) by the hash of what decides them, so a killed run goes on where it was, and the same inputs give the same
bytes; measurements of time are no such file. The run folder is replaced in one step when everything is made
(:mod:`edgekit.runfolder`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import environment, recipe, runfolder, source, stage_work
from edgekit.data import Data
from edgekit.errors import FormatError, InputError, MissingTool
from edgekit.files import write_json, write_whole
from edgekit.intake import check_device
from edgekit.recipe import Recipe, Target
from edgekit.shortfalls import shortfalls
from edgekit.stage_runner import Progress, StageNote, Stages
from edgekit.stage_work import Loaded

if TYPE_CHECKING:
    from edgekit.frozen import FrozenProgram
    from edgekit.parity import Parity
    from edgekit.profile import Profile, Settings

__all__ = [
    "Outcome",
    "Progress",
    "compress",
    "device_notes",
    "export",
    "export_program",
    "make",
    "profile",
    "report",
    "run",
    "verify",
]


@dataclass(frozen=True)
class Outcome:
    """What a verb made: the run folder, its stages in order, the parity if it was verified, what was measured, and
    warnings: what is less than was asked for (:mod:`edgekit.shortfalls`) among them."""

    folder: Path
    stages: tuple[StageNote, ...]
    parity: Parity | None = None
    profiles: tuple[Profile, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """No check failed."""
        return self.parity is None or self.parity.ok


def run(recipe_path: Path, out: Path, **options: Any) -> Outcome:
    """Every stage of a recipe into the run folder ``out``.

    Args:
        recipe_path: a ``recipe.yaml``.
        **options: as :func:`compress`.

    Raises:
        EdgekitError: any of them; ``out`` is then as it was before. A failed check is no error: see :attr:`Outcome.ok`.
    """
    return _from_recipe(recipe_path, out, whole=True, **options)


def compress(recipe_path: Path, out: Path, **options: Any) -> Outcome:
    """The stages load, compress and freeze into ``out``: ``frozen.pt2``, and what later verbs need.

    Args:
        **options: ``seed`` (int) and ``device`` ("cpu", "cuda") replace the recipe's; ``resume`` (True): take finished stages
            from the cache; ``progress``: see :data:`Progress`.
    """
    return _from_recipe(recipe_path, out, whole=False, **options)


def export(
    folder: Path, targets: Sequence[Target] | None = None, *, resume: bool = True, progress: Progress | None = None
) -> Outcome:
    """Lower the frozen program of a run folder.

    Args:
        targets: these replace, or are added to, the recipe's in the folder; None: the recipe's.

    Raises:
        FormatError: not a run folder, or its frozen program was altered.
        MissingTool, UnsupportedError, ParityError: from the target; the folder is then as it was before.
    """
    settings = _opened(folder)
    chosen = tuple(targets or settings.targets)
    if not chosen:
        raise InputError(f"{folder}: its recipe has no targets; name one with --target")
    _require(chosen)
    with runfolder.staged(folder, keep=True) as work:
        stages = Stages(work, resume, progress)
        _add(stages, settings, chosen, folder)
    return _outcome(stages, folder)


def verify(
    folder: Path,
    targets: Sequence[str] | None = None,
    devices: Sequence[str] | None = None,
    *,
    data: Data | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Check files of a run folder against its frozen program, and write ``parity.json``; a breach is no error, see ``ok``.

    A file that was altered since it was written is checked all the same, so that the layer is named. What ``parity.json`` says of
    files that are not checked stays, as long as they are the same.

    Args:
        targets: files to check; None: all.
        devices: check on these only (:mod:`edgekit.devices`); None: on this machine, and on those of the recipe's ``verify``.
        data: instead of what the recipe names.

    Raises:
        FormatError, InputError, MissingTool: nothing was checked; the folder is as it was before.
    """
    from edgekit import measure
    from edgekit.targets import present

    settings = _opened(folder)
    warnings = [f"{name} was altered after it was written" for name in runfolder.altered(folder)]
    try:
        if data is None and settings.data != recipe.IN_MEMORY:
            data = source.load_data(settings.data, settings.seed if seed is None else seed)
    except InputError as error:
        warnings.append(f"the recipe's data cannot be loaded ({error}); verified on the samples stored in the run")
    names = devices if devices is not None else settings.verify.devices if targets is None else ()
    there = present(folder)
    with measure.connected(names) as found:
        for device in found.values():
            if targets is None and there and not set(device.targets) & set(there):
                remedy = f"make one with `edgekit export {folder} --target {device.targets[0]}`"
                raise InputError(f"{folder} has {', '.join(there)}; {device.name} runs {', '.join(device.targets)}; {remedy}")
        on = measure.pairs(list(found.values()), targets, there)
        with runfolder.staged(folder, keep=True) as work:
            stages = Stages(work, False, progress)
            with stages.timed("verify"):
                parity = stage_work.verify(stages, settings, data, targets if devices is None else (), on)
            if (work / "report.html").exists():
                stage_work.report(stages)
    made = _outcome(stages, folder)
    return replace(made, parity=parity, warnings=(*warnings, *made.warnings))


def profile(
    folder: Path,
    devices: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    settings: Settings | None = None,
    *,
    progress: Progress | None = None,
) -> Outcome:
    """Measure files of a run folder on devices, and write ``profile.json``; what it already holds of others stays.

    Args:
        devices: names such as ``qemu:mps2-an386``, see :mod:`edgekit.devices`; None: the recipe's.
        targets: files to measure; None: all that the device runs. One that the run does not have yet is exported first.
        settings: threads and runs.

    Raises:
        FormatError: not a run folder, or a file to measure was altered.
        InputError: an unknown device, or a file that the device does not run.
        MissingTool: what the device needs is not installed.
    """
    from edgekit import measure
    from edgekit.targets import present

    recipe_ = _opened(folder)
    names = tuple(devices or recipe_.profile)
    if not names:
        raise InputError(f"{folder}: its recipe profiles on no device; name one with --device")
    with measure.connected(names) as found:
        chosen = measure.pairs(list(found.values()), targets, present(folder))
        known: dict[str, Target] = {t.name: t for t in recipe_.targets}
        wanted = dict.fromkeys(name for _, name in chosen)
        missing = [known.get(n, recipe.target(n, {})) for n in wanted if n not in present(folder)]
        _require(missing)
        _unaltered(folder, list(wanted))
        with runfolder.staged(folder, keep=True) as work:
            stages = Stages(work, True, progress)
            page = (work / "report.html").exists() and not missing
            if missing:
                _add(stages, recipe_, missing, folder)
                stages.warnings.append(
                    f"exported {', '.join(t.name for t in missing)} first; `edgekit verify` proves what it computes"
                )
            made = _profiled(stages, chosen, settings)
            if page:
                stage_work.report(stages)
    return replace(_outcome(stages, folder), profiles=made)


def report(folder: Path, *, progress: Progress | None = None) -> Outcome:
    """Write ``report.html`` of a run folder that was verified.

    Raises:
        FormatError: not a verified run, or a file is not the one that was verified.
    """
    from edgekit.parity import Parity
    from edgekit.verify import unchanged

    runfolder.open_run(folder, "frozen.pt2", "parity.json")
    for artifact in Parity.load(Path(folder) / "parity.json").artifacts:
        if not unchanged(Path(folder), artifact):
            raise FormatError(f"{folder}: {artifact.file} is not the file that was verified; run `edgekit verify {folder}` first")
    with runfolder.staged(folder, keep=True) as work:
        stages = Stages(work, False, progress)
        stage_work.report(stages)
    return _outcome(stages, folder)


def _from_recipe(
    recipe_path: Path, out: Path, *, whole: bool, seed: int | None = None, device: str | None = None, **options: Any
) -> Outcome:
    settings = recipe.replace(recipe.load(Path(recipe_path)), seed=seed, device=device)
    return make(settings, lambda: stage_work.load(settings), out, whole=whole, device=device, **options)


def make(
    settings: Recipe, load: Callable[[], Loaded], out: Path, *, whole: bool = True, device: str | None = None,
    resume: bool = True, progress: Progress | None = None,
) -> Outcome:  # fmt: skip
    """The stages of a recipe, on what ``load`` gives, into the run folder ``out``; up to freeze if not ``whole``.

    Args:
        device: the one that was asked for beside the recipe.
    """
    from edgekit import measure

    notes = device_notes(settings, device)
    with measure.connected((*settings.profile, *settings.verify.devices) if whole else ()) as devices:
        if whole:
            _require(settings.targets)
        there = [t.name for t in settings.targets]
        on, measured = (
            measure.pairs([devices[d] for d in names if d in devices], None, there, exported=True)
            for names in (settings.verify.devices, settings.profile)
        )
        with runfolder.staged(out) as work:
            stages = Stages(work, resume, progress)
            stages.warnings += notes
            parity, profiles = _all(stages, settings, load, Path(out), whole, on, measured)
    return replace(_outcome(stages, out), parity=parity, profiles=profiles)


def _all(
    stages: Stages, settings: Recipe, load: Callable[[], Loaded], out: Path, whole: bool,
    on: Sequence[tuple[Any, str]], measured: Sequence[tuple[Any, str]],
) -> tuple[Parity | None, tuple[Profile, ...]]:  # fmt: skip
    """The stages of a recipe in the folder of ``stages``, which takes the place of ``out``; up to freeze if not ``whole``.

    Args:
        on, measured: what is verified, and what is measured, on devices: (device, target).
    """
    with stages.timed("load"):
        loaded = load()
    stage_work.compress(stages, settings, loaded)
    write_whole(stages.folder / "recipe.yaml", recipe.dump(settings, out))
    write_json(stages.folder / "env.json", environment.describe())
    if not whole:
        return None, ()
    for target in settings.targets:
        stage_work.lower(stages, target)
    parity = stage_work.verified(stages, settings, loaded, on)
    profiles = _profiled(stages, measured) if measured else ()
    stage_work.report(stages)
    return parity, profiles


def _opened(folder: Path) -> Recipe:
    """The recipe of a run folder whose program is whole."""
    runfolder.open_run(folder, "frozen.pt2", "recipe.yaml")
    return recipe.load(Path(folder) / "recipe.yaml", files=False)


def export_program(
    program: FrozenProgram, out: Path, settings: Recipe, record: dict[str, Any], *, resume: bool = True,
    progress: Progress | None = None,
) -> Outcome:  # fmt: skip
    """A new run folder of a program that is in memory, with the files of ``settings.targets``.

    Args:
        record: what compression did (:attr:`edgekit.compress.Compressed.record`).
    """
    from edgekit.frozen import save

    _require(settings.targets)
    with runfolder.staged(out) as work:
        stages = Stages(work, resume, progress)
        save(program, work / "frozen.pt2")
        write_json(work / "compress.json", record)
        write_whole(work / "recipe.yaml", recipe.dump(settings, Path(out)))
        write_json(work / "env.json", environment.describe())
        for target in settings.targets:
            stage_work.lower(stages, target)
    return _outcome(stages, out)


def _add(stages: Stages, settings: Recipe, targets: Sequence[Target], folder: Path) -> None:
    """Export targets into a run; what was said of the run without them is no longer the whole of it."""
    for target in targets:
        stage_work.lower(stages, target)
    for stale in ("parity.json", "report.html"):
        (stages.folder / stale).unlink(missing_ok=True)
    known = {t.name: t for t in (*settings.targets, *targets)}
    text = recipe.dump(recipe.replace(settings, targets=tuple(known.values())), Path(folder))
    write_whole(stages.folder / "recipe.yaml", text)


def _unaltered(folder: Path, targets: Sequence[str]) -> None:
    """Fail if a file that is to be measured is not what was exported: its costs would not be the run's."""
    from edgekit.targets import get

    own = {f"model{get(name).SUFFIX}".split("/")[0] for name in targets}
    for name in runfolder.altered(folder):
        if name.split("/")[0] in own:
            remedy = "run `edgekit verify` to see what changed, or `edgekit export` to write it again"
            raise FormatError(f"{folder}: {name} was altered after it was written; {remedy}")


def _profiled(stages: Stages, chosen: Sequence[tuple[Any, str]], settings: Settings | None = None) -> tuple[Profile, ...]:
    from edgekit.measure import profile_run

    with stages.timed("profile"):
        return profile_run(stages.folder, chosen, settings, stages.progress)


def _outcome(stages: Stages, folder: Path) -> Outcome:
    warnings = (*stages.warnings, *shortfalls(Path(folder)))
    return Outcome(Path(folder), tuple(stages.notes), warnings=tuple(dict.fromkeys(warnings)))


def _require(targets: Sequence[Target]) -> None:
    """Fail before any work if a target's packages are missing."""
    from edgekit.targets import get

    for target in targets:
        module = get(target.name)
        if missing := module.available():
            remedy = f"; run: pip install 'edgekit[{module.EXTRA}]'" if module.EXTRA else ""
            raise MissingTool(f"target {target.name}: {missing}{remedy}")


_LEARNED = ("adaround", "brecq", "qcfs", "train", "auto")
"""Methods of ``ptq`` that learn, where its ``device`` says."""


def device_notes(settings: Recipe, device: str | None) -> list[str]:
    """Warnings about a device that nothing will use. Raises InputError for one that is not there, before any work."""
    asked = {b.kind: d for b in settings.compress if (d := getattr(b.settings, "device", None)) is not None}
    for wanted in (device, *asked.values()):
        check_device(wanted)
    learns = [b for b in settings.compress if b.kind in ("qat", "repair") or getattr(b.settings, "method", "") in _LEARNED]
    if "cuda" in (device, *asked.values()) and not learns:
        return [
            "device cuda is not used: only qat, repair, spiking training and the methods adaround and brecq of ptq learn on it"
        ]
    return []
