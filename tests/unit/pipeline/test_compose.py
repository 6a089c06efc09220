"""Recipes and overrides compose, or say what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.config.faults import Fault
from alignment.config.launch import Engine, LocalBackend, Offload, RolloutSamplingConfig, SlurmBackend
from alignment.config.model import AdapterConfig, AdapterKind
from alignment.config.optim import Moments
from alignment.config.run import GROUPS, RunConfig, conf_folder, recipe_names, recipes_folder
from alignment.config.scoring import ScorerConfig
from alignment.config.typed import convert, typed
from alignment.core.errors import ConfigError
from alignment.pipeline.plan import references, settings
from alignment.pipeline.plan.compose import compose
from alignment.pipeline.plan.plan import make_plan
from alignment.pipeline.sweeps.sweep_file import read_sweep
from alignment.stages.ppo.checks import size_faults
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.registry import config_classes, trains
from tests.unit.pipeline.conftest import write

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


def stages(recipe: str, *overrides: str) -> Any:
    return composed(recipe, *overrides).stages


def faults(*overrides: str, recipe: str = "quickstart") -> list[Fault]:
    composition = compose(recipe, overrides)
    return [*composition.faults, *convert(composition.tree, config_classes())[1]]


def own(folder: Path, text: str, *, name: str = "mine", base: str = "quickstart") -> str:
    return write(folder / f"{name}.yaml", f"defaults: [{base}, _self_]\n{text}\n")


def test_the_recipes_and_choices_tested_here_are_those_on_disk() -> None:
    assert recipes_folder() == ROOT / "recipes"
    assert len(recipe_names()) == len(list((ROOT / "recipes").iterdir())) >= 3
    assert len(FILES) == len([path for path in (ROOT / "conf").rglob("*") if path.is_file()]) - 1  # base.yaml
    assert {group for group, _ in FILES} == {*GROUPS, "profile", SWEEPS}


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_composes_and_has_a_source_for_each_number(recipe: str) -> None:
    config = composed(recipe)
    assert (config.name, bool(config.summary)) == (recipe, True)
    assert not references.faults(config.stages)
    for line in (recipes_folder() / f"{recipe}.yaml").read_text().splitlines():
        value = line.partition("#")[0].partition(":")[2]
        assert line.startswith("summary:") or "#" in line or not any(map(str.isdigit, value)), line


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes(group: str, choice: str) -> None:
    assert isinstance(yaml.safe_load((conf_folder() / group / f"{choice}.yaml").read_text()), dict)
    override = f"+stage@stages.more={choice}" if group == "stage" else f"{group}={choice}"
    assert ("more" in composed("quickstart", override).stages) == (group == "stage")


def test_an_adapter_means_the_same_however_it_is_chosen() -> None:
    chosen = composed("quickstart", "adapter=full")
    trained = {name: stage.adapter.kind for name, stage in chosen.stages.items() if hasattr(stage, "adapter")}
    assert trained == dict.fromkeys(["sft", "reward", "dpo", "ppo"], "full")
    for text in ("adapter@stages.{}.adapter=full", "stages.{}.adapter.kind=full", "stages.{}.adapter={{kind: full}}"):
        assert composed("quickstart", *map(text.format, trained)) == chosen
        assert stages("quickstart", text.format("dpo"))["sft"].adapter.kind == "lora"


def test_a_file_beside_the_recipe_never_replaces_a_shipped_one(tmp_path: Path) -> None:
    unrelated = {"base": "hello: 1", "stage/sft": "kind: dpo", "profile/smoke": "{}", "launch/ddp": "hello: 1"}
    files = {name: Path(write(tmp_path / f"{name}.yaml", text)) for name, text in unrelated.items()}
    recipe = own(tmp_path, "", base="base, stage@stages.sft: sft")
    assert compose(recipe, []).unread == (files["base"], files["stage/sft"])
    config = composed(recipe, "launch=ddp", "profile=smoke")
    assert (config.stages["sft"].kind, config.launch.num_processes, config.name) == ("sft", 1, "mine-smoke")
    assert set(compose(recipe, ["launch=ddp", "profile=smoke"]).unread) == set(files.values())


def test_recipes_that_include_each_other_are_named(tmp_path: Path) -> None:
    write(tmp_path / "innocent.yaml", "seed: 3\n")
    names = ("mine", "other", "third")
    for name, included in zip(names, (*names[1:], "mine"), strict=True):
        own(tmp_path, "", name=name, base=f"base, innocent, {included}")
    with pytest.raises(ConfigError) as caught:
        compose(str(tmp_path / "mine.yaml"), [])
    assert all(f"{name}.yaml" in caught.value.message for name in names)
    assert "innocent" not in str(caught.value)


SOURCE = "stages.sft.data.source"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        *((SOURCE, text, text) for text in ("path:日本/語 (1).jsonl", "path:it's.jsonl")),
        (SOURCE, "path:rows, v2.jsonl", "path:rows, v2.jsonl"),
        (SOURCE, "'path:in \"quotes\", ü.jsonl'", 'path:in "quotes", ü.jsonl'),
        ("stages.sft.data.columns", "{prompt: Fräge, chosen: 'gut, ß'}", {"prompt": "Fräge", "chosen": "gut, ß"}),
    ],
)
def test_letters_of_every_language_need_no_quotes(key: str, text: str, value: object) -> None:
    tree = compose("quickstart", [f"{key}={text}"]).tree
    for part in key.split("."):
        tree = tree[part]
    assert tree == value


FAULTY = [
    ("stages.evaluate.metrics={name: brevity}", "stages.evaluate.metrics", "[{name: brevity}]"),
    ("lauch=local", "lauch", "'launch'"),
    ("adapter@stages.sfd.adapter=full", "", "'adapter@stages.sft.adapter'"),
    ("launch/backend=slrum", "", "'slurm'"),
    ("launch.backend=slurm", "launch.backend", "launch/backend=slurm"),
    ("launch.backend.gpus=2", "launch.backend.gpus", "launch/backend=slurm"),
    ("profile=smok", "", "'smoke'"),
    ("profile@stages=smoke", "", "once"),
    ("~stages.pppo", "", "'ppo'"),
    (f"{SOURCE}=path:a'b\"c", "", "key=value"),
    ("adapter.kind=full", "adapter.kind", "stages.NAME.adapter.kind"),
    ("seed=1,2", "", "give one"),
    ("seed", "", "key=value"),
    (f"seed={'[' * 31}{']' * 31}", f"seed={'[' * 31}{']' * 24}…", "31 deep"),
    ("hydra.run.dir=x", "", "not allowed"),
    ("summary=${nowhere}", "summary", "'nowhere'"),
    ("stages.sft._target_=os.system", "stages.sft._target_", "not allowed"),
    ("summary=${oc.env:HOME}", "summary", "not allowed"),
    ("summary='${${seed}:HOME}'", "summary", "not allowed"),
    ("summary='${a.${oc.env:HOME}'", "summary", "not allowed"),
]


@pytest.mark.parametrize(("override", "where", "word"), FAULTY)
def test_a_faulty_override_is_named_with_what_is_allowed(override: str, where: str, word: str) -> None:
    problems = faults(override)
    assert {fault.where for fault in problems} >= {where or override}
    assert len(problems) == 1 or word == "not allowed"
    assert any(word in fault.message for fault in problems if fault.where == (where or override))


@pytest.mark.parametrize("value", ["http://me:pass,word@host", "{pass"])
def test_what_may_be_a_key_is_not_repeated_where_it_is_no_override(value: str) -> None:
    url = "stages.evaluate.judge.endpoint.base_url"
    for override in (f"{url}={value}", f"stages.ppo.scorers=[{{source: server, server: {{base_url: {value}"):
        (fault,) = faults(override)
        assert fault.where == f"{override.partition('=')[0]}=…"
        assert "pass" not in str(fault)


REFUSED_RECIPES = [
    ("defaults: [base]\nmodel: {_target_: os.system}", "not allowed"),
    ("defaults: [base, {model: '${oc.env:HOME}'}]", "not allowed"),
    ("defaults: [_self_, quickstart]\nseed: 3", "'_self_' must come last"),
    ("- a", "a group of settings"),
    ("defaults: [base, stage@stages.sft: sfft]", "'stage/sfft'; did you mean 'sft'"),
]


@pytest.mark.parametrize(("text", "word"), REFUSED_RECIPES)
def test_a_recipe_that_cannot_be_read_is_refused(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(write(tmp_path / "bad.yaml", f"{text}\n"), [])
    assert word in str(caught.value)


CONFUSED = [
    ("stages: {evaluate: {gate: {arm: a, against: b}}}", "stages.evaluate.gate", "[{arm: a, against: b}]"),
    ("stages: {dpo: [1]}", "stages.dpo", "'kind'"),
    ("stages: [dpo]", "stages", "group of stages"),
]


@pytest.mark.parametrize(("text", "where", "word"), CONFUSED)
def test_a_list_and_a_group_that_are_confused_are_named(tmp_path: Path, text: str, where: str, word: str) -> None:
    recipe = own(tmp_path, text, base="quickstart")
    with pytest.raises(ConfigError) as caught:
        make_plan(recipe, [])
    assert f"{recipe}: {where}" in str(caught.value)
    assert word in str(caught.value)


def test_a_recipe_or_sweep_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "measures.yaml", "")
    for recipe, word in (
        ("quikstart", "did you mean 'quickstart'"),
        (f"{tmp_path}/mesures.yaml", f"did you mean {tmp_path}/measures.yaml"),
        (f"{tmp_path}/quite-another.yaml", "shipped recipes: "),
    ):
        with pytest.raises(ConfigError) as caught:
            compose(recipe, [])
        assert (caught.value.where, word in str(caught.value)) == (recipe, True)
    with pytest.raises(ConfigError, match=r"did you mean .*/measures\.yaml"):
        read_sweep("quickstart", f"{tmp_path}/mesures.yaml", [])


def test_a_list_of_groups_is_given_as_one_value_and_replaces_the_recipe_s(tmp_path: Path) -> None:
    listed = "[{source: reward, normalize: true}, {source: length, target: 20}]"
    recipe = own(tmp_path, f"stages: {{ppo: {{scorers: {listed}}}}}")
    expected = [ScorerConfig(normalize=True), ScorerConfig(source="length", target=20)]
    assert stages(recipe)["ppo"].scorers == expected
    pattern = r"^\s*<a>\d+</a>$"
    for start in ("quickstart", recipe):
        ppo = stages(start, f"stages.ppo.scorers=[{{source: regex, pattern: '{pattern}', weight: 5e-1}}]")["ppo"]
        assert ppo.scorers == [ScorerConfig(source="regex", pattern=pattern, weight=0.5)]
    ppo = stages(recipe, "stages.ppo.scorers.1.target=30", "stages.ppo.guard.scorer.source=reward")["ppo"]
    assert (ppo.scorers[1].target, ppo.guard.scorer) == (30, ScorerConfig(source="reward"))


TAKEN_OVER = """\
stages:
  dpo_1: {init: base, data: {source: 'SOURCE', columns: {prompt: q}}, optim: {lr: 3e-3, batch_size: 6, epochs: 2}}
  dpo_2: {init: stage:dpo_1, data: "${stages.dpo_1.data}", optim: "${stages.dpo_1.optim}"}
