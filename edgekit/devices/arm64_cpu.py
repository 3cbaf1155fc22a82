"""The processors of Raspberry Pis as QEMU emulates them, and the system files by which programs learn about them.

QEMU's user mode answers system calls with this machine's kernel, so ``/proc/cpuinfo`` would describe this machine's processor.
Runtimes read it (and ``/sys/devices/system/cpu``) to choose kernels; LiteRT crashes if it is not an Arm one. The files here
follow the form of the arm64 kernel (``arch/arm64/kernel/cpuinfo.c``); main ID registers are those of Arm's technical reference
manuals.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekit.files import write_whole

__all__ = ["CPUS", "Cpu", "write_system_files"]

_V8 = "fp asimd evtstrm crc32 cpuid"
_V82 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


@dataclass(frozen=True)
class Cpu:
    """A processor core. ``midr`` is its main ID register, ``features`` what its boards report, ``boards`` where it is."""

    midr: int
    features: str
    boards: str


CPUS: Mapping[str, Cpu] = {
    "cortex-a53": Cpu(0x410FD034, _V8, "Raspberry Pi 3, Zero 2 W"),
    "cortex-a72": Cpu(0x410FD083, _V8, "Raspberry Pi 4"),
    "cortex-a76": Cpu(0x414FD0B1, _V82, "Raspberry Pi 5"),
}
"""Name for ``qemu-aarch64 -cpu`` to what it is. Only the A76 has the dot-product instructions that fast int8 kernels use."""


def write_system_files(root: Path, cpu: str, base: Path, cores: int = 4) -> None:
    """Make ``root``: links to the top folders of ``base``, and the files that describe the processor."""
    root.mkdir(parents=True, exist_ok=True)
    for top in sorted(base.iterdir()):
        link = root / top.name
        if top.is_dir() and top.name not in ("proc", "sys") and not link.is_symlink():
            link.symlink_to(os.path.relpath(top, root))
    about = CPUS[cpu]
    variant, part, revision = about.midr >> 20 & 15, about.midr >> 4 & 0xFFF, about.midr & 15
    core = (
        f"BogoMIPS\t: 108.00\nFeatures\t: {about.features}\nCPU implementer\t: {about.midr >> 24:#04x}\n"
        f"CPU architecture: 8\nCPU variant\t: {variant:#x}\nCPU part\t: {part:#05x}\nCPU revision\t: {revision}\n\n"
    )
    write_whole(root / "proc" / "cpuinfo", "".join(f"processor\t: {i}\n{core}" for i in range(cores)))
    system = root / "sys" / "devices" / "system" / "cpu"
    for name in ("possible", "present", "online"):
        write_whole(system / name, f"0-{cores - 1}\n")
    write_whole(system / "kernel_max", f"{cores - 1}\n")
    for i in range(cores):
        write_whole(system / f"cpu{i}" / "regs" / "identification" / "midr_el1", f"{about.midr:#018x}\n")
