"""Put a run's file on a device: proven there first, switched to in one step, and back by one word.

On the device, below the home folder::

    edgekit/NAME/versions/VERSION/   the file, runner.py, service.py, README.md, manifest.json (SHA-256 of each)
    edgekit/NAME/current             link to the version in use
    edgekit/NAME/previous            link to the one before, for `--rollback`

A version is named by its content, so the same deployment twice changes nothing. Before the switch the file has to hold the parity
contract on the device itself, and is compared there with the file in use: same answers, and how much faster or slower.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import __version__, devices, recipe, runfolder
from edgekit.devices import kernels, runner, service
from edgekit.devices.linux import File, Linux
from edgekit.devices.ssh import Connection
from edgekit.devices.target import OnDevice
from edgekit.errors import InputError, ParityError
from edgekit.files import sha256
from edgekit.frozen import FrozenProgram, load
from edgekit.profile import Settings
from edgekit.stages import Evaluation, judged_on, load_stage
from edgekit.targets import get, present
from edgekit.verify import verify_artifact

__all__ = ["Deployment", "deploy", "rollback"]

Progress = Callable[[str, int, int], None]
CHECKING = 120.0
"""Seconds that the device may take to copy files or to restart a service."""


@dataclass(frozen=True)
class Deployment:
    """What was done, or would be.

    Attributes:
        version, before: in use afterwards, and until then (None: nothing was).
        done: False for a dry run.
        steps: in words, in order.
        agreement: percent of samples for which the file before gives the same first choice; None without one to compare.
        latency_ratio: median time of the new file over that of the one before, in turn on the device; None likewise.
    """

    device: str
    name: str
    version: str
    before: str | None
    done: bool
    steps: tuple[str, ...]
    agreement: float | None = None
    latency_ratio: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def deploy(
    folder: Path,
    device: str,
    *,
    target: str | None = None,
    name: str | None = None,
    with_service: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Deployment:
    """Deploy a file of a run folder.

    Args:
        device: ``ssh://user@host``.
        target: which file; None: the first of the run that the device can run.
        name: of the deployment; None: the recipe's.
        with_service: also install and start a systemd user unit that answers over HTTP.
        dry_run: look, and say what would be done.

    Raises:
        ParityError: the file does not compute there what it should; nothing was changed.
        InputError: a device that is not ssh, a file that it cannot run, a name that is none.
        FormatError: not a run folder, or the file was altered.
    """
    name = _name(folder, name)
    found = _connected(device)
    try:
        chosen = _target(Path(folder), found, target)
        path = runfolder.open_run(folder, f"model{get(chosen).SUFFIX}") / f"model{get(chosen).SUFFIX}"
        with tempfile.TemporaryDirectory(prefix="edgekit-") as work:
            files, version = _files(Path(work), path, name, chosen, found)
            state = found.way.request({"do": "versions", "name": name})
            made = Deployment(found.name, name, version, state["current"], not dry_run, ())
            if state["current"] == version and not with_service:
                return replace(made, steps=(f"{name} {version} is in use already: nothing to do",))
            if dry_run:
                return replace(made, steps=_plan(found, files, state, name, version, with_service))
            program = load(Path(folder) / "frozen.pt2")
            made = _proven(made, found, Path(folder), path, chosen, program, state, progress)
            return _switched(made, found, files, state, with_service, progress)
    finally:
        found.close()


def rollback(folder: Path, device: str, *, name: str | None = None) -> Deployment:
    """Go back to the version of a run's deployment that was in use before; once more goes forward again.

    Raises:
        InputError: there is no version before.
    """
    name = _name(folder, name)
    found = _connected(device)
    try:
        state = found.way.request({"do": "versions", "name": name})
        if not state["previous"] or state["previous"] not in state["versions"]:
            raise InputError(f"{found.name}: {name} has no version before {state['current'] or 'any'} to go back to")
        answer = found.way.request({"do": "switch", "name": name, "version": state["previous"]}, CHECKING)
        steps = (f"current is {state['previous']} again, previous is {state['current']}", *filter(None, [answer["service"]]))
        return Deployment(found.name, name, state["previous"], state["current"], True, steps)
    finally:
        found.close()


def _connected(device: str) -> Linux:
    if not device.startswith("ssh:"):
        raise InputError(f"device {device!r}: files are deployed over ssh; give ssh://user@host")
    found = devices.connect(device)
    assert isinstance(found, Linux) and isinstance(found.way, Connection)
    return found


def _name(folder: Path, given: str | None) -> str:
    """The deployment's name: as given, or the recipe's."""
    runfolder.open_run(folder, "frozen.pt2", "recipe.yaml")
    name = given or recipe.load(Path(folder) / "recipe.yaml", files=False).name.replace(".", "-")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", name):
        raise InputError(f"deployment {name!r}: a name has letters, digits, - and _; give one with --name")
    return name


def _target(folder: Path, device: Linux, wanted: str | None) -> str:
    there = present(folder)
    if wanted is not None and (wanted not in there or wanted not in device.targets):
        why = f"{device.name} runs {', '.join(device.targets)}" if wanted in there else "export it first"
        raise InputError(f"{folder}: {wanted} cannot be deployed: the run has {', '.join(there) or 'no files'}; {why}")
    for name in [wanted] if wanted else device.targets:
        if name in there:
            return name
    raise InputError(
        f"{folder}: has {', '.join(there) or 'no files'}, {device.name} runs {', '.join(device.targets)}; export one"
    )


def _files(work: Path, model: Path, name: str, target: str, device: Linux) -> tuple[dict[str, Path], str]:
    """What goes there, by name, and the version's: the same content has the same name."""
    files = {model.name: model, "runner.py": Path(runner.__file__), "service.py": Path(service.__file__)}
    if library := kernels.library(device.name, device.machine, [model]):
        files[library.name] = library
    digests = {key: sha256(path) for key, path in files.items()}
    facts = {"format": 1, "name": name, "target": target, "model": model.name, "edgekit": __version__, "files": digests}
    version = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    (work / "manifest.json").write_text(json.dumps({**facts, "version": version}, indent=1, sort_keys=True) + "\n")
    (work / "README.md").write_text(
        README.format(name=name, version=version, target=target, model=model.name, edgekit=__version__)
    )
    return {**files, "manifest.json": work / "manifest.json", "README.md": work / "README.md"}, version


