"""The texts of an exported project that do not depend on its layers: main program, build files, README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgekit.targets.cortex_m.graph import Spec, Stream

__all__ = ["CALLS", "CALLS_CONSTANT", "CALLS_SEQUENCE", "CMAKE", "MAKEFILE", "PACKED", "README", "filled", "main_c", "ports"]


def filled(text: str, values: Mapping[str, str]) -> str:
    """``text`` with every ``@key@`` replaced."""
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def main_c(inputs: int, outputs: int, stream: Stream | None = None, exits: bool = False) -> str:
    """The application: reads samples, runs the network, writes results."""
    reads = " && ".join(f"ek_input(model_input({i}), MODEL_INPUT_{i}_BYTES)" for i in range(inputs))
    writes = "\n".join(f"        ek_output(model_output({i}), MODEL_OUTPUT_{i}_BYTES);" for i in range(outputs))
    if stream is None:
        loop, final = _WHOLE, "    return 0;\n"
    else:
        loop, final = (_STEPS, "") if stream.sequence else (_CONSTANT, "    return 0;\n")
        place = "each" if stream.each else "end"
        loop = loop.replace(f"@{place}@", "@writes@").replace("@each@\n", "").replace("@end@\n", "")
        loop = _exiting(loop) if exits else loop
        writes = writes.replace("        ", "            ") if stream.each else writes
    return (
        _MAIN.replace("@loop@\n", loop)
        .replace("@final@", final)
        .replace("@exit@", _FLAG if exits else "")
        .replace("@reads@", reads)
        .replace("@writes@", writes)
    )


def ports(kind: str, specs: Sequence[Spec]) -> str:
    """A Markdown list of inputs or outputs."""
    lines = []
    for i, spec in enumerate(specs):
        axes = "height, width, channels" if spec.last else "in the program's order"
        shape = "x".join(map(str, spec.stored[1:])) or "1"
        real = "the integers themselves" if spec.scale is None else f"real = {spec.scale:.9g} * (q - ({spec.zero_point}))"
        lines.append(f"- `model_{kind}({i})`: int8[{spec.size}], {shape} ({axes}); {real}")
    return "\n".join(lines)


_MAIN = """/* Reads samples, runs the network, writes results, until the input ends.
 *
 * ek_input() and ek_output() are the only lines that know where data come from. In QEMU and under a debugger they are
 * runtime/semihost.c (files in.bin and out.bin). For a real board build with HOST=board.c and write there:
 *     int ek_input(void *to, uint32_t bytes)              fill `to` from a sensor, UART or USB; 1, or 0 to stop
 *     void ek_output(const void *from, uint32_t bytes)    send, store, or act on the result
 *     void ek_log(const char *text)                       a UART, or nothing
 *     void ek_exit(int code)                              a reset or an endless loop; it must not return
 * runtime/startup.c and runtime/link.ld.S can be replaced by your vendor's; call ek_main() from its main().
 * To call the network from a program of your own, take model.c, model.h and runtime/ without startup.c and semihost.c. */
#include "edgekit.h"
#include "model.h"
@exit@
static uint8_t arena[MODEL_ARENA_BYTES] EK_ARENA;

int ek_main(void) {
    model_init(arena, sizeof arena);
@loop@
@final@}
"""

_FLAG = "\n#ifndef MODEL_EXIT\n#define MODEL_EXIT 0 /* 1: stop a sample once it is sure */\n#endif\n"

_WHOLE = """    while (@reads@) {
        model_run();
@writes@
    }
"""


def _exiting(loop: str) -> str:
    """The loop of a firmware with early exit; compiled with ``-DMODEL_EXIT=1`` it stops, and writes the steps that it took."""
    taken = "#if MODEL_EXIT\n        ek_output(&taken, sizeof taken);\n#endif\n"
    step = "            if (MODEL_EXIT && taken && model_sure()) continue; /* what is left of the sample is passed over */\n"
    loop = loop.replace("        model_reset();\n", "        int32_t taken = 0;\n        model_reset();\n")
    loop = loop.replace("            model_step();\n", step + "            model_step();\n            taken++;\n")
    return loop.replace("@writes@\n", "@writes@\n" + taken)


_STEPS = """    for (;;) {
        model_reset();
        for (int t = 0; t < MODEL_TIME_STEPS; t++) {
            if (!(@reads@)) return 0;
            model_step();
@each@
        }
@end@
    }
"""

_CONSTANT = """    while (@reads@) {
        model_reset();
        for (int t = 0; t < MODEL_TIME_STEPS; t++) {
            model_step();
@each@
        }
@end@
    }
"""

MAKEFILE = """# make        firmware.elf for @board@ (@target@)
# make run    boots it in QEMU: in.bin -> out.bin
# make HOST=board.c LINK_SCRIPT=vendor.ld STARTUP=vendor_startup.c    for a real board, see main.c
CROSS ?= arm-none-eabi-
CC := $(CROSS)gcc
HOST ?= @host@
STARTUP ?= runtime/startup.c
LINK_SCRIPT ?= link.ld
DEFINES ?=

