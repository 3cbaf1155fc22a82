"""Handwritten digits before a camera: python images.py model.tflite [--input FOLDER] [--page 8000]

The camera is picamera2's or OpenCV's; recorded images are .pgm files, or .png and .jpg where Pillow is installed. Each recorded
image stands alone; the camera's are averaged over the last few.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import features
import live
import numpy as np
from features import Array

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def grey(path: Path) -> Array:
    """A recorded image as (H, W) from 0 to 1."""
    if path.suffix == ".pgm":
        words = path.read_bytes().split(None, 4)
        if words[0] == b"P5" and words[3] == b"255":
            width, height = int(words[1]), int(words[2])
            pixels = np.frombuffer(path.read_bytes()[-width * height :], np.uint8).reshape(height, width)
            return np.asarray(pixels / 255, np.float32)
    from PIL import Image

    return np.asarray(np.asarray(Image.open(path).convert("L")) / 255, np.float32)


def recorded(folder: Path) -> Iterator[tuple[str, Array]]:
    files = sorted(
        p for p in (folder.iterdir() if folder.is_dir() else [folder]) if p.suffix in (".pgm", ".png", ".jpg", ".jpeg")
    )
    if not files:
        raise SystemExit(f"{folder}: no images; make some with samples.py")
    return ((path.stem, grey(path)) for path in files)


def camera() -> Iterator[tuple[str, Array]]:
    """The middle square of each frame."""
    try:
        from picamera2 import Picamera2

        device = Picamera2()
        device.configure(device.create_video_configuration({"size": (640, 480), "format": "YUV420"}))
        device.start()

        def frame() -> Array:
            luma: Array = device.capture_array()[:480, :640]
            return luma
    except ImportError:
        try:
            import cv2
        except ImportError:
            raise SystemExit("no camera: install picamera2 or opencv-python, or give recorded images by --input") from None
        capture = cv2.VideoCapture(0)
        if not capture.isOpened():
            raise SystemExit("no camera answers; give recorded images by --input") from None

        def frame() -> Array:
            found, image = capture.read()
            if not found:
                raise SystemExit("the camera gives no more images")
            luma: Array = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
            return luma

    while True:
        image = np.asarray(frame() / 255, np.float32)
        side = min(image.shape)
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        yield "camera", image[top : top + side, left : left + side]
        time.sleep(0.05)


def main() -> None:
    given = live.arguments(__doc__.splitlines()[0], "image file or folder")
    model, rolling = (
        live.Model(given.model, given.threads),
        live.Rolling(live.labels(given.labels, DIGITS), 1 if given.input else given.rolling),
    )
    show = live.screen(given.page, "Handwritten digits")
    images = recorded(given.input) if given.input else camera()
    for what, image in live.paced(images, 0.5, given.loop):
        label, confidence, all_ = rolling(model(features.digit(image)))
        show(what, label, confidence, all_, model.milliseconds)


if __name__ == "__main__":
    main()