def _plan(
    device: Linux, files: Mapping[str, Path], state: Mapping[str, Any], name: str, version: str, with_service: bool
) -> tuple[str, ...]:
    """What will be done, one sentence each."""
    size = sum(p.stat().st_size for p in files.values())
    current, home = state["current"], state["home"]
    steps = [f"send {len(files)} files, {size:,} bytes: {', '.join(files)}"]
    steps.append(f"run the file there with its runtime ({_runtimes(device)}) and hold it against the frozen program")
    if current and current != version:
        steps.append(f"compare it there with {current}, which is in use: answers and time")
    steps.append(f"put it into {home}/versions/{version}")
    steps.append(f"point {home}/current to it" + (f", {home}/previous to {current}" if current and current != version else ""))
    if old := _superfluous(state, version):
        steps.append(f"remove {', '.join(old)}")
    if with_service:
        steps.append(f"install the systemd user unit edgekit-{name}.service and start it: http://127.0.0.1:8377/ there")
    return tuple(steps)


def _runtimes(device: Linux) -> str:
    there = device.machine["packages"]
    return ", ".join(f"{p} {there[p]}" for packages in runner.RUNTIMES.values() for p in packages if p in there)


def _superfluous(state: Mapping[str, Any], version: str) -> list[str]:
    """Versions that nothing will point to."""
    kept = {version, state["current"] if state["current"] != version else state["previous"]}
    return [v for v in state["versions"] if v not in kept]


