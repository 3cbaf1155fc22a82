"""What a wrist does, from a motion sensor: python activity.py model.tflite [--input motions.csv] [--page 8000]

The sensor is an MPU-6050 on I2C bus 1, read by smbus2 ten times a second (accelerometer ±8 g, gyroscope ±1000 °/s: registers in
the MPU-6000/6050 register map, sections 4.4 to 4.19). A window is five seconds and moves on by one.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator
from pathlib import Path

import features
import live
import numpy as np
from features import Array

ACTIVITIES = ("badminton", "running", "standing", "walking")
ADDRESS, POWER, GYRO, ACCEL, DATA = 0x68, 0x6B, 0x1B, 0x1C, 0x3B
STEP = features.MOTION_RATE


def recorded(path: Path) -> Iterator[Array]:
    """Rows ax, ay, az (m/s²), gx, gy, gz (rad/s) of a CSV file with one header line."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.reader(file))[1:]
        yield from np.array(rows, np.float32).reshape(-1, 6)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {error}; expected a header and rows of six numbers") from None


def sensor() -> Iterator[Array]:
    """The same from the sensor."""
    try:
        from smbus2 import SMBus
    except ImportError:
        raise SystemExit("no motion sensor: install smbus2, or give a recorded CSV file by --input") from None
    try:
        with SMBus(1) as bus:
            for register, value in ((POWER, 0), (GYRO, 2 << 3), (ACCEL, 2 << 3)):
                bus.write_byte_data(ADDRESS, register, value)
            due = time.monotonic()
            while True:
                raw = bytes(bus.read_i2c_block_data(ADDRESS, DATA, 14))
                words = np.frombuffer(raw, ">i2").astype(np.float32)
                yield np.concatenate([words[:3] / 4096 * 9.81, words[4:] / 32.8 * (math.pi / 180)]).astype(np.float32)
                due += 1 / features.MOTION_RATE
                time.sleep(max(0.0, due - time.monotonic()))
    except OSError as error:
        raise SystemExit(f"no MPU-6050 answers at {ADDRESS:#x} of I2C bus 1 ({error.strerror}); is I2C enabled?") from None


def windows(readings: Iterator[Array]) -> Iterator[tuple[str, Array]]:
    """The last five seconds, every second."""
    kept: list[Array] = []
    for count, reading in enumerate(readings, 1):
        kept = [*kept[1 - features.MOTION_SAMPLES :], reading]
        if len(kept) == features.MOTION_SAMPLES and count % STEP == 0:
            yield f"{count / features.MOTION_RATE:.0f} s", np.stack(kept)


def main() -> None:
    given = live.arguments(__doc__.splitlines()[0], "CSV file")
    model = live.Model(given.model, given.threads)
    rolling = live.Rolling(live.labels(given.labels, ACTIVITIES), given.rolling)
    show = live.screen(given.page, "Activity")
    readings = recorded(given.input) if given.input else sensor()
    for what, window in live.paced(windows(readings), 1.0, given.loop):
        label, confidence, all_ = rolling(model(features.motion(window)))
        show(what, label, confidence, all_, model.milliseconds)


if __name__ == "__main__":
    main()
