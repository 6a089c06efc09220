"""The JSON Schema of recipes and sweeps: what is right validates, and a fault is reported where it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from alignment import cli
from alignment.commands.schema import recipe_schema, sweep_schema
from alignment.config import rules, yaml_file
from alignment.config.rules import Rule
from alignment.config.run import conf_folder, recipe_names, recipes_folder
from alignment.config.typed import to_plain
from alignment.stages.registry import kinds
from tests.e2e.test_outside_kind import OUTSIDE, RECIPE
from tests.unit.config.test_typed import FAULTS

jsonschema = pytest.importorskip("jsonschema", reason="the extra 'metrics' has jsonschema")

ROOT = Path(__file__).parents[4]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = jsonschema.Draft7Validator(recipe_schema())
SWEEPS = jsonschema.Draft7Validator(sweep_schema())
BESIDE_DEFAULTS = ("stages", "adapter", "model", "launch", "tracking", "summary")
"""Keys of recipes of which the docs show a part."""


def faults(validator: Any, tree: Any) -> list[str]:
    """``stages.dpo: Additional properties …`` for each fault."""
    errors = validator.iter_errors(tree)
    return [f"{'.'.join(map(str, fault.absolute_path))}: {fault.message}" for fault in errors]


def parts_of_docs() -> list[tuple[str, Any]]:
    """Pages and their examples of YAML, those of a stage alone in the place that they would have in a recipe."""
    parts: list[tuple[str, Any]] = []
    for page in PAGES:
        for text in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            if "…}" in text:
                continue  # left out by its author
            tree = yaml_file.load(text) or {}
            if set(tree) <= set(kinds()):
                tree = {"stages": tree}
            if "parameters" in tree or "defaults" in tree or set(tree) <= set(BESIDE_DEFAULTS):
                parts.append((page.name, tree))
    return parts


@pytest.mark.parametrize("schema", [recipe_schema(), sweep_schema()], ids=["recipe", "sweep"])
def test_a_schema_is_one_of_draft_07_and_describes_what_it_allows(schema: dict[str, Any]) -> None:
    jsonschema.Draft7Validator.check_schema(schema)
    names = schema["definitions"].keys()
    referred = set(re.findall(r'"#/definitions/([^"]+)"', json.dumps(schema)))
    assert referred <= names
    assert names - referred <= {"stage"}


def test_everything_that_is_shipped_and_all_defaults_validate() -> None:
    recipes = [recipes_folder() / f"{recipe}.yaml" for recipe in recipe_names()]
    sweeps = list((conf_folder() / "sweep").glob("*.yaml"))
    assert len(recipes) > 5
    assert sweeps
    assert {path.name: faults(RECIPES, yaml_file.read(path)) for path in recipes} == {path.name: [] for path in recipes}
    assert {path.name: faults(SWEEPS, yaml_file.read(path)) for path in sweeps} == {path.name: [] for path in sweeps}
    for name, kind in kinds().items():
        assert faults(RECIPES, {"stages": {"any": to_plain(kind.config())}}) == [], name


def test_the_examples_of_the_docs_validate() -> None:
    parts = parts_of_docs()
    assert len(parts) >= 20
    wrong = [(page, faults(SWEEPS if "parameters" in tree else RECIPES, tree)) for page, tree in parts]
    others = f"is not one of {list(kinds())}"  # added by the packages that these two pages describe
    assert sorted(part for part in wrong if part[1]) == [
        ("own_rows.md", [f"stages.shorten.kind: 'shorten' {others}"]),
        ("own_stage.md", [f"stages.count.kind: 'wordcount' {others}"]),
    ]


CHOSEN = {"dpo": "dpo", "judge": "reward", "mine": "sft"}
DEFAULTS = ["base", *({f"stage@stages.{stage}": file} for stage, file in CHOSEN.items()), "_self_"]
NO_KEY = "Additional properties are not allowed ({!r} was unexpected)"
NO_CHOICE = "{!r} is not valid under any of the given schemas"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lauch": {}}, f": {NO_KEY.format('lauch')}"),
    ({"stages": {"dpo": {"bata": 0.1}}}, f"stages.dpo: {NO_KEY.format('bata')}"),
    ({"stages": {"dpo": {"optim": {"lrr": 0.1}}}}, f"stages.dpo.optim: {NO_KEY.format('lrr')}"),
    ({"stages": {"dpo": {"updates": 3}}}, f"stages.dpo: {NO_KEY.format('updates')}"),
    ({"stages": {"mine": {"kind": "dpo", "updates": 3}}}, f"stages.mine: {NO_KEY.format('updates')}"),
    ({"stages": {"mine": {"packing": 1}}}, "stages.mine.packing: 1 is not of type 'boolean', 'string'"),
    ({"stages": {"dpo": {"beta": True}}}, "stages.dpo.beta: True is not of type 'number', 'string'"),
    ({"stages": {"dpo": {"beta": 0}}}, "stages.dpo.beta: 0 is less than or equal to the minimum of 0"),
    ({"stages": {"dpo": {"beta": "-1e-2"}}}, "stages.dpo.beta: '-1e-2' does not match "),
    ({"stages": {"dpo": {"loss": "sigmod"}}}, f"stages.dpo.loss: {NO_CHOICE.format('sigmod')}"),
    ({"stages": {"dpo": {"adapter": {"kind": "lra"}}}}, f"stages.dpo.adapter.kind: {NO_CHOICE.format('lra')}"),
    ({"stages": {"mine": {"kind": "stf"}}}, "stages.mine.kind: 'stf' is not one of "),
    ({"stages": {"a b": {"kind": "sft"}}}, "stages: 'a b' does not match "),
    ({"launch": {"backend": {"kind": "slurm", "tim": 1}}}, f"launch.backend: {NO_KEY.format('tim')}"),
    ({"launch": {"backend": {"time": "4h"}}}, "launch.backend.time: '4h' does not match "),
    ({"seed": 1.5}, "seed: 1.5 is not of type 'integer', 'string'"),
    ({"tracking": {"tags": [""]}}, "tracking.tags.0: '' should be non-empty"),
    ({"defaults": ["base", {"stage@stages.dpo": "dop"}]}, "defaults.1.stage@stages.dpo: 'dop' is not one of "),
    ({"defaults": [{"override /adapter@stages.dpo.adapter": "qlor"}]}, "defaults.0.override /adapter@stages.dpo.adap"),
    ({"defaults": [{"launch": "zero4"}]}, "defaults.0.launch: 'zero4' is not one of "),
]  # fmt: skip


def test_hydras_syntax_validates() -> None:
    recipe = """
        defaults:
          - quickstart
          - mine/other
          - launch: zero2
          - launch/backend: slurm
          - tracking: [wandb, tensorboard]
          - /stage@stages.more: sft
          - override /adapter@stages.sft.adapter: qlora
          - optional model: smollm2_135m
          - _self_
        seed: ???
        model: {dtype: "${other.dtype}"}
        stages:
          sft: {optim: "${stages.dpo.optim}", max_length: "${stages.dpo.max_length}", data: {mix: ["${part}"]}}
          dpo: ${stages.sft}
          more: {packing: "${stages.sft.packing}", optim: {lr: 1e-4, micro_batch_tokens: auto}}
        """
    assert faults(RECIPES, yaml_file.load(recipe)) == []


SWEEP = {"objective": {"stage": "sft"}, "parameters": [{"key": "seed", "values": [1, "a", None, [2]]}]}
WRONG_SWEEPS: list[tuple[dict[str, Any], str]] = [
    ({"trails": 3}, f": {NO_KEY.format('trails')}"),
    ({"search": "gird"}, "search: 'gird' is not one of ['grid', 'tpe']"),
    ({"seed": "${other}"}, "seed: '${other}' is not of type 'integer'"),
    ({"objective": {"stag": "sft"}}, f"objective: {NO_KEY.format('stag')}"),
    ({"parameters": [{"values": [1]}]}, "parameters.0: 'key' is a required property"),
    ({"pruning": {"pruner": "mediam"}}, "pruning.pruner: 'mediam' is not one of "),
]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (
            "{model: Qwen/Qwen2.5-0.5B, adapter: qlora, launch: {use: zero3}, tracking: [wandb], stages: {report: }}",
            None,
        ),
        ("stages: {sft: {adapter: {use: dora, rank: 4}}, best: {kind: sft}, x: {use: evaluate_house_style}}", None),
        ("{adapter: {use: dora, rank: 64}, stages: {sft: }}", None),
        ("adapter: qlorra", "adapter"),
        ("launch: zero9", "launch"),
        ("tracking: [wand]", "tracking.0"),
        ("stages: {sft: {adapter: qlorra}}", "stages.sft.adapter"),
        ("stages: {sft: {beta: 1}}", "stages.sft"),
        ("stages: {mine: {use: other}}", "stages.mine.use"),
    ],
)
def test_a_recipe_needs_no_defaults(text: str, where: str | None) -> None:
    paths = {fault.partition(":")[0] for fault in faults(RECIPES, yaml_file.load(text))}
    assert paths == ({where} if where else set())


def test_a_fault_is_reported_where_it_stands() -> None:
    assert faults(SWEEPS, SWEEP) == faults(SWEEPS, SWEEP | {"objective": [SWEEP["objective"]]}) == []
    assert faults(SWEEPS, {}) == [": 'parameters' is a required property"]
    cases = [(RECIPES, {"defaults": DEFAULTS} | tree, message) for tree, message in WRONG]
    cases += [(SWEEPS, SWEEP | change, message) for change, message in WRONG_SWEEPS]
    for validator, tree, message in cases:
        (reported,) = faults(validator, tree)
        assert reported.startswith(message)


NOT_IN_SCHEMAS = (
    "regular expression",
    "is a text here; write null",
    "needs at least one",
    "unknown stage",
    ": nan is",
    "'full' is not a group",  # a recipe without ``defaults`` may have it, and the next
    "adapter.chain: unknown key",
    "'4:00:00\\n' is",
)
"""The last: in JSON Schema ``$`` is the end of a text, in Python it may stand before a line break."""


@pytest.mark.parametrize(("tree", "message"), FAULTS, ids=[message[:60] for _, message in FAULTS])
def test_it_refuses_what_a_plan_refuses(tree: dict[str, Any], message: str) -> None:
    """Not all of it: some rules are no ranges, and a stage's kind may come from elsewhere."""
    if not any(words in message for words in NOT_IN_SCHEMAS):
        assert faults(RECIPES, tree), message


