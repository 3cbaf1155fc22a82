"""The Raspberry Pi demos on recorded input, on this machine and on the emulated arm64 Linux, and their page in a browser.

The networks learn from what every machine has (scikit-learn's digits, synthetic vowels and motions): the tests need no data.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from arm64 import arm64 as arm64
from browser import page

from edgekit.devices import emulated_linux

pytestmark = pytest.mark.slow
DEMOS = Path(__file__).resolve().parents[2] / "examples" / "raspberry_pi"
INPUTS = {"images": "digits", "keywords": "words.wav", "activity": "motions.csv", "anomaly": "machine.wav"}
MAKE = """
import sys
from pathlib import Path
from edgekit import pipeline, recipe
for name in sys.argv[3:]:
    out = Path(sys.argv[2]) / name
    pipeline.compress(Path(sys.argv[1]) / f"{name}.yaml", out)
    pipeline.export(out, [recipe.target("tflite", {})])
"""
WITHOUT_DATA = {**os.environ, "EDGEKIT_DATA": "/nonexistent"}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of the four demos, and recorded input."""
    folder = tmp_path_factory.mktemp("pi")
    commands = [["-c", MAKE, str(DEMOS), str(folder), *INPUTS], [str(DEMOS / "samples.py"), str(folder / "recorded")]]
    for command in commands:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=WITHOUT_DATA, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def demo(made: Path, name: str, where: str, *more: str) -> list[tuple[str, str, float, str]]:
    """What a demo printed: (what, label, percent, rest) a line."""
    words = [
        str(DEMOS / f"{name}.py"),
        str(made / name / "model.tflite"),
        "--input",
        str(made / "recorded" / INPUTS[name]),
        *more,
    ]
    here = where == "host"
    command = [sys.executable, *words] if here else [*emulated_linux.command(), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env=None if here else emulated_linux.environment(), timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, *lines = done.stdout.splitlines()
    assert first == "model.tflite in " + ("ai-edge-litert 2.3.0" if here else first.removeprefix("model.tflite in "))
    found = [re.fullmatch(r"(.{24}) (.{12}) +(\d+\.\d) %  (.*)", line) for line in lines]
    assert lines and all(found), lines
    rows = [(m[1].strip(), m[2].strip(), float(m[3]), m[4]) for m in found if m]
    for *_, rest in rows:  # a machine has latency, an emulator none
        assert re.match(r"\d+\.\d\d ms" if here else "emulated, no latency", rest)
    return rows


@pytest.fixture(params=["host", "arm64"])
def where(request: pytest.FixtureRequest) -> str:
    if request.param == "arm64":
        request.getfixturevalue("arm64")
    return str(request.param)


def test_images(made: Path, where: str) -> None:
    rows = demo(made, "images", where)
    right = [label == what.split("_")[1] for what, label, *_ in rows]
    assert len(right) == 20 and sum(right) >= 18


def test_keywords(made: Path, where: str) -> None:
    words = (made / "recorded" / "words.txt").read_text().split()
    rows = demo(made, "keywords", where, "--rolling", "1", "--labels", str(made / "recorded" / "words.txt"))
    at = {float(what.split()[1]): label for what, label, *_ in rows}
    right = [
        at[1.5 * i] == word for i, word in enumerate(words[:-1])
    ]  # each word fills a second, half a second of silence follows
    assert len(right) == 8 and sum(right) >= 6
    assert sum(label == "(nothing)" for label in at.values()) >= 1


def test_activity(made: Path, where: str) -> None:
    rows = demo(made, "activity", where, "--rolling", "1")
    for i, activity in enumerate(("badminton", "running", "standing", "walking")):  # ten seconds each; a window has five
        inside = [label for what, label, *_ in rows if 10 * i + 5 <= float(what.split()[0]) <= 10 * i + 10]
        assert len(inside) == 6 and inside.count(activity) >= 5


def test_anomaly(made: Path, where: str) -> None:
    rows = [(float(what.split()[1]), label) for what, label, *_ in demo(made, "anomaly", where, "--rolling", "3")]
    assert {label for time, label in rows if time < 9.9} == {"learning"}
    faulty = [label for time, label in rows if 12.8 <= time <= 15.5]  # the damaged bearing is heard from 12 s to 16 s
    sound = [label for time, label in rows if 10.5 <= time <= 11.7 or time >= 17]
    assert faulty.count("anomaly") >= 0.9 * len(faulty) and sound.count("normal") >= 0.9 * len(sound)


@pytest.fixture
def live(made: Path) -> Iterator[str]:
    """Address of the page of a demo that goes on for ever."""
    words = ["activity.py", str(made / "activity" / "model.tflite"), "--input", str(made / "recorded" / "motions.csv")]
    process = subprocess.Popen(
        [sys.executable, str(DEMOS / words[0]), *words[1:], "--loop", "--page", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        lines = (line for line in process.stdout)
        yield next(line.split()[1] for line in lines if line.startswith("page: "))
    finally:
        process.kill()
        process.communicate()


def test_the_page_shows_predictions_as_they_come(live: str, tmp_path: Path) -> None:
    with page(live, tmp_path / "profile") as browser:
        label = "document.getElementById('label').textContent"
        browser.wait(f"['badminton', 'running', 'standing', 'walking'].includes({label})")
        assert browser.value("document.querySelectorAll('.row').length") == 4
        assert re.fullmatch(r"\d+\.\d\d ms", browser.value("document.getElementById('took').textContent"))
        heat = browser.value("document.getElementById('celsius').textContent")
        assert heat == "no temperature sensor" or re.fullmatch(r"\d+\.\d °C", heat)
        first = browser.value("document.getElementById('what').textContent")
        browser.wait(f"document.getElementById('what').textContent != {first!r}")
        shares = browser.value("[...document.querySelectorAll('.row span:last-child')].map(e => parseFloat(e.textContent))")
        assert sum(shares) == pytest.approx(100, abs=3)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{live}../../etc/passwd", timeout=10)
    with urllib.request.urlopen(f"{live}events", timeout=10) as stream:  # after the browser has gone, another one is served
        assert stream.headers["Content-Type"] == "text/event-stream" and stream.readline().startswith(b"data: {")


SENSORS = {
    "picamera2": """
import os, numpy as np
class Picamera2:
    def create_video_configuration(self, main): assert main == {"size": (640, 480), "format": "YUV420"}; return main
    def configure(self, given): pass
    def start(self): pass
    def capture_array(self):  # 480 lines of luma, then both chromas
        words = open(os.environ["RECORDED"] + "/digits/00_" + os.environ["DIGIT"] + ".pgm", "rb").read()
        paper = np.frombuffer(words[-88 * 88:], np.uint8).reshape(88, 88).repeat(4, 0).repeat(4, 1)
        frame = np.full((720, 640), 250, np.uint8)
        frame[64:416, 144:496] = paper
        return frame
""",
    "sounddevice": """
import contextlib, os, threading, time, wave, numpy as np
class PortAudioError(Exception): pass
class InputStream(contextlib.AbstractContextManager):
    def __init__(self, samplerate, channels, blocksize, dtype, callback):
        assert (samplerate, channels, dtype) == (8000, 1, "float32")
        with wave.open(os.environ["RECORDED"] + "/words.wav") as file:
            sound = np.frombuffer(file.readframes(-1), "<i2").astype(np.float32) / 32768
        def play():
            for i in range(0, 10 * blocksize, blocksize):
                callback(sound[i : i + blocksize, None], blocksize, None, None)
                time.sleep(0.05)
        threading.Thread(target=play, daemon=True).start()
    def __exit__(self, *error): pass
""",
    "smbus2": """
import csv, math, os
class SMBus:
    def __init__(self, bus):
        assert bus == 1
        with open(os.environ["RECORDED"] + "/motions.csv") as file:
            self.rows = iter(list(csv.reader(file))[101:])  # running
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def write_byte_data(self, address, register, value):
        assert address == 0x68 and (register, value) in ((0x6B, 0), (0x1B, 0x10), (0x1C, 0x10))
    def read_i2c_block_data(self, address, register, length):
        assert (address, register, length) == (0x68, 0x3B, 14)
        x = [float(v) for v in next(self.rows)]
        words = [round(v / 9.81 * 4096) for v in x[:3]] + [0] + [round(math.degrees(v) * 32.8) for v in x[3:]]
        return [b for w in words for b in max(-32768, min(32767, w)).to_bytes(2, "big", signed=True)]
""",
}
"""Stand-ins for the sensors' libraries, by what their documentation and the sensor's register map say."""


@pytest.mark.parametrize(
    ("name", "module", "label"),
    [("images", "picamera2", ""), ("keywords", "sounddevice", "a"), ("activity", "smbus2", "running")],
)
def test_a_sensor_is_used_where_it_is(name: str, module: str, label: str, made: Path, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text(SENSORS[module])
    digit = next((made / "recorded" / "digits").glob("00_*")).stem.split("_")[1]
    words = [str(DEMOS / f"{name}.py"), str(made / name / "model.tflite"), "--labels", str(made / "recorded" / "words.txt")]
    given = {**os.environ, "PYTHONPATH": str(tmp_path), "RECORDED": str(made / "recorded"), "DIGIT": digit}
    command = [sys.executable, *(words if name == "keywords" else words[:2])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=given)
    try:
        assert process.stdout is not None
        rows = [line for _, line in zip(range(7 if name != "activity" else 2), process.stdout, strict=False)]
    finally:
        process.kill()
        process.communicate()
    assert any((label or digit) in row.split() for row in rows[1:]), rows


def test_what_goes_to_a_device_is_python_3_9() -> None:
    """The oldest Python that the runner takes."""
    for name in ("live", "features", "sound", *INPUTS):
        tree = ast.parse((DEMOS / f"{name}.py").read_text(), feature_version=(3, 9))
        imported = {a.name.split(".")[0] for n in tree.body if isinstance(n, ast.Import) for a in n.names}
        imported |= {str(n.module).split(".")[0] for n in tree.body if isinstance(n, ast.ImportFrom)}
        assert imported <= {*sys.stdlib_module_names, "numpy", "live", "features", "sound"}
        assert not any(k.arg == "strict" for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords)


def test_what_is_missing_is_said_in_one_sentence(made: Path, tmp_path: Path) -> None:
    model = str(made / "images" / "model.tflite")
    for words, said in {
        ("images.py", model): "no camera",
        ("keywords.py", model): "no microphone",
        ("activity.py", model): "no motion sensor: install smbus2, or give a recorded CSV file by --input",
        ("images.py", model, "--input", str(tmp_path)): "no images; make some with samples.py",
        ("keywords.py", model, "--input", str(DEMOS / "page.html")): "page.html: file does not start with RIFF id",
        ("keywords.py", str(made / "keywords" / "model.tflite"), "--input", str(made / "recorded" / "words.wav")): (
            "the network has 9 outputs, there are 11 labels; give a file of them by --labels"
        ),
        ("images.py", str(tmp_path / "none.tflite")): "none.tflite",
        ("images.py", model, "--page", "http"): "give [HOST:]PORT with a free port",
    }.items():
        done = subprocess.run([sys.executable, str(DEMOS / words[0]), *words[1:]], capture_output=True, text=True, timeout=60)
        errors = [line for line in done.stderr.splitlines() if not line.startswith(("INFO", "WARNING", "W0000"))]
        assert done.returncode != 0 and len(errors) == 1 and said in errors[0], (words, done.stderr)
