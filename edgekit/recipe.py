"""Recipes: what ``edgekit run`` reads. The reference is docs/recipe.md, the JSON schema docs/recipe.schema.json.

A recipe is checked completely before anything is loaded or run; an error gives the file, the line, the key, what was found and
what is allowed. Factories and files are looked up beside the recipe first, then in the current folder.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from edgekit import marked_yaml
from edgekit.compress.binary.settings import Binary
from edgekit.compress.lowrank.settings import LowRank
from edgekit.compress.order import misplaced
from edgekit.compress.ptq.settings import PTQ, QAT
from edgekit.compress.repair.settings import Repair
from edgekit.compress.rewrite.settings import Rewrite
from edgekit.compress.spiking.settings import Spiking
from edgekit.errors import RecipeError
from edgekit.validation import Reader, closest, shown

__all__ = [
    "IN_MEMORY",
    "NAMED",
    "SETTINGS",
    "Block",
    "Recipe",
    "Target",
    "Verify",
    "dump",
    "in_memory",
    "load",
    "parse",
    "replace",
    "target",
]

_FORBID = ConfigDict(extra="forbid")

Settings = Rewrite | LowRank | Binary | Repair | PTQ | QAT | Spiking

SETTINGS: dict[str, type[Settings]] = {
    "rewrite": Rewrite,
    "lowrank": LowRank,
    "binary": Binary,
    "repair": Repair,
    "ptq": PTQ,
    "qat": QAT,
    "spiking": Spiking,
}
"""Compression block to its settings class."""

NAMED: dict[str, Mapping[str, Any]] = {
    "static_wi8_ai8": {"ptq": {"weights": "int8", "activations": "int8"}},
    "static_wi4_ai8": {"ptq": {"weights": "int4", "activations": "int8", "method": "gptq"}},
}
"""Named compressions in the grammar of ai-edge-quantizer: calibrated, weight type, activation type."""

IN_MEMORY = "in memory"
"""What the recipe in a run folder says of a model or data that was handed over in Python."""

TargetName = Literal[
    "executorch", "tflite", "onnx", "nir", "cortex-m0", "cortex-m3", "cortex-m4", "cortex-m7", "cortex-m33", "cortex-m55"
]  # fmt: skip


@dataclass(frozen=True, config=_FORBID, kw_only=True)
class Verify:
    """What counts as equal.

    Attributes:
        max_lsb: largest difference, in steps of the output's scale, of one layer that is fed the target's own inputs.
        max_accuracy_drop: largest loss of the task metric from the float model to an artefact, in its unit (percent points);
            null: any.
        samples: evaluation samples used, evenly spread; all if left out.
        layer_samples: how many of them the layer-by-layer check uses.
        devices: files are run and checked on these too; firmware is on its own board without being named here.
    """

    max_lsb: Annotated[int, Field(ge=0)] = 1
    max_accuracy_drop: Annotated[float, Field(ge=0)] | None = 0.5
    samples: Annotated[int, Field(ge=1)] | None = None
    layer_samples: Annotated[int, Field(ge=1)] = 4
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, config=_FORBID)
class Block:
    """One step of compression: a key of :data:`SETTINGS` and its settings."""

    kind: Literal["rewrite", "lowrank", "binary", "repair", "ptq", "qat", "spiking"]
    settings: Settings


@dataclass(frozen=True, config=_FORBID)
class Target:
    """A target and the options given for it (checked against the target's own ``Options``)."""

    name: TargetName
    options: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, config=_FORBID, kw_only=True)
