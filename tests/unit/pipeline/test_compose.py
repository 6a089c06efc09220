"""Recipes and overrides compose, or say what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.config.backend import Backend, LocalBackend, MachinesBackend, SlurmBackend
from alignment.config.evaluating import LabelledConfig
from alignment.config.faults import Fault
from alignment.config.launch import Offload
from alignment.config.optim import Moments
from alignment.config.run import RunConfig
from alignment.config.scoring import ScorerConfig
from alignment.config.store import GROUPS, conf_folder, recipe_names, recipes_folder, sweep_names
from alignment.config.typed import convert, typed
from alignment.core.errors import ConfigError
from alignment.pipeline.plan import references, settings
from alignment.pipeline.plan.compose import compose, find_recipe
from alignment.pipeline.plan.dotted_keys import nested
from alignment.pipeline.plan.plan import make_plan
from alignment.pipeline.sweeps.sweep_file import read_sweep
from alignment.stages.dpo.config import DpoConfig
from alignment.stages.ppo.batch_sizes import size_faults
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.registry import config_classes, trains

STAGES = config_classes()

ROOT = Path(__file__).parents[3]
SWEEPS = "sweep"  # files of many runs, not choices of one
FILES = sorted(
    (path.parent.relative_to(conf_folder()).as_posix(), path.stem) for path in conf_folder().glob("*/**/*.yaml")
)
CHOICES = [(group, choice) for group, choice in FILES if group != SWEEPS]


def composed(recipe: str, *overrides: str) -> RunConfig:
    composition = compose(recipe, overrides)
    assert not composition.faults
    return typed(composition.tree, config_classes())


def faults(*overrides: str, recipe: str = "quickstart") -> list[str]:
    composition = compose(recipe, overrides)
    all_faults: list[Fault] = [*composition.faults, *convert(composition.tree, config_classes())[1]]
    return [str(fault) for fault in all_faults]


def test_the_recipes_and_choices_tested_here_are_those_on_disk() -> None:
    assert recipes_folder() == ROOT / "recipes"
    assert len(recipe_names()) == len(list((ROOT / "recipes").iterdir())) >= 3
    assert len(FILES) == len([path for path in (ROOT / "conf").rglob("*") if path.is_file()]) - 1  # base.yaml
    assert {group for group, _ in FILES} == {*GROUPS, "profile", SWEEPS}


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_composes_and_its_references_hold(recipe: str) -> None:
    config = composed(recipe)
    assert config.name == recipe
    assert config.summary
    assert not references.faults(config.stages)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes(group: str, choice: str) -> None:
    override = f"+stage@stages.more={choice}" if group == "stage" else f"{group}={choice}"
    assert ("more" in composed("quickstart", override).stages) == (group == "stage")


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_says_where_its_numbers_come_from(recipe: str) -> None:
    for line in (recipes_folder() / f"{recipe}.yaml").read_text().splitlines():
        if not line.startswith("summary:") and any(
            character.isdigit() for character in line.partition("#")[0].partition(":")[2]
        ):
            assert "#" in line, line


def test_a_choice_for_all_stages_reaches_each_that_has_one() -> None:
    config = composed("quickstart", "adapter=full")
    kinds = {name: stage.adapter.kind.value for name, stage in config.stages.items() if hasattr(stage, "adapter")}
    assert kinds == dict.fromkeys(["sft", "reward", "dpo", "ppo"], "full")


@pytest.mark.parametrize("kind", [kind.value for kind in AdapterKind])
def test_an_adapter_means_the_same_however_it_is_chosen(kind: str) -> None:
    chosen = composed("quickstart", f"adapter={kind}")
    trained = [name for name, stage in chosen.stages.items() if hasattr(stage, "adapter")]
    assert composed("quickstart", *(f"stages.{name}.adapter.kind={kind}" for name in trained)) == chosen
    assert composed("quickstart", *(f"stages.{name}.adapter={{kind: {kind}}}" for name in trained)) == chosen


@pytest.mark.parametrize(
    ("adapter", "chain"),
    [("{kind: qlora}", "stack"), ("{kind: qlora, chain: merge}", "merge"), ("{kind: lora}", "merge")],
)
def test_adapters_below_four_bits_stay_separate_unless_a_recipe_merges_them(adapter: str, chain: str) -> None:
    assert composed("quickstart", f"stages.dpo.adapter={adapter}").stages["dpo"].adapter.chain.value == chain  # type: ignore[union-attr]


def test_a_choice_for_one_stage_leaves_the_others() -> None:
    config = composed("quickstart", "adapter@stages.dpo.adapter=full")
    assert config.stages["dpo"].adapter.kind.value == "full"  # type: ignore[union-attr]
    assert config.stages["sft"].adapter.kind.value == "lora"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("trackers", "wandb", "tensorboard"),
    [
        ("jsonl", False, False),
        ("wandb", True, False),
        ("[wandb, tensorboard]", True, True),
        ("[jsonl, tensorboard]", False, True),
        ("[jsonl,wandb,tensorboard]", True, True),
        ("[]", False, False),
    ],
)
def test_trackers_are_chosen_by_name_one_or_several(
    tmp_path: Path, trackers: str, wandb: bool, tensorboard: bool
) -> None:
    recipe = tmp_path / "tracked.yaml"
    recipe.write_text(f"defaults: [quickstart, {{override tracking: {trackers}}}, _self_]\n")
    for config in (composed("quickstart", f"tracking={trackers}"), composed(str(recipe))):
        assert (config.tracking.wandb, config.tracking.tensorboard) == (wandb, tensorboard)
    tracking = composed("quickstart", f"tracking={trackers}", "tracking.project=mine", "tracking.tags=[a, b]").tracking
    assert (tracking.wandb, tracking.project, tracking.tags) == (wandb, "mine", ["a", "b"])


def test_a_stage_can_be_taken_out_and_another_added() -> None:
    config = composed("quickstart", "~stages.ppo", "+stage@stages.dpo_low=dpo", "stages.dpo_low.beta=0.05")
    assert "ppo" not in config.stages
    assert config.stages["dpo_low"].beta == 0.05  # type: ignore[union-attr]


def test_a_recipe_of_the_user_s_own_builds_on_shipped_ones_and_brings_choices(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("source: path:/models/mine\n")
    recipe = tmp_path / "my recipe.yaml"
    recipe.write_text("defaults: [quickstart, {override model: mine}, _self_]\nname: mine\nseed: 7\n")
    config = composed(str(recipe))
    assert (config.name, config.seed, config.model.source) == ("mine", 7, "path:/models/mine")
    assert composed(str(recipe), "model=smollm2_135m").model.source == "bundled:smollm2-135m"


@pytest.mark.parametrize("name", ["base", "quickstart", "recipe", "a@b", "launch"])
def test_a_recipe_may_have_any_name(tmp_path: Path, name: str) -> None:
    included = "quickstart" if name == "quickstart" else "base"
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(f"defaults: [{included}, stage@stages.more: sft, _self_]\nname: mine\nseed: 7\n")
    config = composed(str(recipe), "launch=ddp")
    assert (config.seed, config.model.source, config.launch.num_processes) == (7, "bundled:smollm2-135m", 0)
    assert ("dpo" in config.stages) == (name == "quickstart")


def test_a_file_beside_the_recipe_never_replaces_a_shipped_one(tmp_path: Path) -> None:
    unrelated = {"base": "hello: 1", "stage/sft": "kind: dpo", "profile/smoke": "{}", "launch/ddp": "hello: 1"}
    for name, content in unrelated.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(content)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults: [base, stage@stages.sft: sft, _self_]\n")
    assert compose(str(recipe), []).unread == (tmp_path / "base.yaml", tmp_path / "stage/sft.yaml")
    config = composed(str(recipe), "launch=ddp", "profile=smoke")
    assert (config.stages["sft"].kind, config.launch.num_processes, config.name) == ("sft", 1, "mine-smoke")
    assert set(compose(str(recipe), ["launch=ddp", "profile=smoke"]).unread) == {
        tmp_path / f"{name}.yaml" for name in unrelated
    }


@pytest.mark.parametrize("files", [("mine",), ("mine", "other"), ("mine", "other", "third")])
def test_recipes_that_include_each_other_are_named(tmp_path: Path, files: tuple[str, ...]) -> None:
    (tmp_path / "innocent.yaml").write_text("seed: 3\n")
    for name, included in zip(files, (*files[1:], files[0]), strict=True):
        (tmp_path / f"{name}.yaml").write_text(f"defaults: [base, innocent, {included}, _self_]\n")
    with pytest.raises(ConfigError) as caught:
        compose(str(tmp_path / "mine.yaml"), [])
    assert all(f"{name}.yaml" in caught.value.message for name in files)
    assert "innocent" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("stages.sft.data.source=path:bad/müller.jsonl", "path:bad/müller.jsonl"),
        ("stages.sft.data.source=path:日本/語.jsonl", "path:日本/語.jsonl"),
        ("stages.sft.data.source=path:my rows (1).jsonl", "path:my rows (1).jsonl"),
        ("stages.sft.data.source=path:it's.jsonl", "path:it's.jsonl"),
        ("stages.sft.data.source=path:rows, v2.jsonl", "path:rows, v2.jsonl"),
        ("stages.sft.data.source='path:in \"quotes\", ü.jsonl'", 'path:in "quotes", ü.jsonl'),
        ("stages.sft.data.columns={prompt: Fräge, chosen: 'gut, ß'}", {"prompt": "Fräge", "chosen": "gut, ß"}),
        ("stages.evaluate.arms=[base,path:mü]", ["base", "path:mü"]),
        ("name=ü", "ü"),
    ],
)
def test_letters_of_every_language_need_no_quotes(override: str, value: object) -> None:
    tree = compose("quickstart", [override]).tree
    for key in override.partition("=")[0].split("."):
        tree = tree[key]
    assert tree == value


def test_misspellings_are_all_found() -> None:
    messages = faults("stages.sft.pakcing=true", "stages.dpo.bata=0.1", "stages.dop.beta=1", "launch=zeroo2", "sed=1")
    assert set(messages) == {
        "launch=zeroo2: no launch 'zeroo2'; did you mean 'zero2'?",
        "sed: unknown key; did you mean 'seed'?",
        "stages.sft.pakcing: unknown key; did you mean 'packing'?",
        "stages.dpo.bata: unknown key; did you mean 'beta'?",
        "stages.dop: unknown stage; did you mean 'dpo'?",
    }


FAULTY = [
    (
        "stages.evaluate.metrics={name: brevity}",
        "stages.evaluate.metrics: {'name': 'brevity'} is not allowed; it takes a list of groups, each with some of the "
        "keys source, pattern, target, schema, server, name, higher_is_better, aggregate, passing_score, rubric; write "
        "[{name: brevity}]",
    ),
    (
        "stages.evaluate.arms={name: base}",
        "stages.evaluate.arms: {'name': 'base'} is not allowed; it takes a list, such as [a, b]",
    ),
    (
        "stages.sft.optim=[1]",
        "stages.sft.optim: [1] is not a group of settings; it takes the keys lr, batch_size, micro_batch_tokens, "
        "activation_checkpointing, epochs, max_steps, schedule, warmup_ratio, weight_decay, adam_eps, moments, "
        "max_grad_norm",
    ),
    ("lauch=local", "lauch: unknown key; did you mean 'launch'?"),
    ("foo@bar=x", "foo@bar=x: no group 'foo'; one of: adapter, launch, launch/backend, model, stage, tracking"),
    (
        "adapter@stages.sfd.adapter=full",
        "adapter@stages.sfd.adapter=full: the recipe makes no such choice; did you mean 'adapter@stages.sft.adapter'?",
    ),
    (
        "tracking=[jsonl,wandbb]",
        "tracking=[jsonl,wandbb]: no tracking 'wandbb'; did you mean 'wandb'?",
    ),
    ("tracking=[[wandb]]", "tracking=[[wandb]]: no tracking '['wandb']'; did you mean 'wandb'?"),
    ("launch=[]", "launch=[]: no launch '[]'; one of: ddp, fsdp, local, zero1, zero2, zero3"),
    ("launch=slurm", "launch=slurm: no launch 'slurm'; did you mean launch/backend=slurm?"),
    ("launch/backend=slrum", "launch/backend=slrum: no launch/backend 'slrum'; did you mean 'slurm'?"),
    ("launch/bakend=slurm", "launch/bakend=slurm: no group 'launch/bakend'; did you mean 'launch/backend'?"),
    (
        "launch.backend=slurm",
        "launch.backend: 'slurm' is not a group of settings; choose launch/backend=slurm, or write {kind: slurm}",
    ),
    ("launch.backend.kind=slrum", "launch.backend.kind: 'slrum' is not allowed; did you mean 'slurm'?"),
    (
        "launch.backend.gpus=2",
        "launch.backend.gpus: kind 'local' has no such setting; launch/backend=slurm has it",
    ),
    ("profile=smok", "profile=smok: no profile 'smok'; did you mean 'smoke'?"),
    ("~profile", "~profile: write profile=NAME, once"),
    ("profile@stages=smoke", "profile@stages=smoke: write profile=NAME, once"),
    ("~stages.pppo", "~stages.pppo: nothing to remove; did you mean 'ppo'?"),
    ("größe=1", "größe: unknown key; one of: name, summary, seed, output, artifacts, model, stages, launch, tracking"),
    (
        "stages.sft.data.source=path:a'b\"c",
        "stages.sft.data.source=path:a'b\"c: not an override; write key=value, such as stages.dpo.beta=0.3",
    ),
    (
        "adapter.kind=full",
        "adapter.kind: unknown key; each stage has its own: set stages.NAME.adapter.kind for one stage; on the command "
        "line, adapter=full chooses it for all stages",
    ),
    (
        "adapter={kind: full}",
        "adapter={kind: full}: a choice is the name of a file, adapter=NAME; did you mean 'full'?",
    ),
    (
        "adapter.chain=stack",
        "adapter.chain: unknown key; did you mean 'stages.sft.adapter.chain', "
        "'stages.reward.adapter.chain' or 'stages.dpo.adapter.chain'?",
    ),
    ("seed=1,2", "seed=1,2: several values for one key; give one"),
    (
        "stages.sft.data.source=path:a,path:b",
        "stages.sft.data.source=path:a,path:b: several values for one key; give one",
    ),
    ("seed", "seed: not an override; write key=value, such as stages.dpo.beta=0.3"),
    (
        f"seed={'[' * 31}{']' * 31}",
        f"seed={'[' * 31}{']' * 24}…: brackets are nested 31 deep; no setting needs more than a few levels",
    ),
    (
        f"stages.sft.optim={'{' * 3000}",
        f"stages.sft.optim={'{' * 43}…: brackets are nested 3000 deep; no setting needs more than a few levels",
    ),
    ("=1", "=1: not an override; write key=value, such as stages.dpo.beta=0.3"),
    ("seed=[1", "seed=[1: not an override; write key=value, such as stages.dpo.beta=0.3"),
    ("hydra.run.dir=x", "hydra.run.dir=x: Hydra's own settings are not allowed"),
    ("hydra/launcher=x", "hydra/launcher=x: Hydra's own settings are not allowed"),
    ("summary=${nowhere}", "summary: Interpolation key 'nowhere' not found"),
]


@pytest.mark.parametrize(("override", "message"), FAULTY)
def test_a_faulty_override_is_named_exactly(override: str, message: str) -> None:
    assert [text.splitlines()[0] for text in faults(override)] == [message]


@pytest.mark.parametrize("digits", [19, 400, 5_000])
@pytest.mark.parametrize(
    "key",
    ["seed", "stages.sft.optim.batch_size", "stages.sft.data.limit", "stages.sft.optim.lr", "stages.sft.optim.epochs"],
)
def test_a_number_that_is_too_large_is_a_fault_in_a_line(tmp_path: Path, key: str, digits: int) -> None:
    number = "9" * digits
    if key.rpartition(".")[2] in ("lr", "epochs") and digits == 19:
        assert faults(f"{key}={number}") == []
        return
    (fault,) = faults(f"{key}={number}")
    assert key in fault
    assert len(fault) < 400
    recipe = tmp_path / "mine.yaml"
    values = json.dumps(nested(key.split("."), "NUMBER")).replace('"NUMBER"', number)
    recipe.write_text(f"defaults: [quickstart, _self_]\n{values[1:-1]}\n")
    try:
        (fault,) = faults(recipe=str(recipe))
    except ConfigError as error:
        fault = str(error)
    assert "mine.yaml" in fault or key in fault


@pytest.mark.parametrize(
    "override",
    [
        "stages.sft._target_=os.system",
        "stages.sft={kind: sft, optim: {_target_: os.system}}",
        "summary=${oc.env:HOME}",
        "model=${oc.env:HOME}",
        "summary='a:b ${seed}/${ oc.env:HOME}'",
        "summary='${${seed}:HOME}'",
        "summary='${a.${oc.env:HOME}'",
    ],
)
def test_what_could_run_code_or_read_the_environment_is_refused(override: str) -> None:
    assert any("is not allowed" in fault for fault in faults(override))


@pytest.mark.parametrize(
    "text",
    [
        "defaults: [base]\nmodel: {_target_: os.system}\n",
        "defaults: [base, {model: '${oc.env:HOME}'}]\n",
        "defaults: [base]\nsummary: ${oc.env:HOME}\n",
        "defaults: [base]\nsummary: ${a.${oc.decode:seed}}\n",
        "defaults: [base]\nhydra: {searchpath: ['pkg://os']}\n",
    ],
)
def test_a_hostile_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not allowed"):
        compose(str(path), [])


def test_interpolation_of_the_configuration_s_own_keys_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("defaults: [quickstart, _self_]\nseed: 3\nsummary: seed ${seed}\n")
    assert composed(str(path)).summary == "seed 3"


@pytest.mark.parametrize("text", ["${seed}/a:b", "a:b/${seed}", "{a:b}${seed}: ${seed}", "}:${seed}"])
def test_a_colon_outside_of_the_braces_reads_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"defaults: [quickstart, _self_]\nseed: 3\nsummary: '{text}'\n")
    assert composed(str(path)).summary == text.replace("${seed}", "3")


def test_self_before_the_end_of_a_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "early.yaml"
    path.write_text("defaults: [_self_, quickstart]\nseed: 3\n")
    with pytest.raises(ConfigError, match="'_self_' must come last"):
        compose(str(path), [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("- a", "a recipe is a group of settings"),
        ("defaults: [nowhere]", "nowhere"),
        ("defaults: [base, stage@stages.sft: sfft]", "Could not find 'stage/sfft'; did you mean 'sft'?"),
        ("defaults: [base, launch: lokal]", "; did you mean 'local'?"),
    ],
)
def test_a_recipe_that_is_none_says_so(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        compose(str(path), [])


@pytest.mark.parametrize("name", sweep_names())
def test_a_sweep_in_the_place_of_a_recipe_is_named_with_the_command_that_plans_it(tmp_path: Path, name: str) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text((conf_folder() / "sweep" / f"{name}.yaml").read_text())
    for recipe, stem, where in ((name, name, "recipe"), (str(own), "mine", str(own))):
        with pytest.raises(ConfigError) as caught:
            compose(recipe, [])
        assert str(caught.value) == (
            f"{where}: '{stem}' is a sweep, which tries settings on a recipe; it is not a recipe\n"
            f"  → name its recipe: `align plan RECIPE` plans a single run, and `align sweep RECIPE {recipe}` plans "
            f"every value before it runs the trials"
        )


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("quikstart", "recipe: no recipe 'quikstart'; did you mean 'quickstart'?"),
        ("./nowhere.yaml", "recipe: no file "),
    ],
)
def test_a_recipe_that_is_not_there_is_named(recipe: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(recipe, [])
    assert str(caught.value).startswith(message)


def test_choices_say_nothing_that_the_dataclass_does_not_know() -> None:
    for group, choice in CHOICES:
        content = yaml.safe_load((conf_folder() / group / f"{choice}.yaml").read_text())
        assert isinstance(content, dict), f"{group}/{choice}"


def test_a_list_of_groups_is_given_as_one_value_and_replaces_the_recipe_s(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "defaults: [quickstart, _self_]\n"
        "stages: {ppo: {scorers: [{source: reward, normalize: true}, {source: length, target: 20}]}}\n"
    )
    ppo = composed(str(recipe)).stages["ppo"]
    assert ppo.scorers == [  # type: ignore[union-attr]
        ScorerConfig(normalize=True),
        ScorerConfig(source="length", target=20),
    ]
    for override in (
        "stages.ppo.scorers=[{source: score.py:brevity, weight: 0.5}]",
        "stages.ppo.scorers=[{source: 'score.py:brevity', weight: 5e-1}]",
    ):
        for start in ("quickstart", str(recipe)):
            ppo = composed(start, override).stages["ppo"]
            assert ppo.scorers == [ScorerConfig(source="score.py:brevity", weight=0.5)]  # type: ignore[union-attr]
    ppo = composed(str(recipe), "stages.ppo.scorers.1.target=30", "stages.ppo.guard.scorer.source=reward").stages["ppo"]
    assert ppo.scorers[1].target == 30  # type: ignore[union-attr]
    assert ppo.guard.scorer == ScorerConfig(source="reward")  # type: ignore[union-attr]


def test_a_pattern_arrives_as_it_was_written() -> None:
    ppo = composed("quickstart", r"stages.ppo.scorers=[{source: regex, pattern: '^\s*<a>\d+</a>$'}]").stages["ppo"]
    assert ppo.scorers[0].pattern == r"^\s*<a>\d+</a>$"  # type: ignore[union-attr]


TAKEN_OVER = """\
defaults: [base, stage@stages.dpo_1: dpo, stage@stages.dpo_2: dpo, _self_]
stages:
  dpo_1: {init: base, data: {source: 'SOURCE', columns: {prompt: q}}, optim: {lr: 3e-3, batch_size: 6, epochs: 2}}
  dpo_2: {init: stage:dpo_1, data: "${stages.dpo_1.data}", optim: "${stages.dpo_1.optim}"}
