"""From what a sensor gives to what a network takes; the same functions for training and on the device. Needs numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

SPEECH_RATE, SPEECH_SAMPLES = 8000, 8000
SOUND_RATE, SOUND_SAMPLES = 16000, 6 * 512
MOTION_RATE, MOTION_SAMPLES = 10, 50


def mel_filters(bands: int, size: int, rate: int) -> Array:
    """Triangles (bands, size // 2 + 1), equally wide in mel (2595 log10(1 + f / 700)), from 20 Hz to half the rate."""
    low, high = (2595 * np.log10(1 + f / 700) for f in (20.0, rate / 2))
    edges = 700 * (10 ** (np.linspace(low, high, bands + 2) / 2595) - 1)
    at = np.fft.rfftfreq(size, 1 / rate)
    up = (at - edges[:-2, None]) / np.diff(edges)[:-1, None]
    down = (edges[2:, None] - at) / np.diff(edges)[1:, None]
    found: Array = np.maximum(0, np.minimum(up, down)).astype(np.float32)
    return found


def log_mel(wave: Array, rate: int, size: int, hop: int, bands: int) -> Array:
    """(frames, bands): natural logarithm of the mel power, Hann window, frames that lie wholly inside; wave from -1 to 1."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, size)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size).astype(np.float32))) ** 2
    return np.asarray(np.log(power @ mel_filters(bands, size, rate).T + 1e-6), np.float32)


def speech(wave: Array) -> Array:
    """One second at 8 kHz as (1, 60, 40) from 0 to 1: log-mel relative to its loudest point, so that the level does not
    matter."""
    found = log_mel(wave, SPEECH_RATE, 256, 128, 40)[:60]
    scaled: Array = np.clip((found - found.max()) / 10 + 1, 0, 1).astype(np.float32)
    return scaled[None]


def machine_sound(wave: Array) -> Array:
    """Six hops of 32 ms at 16 kHz as (320,): five frames of 64 log-mel bands, about -1 to 1."""
    return (log_mel(wave, SOUND_RATE, 1024, 512, 64)[:5].ravel() / 10).astype(np.float32)


def motion(readings: Array) -> Array:
    """(50, 6) readings at 10 Hz (m/s², then rad/s) as (6, 50) of the order of 1."""
    return np.ascontiguousarray(readings.T / np.array([[10.0]] * 3 + [[2.0]] * 3), np.float32)


def digit(image: Array, dark_on_light: bool = True) -> Array:
    """A grey image (H, W) from 0 to 1 of one handwritten digit as (1, 28, 28), as MNIST has them: light strokes on black, fitted
    into 20 x 20 and centred by mass."""
    ink = 1 - image if dark_on_light else image
    ink = np.clip((ink - np.median(ink) - 0.15) / max(0.2, float(ink.max() - np.median(ink)) - 0.15), 0, 1)
    rows, columns = np.flatnonzero(ink.max(1) > 0.3), np.flatnonzero(ink.max(0) > 0.3)
    if not len(rows) or not len(columns):
        return np.zeros((1, 28, 28), np.float32)
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = 20 / max(ink.shape)
    small = resize(ink, max(1, round(ink.shape[0] * scale)), max(1, round(ink.shape[1] * scale)))
    total = small.sum() + 1e-9
    top, left = (
        int(np.clip(round(14 - float((small.sum(1 - axis) * (np.arange(n) + 0.5)).sum() / total)), 0, 28 - n))
        for axis, n in enumerate(small.shape)
    )
    found = np.zeros((1, 28, 28), np.float32)
    found[0, top : top + small.shape[0], left : left + small.shape[1]] = small
    return found


def resize(image: Array, height: int, width: int) -> Array:
    """Mean over areas where it becomes smaller, linear between pixels where it becomes larger."""
    for axis, n in enumerate((height, width)):
        have = image.shape[axis]
        if n < have:
            edges = np.linspace(0, have, n + 1)
            sums = np.concatenate([np.zeros_like(image.take([0], axis)), image.cumsum(axis)], axis)
            at = np.stack([np.interp(edges, np.arange(have + 1), line) for line in np.moveaxis(sums, axis, 1)])
            image = np.moveaxis(np.diff(at, axis=1) * n / have, 1, axis)
        else:
            where = np.clip((np.arange(n) + 0.5) * have / n - 0.5, 0, have - 1)
            lines = np.moveaxis(image, axis, 1)
            image = np.moveaxis(np.stack([np.interp(where, np.arange(have), line) for line in lines]), 1, axis)
    return image.astype(np.float32)
