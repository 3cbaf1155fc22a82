"""Whether a machine sounds as usual: python anomaly.py model.tflite [--input machine.wav] [--page 8000]

The network gives its input back if it knows the sound; the error of that is the score. The first ten seconds are taken as normal:
the bound is their median and six times their median absolute deviation, which a stray noise does not move.
"""

from __future__ import annotations

from collections import deque

import features
import live
import numpy as np
import sound

STEP = 4096
LEARN = int(10 * features.SOUND_RATE / STEP)


def main() -> None:
    given = live.arguments(__doc__.splitlines()[0], "WAV file")
    model = live.Model(given.model, given.threads)
    show = live.screen(given.page, "Machine sound")
    learned: list[float] = []
    scores: deque[float] = deque(maxlen=given.rolling)
    windows = sound.windows(given.input, features.SOUND_RATE, features.SOUND_SAMPLES, STEP)
    for what, window in live.paced(windows, STEP / features.SOUND_RATE, given.loop):
        x = features.machine_sound(window)
        error = float(np.mean((model(x) - x) ** 2))
        scores.append(error)
        if len(learned) < LEARN:
            learned.append(error)
            show(what, "learning", len(learned) / LEARN, {"learned": len(learned) / LEARN}, model.milliseconds)
            continue
        middle = float(np.median(learned))
        bound = middle + 6 * 1.4826 * float(np.median(np.abs(np.array(learned) - middle))) + 1e-9
        ratio = float(np.mean(scores)) / bound
        sure = ratio**2 / (1 + ratio**2)  # one half at the bound
        label = "anomaly" if ratio > 1 else "normal"
        show(what, label, max(sure, 1 - sure), {"normal": 1 - sure, "anomaly": sure}, model.milliseconds)


if __name__ == "__main__":
    main()
