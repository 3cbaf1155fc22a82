"""The C library of 1-bit layers (``binary/binary.h``): compiled on first use, kept in the cache by the hash of what decides it.

One library holds every variant of the processor's family (x86-64: AVX-512 with VPOPCNTDQ, AVX2, POPCNT, portable C; aarch64:
NEON, portable C) and chooses at run time; the environment variable ``EDGEKIT_BINARY_ISA`` forces one, for tests and measurements.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

from edgekit.errors import EdgekitError, MissingTool
from edgekit.files import cache_folder, write_whole

__all__ = ["BINARY", "COMPILERS", "FLAGS", "HEADERS", "SOURCES", "VARIANTS", "c_compiler", "compiler", "library"]

BINARY = Path(str(files("edgekit.firmware_sim") / "binary"))
"""The folder of the C files."""

HEADERS = ("binary.h", "internal.h")
SOURCES = ("binarize.c", "layers.c", "neon.c", "variants.c", "x86.c")
"""Every C file of a host; a file of another processor compiles to nothing."""

VARIANTS = {"x86_64": ("avx512", "avx2", "popcnt", "portable"), "aarch64": ("neon", "portable")}
"""Machine to the variants that it may have, the best first."""

FLAGS = ("-O2", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra")
"""A fused multiply-add would round otherwise than the frozen program."""

COMPILERS = {"x86_64": "g++", "aarch64": "aarch64-linux-gnu-g++"}
"""Machine to the C++ compiler of a Debian PC that makes programs for it; a machine's own is g++."""

_PACKAGES = {"g++": "g++", "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu"}


def compiler(machine: str) -> list[str]:
    """The command of a C++ compiler that makes programs for a machine (``platform.machine()``); ``$CXX`` for this one.

    Raises:
        MissingTool: there is none; says what to install.
    """
    own = machine == os.uname().machine
    words = shlex.split(os.environ.get("CXX", "")) if own else []
    words = words or ["g++" if own else COMPILERS.get(machine, f"{machine}-linux-gnu-g++")]
    if shutil.which(words[0]) is None:
        package = _PACKAGES.get(words[0], words[0])
        raise MissingTool(
            f"{words[0]} is not installed, and 1-bit kernels for {machine} are compiled when they are first used; "
            f"on Debian and Ubuntu run: apt-get install {package}"
        )
    return words


def c_compiler(command: Sequence[str]) -> list[str]:
    """The C compiler that comes with a C++ compiler: gcc with g++, clang with clang++; g++ takes any file for C++."""
    name = command[0]
    for theirs, ours in (("clang++", "clang"), ("g++", "gcc"), ("c++", "cc")):
        if theirs in name:
            return [ours.join(name.rsplit(theirs, 1)), *command[1:]]
    return [name, *command[1:]]


def library(
    name: str, machine: str, more: Sequence[Path] = (), flags: Sequence[str] = (), host: str = "", about: str = ""
) -> Path:
    """A shared library of :data:`SOURCES`, from the cache or compiled now.

    Args:
        name: file name without suffix.
        machine: what it shall run on, as ``platform.machine()`` says it.
        more: C++ files that belong to it.
        flags: further flags for C++ files; with any, only what a file marks as visible can be called from outside.
        host: name (soname) of a library that has the rest of the symbols and is in the process already; it need not be here.
        about: further text that decides what it becomes, such as the version of the headers that ``more`` includes.

    Raises:
        MissingTool: no compiler.
        EdgekitError: it does not compile; gives the compiler's first error.
    """
    command = compiler(machine)
    sources = [*(BINARY / s for s in SOURCES), *more]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    total = hashlib.sha256("\0".join([*command, version, machine, *FLAGS, *flags, host, about]).encode())
    for path in (*(BINARY / h for h in HEADERS), *sources):
        total.update(path.read_bytes())
    kept = cache_folder() / "binary" / total.hexdigest()[:24] / f"{name}.so"
    if not kept.is_file():
        with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
            write_whole(kept, _compile(command, sources, flags, host, Path(folder)).read_bytes())
    return kept


def _compile(command: Sequence[str], sources: Sequence[Path], flags: Sequence[str], host: str, folder: Path) -> Path:
    objects = [folder / f"{path.stem}.o" for path in sources]
    hidden = ["-fvisibility=hidden"] if flags else []
    own = {".c": c_compiler(command), ".cpp": [*command, *flags]}
    steps = [
        [*own[path.suffix], *FLAGS, *hidden, f"-I{BINARY}", "-c", str(path), "-o", str(out)]
        for path, out in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        list(pool.map(_call, steps))
    made, link = folder / "library.so", []
    if host:  # an empty library of that name is enough to note the dependence
        (folder / "empty.c").touch()
        _call([*c_compiler(command), "-shared", f"-Wl,-soname,{host}", str(folder / "empty.c"), "-o", str(folder / host)])
        link = ["-Wl,--no-as-needed", str(folder / host)]
    _call([*command, "-shared", *map(str, objects), *link, "-o", str(made)])
    return made


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-300:])
        raise EdgekitError(
            f"the library of 1-bit kernels does not compile with {command[0]}: {first}; set CXX to another compiler"
        )