class Recipe:
    """A whole recipe, resolved: paths are absolute, named compressions are written out.

    Attributes:
        model: ``file.py:factory``, ``package.module:factory`` or a ``.pt2`` file; the factory returns an ``nn.Module``.
        data: ``file.py:factory`` or ``package.module:factory``; the factory returns an ``edgekit.data.Data``.
        compress: what is done to the model, in order: ``rewrite``, ``lowrank``, ``binary``, ``repair``, ``ptq``, ``qat``,
            ``spiking``, or a name such as ``static_wi8_ai8``.
        targets: what it is lowered to, each a name or a name with options.
        verify: what counts as equal.
        profile: devices that files are measured on, such as ``local`` or ``qemu:mps2-an386``.
        seed: seed of everything random, unless a block has its own.
        name: short name of the model in files and reports.
    """

    model: str
    data: str
    compress: tuple[Block, ...]
    targets: tuple[Target, ...] = ()
    verify: Verify = Field(default_factory=Verify)
    profile: tuple[str, ...] = ()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "model"


def load(path: Path, *, files: bool = True) -> Recipe:
    """Read and check a recipe file.

    Args:
        files: the model and data files must be there; False for a run folder, which may have moved without them.

    Raises:
        RecipeError: it is missing, not YAML, or not a valid recipe.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; write one with `edgekit init`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text ({error})") from None
    return parse(text, str(path), path.parent, files=files)


def parse(text: str, name: str = "recipe.yaml", folder: Path = Path(), *, files: bool = True) -> Recipe:
    """Check the text of a recipe; relative paths are looked up in ``folder``, then in the current one. As :func:`load`."""
    return _checked(Reader(marked_yaml.parse(text, name), name), folder, files)


def in_memory(**values: Any) -> Recipe:
    """The recipe of a model and data that are no files, from the other keys of a recipe; None leaves a key out.

    Blocks of ``compress`` may be settings objects such as ``PTQ(weights="int4")``. Raises RecipeError.
    """
    given: dict[str, Any] = {k: v for k, v in values.items() if v is not None}
    for key in ("compress", "targets", "profile"):
        if isinstance(given.get(key), Sequence) and not isinstance(given[key], str):
            given[key] = list(given[key])
    if "compress" in given:
        blocks = given["compress"] if isinstance(given["compress"], list) else [given["compress"]]
        given["compress"] = [_as_block(b) for b in blocks]
    if isinstance(given.get("verify"), Verify):
        given["verify"] = dataclasses.asdict(given["verify"])
    document = marked_yaml.Document({"model": IN_MEMORY, "data": IN_MEMORY, **given}, {})
    return _checked(Reader(document, "the arguments"), Path(), False)


def _as_block(value: Any) -> Any:
    """A settings object as the mapping it stands for in a recipe; anything else as it is."""
    kind = next((k for k, settings in SETTINGS.items() if isinstance(value, settings)), None)
    return value if kind is None else {kind: dataclasses.asdict(value)}


def _checked(reader: Reader, folder: Path, files: bool) -> Recipe:
    if not isinstance(reader.document.value, dict):
        reader.fail((), f"found {shown(reader.document.value)}; expected the keys model, data, compress and targets")
    value = dict(reader.document.value)
    allowed = [f.name for f in dataclasses.fields(Recipe)]
    for key in value:
        if key not in allowed:
            reader.fail((key,), f"unknown key {key!r}{closest(key, allowed)}")
    seed = value.get("seed", 0)
    if "compress" in value:
        value["compress"] = () if value["compress"] == [] and not files else _blocks(value["compress"], seed, reader)
    if "targets" in value:
        value["targets"] = _targets(value["targets"], reader)
    if "profile" in value:
        value["profile"] = _devices(value["profile"], ("profile",), reader)
    if isinstance(value.get("verify"), dict):
        if "devices" in value["verify"]:
            value["verify"] = {**value["verify"], "devices": _devices(value["verify"]["devices"], ("verify", "devices"), reader)}
        value["verify"] = reader.check(Verify, value["verify"], ("verify",))
    for key in ("model", "data"):
        if isinstance(value.get(key), str):
            value[key] = _resolved(value[key], key, folder, reader, files)
    recipe: Recipe = reader.check(Recipe, value, ())
    return _with_target(recipe)


def _with_target(recipe: Recipe) -> Recipe:
    """The recipe whose mixed bits are chosen for its target, where it has one only and names none."""
    if len(recipe.targets) != 1:
        return recipe

    def filled(block: Block) -> Block:
        how = block.settings
        if not isinstance(how, PTQ) or how.mixed is None or how.mixed.target:
            return block
        return Block(block.kind, dataclasses.replace(how, mixed=dataclasses.replace(how.mixed, target=recipe.targets[0].name)))

    return dataclasses.replace(recipe, compress=tuple(map(filled, recipe.compress)))


def replace(
    recipe: Recipe, *, seed: int | None = None, device: str | None = None, targets: Sequence[Target] | None = None
) -> Recipe:
    """The recipe with values from the command line: ``seed`` and ``device`` go into every block that has such a setting."""
    if seed is not None and not 0 <= seed < 2**32:
        raise RecipeError(f"seed {seed}: expected 0 to {2**32 - 1}")
    if device not in (None, "cpu", "cuda"):
        raise RecipeError(f"device {device!r}: expected cpu or cuda")
    given: dict[str, Any] = {k: v for k, v in {"seed": seed, "device": device}.items() if v is not None}

    def changed(settings: Settings) -> Settings:
        known = {f.name for f in dataclasses.fields(settings)}
        return dataclasses.replace(settings, **{k: v for k, v in given.items() if k in known})

    return dataclasses.replace(
        recipe,
        compress=tuple(Block(b.kind, changed(b.settings)) for b in recipe.compress),
        seed=recipe.seed if seed is None else seed,
        targets=recipe.targets if targets is None else tuple(targets),
    )


def dump(recipe: Recipe, folder: Path) -> str:
    """The recipe as YAML with every setting written out; paths relative to ``folder``, where it will lie."""
    value = dataclasses.asdict(recipe)
    for key in ("model", "data"):
        file, colon, factory = _split(value[key])
        if Path(file).is_absolute():
            value[key] = os.path.relpath(os.path.realpath(file), os.path.realpath(folder)) + colon + factory
    value["compress"] = [{b["kind"]: b["settings"]} for b in value["compress"]]
    value["targets"] = [{t["name"]: t["options"]} if t["options"] else t["name"] for t in value["targets"]]
    plain = TypeAdapter(dict[str, Any]).dump_python(value, mode="json")
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


def _blocks(value: Any, seed: Any, reader: Reader) -> tuple[Block, ...]:
    items = [value] if isinstance(value, str | dict) else value
    if items == []:
        reader.fail(("compress",), f"the list is empty; expected blocks ({', '.join(SETTINGS)}) or names ({', '.join(NAMED)})")
    if not isinstance(items, list):
        reader.fail(("compress",), f"found {shown(value)}; expected a list of blocks ({', '.join(SETTINGS)}) or names")
    blocks = []
    for i, item in enumerate(items):
        path: marked_yaml.Path = ("compress", i) if isinstance(value, list) else ("compress",)
        if isinstance(item, str) and item not in SETTINGS:
            if item not in NAMED:
                reader.fail(path, f"found {item!r}{closest(item, [*NAMED, *SETTINGS])}")
            item = NAMED[item]
        kind, settings = _single(item, SETTINGS, path, reader)
        if isinstance(settings, dict) and "seed" in {f.name for f in dataclasses.fields(SETTINGS[kind])}:
            settings = {"seed": seed, **settings}
        blocks.append(Block(kind, reader.check(SETTINGS[kind], settings, (*path, kind))))  # type: ignore[arg-type]
    if (wrong := misplaced([block.kind for block in blocks])) is not None:
        reader.fail(("compress", wrong[0]) if isinstance(value, list) else ("compress",), wrong[1])
    return tuple(blocks)


def _targets(value: Any, reader: Reader) -> tuple[Target, ...]:
    from edgekit.targets import TARGETS

    items = [value] if isinstance(value, str | dict) else value
    if not isinstance(items, list):
        reader.fail(("targets",), f"found {shown(value)}; expected a list of {', '.join(TARGETS)}")
    targets: list[Target] = []
    for i, item in enumerate(items):
        path: marked_yaml.Path = ("targets", i) if isinstance(value, list) else ("targets",)
        name, options = _single(item, TARGETS, path, reader)
        if name in [t.name for t in targets]:
            reader.fail(path, f"{name!r} stands twice; keep one")
        _check_options(name, options, path, reader)
        targets.append(Target(name, options))  # type: ignore[arg-type]
    return tuple(targets)


def _devices(value: Any, where: marked_yaml.Path, reader: Reader) -> tuple[str, ...]:
    """Names of devices; whether what they need is there is seen when they are connected."""
    from edgekit.devices import DEVICES

    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        reader.fail(where, f"found {shown(value)}; expected a list of devices ({', '.join(DEVICES)})")
    for i, item in enumerate(items):
        path: marked_yaml.Path = (*where, i) if isinstance(value, list) else where
        if not isinstance(item, str) or item.partition(":")[0] not in DEVICES:
            reader.fail(path, f"found {shown(item)}{closest(str(item).partition(':')[0], list(DEVICES))}")
        if item in items[:i]:
            reader.fail(path, f"{item!r} stands twice; keep one")
    return tuple(items)


def target(name: str, options: Mapping[str, Any]) -> Target:
    """A target from the command line, checked as in a recipe. Raises RecipeError."""
    (found,) = _targets([{name: dict(options)}], Reader(marked_yaml.Document(None, {}), "--target"))
    return found


def _check_options(name: str, options: Any, path: marked_yaml.Path, reader: Reader) -> Any:
    """The options as the target's own ``Options``; unknown keys and wrong values fail at their line."""
    from edgekit.targets import get

    kind = get(name).Options
    if not isinstance(options, dict):
        reader.fail((*path, name), f"found {shown(options)}; expected a mapping of options")
    known = [f.name for f in dataclasses.fields(kind)]
    for key in options:
        if key not in known:
            reader.fail((*path, name, key), f"unknown option {key!r}{closest(key, known)}")
    return reader.check(kind, options, (*path, name))