"""


def taken_over(folder: Path, *overrides: str, source: str = "path:mine.jsonl") -> list[DpoConfig]:
    """The stages of a recipe whose second one takes its data and its optimiser's settings from the first one."""
    recipe = folder / "mine.yaml"
    recipe.write_text(TAKEN_OVER.replace("SOURCE", source))
    return list(composed(str(recipe), *overrides).stages.values())  # type: ignore[arg-type]


def optim_of(stage: DpoConfig) -> tuple[object, ...]:
    return (stage.optim.lr, stage.optim.batch_size, stage.optim.epochs, stage.optim.max_steps)


@pytest.mark.parametrize(
    ("overrides", "first", "second"),
    [
        (["stages.dpo_2.optim.max_steps=100"], (3e-3, 6, 2, None), (3e-3, 6, 2, 100)),
        (["stages.dpo_2.optim={max_steps: 100}"], (3e-3, 6, 2, None), (3e-3, 6, 2, 100)),
        (["stages.dpo_2={optim: {max_steps: 100}}"], (3e-3, 6, 2, None), (3e-3, 6, 2, 100)),
        (["~stages.dpo_2.optim.epochs"], (3e-3, 6, 2, None), (3e-3, 6, 1, None)),
        (["stages.dpo_1.optim.lr=1e-4"], (1e-4, 6, 2, None), (1e-4, 6, 2, None)),
        (
            ["stages.dpo_2.optim.max_steps=100", "stages.dpo_1.optim.lr=1e-4"],
            (1e-4, 6, 2, None),
            (1e-4, 6, 2, 100),
        ),
        (["stages.dpo_2.optim={lr: 1e-4}", "stages.dpo_2.optim.lr=1e-5"], (3e-3, 6, 2, None), (1e-5, 6, 2, None)),
    ],
)
def test_a_group_that_refers_to_another_one_differs_in_what_is_overridden_alone(
    tmp_path: Path, overrides: list[str], first: tuple[object, ...], second: tuple[object, ...]
) -> None:
    stages = taken_over(tmp_path, *overrides)
    assert [optim_of(stage) for stage in stages] == [first, second]


