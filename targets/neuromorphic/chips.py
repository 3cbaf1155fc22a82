"""What neuromorphic chips can hold: one table a chip, each limit with where it was read, and whether that was possible.

Sources, all public: rockpool's mappers and design rules (SynSense, ``rockpool/devices/xylo/syns*/xylo_mapper.py``), xylosim
0.1.3, sinabs 3.1.3's placement for DYNAP-CNN (``backend/dynapcnn/chips``, ``validate_memory_speck.py``), nengo-loihi's validator
(``nengo_loihi/block.py``), lava-nc 0.10.0, Davies et al. (IEEE Micro 2018) and Intel's Loihi 2 technology brief (2021). A limit
that was not read in one of these is marked ``confirmed=False`` and says what it rests on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgekit.errors import InputError

__all__ = ["CHIPS", "Chip", "Core", "Limit", "chip"]

_MAPPER = "rockpool, {}/xylo_mapper.py"
_XYLOSIM = "xylosim 0.1.3, XyloIAFNeuron.h"
_SINABS = "sinabs 3.1.3, backend/dynapcnn"
_SPECK = "sinabs 3.1.3, validate_memory_speck.py"
_NENGO = "nengo-loihi 1.1, block.py"
_DAVIES = "Davies et al., IEEE Micro 2018"
_BRIEF = "Intel, Loihi 2 technology brief, 2021"
_LAVA = "lava-nc 0.10.0, proc/lif and proc/dense"


@dataclass(frozen=True)
class Limit:
    """A number, where it was read, and whether that source says it of this chip."""

    value: int
    source: str
    confirmed: bool = True


@dataclass(frozen=True)
class Core:
    """A core of a convolutional chip: words for kernels, neurons and biases."""

    kernels: int
    neurons: int
    biases: int


@dataclass(frozen=True)
class Chip:
    """A chip.

    Attributes:
        name, title: for the command line, and in words.
        kind: "reservoir" (inputs, hidden neurons, outputs), "cores" (many cores of compartments) or "layers" (a core a layer).
        limits: by name; the rules that read them are in :mod:`edgekit.targets.neuromorphic.chip_rules`.
        resets: reset rules of its neurons; ``resets_limit`` says where they were read.
        kinds: neuron nodes that its arithmetic has.
        cores: of a chip of kind "layers".
        kernels, strides, pools: sizes that its layers take.
        notes: what a reader must know.
    """

    name: str
    title: str
    kind: str
    limits: Mapping[str, Limit]
    resets: tuple[str, ...]
    kinds: tuple[str, ...]
    cores: tuple[Core, ...] = ()
    kernels: int = 0
    strides: tuple[int, ...] = ()
    pools: tuple[int, ...] = ()
    notes: tuple[str, ...] = field(default=())
    resets_limit: Limit = Limit(0, "the chip's model of its neurons")


def _xylo(name: str, title: str, part: str, hidden: int, outputs: Limit, synapses: Limit, *notes: str) -> Chip:
    source = _MAPPER.format(part)
    limits = {
        "inputs": Limit(16, source),
        "hidden": Limit(hidden, source),
        "outputs": outputs,
        "synapses": synapses,
        "weight_bits": Limit(8, _XYLOSIM),
        "state_bits": Limit(16, _XYLOSIM),
        "input_spikes": Limit(15, _XYLOSIM),
        "hidden_spikes": Limit(31, _XYLOSIM),
        "output_spikes": Limit(1, _XYLOSIM),
        "largest_dash": Limit(15, _XYLOSIM),
        "fan_out": Limit(63, "remembered from SynSense's overview of the family; found in none of the sources", False),
    }
    return Chip(name, title, "reservoir", limits, ("subtract",), ("CubaLIF",), notes=notes)


def _dynapcnn(name: str, title: str, confirmed: bool, *notes: str) -> Chip:
    limits = {
        "layers": Limit(9, _SINABS, confirmed),
        "channels": Limit(1024, _SPECK, confirmed),
        "weight_bits": Limit(8, _SINABS, confirmed),
        "state_bits": Limit(16, _SINABS, confirmed),
        "input_side": Limit(128, "sinabs 3.1.3, DVSLayer: the camera's 128 x 128", confirmed),
    }
    sizes = [(16, 64)] * 3 + [(32, 32)] * 2 + [(64, 16)] * 2 + [(16, 16)] * 2
    cores = tuple(Core(1024 * kernels, 1024 * neurons, 1024) for kernels, neurons in sizes)
    return Chip(
        name, title, "layers", limits, ("subtract", "zero"), ("IF",), cores, kernels=16, strides=(1, 2, 4, 8), pools=(1, 2, 4),
        notes=notes,
    )  # fmt: skip


def _loihi(name: str, title: str, limits: Mapping[str, Limit], *notes: str) -> Chip:
    programmable = Limit(0, "lava's LIF; Loihi 2's neurons can be programmed to do otherwise", False)
    resets = programmable if name == "loihi2" else Limit(0, _NENGO)
    return Chip(name, title, "cores", limits, ("zero",), ("IF", "LIF", "CubaLIF"), notes=notes, resets_limit=resets)


_TWO, _ONE = (Limit(n, _MAPPER.format("syns63300")) for n in (2, 1))

CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        _xylo("xylo-audio-2", "Xylo Audio 2 (SYNS61201)", "syns61201", 1000, Limit(8, _MAPPER.format("syns61201")), _TWO),
        _xylo(
            "xylo-audio-3", "Xylo Audio 3 (SYNS65302)", "syns65302", 992, Limit(32, _MAPPER.format("syns65302")), _TWO,
            "the mapper has 32 output neurons and its design rule warns above 16 output channels",
        ),
        _xylo("xylo-imu", "Xylo IMU (SYNS63300)", "syns63300", 496, Limit(16, _MAPPER.format("syns63300")), _ONE),
        _dynapcnn("dynapcnn", "DYNAP-CNN", True),
        _dynapcnn("speck2f", "Speck 2f", True, "placement as for DYNAP-CNN, whose tables sinabs uses for Speck 2e and 2f"),
        _loihi(
            "loihi1", "Loihi",
            {
                "cores": Limit(128, _DAVIES), "compartments": Limit(1024, _NENGO), "in_axons": Limit(4096, _NENGO),
                "out_axons": Limit(4096, _NENGO), "synapse_bits": Limit(1048576, _NENGO), "weight_bits": Limit(8, _DAVIES),
            },
            "a synapse costs its weight's bits and about as many again for its index; that part is an estimate",
        ),
        _loihi(
            "loihi2", "Loihi 2",
            {
                "cores": Limit(128, _BRIEF), "compartments": Limit(8192, _BRIEF),
                "synapses": Limit(120_000_000, _BRIEF), "weight_bits": Limit(8, _LAVA), "state_bits": Limit(24, _LAVA),
                "in_axons": Limit(4096, "as on Loihi; no public source for Loihi 2", False),
                "out_axons": Limit(4096, "as on Loihi; no public source for Loihi 2", False),
            },
        ),
    )
}  # fmt: skip
"""Name to chip."""


def chip(name: str) -> Chip:
    """The chip of that name.

    Raises:
        InputError: there is none.
    """
    if name not in CHIPS:
        raise InputError(f"chip {name!r} is unknown; choose one of: {', '.join(CHIPS)}")
    return CHIPS[name]
