"""Scorers behind HTTP and ensembles: planned, or refused before anything starts."""

from __future__ import annotations

import importlib.util

import pytest

from alignment.core.errors import ConfigError
from alignment.pipeline.backends.feasibility import why_not_here
from alignment.pipeline.execute.notes import cautions
from tests.unit.pipeline.conftest import MakePlan

URL = "base_url: 'http://localhost:8000'"
SERVER = f"source: server, server: {{{URL}, model: rm}}"
GRADE = f"source: grade, grader: {{endpoint: {{{URL}, model: m}}}}"
MEMBERS = "members: [{source: 'stage:reward'}, {source: length, target: 9}]"
PPO = "stages.ppo.scorers[1]"


def scorer(text: str) -> str:
    return f"stages.ppo.scorers=[{{source: reward}}, {{{text}}}]"


def server(settings: str) -> str:
    return scorer(f"source: server, server: {{{URL}, model: rm, {settings}}}")


def ensemble(settings: str, more: str = "weight: 1") -> str:
    return scorer(f"source: ensemble, {more}, ensemble: {{{settings}}}")


def fingerprint(plan: MakePlan, *overrides: str, stage: str = "ppo") -> str:
    return next(planned.fingerprint for planned in plan(*overrides).stages if planned.name == stage)


FAULTS = [
    (scorer("source: server"), f"{PPO}.server: missing; 'server' needs it"),
    (scorer("source: server, server: {}"), f"{PPO}.server.base_url: missing; set it to a URL"),
    (scorer("source: server, server: {}"), f"{PPO}.server.model: missing; set it to the endpoint's model name"),
    (scorer("source: server, server: {base_url: localhost}"), f"{PPO}.server.base_url: the given value (not shown)"),
    (server("api: vllm_poling"), f"{PPO}.server.api: 'vllm_poling' is not allowed; one of: scores, vllm_pooling, "),
    (server("api_key_env: sk-canary"), "the name of an environment variable, in capitals; never the key itself"),
    (
        server("timeout: 300"),
        f"{PPO}.server.timeout: 300 seconds times 3 attempts is not less than launch.hang_seconds",
    ),
    (
        server("label: good"),
        f"{PPO}.server.label: has no effect; only 'vllm_pooling', 'vllm_classify', 'tei_predict' use it, but api is "
        f"'scores'",
    ),
    (server("api: vllm_classify, label: good"), f"{PPO}.server.label: 'good' is not the number of a class"),
    (server("batch_size: 0"), f"{PPO}.server.batch_size: 0 is not allowed"),
    (scorer(f"source: reward, server: {{{URL}, model: rm}}"), f"{PPO}.server: has no effect; only the source 'server'"),
    (scorer("source: grade"), f"{PPO}.grader: missing; 'grade' needs it"),
    (scorer("source: grade, grader: {}"), f"{PPO}.grader.endpoint.model: missing"),
    (
        scorer(f"source: grade, grader: {{endpoint: {{{URL}, model: m}}, highest: 1}}"),
        f"{PPO}.grader.highest: must be above {PPO}.grader.lowest, which is 1; it is 1",
    ),
    (scorer("source: grade, grader: {max_invalid: 0.1}"), f"{PPO}.grader.max_invalid: unknown key"),
    (scorer("source: ensemble"), f"{PPO}.ensemble: missing; 'ensemble' needs it"),
    (ensemble("members: [{source: reward}]"), f"{PPO}.ensemble.members: an ensemble of 1 has nothing to combine"),
    (ensemble(f"{MEMBERS}, std_weight: 2"), f"{PPO}.ensemble.std_weight: 2 has no effect; only combine 'mean_minus_"),
    (
        ensemble("members: [{source: reward}, {source: ensemble}]"),
        f"{PPO}.ensemble.members[1].source: 'ensemble' is only for scorers of a stage; it cannot be",
    ),
    (ensemble("members: [{source: reward}, {source: regex}]"), f"{PPO}.ensemble.members[1].pattern: missing; 'regex'"),
    (ensemble("members: [{source: reward}, {source: lenght}]"), "members[1].source: 'lenght' is not a scorer; did you"),
    (
        ensemble("members: [{source: reward}, {source: 'stage:rewrad'}]"),
        f"{PPO}.ensemble.members[1].source: no stage 'rewrad' in this run; did you mean 'reward'?",
    ),
    (
        "stages.ppo.guard={every: 1, scorer: {source: ensemble, ensemble: {members: [{source: length, target: 3}, "
        "{source: length, target: 4, normalize: true}]}}}",
        "stages.ppo.guard.scorer.ensemble.members[1].normalize: true, but a running normalisation cannot compare",
    ),
    ("stages.ppo.length_penalty=-1", "stages.ppo.length_penalty: -1 is not allowed; from 0 to 1e+06"),
    ("stages.ppo.overlong.buffer=-1", "stages.ppo.overlong.buffer: -1 is not allowed"),
    (
        "stages.ppo.overlong.buffer=65",
        "stages.ppo.overlong.buffer: 65 tokens are more than the longest answer (max_new_tokens, ",
    ),
    ("stages.ppo.overlong.weight=2", "stages.ppo.overlong.weight: 2 has no effect; a buffer above 0 uses it"),
    (
        f"stages.evaluate.metrics=[{{name: a, source: server, server: {{{URL}}}}}]",
        "stages.evaluate.metrics[0].server.model: missing",
    ),
    (
        "stages.evaluate.metrics=[{name: a, source: ensemble}]",
        "stages.evaluate.metrics[0].source: 'ensemble' is only for scorers of a stage; it cannot be a metric",
    ),
]


