"""A planned :class:`Firmware` as C text: ``model.c`` and ``model.h``, the same bytes for the same program.

One function a step, all constants in flash with a CRC-32 each, all tensors at fixed offsets of one arena, no interpreter and no
allocation. Compiled with ``-DMODEL_TAPS`` each step writes its output to the host after it ran; nothing else changes.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.targets.cortex_m.confidence import Rule
from edgekit.targets.cortex_m.graph import Firmware, Step
from edgekit.targets.cortex_m.kernels import KERNELS, Call, Constant, Field

__all__ = ["array_name", "model_c", "model_h", "step_name", "stored_bytes", "struct_name"]

_NOTE = "Written by edgekit from the frozen program; export the program again instead of editing it."


def step_name(index: int, step: Step) -> str:
    """The C function of a step."""
    return f"model_layer_{index}_{re.sub(r'[^A-Za-z0-9]+', '_', step.layer).strip('_')}"


def array_name(index: int, role: str) -> str:
    """The C array of a step's constant."""
    return f"model_{index}_{role}"


def struct_name(index: int, call: int) -> str:
    """The C parameter struct of a step's call."""
    return f"model_{index}_p{call}"


def stored_bytes(constant: Constant) -> bytes:
    """The constant as it lies in flash, with zeros up to a multiple of four bytes, which kernels may read."""
    content = np.ascontiguousarray(constant.values).tobytes()
    return content + bytes(-len(content) % 4)


_TAPS = """#ifdef MODEL_TAPS /* every step's output goes to the host */
#define TAP(p, n) ek_output(p, n)
#else
#define TAP(p, n) (void)0
#endif
#ifndef MODEL_CHECK
#define MODEL_CHECK 1
#endif"""


_RUN = (
    "/* Where to write input i before each model_run(): the arena is reused, so model_run() overwrites its inputs. */",
    "int8_t *model_input(int i);",
    "void model_run(void);",
    "/* Output i of the last model_run(); valid until the next input is written. */",
)

_STREAM = (
    "/* Before each sample, or once for a stream that never ends: membranes and sums start anew. A constant input",
    " * (MODEL_SEQUENCE 0) is written before model_reset() and not again, one of a sequence before each model_step(). */",
    "void model_reset(void);",
    "int8_t *model_input(int i);",
    "/* One time step; the state stays in the arena. MODEL_TIME_STEPS of them are the program. */",
    "void model_step(void);",
    "/* Output i: the sum over the steps since the reset, or that of the last step. Valid until the next input is written. */",
)


_EXIT = (
    "/* 1 if the sums after the steps so far are sure enough to stop here (Dynamic Confidence). */",
    "int model_sure(void);",
)


def model_h(firmware: Firmware, exits: bool = False) -> str:
    """The header: sizes, scales, and the four functions."""
    lines = [
        f"/* {firmware.name}: {firmware.macs} multiply-accumulates an inference. {_NOTE} */",
        "#ifndef MODEL_H",
        "#define MODEL_H",
    ]
    lines += [
        "",
        "#include <stdint.h>",
        "",
        f"#define MODEL_ARENA_BYTES {firmware.arena}u",
        f"#define MODEL_STEPS {len(firmware.steps)}",
    ]
    if firmware.stream is not None:
        lines += [
            f"#define MODEL_TIME_STEPS {firmware.stream.count}",
            f"#define MODEL_SEQUENCE {int(firmware.stream.sequence)}",
        ]
    for kind, ports in (("INPUT", firmware.inputs), ("OUTPUT", firmware.outputs)):
        lines += ["", f"#define MODEL_{kind}S {len(ports)}"]
        for i, port in enumerate(ports):
            tensor = firmware.tensors[port.tensor]
            axes = "height, width, channels" if tensor.last else "the program's order"
            shape = "x".join(map(str, tensor.stored[1:])) or "1"
            lines += [
                f"/* int8[{tensor.size}]: {shape} ({axes}); real = {kind}_SCALE * (q - {kind}_ZERO_POINT) */",
                f"#define MODEL_{kind}_{i}_BYTES {tensor.size}u",
                f"#define MODEL_{kind}_{i}_SCALE {_real(1.0 if port.scale is None else port.scale)}",
                f"#define MODEL_{kind}_{i}_ZERO_POINT ({0 if port.zero_point is None else port.zero_point})",
            ]
    lines += [
        "",
        "/* Checks the arena (aligned to 16, MODEL_ARENA_BYTES or more) and the CRC of every constant in flash;",
        " * ends by ek_exit() if one fails. Call it once. -DMODEL_CHECK=0 leaves the CRC out. */",
        "void model_init(void *arena, uint32_t bytes);",
        *(_RUN if firmware.stream is None else _STREAM),
        "const int8_t *model_output(int i);",
        *(_EXIT if exits else ()),
        "",
        "#endif",
    ]
    return "\n".join(lines) + "\n"


def model_c(firmware: Firmware, rule: Rule | None = None) -> str:
    """The network."""
    resets: list[str] = []
    parts = [
        f"/* {firmware.name}. {_NOTE} */",
        '#include "model.h"\n\n#include "edgekit.h"',
        _TAPS,
        "static int8_t *arena;",
        *(_step(firmware, i, step, resets) for i, step in enumerate(firmware.steps)),
        _segments(firmware),
        _functions(firmware, resets),
        *([_sure(firmware, rule)] if rule else []),
    ]
    return "\n\n".join(parts) + "\n"


def _real(value: float) -> str:
    return f"{np.float32(value)!s}f"


