"""Tables of what operators cost on each target, made from operators run alone, and checked on whole networks.

    python benchmarks/costs.py [--targets tflite cortex-m4] [--device local] [--out FOLDER] [--runs 200]

For ExecuTorch, TFLite and ONNX a file of each operator is timed on the device (four in turn, the least of all calls of five
rounds through all files; one thread); for the Cortex-M cores chains of layers run on their emulated boards, where instructions
are counted. Costs are fitted to the terms of ``edgekit.costs`` with coefficients of zero or more, by least relative squares. The
networks that the error is told of are none of those. A host's table in which an operator that computes costs nothing, or whose
rounds differ, is refused: the machine was busy. Written to ``edgekit/cost_tables``, or to FOLDER for a machine of your own, and
recorded in ``results/costs.json``. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import subjects
import torch
from cost_cases import CHAINS, SMALL, Within, cases
from scipy.optimize import nnls
from subjects import log, write
from torch import Tensor, nn

from edgekit import environment, recipe, targets
from edgekit.compress.ptq import PTQ
from edgekit.compress.rewrite import Rewrite
from edgekit.compress.steps import apply
from edgekit.costs import FLOAT, STORED, TABLES, WEIGHTED, Table, Work, size_terms, terms, weight_bytes
from edgekit.data import Data
from edgekit.devices import connect
from edgekit.devices.linux import File
from edgekit.files import write_whole
from edgekit.frozen import FrozenProgram
from edgekit.frozen.work import works
from edgekit.profile import Settings

HOST = ("executorch", "tflite", "onnx")
CORES = tuple(t for t in targets.TARGETS if t.startswith("cortex-m"))
TILES = tuple(product((1, 2, 4, 8, 16), (1, 4, 8, 16)))
NETS = ("resnet8", "dscnn", "resnet20")

TOGETHER = 4
ROUNDS = 5
BUSY = 1.1
"""Where the second least round of half of the files is so many times the least one, the machine did something else."""
FREE = ("qreshape", "quantize", "dequantize", "qpad")
"""What may cost nothing on a host: moves that a runtime leaves out, and conversions beside a call."""
LEAST = 0.05
"""Errors are relative to the cost, or to this where it is less (a reshape of firmware costs nothing)."""

Measured = tuple[list[Work], float, int]
"""Works of a file, its cost, its bytes; 0 bytes: a layer of firmware, counted without the call."""


def program_of(module: nn.Module, shape: Sequence[Sequence[int]], bits: int, kind: str = "nearest") -> FrozenProgram:
    """A frozen program with weights of so many bits (FLOAT: float), calibrated on noise."""
    torch.manual_seed(0)
    x = tuple(torch.randn(4, *s) for s in shape)
    if bits == FLOAT:
        block = recipe.Block("rewrite", Rewrite(fuse=False))
    else:
        block = recipe.Block("ptq", PTQ(weights=f"int{bits}", keep_first_last_8bit=False, samples=4, observer="minmax"))  # type: ignore[arg-type]
    return apply(module.eval(), [block], Data(calibration=x if len(x) > 1 else x[0]), name="case").program


def bits_of(target: str, kind: str) -> list[int]:
    """Widths that a target computes differently."""
    if target in CORES:
        return [8, 4, 2]
    narrow = [] if target == "onnx" else [b for b in (4, 2) if kind in STORED[target].get(b, ())]
    return [FLOAT, 8, *narrow]


def timed(target: str, device: Any, files: Sequence[tuple[Path, FrozenProgram]], runs: int) -> tuple[list[float], float]:
    """Least microseconds of each file over all rounds, and the median over files of the second least round by the least.

    Few files in turn, since many would push each other out of the caches; every other round goes backwards.
    """
    module = targets.get(target)
    sent = []
    for path, program in files:
        x = [np.random.default_rng(0).standard_normal(s).astype(np.float32) for s in program.input_shapes]
        sent.append(File(path, target, module.encode(path, x)))
    found = np.full((ROUNDS, len(sent)), np.inf)
    groups = [slice(i, i + TOGETHER) for i in range(0, len(sent), TOGETHER)]
    for k in range(ROUNDS):
        for group in groups[:: 1 if k % 2 == 0 else -1]:
            _, times = device.ask("profile", sent[group], Settings(num_runs=-(-runs // ROUNDS), warmup_runs=10))
            found[k, group] = [float(t[0][0].min()) / 1e3 for t in times]
    found.sort(0)
    return found[0].tolist(), float(np.median(found[1] / found[0])) if len(sent) else 1.0


def host_rows(target: str, device: Any, runs: int, folder: Path, only: str) -> tuple[list[Measured], float]:
    """Every case at every width, and the spread of the rounds."""
    module, files = targets.get(target), []
    for name, kind, make, shape in (c for c in cases() if only in c[0]):
        for bits in bits_of(target, kind):
            path = folder / f"{len(files)}{module.SUFFIX}"
            try:
                program = program_of(Within(make()), shape, bits)
                module.lower(program, path, module.Options())
            except Exception as error:
                log(f"  {target} {name} {bits}: left out: {subjects.one_line(error)}")
                continue
            files.append((path, program))
        log(f"  {target} {name}")
    costs, spread = timed(target, device, files, runs)
    rows = [([w for _, w in works(p)], cost, path.stat().st_size) for (path, p), cost in zip(files, costs, strict=True)]
    return rows, spread


def refused(target: str, facts: dict[str, Any], spread: float) -> list[str]:
    """What speaks against a host's table; float elementwise work beside a convolution can be too little to tell."""
    found = [f"rounds differ by {spread:.2f} times"] if spread > BUSY else []
    cheap = {k for k in facts["kinds"] if k.split("/")[0] in FREE or k in ("add/32", "mul/32", "mean/32")}
    computes = {k: v for k, v in facts["kinds"].items() if k not in cheap}
    nothing = [k for k, v in computes.items() if not any(v["terms"])]
    return [*found, *([f"no cost was found for {', '.join(nothing)}"] if nothing else [])]