CORE := @core@
CFLAGS := $(CORE) @flags@ @defines@ $(DEFINES) -Iruntime -I.
SOURCES := model.c main.c $(patsubst runtime/startup.c,$(STARTUP),@sources@) $(HOST)

firmware.elf: $(SOURCES) model.h runtime/edgekit.h runtime/internal.h $(LINK_SCRIPT)
\t$(CC) $(CFLAGS) @link@ -T $(LINK_SCRIPT) -Wl,-Map=firmware.map $(SOURCES) @libraries@ -o $@

link.ld: runtime/link.ld.S
\t$(CC) -E -P -undef -x c @memory@ $< -o $@

run: firmware.elf
\tqemu-system-arm -M @board@ -display none -monitor none -serial null -nic none \\
\t  -semihosting-config enable=on,target=native -kernel firmware.elf

clean:
\trm -f firmware.elf firmware.map link.ld

.PHONY: run clean
"""

CMAKE = """# cmake -B build && cmake --build build      firmware.elf for @board@ (@target@)
cmake_minimum_required(VERSION 3.16)
set(CMAKE_SYSTEM_NAME Generic)
if(NOT CMAKE_C_COMPILER)
  set(CMAKE_C_COMPILER arm-none-eabi-gcc)
endif()
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
project(model C)

set(HOST @host@ CACHE STRING "Input and output: semihosting, or your board's (see main.c)")
separate_arguments(FLAGS UNIX_COMMAND "@core@ @flags@ @defines@")
separate_arguments(LINK UNIX_COMMAND "@core@ @link@")
separate_arguments(MEMORY UNIX_COMMAND "@memory@")
separate_arguments(LIBRARIES UNIX_COMMAND "@libraries@")
separate_arguments(SOURCES UNIX_COMMAND "@sources@")

add_custom_command(
  OUTPUT ${CMAKE_BINARY_DIR}/link.ld
  COMMAND ${CMAKE_C_COMPILER} -E -P -undef -x c ${MEMORY} ${CMAKE_SOURCE_DIR}/runtime/link.ld.S -o ${CMAKE_BINARY_DIR}/link.ld
  DEPENDS ${CMAKE_SOURCE_DIR}/runtime/link.ld.S)
add_custom_target(script DEPENDS ${CMAKE_BINARY_DIR}/link.ld)

add_executable(firmware.elf model.c main.c ${SOURCES} ${HOST})
add_dependencies(firmware.elf script)
target_include_directories(firmware.elf PRIVATE runtime .)
target_compile_options(firmware.elf PRIVATE ${FLAGS})
target_link_options(firmware.elf PRIVATE ${LINK} -T ${CMAKE_BINARY_DIR}/link.ld)
target_link_libraries(firmware.elf PRIVATE ${LIBRARIES})
"""

CALLS = """    fill(model_input(0));                /* before each run: the arena is reused */
    model_run();
    use(model_output(0));"""

CALLS_SEQUENCE = """    model_reset();                       /* states start anew: before each sample, or once for a stream */
    for (;;) {
        fill(model_input(0));            /* one time step of the input */
        model_step();
        use(model_output(0));            /* so far; after MODEL_TIME_STEPS steps it is the program's */@sure@
    }"""

CALLS_CONSTANT = """    fill(model_input(0));
    model_reset();                       /* states start anew; reads the input, the same in each step */
    for (int t = 0; t < MODEL_TIME_STEPS; t++) {
        model_step();
        use(model_output(0));            /* so far; after the last step it is the program's */@sure@
    }"""

PACKED = """
Some weights are packed to 4 or 2 bits and unpacked while the layer runs. That saves flash, not time: the multiplications are the
same, and the unpacking comes on top.
"""

README = """# @name@ for @target@

C firmware written by edgekit: @macs@ multiply-accumulates an inference, int8, no allocation, no interpreter, no library besides
libgcc and memcpy. Kernel set: @kernel_set@. Linked for @title@ (`@board@` in QEMU), stack @stack@ bytes.

    make                 # firmware.elf; or: cmake -B build && cmake --build build
    make run             # boots it in QEMU, reads in.bin, writes out.bin

`in.bin` holds samples one after the other, each all inputs in order; `out.bin` gets all outputs of each sample.

## Inputs and outputs

@inputs@
@outputs@

To get q from a real number: `q = round_half_even(real / scale) + zero_point`, clamped to -128..127. The same numbers are in
`model.h` and `model.json`.

## In your own program

    static uint8_t arena[MODEL_ARENA_BYTES] __attribute__((aligned(16)));
    model_init(arena, sizeof arena);     /* once; checks the CRC of all constants */
@calls@

One arena of @arena@ bytes holds every activation and the kernels' scratch. If no output lay over the input it is computed from,
@bound@ bytes would be the least that the tensors' lifetimes allow. Weights are `const` and stay in flash (section `.weights`).
@packed@
## A real board

Write `ek_input`, `ek_output`, `ek_log` and `ek_exit` for it (`main.c` says how) and build with `make HOST=board.c`; give your
vendor's linker script with `LINK_SCRIPT=`. `-DMODEL_CHECK=0` leaves out the CRC of the weights, `-DMODEL_TAPS` sends every
layer's output to `ek_output`.
"""
