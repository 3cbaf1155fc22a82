"""Write docs/benchmarks.md from benchmarks/results/*.json, and from nothing else: python benchmarks/make_docs.py"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import binary_docs
import binary_host_docs
import binary_net_docs
import costs_docs
import firmware_docs
import lowrank_docs
import ptq_docs
import snn_docs
import snn_nir
import snn_simulators_docs

from edgekit.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "resnet20": "ResNet-20 (CIFAR-10)",
    "resnet8": "ResNet-8 (CIFAR-10)",
    "dscnn": "DS-CNN (keywords)",
    "mobilenet": "MobileNetV1-0.25 (96 x 96)",
    "autoencoder": "auto-encoder (sound)",
    "resnet8_w4a8": "ResNet-8, int4 weights",
    "dscnn_w4a8": "DS-CNN, int4 weights",
}
Row = Mapping[str, Any]


def main() -> None:
    parts = [_HEAD]
    for name, write in SECTIONS.items():
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        if path.is_file():
            found = json.loads(path.read_text())
            parts += [write(found["rows"]), _origin(name, found)]
    write_whole(ROOT / "docs" / "benchmarks.md", "\n\n".join(p.strip() for p in parts) + "\n")


_HEAD = """
# Benchmarks

<!-- written by `make benchmarks-docs` from benchmarks/results/*.json; do not edit -->

Ours and what a user would pick instead, on the same networks and samples, measured in one run by the scripts in `benchmarks/`.
Accuracy is of the files themselves, in percent of 1000 samples (its standard error is about one point, so differences below that
say little). A bound stands behind a figure as (at least / at most ...); **bold** marks a bound that is missed.
"""


def ptq(rows: Sequence[Row]) -> str:
    """Accuracy and size by model, weight bits and variant."""
    lines = ["## Accuracy and size after training", "", _SEEDS]
    for model in _unique(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == model]
        real = next(r for r in mine if r["variant"] == "float")
        lines += ["", f"### {TITLES[model]}: float {real['accuracy']:.1f} %, {real['bytes']:,} bytes of weights"]
        for bits in (8, 4):
            chosen = [r for r in mine if r["weight_bits"] == bits]
            if chosen:
                lines += ["", f"{bits}-bit weights{', first and last layer 8' if bits == 4 else ''}, 8-bit activations:", ""]
                lines += _ptq_table(chosen) + _behind(chosen)
    return "\n".join(lines)


_SEEDS = """
Seed 0 calibrates on the samples of the example's recipe, seeds 1 and 2 on as many others drawn from the training samples; where a
method draws random numbers it takes the same seed. Other tools' files are made for seed 0 only; MLPerf's
have a calibration of their own.
"""


def _ptq_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| made by | format | accuracy, by seed | bytes | what it stores or takes |", "|---|---|---|---|---|"]
    for variant, target in _unique((r["variant"], r["target"]) for r in rows):
        chosen = [r for r in rows if (r["variant"], r["target"]) == (variant, target)]
        done = [r for r in chosen if "accuracy" in r]
        accuracy = " / ".join(_bounded(r["accuracy"], r.get("accuracy_bound"), "{:.1f}", least=True) for r in done)
        sizes = _unique(r["bytes"] for r in done)
        size = " / ".join(_bounded(s, done[0].get("bytes_bound"), "{:,}", least=False) for s in sizes)
        bounds = [f"at least {done[0]['accuracy_bound']}"] if done and "accuracy_bound" in done[0] else []
        at_most = f" (at most {done[0]['bytes_bound']:,})" if done and "bytes_bound" in done[0] else ""
        text = _unique(_detail(r) for r in chosen)
        lines.append(
            f"| {variant} | {target} | {accuracy}{_brackets(bounds)} | {size}{at_most} | {'; '.join(filter(None, text))} |"
        )
    return lines


def _behind(rows: Sequence[Row]) -> list[str]:
    """Where another tool's file of the same format, weight bits and seed is more accurate or smaller than ours."""
    found = []
    for mine in (r for r in rows if r["variant"] == "edgekit" and r["seed"] == 0):
        others = [
            r for r in rows if r["target"] == mine["target"] and r["variant"] != "edgekit" and "accuracy" in r and not r["seed"]
        ]
        for key, better in (("accuracy", max), ("bytes", min)):
            best = better(others, key=lambda r: r[key], default=None)
            if best is not None and better(best[key], mine[key]) != mine[key]:
                gap = f"{abs(best[key] - mine[key]):.1f} points" if key == "accuracy" else f"{mine[key] - best[key]:,} bytes"
                words = "less accurate" if key == "accuracy" else "larger"
                found.append(f"Behind: {mine['target']}, {gap} {words} than {best['variant']}.")
    return ["", *found] if found else []


def _detail(row: Row) -> str:
    parts = [row[k] for k in ("remarks", "input", "settings") if k in row]
    if row.get("storage"):
        parts.append("weights " + " and ".join(row["storage"]))
    if "macs" in row:
        parts.append("MACs " + ", ".join(f"{100 * v:.0f} % {k}" for k, v in row["macs"].items()))
    return ", ".join(parts)


def latency(rows: Sequence[Row]) -> str:
    """Latency ratios in each runtime."""
    lines = [
        "## Latency",
        "",
        _LATENCY,
        "",
        "| network | weights | runtime | file | input | µs | edgekit / this |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        ratio = f"{r['edgekit_over_this']:.2f}" if "edgekit_over_this" in r else ""
        if r.get("best_peer") and r.get("edgekit_over_this", 0) > 1:
            ratio = f"**{ratio}**"
        cells = [
            TITLES[r["model"]],
            f"int{r['weight_bits']}",
            r["target"],
            r["variant"],
            r["input"],
            f"{r['latency_us']:.0f}",
            ratio,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_slower(rows), *_remarks(rows)])


def _slower(rows: Sequence[Row]) -> list[str]:
    """Every group in which a file of another tool is faster."""
    found = []
    for r in rows:
        if r.get("latency_ratio", 0) > r.get("latency_ratio_bound", 1):
            where = f"{TITLES[r['model']]}, int{r['weight_bits']}, {r['target']}"
            found.append(
                f"* Slower: {where}: {r['latency_ratio']:.2f} times {r['latency_ratio_to']}{_quartiles(r, 'latency_ratio')}."
            )
    return ["", *found] if found else []


_LATENCY = """
One thread, each runtime alone, all files of a group in turn in each round; the last column is the median over rounds of our
time divided by that file's. Below 1 ours is faster; the goal is at most 1.0 against every one, and bold marks the worst where
it is missed. Times in µs are of a shared machine and only good for comparison within a group.
"""


def overhead(rows: Sequence[Row]) -> str:
    """Export time beside the bare converter."""
    return _plain(
        "## Time to export",
        "Processor seconds after a warm-up, beside the bare converter of the same graph (at most 1.15 times as long).",
        rows, {"model": "network", "target": "format", "export_s": "edgekit", "converter_s": "converter alone"},
        ("export_time_ratio", "export_time_ratio_bound", "ratio"),
    )  # fmt: skip


def memory(rows: Sequence[Row]) -> str:
    """Peak memory of calibration."""
    return _plain(
        "## Memory of calibration and reconstruction",
        "Peak resident MB of a process that quantizes, with 64 and with 1024 samples (at most 1.2 times as much).",
        rows, {"model": "network", "variant": "what", "peak_memory_mb_64": "64", "peak_memory_mb_1024": "1024"},
        ("memory_ratio", "memory_ratio_bound", "ratio"),
    )  # fmt: skip


def devices(rows: Sequence[Row]) -> str:
    """Runtimes side by side on the same program, and what measuring and sending cost."""
    lines = ["## The three runtimes on the same program", "", _RUNTIMES, ""]
    lines += [
        "| network | numbers | runtime | device | µs | p90 | over the fastest | load ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in (r for r in rows if r["part"] == "runtimes"):
        cells = [TITLES[r["model"]], r["variant"], r["runtime"], r["device"], f"{r['latency_us']:.1f}", f"{r['p90_us']:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{r['over_fastest']:.2f}", f"{r['load_ms']:.1f}"]) + " |")
    lines += ["", "### What measuring and sending cost", ""]
    for r in sorted(rows, key=lambda r: r["part"] != "overhead"):
        if r["part"] == "overhead":
            ratio = _bounded(r["overhead_ratio"], r["overhead_ratio_bound"], "{:.3f}", least=False)
            lines.append(f"* {TITLES[r['model']]}, {r['target']}: a profile's time over a bare loop's: {ratio} (at most 1.03)")
        elif r["part"] == "agreement":
            low, high = r["agreement_ratio_bounds"]
            ratio = f"{r['agreement_ratio']:.3f}" if low <= r["agreement_ratio"] <= high else f"**{r['agreement_ratio']:.3f}**"
            both = f"{r['latency_ms']} ms by `edgekit profile`, {r['litert_benchmark_ms']} ms by `litert-benchmark` in turn"
            lines.append(f"* {LARGE[r['model']]}, {r['variant']}: {both}, ratio {ratio} (at least {low}, at most {high})")
        elif r["part"] == "upload":
            ratio = _bounded(r["upload_ratio"], r["upload_ratio_bound"], "{:.2f}", least=False)
            lines.append(f"* {r['megabytes']} MB over ssh: {r['upload_s']} s, scp {r['scp_s']} s, ratio {ratio} (at most 1.3)")
        elif r["part"] == "leaks":
            left = [f"{v} {k.removeprefix('left_')}" for k, v in r.items() if k.startswith("left_")]
            lines.append(f"* {r['calls']} profiles in a row, {r['device']}: left behind {', '.join(left)}")
    return "\n".join(lines)


LARGE = {"resnet8": "ResNet-8 of eight times its channels", "mobilenet": "MobileNetV1 of width 1, 224 x 224"}

_RUNTIMES = """
Files of one frozen program, one thread, one process, a call of each in turn; the median, and the median ratio to the fastest of
the group. int4 stands only where the file stores four bits. Times are of a shared machine and only good for comparison within a
group.
"""


def devices_arm64(rows: Sequence[Row]) -> str:
    """Differences between this machine and the emulated arm64 Linux, and instructions there."""
    lines = [
        "## The same files on an emulated arm64 Linux",
        "",
        "Outputs beside those on this machine in steps of the output (at most 0 where the kernels round once, 3 for the builtin "
        "kernels of tflite-runtime), and instructions of one call for each multiply-accumulate.",
        "",
        "| network | runtime | samples | largest difference | values that differ | same class % | instructions | a MAC |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        worst = _bounded(r["max_lsb"], r["max_lsb_bound"], "{:g}", least=False)
        same = "-" if r["model"] == "autoencoder" else f"{r['same_class_percent']:g}"
        lines.append(
            f"| {TITLES.get(r['model'], r['model'])} | {r['variant']} | {r['samples']} | {worst} | {r['differing_values']:,} of "
            f"{r['values']:,} | {same} | {r['instructions']:,} | {r['instructions_per_mac']:.3f} |"
        )
    return "\n".join(lines)


def _plain(title: str, text: str, rows: Sequence[Row], columns: Mapping[str, str], ratio: tuple[str, str, str]) -> str:
    key, bound, label = ratio
    lines = [title, "", text, "", "| " + " | ".join([*columns.values(), label]) + " |", "|---" * (len(columns) + 1) + "|"]
    for r in rows:
        cells = [str(TITLES.get(r[c], r[c])) for c in columns]
        ratio_text = _bounded(r[key], r[bound], "{:.2f}", least=False) + _quartiles(r, key)
        lines.append("| " + " | ".join([*cells, ratio_text]) + " |")
    return "\n".join([*lines, *_remarks(rows)])


def _quartiles(row: Row, key: str) -> str:
    """ " (quartiles 0.98 to 1.03)" where the row has them."""
    found = row.get(f"{key}_quartiles")
    return f" (quartiles of the rounds {found[0]:.2f} to {found[1]:.2f})" if found else ""


def _bounded(value: float, bound: float | None, form: str, least: bool) -> str:
    missed = bound is not None and (value < bound - 1e-9 if least else value > bound + 1e-9)
    text = form.format(value)
    return f"**{text}**" if missed else text


def _brackets(parts: Sequence[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""


def _remarks(rows: Sequence[Row]) -> list[str]:
    found = _unique(r["remarks"] for r in rows if "remarks" in r)
    return ["", *(f"* {text}" for text in found)] if found else []


def _origin(name: str, found: Mapping[str, Any]) -> str:
    known = found["environment"]
    packages = ", ".join(f"{k} {v}" for k, v in known["packages"].items() if v)
    notes = "".join(f"* {text}\n" for text in found.get("notes", ()))
    where = f"`{found['command']}` with one thread on {known['processor']}, Python {known['python']}, {packages}"
    return f"{notes}\n<sub>{where}. Data: `benchmarks/results/{name}.json`.</sub>"


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def ptq_front(rows: Sequence[Row]) -> str:
    """Few-bit accuracy by network and width: one line for each method, the files behind it."""
    lines = ["## Few bits after training", "", _FRONT]
    for model, w, a in _unique((r["model"], r["weight_bits"], r["activation_bits"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["weight_bits"], r["activation_bits"]) == (model, w, a)]
        lines += ["", f"{TITLES[model]}, {w}-bit weights, {a}-bit activations:", ""]
        lines += ["| method | steps | frozen program, by seed | files | processor s | peak MB |", "|---|---|---|---|---|---|"]
        for variant in _unique(r["variant"] for r in mine):
            here = [r for r in mine if r["variant"] == variant]
            frozen = [r for r in here if r["target"] == "frozen"]
            accuracy = " / ".join(_bounded(r["accuracy"], r.get("accuracy_bound"), "{:.1f}", least=True) for r in frozen)
            bounds = [f"at least {r['accuracy_bound']}" for r in frozen[:1] if "accuracy_bound" in r]
            files = ", ".join(f"{r['target']} {r['accuracy']:.1f}" for r in here if r["target"] != "frozen" and r["seed"] == 0)
            first = frozen[0]
            lines.append(
                f"| {variant} | {first['steps'] or ''} | {accuracy}{_brackets(bounds)} | {files} | {first['processor_s']:.0f} "
                f"| {first['peak_memory_mb']} |"
            )
    return "\n".join([*lines, *ptq_docs.firmware(rows, TITLES)])


_FRONT = """
Methods of [ptq.md](ptq.md) on the samples of the examples' recipes, accuracy in percent of the 1000 test samples. The processor
time is that of the whole compression; the memory that of its process, torch included.
"""


def reconstruction(rows: Sequence[Row]) -> str:
    """What an optimizer step costs, and what makes it fast."""
    lines = ["## Speed of reconstruction", "", _STEPS, ""]
    lines += ["| network | variant | ms a step | times edgekit |", "|---|---|---|---|"]
    for r in rows:
        bound = r.get("times_edgekit_bound")
        times = _bounded(r["times_edgekit"], bound, "{:.2f}", least=True) if "times_edgekit" in r else ""
        least = f" (at least {bound})" if bound else ""
        lines.append(f"| {TITLES[r['model']]} | {r['variant']} | {r['step_ms']:.1f} | {times}{least} |")
    return "\n".join(lines)


_STEPS = """
Processor time of one optimizer step of the first block (`brecq`, batch 32, one thread): ours; ours with one thing done as a
straightforward loop does it; and all of them so.
"""


def transformer(rows: Sequence[Row]) -> str:
    """The transformer example, stage by stage."""
    lines = [
        "## A transformer: int8 linear layers and GELU, attention and LayerNorm in float",
        "",
        "A two-layer encoder on spoken digits, 300 held-back recordings, each file verified layer by layer. The share in float",
        "is of multiply-accumulates, counted from shapes.",
        "",
        "| stage | accuracy | bytes | in float | largest difference from the frozen program, in steps | of any layer |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        size = f"{r['bytes']:,}" if "bytes" in r else ""
        share = f"{100 * r['float_macs']:.1f} %" if "float_macs" in r else ""
        apart = [f"{r[key]:.4g}" if key in r else "" for key in ("max_lsb", "layer_lsb")]
        lines.append(f"| {r['target']} | {r['accuracy']:.1f} | {size} | {share} | {apart[0]} | {apart[1]} |")
    return "\n".join(lines)


def ptq_transformer(rows: Sequence[Row]) -> str:
    """The transformer at several widths: a row for each variant, a column for each form of it."""
    forms = [t for t in ("frozen", "executorch", "tflite", "onnx") if any(r["target"] == t for r in rows)]
    lines = [
        "## A transformer at several widths, static and dynamic",
        "",
        "The same encoder and recordings; accuracy, and bytes of the frozen program's weights or of the file. The task "
        "saturates: the signal to quantization noise of the outputs and their cross-entropy on the same recordings tell more.",
        "",
        f"| variant | {' | '.join(forms)} | outputs, dB | loss | processor s | peak MB |",
        f"|---|{'---|' * len(forms)}---|---|---|---|",
    ]
    for variant in _unique(r["variant"] for r in rows):
        mine = {r["target"]: r for r in rows if r["variant"] == variant}
        cells = [f"{mine[t]['accuracy']:.1f}, {mine[t]['bytes']:,}" if t in mine else "" for t in forms]
        one = mine["frozen"]
        quality = [f"{one[k]:{form}}" if k in one else "" for k, form in (("output_db", ".1f"), ("loss", ".3f"))]
        lines.append(f"| {variant} | {' | '.join([*cells, *quality])} | {one['processor_s']} | {one['peak_memory_mb']} |")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[Sequence[Row]], str]] = {
    "ptq": ptq,
    "ptq_front": ptq_front,
    "ptq_peers": lambda rows: ptq_docs.peers(rows, TITLES),
    "reconstruction": reconstruction,
    "transformer": transformer,
    "ptq_transformer": ptq_transformer,
    "latency": latency,
    "overhead": overhead,
    "memory": memory,
    "devices_arm64": devices_arm64,
    "firmware": lambda rows: firmware_docs.firmware(rows, TITLES),
    "binary_firmware": binary_docs.firmware,
    "binary_host": binary_host_docs.binary_host,
    "binary_aarch64": binary_host_docs.binary_aarch64,
    "binary_aarch64_ways": binary_host_docs.aarch64_ways,
    "snn_nir": snn_nir.section,
    "snn_simulators": snn_simulators_docs.simulators,
    "snn_firmware": binary_docs.spiking,
    "snn_exit": binary_docs.early_exit,
    "devices": devices,
    "lowrank": lowrank_docs.lowrank,
    "lowrank_latency": lowrank_docs.latencies,
    "lowrank_attention": lowrank_docs.attention,
    "binary": binary_net_docs.networks,
    "binary_encoder": binary_net_docs.encoder,
    "snn": snn_docs.section,
    "costs": costs_docs.costs,
}


if __name__ == "__main__":
    main()