RULES = {name: rule for name, rule in vars(rules).items() if isinstance(rule, Rule)}
NUMBERS = (-1e7, -1, -0.5, 0, 0.25, 0.5, 0.75, 1, 1.5, 80, 65535, 65536, 1e7)
TEXTS = ("", "a", ".a", "a b", "a/b", "GPU_KEY", "4:00:00", "2-12:00:00", "64G", "http://h:1/v1", "http://u:p@h", "a,b")


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_the_same_in_json_schema(name: str) -> None:
    rule = RULES[name]
    validator = jsonschema.Draft7Validator(dict(rule.keywords))
    values: Sequence[Any] = NUMBERS
    if "pattern" in rule.keywords or name in ("FILLED", "PATTERN"):
        values = TEXTS
    if name in ("PORT", "ZERO_OR_ONE"):
        values = [value for value in NUMBERS if isinstance(value, int)]
    if name == "TAGS":
        values = ([], ["a"], [""], ["a" * 65])
    if name not in ("FINITE", "PATTERN"):
        assert rule.keywords
        assert [validator.is_valid(value) for value in values] == [rule.holds(value) for value in values]


def test_a_setting_carries_what_its_class_says_of_it() -> None:
    dpo = recipe_schema()["definitions"]["DpoConfig"]["properties"]
    assert dpo["margin"]["description"] == (
        "``margin`` times the difference of a pair's scores is subtracted from h (Amini et al. 2024, with their f the "
        "identity); rows then need scores.\n\nAllowed: 0 or more."
    )
    assert dpo["loss"]["description"].startswith("Losses for a pair.")
    assert dpo["beta"]["default"] == 0.1
    assert dpo["kind"] == {"const": "dpo"}