"""
BOTH_DPO = "base, stage@stages.dpo_1: dpo, stage@stages.dpo_2: dpo"
FIRST = (3e-3, 6, 2, None)


def optims(folder: Path, *overrides: str) -> list[tuple[object, ...]]:
    both = stages(own(folder, TAKEN_OVER.replace("SOURCE", "path:mine.jsonl"), base=BOTH_DPO), *overrides).values()
    return [(of.optim.lr, of.optim.batch_size, of.optim.epochs, of.optim.max_steps) for of in both]


@pytest.mark.parametrize(
    ("overrides", "first", "second"),
    [
        (["dpo_2.optim.max_steps=100"], FIRST, (3e-3, 6, 2, 100)),
        (["dpo_2.optim.max_steps=100", "dpo_1.optim.lr=1e-4"], (1e-4, 6, 2, None), (1e-4, 6, 2, 100)),
        (["dpo_2.optim={lr: 1e-4}", "dpo_2.optim.lr=1e-5"], FIRST, (1e-5, 6, 2, None)),
    ],
)
def test_a_group_that_refers_to_another_one_differs_in_what_is_overridden_alone(
    tmp_path: Path, overrides: list[str], first: tuple[object, ...], second: tuple[object, ...]
) -> None:
    assert optims(tmp_path, *(f"stages.{override}" for override in overrides)) == [first, second]
    assert optims(tmp_path, "~stages.dpo_2.optim.epochs") == [FIRST, (3e-3, 6, 1, None)]


OF_ITS_OWN = """\
launch: {sharding: zero3, num_processes: 8}
model: {source: path:models/own}
stages: {sft: {adapter: {kind: full}}, dpo: {adapter: {rank: 4}}}
"""


@pytest.mark.parametrize(
    ("overrides", "where", "remedy"),
    [
        (["adapter=lora"], "adapter@stages.sft.adapter=lora", "stages.sft.adapter.kind=lora"),
        (["model=smollm2_135m"], "model=smollm2_135m", "model.source=bundled:smollm2-135m"),
        (["adapter=qlora", "stages.sft.adapter={kind: lora}"], "", ""),
        (["~stages.sft", "adapter=lora"], "", ""),
        (["profile=smoke", "adapter=full"], "", ""),
    ],
)
def test_a_chosen_file_that_has_no_effect_is_refused(
    tmp_path: Path, overrides: list[str], where: str, remedy: str
) -> None:
    problems = faults(*overrides, recipe=own(tmp_path, OF_ITS_OWN))
    assert [fault.where for fault in problems] == [where] * bool(where)
    assert all(fault.message.endswith(f"write {remedy} too") for fault in problems)


def test_a_backend_that_is_chosen_replaces_what_a_recipe_says_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "launch/backend/ours.yaml", "defaults: [slurm, _self_]\npartition: gpu\ngpus: 4\n")
    chosen = "quickstart, override /launch: zero3, override /launch/backend: ours"
    recipe = own(tmp_path, "launch: {backend: {gpus: 8, time: '1:00:00'}}", base=chosen)
    for overrides, backend in (
        ([], SlurmBackend(partition="gpu", gpus=8, time="1:00:00")),
        (["launch.backend.gpus=2"], SlurmBackend(partition="gpu", gpus=2, time="1:00:00")),
        (["launch/backend=local"], LocalBackend()),
        (["profile=smoke"], LocalBackend()),
        (["launch/backend=slurm"], SlurmBackend()),
        (["profile=smoke", "launch/backend=ours", "launch.backend.wait=false"],
         SlurmBackend(partition="gpu", gpus=4, wait=False)),
    ):  # fmt: skip
        assert composed(recipe, *overrides).launch.backend == backend
    (fault,) = faults("launch/backend=local", "launch.backend.gpus=2", recipe=recipe)
    assert fault.where == "launch.backend.gpus"


SMOKE_ROWS = {"reward": 64, "kto": 64, "ppo": 64, "distil": 32}
"""The rows of stages that need several prompts, or both labels; the others read at most 8."""


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_is_scaled_down_to_this_machine(recipe: str) -> None:
    config, full = composed(recipe, "profile=smoke"), composed(recipe)
    assert not [*references.faults(config.stages), *settings.faults(config)]
    assert (config.name, config.launch.num_processes, config.launch.threads) == (f"{recipe}-smoke", 1, 1)
    assert (config.model.dtype.value, "hub:" in str(config)) == ("float32", False)
    assert [(name, of.kind) for name, of in config.stages.items()] == [(n, of.kind) for n, of in full.stages.items()]
    for stage in config.stages.values():
        assert stage.kind == "report" or stage.data.limit <= SMOKE_ROWS.get(stage.kind, 8)  # type: ignore[union-attr, operator]


def test_the_smoke_profile_has_values_for_every_kind_of_stage() -> None:
    profile = yaml.safe_load((conf_folder() / "profile/smoke.yaml").read_text())
    kinds = config_classes().keys()
    assert profile["stages"].keys() == kinds
    others = {"evaluate.few_shot.data", "evaluate.judge.labelled.data", "forgetting.questions", "reward_card.learned"}
    left_out = {"sample.leave_out", "distil.leave_out"}
    assert profile["instead_of_hub"].keys() == {"model", *kinds, *others, *left_out} - {"report", "benchmark"}


@pytest.mark.parametrize(("processes", "machines"), [(3, 1), (2, 4)])
def test_a_smoke_run_of_several_processes_has_something_for_each(processes: int, machines: int) -> None:
    meeting = ("launch/backend=machines", f"launch.backend.num_machines={machines}") if machines > 1 else ()
    config = composed("quickstart", "profile=smoke", "launch=zero2", f"launch.num_processes={processes}", *meeting)
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


def test_the_command_line_has_the_last_word_over_a_profile_and_a_profile_over_a_chosen_file() -> None:
    overrides = ("launch=ddp", "launch.num_processes=3", "stages.dpo.optim.batch_size=6", "name=mine")
    config = composed("quickstart", "profile=smoke", *overrides)
    assert (config.launch.num_processes, config.stages["dpo"].optim.batch_size) == (3, 6)  # type: ignore[union-attr]
    assert config.name == "mine-smoke"
    for name in ("a-smoke", "a-smoke.dpo_beta.3"):
        assert composed("quickstart", "profile=smoke", f"name={name}").name == name
    # A smoke run trains in float32, where weights without float32 copies are refused.
    sft = stages("quickstart", "profile=smoke", "adapter=full_without_masters")["sft"]
    assert sft.adapter == AdapterConfig(kind=AdapterKind.full)


def test_a_profile_keeps_what_lies_on_this_machine_and_all_that_it_says_nothing_of(tmp_path: Path) -> None:
    mixed = "columns: {prompt: q}, fraction: 0.5, mix: [{source: hub:a/b, count: 9}]"
    text = f"""\
