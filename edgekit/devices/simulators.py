"""Neuromorphic simulators in environments of their own: ``edgekit setup-sim NAME``.

Simulators pin versions that conflict with each other and with edgekit's targets, so none is a dependency: the packages of each
lie in a folder of edgekit's cache, ``<cache>/simulators/<name>``, put before everything else on the path of a process that is
started for the purpose. Torch, numpy, h5py and nir come from edgekit's own installation where the simulator takes them. Packages
come by pip from the indexes that pip is set to; every one is checked by its SHA-256 (:data:`SIMULATORS`), is installed without
the dependencies that simulation does not need, and the folder is kept whole by a manifest (:mod:`edgekit.devices.parts`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgekit import cache
from edgekit.devices import parts
from edgekit.errors import FormatError, InputError, MissingTool

__all__ = ["SIMULATORS", "Package", "Simulator", "environment", "folder", "installed", "setup"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Package:
    """A version and the SHA-256 of each file that may be taken for it (one a platform, or one for all)."""

    version: str
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class Simulator:
    """What is installed for a simulator.

    Attributes:
        packages: by name, without what they would pull in.
        about: what it is, in words, with its licence.
        check: Python that must run in the environment.
        python: (major, minor) where it is not edgekit's own.
        compiles: a package is built from source and needs a C++ compiler.
        megabytes: unpacked size.
    """

    packages: Mapping[str, Package]
    about: str
    check: str
    python: tuple[int, int] | None = None
    compiles: bool = False
    megabytes: float = 10.0


_NIRTORCH = {"nirtorch": Package("2.6", ("c114565ce42a95c0b2763f0db1107f2c5de452a4eec593e12cac37e9716838ab",))}
_SNNTORCH = {"snntorch": Package("1.0.0", ("b5a85f6f44c6d27c8a1dcea16cb18a630d00b8d2f3cfec85b7e580cb177e606b",))}
_INTERPRETER = "interpreter.txt"
_STUB = "import sys, types; sys.modules['pylab'] = types.ModuleType('pylab'); "

SIMULATORS: Mapping[str, Simulator] = {
    "spikingjelly": Simulator(
        {
            "spikingjelly": Package("2.0.0", ("dee753bade33e8dca62e88fd4ba6e3c89e6bc56c6fdd9c8c151d5680222edac1",)),
            "loguru": Package("0.7.3", ("31a33c10c8e1e10422bfd431aeb5d351c7cf7fa671e3c4df004162264b28220c",)),
            **_NIRTORCH,
        },
        "PyTorch framework; imports .nir files (Apache-2.0)",
        "from spikingjelly.activation_based import neuron, nir_exchange",
    ),
    "snntorch": Simulator(
        {**_SNNTORCH, **_NIRTORCH},
        "PyTorch framework; imports .nir files (MIT)",
        "import snntorch; from snntorch.import_nir import import_from_nir",
    ),
    "norse": Simulator(
        {"norse": Package("1.1.0", ("3f70b8579251316761f7a950680136029fcd9d92bbcc53531366d088a8aaf0c8",)), **_NIRTORCH},
        "PyTorch framework; imports .nir files (LGPL-3)",
        "import norse.torch",
    ),
    "sinabs": Simulator(
        {
            "sinabs": Package("3.1.3", ("9ea98df42d4fb64245023a881865e25d12f79290090ca06183849b61f16aa240",)),
            "pbr": Package("7.1.3", ("6583e878a1d97cb135fdc509811f31b9235905cde8d4dacd3dbadf9efc45d745",)),
            **_NIRTORCH,
        },
        "PyTorch framework; imports .nir files (Apache-2.0); without samna and plots",
        _STUB + "import sinabs.nir",
    ),
    "nest": Simulator(
        {"nest-simulator": Package("3.10.0", ("95b1b1b7af713635a9f70fbb0fe7fcb3248d43909e135aa5fedfd6131bf73717",))},
        "independent engine in C++ (GPL-2 or later)",
        "import nest",
        megabytes=90,
    ),
    "xylosim": Simulator(
        {"xylosim": Package("0.1.3", ("423bc72e64c409ea8c4d511e88f5e592c977db7fabd8093d460108d68252a467",))},
        "SynSense's C++ model of the Xylo chip's arithmetic",
        "from xylosim.v2 import XyloLayer, XyloSynapse",
        compiles=True,
    ),
    "lava": Simulator(
        {
            "lava-nc": Package("0.10.0", ("d646723e888a72868dac77d31beee3eef1f540366a8c1a8578a2dc3302470926",)),
            "numpy": Package(
                "1.26.4",
                (
                    "ffa75af20b44f8dba823498024771d5ac50620e6915abac414251bd971b4529f",
                    "d209d8969599b27ad20994c8e41936ee0964e6da07478d6c35016bc386b66ad4",
                ),
            ),
            "scipy": Package(
                "1.15.3",
                (
                    "9e2abc762b0811e09a0d3258abee2d98e0c703eee49464ce0069590846f31d40",
                    "263961f658ce2165bbd7b99fa5135195c3a12d9bef045345016b8b50c315cb82",
                ),
            ),
            "asteval": Package("0.9.33", ("aae3a0308575a545c8cecc43a6632219e6a90963a56380c74632cf54311e43bf",)),
            "networkx": Package("2.8.7", ("15cdf7f7c157637107ea690cabbc488018f8256fa28242aed0fb24c93c03a06d",)),
        },
        "Intel's model of Loihi 2's fixed-point arithmetic (BSD-3 and LGPL-2.1)",
        "from lava.proc.lif.process import LIF; from lava.magma.core.run_configs import Loihi2SimCfg",
        python=(3, 10),
        megabytes=220,
    ),
    "neurobench": Simulator(
        {
            "neurobench": Package("2.3.0", ("9b188a50baa78a727e2c99df534bb38b6b1a61afd1d83b43b3410b0da9afc807",)),
            **_SNNTORCH,
        },
        "the field's benchmark harness, whose effective ACs edgekit's SynOps equal (Apache-2.0)",
        "from neurobench.benchmarks import Benchmark; from neurobench.models import SNNTorchModel",
    ),
}
"""Name to what is installed; no file of any of them is part of edgekit."""


def folder(name: str) -> Path:
    """Where a simulator's packages are, or will be."""
    return cache.folder() / "simulators" / name