def _proven(
    made: Deployment, device: Linux, folder: Path, path: Path, target: str, program: FrozenProgram, state: Mapping[str, Any],
    progress: Progress | None,
) -> Deployment:  # fmt: skip
    """Hold the parity contract on the device, and compare with the version in use."""
    stored = {n: load_stage(p) for n in ("float", "compressed") if (p := folder / f"stage_{n}.npz").exists()}
    evaluation, _, _ = judged_on(program, None, stored)
    settings = replace(recipe.load(folder / "recipe.yaml", files=False).verify, max_accuracy_drop=None)
    parity = verify_artifact(program, OnDevice(target, device), path, evaluation, settings=settings, progress=progress)
    if not parity.ok:
        raise ParityError(f"{parity.breaches[0]}; not deployed: {made.before or 'nothing'} stays in use on {device.name}")
    proof = f"{path.name} ({target}) proven there on {len(evaluation)} samples, {len(parity.layers)} layers"
    made = replace(made, steps=(*made.steps, proof))
    before = state["manifests"].get(made.before)
    if made.before in (None, made.version) or before is None:
        return made
    return _compared(made, device, before, path, target, evaluation)


def _compared(
    made: Deployment, device: Linux, before: Mapping[str, Any], path: Path, target: str, evaluation: Evaluation
) -> Deployment:
    """The file in use against the new one, on the device, on the same samples."""
    inputs = [x.numpy() for x in evaluation.inputs]
    old_target, old_name = str(before["target"]), str(before["model"])
    with tempfile.TemporaryDirectory(prefix="edgekit-") as work:
        old = Path(work) / f"old{get(old_target).SUFFIX}"
        device.way.fetch(made.name, made.before, old_name, old)
        try:
            sent = [File(p, t, get(t).encode(p, [x[:1] for x in inputs])) for p, t in ((path, target), (old, old_target))]
        except InputError:
            return replace(made, steps=(*made.steps, f"{made.before} takes other inputs: not compared with it"))
        ours, theirs = device.run(path, target, inputs)[0], device.run(old, old_target, inputs)[0]
        _, times = device.ask("profile", sent, Settings(num_runs=100, warmup_runs=5))
    ratio = float(np.median(times[0][0][0] / times[1][0][0]))
    same = 100 * float((ours.reshape(len(ours), -1).argmax(1) == theirs.reshape(len(theirs), -1).argmax(1)).mean())
    words = f"against {made.before}: same first choice for {same:.1f} % of the samples, {ratio:.2f} of its time"
    return replace(made, steps=(*made.steps, words), agreement=same, latency_ratio=ratio)


def _switched(
    made: Deployment, device: Linux, files: Mapping[str, Path], state: Mapping[str, Any], with_service: bool,
    progress: Progress | None,
) -> Deployment:  # fmt: skip
    way: Connection = device.way
    digests = way.put(files, None if progress is None else lambda done, total: progress("send", done, total))
    base = {"name": made.name, "version": made.version}
    way.request({"do": "install", **base, "files": digests}, CHECKING)
    unit = {"unit": UNIT.format(name=made.name)} if with_service else {}
    answer = way.request({"do": "switch", **base, **unit}, CHECKING)
    place = f"put into {state['home']}/versions/{made.version}: {', '.join(files)}"
    last = f"current is {made.version}" + (f", previous is {made.before}" if made.before not in (None, made.version) else "")
    old = _superfluous(state, made.version)
    for version in old:
        way.request({"do": "remove", "name": made.name, "version": version}, CHECKING)
    removed = f"removed {', '.join(old)}" if old else ""
    return replace(made, steps=(*made.steps, *filter(None, [place, last, removed, answer["service"]])))


UNIT = """[Unit]
Description=edgekit: {name}

[Service]
ExecStart="@PYTHON@" "@HOME@/current/service.py"
Restart=on-failure
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""

README = """# {name} {version}

{model} ({target}), put here by edgekit {edgekit}, which proved on this device that it computes what its frozen program computes.

    python3 service.py                        # answers samples: http://127.0.0.1:8377/ (GET / says how)
    python3 -c 'from runner import open_program; print(open_program("{model}").inputs)'

`manifest.json` has the SHA-256 of every file. `../../current` points to the version in use, `../../previous` to the one before;
`edgekit deploy --rollback` exchanges them. A systemd user unit runs at login; `loginctl enable-linger` makes it run from boot.
"""
