"""Recipes without a list ``defaults``, and settings under the names that other tools give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.config.faults import Fault
from alignment.config.foreign_keys import FOREIGN
from alignment.config.run import GROUPS, RunConfig, conf_folder
from alignment.config.typed import convert, paths_below, sweep_from_plain
from alignment.core.errors import ConfigError
from alignment.pipeline.plan.compose import compose
from alignment.stages import registry
from alignment.stages.registry import config_classes
from alignment.training.optimizer import BETAS

SHORT = """
model: Qwen/Qwen2.5-0.5B-Instruct
adapter: qlora
launch: {use: zero3, num_processes: 8}
tracking: [wandb, tensorboard]
stages:
  sft: {optim: {lr: 1e-4}}
  best: {kind: sft, adapter: lora}
  dpo: {adapter: {rank: 4}}
  test: {use: evaluate_house_style, adapter: {}}
  report:
"""
LONG = """
defaults:
  - base
  - stage@stages.sft: sft
  - stage@stages.best: sft
  - stage@stages.dpo: dpo
  - stage@stages.test: evaluate_house_style
  - stage@stages.report: report
  - override /launch: zero3
  - override /tracking: [wandb, tensorboard]
  - override /adapter@stages.sft.adapter: qlora
  - override /adapter@stages.dpo.adapter: qlora
  - _self_
model: {source: hub:Qwen/Qwen2.5-0.5B-Instruct}
launch: {num_processes: 8}
stages:
  sft: {optim: {lr: 1e-4}}
  dpo: {adapter: {rank: 4}}
  test: {adapter: {}}
