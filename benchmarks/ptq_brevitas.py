"""Brevitas on the networks of the benchmarks, as its own documentation and examples use it: fake quantization, no file.

The first and last layer have 8-bit weights; the model's input, inputs of residual additions and the last layer's input have
8-bit activations; all else has the bits asked for, as edgekit's rows have. Scales of weights and of what ReLUs make minimize the
squared error, its best choice at 4 bits; 8-bit activations have its default, percentiles (its squared-error search goes wrong for
affine ones: 24 % on ResNet-8 at W8A8). Biases are corrected, and stay float.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from subjects import Subject
from torch import Tensor, nn
from torch.nn import functional as F

ROUND_STEPS = 500
"""Of learned rounding for each layer, as many as ours (its own default: 1000 with one sample each)."""


class _PickAndPad(nn.Module):
    """Option-A shortcut: every second pixel as a pooling and zeros for new channels, since Brevitas cannot slice its tensors."""

    def __init__(self, stride: int, new: int) -> None:
        super().__init__()
        self.pool, self.new = nn.MaxPool2d(1, stride), new

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.pool(x), (0, 0, 0, 0, self.new, self.new))


class _Block(nn.Module):
    """A ResNet-20 block that can be traced."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        self.skip = _PickAndPad(block.stride, block.new)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def traceable(net: Subject) -> nn.Module:
    """The network with paddings that do not depend on shapes and no slices; computes the same."""
    model = copy.deepcopy(net.model)
    shapes: dict[nn.Module, list[torch.Size]] = {}
    padded = [m for m in model.modules() if hasattr(m, "conv") and hasattr(m, "bn")]

    def see(module: nn.Module) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, args: shapes.setdefault(module, []).append(args[0].shape)

    hooks = [part.register_forward_pre_hook(see(m)) for m in padded for part in (m, m.get_submodule("conv"))]
    with torch.no_grad():
        wanted = model(net.sample[0])
    for hook in hooks:
        hook.remove()
    for name, module in list(model.named_modules()):
        made: nn.Module | None = None
        if module in shapes:
            conv: Any = module.get_submodule("conv")
            (h, w), (high, wide) = (s[2:] for s in shapes[module])
            more = ((wide - w) // 2, wide - w - (wide - w) // 2, (high - h) // 2, high - h - (high - h) // 2)
            if more[0] == more[1] and more[2] == more[3]:
                conv.padding = (more[2], more[0])
            pad = [] if more[0] == more[1] and more[2] == more[3] else [nn.ZeroPad2d(more)]
            made = nn.Sequential(*pad, conv, module.get_submodule("bn"))
        elif getattr(module, "new", 0) and not isinstance(module, _PickAndPad):
            made = _Block(module)
        if made is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, made)
    with torch.no_grad():
        assert torch.allclose(model(net.sample[0]), wanted, atol=1e-4)
    return model.eval()


def quantized(net: Subject, weight_bits: int, activation_bits: int) -> nn.Module:
    """The network with Brevitas's layers, not calibrated."""
    import brevitas.nn as qnn
    from brevitas.graph.quantize import preprocess_for_quantize, quantize
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE, Uint8ActPerTensorFloatMSE
    from brevitas.quant.shifted_scaled_int import ShiftedUint8ActPerTensorFloat

    model = preprocess_for_quantize(traceable(net), relu6_to_relu=False, equalize_iters=0, equalize_merge_bias=False)
    weight = Int8WeightPerChannelFloatMSE.let(bit_width=weight_bits, narrow_range=True)
    signed = ShiftedUint8ActPerTensorFloat.let(bit_width=8)
    unsigned = Uint8ActPerTensorFloatMSE.let(bit_width=activation_bits)
    layer = {"weight_quant": weight, "bias_quant": None, "return_quant_tensor": False}
    model = quantize(
        model,
        quant_identity_map={
            "signed": (qnn.QuantIdentity, {"act_quant": signed, "return_quant_tensor": False}),
            "unsigned": (qnn.QuantIdentity, {"act_quant": unsigned, "return_quant_tensor": False}),
        },
        compute_layer_map={nn.Conv2d: (qnn.QuantConv2d, layer), nn.Linear: (qnn.QuantLinear, layer)},
        quant_act_map={nn.ReLU: (qnn.QuantReLU, {"act_quant": unsigned, "return_quant_tensor": False})},
    )
    layers = [m for m in model.modules() if isinstance(m, (qnn.QuantConv2d, qnn.QuantLinear))]
    relus = [m for m in model.modules() if isinstance(m, qnn.QuantReLU)]
    for proxy in (layers[0].weight_quant, layers[-1].weight_quant, relus[-1].act_quant):
        proxy.quant_injector = proxy.quant_injector.let(bit_width=8)
        proxy.init_tensor_quant()
    for node in model.graph.nodes:  # a second quantization of what was only padded
        source = node.args[0] if node.args else None
        padded = isinstance(source, torch.fx.Node) and isinstance(_called(model, source), nn.ZeroPad2d)
        if padded and isinstance(_called(model, node), qnn.QuantIdentity):
            setattr(model, str(node.target), nn.Identity())
    return model  # type: ignore[no-any-return]


