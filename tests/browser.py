"""Headless Chromium on a live page: the DevTools protocol over two pipes, since ``--dump-dom`` does not wait for what a server
sends."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.fail("Chromium is not installed, so nobody looked at the page; `make test` installs it, or: apt-get install chromium")


class Browser:
    """One page."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to, self.source, self.number, self.session = to_browser, from_browser, 0, ""
        self.rest = b""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the protocol and wait for its answer; events are passed over."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                piece = os.read(self.source, 1 << 20)
                assert piece, "Chromium ended"
                self.rest += piece
            line, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                found: dict[str, Any] = answer["result"]
                return found

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives on the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression: str, seconds: float = 30.0) -> Any:
        """The first true value of an expression."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.value(expression):
                return found
            time.sleep(0.1)
        raise AssertionError(f"{expression} was not true within {seconds:g} s: {self.value('document.body.innerText')!r}")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def page(url: str, profile: Path, size: str = "720,760") -> Iterator[Browser]:
    """The page at ``url`` in a browser of its own, ended afterwards."""
    read_there, to_browser = os.pipe()
    from_browser, write_there = os.pipe()
    command = [
        chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        f"--user-data-dir={profile}", f"--window-size={size}", "--remote-debugging-pipe", "about:blank",
    ]  # fmt: skip
    shell = ["bash", "-c", f'exec "$@" 3<&{read_there} 4>&{write_there}', "bash", *command]
    process = subprocess.Popen(
        shell, pass_fds=(read_there, write_there), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    os.close(read_there), os.close(write_there)
    browser = Browser(to_browser, from_browser)
    try:
        target = browser.call("Target.createTarget", url=url)["targetId"]
        browser.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        yield browser
    finally:
        process.kill()
        process.wait()
        os.close(to_browser), os.close(from_browser)