@pytest.mark.parametrize(("override", "words"), FAULTS, ids=[words[-60:] for _, words in FAULTS])
def test_what_cannot_score_is_refused(plan: MakePlan, override: str, words: str) -> None:
    more = ["stages.evaluate.primary=a"] if override.startswith("stages.evaluate.metrics") else []
    with pytest.raises(ConfigError) as caught:
        plan(override, *more)
    assert words in str(caught.value)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("text", [SERVER, GRADE])
def test_an_address_changes_no_fingerprint_and_what_scores_does(plan: MakePlan, text: str) -> None:
    first = fingerprint(plan, scorer(text))
    elsewhere = [text.replace("localhost:8000", "10.0.0.9:99"), text.replace("model", "concurrency: 9, model")]
    elsewhere += [text.replace("model", more) for more in ("timeout: 5, retries: 0, model", "api_key_env: KEY, model")]
    assert {fingerprint(plan, scorer(other)) for other in elsewhere} == {first}
    other_model = text.replace("model: rm", "model: rm2").replace("model: m}", "model: m2}")
    assert len({first, fingerprint(plan, scorer(other_model)), fingerprint(plan)}) == 3


def test_rubric_scale_api_label_and_members_count(plan: MakePlan) -> None:
    graders = ["rubric: x", "highest: 5", "lowest: 0", "show_reference: true", "ungraded: 1"]
    others = [GRADE.replace("grader: {", f"grader: {{{more}, ") for more in graders]
    others += [f"source: server, server: {{{URL}, model: rm, {more}}}"
               for more in ("api: vllm_classify", "api: vllm_classify, label: '1'", "api: vllm_score")]  # fmt: skip
    variants = [scorer(text) for text in (GRADE, SERVER, *others)]
    variants += [
        ensemble(MEMBERS),
        ensemble(f"{MEMBERS}, combine: min"),
        ensemble(f"{MEMBERS}, combine: mean_minus_std"),
    ]
    variants += [ensemble(f"{MEMBERS}, combine: mean_minus_std, std_weight: 2"), ensemble(MEMBERS, "normalize: true")]
    variants += [ensemble("members: [{source: 'stage:reward'}, {source: length, target: 8}]")]
    assert len({fingerprint(plan, variant) for variant in variants}) == len(variants)


def test_an_ensembles_reward_models_are_inputs_of_the_stage(plan: MakePlan) -> None:
    (ppo,) = (stage for stage in plan(ensemble(MEMBERS)).stages if stage.name == "ppo")
    assert "scorers[1].ensemble.members[0].source" in ppo.inputs


def test_a_missing_key_and_a_missing_client_are_named(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCORER_KEY", raising=False)
    for override, where in (
        (server("api_key_env: SCORER_KEY"), f"{PPO}.server"),
        (scorer(GRADE.replace("model", "api_key_env: SCORER_KEY, model")), f"{PPO}.grader.endpoint"),
        (ensemble(f"members: [{{source: reward}}, {{{SERVER.replace('model', 'api_key_env: SCORER_KEY, model')}}}]"),
         f"{PPO}.ensemble.members[1].server"),
    ):  # fmt: skip
        planned = plan(override)
        expected = f"{where}.api_key_env: the environment variable SCORER_KEY is not set"
        assert expected in why_not_here(planned)
        with monkeypatch.context() as patch:
            patch.setenv("SCORER_KEY", "sk-canary")
            assert why_not_here(planned) == ""
            assert "canary" not in repr(planned)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openai" else find_spec(name))
    with pytest.raises(ConfigError, match=r"scorers\[1\]\.server: 'server' needs the package openai"):
        plan(scorer(SERVER))


def test_an_evaluation_by_the_grader_that_ppo_optimises_is_pointed_out(plan: MakePlan) -> None:
    def noted(model: str) -> bool:
        planned = plan(
            scorer(GRADE),
            "stages.evaluate.metrics=[{name: helpful, source: grade}]",
            "stages.evaluate.primary=helpful",
            f"stages.evaluate.grader.endpoint={{{URL}, model: {model}}}",
        )
        return any("judges by helpful, which ppo optimises (scorers[1])" in note for note in cautions(planned))

    assert noted("m")
    assert not noted("another")
