"""An unpacked arm64 Linux for user-mode emulation: Debian packages and Python wheels in edgekit's cache folder.

Nothing is installed on this machine: no chroot, no binfmt, no container, no root rights. Debian packages come by ``apt-get
download`` with a package state of their own and the architecture arm64, from the sources that this machine's apt is set to;
wheels come by ``pip download`` from the indexes that pip is set to. Every package is checked by the SHA-256 of apt's signed
index, every wheel by the one in :data:`WHEELS`, every unpacked file by a manifest; a part that is there and whole is left as it
is, so an interrupted set-up goes on where it was, and a damaged one is repaired by doing it again.

Layout: ``<cache>/arm64/{base,sites/<package>}``, each part with ``part.json`` (what it was made of, and the SHA-256 of each
file), ``roots/<cpu>``, what the emulator sees as ``/`` (links into ``base`` and the CPU's own ``/proc/cpuinfo``), and
``bytecode``.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import cache
from edgekit.devices import parts
from edgekit.devices.arm64_cpu import CPUS, write_system_files
from edgekit.errors import FormatError, InputError, MissingTool
from edgekit.files import sha256

__all__ = [
    "PACKAGES",
    "RUNTIMES",
    "WHEELS",
    "Wheel",
    "bytecode",
    "folder",
    "installed",
    "python",
    "python_path",
    "root",
    "setup",
    "site",
]

Progress = Callable[[str, int, int], None]
"""Called with (what is done, parts done, parts in all)."""

PACKAGES = (
    "libc6", "libpython3.11-minimal", "python3.11-minimal", "libpython3.11-stdlib", "libexpat1", "zlib1g", "libssl3", "libffi8",
    "libbz2-1.0", "liblzma5", "libstdc++6", "libgcc-s1", "libgomp1", "libcrypt1", "libuuid1", "libsqlite3-0",
)  # fmt: skip
"""Debian 12 packages of the base."""


@dataclass(frozen=True)
class Wheel:
    """A wheel for Linux on aarch64 and CPython 3.11: version, SHA-256, size of the download in megabytes."""

    version: str
    sha256: str
    megabytes: float


WHEELS: Mapping[str, Wheel] = {
    "numpy": Wheel("1.26.4", "7ab55401287bfec946ced39700c053796e7cc0e3acbef09993a9ad2adba6ca6e", 14.2),
    "typing-extensions": Wheel("4.12.2", "04e5ca0351e0f3f85c6853954072df659d0d13fac324d0072316b67d7794700d", 0.1),
    "tflite-runtime": Wheel("2.14.0", "ce9fa5d770a9725c746dcbf6f59f3178233b3759f09982e8b2db8d2234c333b0", 2.3),
    "ai-edge-litert": Wheel("2.3.0", "853fc608f96da87bd5f3458465dfb9abbf18d5ae6b94eceacead407146f175ae", 14.4),
    "onnxruntime": Wheel("1.23.2", "bbfd2fca76c855317568c1b36a885ddea2272c13cb0e395002c402f2360429a6", 15.2),
    "executorch": Wheel("1.1.0", "7da105c9f948d22097196cc88bbadb621c9223f5793e003c9e86b926b67d47f6", 12.2),
    "torch": Wheel("2.10.0", "3282d9febd1e4e476630a099692b44fdc214ee9bf8ee5377732d9d9dfe5712e4", 146.0),
}
"""torch 2.10.0 is the last aarch64 wheel without CUDA, and executorch 1.1.0 the release made for it: it runs files of 1.4.1."""

RUNTIMES: Mapping[str, tuple[str, ...]] = {
    "tflite-runtime": ("numpy", "tflite-runtime"),
    "ai-edge-litert": ("numpy", "ai-edge-litert"),
    "onnxruntime": ("numpy", "onnxruntime"),
    "executorch": ("numpy", "typing-extensions", "torch", "executorch"),
}
"""Runtime to the wheels that it needs to run a file: fewer than its metadata asks for, which serves its converters too."""

_NEEDED = {
    "qemu-aarch64-static": "qemu-user-static",
    "apt-get": "apt",
    "apt-cache": "apt",
    "dpkg": "dpkg",
}
_PLATFORMS = (*(f"manylinux_2_{minor}_aarch64" for minor in range(36, 16, -1)), "manylinux2014_aarch64")


def folder() -> Path:
    """Where the root is, or will be."""
    return cache.folder() / "arm64"


def installed() -> tuple[str, ...]:
    """The runtimes that are there."""
    if not (folder() / "base" / "part.json").is_file():
        return ()
    return tuple(name for name, wheels in RUNTIMES.items() if all((site(w) / "part.json").is_file() for w in wheels))


def root(cpu: str) -> Path:
    """The emulator's ``/`` for a CPU of :data:`edgekit.devices.arm64_cpu.CPUS`."""
    return folder() / "roots" / cpu


