"""Runs a script with a clock that counts instructions instead of nanoseconds; only inside an emulator with
``firmware_sim/clock.c``.

    python3 instruction_clock.py COUNTER_FILE OVERHEAD_FILE SCRIPT [ARGUMENT ...]

``time.perf_counter_ns`` then gives the number of instructions executed since the process began. What an empty measurement costs
goes to OVERHEAD_FILE. Needs the standard library only.
"""

from __future__ import annotations

import mmap
import os
import runpy
import sys
import time

__all__ = ["main"]


def main() -> None:
    """Replace the clock, then run the script as if it had been started itself."""
    with open(sys.argv[1], "rb") as file:
        counter = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    mark, number = os.getpriority, int.from_bytes

    def clock() -> int:
        mark(0, 0)
        return number(counter[:8], "little")

    def nothing() -> None:
        pass

    found = []
    for _ in range(64):  # as runner.measure does it; the first ones are slower until the interpreter has specialized them
        before = clock()
        nothing()
        found.append(clock() - before)
    with open(sys.argv[2], "w") as out:
        out.write(str(sorted(found)[32]))
    time.perf_counter_ns = clock
    sys.argv = sys.argv[3:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
