"""1-bit layers on emulated Cortex-M boards, in instructions beside our int8 kernel of the same layer on the same core.

    python benchmarks/binary_firmware.py [board ...]

Every output is compared with numpy first; counts repeat exactly. Rows of ``results/binary_firmware.json``: layer, board,
core, kernel ("vectors", "planes", "rows", "matmul"), kernel_set, output ("packed", "int8"), instructions, int8 (instructions),
times.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import binary_kernels
import subjects

BOARDS = ("mps2-an386", "mps2-an500", "mps3-an547")
WHOLE = "python benchmarks/binary_firmware.py"


def main(boards: Sequence[str]) -> None:
    rows = []
    for board in boards:
        for layer in binary_kernels.LAYERS:
            for row in binary_kernels.rows(layer, board):
                rows.append(row)
                binary_kernels.show(row)
        for product in binary_kernels.PRODUCTS:
            for row in binary_kernels.product_rows(product, board):
                rows.append(row)
                binary_kernels.show(row)
    subjects.write("binary_firmware", rows, whole=WHOLE)


if __name__ == "__main__":
    main(sys.argv[1:] or BOARDS)