def core_rows(core: str, folder: Path) -> Iterator[Measured]:
    """Every layer of every chain that fits the core's board, and the call around them."""
    module, board = targets.get(core), connect(f"qemu:{core}")
    for name, make, shape in SMALL if core == "cortex-m0" else CHAINS:
        for bits in (8, 4, 2):
            program = program_of(make(), [shape], bits)
            path = folder / f"{name}{bits}" / f"model{module.SUFFIX}"
            path.parent.mkdir(parents=True)
            module.lower(program, path, module.Options())
            found = board.profile(path, core, program, Settings(num_runs=1), [np.zeros((1, *shape), np.float32)])
            counted = {x.layer: x.instructions or 0 for x in found.layers}
            for layer, work in works(program):
                yield [work], float(counted.get(layer, 0)), 0  # what is no step of the firmware costs nothing
            yield [w for _, w in works(program)], float(found.total), int(found.figures["flash_bytes"])
        log(f"  {core} {name}")


def fitted(target: str, rows: Sequence[Measured]) -> dict[str, Any]:
    """Call, tiles and coefficients by the least relative squares; the tile of each kind that fits best."""
    keys = sorted({key(w) for ws, _, _ in rows for w in ws})
    tiles = dict.fromkeys(keys, (1, 1))
    solved, best = _solve(rows, keys, tiles)
    for _ in range(2):
        for k in keys:
            if k.split("/")[0] not in WEIGHTED:
                continue
            for tile in TILES:
                trial, error = _solve(rows, keys, {**tiles, k: tile})
                if error < best * 0.999:
                    tiles, solved, best = {**tiles, k: tile}, trial, error
    found = {k: {"tile": tiles[k], "terms": [tidy(c) for c in solved[k]]} for k in keys}
    return {"call": tidy(solved["call"][0]), "kinds": found}


def tidy(value: float) -> float:
    """Six digits, and 0 for what rounding errors left."""
    return float(f"{value:.6g}") if value > 1e-9 else 0.0


def key(work: Work) -> str:
    return f"{work.kind}/{work.bits}"


def _solve(rows: Sequence[Measured], keys: Sequence[str], tiles: dict[str, tuple[int, int]]) -> tuple[dict[str, Any], float]:
    width = {k: len(terms(next(w for ws, _, _ in rows for w in ws if key(w) == k))) for k in keys}
    start, place = 1, {}
    for k in keys:
        place[k] = slice(start, start + width[k])
        start += width[k]
    a, b = np.zeros((len(rows), start)), np.array([cost for _, cost, _ in rows])
    least = np.maximum(b, LEAST)
    for i, (ws, _, _) in enumerate(rows):
        a[i, 0] = 1
        for w in ws:
            a[i, place[key(w)]] += terms(w, tiles[key(w)])
    a[[i for i, (_, _, size) in enumerate(rows) if not size], 0] = 0  # layers of firmware are counted without the call
    scale = np.maximum(np.abs(a / least[:, None]).max(0), 1e-12)
    x, error = nnls(a / least[:, None] / scale, b / least, maxiter=10_000)
    x = x / scale
    return {"call": x[:1], **{k: x[s] for k, s in place.items()}}, float(error)