@pytest.mark.parametrize(
    ("source", "read", "columns"),
    [
        ("path:mine.jsonl", "path:mine.jsonl", {"prompt": "q"}),
        ("hub:a/b", "bundled:quickstart/preferences", {}),
    ],
)
def test_a_profile_changes_a_group_that_refers_to_another_one(
    tmp_path: Path, source: str, read: str, columns: dict[str, str]
) -> None:
    for stage in taken_over(tmp_path, "profile=smoke", source=source):
        assert (stage.data.source, stage.data.columns, stage.data.limit) == (read, columns, 8)
        assert optim_of(stage) == (3e-3, 2, 2, 2)


OF_ITS_OWN = """\
defaults: [quickstart, _self_]
launch: {sharding: zero3, num_processes: 8}
model: {source: path:models/own}
stages: {sft: {adapter: {kind: full}}, dpo: {adapter: {rank: 4}}}
"""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["adapter=lora"],
            "adapter@stages.sft.adapter=lora: the recipe's own stages.sft.adapter.kind=full replaces it; write "
            "stages.sft.adapter.kind=lora too",
        ),
        (
            ["adapter@stages.sft.adapter=qlora"],
            "adapter@stages.sft.adapter=qlora: the recipe's own stages.sft.adapter.kind=full replaces it; write "
            "stages.sft.adapter.kind=qlora too",
        ),
        (
            ["launch=fsdp"],
            "launch=fsdp: the recipe's own launch.sharding=zero3 replaces it; write launch.sharding=fsdp too",
        ),
        (
            ["model=smollm2_135m"],
            "model=smollm2_135m: the recipe's own model.source=path:models/own replaces it; write "
            "model.source=bundled:smollm2-135m too",
        ),
        (["adapter=lora", "stages.sft.adapter.kind=lora"], None),
        (["adapter=qlora", "stages.sft.adapter={kind: lora}"], None),
        (["adapter=full"], None),
        (["adapter@stages.dpo.adapter=dora"], None),
        (["launch=zero3"], None),
        (["~stages.sft", "adapter=lora"], None),
        (["profile=smoke", "adapter=full"], None),
    ],
)
def test_a_file_that_is_chosen_but_replaced_by_the_recipe_s_own_values_is_refused(
    tmp_path: Path, overrides: list[str], expected: str | None
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(OF_ITS_OWN)
    assert faults(*overrides, recipe=str(recipe)) == ([] if expected is None else [expected])


def test_a_profile_may_change_what_a_chosen_file_says() -> None:
    """A smoke run trains in float32, where weights without float32 copies are refused."""
    config = composed("quickstart", "profile=smoke", "adapter=full_without_masters")
    assert config.stages["sft"].adapter == AdapterConfig(kind=AdapterKind.full)  # type: ignore[union-attr]


def test_what_could_run_code_is_refused_inside_lists_too() -> None:
    assert any("is not allowed" in fault for fault in faults("stages.ppo.scorers=[{_target_: os.system}]"))


# ---- where processes run, beside how they share a model ----------------------------------------------------------


@pytest.mark.parametrize("sharding", ["local", "ddp", "zero1", "zero2", "zero3", "fsdp"])
@pytest.mark.parametrize(
    ("choice", "backend"), [("local", LocalBackend()), ("machines", MachinesBackend()), ("slurm", SlurmBackend())]
)
def test_every_sharding_goes_with_every_backend(sharding: str, choice: str, backend: Backend) -> None:
    for calls in (
        [f"launch={sharding}", f"launch/backend={choice}"],
        [f"launch/backend={choice}", f"launch={sharding}"],
    ):
        launch = composed("quickstart", *calls).launch
        assert launch.backend == backend
        assert launch.sharding.value == ("none" if sharding in ("local", "ddp") else sharding)
        assert launch.num_processes == (1 if sharding == "local" else 0)


def test_a_backend_that_is_chosen_replaces_what_a_recipe_says_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "launch/backend").mkdir(parents=True)
    (tmp_path / "launch/backend/ours.yaml").write_text("defaults: [slurm, _self_]\npartition: gpu\ngpus: 4\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "defaults: [quickstart, override /launch: zero3, override /launch/backend: ours, _self_]\n"
        "launch: {backend: {gpus: 8, time: '1:00:00'}}\n"
    )
    assert composed(str(recipe)).launch.backend == SlurmBackend(partition="gpu", gpus=8, time="1:00:00")
    assert composed(str(recipe), "launch.backend.gpus=2").launch.backend.gpus == 2  # type: ignore[union-attr]
    for choice in (["launch/backend=local"], ["profile=smoke"]):
        assert composed(str(recipe), *choice).launch.backend == LocalBackend()
    assert composed(str(recipe), "launch/backend=slurm").launch.backend == SlurmBackend()
    ours = composed(str(recipe), "profile=smoke", "launch/backend=ours", "launch.backend.wait=false").launch.backend
    assert ours == SlurmBackend(partition="gpu", gpus=4, wait=False)
    assert faults("launch/backend=local", "launch.backend.gpus=2", recipe=str(recipe)) == [
        "launch.backend.gpus: kind 'local' has no such setting; launch/backend=slurm has it"
    ]