def _called(model: nn.Module, node: torch.fx.Node) -> nn.Module | None:
    """The module that a node calls."""
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def batches(net: Subject, size: int = 64) -> Iterator[Tensor]:
    """Calibration samples."""
    yield from net.calibration.split(size)


def compressed(net: Subject, weight_bits: int, activation_bits: int, method: str) -> nn.Module:
    """Calibrated, rounded by "nearest", "gptq", "gpfq" or "learned round", biases corrected."""
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode

    model = quantized(net, weight_bits, activation_bits).eval()
    _passes(model, net, calibration_mode(model))
    with torch.no_grad():
        model(net.calibration[:8])  # weight quantizers are initialized by a pass outside calibration only
    if method in ("gptq", "gpfq"):
        _error_compensation(model, net, method)
    elif method == "learned round":
        _learned_round(model, net)
    _passes(model, net, bias_correction_mode(model))
    return model


def _passes(model: nn.Module, net: Subject, mode: AbstractContextManager[Any]) -> None:
    with torch.no_grad(), mode:
        for batch in batches(net):
            model(batch)


def _error_compensation(model: nn.Module, net: Subject, method: str) -> None:
    from brevitas.graph.gpfq import gpfq_mode
    from brevitas.graph.gptq import gptq_mode

    mode = gptq_mode(model, act_order=True, use_quant_activations=True) if method == "gptq" else gpfq_mode(model, act_order=True)
    with torch.no_grad(), mode as run:
        for _ in range(run.num_layers):
            for batch in batches(net):
                run.model(batch)
            run.update()


def _learned_round(model: nn.Module, net: Subject) -> None:
    """AdaRound of Brevitas's image classification example, layer by layer."""
    import functools

    from brevitas_examples.common.learned_round import learned_round_args as args
    from brevitas_examples.common.learned_round.learned_round_method import LearnedRoundArgs
    from brevitas_examples.common.learned_round.learned_round_trainer import LearnedRoundTrainer, get_blocks
    from brevitas_examples.imagenet_classification.ptq import learned_round_utils as vision
    from torch.utils.data import DataLoader, TensorDataset

    training = args.TrainingArgs(
        optimizers_args=[args.OptimizerArgs(target_params="learned_round", optimizer_cls="Adam", lr=1e-2)],
        batch_size=32, iters=ROUND_STEPS, use_amp=False, use_best_model=False,
        losses_args=[args.LossArgs(cls="round_reg"), args.LossArgs(cls="mse", kwargs={"reduction": "none", "dim": 1})],
    )  # fmt: skip
    handler = args.HandlerSpec(name="learned_round", config=LearnedRoundArgs(learned_round_param="hard_sigmoid"))
    config = args.TrainerConfig(training_args=training, training_handlers=[handler])
    LearnedRoundTrainer(config=config).train(
        model=model,
        model_forward=vision.vision_forward,
        block_forward=vision.vision_block_forward,
        data_loader=DataLoader(TensorDataset(net.calibration, torch.zeros(len(net.calibration))), batch_size=64),
        cache=vision.CacheVision(),
        get_blocks_fn=functools.partial(get_blocks, block_check_fn=vision.is_layer),
        keep_gpu=True,
    )