def test_a_kind_of_another_package_is_in_the_schema() -> None:
    path = os.pathsep.join([str(OUTSIDE), str(ROOT)])
    argv = [sys.executable, "-m", "alignment.cli", "schema", "recipe"]
    done = subprocess.run(argv, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    validator = jsonschema.Draft7Validator(json.loads(done.stdout))
    recipe = yaml_file.load(RECIPE)
    assert faults(validator, recipe) == []
    assert faults(RECIPES, recipe)[0].startswith("stages.backwards.kind: 'toy' is not one of ")
    recipe["stages"]["backwards"]["max_lenght"] = 8
    assert faults(validator, recipe) == [f"stages.backwards: {NO_KEY.format('max_lenght')}"]


def test_files_beside_a_recipe_may_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "ours.yaml").write_text("kind: ppo\n", encoding="utf-8")
    assert cli.main(["schema", "--beside", str(tmp_path)]) == 0
    validator = jsonschema.Draft7Validator(json.loads(capsys.readouterr().out))
    recipe = {"defaults": ["base", {"stage@stages.ours": "ours"}], "stages": {"ours": {"updates": 0}}}
    assert faults(validator, recipe) == ["stages.ours.updates: 0 is less than or equal to the minimum of 0"]
    assert any(message.startswith("defaults.1.stage@stages.ours: 'ours'") for message in faults(RECIPES, recipe))


def test_a_folder_that_is_missing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema", "--beside", "no-such-folder"]) == 2
    assert "--beside: no folder no-such-folder" in capsys.readouterr().err
    assert cli.main(["schema", "sweep", "--beside", "."]) == 2
    assert "a sweep does not choose files" in capsys.readouterr().err