def sizes(target: str, rows: Sequence[Measured]) -> list[float]:
    """Coefficients of a file's bytes beyond its weights."""
    known = [(ws, size - sum(_bytes(target, w) for w in ws)) for ws, _, size in rows if size]
    if not known:
        return [0.0] * len(size_terms([], target))
    a, b = np.array([size_terms(ws, target) for ws, _ in known]), np.array([s for _, s in known])
    return [round(float(c), 1) for c in nnls(a / b[:, None], np.ones(len(b)))[0]]


def _bytes(target: str, work: Work) -> float:
    return weight_bytes(work, target)


def networks() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Networks to check a table on, with samples."""
    digits = subjects.ROOT / "examples" / "digits" / "recipe.yaml"
    from edgekit import source

    settings = recipe.load(digits)
    yield "digits", source.load_model(settings.model), source.load_data(settings.data).calibration[:8]
    for name in NETS:
        net = subjects.subject(name)
        yield name, net.model, net.calibration[:8]


def checked(target: str, device: Any, made: Table, runs: int, folder: Path) -> list[dict[str, Any]]:
    """Predicted and measured cost and size of each network."""
    module, files, named = targets.get(target), [], []
    for name, model, x in networks():
        for bits in bits_of(target, "conv"):
            if bits == 2:
                continue
            program = compressed(model, x, bits, name)
            path = folder / f"{name}-{bits}" / f"model{module.SUFFIX}"
            path.parent.mkdir(parents=True)
            try:
                module.lower(program, path, module.Options())
                cost, size = None, path.stat().st_size
                if target in CORES:
                    found = device.profile(path, target, program, Settings(num_runs=1, per_layer=False), [x[:1].numpy()])
                    cost, size = found.total, int(found.figures["flash_bytes"])
            except Exception as error:
                log(f"  {target} {name} {bits}: left out: {subjects.one_line(error)}")
                continue
            files.append((path, program))
            named.append((name, bits, size, cost))
    costs = [c for *_, c in named] if target in CORES else timed(target, device, files, runs)[0]
    rows = []
    for (name, bits, size, _), (_, program), cost in zip(named, files, costs, strict=True):
        found = [w for _, w in works(program)]
        predicted, left = made.total(found)
        rows.append({
            "model": name, "bits": bits, "predicted": round(predicted, 1), "measured": round(cost, 1),
            "predicted_bytes": round(made.bytes(found)), "bytes": size,
            "not_modelled": sorted({w.kind for w in left}),
        })  # fmt: skip
        log(f"  {target} {name} {bits}: predicted {predicted:,.1f}, measured {cost:,.1f} ({predicted / cost - 1:+.0%})")
    return rows


def resized(path: Path) -> dict[str, Any]:
    """A table with its sizes fitted again from the bytes in it."""
    table = json.loads(path.read_text())
    target = table["target"]
    table["size"] = sizes(target, [([Work(**w) for w in r["works"]], r["cost"], r["bytes"]) for r in table["rows"]])
    found = Table(target, table["unit"], "", "", 0.0, {}, tuple(table["size"]))
    nets = {name: (model, x) for name, model, x in networks()}
    for net in table["nets"]:
        model, x = nets[net["model"]]
        net["predicted_bytes"] = round(found.bytes([w for _, w in works(compressed(model, x, net["bits"], net["model"]))]))
    return table  # type: ignore[no-any-return]


def compressed(model: nn.Module, x: Tensor, bits: int, name: str) -> FrozenProgram:
    """A network to check a table on, with weights of so many bits."""
    block = recipe.Block("rewrite", Rewrite(fuse=False))
    if bits != FLOAT:
        block = recipe.Block("ptq", PTQ(weights=f"int{bits}", samples=8))  # type: ignore[arg-type]
    return apply(model, [block], Data(calibration=x), name=name).program


def made(target: str, device: str, runs: int, earlier: Path | None, only: str = "") -> dict[str, Any]:
    """A whole table.

    Args:
        earlier: one whose measured operators are fitted again.
        only: cases with this in their name, for trying the script out.

    Raises:
        SystemExit: the measurements are no good.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = connect(f"qemu:{target}" if target in CORES else device)
        (folder / "check").mkdir()
        spread = 0.0
        if earlier is not None:
            rows = [([Work(**w) for w in r["works"]], r["cost"], r["bytes"]) for r in json.loads(earlier.read_text())["rows"]]
        elif target in CORES:
            rows = list(core_rows(target, folder))
        else:
            rows, spread = host_rows(target, place, runs, folder, only)
        facts = fitted(target, rows)
        if target in HOST and not only and (wrong := refused(target, facts, spread)):
            raise SystemExit(f"{target}: {'; '.join(wrong)}; nothing is written: measure on a machine that does nothing else")
        kinds = {k: (tuple(v["tile"]), tuple(v["terms"])) for k, v in facts["kinds"].items()}
        size = sizes(target, rows)
        trial = Table(target, unit(target), "", "", facts["call"], kinds, tuple(size))
        nets = checked(target, place, trial, runs, folder / "check")
    errors = [abs(trial.total(ws)[0] - (0 if size else trial.call) - c) / max(c, LEAST) for ws, c, size in rows]
    how = "instructions of layers counted on an emulated board, chains of layers with random weights"
    if target in HOST:
        how = f"least time of {runs} calls of single operators in {ROUNDS} rounds, one thread, four in turn"
    return {
        "target": target, "unit": unit(target), "machine": machine(target, place), "method": f"{how}; {len(rows)} measurements",
        **({"spread": round(spread, 3)} if spread else {}),
        **facts, "size": size, "nets": nets, "fit_error": round(float(np.median(errors)), 4),
        "rows": [{"works": [plain(w) for w in ws], "cost": round(c, 3), "bytes": b} for ws, c, b in rows],
    }  # fmt: skip