# ---- profiles -------------------------------------------------------------------------------------------------------


SMOKE_ROWS = {"reward": 64, "kto": 64, "ppo": 64, "distil": 32}
"""The rows of stages that need several prompts, or both labels; the others read at most 8."""


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_is_scaled_down_to_this_machine(recipe: str) -> None:
    config, full = composed(recipe, "profile=smoke"), composed(recipe)
    assert not [*references.faults(config.stages), *settings.faults(config)]
    assert (config.name, config.launch.num_processes, config.launch.threads) == (f"{recipe}-smoke", 1, 1)
    assert config.model.dtype.value == "float32"
    assert config.stages.keys() == full.stages.keys()
    assert "hub:" not in str(config)
    for name, stage in config.stages.items():
        assert stage.kind == full.stages[name].kind
        assert stage.kind == "report" or stage.data.limit <= SMOKE_ROWS.get(stage.kind, 8)  # type: ignore[union-attr, operator]


def test_the_smoke_profile_has_values_for_every_kind_of_stage() -> None:
    profile = yaml.safe_load((conf_folder() / "profile/smoke.yaml").read_text())
    assert profile["stages"].keys() == STAGES.keys()
    others = {"evaluate.few_shot.data", "evaluate.judge.labelled.data", "forgetting.questions", "reward_card.learned"}
    left_out = {"sample.leave_out", "distil.leave_out"}
    assert profile["instead_of_hub"].keys() == {"model", *STAGES, *others, *left_out} - {"report", "benchmark"}


