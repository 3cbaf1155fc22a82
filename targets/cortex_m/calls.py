"""How a kernel is written down: its C calls, their structs, its constants and its needs, the rows of ``kernels.KERNELS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from edgekit.targets.cortex_m.graph import Step

__all__ = ["Call", "Constant", "Field", "Kernel", "Struct", "ending", "members", "sizes16"]


@dataclass(frozen=True)
class Constant:
    """An array in flash: its ``role`` ("weights", "bias", ...), its values as they are stored, and the C type of one of them."""

    role: str
    values: NDArray[Any]
    type: str


@dataclass(frozen=True)
class Field:
    """A member of a parameter struct, in the header's order: its C type, or "*" for a pointer to the constant named ``value``."""

    name: str
    type: str
    value: Any


@dataclass(frozen=True)
class Struct:
    """A parameter struct: its C type and its members."""

    type: str
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class Call:
    """One call of a C function.

    In ``arguments`` "$p" is the struct, "$x0" an input, "$y" the output, "$s" scratch, "$table" a constant.

    "$y+12" is the output moved by 12 elements.
    """

    function: str
    arguments: tuple[str, ...]
    struct: Struct | None = None


@dataclass(frozen=True)
class Kernel:
    """A row of the table.

    Attributes:
        calls: the C calls of a step.
        constants: the arrays of a step as they are stored in flash.
        in_place: positions of the inputs over which the output may be written.
        scratch: bytes that it needs while it runs, for a step and a kernel set ("portable", "dsp", "mve").
        resets: the C calls that bring its state to where it starts; in them and in ``calls`` "$v" is the state.
        trail: how far its output must start below its input if it may lie over it (:mod:`~edgekit.targets.cortex_m.trails`).
    """

    calls: Callable[[Step], Sequence[Call]]
    constants: Callable[[Step], Sequence[Constant]] = lambda step: ()
    in_place: tuple[int, ...] = ()
    scratch: Callable[[Step, str], int] = lambda step, kernel_set: 0
    trail: Callable[[Step, str], int | None] = lambda step, kernel_set: None
    resets: Callable[[Step], Sequence[Call]] = lambda step: ()


def members(values: Mapping[str, tuple[str, Any]]) -> tuple[Field, ...]:
    """Members by name: (C type, value)."""
    return tuple(Field(name, kind, value) for name, (kind, value) in values.items())


def ending(values: Mapping[str, Any], *before: str) -> dict[str, tuple[str, Any]]:
    """The zero points and the clamp that most structs end with."""
    return {
        **{name: ("int8_t", values[name]) for name in before},
        "out_zp": ("int8_t", values["out_zp"]),
        "act_min": ("int8_t", values["low"]),
        "act_max": ("int8_t", values["high"]),
    }


def sizes16(**pairs: int) -> dict[str, tuple[str, int]]:
    """Members of 16 bits."""
    return {name: ("uint16_t", value) for name, value in pairs.items()}