model: {{source: path:/models/mine, chat_template: chatml}}
launch: {{num_processes: 8}}
stages:
  first: {{data: {{source: path:rows.jsonl, {mixed}}}, optim: {{lr: 3e-3}}}}
  second: {{init: stage:first, data: {{source: hub:a/b@c, split: prefs, columns: {{chosen: x}}}}, beta: 0.7}}
"""
    config: Any = composed(own(tmp_path, text, base="base, stage@stages.first: sft, stage@stages.second: dpo"),
                           "profile=smoke")  # fmt: skip
    assert (config.model.source, config.model.chat_template) == ("path:/models/mine", "chatml")
    assert config.launch.num_processes == 1
    first, second = config.stages["first"], config.stages["second"]
    assert (first.data.source, first.data.columns) == ("path:rows.jsonl", {"prompt": "q"})
    assert (first.data.fraction, first.data.mix, first.optim.lr) == (0.5, [], 3e-3)
    assert (second.data.source, second.data.split) == ("bundled:quickstart/preferences", "train")
    assert (second.data.columns, second.beta) == ({}, 0.7)


def test_a_smoke_run_drops_what_a_single_cpu_or_short_answers_would_refuse(tmp_path: Path) -> None:
    text = """\
launch: {num_processes: 8, offload: optimizer}
stages:
  dpo: {optim: {moments: paged_eight_bit}}
  ppo: {max_new_tokens: 256, overlong: {buffer: 64, weight: 0.5}, optim: {moments: paged_eight_bit}}
