"""A spiking program in float becomes integers: int8 (or fewer bits) weights, int16 currents and membranes, Q15 leaks.

Arithmetic and layouts are those of the integer operators of :mod:`edgekit.frozen.spiking_ops`; firmware runs the result as it is.
What is folded where:

* a neuron's gain (``r * dt`` or ``r * dt / tau``) and its leak potential go into the weights and biases of the layer before, for
  each output channel; so do the amplitude of spikes and the divisor of average pools;
* the unit of current of an output channel is its weight scale, thresholds and initial membranes are in that unit. The unit is the
  smallest at which the largest weight fits its bits, no partial sum of currents can leave int16 whatever the spikes
  (:func:`edgekit.frozen.spiking_ops.current_bounds`), and a threshold takes a quarter of int16's range;
* currents of several layers into the same neurons (residual sums) get one unit for each channel, and one proof for their sum; a
  spike that skips the layers adds its amplitude in units, in 16 bits, which costs the weights none of theirs;
* a first layer with real-valued input is an ordinary integer layer with 16-bit outputs, its unit chosen on calibration samples;
* the current of a synapse (CubaLIF) is held in units of what it adds to the membrane; however long it lasts, it fits int16;
* what the spikes of a recurrent layer give back has the unit of the currents that come in, and one proof with them;
* the readout has one unit for all outputs, and is an int32 sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from edgekit.compress.ptq.freeze import bias_integers
from edgekit.compress.spiking.integer_cells import THRESHOLD_MAX, Cell, bounds, compact, fitting_unit, rounded
from edgekit.compress.spiking.integer_sums import Joint, joint
from edgekit.errors import ModelError, UnsupportedError
from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.frozen.ops import integer_range
from edgekit.nir import interpret
from edgekit.nir.from_program import to_nir
from edgekit.nir.inference import encode
from edgekit.nir.nodes import paddings, pair
from edgekit.nir.semantics import FIRING, Flat, flatten, kind, step_length
from edgekit.nir.to_module import looped

__all__ = ["IntegerLayer", "coarse_warnings", "integer_program"]

_COARSE = 16
"""Below this many units a threshold is said to be coarse."""
_MARGIN = 1.25
"""What the largest current seen in calibration is multiplied by before it must fit int16."""

_SYNAPSES = ("Affine", "Linear", "Conv2d")
_NEURONS = (*FIRING, "Threshold")


@dataclass(frozen=True)
class IntegerLayer:
    """What became of a layer with weights.

    Attributes:
        layer: its name.
        neuron: the layer of neurons that gets its current; "" for a readout.
        weight_bits: bits of its weights.
        unit: smallest and largest real value of one unit of current, over the output channels.
        threshold: smallest and largest threshold in units; None for a readout.
        bounds: smallest and largest current that any input can give, in units.
    """

    layer: str
    neuron: str
    weight_bits: int
    unit: tuple[float, float]
    threshold: tuple[int, int] | None
    bounds: tuple[int, int]

    @property
    def coarse(self) -> bool:
        """Whether a threshold has so few units that rounding shifts it by several percent."""
        return self.threshold is not None and self.threshold[0] < _COARSE


def integer_program(
    program: FrozenProgram, inputs: Sequence[Tensor], weight_bits: int = 8, *, name: str | None = None
) -> tuple[FrozenProgram, tuple[IntegerLayer, ...]]:
    """The integer form of a spiking program in float, for a batch of one.

    Args:
        program: of float operators; layers one after the other, each layer with weights followed by neurons or by the readout.
        inputs: calibration samples, (N, ...) for each input; they decide the scale of real-valued inputs and first currents.
        weight_bits: 8, 4 or 2.

    Raises:
        ModelError: something that the integer operators cannot do; names the layer.
        UnsupportedError: an operator that is no part of spiking programs.
    """
    return _Integer(program, inputs, weight_bits).build(name or program.name)


def coarse_warnings(layers: Sequence[IntegerLayer]) -> list[str]:
    """A sentence that names the neurons whose thresholds are coarse; none if there are none."""
    coarse = list(dict.fromkeys(layer.neuron for layer in layers if layer.coarse))
    return (
        [f"spiking: thresholds of {', '.join(coarse)} are under 16 units of current, which rounding shifts much"]
        if coarse
        else []
    )


@dataclass(frozen=True)
class _Signal:
    """A value of the integer program.

    Attributes:
        node: where it comes from.
        scale: real value of one unit.
        zero_point: of a real-valued input.
        low, high: least and largest integer of spikes; None for a real-valued input.
        shape: of a sample.
        gains: for each channel, where that is not one number; only sums take such a value.
    """

    node: fx.Node
    scale: float
    shape: tuple[int, ...]
    zero_point: int = 0
    low: int = 0
    high: int | None = 1
    gains: Tensor | None = None


class _Integer:
    def __init__(self, program: FrozenProgram, inputs: Sequence[Tensor], weight_bits: int) -> None:
        self.program, self.bits = program, weight_bits
        try:
            self.graph = to_nir(program)  # integers are made of the network as NIR holds it
        except UnsupportedError as error:
            raise UnsupportedError(str(error).replace("target nir", "spiking integers", 1)) from error
        self.flat: Flat = flatten(self.graph)
        self.facts = self.graph.metadata
        self.steps, self.dt = int(self.facts["steps"]), step_length(self.graph)
        self.samples = encode(self.graph, [x.numpy() for x in inputs])
        self.root, self.out = nn.Module(), fx.Graph()
        self.signals: dict[str, _Signal] = {}
        self.currents: dict[str, tuple[fx.Node, Tensor]] = {}  # of a layer with weights: int16 node, unit of each channel
        self.branches: dict[
            str, tuple[Any, _Signal, Tensor, Tensor]
        ] = {}  # of a sum: node, input, weight and bias as real numbers
        self.layers: list[IntegerLayer] = []

    def build(self, name: str) -> tuple[FrozenProgram, tuple[IntegerLayer, ...]]:
        if len(self.flat.inputs) != 1 or len(self.flat.outputs) != 1:
            raise ModelError("an integer spiking program has one input and one output")
        for group in self.flat.groups:
            if (found := looped(self.flat, group)) is not None:
                self._recurrent(*found)
                continue
            if self.flat.is_cycle(group):
                raise self._refused(
                    group[0], "it is in a cycle; integer programs have neurons whose spikes come back through one layer"
                )
            self._node(group[0], self.flat.nodes[group[0]])
        module = fx.GraphModule(self.root, self.out)
        sample = torch.zeros(self.program.input_shapes[0])
        made = freeze_module(module, (sample,), name=name, sources=self.program.sources)
        return made, tuple(self.layers)

    def _refused(self, node: str, reason: str) -> ModelError:
        source = self.program.sources.get(node, "")
        return ModelError(f"spiking integers, layer {node}{f' ({source})' if source else ''}: {reason}")

    def _node(self, name: str, node: Any) -> None:
        what = kind(node)
        if what == "Input":
            self._input(name)
            return
        sources = self.flat.sources[name]
        if len(sources) != 1 and what not in (*_NEURONS, "Output"):
            raise self._refused(name, f"it gets the sum of {', '.join(sources)}; integer sums are into neurons or the readout")
        if what == "Output":
            self._output(name, sources)
        elif what in _SYNAPSES:
            self._synapse(name, node, self._signal(name, sources[0]))
        elif what in _NEURONS:
            self._neuron(name, node, sources)
        elif what in ("AvgPool2d", "SumPool2d"):
            self._pool(name, node, self._signal(name, sources[0]))
        elif what == "Flatten":
            self._flatten(name, node, self._signal(name, sources[0]))
        elif what == "Scale":
            self._scale(name, node, self._signal(name, sources[0]))
        elif what == "Delay":
            self._delay(name, node, self._signal(name, sources[0]))
        else:
            raise self._refused(name, f"{what} has no integer form; neurons are LIF and IF, the readout is a sum")

    def _signal(self, name: str, source: str) -> _Signal:
        if source not in self.signals:
            raise self._refused(name, f"it follows {source}, whose current goes to neurons or the readout only")
        if self.signals[source].gains is not None:
            raise self._refused(
                name, f"{source} scales by more than one number; put the scale into the weights of the layer after it"
            )
        return self.signals[source]

    def _add(self, name: str, part: nn.Module, *inputs: fx.Node) -> fx.Node:
        owner = self.root
        *path, leaf = name.split(".")
        for step in path:
            if not hasattr(owner, step):
                owner.add_module(step, nn.Module())
            owner = getattr(owner, step)
        owner.add_module(leaf, part)
        return self.out.create_node("call_module", name, inputs)

    def _input(self, name: str) -> None:
        node = self.out.placeholder(name.replace(".", "_"))
        values = self.samples[name]
        shape = tuple(values.shape[2:])
        sequence = self.facts["encoding"] == "sequence"
        if sequence:
            node = self._add(f"{name}_steps", FrozenOp("fold_steps", 1, {}), node)
        most = float(values.max())
        if sequence and values.min() >= 0 and most <= 63 and not np.any(values % 1):
            bits = max(int(most), 1).bit_length() + 1
            node = self._add(f"{name}_quantize", FrozenOp("quantize", 1, {}, scale=1.0, zero_point=0, bits=bits), node)
            self.signals[name] = _Signal(node, 1.0, shape, 0, *integer_range(bits))
            return
        low, high = min(float(values.min()), 0.0), max(most, 0.0)
        scale = float(np.float32(max(high - low, 1e-6) / 255))
        zero_point = int(np.clip(round(-128 - low / scale), -128, 127))
        node = self._add(f"{name}_quantize", FrozenOp("quantize", 1, {}, scale=scale, zero_point=zero_point, bits=8), node)
        self.signals[name] = _Signal(node, scale, shape, zero_point, 0, None)

    def _flatten(self, name: str, node: Any, x: _Signal) -> None:
        rank = len(x.shape)
        start, end = int(node.start_dim) % rank, int(node.end_dim) % rank
        shape = (*x.shape[:start], int(np.prod(x.shape[start : end + 1])), *x.shape[end + 1 :])
        count = 1 if self._still(x) else self.steps
        op = FrozenOp("qreshape", 1, {}, shape=[count, *shape], scale=x.scale if x.high is None else 1.0, zero_point=x.zero_point)
        self.signals[name] = _Signal(self._add(name, op, x.node), x.scale, shape, x.zero_point, x.low, x.high)

    def _still(self, x: _Signal) -> bool:
        """Whether a value is the same in each step and computed once."""
        return x.high is None and self.facts["encoding"] == "repeat"

    def _scale(self, name: str, node: Any, x: _Signal) -> None:
        factor = np.broadcast_to(np.asarray(node.scale, np.float64), x.shape).reshape(x.shape[0], -1)
        if x.high is None or np.any(factor != factor[:, :1]):
            raise self._refused(name, "it scales real values, or differs within a channel; put the scale into the layer after it")
        if np.all(factor == factor[0, 0]):
            self.signals[name] = replace(x, scale=x.scale * float(factor[0, 0]))
        else:
            self.signals[name] = replace(x, gains=torch.from_numpy(factor[:, 0].copy()))

    def _pool(self, name: str, node: Any, x: _Signal) -> None:
        kernel = pair(node.kernel_size)
        size = kernel[0] * kernel[1]
        if x.high is None or x.high * size > 127 or x.low * size < -128:
            raise self._refused(name, f"its sums of {size} values do not fit int8; pool spikes, in smaller windows")
        geometry = {"kernel": list(kernel), "stride": list(pair(node.stride)), "padding": list(pair(node.padding))}
        made = self._add(name, FrozenOp("spike_sum_pool2d", 1, {}, **geometry), x.node)
        spans = zip(x.shape[1:], kernel, geometry["stride"], geometry["padding"], strict=True)
        shape = (x.shape[0], *((n + 2 * p - k) // s + 1 for n, k, s, p in spans))
        scale = x.scale / size if kind(node) == "AvgPool2d" else x.scale
        self.signals[name] = _Signal(made, scale, shape, 0, x.low * size, x.high * size)

    def _delay(self, name: str, node: Any, x: _Signal) -> None:
        from edgekit.nir.interpreter import whole_steps

        if x.high is None:
            raise self._refused(name, "it delays a value that is no spike")
        delay = torch.from_numpy(whole_steps(name, node, self.dt).astype(np.int32))
        made = self._add(
            name,
            FrozenOp(
                "delay_steps", 1, {"delay": compact(delay)}, lengths=sorted(set(delay.reshape(-1).tolist())), steps=self.steps
            ),
            x.node,
        )
        self.signals[name] = _Signal(made, x.scale, x.shape, 0, x.low, x.high)

    def _synapse(self, name: str, node: Any, x: _Signal) -> None:
        after = [b for b, sources in self.flat.sources.items() if name in sources]
        target = self.flat.nodes[after[0]] if len(after) == 1 else None
        if target is None or kind(target) not in (*_NEURONS, "Output"):
            raise self._refused(
                name, f"its current goes to {', '.join(after)}; it must go to one layer of neurons or the readout"
            )
        weight = torch.from_numpy(np.asarray(node.weight, np.float64)) * x.scale
        bias = torch.from_numpy(np.asarray(getattr(node, "bias", np.zeros(len(weight))), np.float64))
        if weight.dim() == 3:
            raise self._refused(name, "it has a matrix for each row of its input")
        if len(self.flat.sources[after[0]]) > 1:
            self.branches[name] = node, x, weight, bias
            return
        neuron = Cell.of(after[0], target, self.dt, self._refused) if kind(target) in _NEURONS else None
        if neuron is not None:
            gain = neuron.gain.reshape(-1)
            weight = _times(weight, gain)
            bias = bias * gain + neuron.drive.reshape(-1)
        made = self._analogue if x.high is None else self._spiking
        node_, unit, currents = made(name, node, x, weight, bias, neuron)
        self.currents[name] = (node_, unit)
        self.layers.append(self._row(name, after[0], neuron, unit, currents))

    def _spiking(
        self, name: str, node: Any, x: _Signal, weight: Tensor, bias: Tensor, neuron: Cell | None
    ) -> tuple[fx.Node, Tensor, tuple[int, int]]:
        counts, threshold = (x.low, int(x.high or 1)), None if neuron is None else neuron.largest(len(weight))
        unit = fitting_unit(weight, bias, self.bits, counts, threshold, room=1.0 if neuron is None else neuron.room)
        integers, offsets = rounded(weight, bias, unit, self.bits)
        return self._currents(name, node, x, integers, offsets, unit), unit, bounds(integers, offsets, counts)

    def _currents(self, name: str, node: Any, x: _Signal, weight: Tensor, bias: Tensor, unit: Tensor) -> fx.Node:
        buffers = {"weight": weight, "weight_scale": unit.float(), "bias": bias.to(torch.int16)}
        rules: dict[str, Any] = {"spikes_max": int(x.high or 1), "weight_bits": self.bits}
        op = "spiking_linear" if weight.dim() == 2 else "spiking_conv2d"
        geometry = {} if weight.dim() == 2 else self._geometry(name, node)
        return self._add(name, FrozenOp(op, 1, buffers, **geometry, **rules), x.node)

    def _summed(self, name: str, sources: Sequence[str], cell: Cell | None) -> tuple[fx.Node, Tensor]:
        """The int16 sum of several layers' currents and of spikes that skip them, and the unit of each channel."""
        made, layers, skips = self._joined(name, sources, cell)
        return self._total(name, made, layers, skips), made.unit

    def _joined(
        self, name: str, sources: Sequence[str], cell: Cell | None, more: Sequence[Tensor] = ()
    ) -> tuple[Joint, list[str], dict[str, _Signal]]:
        """The integers of a sum, its layers, and the spikes that skip them; ``more``: what else may be added (O,) in reals."""
        layers = [s for s in sources if s in self.branches]
        skips = {s: self.signals[s] for s in sources if s in self.signals}
        inputs = [*(self.branches[s][1] for s in layers), *skips.values()]
        for source, x in zip([*layers, *skips], inputs, strict=True):
            if x.high is None:
                raise self._refused(
                    name, f"it sums the current of {source}, whose input is no spikes; put neurons before the sum"
                )
        if not layers or len(inputs) != len(sources):
            raise self._refused(name, f"it sums {', '.join(sources)}; at least one must be a layer with weights, the rest spikes")
        weights, bias = [self.branches[s][2] for s in layers], torch.stack([self.branches[s][3] for s in layers]).sum(0)
        ones = torch.ones(len(bias), dtype=torch.float64)
        gain = ones if cell is None else cell.gain.reshape(-1)
        if any(x.shape[0] != len(bias) or (cell is not None and x.shape != cell.shape) for x in skips.values()):
            raise self._refused(name, f"it sums {', '.join(sources)}, which differ in shape")
        if cell is not None:
            weights = [_times(w, gain) for w in weights]
            bias = bias * gain + cell.drive.reshape(-1)
        direct = [*(x.scale * (ones if x.gains is None else x.gains) * gain for x in skips.values()), *more]
        counts = min(x.low for x in inputs), max(int(x.high or 1) for x in inputs)
        room, largest = (1.0, None) if cell is None else (cell.room, cell.largest(len(bias)))
        made = joint(weights, bias, direct, self.bits, counts, largest, room)
        self.layers += [self._row(s, name, cell, made.unit, made.bounds) for s in layers]
        return made, layers, skips

    def _total(self, name: str, made: Joint, layers: Sequence[str], skips: Mapping[str, _Signal]) -> fx.Node:
        total: fx.Node | None = None
        for source, weight, offset in zip(layers, made.weights, made.biases, strict=False):
            current = self._currents(source, *self.branches[source][:2], weight, offset, made.unit)
            total = current if total is None else self._add(f"{source}_sum", FrozenOp("add_currents", 2, {}), total, current)
        assert total is not None
        for source, amplitude in zip(skips, made.amplitudes, strict=False):
            part = FrozenOp("add_spikes", 2, {"amplitude": amplitude.to(torch.int16)})
            total = self._add(f"{name}_from_{source}".replace(".", "_"), part, total, skips[source].node)
        return total

    def _recurrent(self, name: str, back: str) -> None:
        """Neurons and the layer from their spikes back to themselves, which has the unit of the currents that come in."""
        cell = Cell.of(name, self.flat.nodes[name], self.dt, self._refused)
        node, gain = self.flat.nodes[back], cell.gain.reshape(-1)
        weight = torch.from_numpy(np.asarray(node.weight, np.float64))
        bias = gain * torch.from_numpy(np.asarray(getattr(node, "bias", np.zeros(len(weight))), np.float64))
        sources = [s for s in self.flat.sources[name] if s != back]
        first = self.branches.get(sources[0])
        if len(sources) == 1 and first is not None and first[1].high is None:
            layer, x, w, b = first
            most = _times(weight, gain).flatten(1).abs()
            back_most = float((most.sum(1) * cell.max_spikes + bias.abs()).max())
            least = float(most.max()) / integer_range(self.bits)[1]
            drive = b * gain + cell.drive.reshape(-1)
            current, unit, span = self._analogue(sources[0], layer, x, _times(w, gain), drive, cell, back_most, least)
            integers, offsets = rounded(_times(weight, gain), bias, unit, self.bits)
            self.layers += [self._row(s, name, cell, unit, span) for s in (sources[0], back)]
        else:
            own = _Signal(self.out.find_nodes(op="placeholder")[0], 1.0, cell.shape, 0, 0, cell.max_spikes)
            self.branches[back] = node, own, weight, 0 * bias
            made, layers, skips = self._joined(name, [*sources, back], cell, [bias])
            if len(layers) < 2:
                raise self._refused(name, f"it gets {', '.join(sources)}; at least one must be a layer with weights")
            current, unit = self._total(name, made, layers[:-1], skips), made.unit
            integers, offsets = made.weights[-1], made.amplitudes[-1]
        buffers = {key: compact(value).to(torch.int16) for key, value in cell.integers(unit).items()}
        buffers |= {"weight": integers, "weight_scale": unit.float(), "bias": offsets.to(torch.int16)}
        rules: dict[str, Any] = {"steps": self.steps, "reset": cell.reset, "max_spikes": cell.max_spikes}
        made_ = self._add(name, FrozenOp("qlif_recurrent", 1, buffers, **rules, weight_bits=self.bits), current)
        self.signals[name] = _Signal(made_, 1.0, cell.shape, 0, 0, cell.max_spikes)

    def _row(self, layer: str, to: str, cell: Cell | None, unit: Tensor, currents: tuple[int, int]) -> IntegerLayer:
        thresholds = None if cell is None else cell.integers(unit)["threshold"]
        span = None if thresholds is None else (int(thresholds.min()), int(thresholds.max()))
        units = float(unit.min()), float(unit.max())
        return IntegerLayer(layer, "" if cell is None else to, self.bits, units, span, currents)

    def _analogue(
        self, name: str, node: Any, x: _Signal, weight: Tensor, bias: Tensor, neuron: Cell | None,
        back: float = 0.0, least: float = 1e-9,
    ) -> tuple[fx.Node, Tensor, tuple[int, int]]:  # fmt: skip
        """An ordinary integer layer with 16-bit outputs; with constant input once for all steps.

        Args:
            back: the most that recurrent spikes add to it.
            least: smallest unit of current.
        """
        seen = interpret(self.graph, {n: v[:1] if self._still(x) else v for n, v in self.samples.items()}, record=[name])
        current = torch.from_numpy(seen.values[name]).flatten(0, 1)
        if neuron is not None:
            channels = (-1, *[1] * (current.dim() - 2))
            current = current * neuron.gain.reshape(channels) + neuron.drive.reshape(channels)
        unit = max((float(current.abs().max()) * _MARGIN + back) * (1.0 if neuron is None else neuron.room) / 32767, least)
        if neuron is not None:
            unit = max(unit, float(neuron.largest(len(weight)).max()) / THRESHOLD_MAX)
        unit = float(np.float32(unit))
        flat = weight / x.scale
        scale = (flat.flatten(1).abs().amax(1) / integer_range(self.bits)[1]).clamp(min=1e-12).float()
        integers = torch.round(flat / scale.double().reshape(-1, *[1] * (flat.dim() - 1))).to(torch.int8)
        buffers = {"weight": integers, "weight_scale": scale, "bias": bias_integers(bias, x.scale, scale, name)}
        rules: dict[str, Any] = {
            "in_scale": x.scale, "in_zp": x.zero_point, "out_scale": unit, "out_zp": 0, "activation": "none",
            "weight_bits": self.bits, "out_bits": 16,
        }  # fmt: skip
        op, geometry = ("qlinear", {}) if weight.dim() == 2 else ("qconv2d", self._geometry(name, node))
        made = self._add(name, FrozenOp(op, 1, buffers, **rules, **geometry), x.node)
        if self._still(x):
            made = self._add(f"{name}_steps", FrozenOp("repeat_steps", 1, {}, steps=self.steps), made)
        return made, torch.full((len(weight),), unit, dtype=torch.float64), (-32768, 32767)

    def _geometry(self, name: str, node: Any) -> dict[str, Any]:
        dilation = pair(node.dilation)
        pads = paddings(node.padding, np.shape(node.weight)[2:], dilation)
        if any(before != after for before, after in pads):
            raise self._refused(name, f"its padding is {pads}; make it even")
        padding, groups = [p for p, _ in pads], int(node.groups)
        return {"stride": list(pair(node.stride)), "padding": padding, "dilation": list(dilation), "groups": groups}

    def _neuron(self, name: str, node: Any, sources: Sequence[str]) -> None:
        cell = Cell.of(name, node, self.dt, self._refused)
        if len(sources) == 1 and sources[0] not in self.currents:
            raise self._refused(
                name, f"it gets its current from {sources[0]}, which has no weights; integer neurons follow a layer"
            )
        current, unit = self.currents[sources[0]] if len(sources) == 1 else self._summed(name, sources, cell)
        buffers = {key: compact(value).to(torch.int16) for key, value in cell.integers(unit).items()}
        fade = buffers.pop("decay_syn")
        if cell.fade is not None:
            current = self._add(f"{name}_current", FrozenOp("qsynapse_sequence", 1, {"decay": fade}, steps=self.steps), current)
        rules: dict[str, Any] = {"steps": self.steps, "reset": cell.reset, "max_spikes": cell.max_spikes}
        made = self._add(name, FrozenOp("qlif_sequence", 1, buffers, **rules), current)
        self.signals[name] = _Signal(made, 1.0, cell.shape, 0, 0, cell.max_spikes)

    def _output(self, name: str, sources: Sequence[str]) -> None:
        source = sources[0]
        if len(sources) > 1 or source in self.currents:
            node, unit = self.currents[source] if len(sources) == 1 else self._summed(name, sources, None)
            scale = float(unit[0])
        elif self.signals[source].high is not None:
            node, scale = self.signals[source].node, self.signals[source].scale
        else:
            raise self._refused(source, "the readout gets no current and no spikes")
        if self.facts["readout"] == "accumulate":
            node = self._add("readout", FrozenOp("qaccumulate", 1, {}, steps=self.steps), node)
            scale *= float(self.facts.get("gain", 1.0))
        else:
            node = self._add("readout", FrozenOp("unfold_steps", 1, {}, steps=self.steps), node)
        self.out.output(self._add("readout_dequantize", FrozenOp("dequantize", 1, {}, scale=scale, zero_point=0), node))


def _times(weight: Tensor, gain: Tensor) -> Tensor:
    """Weights (O, ...) times a factor of each output."""
    return weight * gain.reshape(-1, *[1] * (weight.dim() - 1))