"""


def recipe(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_short_form_means_the_long_one(tmp_path: Path) -> None:
    overrides = ["profile=smoke", "adapter@stages.best.adapter=dora", "seed=1"]
    short = [compose(recipe(tmp_path, SHORT), chosen) for chosen in ([], overrides)]
    long = [compose(recipe(tmp_path, LONG), chosen) for chosen in ([], overrides)]
    assert [made.tree for made in short] == [made.tree for made in long]
    assert [list(made.tree["stages"]) for made in short] == [["sft", "best", "dpo", "test", "report"]] * 2
    assert [made.faults for made in short] == [[], []]
    assert "model.source" in short[0].written


def test_a_recipe_may_start_from_a_short_one_and_use_files_beside_it(tmp_path: Path) -> None:
    recipe(tmp_path, SHORT)
    for file, text in {
        "stage/drill.yaml": "kind: sft\nmax_length: 77\n",
        "adapter/tiny.yaml": "rank: 1\n",
        "other.yaml": "defaults: [mine, _self_]\nseed: 3\n",
        "stage/long.yaml": "defaults: [sft, _self_]\nmax_length: 99\n",
        "wide.yaml": "adapter: {use: dora, rank: 64}\n"
        "stages: {long: {}, dpo: {adapter: {rank: 4}}, best: {kind: sft, adapter: qlora}, test: {kind: evaluate}}\n",
        "own.yaml": "stages: {sft: {adapter: tiny}, drill: {use: drill}, other: {kind: other, adapter: tiny}}\n",
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text, encoding="utf-8")
    assert compose(str(tmp_path / "other.yaml"), []).tree["stages"]["dpo"]["adapter"]["kind"] == "qlora"
    wide = compose(str(tmp_path / "wide.yaml"), []).tree["stages"]
    assert {name: stage.get("adapter") for name, stage in wide.items()} == {
        "long": {"kind": "dora", "rank": 64},
        "dpo": {"kind": "dora", "rank": 4},
        "best": {"kind": "qlora"},
        "test": None,
    }
    stages = compose(str(tmp_path / "own.yaml"), []).tree["stages"]
    assert stages == {
        "sft": {"kind": "sft", "adapter": {"rank": 1}},
        "drill": {"kind": "sft", "max_length": 77},
        "other": {"kind": "other", "adapter": {"rank": 1}},
    }


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("model=Qwen/Qwen2.5-0.5B", "source", "hub:Qwen/Qwen2.5-0.5B"),
        ("model=path:/a,b", "source", "path:/a,b"),
        ("model=./folder", "source", "path:./folder"),
        ("model=smollm2_135m", "source", "bundled:smollm2-135m"),
    ],
)
def test_the_command_line_names_a_model_by_its_source(override: str, key: str, value: str) -> None:
    assert compose("sft_dpo", [override]).tree["model"][key] == value


@pytest.mark.parametrize("model", ["smollm2_135m", "Qwen/Qwen2.5-0.5B", "{use: smollm2_135m}", "{source: path:a}", ""])
def test_a_recipe_names_the_model_by_its_file_or_its_source(tmp_path: Path, model: str) -> None:
    text = f"model: {model}\n" if model else ""
    assert compose(recipe(tmp_path, f"{text}stages: {{sft: {{}}}}"), []).names_model is bool(model)


def test_a_recipe_without_stages_or_with_an_adapter_that_nothing_takes_is_refused(tmp_path: Path) -> None:
    tree = compose(recipe(tmp_path, "model: Qwen/Qwen2.5-0.5B\nadapter: lora"), []).tree
    assert {fault.where for fault in faults(tree)} == {"stages", "adapter"}
    tree = compose(recipe(tmp_path, "adapter: nonsense\nstages: {evaluate: {}}"), []).tree
    assert "adapter" in {fault.where for fault in faults(tree)}


def test_a_stage_without_an_adapter_keeps_that_fault_beside_one_for_all(tmp_path: Path) -> None:
    tree = compose(recipe(tmp_path, "adapter: {use: dora, rank: 4}\nstages: {sft: {adapter: 3}}"), []).tree
    assert [fault.where for fault in faults(tree) if "adapter" in fault.where] == ["stages.sft.adapter"]


def test_files_beside_a_recipe_are_read_as_they_are_now(tmp_path: Path) -> None:
    path = recipe(tmp_path, "adapter: dora\nstages: {drill: {kind: sft}}")
    assert compose(path, []).tree["stages"]["drill"]["adapter"] == {"kind": "dora"}
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/drill.yaml").write_text("kind: sft\nmax_length: 7\n", encoding="utf-8")
    path = recipe(tmp_path, "adapter: dora\nstages: {drill: {use: drill}}")
    assert compose(path, []).tree["stages"]["drill"] == {"kind": "sft", "max_length": 7}
    (tmp_path / "stage/drill.yaml").write_text("defaults: [sft, _self_]\n", encoding="utf-8")
    assert compose(path, []).tree["stages"]["drill"]["adapter"] == {"kind": "dora"}


def test_an_adapter_for_all_counts_for_kinds_of_other_packages_that_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "trains", lambda kind: kind == "toy")
    text = "adapter: {use: dora, rank: 4}\nstages: {mine: {kind: toy}, rest: {kind: other}, toy: {adapter: lora}}"
    assert compose(recipe(tmp_path, text), []).tree["stages"] == {
        "mine": {"kind": "toy", "adapter": {"kind": "dora", "rank": 4}},
        "rest": {"kind": "other"},
        "toy": {"adapter": {"kind": "lora"}},
    }


def test_a_shipped_file_goes_before_one_of_its_name_and_only_tracking_takes_several(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/sft.yaml").write_text("kind: sft\n", encoding="utf-8")
    path = recipe(tmp_path, "adapter: dora\nlaunch: [zero1, ddp]\nstages: {sft: {}}")
    with pytest.raises(ConfigError, match="launch"):
        compose(path, [])
    path = recipe(tmp_path, "adapter: dora\nstages: {sft: {}}")
    assert compose(path, []).tree["stages"]["sft"]["adapter"] == {"kind": "dora"}


def test_the_command_line_chooses_the_adapter_of_one_stage() -> None:
    stages = compose("sft_dpo", ["stages.dpo.adapter=qlora"]).tree["stages"]
    assert [stages[name]["adapter"]["kind"] for name in ("sft", "dpo")] == ["lora", "qlora"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("adapter: qlorra", "qlora"),
        ("launch: zero9", "zero1"),
        ("tracking: wand", "wandb"),
        ("model: other", "smollm2_135m"),
        ("stages: {sft: {adapter: {use: qlorra}}}", "qlora"),
        ("stages: {mine: {use: evaluate_house_stile}}", "evaluate_house_style"),
        ("stages: {sft: {use: [sft]}}", "stages.sft.use"),
        ("stages: {sft: {use: ./sft.yaml}}", "stages.sft.use"),
        ("stages: {sft: {adapter: {use: 3}}}", "stages.sft.adapter.use"),
        ("stages: {sft: {use: sft, kind: dpo}}", "stages.sft.kind"),
        ("stages: {test: {kind: evaluate_house_style}}", "use: evaluate_house_style"),
        ("stages: {sft.v2: {kind: sft}}", "sft_v2"),
        ("adapter: no\nstages: {sft: {}}", "qlora"),
        ("adapter: [lora]\nstages: {sft: {}}", "qlora"),
        ("adapter:\nstages: {sft: {}}", "qlora"),
        ("model: gpt2\nstages: {sft: {}}", "ORG/NAME"),
        ("defaults: quickstart\nstages: {}", "it is a list"),
        ("defaults:\nstages: {}", "it is a list"),
    ],
)
def test_a_name_that_is_no_file_is_refused_with_the_nearest(tmp_path: Path, text: str, word: str) -> None:
    text = text if "stages" in text else f"{text}\nstages: {{sft: {{}}}}"
    with pytest.raises(ConfigError) as error:
        compose(recipe(tmp_path, text), [])
    assert word in str(error.value)


def faults(tree: dict[str, object]) -> list[Fault]:
    return convert(tree, config_classes())[1]


@pytest.mark.parametrize(
    ("tree", "where", "key"),
    [
        ({"learning_rate": 1}, "learning_rate", "stages.sft.optim.lr"),
        ({"model_name_or_path": "m"}, "model_name_or_path", "model"),
        ({"stages": {"sft": {"kind": "sft", "lora_r": 8}}}, "stages.sft.lora_r", "stages.sft.adapter.rank"),
        ({"stages": {"sft": {"kind": "sft", "optim": {"learning_rate": 8}}}}, "stages.sft.optim.learning_rate",
         "stages.sft.optim.lr"),
        ({"stages": {"sft": {"kind": "sft", "cutoff_len": 8}}}, "stages.sft.cutoff_len", "stages.sft.max_length"),
        ({"stages": {"sft": {"kind": "sft", "load_in_4bit": True}}}, "stages.sft.load_in_4bit", "adapter: qlora"),
        ({"stages": {"sft": {"kind": "sft", "lam": 1}}}, "stages.sft.lam", "gae_lambda"),
        ({"stages": {"sft": {"kind": "sft", "adapter": {"r": 8}}}}, "stages.sft.adapter.r", "stages.sft.adapter.rank"),
        ({"rl": "dpo"}, "rl", "stages"),
        ({"stages": {"sft": {"kind": "sft", "stage": "rm"}}}, "stages.sft.stage", "stages"),
    ],
)  # fmt: skip
def test_a_key_of_another_tool_is_answered_with_ours(tree: dict[str, object], where: str, key: str) -> None:
    tree = {"stages": {"sft": {"kind": "sft"}}, **tree}
    fault = next(fault for fault in faults(tree) if fault.where == where)
    assert f"'{key}'" in fault.message


def test_a_key_that_no_setting_stands_for_is_to_be_left_out() -> None:
    for key, why in (("adam_beta1", str(BETAS[0])), ("adam_beta2", str(BETAS[1])), ("do_train", "every stage")):
        (fault,) = faults({"stages": {"sft": {"kind": "sft", "optim": {key: 0}}}})
        assert fault.message.startswith("unknown key; leave it out (")
        assert why in fault.message


def test_a_key_of_a_sweep_is_not_taken_for_another_tools() -> None:
    with pytest.raises(ConfigError, match=r"stage: unknown key; did you mean 'pruning\.stage'"):
        sweep_from_plain({"stage": "sft"}, where="sweep.yaml")


def test_every_key_of_another_tool_leads_to_a_setting_or_a_choice() -> None:
    ours = {path for cls in (RunConfig, *config_classes().values()) for path in paths_below(cls)}
    choices = {f"{group}={path.stem}" for group in GROUPS for path in (conf_folder() / group).glob("*.yaml")}
    assert {setting for setting, _ in FOREIGN.values()} <= ours | choices | {""}
    assert FOREIGN.keys().isdisjoint(path.rpartition(".")[2] for path in ours)
    assert len(FOREIGN) >= 30
