"""The report page of a real run folder (a lowered ONNX file), read back from the DOM that headless Chromium makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from nets import images, residual_net
from torch import nn

from edgekit import environment, front_chart, verify
from edgekit.compress.ptq.settings import PTQ, Reconstruct
from edgekit.compress.rewrite.settings import Rewrite
from edgekit.data import Data
from edgekit.errors import FormatError
from edgekit.frozen import FrozenProgram, Unquantized, save
from edgekit.parity import LayerParity, Parity
from edgekit.profile import Profile
from edgekit.profile import save as save_profiles
from edgekit.report import render, write_report
from edgekit.stages import evaluate_stage, evaluation_set, save_stage
from edgekit.targets import onnx

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


class Float(nn.Module):
    """A convolution to count, and the frozen program with noise for answers."""

    def __init__(self, program: FrozenProgram) -> None:
        super().__init__()
        self.program, self.conv = program, nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.conv(x)
        return self.program.run(x)[0] + 0.1 * torch.randn(len(x), 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as the pipeline leaves it: frozen program, float stage, one real file, parity, records."""
    folder = tmp_path_factory.mktemp("run")
    made = residual_net()
    left = (Unquantized("attention.softmax", "aten.softmax.int", "no integer softmax in any target"),)
    program = FrozenProgram(made.exported, "residual", left, {"attention.softmax": "model.py:31"})
    save(program, folder / "frozen.pt2")
    x = images(12)
    labels = program.run(x)[0].argmax(1)
    labels[0] = (labels[0] + 1) % 10
    data = Data(x, (x, labels))
    save_stage(folder, evaluate_stage("float", Float(program), evaluation_set(data)))
    onnx.lower(program, folder / "model.onnx")
    verify.verify_run(folder, data)
    (folder / "recipe.yaml").write_text("model: model.py:build\ncompress:\n  - ptq: {weights: int8}\n")
    (folder / "env.json").write_text(json.dumps(environment.describe()))
    done = {"kind": "ptq", "settings": {"weights": "int8", "samples": 12}, "layers": {"stem": "weights int8, nearest"}}
    record = {"passes": [done], "unquantized": [], "warnings": ["a layer never ran"]}
    (folder / "compress.json").write_text(json.dumps(record))
    return folder