"""
    recipe = own(tmp_path, text, base="quickstart, override /launch: zero3")
    config, full = composed(recipe, "profile=smoke"), composed(recipe)
    assert (full.launch.offload, full.stages["ppo"].overlong.buffer) == (Offload.optimizer, 64)  # type: ignore[union-attr]
    assert not list(settings.faults(config))
    assert config.launch.offload is Offload.none
    assert {config.stages[name].optim.moments for name in ("dpo", "ppo")} == {Moments.full}  # type: ignore[union-attr]


def test_a_smoke_run_samples_itself_where_a_recipe_names_an_engine(tmp_path: Path) -> None:
    text = """\
stages:
  ppo: {sampling: {engine: vllm, importance_cap: 2.0, max_staleness: 1}}
  sample: {sampling: {engine: vllm}}
  evaluate: {sampling: {engine: vllm}}
"""
    recipe = own(tmp_path, text, base="quickstart, stage@stages.sample: sample")
    config: Any = composed(recipe, "profile=smoke", "stages.evaluate.sampling.engine=vllm")
    assert config.stages["ppo"].sampling == RolloutSamplingConfig()
    assert config.stages["sample"].sampling.engine is Engine.own
    assert config.stages["evaluate"].sampling.engine is Engine.vllm, "the command line has the last word"


def test_a_smoke_run_asks_no_hub_for_further_data(tmp_path: Path) -> None:
    kinds = "sft: sft, stage@stages.asked: evaluate, stage@stages.lost: forgetting, stage@stages.card: reward_card, "
    kinds += "stage@stages.sample: sample, stage@stages.draft: draft"
    text = """\