@pytest.mark.parametrize(("source", "read"), [("path:mine.jsonl",) * 2, ("hub:a/b", "bundled:quickstart/preferences")])
def test_a_smoke_run_asks_a_judge_about_few_labelled_pairs(tmp_path: Path, source: str, read: str) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "defaults: [base, stage@stages.evaluate: evaluate, _self_]\n"
        "stages: {evaluate: {judge: {kind: metric, labelled: {data: {source: 'SOURCE'}, max_prompts: 50}}}}\n".replace(
            "SOURCE", source
        )
    )
    labelled = composed(str(recipe), "profile=smoke").stages["evaluate"].judge.labelled  # type: ignore[union-attr]
    assert (labelled.data.source, labelled.data.limit, labelled.max_prompts) == (read, 8, 2)
    recipe.write_text(recipe.read_text().replace(source, "").replace(", max_prompts: 50", ""))
    for without in (str(recipe), "quickstart"):
        labelled = composed(without, "profile=smoke").stages["evaluate"].judge.labelled  # type: ignore[union-attr]
        assert labelled == LabelledConfig()


@pytest.mark.parametrize("recipe", ["quickstart", "tldr_1b_ppo"])
@pytest.mark.parametrize(("processes", "machines"), [(1, 1), (2, 1), (3, 1), (2, 4)])
def test_a_smoke_run_of_several_processes_has_something_for_each(recipe: str, processes: int, machines: int) -> None:
    meeting = ("launch/backend=machines", f"launch.backend.num_machines={machines}") if machines > 1 else ()
    config = composed(recipe, "profile=smoke", "launch=zero2", f"launch.num_processes={processes}", *meeting)
    every = processes * machines
    assert config.launch.world_size == every
    for name, stage in config.stages.items():
        if isinstance(stage, PpoConfig):
            assert not list(size_faults(stage, every, name))
            assert (stage.data.limit, stage.guard.prompts, stage.optim.batch_size) == (64 * every, 2 * every, 4 * every)
        elif trains(stage.kind):
            assert (stage.data.limit, stage.optim.batch_size) == (SMOKE_ROWS.get(stage.kind, 8) * every, 2 * every)
        elif stage.kind == "evaluate":
            assert stage.data.limit == 2  # type: ignore[union-attr]


