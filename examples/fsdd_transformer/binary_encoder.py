"""The spoken digits by a binary encoder after BiPFT: a float BERT-style encoder and its 1-bit student, trained when first used.

Weights, the inputs of linear layers and both products of attention are 1-bit; normalization, softmax and the estimators' thin
products stay in float. Both trainings keep checkpoints in edgekit's cache folder: killed, they go on.
``python binary_encoder.py`` prints the losses and both accuracies.
"""

import hashlib
import sys
from pathlib import Path

import spoken_digits
import torch
from spoken_digits import FEATURES, TOKENS, spoken
from torch import Tensor, nn

from edgekit import cache
from edgekit.compress.binary.baked import baked
from edgekit.compress.binary.bipft import BinaryEncoder
from edgekit.compress.binary.encoder import Encoder, EncoderConfig
from edgekit.compress.binary.encoder_training import EncoderTraining, train_encoder

SIZES = EncoderConfig(
    layers=2, width=64, heads=2, hidden=128, positions=TOKENS, features=FEATURES, classes=10, pool="mean"
)  # a BERT of words: EncoderConfig(vocabulary=...), or from_hugging_face(config, weights)
load = spoken_digits.load


def encoders(said: bool = False) -> tuple[Encoder, BinaryEncoder]:
    """The float encoder and its student, trained with one thread, so that the same seed gives the same weights."""
    text = Path(__file__).read_bytes() + torch.__version__.encode()
    folder = cache.folder() / "examples" / f"binary-encoder-{hashlib.sha256(text).hexdigest()[:12]}"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y, _, _ = spoken()
    real = Encoder(SIZES)
    losses = train_encoder(real, (x, y), EncoderTraining(epochs=12, learning_rate=1e-3), folder=folder / "float")
    student = BinaryEncoder(real, rank=1)
    told = train_encoder(student, (x, y), EncoderTraining(epochs=20, learning_rate=1e-3), real, _progress, folder / "binary")
    torch.set_num_threads(threads)
    if said:
        print(f"loss: float {losses[0]:.3f} to {losses[-1]:.3f}, binary {told[0]:.3f} to {told[-1]:.3f}")
    return real.eval(), student


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty() and (done % 85 == 0 or done == total):
        print(f"\rbinary encoder: step {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def build() -> nn.Module:
    """What the recipe's ``model:`` names: the trained student in plain operators, which ``ptq`` makes 1-bit ones of."""
    return baked(encoders()[1])


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Accuracy in percent."""
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    teacher, made = encoders(said=True)
    _, _, images, labels = spoken()
    print(f"float accuracy {right(teacher, images, labels):.2f} %, binary {right(made, images, labels):.2f} %")
