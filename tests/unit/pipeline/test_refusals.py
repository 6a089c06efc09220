"""What a plan refuses: the exit code, where the fault is, and a word of what is allowed.

``stages.`` is left out before the names of stages, and ``{tmp}`` is the folder of the test's files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from alignment.config.run import LABELS, TrackingConfig
from alignment.core.errors import AlignmentError, ConfigError
from alignment.pipeline.plan import tracking_checks
from tests.unit.pipeline.conftest import MakePlan

STAGE = re.compile(r"^(sft|reward|dpo|ppo|evaluate|report|cpt|card|forgetting)\b")
SECRETS = ("s3cret", "canary")
Row = tuple[str | Sequence[str], str, str]


def whole(text: str, folder: Path) -> str:
    return STAGE.sub(r"stages.\1", text).replace("{tmp}", str(folder))


CHAIN = "dpo.adapter.chain"
ADAPTERS: list[Row] = [
    (("sft.adapter.kind=full", f"{CHAIN}=continue"), CHAIN, "stage:sft has no adapter"),
    (("dpo.init=base", f"{CHAIN}=continue"), CHAIN, "base has no adapter"),
    ((f"{CHAIN}=continue", "dpo.adapter.rank=8"), "dpo.adapter.rank", "16"),
    ((f"{CHAIN}=continue", "dpo.adapter.kind=dora"), "dpo.adapter.kind", "stage:sft"),
    ((f"{CHAIN}=stack", "dpo.adapter.kind=dora"), CHAIN, "DoRA"),
    ((f"{CHAIN}=stack", "dpo.adapter.modules_to_save=[embed_tokens]"), CHAIN, "modules_to_save"),
    (("sft.adapter.modules_to_save=[embed_tokens]", f"{CHAIN}=stack"), CHAIN, "stage:sft"),
    (("sft.adapter.kind=dora", "dpo.adapter.kind=qlora", f"{CHAIN}=stack"), CHAIN, "'merge'"),
    (("sft.adapter.kind=dora", f"{CHAIN}=stack", "ppo.init=stage:dpo", "ppo.adapter={kind: qlora, chain: stack}"),
     "ppo.adapter.chain", "stage:sft trained DoRA"),
    (("sft.adapter.kind=qlora", f"{CHAIN}=stack"), CHAIN, "use qlora"),
    ("reward.adapter={kind: prefix, chain: stack}", "reward.adapter.chain", "prefix"),
    ("sft.adapter.kind=prefix", "reward.adapter", "stage:sft"),
    (("dpo.adapter.modules_to_save=[embed_tokens]", "dpo.optim.moments=eight_bit"), "dpo.optim.moments", "float32"),
    *((f"{stage}.adapter.dropout=0.05", f"{stage}.adapter.dropout", "0.05") for stage in ("reward", "dpo", "ppo")),
]  # fmt: skip
SLURM = "launch/backend=slurm"
JOBS: list[Row] = [
    ((SLURM, "launch.backend.signal_seconds=120"), "launch.backend.signal_seconds", "120"),
    ((SLURM, "launch.backend.time=0:05:00"), "launch.backend.time", "signal_seconds"),
    ((SLURM, "launch.backend.gpus=1", "launch.num_processes=2"), "launch.backend.gpus", "one for each: 2"),
    ((SLURM, "launch.num_processes=0"), "launch.backend.gpus", "launch.num_processes"),
    ((SLURM, "launch.backend.num_machines=2", "launch.backend.machine_rank=1"), "launch.backend.machine_rank", "Slurm"),
]
CRITIC = "ppo.critic"
WITHOUT = ("ppo.critic=none", "ppo.advantage=rloo", "ppo.prompt_baseline=false", "ppo.gae_lambda=0.95",
           "ppo.value_clip=0.2", "ppo.optim.critic_lr=null")  # fmt: skip
STYLE = "ppo.scorers=[{source: 'bundled:quickstart/house_style.py:style'}]"
UNREAD = "dpo.validation={keep_best: true, data: {source: 'path:x', format: sharegpd}}"
TRAINING: list[Row] = [
    (("ppo.kl.control=adaptive", "ppo.kl.horizon=4", "ppo.optim.batch_size=20"), "ppo.kl.horizon", "more than 4"),
    (("ppo.kl.control=adaptive", "ppo.kl.coefficient=0"), "ppo.kl.coefficient", "kl.control"),
    (("ppo.critic_warmup=4", "ppo.updates=4"), "ppo.critic_warmup", "4 of 4"),
    ("ppo.critic=none", CRITIC, "'separate'"),
    (("ppo.advantage=rloo", "ppo.critic=separate"), CRITIC, "'none'"),
    (("ppo.advantage=dr_grpo", "ppo.critic=shared"), CRITIC, "'none'"),
    ("ppo.length_penalty=-1", "ppo.length_penalty", "1e+06"),
    ("ppo.overlong.buffer=65", "ppo.overlong.buffer", "max_new_tokens"),
    ("ppo.overlong.weight=2", "ppo.overlong.weight", "buffer"),
    ((*WITHOUT, STYLE), "ppo.reward", "no critic"),
    (("ppo.critic=separate", STYLE, "ppo.reward='hub:org/judge'"), "ppo.reward", "critic"),
    (STYLE, "ppo.reward", "shared critic"),
    ("dpo.loss=simpo", "dpo.target_margin", "missing"),
    ("dpo.loss=simp", "dpo.loss", "simpo"),
    (UNREAD, "dpo.validation.keep_best", "every"),
    (UNREAD, "dpo.validation.data.format", "'sharegpt'"),
    (
        "dpo.validation={share: 0.1, every: 1, data: {source: 'path:{tmp}/preferences.jsonl'}}",
        "dpo.validation.share",
        "dpo.validation.data also names",
    ),
    ("dpo.validation={every: 5}", "dpo.validation.every", "dpo.validation.share=0.05"),
    ("dpo.validation={patience: 3}", "dpo.validation.patience", "leave it at None"),
]
REFERENCES: list[Row] = [
    ("ppo.reward=stage:sft", "ppo.reward", "'stage:reward'"),
    ("dpo.init=stage:stf", "dpo.init", "'sft'"),
    ("~stages.ppo", "evaluate.arms[4]", "'dpo'"),
    ("evaluate.arms=[base+fewshot]", "evaluate.arms[0]", "'base+few-shot'"),
    ("evaluate.arms=['stage:zzzzzz']", "evaluate.arms[0]", "remove this arm"),
    ("evaluate.arms=[base,base]", "evaluate.arms[1]", "twice"),
    ("evaluate.reference=base+few-shot", "evaluate.reference", "arm of an evaluation"),
    ("sft.init=stage:dpo", "sft", "sft → dpo → sft"),
    ("dpo.init=sft", "dpo.init", "write stage:sft"),
    ("ppo.reward=base", "ppo.reward", "'stage:reward'"),
    ("ppo.reward='bundled:smollm2-135m'", "ppo.reward", "language model"),
    (("~stages.reward", "evaluate.reward=null", "ppo.reward='stage:sft'"), "ppo.reward", "SequenceClassification"),
    ("evaluate.reward='hub:org/judge'", "evaluate.reward", "language model"),
]
MIX = "{source: 'path:{tmp}/preferences.jsonl', "
SOURCES: list[Row] = [
    ("dpo.data.format=preferense", "dpo.data.format", "'pref"),
    ("sft.data.columns={promt: x}", "sft.data.columns.promt", "'prompt'"),
    ("sft.data.split=test", "sft.data.split", "hub"),
    (("sft.data.source=hub:org/name@v1", "sft.data.split=''"), "sft.data.split", "''"),
    (f"dpo.data.mix=[{MIX}share: 0.2, count: 3}}]", "dpo.data.mix[0]", "not both"),
    (f"dpo.data.mix=[{MIX}share: 0.5}}, {MIX}share: 0.5}}]", "dpo.data.mix", "1"),
    (f"dpo.data.mix=[{MIX}share: 1.0}}]", "dpo.data.mix[0].share", "below 1"),
    (f"dpo.data.mix=[{MIX}share: 0.2, limit: 0}}]", "dpo.data.mix[0].limit", "above 0"),
    ("model.chat_template=path:nowhere.jinja", "model.chat_template", "chatml"),
    ("model.chat_template=trl:qwen33", "model.chat_template", "trl:qwen3"),
    ("artifacts=s3://KEY:s3cret@bucket/x", "artifacts", "s3://BUCKET/PREFIX"),
    ("artifacts='s3://bucket/x?key=s3cret'", "artifacts", "s3://BUCKET/PREFIX"),
    ("tracking.mlflow_url=http://me:s3cret@127.0.0.1:5000", "tracking.mlflow_url", "not shown"),
]
GUARD = "ppo.guard={every: 1, scorer: {source: 'bundled:quickstart/house_style.py:style'}}"
URL = "base_url: 'http://localhost:8000'"


def second(scorer: str, field: str, word: str) -> Row:
    return f"ppo.scorers=[{{source: reward}}, {{{scorer}}}]", f"ppo.scorers[1].{field}", word


def server(settings: str, field: str, word: str) -> Row:
    return second(f"source: server, server: {{{URL}, model: rm, {settings}}}", f"server.{field}", word)


def ensemble(members: str, field: str, word: str) -> Row:
    return second(f"source: ensemble, ensemble: {{members: [{members}]}}", f"ensemble.{field}", word)


SCORERS: list[Row] = [
    ("ppo.reward=null", "ppo.scorers[0].source", "null"),
    ("ppo.scorers=[]", "ppo.scorers", "at least one"),
    second("source: lenght", "source", "'length'"),
    second("source: base", "source", "not a scorer"),
    second("source: regex", "pattern", "missing"),
    second("source: length", "target", "missing"),
    second("source: reward, pattern: x", "pattern", "'regex'"),
    second("source: regex, pattern: x, target: 3", "target", "'length'"),
    second("source: regex, pattern: '('", "pattern", "Python syntax"),
    second("source: choice", "source", "metric of an evaluation"),
    second("source: json_schema, schema: {type: text}", "schema", "'text'"),
    second("source: json_schema, schema: text", "schema", "group"),
    second("source: 'bundled:quickstart/hose_style.py:style'", "source", "'quickstart/house_style.py'"),
    second("source: 'bundled:../../setup.py:style'", "source", "no bundled"),
    second("source: nowhere.py:f", "source", "nowhere.py"),
    ("ppo.guard.every=1", "ppo.guard.scorer.source", "missing"),
    ((GUARD, "ppo.guard.scorer.normalize=true"), "ppo.guard.scorer.normalize", "false"),
    ((GUARD, "ppo.guard.scorer.weight=0"), "ppo.guard.scorer.weight", "another weight"),
    (("ppo.guard.every=1", "ppo.guard.scorer.source=length"), "ppo.guard.scorer.target", "'length'"),
    (("ppo.guard.every=1", "ppo.guard.scorer.source='stage:sft'"), "ppo.guard.scorer.source", "'stage:reward'"),
    second("source: server", "server", "missing"),
    second("source: server, server: {}", "server.base_url", "URL"),
    second("source: server, server: {base_url: localhost}", "server.base_url", "not shown"),
    second(f"source: reward, server: {{{URL}, model: rm}}", "server", "'server'"),
    server("api: vllm_poling", "api", "vllm_pooling"),
    server("api_key_env: sk-canary", "api_key_env", "in capitals"),
    server("timeout: 300", "timeout", "launch.hang_seconds"),
    server("label: good", "label", "'vllm_classify'"),
    server("api: vllm_classify, label: good", "label", "number of a class"),
    second("source: grade, grader: {}", "grader.endpoint.model", "missing"),
    second(f"source: grade, grader: {{endpoint: {{{URL}, model: m}}, highest: 1}}", "grader.highest", "lowest"),
    second("source: grade, grader: {max_invalid: 0.1}", "grader.max_invalid", "unknown key"),
    second("source: ensemble", "ensemble", "missing"),
    ensemble("{source: reward}", "members", "nothing to combine"),
    second("source: ensemble, ensemble: {members: [{source: reward}, {source: length, target: 9}], std_weight: 2}",
           "ensemble.std_weight", "combine"),
    ensemble("{source: reward}, {source: ensemble}", "members[1].source", "only for scorers"),
    ensemble("{source: reward}, {source: 'stage:rewrad'}", "members[1].source", "'reward'"),
    ("ppo.guard={every: 1, scorer: {source: ensemble, ensemble: {members: [{source: length, target: 3}, "
     "{source: length, target: 4, normalize: true}]}}}", "ppo.guard.scorer.ensemble.members[1].normalize", "running"),
]  # fmt: skip
FIRST = "evaluate.metrics[0]"
SAMPLED = "evaluate.answers={per_prompt: 4, temperature: 0.7}"
PASS = "evaluate.metrics=[{name: p, source: length, target: 9, aggregate: "


def metric(text: str, field: str, word: str) -> Row:
    return f"evaluate.metrics=[{{{text}}}]", f"{FIRST}.{field}", word


METRICS: list[Row] = [
    metric("source: length, target: 9", "name", "write a name"),
    metric("name: primary, source: length, target: 9", "name", "reserved"),
    metric("name: s, source: length", "target", "'length'"),
    metric("name: r, source: 'stage:sft'", "source", "'stage:sft' is a policy"),
    metric(f"name: a, source: server, server: {{{URL}}}", "server.model", "missing"),
    metric("name: a, source: ensemble", "source", "cannot be a metric"),
    ("evaluate.metrics=[{name: s, source: refusal}, {name: s, source: refusal}]", "evaluate.metrics[1].name", "twice"),
    (("evaluate.metrics=[{name: r, source: reward}]", "evaluate.reward=null"), f"{FIRST}.source", "null"),
    ("evaluate.primary=stile", "evaluate.primary", "'style'"),
    (("evaluate.metrics=[]", "evaluate.primary=style"), "evaluate.primary", "set null"),
    ("evaluate.answers={per_prompt: 4}", "evaluate.answers.temperature", "set temperature"),
    ((SAMPLED, f"{PASS}pass@8}}]"), f"{FIRST}.aggregate", "at least 8"),
    ((SAMPLED, f"{PASS}pass@2, higher_is_better: false}}]"), f"{FIRST}.aggregate", "lower is better"),
    (f"{PASS}median}}]", f"{FIRST}.aggregate", "pass@4"),
    metric("name: m, source: exact_answer, aggregate: majority", "aggregate", "per_prompt"),
    ("evaluate.system_prompt=null", "evaluate.system_prompt", "'base+prompt'"),
]
JUDGE = "evaluate.judge"
LABELLED = f"{JUDGE}.labelled.data.source='bundled:quickstart/preferences'"
ENDPOINT = (f"{JUDGE}.kind=endpoint", f"{JUDGE}.endpoint.base_url='http://localhost:8000/v1'",
            f"{JUDGE}.endpoint.model=m")  # fmt: skip


def judge(text: str, field: str, word: str) -> Row:
    return f"evaluate.judge={{{text}}}", f"{JUDGE}.{field}", word


def endpoint(override: str, word: str) -> Row:
    return (*ENDPOINT, f"{JUDGE}.{override}"), f"{JUDGE}.{override.partition('=')[0]}", word


JUDGES: list[Row] = [
    ((f"{JUDGE}.kind=metric", "evaluate.metrics=[]"), f"{JUDGE}.kind", "name one"),
    judge("kind: endpoint", "endpoint.base_url", "missing"),
    judge("kind: metric, endpoint: {model: m}", "endpoint", "'endpoint'"),
    ((f"{JUDGE}.kind=reward", "evaluate.reward=null"), f"{JUDGE}.kind", "'reward'"),
    ((f"{JUDGE}.kind=metric", "evaluate.arms=[base]"), f"{JUDGE}.pairs", "no trained arm"),
    judge("kind: metric, pairs: [{arm: stage:dop, against: base}]", "pairs[0].arm", "'stage:dpo'"),
    judge("kind: metric, labelled: {max_prompts: 9}", "labelled.data.source", "missing"),
    judge("votes: v.jsonl", "votes", "'people'"),
    ((f"{JUDGE}.kind=metric", LABELLED, "evaluate.metrics=[{name: mmlu, source: choice}]", "evaluate.primary=mmlu"),
     f"{JUDGE}.labelled", "'choice'"),
    endpoint("endpoint.base_url=localhost:8000", "not shown"),
    endpoint("endpoint.base_url='https://me:s3cret@host/v1'", "without a key or a password"),
    endpoint("endpoint.api_key_env=sk-canary", "environment variable"),
]  # fmt: skip
GRADER = "evaluate.grader"
GRADED = ("evaluate.metrics=[{name: helpful, source: grade}]", "evaluate.primary=helpful",
          f"{GRADER}.endpoint.base_url='http://localhost:8000/v1'", f"{GRADER}.endpoint.model=m")  # fmt: skip


def grader(override: str, word: str) -> Row:
    return (*GRADED, f"{GRADER}.{override}"), f"{GRADER}.{override.partition('=')[0]}", word


GRADERS: list[Row] = [
    (GRADED[:2], f"{GRADER}.endpoint.base_url", "missing"),
    (GRADED[3:], GRADER, "'grade'"),
    grader("highest=1", f"stages.{GRADER}.lowest"),
    grader("endpoint.criteria=x", "unknown key"),
    ((*GRADED, "evaluate.metrics=[{name: helpful, source: grade, pattern: x}]"), f"{FIRST}.pattern", "'regex'"),
    ((*GRADED, "evaluate.metrics=[{name: helpful, source: grade, aggregate: pass@2}]", SAMPLED),
     f"{FIRST}.passing_score", "1 to 10"),
]  # fmt: skip
CARD = ("+stage@stages.card=reward_card", "card.data.source=path:{tmp}/preferences.jsonl")
LOST = "+stage@stages.forgetting=forgetting"


def card(override: str, where: str, word: str) -> Row:
    return (*CARD, override), where, word


def forgetting(override: str, where: str, word: str) -> Row:
    return (LOST, "forgetting.arms=['stage:sft']", f"forgetting.{override}"), f"forgetting.{where}", word


MEASURING: list[Row] = [
    card("card.reward=base", "card.reward", "'base' is a language model"),
    card("card.reward=stage:card", "card.reward", "reward card"),
    card("card.learned.limit=3", "card.learned.source", "missing"),
    card("card.rule={source: regex}", "card.rule.pattern", "'regex'"),
    (LOST, "forgetting.arms", "[stage:sft]"),
    forgetting("arms=[base]", "arms[0]", "'base' was not trained"),
    forgetting("arms=['stage:sft',base+prompt]", "arms[1]", "'base+prompt'"),
    forgetting("arms=['stage:sft','stage:sft']", "arms[1]", "twice"),
]
CONFIG = [*ADAPTERS, *JOBS, *TRAINING, *REFERENCES, *SOURCES, *SCORERS, *METRICS, *JUDGES, *GRADERS, *MEASURING]
DATA: list[Row] = [
    ("sft.data.source=path:/nowhere", "sft.data.source", "no file"),
    ("sft.data.source=hub:name", "sft.data.source", "'hub:name'"),
    ("evaluate.judge={kind: people, votes: none.jsonl}", "evaluate.judge.votes", "no file"),
    card("card.learned.source=path:nowhere.jsonl", "card.learned.source", "no file"),
    card("card.rule={source: exact_answer}", "{tmp}/preferences.jsonl:1", "'answer' is missing"),
    ("evaluate.metrics=[{name: knows, source: choice}]", "{tmp}/heldout.jsonl:1", "'choices' is missing"),
]
MODELS: list[Row] = [
    ("dpo.init=path:/nowhere", "dpo.init", "no folder"),
    ("model.source=path:/nowhere", "model.source", "no folder"),
    ("model.source=bundled:smollm", "model.source", "'smollm'"),
    card("card.reward=path:{tmp}/model", "card.reward", "reward model"),
]
ROWS = [(2, *row) for row in CONFIG] + [(3, *row) for row in DATA] + [(4, *row) for row in MODELS]


@pytest.mark.parametrize(("code", "settings", "where", "word"), ROWS)
def test_what_cannot_be_right_is_refused_before_anything_starts(
    plan: MakePlan, tmp_path: Path, code: int, settings: str | Sequence[str], where: str, word: str
) -> None:
    given = [settings] if isinstance(settings, str) else settings
    with pytest.raises(AlignmentError) as caught:
        plan(*(whole(override, tmp_path) for override in given))
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert caught.value.exit_code == code
    assert [line for line in lines if line.startswith(f"{whole(where, tmp_path)}: ")], lines
    assert word in str(caught.value)
    assert not [secret for secret in SECRETS if secret in str(caught.value)]


@pytest.mark.parametrize(
    "settings",
    [
        (f"{CHAIN}=continue", "reward.adapter.chain=stack", "ppo.adapter={kind: qlora, chain: stack}"),
        ("dpo.adapter.modules_to_save=[embed_tokens]", "dpo.optim.moments=eight_bit", "model.dtype=float32"),
        ("sft.adapter={kind: qlora, rank: 8, alpha: 8, dropout: 0.1}", "dpo.adapter={kind: full, dropout: 0}"),
        ("ppo.kl={control: adaptive, target: 3, horizon: 50}", "dpo.too_long={do: cut, side: right}"),
        ("ppo.kl={control: adaptive, horizon: 5}", "ppo.optim.batch_size=24"),
        ("ppo.max_approxkl=0.1", "ppo.ppo_epochs=1", "ppo.num_minibatches=3"),
        (*WITHOUT, "ppo.drop_ties=true", "ppo.clip_high=0.3", "ppo.entropy_coefficient=0.01", "ppo.kl.apply_to=loss"),
        ("ppo.critic=separate", STYLE),
        ("ppo.guard.scorer.source='nowhere.py:f'",),
        ("dpo={loss: orpo, init: base, beta: 0.1}",),
        ("dpo={loss: simpo, target_margin: 1.0, beta: 2.0}",),
        (SLURM, "launch.backend.time=1-00:00:00"),
        *((*settings, "launch.backend.submit=false") for settings, *_ in JOBS),  # in a job, its limits do not count
    ],
)
def test_what_fits_is_planned(plan: MakePlan, tmp_path: Path, settings: Sequence[str]) -> None:
    assert plan(*(whole(override, tmp_path) for override in settings)).stages


@pytest.mark.parametrize(
    ("source", "corrected"),
    [
        ("org/name@main", "hub:org/name@main"),
        ("https://hub.example/org/name/", "hub:org/name"),
        ("/nowhere/mine", "path:/nowhere/mine"),
        ("here/inside", "path:here/inside"),
    ],
)
@pytest.mark.parametrize(
    ("setting", "value"),
    [("model.source", "'{}'"), ("stages.sft.data.source", "'{}'"), ("stages.ppo.scorers", "[{{source: '{}'}}]")],
)
def test_a_source_without_its_scheme_is_answered_with_the_right_one(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    setting: str, value: str, source: str, corrected: str,
) -> None:  # fmt: skip
    (tmp_path / "here/inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AlignmentError, match=rf"{setting}\W(.|\n)*write {re.escape(corrected)}( |$)"):
        plan(f"{setting}={value.format(source)}")


PROJECT = Path(__file__).parents[3] / "pyproject.toml"
SERVER = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}


def test_a_tracker_that_is_not_installed_is_refused(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(tracking_checks.metadata, "version", absent)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER["MLFLOW_TRACKING_URI"])
    plan()
    with pytest.raises(ConfigError) as caught:
        plan("tracking=[wandb,tensorboard,mlflow,trackio]")
    assert set(tracking_checks.PACKAGES) == set(LABELS)
    for name, (package, versions) in tracking_checks.PACKAGES.items():
        assert f"tracking.{name}: {package} is not installed" in str(caught.value)
        assert f"pip install '{package}{versions}' (the extra {name!r})" in str(caught.value)
        assert f'{name} = ["{package}{versions}"]' in PROJECT.read_text(encoding="utf-8"), "as the extra has it"


PASSWORD = {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "s3cret"}


TOKEN = {"MLFLOW_TRACKING_TOKEN": "s3cret", "MLFLOW_TRACKING_USERNAME": "me"}


@pytest.mark.parametrize(
    ("settings", "variables", "where", "word"),
    [
        ({"mlflow": True}, {}, "tracking.mlflow_url", "MLFLOW_TRACKING_URI"),
        ({"mlflow": True}, {"MLFLOW_TRACKING_URI": "sqlite:///s3cret.db"}, "tracking.mlflow", "address of a server"),
        ({"mlflow": True}, SERVER | TOKEN, "tracking.mlflow", "unset one of them"),
        ({"trackio": True}, {"TRACKIO_SERVER_URL": "s3cret"}, "tracking.trackio", "TRACKIO_SERVER_URL is set"),
        ({"trackio": True}, {"TRACKIO_STORAGE_MODE": "JSONL"}, "tracking.trackio", "cannot be read back"),
        ({}, {"MLFLOW_TRACKING_URI": "sqlite:///s3cret.db", "TRACKIO_SERVER_URL": "s3cret"}, "", ""),
        (dict.fromkeys(("wandb", "tensorboard", "mlflow", "trackio"), True), SERVER | PASSWORD, "", ""),
    ],
)
def test_variables_of_trackers_that_contradict_are_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], variables: dict[str, str], where: str, word: str
) -> None:
    monkeypatch.setattr(tracking_checks.metadata, "version", lambda package: "1.0")
    problems = list(tracking_checks.faults(TrackingConfig(**settings), variables))
    assert [fault.where for fault in problems] == [where] * bool(where)
    assert all(word in fault.message and "s3cret" not in fault.message for fault in problems)
