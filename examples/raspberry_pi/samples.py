"""What the networks of the demos learn from, and recorded input for the demos: python examples/raspberry_pi/samples.py FOLDER

Real data is read from $EDGEKIT_DATA, or from ../shared/data beside the repository (MNIST, spoken digits, wrist motions); where it
is not there, something that every machine has takes its place: scikit-learn's digits, vowels from a formant synthesizer,
synthetic motions. ``source()`` says which it was. The machine of the anomaly demo is always synthetic. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import csv
import os
import wave
from functools import lru_cache
from pathlib import Path

import features
import numpy as np
from features import Array
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Four = tuple[Array, Labels, Array, Labels]
"""x_train, y_train, x_test, y_test."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = {"spoken digits": DIGITS, "synthetic vowels": ("a", "i", "u", "ai", "ia", "ua", "au", "iu")}
MOTIONS = ("badminton", "running", "standing", "walking")
FILES = {"digits": "mnist.npz", "words": "fsdd_logmel.npz", "motions": "uea_basicmotions.npz"}


def path(kind: str) -> Path | None:
    """The file of a data set, None where it is not there."""
    folder = Path(os.environ.get("EDGEKIT_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    found = folder / "datasets" / FILES[kind]
    return found if found.is_file() else None


def source(kind: str) -> str:
    """What the samples of a kind are."""
    real = {"digits": "MNIST", "words": "spoken digits", "motions": "wrist motions"}
    other = {"digits": "scikit-learn's digits", "words": "synthetic vowels", "motions": "synthetic motions"}
    return real[kind] if path(kind) else other[kind]


def words() -> tuple[str, ...]:
    """Labels of the keyword network; the last is everything else."""
    return (*WORDS[source("words")], "(nothing)")


def stored(kind: str) -> Four:
    with np.load(str(path(kind)), allow_pickle=False) as file:
        a, b, c, d = (file[k] for k in ("x_train", "y_train", "x_test", "y_test"))
    return a, b.astype(np.int64), c, d.astype(np.int64)


@lru_cache
def digit_images() -> Four:
    """Images (N, 1, 28, 28), light on black, from 0 to 1: 8000 + 1000 of MNIST, else 1197 + 600 of scikit-learn."""
    if path("digits"):
        x, y, x_test, y_test = stored("digits")
        x, y, x_test, y_test = x[:8000], y[:8000], x_test[:1000], y_test[:1000]
        fit = [np.stack([features.digit(i.astype(np.float32) / 255, False) for i in part]) for part in (x, x_test)]
        return fit[0], y, fit[1], y_test
    from sklearn.datasets import load_digits

    found = load_digits()
    large = [features.digit(features.resize(i.astype(np.float32) / 16, 28, 28), False) for i in found.images]
    order = np.random.default_rng(0).permutation(len(large))
    x, y = np.stack(large)[order], found.target[order].astype(np.int64)
    return x[:1197], y[:1197], x[1197:], y[1197:]


@lru_cache
def word_waves() -> Four:
    """Waves (N, 8000) at 8 kHz. The set of spoken digits holds log-mel spectra; they are turned back into sound (Griffin and Lim
    1984)."""
    rng = np.random.default_rng(0)
    if path("words"):
        x, y, x_test, y_test = stored("words")
        with np.load(str(path("words"))) as file:
            low, high = float(file["lo"]), float(file["hi"])
        chosen = rng.permutation(len(x))[:1600]
        both = (np.concatenate([x[chosen], x_test]) / 255 * (high - low) + low).astype(np.float32)
        waves, labels = griffin_lim(both), np.concatenate([y[chosen], y_test])
        cut = len(chosen)
    else:
        labels = rng.integers(0, len(WORDS["synthetic vowels"]), 900)
        waves, cut = np.stack([vowels(WORDS["synthetic vowels"][i], rng) for i in labels]), 700
    noise = np.stack([background(rng) for _ in range(len(waves) // 8)])
    nothing = np.full(len(noise), len(words()) - 1)
    part = len(noise) * 3 // 4
    return (
        np.concatenate([waves[:cut], noise[:part]]), np.concatenate([labels[:cut], nothing[:part]]),
        np.concatenate([waves[cut:], noise[part:]]), np.concatenate([labels[cut:], nothing[part:]]),
    )  # fmt: skip


def griffin_lim(spectra: Array, rounds: int = 16) -> Array:
    """Waves (N, 8000) whose log-mel spectra are near ``spectra`` (N, 61, 40): 256 samples a frame, 128 apart, at 8 kHz."""
    filters = features.mel_filters(40, 256, features.SPEECH_RATE)
    size = np.sqrt(np.exp(spectra) @ (filters / (filters.sum(0) + 1e-6)))
    window = np.hanning(256).astype(np.float32)
    phase = np.exp(2j * np.pi * np.random.default_rng(0).random(size.shape)).astype(np.complex64)
    for _ in range(rounds):
        frames = np.fft.irfft(size * phase, axis=-1).astype(np.float32) * window
        waves, weight = np.zeros((len(frames), 8000), np.float32), np.full(8000, 1e-3, np.float32)
        for i in range(frames.shape[1]):
            waves[:, 128 * i : 128 * i + 256] += frames[:, i]
            weight[128 * i : 128 * i + 256] += window**2
        waves /= weight
        again = np.lib.stride_tricks.sliding_window_view(waves, 256, axis=1)[:, ::128]
        found = np.fft.rfft(again * window)
        phase = (found / (np.abs(found) + 1e-9)).astype(np.complex64)
    loud: Array = waves / (np.abs(waves).max(1, keepdims=True) + 1e-6) * np.float32(0.7)
    return loud


def vowels(word: str, rng: np.random.Generator) -> Array:
    """A word of one or two vowels: pulses through resonances at the formants of Peterson and Barney (1952), gliding."""
    formants = {"a": (730, 1090, 2440), "i": (270, 2290, 3010), "u": (300, 870, 2240)}
    length, rate = int(rng.uniform(2400, 5200)), features.SPEECH_RATE
    glide = np.clip((np.linspace(0, 1, length) - 0.3) / 0.4, 0, 1)[:, None]
    track = (1 - glide) * np.array(formants[word[0]]) + glide * np.array(formants[word[-1]])
    track = track * rng.uniform(0.9, 1.15)
    phase = np.cumsum(np.linspace(rng.uniform(90, 220), rng.uniform(80, 200), length) / rate)
    sound = np.zeros(length)
    for n in range(1, 40):  # one harmonic after the other, each as loud as the resonances make it
        frequency = n * np.gradient(phase) * rate
        gain = sum(1 / (1 + ((frequency[:, None] - track) / 70) ** 2)[:, k] / (k + 1) for k in range(3))
        sound += np.where(frequency < rate / 2, gain / n**0.5 * np.sin(2 * np.pi * n * phase), 0)
    sound = sound / np.abs(sound).max() * np.minimum(1, np.minimum(np.arange(length), np.arange(length)[::-1]) / 300)
    found = rng.normal(0, 0.003, 8000)
    start = rng.integers(0, 8000 - length)
    found[start : start + length] += 0.7 * sound
    return found.astype(np.float32)


def background(rng: np.random.Generator) -> Array:
    """A second of noise, white to brown, sometimes with a hum."""
    spectrum = np.fft.rfft(rng.normal(0, 1, 8000)) / np.maximum(1, np.arange(4001)) ** rng.uniform(0, 1)
    found = np.fft.irfft(spectrum) + rng.choice([0, 0.02]) * np.sin(2 * np.pi * rng.uniform(50, 400) * np.arange(8000) / 8000)
    return np.asarray(found / np.abs(found).max() * rng.uniform(0.01, 0.5), np.float32)


@lru_cache
def motion_readings() -> Four:
    """Readings (N, 100, 6) at 10 Hz: accelerometer in m/s², gyroscope in rad/s."""
    if path("motions"):
        x, y, x_test, y_test = stored("motions")
        return x.transpose(0, 2, 1), y, x_test.transpose(0, 2, 1), y_test
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 20)
    size, pace = np.array([6.0, 12.0, 0.05, 3.0]), np.array([0.4, 2.6, 0.3, 1.7])  # of the swing, and in Hz
    time = np.arange(100)[:, None] / features.MOTION_RATE
    x = np.stack([
        size[k] * np.sin(2 * np.pi * (pace[k] * rng.uniform(0.9, 1.1) * time * [1, 1, 2, 1, 1, 2] + rng.random(6)))
        * [1, 1, 1, 0.2, 0.2, 0.2] + rng.normal(0, 0.1, (100, 6)) for k in y
    ]).astype(np.float32)  # fmt: skip
    return x[::2], y[::2].astype(np.int64), x[1::2], y[1::2].astype(np.int64)


def machine(seconds: float, rng: np.random.Generator, fault: bool = False) -> Array:
    """A fan at 16 kHz: blade passes, motor hum, air; with ``fault``, the clicks of a damaged bearing, 23 a second."""
    time = np.arange(int(seconds * features.SOUND_RATE)) / features.SOUND_RATE
    speed = 2 * np.pi * np.cumsum(120 * (1 + 0.01 * np.sin(2 * np.pi * 0.3 * time + rng.uniform(0, 6)))) / features.SOUND_RATE
    sound = sum(0.3 / n * np.sin(n * speed + n) for n in range(1, 9)) + 0.1 * np.sin(2 * np.pi * 100 * time)
    air = np.fft.irfft(
        np.fft.rfft(rng.normal(0, 1, len(time))) / (1 + np.arange(len(time) // 2 + 1) / (400 * seconds)), len(time)
    )
    found = 0.2 * sound + 0.1 * air
    if fault:
        since = time * 23 % 1 / 23
        found = found + 0.3 * np.exp(-since * 400) * np.sin(2 * np.pi * 3500 * since)
    return (0.5 * found).astype(np.float32)


def write_wave(file: Path, sound: Array, rate: int) -> None:
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())


def record(folder: Path) -> list[str]:
    """Held-back samples as the files that a camera, a microphone and a motion sensor would give; names of what was written."""
    rng = np.random.default_rng(1)
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    images, labels = digit_images()[2:]
    for i in range(20):  # ink on paper, larger than the network's input
        paper = 255 - (200 * features.resize(np.pad(images[i, 0], 8), 88, 88)).astype(np.uint8)
        (folder / "digits" / f"{i:02d}_{DIGITS[labels[i]]}.pgm").write_bytes(b"P5 88 88 255\n" + paper.tobytes())
    waves, spoken = word_waves()[2:]
    first = [int(np.flatnonzero(spoken == k)[0]) for k in range(len(words()) - 1)]
    silence = rng.normal(0, 0.003, 4000).astype(np.float32)
    write_wave(folder / "words.wav", np.concatenate([x for i in first for x in (waves[i], silence)]), features.SPEECH_RATE)
    (folder / "words.txt").write_text("\n".join(words()) + "\n")
    readings, activities = motion_readings()[2:]
    with (folder / "motions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ax", "ay", "az", "gx", "gy", "gz"])
        for kind in range(4):
            writer.writerows(readings[np.flatnonzero(activities == kind)[0]].round(5).tolist())
    sound = [machine(12, rng), machine(4, rng, fault=True), machine(4, rng)]
    write_wave(folder / "machine.wav", np.concatenate(sound), features.SOUND_RATE)
    return ["digits/", "words.wav", "words.txt", "motions.csv", "machine.wav"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("recorded"), help="where recorded input goes (recorded)")
    print("wrote", *record(parser.parse_args().folder))