def test_the_command_line_has_the_last_word_over_a_profile() -> None:
    overrides = ("launch=ddp", "launch.num_processes=3", "stages.dpo.optim.batch_size=6", "name=mine")
    config = composed("quickstart", "profile=smoke", *overrides)
    assert (config.launch.num_processes, config.stages["dpo"].optim.batch_size) == (3, 6)  # type: ignore[union-attr]
    assert config.name == "mine-smoke"
    for name in ("a-smoke", "a-smoke.dpo_beta.3"):
        assert composed("quickstart", "profile=smoke", f"name={name}").name == name


def test_a_profile_keeps_what_lies_on_this_machine_and_all_that_it_says_nothing_of(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "defaults: [base, stage@stages.first: sft, stage@stages.second: dpo, _self_]\n"
        "model: {source: path:/models/mine, chat_template: chatml}\n"
        "launch: {num_processes: 8}\n"
        "stages:\n"
        "  first:\n"
        "    data: {source: path:rows.jsonl, columns: {prompt: q}, fraction: 0.5, mix: [{source: hub:a/b, count: 9}]}\n"
        "    optim: {lr: 3e-3}\n"
        "  second:\n"
        "    init: stage:first\n"
        "    data: {source: hub:a/b@c, split: prefs, columns: {chosen: x}}\n"
        "    beta: 0.7\n"
    )
    config = composed(str(recipe), "profile=smoke")
    assert (config.model.source, config.model.chat_template) == ("path:/models/mine", "chatml")
    assert config.launch.num_processes == 1
    first, second = (config.stages[name] for name in ("first", "second"))
    assert (first.data.source, first.data.columns) == ("path:rows.jsonl", {"prompt": "q"})  # type: ignore[union-attr]
    assert (first.data.fraction, first.data.mix, first.optim.lr) == (0.5, [], 3e-3)  # type: ignore[union-attr]
    assert (second.data.source, second.data.split) == ("bundled:quickstart/preferences", "train")  # type: ignore[union-attr]
    assert (second.data.columns, second.beta) == ({}, 0.7)  # type: ignore[union-attr]


