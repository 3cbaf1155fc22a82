"""Running a firmware on an emulated board, with input and output by semihosting."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import FirmwareFault
from edgekit.firmware_sim.faults import HANG, sentence
from edgekit.firmware_sim.toolchain import Firmware, find

__all__ = ["Result", "command", "run"]


@dataclass(frozen=True)
class Result:
    """One boot: what came out and how it ended."""

    board: str
    output: bytes
    code: int
    """The firmware's exit code; :data:`~edgekit.firmware_sim.faults.HANG` at the time limit."""
    log: dict[str, int]
    """Numbers the firmware logged (``ek_log_number``): "stack" and "stack_size" in bytes when it ended by itself."""
    text: str
    """Everything on the error stream of the emulator, log included."""
    wall_seconds: float
    fault: str | None
    """The sentence for ``code``; None if it is 0."""

    @property
    def stack_bytes(self) -> int:
        """High-water mark of the stack, from its painting."""
        return self.log["stack"]

    def checked(self) -> Result:
        """This result, if the firmware ended well.

        Raises:
            FirmwareFault: it did not.
        """
        if self.fault is not None:
            raise FirmwareFault(f"{self.board}: {self.fault}")
        return self


def command(firmware: Firmware, extra: Sequence[str] = ()) -> list[str]:
    """The emulator's command line; its working folder holds in.bin and out.bin."""
    semihosting = ["-semihosting-config", "enable=on,target=native"]
    quiet = ["-display", "none", "-monitor", "none", "-serial", "null", "-nic", "none"]
    return [
        find("qemu-system-arm"),
        "-M",
        firmware.board.name,
        *quiet,
        *semihosting,
        "-kernel",
        str(firmware.elf.resolve()),
        *extra,
    ]


def run(firmware: Firmware, data: bytes = b"", limit: float = 60.0, extra: Sequence[str] = ()) -> Result:
    """Boots the firmware with ``data`` as its input and waits for its end, at most ``limit`` seconds.

    A firmware's fault is no exception here: it is in :attr:`Result.fault`; :meth:`Result.checked` raises it.

    Raises:
        MissingTool: qemu-system-arm is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="edgekit-") as name:
        folder = Path(name)
        (folder / "in.bin").write_bytes(data)
        begin = time.perf_counter()
        try:
            done = subprocess.run(
                command(firmware, extra), cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit
            )  # fmt: skip
            code, errors = done.returncode, done.stderr
        except subprocess.TimeoutExpired as late:
            code, errors = HANG, late.stderr or b""
        wall = time.perf_counter() - begin
        out = folder / "out.bin"
        output = out.read_bytes() if out.exists() else b""
    text = errors.decode(errors="replace")
    log = {key: int(value) for key, value in re.findall(r"^ek: (\w+)=(\d+)$", text, re.MULTILINE)}
    log.setdefault("stack_size", firmware.project.stack_bytes)
    return Result(firmware.board.name, output, code, log, text, wall, sentence(code, log, limit))
