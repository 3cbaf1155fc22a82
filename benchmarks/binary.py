"""Whole networks with 1-bit layers beside int8: accuracy, bytes and, on an emulated Cortex-M4, instructions.

    python benchmarks/binary.py                                  # everything below, about 12 minutes of one core
    python benchmarks/binary.py --models mnist --seeds 0         # a part; other rows of the results stay

Each network is trained in float first (ResNet-20: the checkpoint of the examples), then: ``int8``, after training; ``ste``,
``reste``, ``biper``: ``binary`` with that estimator, learning from the float network and from labels; ``int8, as many bytes`` and
``int8, as many instructions``: the same network made so narrow that its frozen program has no more bytes (firmware no more
instructions) than the binary one, trained with the same images, epochs and teacher, then quantized. Budgets are short, and in
every row: ``images`` times ``epochs``. They say what a user gets in minutes on one core, not what an estimator can reach.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from subjects import ROOT, arguments, log, one_line, write
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit import Data
from edgekit.compress.binary import Binary, Distill
from edgekit.compress.ptq.settings import PTQ
from edgekit.compress.steps import apply
from edgekit.errors import EdgekitError
from edgekit.firmware_sim.count import count
from edgekit.frozen import FrozenProgram
from edgekit.recipe import Block
from edgekit.targets import cortex_m, get
from edgekit.targets.cortex_m import host
from edgekit.targets.cortex_m.preparation import to_stored

sys.path.insert(0, str(ROOT / "examples" / "cifar_resnet20"))
import resnet20

ESTIMATORS = ("ste", "reste", "biper")
NARROW = ("int8, as many bytes", "int8, as many instructions")
KEY = ("model", "variant", "seed")


@dataclass(frozen=True)
class Net:
    """A network that can be made narrower, its data and its budget.

    Attributes:
        make: width (1.0: as it is) to a network.
        train: x, y that everything is trained on; ``test``: that all is judged on.
        epochs: of binary and of narrow networks; ``float_epochs``: of the float network, 0 where it comes trained.
    """

    make: Callable[[float], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: int
    float_epochs: int
    rate: float
    trained: Callable[[], nn.Module] | None = None

    @property
    def data(self) -> Data:
        return Data(calibration=self.train[0][:512], evaluation=self.test, training=self.train)


class Digits(nn.Module):
    """(N, 1, 28, 28) to (N, 10): four convolutions, two of them with stride."""

    def __init__(self, width: float) -> None:
        super().__init__()
        a, b = max(2, round(32 * width)), max(2, round(64 * width))
        shapes = [(1, a, 2), (a, a, 1), (a, b, 2), (b, b, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, s, 1, bias=False) for i, o, s in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in shapes)
        self.head = nn.Linear(b, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Images(resnet20.ResNet20):
    """ResNet-20 with fewer channels."""

    def __init__(self, width: float) -> None:
        super().__init__()
        a = 2 * max(1, round(8 * width))  # the padded shortcut needs an even number
        blocks = resnet20.Block
        self.conv1, self.bn1 = nn.Conv2d(3, a, 3, 1, 1, bias=False), nn.BatchNorm2d(a)
        self.layer1 = nn.Sequential(blocks(a, a), blocks(a, a), blocks(a, a))
        self.layer2 = nn.Sequential(blocks(a, 2 * a), blocks(2 * a, 2 * a), blocks(2 * a, 2 * a))
        self.layer3 = nn.Sequential(blocks(2 * a, 4 * a), blocks(4 * a, 4 * a), blocks(4 * a, 4 * a))
        self.linear = nn.Linear(4 * a, 10)


def folder() -> Path:
    return Path(os.environ.get("EDGEKIT_DATA") or ROOT.parent / "shared" / "data") / "datasets"


def mnist(images: int, epochs: int) -> Net:
    with np.load(folder() / "mnist.npz") as file:
        x = {k: torch.from_numpy(file[f"x_{k}"]).float().view(-1, 1, 28, 28) / 255 for k in ("train", "test")}
        y = {k: torch.from_numpy(file[f"y_{k}"]).long() for k in ("train", "test")}
    train = x["train"][:images], y["train"][:images]
    return Net(Digits, train, (x["test"][:2000], y["test"][:2000]), epochs, 3, 2e-3)


def cifar(images: int, epochs: int) -> Net:
    """The JPEG copy of CIFAR-10, decoded: train and test both lossy."""
    from PIL import Image

    z = np.load(folder() / "cifar10_jpeg_60k.npz")
    head, body, start, label, test = z["header"].tobytes(), z["body"].tobytes(), z["offsets"], z["label"], z["is_test"]
    draw = np.random.default_rng(0)

    def part(wanted: bool, each: int) -> tuple[Tensor, Tensor]:
        chosen = np.concatenate([np.flatnonzero((label == c) & (test == wanted))[:each] for c in range(10)])
        chosen = draw.permutation(chosen)
        decoded = [np.asarray(Image.open(io.BytesIO(head + body[start[i] : start[i + 1]]))) for i in chosen]
        return resnet20.normalized(np.stack(decoded)), torch.from_numpy(label[chosen]).long()

    return Net(Images, part(False, images // 10), part(True, 200), epochs, 0, 2e-3, resnet20.build)


NETS: dict[str, tuple[Callable[[int, int], Net], int, int]] = {"mnist": (mnist, 6000, 3), "resnet20": (cifar, 4000, 2)}
"""How a network is loaded, and its budget: images and epochs."""


@lru_cache
def loaded(name: str, images: int, epochs: int) -> tuple[Net, nn.Module]:
    make, usual_images, usual_epochs = NETS[name]
    net = make(images or usual_images, epochs or usual_epochs)
    return net, net.trained() if net.trained else trained(net, net.make(1.0), net.float_epochs, 0, None)


def trained(net: Net, model: nn.Module, epochs: int, seed: int, teacher: nn.Module | None) -> nn.Module:
    """Adam, cosine decay, batches of 32; with a teacher the same loss as :class:`Distill`'s default."""
    optimizer = torch.optim.Adam(model.parameters(), net.rate)
    x, y = net.train
    steps = epochs * (len(x) // 32)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for part in torch.split(torch.randperm(len(x), generator=order), 32)[: len(x) // 32]:
            found = model(x[part])
            loss = F.cross_entropy(found, y[part])
            if teacher is not None:
                with torch.no_grad():
                    wanted = F.log_softmax(teacher(x[part]) / 2, 1)
                loss = loss + 4 * F.kl_div(F.log_softmax(found / 2, 1), wanted, reduction="batchmean", log_target=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def program_of(net: Net, model: nn.Module, seed: int, *blocks: Block) -> FrozenProgram:
    with torch.enable_grad():
        return apply(model, [*blocks, Block("ptq", PTQ(seed=seed))], net.data).program


def binary(net: Net, model: nn.Module, estimator: str, seed: int) -> FrozenProgram:
    settings = Binary(
        estimator=estimator, epochs=net.epochs, learning_rate=1e-2, train_batch_size=32, distill=Distill(), seed=seed
    )  # type: ignore[arg-type]
    return program_of(net, model, seed, Block("binary", settings))


def narrow_width(net: Net, name: str, variant: str) -> float | None:
    """The widest network of this kind that costs no more than the binary one; None where instructions cannot be counted."""
    cost_of = size if variant == NARROW[0] else instructions
    budget = cost_of(untrained_binary(name))
    if budget is None:
        return None
    step, low = (1 / 16), 2 / 16
    best = None
    width = low
    while width <= 1:
        torch.manual_seed(0)
        cost = cost_of(program_of(net, net.make(width).eval(), 0))
        if cost is None or cost > budget:
            break
        best, width = width, width + step
    return best


@lru_cache
def untrained_binary(name: str) -> FrozenProgram:
    """The binary network with nothing learned: its bytes and instructions are those of a trained one, or nearly."""
    net, model = loaded(name, _IMAGES, _EPOCHS)
    small = Net(net.make, (net.train[0][:64], net.train[1][:64]), net.test, 1, 0, net.rate)
    return binary(small, model, "ste", 0)


def size(program: FrozenProgram) -> int:
    return program.weight_bytes


def instructions(program: FrozenProgram) -> int | None:
    """Instructions of one inference on a Cortex-M4 under emulation; None (said in the log) where the target refuses."""
    try:
        with tempfile.TemporaryDirectory() as place:
            get("cortex-m4").lower(program, Path(place) / "model.c", cortex_m.Options(board="mps2-an386"))
            facts, built = host.built(Path(place))
            x = np.zeros(program.input_shapes[0], np.float32)  # the kernels' work does not depend on values
            data = b"".join(v.tobytes() for v in to_stored(facts.inputs, [x]))
            return sum(count(built, data, [step[0] for step in facts.steps]).marks.values())
    except EdgekitError as error:
        log(f"no instructions: {one_line(error)}")
        return None


def row(net: Net, name: str, variant: str, seed: int, program: FrozenProgram, width: float, epochs: int) -> dict[str, Any]:
    x, y = net.test
    (outputs,) = program.run(x)
    correct = 100 * float((outputs.argmax(1) == y).float().mean())
    bits = sum(layer.macs for layer in program.layers if layer.weight_bits == 1)
    return {
        "model": name, "variant": variant, "seed": seed, "accuracy": correct, "bytes": program.weight_bytes, "width": width,
        "macs": program.macs, "binary_macs": bits, "instructions": instructions(program), "images": len(net.train[0]),
        "epochs": epochs, "evaluated": len(x),
    }  # fmt: skip


def measured(name: str, variant: str, seed: int) -> dict[str, Any] | None:
    net, model = loaded(name, _IMAGES, _EPOCHS)
    if variant == "float":
        with torch.no_grad():
            found = torch.cat([model(part) for part in net.test[0].split(250)]).argmax(1)
        size = sum(p.numel() * 4 for p in model.parameters())
        return {
            "model": name, "variant": variant, "seed": seed, "bytes": size, "evaluated": len(found), "epochs": net.float_epochs,
            "accuracy": 100 * float((found == net.test[1]).float().mean()), "images": len(net.train[0]), "width": 1.0,
        }  # fmt: skip
    if variant == "int8":
        return row(net, name, variant, seed, program_of(net, model, seed), 1.0, net.float_epochs)
    if variant in ESTIMATORS:
        return row(net, name, variant, seed, binary(net, model, variant, seed), 1.0, net.epochs)
    width = narrow_width(net, name, variant)
    if width is None:
        return None
    torch.manual_seed(seed)
    small = trained(net, net.make(width), net.epochs, seed, model)
    return row(net, name, variant, seed, program_of(net, small, seed), width, net.epochs)


_IMAGES = _EPOCHS = 0
VARIANTS = ("float", "int8", *ESTIMATORS, *NARROW)


def main() -> None:
    global _IMAGES, _EPOCHS
    options = arguments("binary networks beside int8", tuple(NETS), variants=list(VARIANTS), seeds=[0, 1, 2], images=0, epochs=0)
    _IMAGES, _EPOCHS = options.images, options.epochs
    for name in options.models:
        for variant in options.variants:
            for seed in options.seeds:
                if variant in ("float", "int8") and seed:
                    continue  # nothing is random in them
                found = measured(name, variant, seed)
                if found is None:
                    continue
                log(f"{name} {variant} {seed}: {found['accuracy']:.1f} %, {found['bytes']:,} bytes, {found.get('instructions')}")
                write("binary", [found], _NOTES, keep=True, key=KEY, whole="python benchmarks/binary.py")


_NOTES = (
    "Budgets are short: images times epochs stand in each row.",
    "Seeds differ in the order of samples and, for narrow networks, in their start.",
)


if __name__ == "__main__":
    main()
