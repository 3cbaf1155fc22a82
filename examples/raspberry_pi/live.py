"""What the demos share: a file opened in the runtime that is there, a rolling confidence, the terminal, and a page for a browser.

Needs Python 3.9, numpy and one of ai-edge-litert, tflite-runtime, executorch, onnxruntime; runner.py of edgekit lies beside this
file on a device, and in edgekit/devices in the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from features import Array

HERE = Path(__file__).resolve().parent
EMULATED = "EDGEKIT_EMULATED" in os.environ
"""Set by edgekit's emulated arm64 Linux: time there is not latency and is not shown."""


def arguments(about: str, source: str) -> argparse.Namespace:
    """Command line of a demo."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("model", help="model.tflite, model.pte or model.onnx")
    parser.add_argument("--input", type=Path, help=f"{source} instead of the sensor")
    parser.add_argument(
        "--page", metavar="[HOST:]PORT", help="serve a live page; this machine only, or 0.0.0.0:8000 for the network"
    )
    parser.add_argument("--rolling", type=int, default=5, help="predictions that the rolling confidence covers (5)")
    parser.add_argument("--labels", type=Path, help="a file with one label a line, in the order of the network's outputs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--loop", action="store_true", help="begin recorded input again at its end, at the speed of the sensor")
    return parser.parse_args()


class Model:
    """A file in its runtime. ``model(x)`` takes one sample in the network's layout and gives its output, and sets
    ``milliseconds``."""

    def __init__(self, path: str, threads: int = 1) -> None:
        if struct.calcsize("P") != 8:
            sys.exit("this is a 32-bit system, for which most runtimes have no packages: install the 64-bit Raspberry Pi OS")
        places = [HERE, HERE.parents[1] / "edgekit" / "devices"]
        sys.path += [str(p) for p in places if (p / "runner.py").is_file()]
        try:
            import runner
        except ImportError:
            sys.exit("runner.py is missing: copy edgekit/devices/runner.py of the repository beside live.py")
        try:
            self.program = runner.open_program(path, threads=threads)
        except (runner.Refused, OSError) as error:
            sys.exit(str(error))
        self.milliseconds = 0.0
        print(f"{Path(path).name} in {self.program.runtime} {self.program.version}", flush=True)

    def __call__(self, x: Array) -> Array:
        x = x[None]
        wanted = tuple(self.program.inputs[0].shape) if self.program.inputs else x.shape
        if x.ndim == 4 and x.shape != wanted:
            x = x.transpose(0, 2, 3, 1)  # TFLite's channels come last
        start = time.perf_counter()
        output = self.program([np.ascontiguousarray(x)])[0]
        self.milliseconds = 1000 * (time.perf_counter() - start)
        found: Array = np.asarray(output, np.float32)[0]
        return found


class Rolling:
    """The mean of the last few probabilities: one odd frame does not change the answer."""

    def __init__(self, labels: Sequence[str], length: int) -> None:
        self.labels, self.kept = labels, deque[Array](maxlen=length)

    def __call__(self, logits: Array) -> tuple[str, float, dict[str, float]]:
        """The likeliest label, its confidence, and all of them."""
        if len(logits) != len(self.labels):
            sys.exit(
                f"the network has {len(logits)} outputs, there are {len(self.labels)} labels; give a file of them by --labels"
            )
        e = np.exp(logits - logits.max())
        self.kept.append(e / e.sum())
        mean = np.mean(np.stack(self.kept), 0)
        best = int(mean.argmax())
        return self.labels[best], float(mean[best]), {n: round(float(p), 4) for n, p in zip(self.labels, mean)}  # noqa: B905 (Python 3.9)


def labels(path: Path | None, default: Sequence[str]) -> tuple[str, ...]:
    """The lines of a file, or the default."""
    try:
        return tuple(path.read_text().split()) if path else tuple(default)
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"--labels: {error}")


class Screen(Protocol):
    """Shows one prediction."""

    def __call__(self, what: str, label: str, confidence: float, all_: dict[str, float], milliseconds: float) -> None: ...


def screen(page: str | None, title: str) -> Screen:
    """Prints each prediction and sends it to the page, if there is one."""
    server = Page(page, title) if page else None

    def show(what: str, label: str, confidence: float, all_: dict[str, float], milliseconds: float) -> None:
        took = "emulated, no latency" if EMULATED else f"{milliseconds:.2f} ms"
        heat = temperature()
        print(f"{what:24} {label:12} {100 * confidence:5.1f} %  {took}" + (f"  {heat:.1f} °C" if heat else ""), flush=True)
        if server is not None:
            server.send({"what": what, "label": label, "confidence": confidence, "all": all_, "took": took, "celsius": heat})

    return show


def temperature() -> float | None:
    """Of the processor, in degrees Celsius."""
    try:
        return int(Path("/sys/class/thermal/thermal_zone0/temp").read_text()) / 1000
    except (OSError, ValueError):
        return None


def paced(samples: Iterable[Any], seconds: float, loop: bool) -> Iterator[Any]:
    """Samples as they come; with ``loop`` recorded ones again and again at the speed of the sensor."""
    if not loop:
        yield from samples
        return
    kept = list(samples)
    while kept:
        for sample in kept:
            yield sample
            time.sleep(seconds)


class Page:
    """Serves ``page.html`` and a stream of predictions as server-sent events."""

    def __init__(self, address: str, title: str) -> None:
        self.title, self.clients, self.lock = title, set[queue.Queue[str]](), threading.Lock()
        self.last = ""
        host, _, port = address.rpartition(":")
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/events":
                    return self.stream()
                if self.path != "/":
                    return self.send_error(404)
                body = (HERE / "page.html").read_bytes()
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def stream(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Cache-Control", "no-cache")
                self.end_headers()
                mine: queue.Queue[str] = queue.Queue(maxsize=100)
                with page.lock:
                    page.clients.add(mine)
                try:
                    self.wfile.write(page.last.encode())
                    while True:
                        try:
                            self.wfile.write(mine.get(timeout=15).encode())
                        except queue.Empty:
                            self.wfile.write(b": still here\n\n")
                        self.wfile.flush()
                except OSError:  # the browser is gone
                    pass
                finally:
                    with page.lock:
                        page.clients.discard(mine)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        try:
            server = ThreadingHTTPServer((host or "127.0.0.1", int(port)), Handler)
        except (OSError, ValueError, OverflowError) as error:
            sys.exit(f"--page {address}: {error}; give [HOST:]PORT with a free port, such as 8000")
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"page: http://{server.server_address[0]!s}:{server.server_address[1]}/", flush=True)

    def send(self, event: dict[str, Any]) -> None:
        """To every browser; one that does not keep up misses events and delays nobody."""
        self.last = f"data: {json.dumps({'title': self.title, **event})}\n\n"
        with self.lock:
            for client in self.clients:
                if not client.full():
                    client.put_nowait(self.last)