def installed() -> tuple[str, ...]:
    """The simulators that are set up."""
    return tuple(name for name in SIMULATORS if (folder(name) / "part.json").is_file())


def environment(name: str) -> tuple[list[str], dict[str, str]]:
    """The command of the interpreter and the variables of a process in which the simulator can be imported.

    Raises:
        InputError: there is no such simulator.
        MissingTool: it is not set up.
    """
    one = _known(name)
    if not (folder(name) / "part.json").is_file():
        raise MissingTool(f"the simulator {name} is not set up; run: edgekit setup-sim {name}")
    python = sys.executable if one.python is None else (folder(name) / _INTERPRETER).read_text()
    return [python], _variables(folder(name))


def setup(name: str, python: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Make the environment of a simulator, or check and repair it.

    Args:
        python: an interpreter of the version that it needs, where that is not edgekit's own.

    Returns:
        plain values: folder, state ("made", "kept" or "repaired"), packages with versions, python, bytes on disk.

    Raises:
        InputError: an unknown name, no space, or a download or build that fails.
        MissingTool: pip, a compiler or the Python version is not there.
        FormatError: a downloaded file is not the one that was published.
    """
    one = _known(name)
    interpreter = _python(name, one, python)
    if parts.quiet([str(interpreter), "-m", "pip", "--version"]).returncode:
        raise MissingTool(f"pip is not installed for {interpreter}; run: {interpreter} -m ensurepip")
    if one.compiles and not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        raise MissingTool(f"{name} is compiled and no C++ compiler is installed; on Debian and Ubuntu run: apt-get install g++")
    wanted = {f"{package} {found.version}": " ".join(found.sha256) for package, found in one.packages.items()}
    place = folder(name)
    if progress is not None:
        progress(name, 0, 1)
    with parts.locked(place.parent):
        if not place.exists():
            parts.require_space(place.parent, 3e6 * one.megabytes, "simulators")
        state = parts.made(place, lambda into: _install(name, one, interpreter, into, wanted), lambda found: found == wanted)
    if progress is not None:
        progress(name, 1, 1)
    return {
        "simulator": name,
        "folder": str(place),
        "state": state,
        "packages": {package: found.version for package, found in one.packages.items()},
        "python": str(interpreter),
        "bytes": sum(p.stat().st_size for p in parts.files(place)),
    }


def _install(name: str, one: Simulator, python: Path, into: Path, wanted: Mapping[str, str]) -> Mapping[str, str]:
    """Have pip install the packages into a folder, checked by their hashes, then import the simulator from there."""
    listed = into.parent / "wanted.txt"
    lines = [f"{p}=={v.version} {' '.join(f'--hash=sha256:{digest}' for digest in v.sha256)}" for p, v in one.packages.items()]
    listed.write_text("\n".join(lines) + "\n")
    pip = [str(python), "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check"]
    found = parts.quiet([*pip, "install", "--no-deps", "--no-compile", "--require-hashes", "-r", str(listed), "-t", str(into)])
    if found.returncode:
        if "DO NOT MATCH THE HASHES" in found.stderr:
            raise FormatError(
                f"a package of {name} from pip's index is not the published file (SHA-256 differs); nothing was kept"
            )
        raise InputError(f"pip cannot install {name}: {parts.reason(found.stderr)}; run the command again")
    checked = _imports(python, one.check, into)
    if checked:
        raise InputError(f"{name} was installed but cannot be imported: {checked}; nothing was kept")
    (into / _INTERPRETER).write_text(str(python))
    return wanted


def _imports(python: Path, code: str, place: Path) -> str:
    """Why a piece of Python does not run with a folder's packages; "" if it does."""
    command = [str(python), "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, env=_variables(place), stdin=subprocess.DEVNULL)
    return parts.reason(found.stderr) if found.returncode else ""


def _variables(place: Path) -> dict[str, str]:
    """Variables of such a process: the folder first on the path, one thread, nothing of the user's Python settings."""
    return {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": os.environ.get("HOME", "/nonexistent"), "LANG": "C.UTF-8",
        "PYTHONPATH": str(place), "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0",
        "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg",
    }  # fmt: skip


def _known(name: str) -> Simulator:
    if name not in SIMULATORS:
        raise InputError(f"simulator {name!r} is unknown; choose one of: {', '.join(SIMULATORS)}")
    return SIMULATORS[name]


def _python(name: str, one: Simulator, given: Path | None) -> Path:
    """The interpreter for a simulator.

    Raises:
        InputError: the one that was given is of another version; MissingTool: none of the version is found.
    """
    if one.python is None:
        if given is not None:
            raise InputError(f"{name} runs in edgekit's own Python; leave --python out")
        return Path(sys.executable)
    wanted = ".".join(map(str, one.python))
    candidates: Sequence[str] = [str(given)] if given is not None else _candidates(wanted)
    for candidate in candidates:
        if _version(candidate) == wanted:
            return Path(candidate)
    if given is not None:
        raise InputError(f"{given} is no Python {wanted}, which {name} needs")
    raise MissingTool(f"{name} needs Python {wanted}, which is not found here; install it, or name it by --python PATH")


def _candidates(version: str) -> list[str]:
    """Where a Python of that version may be: on the path, or in pyenv's folder."""
    found = [path for path in [shutil.which(f"python{version}")] if path]
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    return [*found, *(str(p) for p in sorted(root.glob(f"versions/{version}.*/bin/python{version}")))]


@lru_cache(maxsize=8)
def _version(python: str) -> str:
    """ "3.10" for an interpreter that starts; "" otherwise."""
    try:
        found = parts.quiet([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