stages:
  asked: {arms: [base], reward: null, few_shot: {count: 2, data: {source: hub:a/b@c, split: dev}}}
  lost: {arms: ['stage:sft'], questions: {source: hub:a/b@c, columns: {question: q}}}
  card: {learned: {source: hub:a/b@c, columns: {chosen: x}}}
  sample: {leave_out: [{source: hub:a/b@c, split: dev}, {source: path:mine.jsonl, split: dev}]}
  draft: {leave_out: [{source: hub:a/b@c}]}
"""
    tree = compose(own(tmp_path, text, base=f"base, stage@stages.{kinds}"), ["profile=smoke"]).tree["stages"]
    assert "hub:" not in str(tree)
    few_shot = {"count": 2, "data": {"source": "bundled:quickstart/conversations"}}
    assert few_shot["data"].items() <= tree["asked"]["few_shot"]["data"].items()  # type: ignore[attr-defined]
    assert (tree["asked"]["few_shot"]["count"], "split" in tree["asked"]["few_shot"]["data"]) == (2, False)
    assert (tree["lost"]["questions"]["source"], "columns" in tree["lost"]["questions"]) == (
        "bundled:general/questions", False)  # fmt: skip
    assert tree["card"]["learned"] == {"source": "bundled:quickstart/preferences", "limit": 64, "mix": []}
    heldout = {"source": "bundled:quickstart/heldout"}
    assert tree["sample"]["leave_out"] == [heldout, {"source": "path:mine.jsonl", "split": "dev"}]
    assert tree["draft"]["leave_out"] == [heldout]


def test_a_profile_of_the_user_s_own_stands_beside_the_recipe(tmp_path: Path) -> None:
    write(tmp_path / "profile/night.yaml", "stages: {dpo: {beta: 0.5, bata: 1}}\n")
    recipe = own(tmp_path, "")
    assert [fault.where for fault in faults("profile=night", recipe=recipe)] == ["stages.dpo.bata"]
    tree = compose(recipe, ["profile=night"]).tree
    assert (tree["name"], tree["stages"]["dpo"]["beta"]) == ("mine-night", 0.5)
    write(tmp_path / "profile/night.yaml", "choices: {launch: lokal}\nvalues: {summary: '${oc.env:HOME}'}\n")
    assert {"launch=lokal", "summary"} <= {fault.where for fault in faults("profile=night", recipe=recipe)}
    twice = faults("profile=night", "profile=night", recipe=recipe)
    assert [fault.where for fault in twice] == ["profile=night profile=night"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stage: {dpo: {}}", "unknown key 'stage'; did you mean 'stages'"),
        ("for_each_process: {dpo: 3}", "for_each_process.dpo: 3"),
        ("where_named: {evaluate.jugde.labelled.data: {}}", "where_named: unknown key 'evaluate.jugde.labelled.data'"),
        ("- a", "['a']"),
    ],
)
def test_a_profile_of_another_form_says_so(tmp_path: Path, text: str, words: str) -> None:
    write(tmp_path / "profile/own.yaml", text)
    with pytest.raises(ConfigError) as caught:
        compose(own(tmp_path, ""), ["profile=own"])
    assert f"own.yaml: {words}" in str(caught.value)


def test_a_sweep_in_the_place_of_a_recipe_is_named_with_the_command_that_plans_it(tmp_path: Path) -> None:
    copy = write(tmp_path / "mine.yaml", (conf_folder() / "sweep/dpo_beta.yaml").read_text())
    for recipe in ("dpo_beta", copy):
        with pytest.raises(ConfigError) as caught:
            compose(recipe, [])
        assert (caught.value.where, f"`align sweep RECIPE {recipe}`" in caught.value.remedy) == (recipe, True)
