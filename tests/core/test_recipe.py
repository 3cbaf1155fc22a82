"""Recipes: what is taken, and that every fault is named with its line and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from core.sources import ROOT

from edgekit import recipe, schema
from edgekit.compress.ptq.settings import PTQ
from edgekit.errors import RecipeError

GOOD = """\
name: tiny
model: model.py:build
data: package.data:load
compress:
  - ptq: {weights: int4, scopes: {'head': int8}}
targets:
  - executorch
  - tflite: {io: float}
verify: {max_lsb: 1}
seed: 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text("def build(): ...\n")
    (tmp_path / "float.pt2").write_text("")
    return tmp_path


def test_a_recipe_is_read_with_defaults_and_the_seed_goes_into_its_blocks(folder: Path) -> None:
    found = recipe.parse(GOOD, folder=folder)
    assert found.model == f"{folder}/model.py:build"
    assert found.data == "package.data:load"
    assert found.compress == (recipe.Block("ptq", PTQ(weights="int4", scopes={"head": "int8"}, seed=3)),)
    assert [(t.name, t.options) for t in found.targets] == [("executorch", {}), ("tflite", {"io": "float"})]
    assert found.verify.max_lsb == 1 and found.verify.max_accuracy_drop == 0.5


@pytest.mark.parametrize("name", recipe.NAMED)
def test_named_recipes_say_what_their_name_says(name: str, folder: Path) -> None:
    (block,) = recipe.parse(f"model: model.py:f\ndata: a:f\ncompress: {name}\n", folder=folder).compress
    weights, activations = name.removeprefix("static_").split("_")
    assert block.settings.weights == weights.replace("wi", "int")
    assert block.settings.activations == activations.replace("ai", "int")


@pytest.mark.parametrize("kind", recipe.SETTINGS)
def test_every_block_is_taken_without_settings(kind: str, folder: Path) -> None:
    """With the recipe's seed, where it has one."""
    after = "" if kind in ("ptq", "spiking") else "  - ptq\n"
    text = f"model: model.py:f\ndata: a:f\nseed: 3\ncompress:\n  - {kind}\n{after}"
    assert getattr(recipe.parse(text, folder=folder).compress[0].settings, "seed", 3) == 3


@pytest.mark.parametrize("where", [".", "..", "a/b"])
def test_a_dumped_recipe_reads_back_equal_from_another_folder(where: str, folder: Path) -> None:
    found = recipe.parse(GOOD, folder=folder)
    there = (folder / where).resolve()
    there.mkdir(parents=True, exist_ok=True)
    text = recipe.dump(found, there)
    assert str(folder) not in text  # no path of this machine
    assert recipe.parse(text, folder=there) == found


FAULTS = {
    "modle: model.py:build": (1, "unknown key 'modle'; did you mean 'model'? allowed: model, data"),
    "model: nowhere.py:build": (1, "nowhere.py: no such file"),
    "model: model.py": (1, "expected file.py:factory, package.module:factory or a .pt2 file"),
    "name: a b": (1, "found 'a b'"),
    "name: x\ncompress:\n  - ptq: {weights: int5}": (3, "compress.0.ptq.weights: found 'int5'; did you mean"),
    "name: x\ncompress:\n  - ptq:\n      weigths: int4": (4, "unknown key 'weigths'; did you mean 'weights'?"),
    "name: x\ncompress:\n  - ptq:\n      samples: 0": (4, "found 0; expected greater than or equal to 1"),
    "name: x\ncompress:\n  - ptq:\n      scopes: {'(': int8}": (4, "'(' is not a regular expression"),
    "name: x\ncompress:\n  - spiking: {early_exit: {max_dropp: 1}}": (
        3,
        "'max_dropp'; did you mean 'max_drop'? allowed: max_drop, samples",
    ),
    "name: x\ncompress:\n  - spiking: {early_exit: 3}": (3, "found 3; expected a mapping with the keys max_drop, samples"),
    "name: x\ncompress:\n  - binary: {stages: [{epoch: 3}]}": (3, "unknown key 'epoch'; did you mean 'epochs'?"),
    "name: x\ncompress:\n  - pqt: {}": (3, "found 'pqt'; did you mean"),
    "compress: static_wi8": (1, "found 'static_wi8'; did you mean 'static_wi8_ai8'?"),
    "compress: []": (1, "the list is empty"),
    "compress:\n  - ptq: 3": (2, "found 3; expected a mapping"),
    "compress:\n  - {ptq: {}, qat: {}}": (2, "expected one key of: rewrite, "),
    "targets: [tflit]": (1, "found 'tflit'; did you mean 'tflite'?"),
    "targets:\n  - tflite\n  - tflite": (3, "'tflite' stands twice"),
    "targets:\n  - tflite: {io: int4}": (2, "targets.0.tflite.io: found 'int4'"),
    "targets:\n  - tflite:\n      ios: int8": (3, "unknown option 'ios'; did you mean 'io'?"),
    "verify: {max_lsb: -1}": (1, "verify.max_lsb: found -1"),
    "verify: {maxlsb: 1}": (1, "unknown key 'maxlsb'; did you mean 'max_lsb'?"),
    "seed: many": (1, "seed: found 'many'; expected a valid integer"),
    "seed: 1\nseed: 2": (2, "the key 'seed' stands twice"),
    "name: [": (2, "not valid YAML"),
    "name: &a x\nmodel: *a": (1, "anchors and aliases"),
    "name: !!python/object/apply:os.system [x]": (1, "tag"),
    "{a: {a: {a: {a: {a: {a: {a: {a: {a: {a: {a: {a: {a: {a: {a: {a: " * 3: (2, "not valid YAML"),
}