def plain(work: Work) -> dict[str, Any]:
    """Its fields that are not the defaults."""
    return {f.name: v for f in fields(work) if (v := getattr(work, f.name)) != f.default}


def text_of(table: dict[str, Any]) -> str:
    """JSON with a line for each kind, network and measured operator."""
    lines = []
    for k, v in table.items():
        if isinstance(v, dict):
            inner = ",\n".join(f"  {json.dumps(x)}: {json.dumps(y)}" for x, y in v.items())
            lines.append(f" {json.dumps(k)}: {{\n{inner}\n }}")
        elif isinstance(v, list) and v and isinstance(v[0], dict):
            inner = ",\n".join(f"  {json.dumps(x)}" for x in v)
            lines.append(f" {json.dumps(k)}: [\n{inner}\n ]")
        else:
            lines.append(f" {json.dumps(k)}: {json.dumps(v)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def unit(target: str) -> str:
    return "instructions" if target in CORES else "microseconds"


def machine(target: str, place: Any) -> str:
    """In words."""
    if target in CORES:
        return f"{place.board.title} under QEMU"
    known = environment.describe()
    return f"{known['processor']} ({known['machine']}, {known['cores']} cores)" if place.name == "local" else place.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=[*HOST, *CORES], choices=[*HOST, *CORES])
    parser.add_argument("--device", default="local")
    parser.add_argument("--out", type=Path, default=TABLES)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument(
        "--sizes", action="store_true", help="only fit the sizes again, from the bytes in the tables that are there"
    )
    parser.add_argument("--only", default="", help="cases with this in their name; give --out, for trying the script out")
    parser.add_argument("--refit", action="store_true", help="take the measured operators from the tables that are there")
    given = parser.parse_args()
    if given.only and given.out == TABLES:
        parser.error("--only is for trying the script out; give --out FOLDER")
    torch.set_num_threads(1)
    for target in given.targets:
        path = given.out / f"{target}.json"
        if given.sizes:
            found = resized(path)
        else:
            found = made(target, given.device, given.runs, path if given.refit else None, given.only)
        given.out.mkdir(exist_ok=True)
        write_whole(given.out / f"{target}.json", text_of(found))
        rows = [
            {"target": target, "device": found["machine"], "variant": "modelled", "unit": found["unit"], "model": n["model"],
             "weight_bits": n["bits"], **{k: v for k, v in n.items() if k not in ("model", "bits") and v not in (None, [])},
             "error": round(n["predicted"] / n["measured"] - 1, 4), "size_error": round(n["predicted_bytes"] / n["bytes"] - 1, 4)}
            for n in found["nets"]
        ]  # fmt: skip
        if given.out == TABLES:
            write("costs", rows, NOTES, keep=True)


NOTES = [
    "Predicted by tables of single operators; none of these networks was used to make them. Microseconds are of the named "
    "machine, instructions of any core of that kind.",
]

if __name__ == "__main__":
    main()
