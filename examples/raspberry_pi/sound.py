"""Sound for the demos: WAV files and the microphone."""

from __future__ import annotations

import queue
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from features import Array


def windows(path: Path | None, rate: int, length: int, step: int) -> Iterator[tuple[str, Array]]:
    """Windows of ``length`` samples, ``step`` apart, of a WAV file, or of the microphone for ever; each with where it is from."""
    if path is None:
        window = np.zeros(length, np.float32)
        for chunk in microphone(rate, step):
            window = np.concatenate([window, chunk])[-length:]
            yield "microphone", window
    else:
        sound = read(path, rate)
        sound = np.pad(sound, (0, max(0, length - len(sound))))
        for start in range(0, len(sound) - length + 1, step):
            yield f"{path.name} {start / rate:.2f} s", sound[start : start + length]


def read(path: Path, rate: int) -> Array:
    """A WAV file of 16-bit samples as (n,) from -1 to 1: channels averaged, another rate brought to ``rate``."""
    try:
        with wave.open(str(path), "rb") as file:
            if file.getsampwidth() != 2:
                raise SystemExit(f"{path}: {8 * file.getsampwidth()}-bit samples; make it a 16-bit WAV")
            raw = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
            have = file.getframerate()
    except (OSError, EOFError, wave.Error) as error:
        raise SystemExit(f"{path}: {error}") from None
    sound = raw.mean(1) / 32768
    if have != rate:
        if have > rate:  # against aliases: nothing above half the new rate
            spectrum = np.fft.rfft(sound)
            spectrum[np.fft.rfftfreq(len(sound), 1 / have) > rate / 2] = 0
            sound = np.fft.irfft(spectrum, len(sound))
        sound = np.interp(np.arange(0, len(sound), have / rate), np.arange(len(sound)), sound)
    return np.asarray(sound, np.float32)


def microphone(rate: int, step: int) -> Iterator[Array]:
    """Chunks of ``step`` samples; if the demo is too slow, old ones are dropped."""
    try:
        import sounddevice
    except (ImportError, OSError):
        raise SystemExit("no microphone: install sounddevice and libportaudio2, or give a WAV file by --input") from None
    chunks: queue.Queue[Array] = queue.Queue(maxsize=8)

    def heard(data: Any, frames: int, time: Any, status: Any) -> None:
        if chunks.full():
            chunks.get_nowait()
        chunks.put_nowait(data[:, 0].copy())

    try:
        with sounddevice.InputStream(samplerate=rate, channels=1, blocksize=step, dtype="float32", callback=heard):
            while True:
                yield chunks.get()
    except sounddevice.PortAudioError as error:
        raise SystemExit(f"no microphone answers ({error}); give a WAV file by --input") from None
