"""The parity contract's result: which stage computes what, layer by layer, as plain data with a JSON form (``parity.json``).

Units: ``metric`` is a percentage for accuracy; agreements are percentages; ``*_lsb`` are steps of the output scale of the program
(stage) or of the layer; ``sqnr*`` are decibels, None where nothing differs; ``share`` is 0 to 1; sizes are bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgekit.errors import FormatError, ParityError
from edgekit.files import write_json

__all__ = ["FORMAT", "ArtifactParity", "LayerParity", "Parity", "Stage"]

FORMAT = 1
"""Version of ``parity.json``."""


@dataclass(frozen=True)
class Stage:
    """One row of the stage table: a form of the model, run on the evaluation samples.

    Attributes:
        name: "float", "compressed" (fake-quantized), "frozen", or the target's name.
        samples: how many evaluation samples it ran.
        metric: task metric; None without labels.
        agreement_float, agreement_frozen: percent of samples with the same top-1 class as that stage; None without classes or
            without that stage.
        max_lsb, mean_lsb: difference from the frozen program, in steps of the output's scale; None if the output is float.
        max_difference: largest difference from the frozen program in the output's own unit.
        sqnr_float_db, sqnr_frozen_db: the difference from that stage as noise on it; None where there is none (``exact_*``).
        exact_float, exact_frozen: every element equals that stage's.
        bytes: the file's size (measured) or the bytes of weights, biases and scales (counted).
        bytes_measured: whether ``bytes`` is a file's size.
        macs: multiply-accumulates for one sample, counted from shapes; None if unknown.
    """

    name: str
    samples: int
    metric: float | None = None
    agreement_float: float | None = None
    agreement_frozen: float | None = None
    max_lsb: float | None = None
    mean_lsb: float | None = None
    max_difference: float | None = None
    sqnr_float_db: float | None = None
    sqnr_frozen_db: float | None = None
    exact_float: bool = False
    exact_frozen: bool = False
    bytes: int | None = None
    bytes_measured: bool = False
    macs: int | None = None


@dataclass(frozen=True)
class LayerParity:
    """A frozen layer fed the TARGET'S own inputs against what the target computed, over all layer samples.

    Attributes:
        layer, op, weight_bits, macs: the frozen layer.
        max_lsb: largest difference in steps of the layer's output.
        share: share of elements that differ.
        sqnr_db: that difference as noise on the expected output; None where nothing differs.
        elements: how many were compared.
        within: ``max_lsb`` is within the tolerance.
        exact: equal to the bit-exact reference of the device; None where there is none.
        rounded: how many of the differing spikes follow from rounding alone (:mod:`edgekit.spike_parity`); None: no spikes.
    """

    layer: str
    op: str
    weight_bits: int | None
    macs: int
    max_lsb: float
    share: float
    sqnr_db: float | None
    elements: int
    within: bool
    exact: bool | None = None
    rounded: int | None = None

    @property
    def differing(self) -> int:
        """How many elements differ."""
        return round(self.share * self.elements)


@dataclass(frozen=True)
class ArtifactParity:
    """Everything verify found out about one file.

    Attributes:
        target: name of the target, such as "tflite".
        device: where it ran; "" is this machine.
        file, sha256: the file's name in its folder and its hash.
        stage: its row of the stage table.
        layers: every tapped layer, in execution order.
        untapped: layers the runtime gives no output for; they are checked through the next tapped layer.
        mismatches: facts in the file that differ from the frozen program, in words.
        first_diverging: the first layer in execution order that left tolerance or whose stored facts differ.
        tap_lsb: largest difference between the file's own outputs and those that follow from the taps, in LSBs.
        chip: it ran quantized to a chip, whose numbers are not the program's: no layer is compared, the task alone is judged.
        exact: every layer and output equals the bit-exact reference of the device; None where there is none.
        breaches: one sentence each; empty means the file computes the frozen program.
        notes: what a reader has to know and is no breach.
        artifact: facts read from the file (:class:`edgekit.artifact.Artifact` as JSON).
    """

    target: str
    file: str
    sha256: str
    stage: Stage
    layers: tuple[LayerParity, ...] = ()
    untapped: tuple[str, ...] = ()
    mismatches: tuple[str, ...] = ()
    first_diverging: str | None = None
    tap_lsb: float | None = None
    exact: bool | None = None
    breaches: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    artifact: Mapping[str, Any] = field(default_factory=dict)
    device: str = ""
    chip: bool = False

    @property
    def name(self) -> str:
        """Target, and the device where it is not this machine."""
        return f"{self.target} on {self.device}" if self.device else self.target

    @property
    def ok(self) -> bool:
        """No breach."""
        return not self.breaches


@dataclass(frozen=True)
class Parity:
    """The result of :func:`edgekit.verify.verify_run`.

    Attributes:
        program: name of the frozen program.
        metric: name of the task metric, None without labels.
        samples, layer_samples: evaluation samples of the stage table, and how many of them the per-layer check used.
        settings: the tolerances, as in the recipe.
        stages: the stage table in order: float, compressed, frozen, each artefact.
        artifacts: one entry for each file.
        unchecked: targets whose file is in the run and was not checked.
        run_breaches: breaches that belong to no single file.
        notes: what a reader has to know and is no breach.
    """

    program: str
    metric: str | None
    samples: int
    layer_samples: int
    settings: Mapping[str, Any]
    stages: tuple[Stage, ...]
    artifacts: tuple[ArtifactParity, ...]
    unchecked: tuple[str, ...] = ()
    run_breaches: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def breaches(self) -> list[str]:
        """Every breach of the run, one sentence each."""
        return [*self.run_breaches, *(b for a in self.artifacts for b in a.breaches)]

    @property
    def ok(self) -> bool:
        """No breach: exit code 0."""
        return not self.breaches

    def require(self) -> None:
        """Raise ParityError with the breaches, if there are any."""
        found = self.breaches
        if found:
            more = f" (and {len(found) - 3} more, see parity.json)" if len(found) > 3 else ""
            raise ParityError("; ".join(found[:3]) + more)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"format": FORMAT, "ok": self.ok, "breaches": self.breaches, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write ``parity.json``, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Parity:
        """Read ``parity.json``.

        Raises:
            FormatError: missing, damaged, or from a newer edgekit.
        """
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
            if value["format"] != FORMAT:
                raise FormatError(f"{path}: format {value['format']}, this edgekit reads {FORMAT}; upgrade edgekit")
            return cls.from_json(value)
        except FileNotFoundError as error:
            raise FormatError(f"{path}: no such file; run `edgekit verify` on the run folder first") from error
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{path}: damaged ({error}); run `edgekit verify` on the run folder again") from error

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Parity:
        """The inverse of :meth:`to_json`."""
        fields = {k: v for k, v in value.items() if k not in ("format", "ok", "breaches")}
        fields["stages"] = tuple(Stage(**s) for s in fields["stages"])
        fields["artifacts"] = tuple(_artifact(a) for a in fields["artifacts"])
        for key in ("unchecked", "run_breaches", "notes"):
            fields[key] = tuple(fields.get(key, ()))
        return cls(**fields)


def _artifact(value: Mapping[str, Any]) -> ArtifactParity:
    fields = dict(value)
    fields["stage"] = Stage(**fields["stage"])
    fields["layers"] = tuple(LayerParity(**layer) for layer in fields["layers"])
    for key in ("untapped", "mismatches", "breaches", "notes"):
        fields[key] = tuple(fields[key])
    return ArtifactParity(**fields)
