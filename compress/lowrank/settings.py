"""Settings of low-rank compression (``lowrank:``) as they stand in a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.dataclasses import dataclass

from edgekit.compress.patterns import check_patterns

__all__ = ["BUDGETS", "METERED", "LowRank", "Rank", "parse_rank"]

_FORBID = ConfigDict(extra="forbid")

METERED = ("instructions", "latency")
"""Budgets in what a target measures."""

BUDGETS = ("params", "macs", "size", *METERED)
_UNITS = {"": 1, "B": 1, "KB": 1000, "KIB": 1024, "MB": 10**6, "MIB": 2**20}
_FORMS = (
    "an integer, a fraction of the break-even rank below 1, energy:0.95, params:0.5, macs:0.5, size:200KB, instructions:0.5 or "
    "latency:0.5"
)


@plain_dataclass(frozen=True)
class Rank:
    """What decides the ranks: ``kind`` is "rank", "fraction", "energy" or one of :data:`BUDGETS`; ``value`` its number."""

    kind: str
    value: float


def parse_rank(text: int | float | str) -> Rank:
    """``32``, ``0.5``, ``"energy:0.95"``, ``"params:0.5"``, ``"macs:0.5"``, ``"size:200KB"`` (or 200KiB, 1MB, bytes),
    ``"instructions:0.5"``, ``"latency:0.5"``.

    Raises:
        ValueError: none of these, or a number out of range.
    """
    if isinstance(text, bool):
        raise ValueError(f"expected {_FORMS}")
    if isinstance(text, str) and re.fullmatch(r"\d+", text):
        text = int(text)
    elif isinstance(text, str) and re.fullmatch(r"\d*\.\d+", text):
        text = float(text)
    if isinstance(text, int):
        if text < 1:
            raise ValueError("a rank is at least 1")
        return Rank("rank", text)
    if isinstance(text, float):
        return Rank("fraction", _share(text))
    kind, _, value = text.partition(":")
    if kind == "size" and (found := re.fullmatch(r"(\d+(?:\.\d+)?) *([KM]?i?B?)", value.strip(), re.IGNORECASE)):
        unit = _UNITS.get(found[2].upper())
        if unit is not None and float(found[1]) > 0:
            return Rank("size", float(found[1]) * unit)
    if kind in ("energy", "params", "macs", *METERED) and re.fullmatch(r" *\d*\.?\d+ *", value):
        return Rank(kind, _share(float(value)))
    raise ValueError(f"expected {_FORMS}")


def _share(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError("a share is more than 0 and less than 1")
    return value


@dataclass(frozen=True, config=_FORBID, kw_only=True)
class LowRank:
    """Low-rank compression of linear and convolutional layers, before quantization.

    Attributes:
        rank: an integer; a fraction of the break-even rank, the one that has as many weights as the layer (0.5);
            ``energy:0.95``, the share of each layer's output energy that is kept; or a budget for the whole model, spread over
            the layers by measured sensitivity: ``params:0.5``, ``macs:0.5`` (shares of the model's), ``size:200KB`` (weights
            at one byte each, biases at four), or ``instructions:0.5`` and ``latency:0.5`` of ``target``.
        target: what a budget of instructions (``cortex-m4``, ...) or latency (``tflite``, ``executorch``, ``onnx``, on this
            machine) is measured on, with 8-bit weights and activations.
        solver: ``svd_data`` (default): the least error of the layer's output on calibration data; ``svd``: the least error of
            the weight (Eckart and Young 1936); ``snmf``: semi-non-negative factorization (Ding et al. 2010); ``random``: new
            weights, to be trained.
        scheme: how a convolution is split: ``ced``: k x k to r channels, then 1 x 1; ``spatial``: k x 1 to r channels, then
            1 x k (Jaderberg et al. 2014); ``tucker``: 1 x 1, k x k, 1 x 1 (Kim et al. 2016); ``auto``: for each layer the one
            with the least error at the same cost (``snmf`` has ``ced`` only). Linear layers become two in any case.
        linformer: project keys and values of every attention to so many tokens first, where that saves work; 0: of none. It
            computes something else until it is trained: let ``repair`` follow.
        multiple: ranks are multiples of it (kernels work on 4 or 8 channels at a time); an integer ``rank`` is taken as it is.
        include: regular expressions (full match) of the layers to factorize; all if empty.
        exclude: regular expressions (full match) of layers to leave alone.
        min_features: layers with fewer inputs or outputs are left alone (an image's 3 channels times the kernel count).
        iterations: of ``snmf`` and ``tucker``.
        samples: calibration samples used by ``svd_data`` and budgets, spread as for ``ptq``.
        batch_size: calibration batch.
        seed: of ``random`` and ``snmf``.
    """

    rank: int | float | str = "energy:0.95"
    target: str = ""
    solver: Literal["svd_data", "svd", "snmf", "random"] = "svd_data"
    scheme: Literal["auto", "ced", "spatial", "tucker"] = "auto"
    linformer: Annotated[int, Field(ge=0)] = 0
    multiple: Annotated[int, Field(ge=1)] = 4
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_features: Annotated[int, Field(ge=1)] = 10
    iterations: Annotated[int, Field(ge=1)] = 20
    samples: Annotated[int, Field(ge=1)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 32
    seed: int = 0

    @field_validator("rank")
    @classmethod
    def _rank(cls, value: int | float | str) -> int | float | str:
        parse_rank(value)
        return value

    @field_validator("target")
    @classmethod
    def _target(cls, value: str, info: ValidationInfo) -> str:
        metered = "rank" in info.data and parse_rank(info.data["rank"]).kind in METERED
        if value and not metered:
            raise ValueError("only a budget of instructions or latency has a target")
        return value

    @model_validator(mode="after")
    def _measured_on(self) -> LowRank:
        if parse_rank(self.rank).kind in METERED and not self.target:
            raise ValueError(f"rank {self.rank} needs a target to be measured on, such as `target: cortex-m4`")
        return self

    @field_validator("scheme")
    @classmethod
    def _scheme(cls, value: str, info: ValidationInfo) -> str:
        if value not in ("ced", "auto") and info.data.get("solver") == "snmf":
            raise ValueError("solver snmf splits convolutions by scheme ced only")
        return value

    _patterns = field_validator("include", "exclude")(check_patterns)
