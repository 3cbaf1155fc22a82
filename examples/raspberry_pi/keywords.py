"""Spoken words from a microphone: python keywords.py model.tflite [--input words.wav] [--page 8000]

A window of one second moves on by a quarter of a second. The words are the ten digits; other ones are listed in a file by
--labels.
"""

from __future__ import annotations

import features
import live
import sound

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "(nothing)")
STEP = 2000


def main() -> None:
    given = live.arguments(__doc__.splitlines()[0], "WAV file")
    model = live.Model(given.model, given.threads)
    rolling = live.Rolling(live.labels(given.labels, DIGITS), given.rolling)
    show = live.screen(given.page, "Keywords")
    windows = sound.windows(given.input, features.SPEECH_RATE, features.SPEECH_SAMPLES, STEP)
    for what, window in live.paced(windows, STEP / features.SPEECH_RATE, given.loop):
        label, confidence, all_ = rolling(model(features.speech(window)))
        show(what, label, confidence, all_, model.milliseconds)


if __name__ == "__main__":
    main()