@pytest.mark.parametrize("text", FAULTS)
def test_each_fault_is_one_sentence_with_its_line(text: str, folder: Path) -> None:
    line, words = FAULTS[text]
    with pytest.raises(RecipeError) as caught:
        recipe.parse(text + "\n", "r.yaml", folder)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert message.startswith(f"r.yaml:{line}:"), message


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(RecipeError, match="the key 'data' is missing"):
        recipe.parse("model: float.pt2\ncompress: static_wi8_ai8\n", folder=folder)
    with pytest.raises(RecipeError, match="found nothing; expected the keys model"):
        recipe.parse("", folder=folder)
    with pytest.raises(RecipeError, match="no such recipe; write one with `edgekit init`"):
        recipe.load(folder / "none.yaml")


def test_command_line_values_reach_the_blocks(folder: Path) -> None:
    found = recipe.parse("model: model.py:f\ndata: a:f\ncompress: [ptq, qat]\n", folder=folder)
    changed = recipe.replace(found, seed=7, device="cuda")
    assert [b.settings.seed for b in changed.compress] == [7, 7] and changed.seed == 7
    assert changed.compress[1].settings.device == "cuda"


def test_schema_and_tables_in_the_documentation_are_current() -> None:
    folder = Path(__file__).parents[2] / "docs"
    assert json.loads((folder / "recipe.schema.json").read_text()) == schema.schema(), "run: python -m edgekit.schema docs"
    page = (folder / "recipe.md").read_text()
    assert page.partition(schema.MARK)[2].strip() == schema.tables().strip(), "run: python -m edgekit.schema docs"
    for name, blocks in recipe.NAMED.items():
        ((kind, settings),) = blocks.items()
        assert f"| `{name}` | `{kind}: {{{', '.join(f'{k}: {v}' for k, v in settings.items())}}}` |" in page


def test_the_schema_names_what_the_reader_takes() -> None:
    found = schema.schema()
    assert set(found["required"]) == {"model", "data", "compress"}
    assert found["additionalProperties"] is False
    properties = found["$defs"]["PTQ"]["properties"]
    assert set(properties) == set(PTQ.__dataclass_fields__)
    assert all(p.get("description") for p in properties.values())
    names = found["properties"]["compress"]["anyOf"][1]["items"]["anyOf"][0]["enum"]
    assert set(recipe.NAMED) <= set(names)


@pytest.mark.parametrize("name", ["recipe.yaml", "mixed.yaml"])
def test_the_examples_are_valid(name: str) -> None:
    path = Path(__file__).parents[2] / "examples" / "digits" / name
    assert recipe.load(path).targets
    assert set(yaml.safe_load(path.read_text())) <= set(schema.schema()["properties"])


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_the_recipes_of_the_examples_are_valid(path: Path) -> None:
    assert recipe.load(path).compress