class Page(HTMLParser):
    """Element names, the text, and the text of cells by (data-stage or data-layer, data-field)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.cells: dict[tuple[str, str], str] = {}
        self.text = ""
        self._row = self._cell = self._target = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.elements.add(tag)
        if tag == "tr":
            self._row = known.get("data-stage") or known.get("data-layer") or ""
        if tag == "td":
            self._cell, self._target = known.get("data-field") or "", known.get("data-target") or ""
        if tag == "span" and self._target:
            self._cell = f"{self._target} {known.get('data-field')}"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "span"):
            self._cell = ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._row and self._cell:
            key = (self._row, self._cell)
            self.cells[key] = self.cells.get(key, "") + data.strip()


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.fail(
        "Chromium is not installed, so nobody looked at the report; `make test` installs it, or: apt-get install chromium"
    )


def dom(page: Path, profile: Path) -> str:
    """What the browser makes of the page."""
    command = [
        chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom", page.resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_browser_shows_what_parity_json_says(run: Path, tmp_path: Path) -> None:
    path = write_report(run)
    page = Page(dom(path, tmp_path / "profile"))
    parity = json.loads((run / "parity.json").read_text())
    assert [s["name"] for s in parity["stages"]] == ["float", "frozen", "onnx"]
    for stage in parity["stages"]:
        shown = {field: text for (row, field), text in page.cells.items() if row == stage["name"]}
        assert float(shown["metric"].removesuffix(" %")) == pytest.approx(stage["metric"], abs=0.005)
        for field, digits in (
            ("agreement_float", 0.005),
            ("agreement_frozen", 0.005),
            ("sqnr_float_db", 0.05),
            ("sqnr_frozen_db", 0.05),
        ):
            if field.split("_")[1] == stage["name"]:
                assert shown.get(field, "") == ""
            elif stage[field] is not None:
                assert float(shown[field].split()[0]) == pytest.approx(stage[field], abs=digits)
    file = parity["artifacts"][0]
    row = {field: text for (name, field), text in page.cells.items() if name == "onnx"}
    assert float(row["max_lsb"]) == pytest.approx(parity["stages"][2]["max_lsb"], rel=0.01)
    size, unit = row["bytes"].removesuffix("measured").split()
    assert unit == "kB" and float(size) == pytest.approx((run / "model.onnx").stat().st_size / 1000, abs=0.05)
    assert file["layers"] and len({x["layer"] for x in file["layers"]}) == len(file["layers"])
    for layer in file["layers"]:
        assert float(page.cells[layer["layer"], "onnx lsb"]) == layer["max_lsb"]


def test_what_is_on_the_page(run: Path, tmp_path: Path) -> None:
    text = Page(dom(write_report(run), tmp_path / "profile")).text
    file = json.loads((run / "parity.json").read_text())["artifacts"][0]
    said = ["every file computes what the frozen program says", "modelled", "measured", "attention.softmax", "model.py:31"]
    done = ["compression: a layer never ran", "weights: int8", "weights int8, nearest", "no integer softmax in any target"]
    for wanted in (*said, *done, torch.__version__.split("+")[0], file["sha256"]):
        assert wanted in text, wanted


def test_the_page_is_alone(run: Path) -> None:
    html = render(run)
    assert "://" not in html and "<script" not in html and "@import" not in html and "url(" not in html
    assert len(html.encode()) < 200_000
    assert html == render(run)


def test_nothing_on_the_page_is_code(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    program = residual_net()
    save(FrozenProgram(program.exported, EVIL, (Unquantized(EVIL, EVIL, EVIL),), {EVIL: EVIL}), folder / "frozen.pt2")
    parity = Parity.load(folder / "parity.json")
    evil_layer = LayerParity(EVIL, EVIL, 8, 1, 9.0, 0.5, None, 4, False)
    coverage = [{"layer": EVIL, "op": EVIL, "runs": EVIL, "macs": 0, "storage": EVIL, "note": EVIL}]
    bad = replace(
        parity.artifacts[0], target=EVIL, layers=(evil_layer,), mismatches=(EVIL,), first_diverging=EVIL, breaches=(EVIL,),
        notes=(EVIL,), artifact={"coverage": coverage}, untapped=(EVIL,), stage=replace(parity.artifacts[0].stage, name=EVIL),
    )  # fmt: skip
    stages = (*parity.stages[:-1], bad.stage)
    replace(parity, program=EVIL, artifacts=(bad,), stages=stages, notes=(EVIL,), metric=EVIL).save(folder / "parity.json")
    (folder / "recipe.yaml").write_text(EVIL)
    (folder / "env.json").write_text(json.dumps({EVIL: EVIL}))
    done = {"kind": EVIL, "settings": {EVIL: EVIL}, "layers": {EVIL: EVIL}, EVIL: [{EVIL: EVIL}], "notes": [EVIL]}
    (folder / "compress.json").write_text(json.dumps({"passes": [done], "warnings": [EVIL]}))
    page = Page(dom(write_report(folder), tmp_path / "profile"))
    assert "script" not in page.elements and "img" not in page.elements
    assert f"edgekit report: {EVIL}" in page.text and "owned" not in page.text.replace(EVIL, "")


def test_a_breach_is_at_the_top(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    parity = Parity.load(folder / "parity.json")
    layer = parity.artifacts[0].layers[3]
    worse = tuple(replace(x, max_lsb=8.0, share=0.25, within=False) if x is layer else x for x in parity.artifacts[0].layers)
    file = replace(parity.artifacts[0], layers=worse, first_diverging=layer.layer, breaches=("onnx: layer down is wrong",))
    replace(parity, artifacts=(file,)).save(folder / "parity.json")
    html = render(folder)
    assert "1 breach of the parity contract" in html and html.index("onnx: layer down is wrong") < html.index("stage-table")
    assert "first to diverge" in html and "✕" in html


def test_a_run_without_files_claims_nothing_of_files(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    parity = Parity.load(folder / "parity.json")
    judged = tuple(s for s in parity.stages if s.name in ("float", "frozen"))
    replace(parity, artifacts=(), stages=judged).save(folder / "parity.json")
    html = render(folder)
    assert "the frozen program was judged, no file was made" in html and "accuracy of the frozen program" in html
    assert "file computes what" not in html and "0 / 0" not in html and 'id="coverage"' not in html


def test_a_bare_folder_says_what_is_missing(run: Path, tmp_path: Path) -> None:
    for name in ("frozen.pt2", "parity.json"):
        shutil.copy(run / name, tmp_path / name)
    html = render(tmp_path)
    assert "No recipe.yaml" in html and "No env.json" in html and "No compression record" in html
    (tmp_path / "env.json").write_text("{")
    with pytest.raises(FormatError, match=r"env\.json: damaged"):
        render(tmp_path)
    (tmp_path / "parity.json").unlink()
    with pytest.raises(FormatError, match="edgekit verify"):
        write_report(tmp_path)


def test_only_settings_that_were_changed_are_listed(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    changed = asdict(PTQ(weights="int4", method="adaround", reconstruct=Reconstruct(steps=7)))
    passes = [{"kind": "ptq", "settings": changed}, {"kind": "rewrite", "settings": asdict(Rewrite())}]
    (folder / "compress.json").write_text(json.dumps({"passes": passes, "warnings": []}))
    done = render(folder).partition("What was done")[2].partition("Recipe")[0]
    assert re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", done) == [
        ("weights", "int4"), ("activations", "int8"), ("method", "adaround"), ("reconstruct.steps", "7"),
        ("other settings", "the defaults"), ("settings", "the defaults"),
    ]  # fmt: skip


def test_firmware_is_compared_by_its_weights(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    parity = Parity.load(folder / "parity.json")
    source = next(s.bytes for s in parity.stages if s.name == "float")
    assert source is not None
    firmware = replace(parity.artifacts[0], artifact={**parity.artifacts[0].artifact, "memory": {"flash_weights": source // 4}})
    replace(parity, artifacts=(firmware,)).save(folder / "parity.json")
    assert "its weights 4.0× smaller than the float weights" in render(folder)


def test_a_sustained_run_is_drawn_to_scale(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    rows = tuple({"seconds": float(i + 1), "median_microseconds": 100.0 if i < 10 else 120.0} for i in range(20))
    hot = tuple({**row, "temperature_celsius": 50.0 + i} for i, row in enumerate(rows))
    for name, series in (("local", rows), ("ssh://pi@pi", hot)):
        save_profiles(folder / "profile.json", Profile(name, "onnx", "model.onnx", "", "microseconds", 110.0, 1, series=series))
    page = dom(write_report(folder), tmp_path / "profile")
    drawn = re.findall(r'data-series="(\w+)".*?points="([^"]*)"', page, flags=re.DOTALL)
    assert [key for key, _ in drawn] == ["median_microseconds", "median_microseconds", "temperature_celsius"]
    points = [tuple(map(float, point.split(","))) for point in drawn[0][1].split()]
    assert len(points) == 20 and points[-1][0] == 632.0 and len({round(b[0] - a[0]) for a, b in pairwise(points[::5])}) == 1
    # from 100 to 120 and 5 % around the median of 110: the axis reaches from 100 to 120, and later is slower is higher
    assert {y for _, y in points[:10]} == {130.0} and {y for _, y in points[10:]} == {10.0}
    assert "medians of the first and the last quarter, 100.0 and 120.0 µs" in page


def test_the_front_of_mixed_bits_is_drawn_with_the_choice_and_the_limit() -> None:
    front = [{"cost_share": c, "predicted_db": d} for c, d in ((0.5, 10.0), (0.75, 20.0), (1.0, 30.0))]
    entry = {"front": front, "cost_share": 0.75, "predicted_db": 20.0, "cost": "size", "limits": {"size": 0.8}}
    drawn = front_chart.drawing(entry)
    xs, ys = [p[0] for p in drawn["points"]], [p[1] for p in drawn["points"]]
    assert xs == sorted(xs) and ys == sorted(ys, reverse=True), "more cost to the right, less noise up"
    assert drawn["chosen"][:2] == drawn["points"][1][:2]
    assert xs[1] < drawn["limit"] < xs[2] and len(drawn["x_ticks"]) == 5
    assert front_chart.drawing({"layers": {}}) is None
    one = front_chart.drawing({"front": front[:1], "cost_share": 0.5, "predicted_db": 10.0})
    assert one["limit"] is None and one["points"][0][:2] == one["chosen"][:2]