def _single(item: Any, allowed: Mapping[str, Any], path: marked_yaml.Path, reader: Reader) -> tuple[str, Any]:
    """A word, or a mapping of one key, as (key, value)."""
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping) or len(item) != 1:
        reader.fail(path, f"found {shown(item)}; expected one key of: {', '.join(allowed)}")
    ((key, value),) = item.items()
    if key not in allowed:
        reader.fail((*path, key), f"found {key!r}{closest(key, list(allowed))}")
    return key, {} if value is None else value


def _split(spec: str) -> tuple[str, str, str]:
    file, colon, factory = spec.rpartition(":")
    return (file, colon, factory) if colon else (spec, "", "")


def _resolved(spec: str, key: str, folder: Path, reader: Reader, files: bool) -> str:
    """``spec`` with an absolute path, where it names a file."""
    if spec == IN_MEMORY and not files:
        return spec
    file, colon, factory = _split(spec)
    if colon and factory.isidentifier() and not file.endswith(".py"):
        return spec
    if not (file.endswith(".py") and factory.isidentifier()) and not (key == "model" and spec.endswith(".pt2")):
        kinds = "file.py:factory, package.module:factory" + (" or a .pt2 file" if key == "model" else "")
        reader.fail((key,), f"found {spec!r}; expected {kinds}")
    for base in (folder, Path()):
        if (base / file).is_file():
            return os.path.abspath(base / file) + colon + factory
    if files:
        reader.fail((key,), f"{file}: no such file in {os.path.abspath(folder)} or the current folder")
    return os.path.abspath(folder / file) + colon + factory
