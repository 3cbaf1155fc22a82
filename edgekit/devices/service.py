"""Answer samples over HTTP on this machine: what a deployment's systemd unit runs, beside the runner and the model.

    python3 service.py [--port 8377] [--host 127.0.0.1] [--num_threads 1]

``GET /`` tells the model, its runtime and the machine's state as JSON. ``POST /predict`` takes one sample (batch of one) as an
.npy file, or several inputs as an .npz file with ``input0``, ``input1``, ..., real or in the file's own types, in the file's
layout, and answers with JSON: ``{"outputs": [[...]], "microseconds": ...}``. Pickles are refused, as are bodies over 64 MB. It
listens on this machine only unless told otherwise: there is no password.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

__all__ = ["LARGEST", "main", "serving"]

LARGEST = 64 << 20


def serving(folder: str, host: str, port: int, threads: int) -> HTTPServer:
    """A server for the model that ``manifest.json`` of a folder names; it has not begun to serve.

    Raises:
        runner.Refused: the model is not the manifest's, or cannot be loaded.
    """
    runner = _runner(folder)
    with open(os.path.join(folder, "manifest.json")) as file:
        manifest = json.load(file)
    path = os.path.join(folder, manifest["model"])
    if runner.sha256(path) != manifest["files"][manifest["model"]]:
        raise runner.Refused("sha256", f"{manifest['model']} is not the file that was deployed; deploy it again")
    program = runner.open_program(path, manifest["target"], threads)
    facts = {k: manifest[k] for k in ("name", "version", "target")} | {"runtime": f"{program.runtime} {program.version}"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                return self.answer(404, {"error": "GET / or POST /predict"})
            inputs = [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in program.inputs]
            self.answer(200, {**facts, "inputs": inputs, "state": runner.state()})

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length") or ""
            size = int(length) if length.isdecimal() else 0
            if self.path != "/predict" or not 0 < size <= LARGEST:
                return self.answer(404 if self.path != "/predict" else 413, {"error": f"POST /predict, 1 to {LARGEST} bytes"})
            try:
                sample = _arrays(self.rfile.read(size))
                start = time.perf_counter_ns()
                outputs = program(sample)
            except (ValueError, KeyError, RuntimeError, OSError, EOFError, runner.Refused) as error:
                return self.answer(400, {"error": (str(error).splitlines() or [type(error).__name__])[0]})
            taken = (time.perf_counter_ns() - start) / 1e3
            self.answer(200, {"outputs": [y.reshape(-1).tolist() for y in outputs], "microseconds": taken})

        def answer(self, code: int, value: dict[str, Any]) -> None:
            body = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: a line a sample would fill the log."""

    return HTTPServer((host, port), Handler)


def _runner(folder: str) -> Any:
    """The runner beside this file."""
    spec = importlib.util.spec_from_file_location("runner", os.path.join(folder, "runner.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["runner"] = module
    spec.loader.exec_module(module)
    return module


def _arrays(body: bytes) -> list[Any]:
    import numpy as np

    found = np.load(io.BytesIO(body), allow_pickle=False)
    if isinstance(found, np.ndarray):
        return [found]
    return [found[f"input{i}"] for i in range(len(found.files))]


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description="Answer samples over HTTP.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8377)
    parser.add_argument("--num_threads", type=int, default=1)
    given = parser.parse_args()
    server = serving(os.path.dirname(os.path.abspath(__file__)), given.host, given.port, given.num_threads)
    print(f"http://{given.host}:{server.server_port}/", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