def test_a_smoke_run_drops_what_a_single_cpu_or_short_answers_would_refuse(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "defaults: [quickstart, override /launch: zero3, _self_]\n"
        "launch: {num_processes: 8, offload: optimizer}\n"
        "stages:\n"
        "  dpo: {optim: {moments: paged_eight_bit}}\n"
        "  ppo: {max_new_tokens: 256, overlong: {buffer: 64, weight: 0.5}, optim: {moments: paged_eight_bit}}\n"
    )
    config, full = composed(str(recipe), "profile=smoke"), composed(str(recipe))
    assert full.launch.offload is Offload.optimizer
    assert full.stages["ppo"].overlong.buffer == 64  # type: ignore[union-attr]
    assert not list(settings.faults(config))
    assert config.launch.offload is Offload.none
    assert {config.stages[name].optim.moments for name in ("dpo", "ppo")} == {Moments.full}  # type: ignore[union-attr]


@pytest.mark.parametrize("value", ["http://me:pass,word@host", "{pass"])
def test_what_may_be_a_key_is_not_repeated_where_it_is_no_override(value: str) -> None:
    key = "stages.evaluate.judge.endpoint.base_url"
    (fault,) = faults(f"{key}={value}")
    assert fault.startswith(f"{key}=…: ")
    assert "pass" not in fault
    (fault,) = faults(f"stages.ppo.scorers=[{{source: server, server: {{base_url: {value}")
    assert fault.startswith("stages.ppo.scorers=…: ")
    assert "pass" not in fault


def test_a_smoke_run_asks_no_hub_for_questions_and_examples(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "defaults: [base, stage@stages.sft: sft, stage@stages.asked: evaluate, stage@stages.lost: forgetting, _self_]\n"
        "stages:\n"
        "  asked: {arms: [base], reward: null, few_shot: {count: 2, data: {source: hub:a/b@c, split: dev}}}\n"
        "  lost: {arms: ['stage:sft'], questions: {source: hub:a/b@c, columns: {question: q}}}\n"
    )
    stages = composed(str(recipe), "profile=smoke").stages
    few_shot, questions = stages["asked"].few_shot, stages["lost"].questions  # type: ignore[union-attr]
    assert (few_shot.count, few_shot.data.source) == (2, "bundled:quickstart/conversations")
    assert (few_shot.data.split, questions.columns) == ("train", {})
    assert questions.source == "bundled:general/questions"


def test_a_smoke_run_asks_no_hub_for_what_is_left_out_or_was_learned(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "defaults: [base, stage@stages.sft: sft, stage@stages.card: reward_card, stage@stages.sample: sample, "
        "stage@stages.draft: draft, _self_]\n"
        "stages:\n"
        "  card: {learned: {source: hub:a/b@c, columns: {chosen: x}}}\n"
        "  sample: {leave_out: [{source: hub:a/b@c, split: dev}, {source: path:mine.jsonl, split: dev}]}\n"
        "  draft: {leave_out: [{source: hub:a/b@c}]}\n"
    )
    tree = compose(str(recipe), ["profile=smoke"]).tree["stages"]
    assert "hub:" not in str(tree)
    assert tree["card"]["learned"] == {"source": "bundled:quickstart/preferences", "limit": 64, "mix": []}
    heldout = {"source": "bundled:quickstart/heldout"}
    assert tree["sample"]["leave_out"] == [heldout, {"source": "path:mine.jsonl", "split": "dev"}]
    assert tree["draft"]["leave_out"] == [heldout]