def python(cpu: str) -> Path:
    """The Python of that root, as a path on this machine."""
    return root(cpu) / "usr" / "bin" / "python3.11"


def bytecode() -> Path:
    """Where that Python keeps compiled modules; it fills by itself and may be deleted."""
    return folder() / "bytecode"


def python_path() -> str:
    """PYTHONPATH of all that is installed."""
    return os.pathsep.join(dict.fromkeys(str(site(wheel)) for name in installed() for wheel in RUNTIMES[name]))


def setup(
    runtimes: Sequence[str] | None = None, apt_sources: Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Make the root, or check and repair it.

    Args:
        runtimes: names of :data:`RUNTIMES`; None: all.
        apt_sources: a sources.list for apt instead of this machine's own, where that has no arm64 Python 3.11.
        progress: called before and after each part.

    Returns:
        plain values: folder, parts with what was done to each ("made", "kept", "repaired"), bytes on disk, runtimes.

    Raises:
        InputError: an unknown runtime, no space, sources without these packages, or a download that fails.
        MissingTool: a program is not installed.
        FormatError: a downloaded file is not the one that was published.
    """
    names = tuple(RUNTIMES) if runtimes is None else tuple(dict.fromkeys(runtimes))
    if unknown := [name for name in names if name not in RUNTIMES]:
        raise InputError(f"runtime {unknown[0]!r} is unknown; choose among: {', '.join(RUNTIMES)}")
    _require_tools()
    wheels = tuple(dict.fromkeys(w for name in names for w in RUNTIMES[name]))
    steps: list[tuple[str, Path, Callable[[Path], Mapping[str, str]]]] = [
        ("Debian arm64 base", folder() / "base", lambda work: _unpack_packages(work, apt_sources)),
        *((f"{w} {WHEELS[w].version}", site(w), _unpacker(w)) for w in wheels),
    ]
    done: dict[str, str] = {}
    with parts.locked(folder()):
        _check_space([path for _, path, _ in steps])
        for name, path, make in steps:
            if progress is not None:
                progress(name, 0, 1)
            done[name] = _part(path, make)
            if progress is not None:
                progress(name, 1, 1)
        if any(word != "kept" for word in done.values()):
            shutil.rmtree(bytecode(), ignore_errors=True)
        for cpu in CPUS:
            write_system_files(root(cpu), cpu, folder() / "base")
    size = sum(p.stat().st_size for p in folder().rglob("*") if p.is_file() and not p.is_symlink())
    return {"folder": str(folder()), "parts": done, "bytes": size, "runtimes": list(installed())}


def _part(path: Path, make: Callable[[Path], Mapping[str, str]]) -> str:
    """A part that is there and whole is kept, another one is made; see :func:`edgekit.devices.parts.made`."""
    return parts.made(path, make, lambda made_of: _wanted(path.name, made_of))


def _wanted(name: str, made_of: Mapping[str, str]) -> bool:
    """Whether a part was made of what this edgekit asks for."""
    if name in WHEELS:
        return made_of == _made_of(name)
    return {package.split()[0] for package in made_of} == set(PACKAGES)


def site(wheel: str) -> Path:
    """Where a wheel is unpacked."""
    return folder() / "sites" / wheel


def _made_of(wheel: str) -> dict[str, str]:
    return {f"{wheel} {WHEELS[wheel].version}": WHEELS[wheel].sha256}


def _unpacker(wheel: str) -> Callable[[Path], Mapping[str, str]]:
    def make(into: Path) -> Mapping[str, str]:
        return _unpack_wheel(wheel, into)

    return make


def _unpack_wheel(name: str, into: Path) -> Mapping[str, str]:
    """Download one wheel, checked by pip against its hash, and unpack it without compiling and without its dependencies."""
    wheel = WHEELS[name]
    wanted = into.parent / "wanted.txt"
    wanted.write_text(f"{name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    platform = [word for tag in _PLATFORMS for word in ("--platform", tag)]
    python = ["--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp", "--no-deps"]
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check"]
    download = [*pip, "download", *platform, *python, "--require-hashes", "-r", str(wanted), "-d", str(into.parent / "wheels")]
    if parts.quiet([sys.executable, "-m", "pip", "--version"]).returncode:
        raise MissingTool(f"pip is not installed for {sys.executable}; run: {sys.executable} -m ensurepip")
    found = parts.quiet(download)
    files = list((into.parent / "wheels").glob("*.whl"))
    if found.returncode or len(files) != 1:
        if "DO NOT MATCH THE HASHES" in found.stderr:
            raise FormatError(
                f"{name} {wheel.version} from pip's index is not the published file (SHA-256 differs); nothing was kept"
            )
        raise InputError(
            f"pip cannot download {name} {wheel.version} for aarch64: {parts.reason(found.stderr)}; run the command again"
        )
    if sha256(files[0]) != wheel.sha256:
        raise FormatError(f"{files[0].name} is not the published file (SHA-256 differs); nothing was kept")
    install = [*pip, "install", *platform, *python, "--no-index", "--no-compile", "--target", str(into), str(files[0])]
    found = parts.quiet(install)
    if found.returncode:
        raise InputError(f"pip cannot unpack {files[0].name}: {parts.reason(found.stderr)}")
    return _made_of(name)


def _unpack_packages(into: Path, sources: Path | None) -> Mapping[str, str]:
    """Download the Debian packages with a private apt state, check them by the index's SHA-256, and unpack them."""
    state = into.parent / "apt"
    for part in ("state/lists/partial", "cache/archives/partial", "debs"):
        (state / part).mkdir(parents=True)
    (state / "state" / "status").touch()
    options = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::State": state / "state",
        "Dir::State::status": state / "state" / "status", "Dir::Cache": state / "cache", "APT::Sandbox::User": "root",
        "Acquire::Retries": 3, "APT::Get::List-Cleanup": "true",
    }  # fmt: skip
    if sources is not None:
        if not sources.is_file():
            raise InputError(f"{sources}: no such file; --apt-sources takes a sources.list")
        options |= {"Dir::Etc::sourcelist": sources.resolve(), "Dir::Etc::sourceparts": "/dev/null"}
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    found = parts.quiet(["apt-get", *words, "update", "-qq"])
    if found.returncode:
        raise InputError(f"apt-get update for arm64 failed: {parts.reason(found.stderr)}; check the network and apt's sources")
    digests: dict[str, str] = {}
    for package in PACKAGES:
        shown = parts.quiet(["apt-cache", *words, "show", "--no-all-versions", package])
        fields = dict(line.split(": ", 1) for line in shown.stdout.splitlines() if ": " in line and line[0] != " ")
        if shown.returncode or "SHA256" not in fields:
            raise InputError(
                f"apt's sources have no package {package} for arm64 (Debian 12 has it); "
                "give a sources.list of Debian 12 by --apt-sources"
            )
        digests[f"{package} {fields['Version']}"] = fields["SHA256"]
    found = parts.quiet(["apt-get", *words, "download", "-qq", *PACKAGES], folder=state / "debs")
    files = sorted((state / "debs").glob("*.deb"))
    if found.returncode or len(files) != len(PACKAGES):
        raise InputError(f"apt-get cannot download the arm64 packages: {parts.reason(found.stderr)}; run the command again")
    for file in files:
        if sha256(file) not in digests.values():
            raise FormatError(f"{file.name} is not the file of apt's index (SHA-256 differs); nothing was kept")
        found = parts.quiet(["dpkg", "-x", str(file), str(into)])
        if found.returncode:
            raise InputError(f"dpkg cannot unpack {file.name}: {parts.reason(found.stderr)}")
    return digests


def _require_tools() -> None:
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        packages = " ".join(dict.fromkeys(_NEEDED[name] for name in missing))
        raise MissingTool(f"{', '.join(missing)} not installed; on Debian and Ubuntu run: apt-get install {packages}")


def _check_space(wanted: Sequence[Path]) -> None:
    """Room for what is not there: unpacked files are up to four times as large as a wheel, which stays until they are checked."""
    needed = sum(5e6 * WHEELS[p.name].megabytes if p.name in WHEELS else 150e6 for p in wanted if not p.exists())
    parts.require_space(folder(), needed, "runtimes")
