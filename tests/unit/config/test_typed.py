"""Plain trees become dataclasses; every fault is named, all at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from alignment.config.faults import nearest
from alignment.config.rules import NAME, rule_of
from alignment.config.scoring import ScorerConfig
from alignment.config.typed import convert, field_types, listed_dataclass, stage_from_plain, to_plain, typed
from alignment.core.errors import ConfigError
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.registry import config_classes
from alignment.stages.sft.kind import SftConfig

STAGES = config_classes()


def with_stage(**fields: Any) -> dict[str, Any]:
    return {"name": "run", "stages": {"sft": {"kind": "sft", **fields}}}


def with_ppo(**fields: Any) -> dict[str, Any]:
    return {"name": "run", "stages": {"ppo": {"kind": "ppo", **fields}}}


def with_slurm(**fields: Any) -> dict[str, Any]:
    return {**with_stage(), "launch": {"backend": {"kind": "slurm", **fields}}}


SLURM_WORD = "1 to 128 of A-Z a-z 0-9 . _ , -, beginning with a letter, a digit or _"
SLURM_TIME = "hours:minutes:seconds as in '4:00:00', after days as in '2-12:00:00'"
SCORER = {"source": "reward"}
SCORER_KEYS = "it takes the keys source, pattern, target, schema, server, normalize, clip, grader, weight, ensemble"
FAULTS = [
    (with_stage(pakcing=True), "stages.sft.pakcing: unknown key; did you mean 'packing'?"),
    ({**with_stage(), "lauch": {}}, "lauch: unknown key; did you mean 'launch'?"),
    (
        with_ppo(scorers=[{"weight": -1e7}]),
        "stages.ppo.scorers[0].weight: -10000000.0 is not allowed; from -1e+06 to 1e+06",
    ),
    (with_stage(lr=1e-4), "stages.sft.lr: unknown key; did you mean 'stages.sft.optim.lr'?"),
    (with_ppo(target=8), "stages.ppo.target: unknown key; did you mean 'stages.ppo.kl.target'?"),
    ({**with_stage(), "dtype": "float32"}, "dtype: unknown key; did you mean 'model.dtype'?"),
    (
        {**with_stage(), "adapter": {"chain": "stack"}},
        "adapter.chain: unknown key; did you mean 'stages.sft.adapter.chain'?",
    ),
    (
        {"name": "r", "stages": {name: {"kind": "sft"} for name in "abcd"}, "adapter": {"rank": 0}},
        "adapter.rank: unknown key; did you mean 'stages.a.adapter.rank', 'stages.b.adapter.rank' or "
        "'stages.c.adapter.rank'?",
    ),
    (
        {**with_stage(), "optim": {"lr": 1, "pace": 2}},
        "2 faults in the configuration:\n  optim.lr: unknown key; did you mean 'stages.sft.optim.lr'?\n"
        "  optim.pace: unknown key; one of: name, summary, seed, output, artifacts, model, stages, launch, tracking",
    ),
    (with_stage(packing=1), "stages.sft.packing: 1 is not allowed; it takes true or false"),
    (with_stage(max_length=True), "stages.sft.max_length: True is not allowed; it takes a whole number"),
    (with_stage(max_length="16"), "stages.sft.max_length: '16' is not allowed; it takes a whole number"),
    (with_stage(max_length=0), "stages.sft.max_length: 0 is not allowed; a number above 0"),
    (with_stage(data={"limit": "None"}), "stages.sft.data.limit: 'None' is a text here; write null"),
    ({**with_stage(), "artifacts": "none"}, "artifacts: 'none' is a text here; write null"),
    (with_stage(max_length=None), "stages.sft.max_length: None is not allowed; it takes a whole number"),
    (
        with_stage(data={"columns": ["a"]}),
        "stages.sft.data.columns: ['a'] is not allowed; it takes names and texts, such as {name: text}",
    ),
    (with_stage(data={"fraction": 1.5}), "stages.sft.data.fraction: 1.5 is not allowed; above 0 and at most 1"),
    (with_stage(optim={"lr": "fast"}), "stages.sft.optim.lr: 'fast' is not allowed; it takes a number"),
    (with_stage(optim={"lr": float("nan")}), "stages.sft.optim.lr: nan is not allowed; a number above 0"),
    (
        with_stage(optim={"micro_batch_tokens": "atuo"}),
        "stages.sft.optim.micro_batch_tokens: 'atuo' is not allowed; it takes a whole number, or one of: auto; "
        "did you mean 'auto'?",
    ),
    (
        with_stage(optim={"micro_batch_tokens": 0}),
        "stages.sft.optim.micro_batch_tokens: 0 is not allowed; a whole number above 0, or auto",
    ),
    (
        with_stage(optim={"schedule": "cosin"}),
        "stages.sft.optim.schedule: 'cosin' is not allowed; one of: constant, linear, cosine; did you mean 'cosine'?",
    ),
    (
        with_stage(adapter="full"),
        "stages.sft.adapter: 'full' is not a group of settings; "
        "it takes the keys kind, rank, alpha, dropout, rslora, target_modules, modules_to_save, virtual_tokens, chain, "
        "master_weights",
    ),
    (
        with_stage(adapter={"target_modules": "all-linear"}),
        "stages.sft.adapter.target_modules: 'all-linear' is not allowed; it takes a list, such as [a, b]",
    ),
    (with_stage(kind="stf"), "stages.sft.kind: 'stf' is not a kind of stage; did you mean 'sft'?"),
    (
        {"name": "run", "stages": {"dpo": {"kind": "dpo"}, "dop": {"beta": 1}}},
        "stages.dop: unknown stage; did you mean 'dpo'?",
    ),
    (
        {"name": "run", "stages": {"sft": "sfft"}},
        "stages.sft: 'sfft' is not a stage; it takes settings, beginning with 'kind'; did you mean {kind: sft}?",
    ),
    ({"name": "run", "stages": {}}, "stages: a run needs at least one stage"),
    (
        {**with_stage(), "name": "../x"},
        "name: '../x' is not allowed; 1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter, a digit or _",
    ),
    *(
        ({**with_stage(), "name": name}, f"name: {name!r} is not allowed; {NAME.allowed}")
        for name in ("a\n#SBATCH --uid=0", "-x")
    ),
    ({"name": "r", "stages": {"-x": {"kind": "sft"}}}, f"stages.-x: '-x' cannot name a stage; allowed: {NAME.allowed}"),
    (with_slurm(partition="a\nb"), f"launch.backend.partition: 'a\\nb' is not allowed; {SLURM_WORD}"),
    (with_slurm(time="4h"), f"launch.backend.time: '4h' is not allowed; {SLURM_TIME}"),
    (
        with_slurm(memory="64 GB"),
        "launch.backend.memory: '64 GB' is not allowed; a whole number with K, M, G or T, as in 64G",
    ),
    (
        with_slurm(rank=1),
        "launch.backend.rank: unknown key; one of: kind, submit, num_machines, machine_rank, main_address, "
        "main_port, partition, account, qos, time, gpus, "
        "cpus, memory, signal_seconds, wait",
    ),
    (with_slurm(kind=3), "launch.backend.kind: 3 is not allowed; one of: local, machines, slurm"),
    (
        with_ppo(scorers=[{"source": "reward"}, {"weigth": 2}]),
        "stages.ppo.scorers[1].weigth: unknown key; did you mean 'weight'?",
    ),
    (with_ppo(scorers=[]), "stages.ppo.scorers: [] is not allowed; at least one entry"),
    (
        with_ppo(scorers=[SCORER, "reward"]),
        f"stages.ppo.scorers[1]: 'reward' is not a group of settings; {SCORER_KEYS}",
    ),
    (
        with_ppo(scorers={"source": "reward"}),
        "stages.ppo.scorers: {'source': 'reward'} is not allowed; it takes a list of groups, each with some of the "
        "keys source, pattern, target, schema, server, normalize, clip, grader, weight, ensemble; write "
        "[{source: reward}]",
    ),
    (with_ppo(guard={"scorer": {"sauce": "x"}}), "stages.ppo.guard.scorer.sauce: unknown key; did you mean 'source'?"),
]


@pytest.mark.parametrize(("tree", "message"), FAULTS, ids=[message[:40] for _, message in FAULTS])
def test_a_fault_is_named_exactly(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        typed(tree, config_classes())
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("api_key_env", "sk-secret", "the name of an environment variable, in capitals; never the key itself"),
        ("api_key_env", ["secret"], "it takes text"),
        ("base_url", "http://user:secret@judge/v1", "http://HOST:PORT/PATH or https://"),
    ],
)
def test_what_may_be_a_key_is_not_repeated(field: str, value: Any, allowed: str) -> None:
    judge = {"kind": "endpoint", "endpoint": {field: value}}
    with pytest.raises(ConfigError) as caught:
        typed({"name": "run", "stages": {"evaluate": {"kind": "evaluate", "judge": judge}}}, config_classes())
    assert f"judge.endpoint.{field}: the given value (not shown) is not allowed; {allowed}" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_all_faults_are_reported_together() -> None:
    tree = {
        "name": "run",
        "seed": "x",
        "stages": {"sft": {"kind": "sft", "pakcing": 1}, "dpo": {"kind": "dpo", "bata": 1}},
    }
    with pytest.raises(ConfigError) as caught:
        typed(tree, config_classes())
    assert str(caught.value).splitlines() == [
        "3 faults in the configuration:",
        "  seed: 'x' is not allowed; it takes a whole number",
        "  stages.sft.pakcing: unknown key; did you mean 'packing'?",
        "  stages.dpo.bata: unknown key; did you mean 'beta'?",
    ]


def test_a_faulty_field_keeps_its_default_so_that_later_checks_can_add_theirs() -> None:
    config, faults = convert(with_stage(max_length="x", init="stage:nowhere"), config_classes())
    assert len(faults) == 1
    stage = config.stages["sft"]
    assert isinstance(stage, SftConfig)
    assert (stage.max_length, stage.init) == (1024, "stage:nowhere")


def test_keys_left_out_keep_the_stage_s_own_defaults() -> None:
    config = typed(
        {"name": "run", "stages": {"reward": {"kind": "reward", "optim": {"epochs": 2}, "data": {"limit": 5}}}},
        config_classes(),
    )
    stage = config.stages["reward"]
    assert stage.optim.lr == 1e-4  # type: ignore[union-attr]
    assert stage.optim.epochs == 2.0  # type: ignore[union-attr]
    assert stage.data.source == ""  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [1e-4, "1e-4", "1E-04"])
def test_a_float_may_come_as_yaml_1_1_reads_it(value: Any) -> None:
    stage = stage_from_plain({"kind": "sft", "optim": {"lr": value}}, config_classes())
    assert isinstance(stage, SftConfig)
    assert stage.optim.lr == 1e-4


@pytest.mark.parametrize("kind", STAGES)
def test_every_stage_survives_the_way_to_plain_values_and_back(kind: str) -> None:
    stage = STAGES[kind]()
    assert stage_from_plain(to_plain(stage), config_classes()) == stage


def test_none_is_taken_only_where_it_means_something() -> None:
    stage = stage_from_plain({"kind": "ppo", "optim": {"critic_lr": None}}, config_classes())
    assert isinstance(stage, PpoConfig)
    assert stage.optim.critic_lr is None


def test_what_an_entry_of_a_list_leaves_out_has_the_default_of_its_class() -> None:
    stage = stage_from_plain(
        {"kind": "ppo", "scorers": [{"weight": 2}, {"source": "regex", "pattern": "x", "clip": "1e-1"}]},
        config_classes(),
    )
    assert isinstance(stage, PpoConfig)
    assert stage.scorers == [ScorerConfig(weight=2.0), ScorerConfig(source="regex", pattern="x", clip=0.1)]
    assert stage_from_plain(to_plain(stage), config_classes()) == stage


def test_a_fault_in_one_entry_leaves_the_others() -> None:
    config, faults = convert(with_ppo(scorers=[{"weight": "x"}, {"source": "length", "target": 3}]), config_classes())
    assert [fault.where for fault in faults] == ["stages.ppo.scorers[0].weight"]
    stage = config.stages["ppo"]
    assert isinstance(stage, PpoConfig)
    assert stage.scorers == [ScorerConfig(), ScorerConfig(source="length", target=3)]


def test_every_number_of_a_stage_has_a_rule() -> None:
    seen, missing = set(), []
    todo: list[Any] = list(STAGES.values())
    while todo:
        cls = todo.pop()
        if cls in seen:
            continue
        seen.add(cls)
        for name, hint in field_types(cls).items():
            if dataclasses.is_dataclass(hint):
                todo.append(hint)
            elif (item := listed_dataclass(hint)) is not None:
                todo.append(item)
            elif hint in (int, float, int | None, float | None) and rule_of(cls, name) is None:
                missing.append(f"{cls.__name__}.{name}")
    assert not missing


def test_names_that_start_alike_win_a_tie() -> None:
    assert nearest("bata", ["data", "beta"]) == "beta"
    assert nearest("xyz", ["data", "beta"]) is None