def test_a_profile_of_the_user_s_own_stands_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile/night.yaml").write_text("stages: {dpo: {beta: 0.5, bata: 1}}\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults: [quickstart, _self_]\n")
    assert faults("profile=night", recipe=str(recipe)) == ["stages.dpo.bata: unknown key; did you mean 'beta'?"]
    composition = compose(str(recipe), ["profile=night"])
    assert composition.tree["name"] == "mine-night"
    assert composition.tree["stages"]["dpo"]["beta"] == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: {dpo: {}}", "mine.yaml: unknown key 'stage'; did you mean 'stages'?"),
        ("stages: {dop: {}}", "mine.yaml: stages: unknown key 'dop'; did you mean 'dpo'?"),
        ("stages: {dpo: 3}", "mine.yaml: stages.dpo: 3 is not a group of settings"),
        ("choices: {lanch: local}", "mine.yaml: choices: unknown key 'lanch'; did you mean 'launch'?"),
        ("instead_of_hub: {modl: x}", "mine.yaml: instead_of_hub: unknown key 'modl'; did you mean 'model'?"),
        ("for_each_process: {dop: {}}", "mine.yaml: for_each_process: unknown key 'dop'; did you mean 'dpo'?"),
        ("for_each_process: {dpo: 3}", "mine.yaml: for_each_process.dpo: 3 is not a group of settings"),
        (
            "where_named: {evaluate.jugde.labelled.data: {}}",
            "mine.yaml: where_named: unknown key 'evaluate.jugde.labelled.data'; did you mean 'evaluate.judge.",
        ),
        ("values: 3", "mine.yaml: values: 3 is not a group of settings"),
        ("- a", "mine.yaml: ['a'] is not a group of settings"),
        ("a: [", "mine.yaml: not YAML"),
    ],
)
def test_a_profile_of_another_form_says_so(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile/mine.yaml").write_text(text)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("defaults: [quickstart, _self_]\n")
    with pytest.raises(ConfigError) as caught:
        compose(str(recipe), ["profile=mine"])
    assert message in str(caught.value)


def test_what_a_profile_cannot_choose_is_named(tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile/mine.yaml").write_text("choices: {launch: lokal}\nvalues: {summary: '${oc.env:HOME}'}\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("defaults: [quickstart, _self_]\n")
    messages = faults("profile=mine", recipe=str(recipe))
    assert "launch=lokal: no launch 'lokal'; did you mean 'local'?" in messages
    assert any(fault.startswith("summary: ") and "is not allowed" in fault for fault in messages)
    assert faults("profile=mine", "profile=mine", recipe=str(recipe)) == [
        "profile=mine profile=mine: write profile=NAME, once"
    ]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            "stages: {evaluate: {gate: {arm: 'stage:dpo', against: base}}}",
            "stages.evaluate.gate: {'arm': 'stage:dpo', 'against': 'base'} is not allowed; it takes a list of groups, "
            "each with some of the keys arm, against, metric, min_difference; write [{arm: stage:dpo, against: base}]",
        ),
        (
            "stages: {judged: {metrics: {name: brevity}}}",
            "stages.judged.metrics: {'name': 'brevity'} is not allowed; it takes a list of groups",
        ),
        (
            "stages: {evaluate: {arms: {name: base}}}",
            "stages.evaluate.arms: {'name': 'base'} is not allowed; it takes a list",
        ),
        ("stages: {dpo: {optim: [1]}}", "stages.dpo.optim: [1] is not a group of settings; it takes the keys lr, "),
        ("stages: {dpo: [1]}", "stages.dpo: [1] is not a stage; it takes settings, beginning with 'kind'"),
        ("stages: [dpo]", "stages: ['dpo'] is not a group of stages"),
        ("stages: [{dpo: 1}]", "stages: [{'dpo': 1}] is not a group of stages"),
        ("launch: [1]", "launch: [1] is not a group of settings"),
    ],
)
def test_a_list_and_a_group_that_are_confused_are_named(tmp_path: Path, stages: str, words: str) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"defaults: [quickstart, stage@stages.judged: evaluate, _self_]\nsummary: mine\n{stages}\n")
    with pytest.raises(ConfigError) as caught:
        make_plan(str(recipe), [])
    assert f"{recipe}: {words}" in str(caught.value)


def test_a_misspelt_file_of_a_recipe_or_sweep_is_named(tmp_path: Path) -> None:
    (tmp_path / "measures.yaml").touch()
    with pytest.raises(ConfigError, match=r"no file .*/mesures\.yaml\n  → did you mean .*/measures\.yaml\?"):
        find_recipe(str(tmp_path / "mesures.yaml"))
    with pytest.raises(ConfigError, match="→ shipped recipes: "):
        find_recipe(str(tmp_path / "quite-another.yaml"))
    with pytest.raises(ConfigError, match=r"no file .*/mesures\.yaml\n  → did you mean .*/measures\.yaml\?"):
        read_sweep("quickstart", str(tmp_path / "mesures.yaml"), [])