def _step(firmware: Firmware, index: int, step: Step, resets: list[str]) -> str:
    """The step's constants and function; ``resets`` gets the statements that set its state."""
    kernel, name = KERNELS[step.kind], step_name(index, step)
    shapes = " + ".join("x".join(map(str, firmware.tensors[i].stored[1:])) for i in step.inputs)
    output = "x".join(map(str, firmware.tensors[step.output].stored[1:]))
    macs = f", {step.macs} MACs" if step.macs else ""
    texts = [f"/* {index}. {step.layer}: {step.kind}, {shapes} -> {output}{macs} */"]
    texts += [_array(array_name(index, c.role), c) for c in kernel.constants(step)]
    body = []
    for call in kernel.resets(step):
        arguments = ", ".join(_argument(firmware, index, step, 0, call, a) for a in call.arguments)
        resets.append(f"    {call.function}({arguments});")
    for number, call in enumerate(kernel.calls(step)):
        if call.struct is not None:
            members = ", ".join(_member(index, f) for f in call.struct.fields)
            texts.append(_wrapped(f"const {call.struct.type} {struct_name(index, number)} = {{", members.split(", "), "};"))
        body.append(
            f"    {call.function}({', '.join(_argument(firmware, index, step, number, call, a) for a in call.arguments)});"
        )
    tensor = firmware.tensors[step.output]
    body.append(f"    TAP({_place(firmware, step.output)}, {tensor.size});")
    texts.append(f"void {name}(void);\n__attribute__((noinline)) void {name}(void) {{\n" + "\n".join(body) + "\n}")
    return "\n".join(texts)


def _place(firmware: Firmware, tensor: int, more: int = 0) -> str:
    return f"arena + {firmware.offsets[tensor] + more}"


def _argument(firmware: Firmware, index: int, step: Step, number: int, call: Call, text: str) -> str:
    if text == "$p":
        return f"&{struct_name(index, number)}"
    if text == "$v":
        assert step.state is not None
        return _place(firmware, step.state)
    if text == "$s":
        return f"arena + {firmware.scratch_offsets[index]}" if step.scratch else "0"
    if text.startswith("$x"):
        return _place(firmware, step.inputs[int(text[2:])])
    if text.startswith("$y"):
        return _place(firmware, step.output, int(text[2:] or 0))
    return array_name(index, text[1:]) if text.startswith("$") else text


def _member(index: int, member: Field) -> str:
    if member.type == "*":
        return f".{member.name} = {'0' if member.value is None else array_name(index, member.value)}"
    if isinstance(member.value, tuple):
        return f".{member.name} = {{{','.join(map(str, member.value))}}}"
    return f".{member.name} = {member.value}"


def _array(name: str, constant: Constant) -> str:
    values = constant.values.reshape(-1)
    if values.dtype.names:
        words = ["{" + ",".join(str(int(v)) for v in row) + "}" for row in values]
        return _wrapped(f"const {constant.type} {name}[{len(words)}] EK_WEIGHTS = {{", words, "};")
    size = len(stored_bytes(constant)) // values.itemsize
    return _wrapped(f"const {constant.type} {name}[{size}] EK_WEIGHTS = {{", [_literal(v) for v in values], "};")


def _literal(value: Any) -> str:
    if isinstance(value, np.floating):
        return f"{float(value).hex()}f"
    return "(-2147483647 - 1)" if int(value) == -(1 << 31) else str(int(value))


def _wrapped(head: str, words: Sequence[str], tail: str) -> str:
    lines, line = [], "   "
    for word in words:
        if len(line) + len(word) + 2 > 120:
            lines.append(line)
            line = "   "
        line += f" {word},"
    return "\n".join([head, *lines, line, tail])


def _sure(firmware: Firmware, rule: Rule) -> str:
    place = _place(firmware, rule.tensor)
    call = f"ek_sure_s32((const void *)({place}), {rule.classes}u, {rule.scale}u, {rule.limit}u)"
    return f"int model_sure(void) {{\n    return {call};\n}}"


def _segments(firmware: Firmware) -> str:
    rows = []
    for index, step in enumerate(firmware.steps):
        for constant in KERNELS[step.kind].constants(step):
            content = stored_bytes(constant)
            rows.append(f"    {{{array_name(index, constant.role)}, {len(content)}u, 0x{zlib.crc32(content):08x}u}},")
    if not rows:
        return "/* no constants to check */"
    return "\n".join(["static const ek_segment segments[] = {", *rows, "};"])


def _functions(firmware: Firmware, resets: Sequence[str]) -> str:
    constants: list[NDArray[Any]] = [c.values for s in firmware.steps for c in KERNELS[s.kind].constants(s)]
    check = "    if (MODEL_CHECK) ek_check_weights(segments, sizeof segments / sizeof segments[0]);\n" if constants else ""
    lines = [
        "void model_init(void *memory, uint32_t bytes) {",
        "    ek_check_arena(memory, bytes, MODEL_ARENA_BYTES);",
        f"{check}    arena = memory;",
        "}",
    ]
    for kind, name, ports in (("int8_t *", "input", firmware.inputs), ("const int8_t *", "output", firmware.outputs)):
        offsets = ", ".join(f"{firmware.offsets[p.tensor]}" for p in ports)
        lines += [
            "",
            f"{kind}model_{name}(int i) {{",
            f"    static const uint32_t offsets[] = {{{offsets}}};",
            "    return arena + offsets[i];",
            "}",
        ]
    calls = [f"    {step_name(i, s)}();" for i, s in enumerate(firmware.steps)]
    if firmware.stream is None:
        return "\n".join([*lines, "", "void model_run(void) {", *calls, "}"])
    once = firmware.stream.once
    lines += ["", "void model_reset(void) {", *resets, *calls[:once], "}", "", "void model_step(void) {", *calls[once:], "}"]
    return "\n".join(lines)
