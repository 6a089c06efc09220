"""Chains as a user runs them: what they leave behind, what a second call does, what survives a kill or a change."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alignment.commands.judge.verb import Ballots, Choice
from alignment.core.artifacts import verify
from alignment.evaluation.answer_pairs import pairs_of_samples
from alignment.pipeline.sweeps.objectives import of_stage
from alignment.records.evaluation import Evaluation, read_samples
from alignment.records.votes import read_votes
from alignment.stages.forgetting.kind import ForgettingConfig
from alignment.stages.registry import read_spec
from tests.e2e.conftest import Align
from tests.e2e.forked import KILLED
from tests.tiny import save_tiny_model
from tests.unit.training.read_back import curves_of

STAGES = ["sft", "evaluate_sft", "reward", "dpo", "ppo", "evaluate", "report"]
TASKS = Path(__file__).parents[1] / "data" / "tasks"


def test_every_stage_leaves_an_artifact_that_verifies_and_metrics_that_learn(finished: Align) -> None:
    assert set(finished.stages()) == set(STAGES)
    for stage in STAGES:
        manifest = verify(finished.artifact(stage), content=True)
        assert manifest.stage == stage
        assert manifest.usage["seconds"] > 0
        if stage != "report":
            spec = read_spec(finished.output / "runs/quickstart" / stage / "stage.yaml")
            assert [name for name in manifest.metrics if name not in of_stage(spec.config)] == [], "a sweep may ask"
    assert not list(finished.output.glob("artifacts/*.work"))
    for stage in ("sft", "reward", "dpo", "ppo"):
        steps = [line["step"] for line in finished.rows(stage)]
        assert steps == sorted(set(steps)), stage
    sft, ppo = finished.rows("sft"), finished.rows("ppo")
    assert sft[-1]["loss"] < sft[0]["loss"]
    assert [line["step"] for line in ppo] == [1, 2, 3]  # updates, of 2 epochs x 2 minibatches
    assert abs(ppo[0]["objective/kl"]) < 1e-4
    for line in ppo:
        assert line["policy/approxkl_first"] < 1e-10
        assert {"objective/score", "loss/policy", "loss/value", "val/explained_variance", "eos_rate"} <= set(line)


def test_the_report_and_every_arm_are_there(finished: Align) -> None:
    evaluation = json.loads((finished.artifact("evaluate") / "evaluation.json").read_text())
    labels = ["base", "base+prompt", "sft", "dpo", "ppo"]
    assert [arm["label"] for arm in evaluation["arms"]] == labels
    assert evaluation["num_prompts"] == 5, "the settings of a small run did not reach the stage"
    kl = {arm["label"]: arm["greedy_log_ratio"] for arm in evaluation["arms"]}
    assert kl["sft"]["mean"] == 0.0, "the reference arm has a log ratio of zero to itself"
    assert kl["base"]["mean"] != 0.0
    assert kl["base+prompt"] is None
    page = (finished.output / "runs/quickstart/report.html").read_text()
    assert [label for label in labels if label not in page] == []


def test_a_run_that_nothing_tracked_is_sent_to_a_tracker_afterwards(finished: Align) -> None:
    finished.on("track", "quickstart", "--to", "tensorboard")
    stored = curves_of("tensorboard", read_spec(finished.output / "runs/quickstart/dpo/stage.yaml"))
    rows = finished.rows("dpo")
    assert [stored["loss", row["step"]] for row in rows] == [[pytest.approx(row["loss"], rel=1e-6)] for row in rows]


def test_a_policy_loads_without_us(finished: Align) -> None:
    """Plain transformers and PEFT: the base, then each adapter merged in order."""
    for stage in ("sft", "dpo", "ppo"):
        folder = finished.artifact(stage)
        manifest = verify(folder, content=False)
        model = AutoModelForCausalLM.from_pretrained(str(finished.model))
        logits = [model(torch.tensor([[5, 6, 7]])).logits]
        for adapter in manifest.adapters:
            assert [path.name for path in (folder / adapter).iterdir() if path.is_dir()] == []
            model = PeftModel.from_pretrained(model, str(folder / adapter)).merge_and_unload()
            logits.append(model(torch.tensor([[5, 6, 7]])).logits)
        assert len(logits) == (2 if stage == "sft" else 3)
        for below, above in itertools.pairwise(logits):
            assert not torch.allclose(below, above, atol=1e-6)


def test_a_second_run_reuses_everything_and_a_changed_beta_what_it_does_not_reach(finished: Align) -> None:
    printed = finished("run")
    assert finished.states() == dict.fromkeys(STAGES, "reused")
    assert "style_and_facts" in printed
    assert "report.html" in printed
    finished("run", "name=beta", "stages.dpo.beta=0.3")
    expected = {name: "done" if name in ("dpo", "evaluate", "report") else "reused" for name in STAGES}
    assert finished.states("beta") == expected


def test_killed_in_the_middle_it_goes_on_and_ends_the_same(new_forked: Callable[[], Align], finished: Align) -> None:
    align = new_forked()
    assert align.forked is not None
    for earlier in STAGES[: STAGES.index("ppo")]:
        shutil.copytree(finished.artifact(earlier), align.output / "artifacts" / finished.artifact(earlier).name)
    argv = align.argv("run")
    code, printed = align.forked.run(argv[argv.index("run") :], variables={KILLED: "ppo:1"})
    assert code == 5, printed
    (work,) = align.output.glob("artifacts/ppo-*.work")
    assert not (align.output / "artifacts" / work.name.removesuffix(".work") / "manifest.json").exists()
    assert re.search(r"\bppo .* resume +from checkpoint-", align("plan"), re.MULTILINE)
    align("run")
    straight = {name: sha for name, sha in finished.weights().items() if not name.startswith("dpo")}
    assert straight.items() <= align.weights().items()
    assert [line["step"] for line in align.rows("ppo")] == [1, 2, 3]


def test_a_damaged_input_stops_before_training(new_forked: Callable[[], Align], finished: Align) -> None:
    align, sft = new_forked(), finished.artifact("sft")
    shutil.copytree(sft, align.output / "artifacts" / sft.name)
    (weights,) = align.output.glob("artifacts/sft-*/adapters/*/adapter_model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert "adapter_model.safetensors" in align("run", code=7)
    assert not list(align.output.glob("artifacts/reward-*/manifest.json"))


def test_plain_text_comes_before_conversations_and_pairs(new_forked: Callable[[], Align], tmp_path: Path) -> None:
    """Texts of the user's own, and pairs from a CSV file mixed into those of DPO, a faulty one skipped."""
    align = replace(new_forked(), recipe="cpt_sft_dpo")
    texts, pairs = tmp_path / "texts.jsonl", tmp_path / "pairs.csv"
    texts.write_text("".join(json.dumps({"text": f"Number {number} is open. " * 30}) + "\n" for number in range(6)))
    pairs.write_text("prompt,chosen,rejected\nOpen?,Yes it is.,No.\nWhen?,At nine.,\nWhere?,Here.,There.\n")
    mixed = f"stages.dpo.data.mix=[{{source: 'path:{pairs}', count: 2, on_error: skip, max_skipped: 0.5}}]"
    align("run", f"stages.cpt.data.source=path:{texts}", mixed, "~stages.evaluate", "~stages.report")
    assert align.states() == dict.fromkeys(("cpt", "sft", "dpo"), "done")
    assert verify(align.artifact("cpt"), content=False).metrics["rows"] > 6, "long texts are cut"
    assert verify(align.artifact("dpo"), content=False).metrics["rows"] == 10
    assert not (align.artifact("cpt") / "left_out.jsonl").exists()
    (left_out,) = align.rows("dpo", "left_out.jsonl")
    assert left_out["where"] == f"{pairs}:3"


def test_parts_of_the_data_are_trained_on_and_drawn_as_a_curve(new_forked: Callable[[], Align]) -> None:
    align = replace(new_forked(), recipe="learning_curve")
    align("run")
    assert set(align.states().values()) == {"done"}
    parts = ["sft_12", "sft_25", "sft_50", "sft"]
    assert [verify(align.artifact(part), content=False).metrics["rows"] for part in parts] == [2, 3, 6, 12]
    page = (align.output / "runs/learning_curve/report.html").read_text()
    (spoken,) = re.findall(r'aria-label="sft, style_and_facts over rows: ([^"]*)"', page)
    assert re.findall(r" at (\d+)", spoken) == ["2", "3", "6", "12"]


def test_a_function_scores_a_rule_joins_it_and_a_guard_watches(finished: Align, tmp_path: Path) -> None:
    file = tmp_path / "score.py"
    file.write_text(
        "def brevity(prompts, completions, rows):\n    return [-float(len(text)) for text in completions]\n"
    )
    scorers = f"{{source: '{file}:brevity', weight: 0.1}}, {{source: length, target: 4, normalize: true}}"
    data = "{source: 'bundled:quickstart/conversations', limit: 4}"
    printed = finished(
        "run",
        "name=scored",
        *(f"~stages.{stage}" for stage in ("reward", "dpo", "evaluate", "report")),
        "stages.ppo.reward=null",
        f"stages.ppo.scorers=[{scorers}]",
        "stages.ppo.guard={every: 2, prompts: 2, scorer: {source: length, target: 2}}",
        f"stages.ppo.ptx={{coefficient: 0.1, batch_size: 2, data: {data}}}",
        "stages.ppo.critic_warmup=1",
    )
    assert f"runs your code: {file}:brevity" in printed
    folder = Path(finished.stages("scored")["ppo"]["artifact"])
    manifest = verify(folder, content=True)
    lines = finished.rows("ppo", run="scored")
    assert {"score/brevity", "score/length", "objective/score"} <= set(lines[0])
    assert ["loss/ptx" in line for line in lines] == [False, True, True], "PTX waits for the policy to learn"
    assert ["guard/scorer" in line for line in lines] == [True, False, True]
    looks = finished.rows("ppo", "guard.jsonl", run="scored")
    assert [look["step"] for look in looks] == [0, 2, 3]
    best = looks[-1]["guard/best_update"]
    assert manifest.metrics["guard/kept_update"] == best
    assert len(finished.rows("ppo", "samples.jsonl", run="scored")) == 12  # four of each update
    assert (folder / "critic.safetensors").is_file() == (best == 3), "it belongs to the last policy"
    assert manifest.metrics["memory/base_copies"] < 1.1


VOTED = ("base+few-shot", "base")
EVALUATION = (
    *(f"~stages.{stage}" for stage in ("sft", "evaluate_sft", "dpo", "ppo")),
    "stages.evaluate.arms=[base,base+few-shot]",
    "stages.evaluate.data.limit=12",
    "stages.evaluate.max_new_tokens=8",
    "stages.evaluate.few_shot.count=1",
    "stages.evaluate.reference=base",
    "stages.evaluate.reward=null",
    "stages.evaluate.judge={kind: people, pairs: [{arm: base+few-shot, against: base}]}",
    "stages.reward.init=base",
    "stages.reward.eval_fraction=0.0",
    "stages.reward.data.limit=null",
    "stages.reward.optim={max_steps: 1, warmup_ratio: 0.0, batch_size: 4}",
)


def test_votes_give_a_win_rate_and_train_a_reward_model(new_forked: Callable[[], Align]) -> None:
    align = new_forked()
    align("run", *EVALUATION, "--stage", "evaluate")
    first = align.artifact("evaluate")
    votes = align.output / "runs/quickstart/evaluate/votes.jsonl"
    ballots = Ballots(votes, pairs_of_samples(read_samples(first), VOTED), VOTED)
    assert ballots.total == 12
    for annotator in ("ada", "bo"):
        for number in range(12):
            ballot = ballots.standing(annotator)
            assert ballot.pair is not None
            ballots.vote(annotator, ballot.pair.key, Choice.tie if number % 4 == 0 else Choice.first)
    printed = align("run", *EVALUATION, f"stages.reward.data.source=path:{votes}")
    assert "6 rows are left out" in printed, "ties"
    assert "resemble prompts of evaluate" in printed
    second = align.artifact("evaluate")
    assert second != first, "votes are part of what was asked for"
    assert list(read_samples(second)) == list(read_samples(first)), "the same answers are judged"
    judge = Evaluation.read(second).judge
    assert judge is not None
    (pair,) = judge.pairs
    assert pair.people is not None
    assert (pair.people.judged, pair.people.votes, pair.people.annotators) == (12, 24, 2)
    assert pair.win_rate is not None
    assert f"base+few-shot wins {pair.win_rate.mean:.2f}" in printed
    preferences = [vote for vote in read_votes(votes) if vote.preferred in VOTED]
    assert verify(align.artifact("reward"), content=False).metrics["rows"] == len(preferences) == 18


def test_a_policy_that_forgot_ends_the_run_with_a_code_of_its_own_each_time_anew(
    new_forked: Callable[[], Align], tmp_path: Path
) -> None:
    """A random base has nothing that SFT could spoil, so one arm is sure of nonsense."""
    align, ruined = replace(new_forked(), recipe="replay"), save_tiny_model(tmp_path / "ruined")
    weights = load_file(ruined / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 3.0
    save_file(weights, ruined / "model.safetensors", metadata={"format": "pt"})
    arms = ["stage:sft", f"path:{ruined}"]
    limits = ("data.limit=6", "bootstrap_samples=100", f"arms={arms}")
    gated = ("run", "stages.sft.data.mix=[]", *(f"stages.forgetting.{limit}" for limit in limits))
    printed = align(*gated, code=10)
    assert set(align.states().values()) == {"done"}, "the rest of the run is made"
    run = align.output / "runs/replay"
    assert json.loads((run / "run.json").read_text())["state"] == "gate not met"
    assert " forgot too much: perplexity " in (run / "report.html").read_text()
    assert "forgetting: sft passed: " in printed
    assert "gate: stages.forgetting: ruined forgot too much" in printed

    manifest = verify(align.artifact("forgetting"), content=True)
    record = json.loads((align.artifact("forgetting") / "forgetting.json").read_text())
    assert (manifest.kind, manifest.metrics["passed"], record["passed"]) == ("forgetting", 0.0, False)
    assert [(arm["name"], arm["passed"]) for arm in record["arms"]] == [
        ("base", True),
        (arms[0], True),
        (arms[1], False),
    ]
    assert manifest.metrics["perplexity/sft"] == record["arms"][1]["perplexity"]
    assert [name for name in manifest.metrics if name not in of_stage(ForgettingConfig(arms=arms))] == []
    texts, questions = (align.rows("forgetting", name) for name in ("texts.jsonl", "questions.jsonl"))
    assert (len(texts), len(questions)) == (record["num_texts"], record["num_questions"]) == (6, 110)
    base = sum(text["nats"]["base"] for text in texts) / sum(text["tokens"] for text in texts)
    assert base == pytest.approx(record["arms"][0]["nats"])
    right = [question["right"]["stage:sft"] for question in questions]
    assert sum(right) / len(right) == pytest.approx(record["arms"][1]["ability"])

    assert "gate: stages.forgetting: ruined" in align(*gated, code=10)
    assert set(align.states().values()) == {"reused"}
    align(*gated, "--stage", "forgetting", "launch/backend=slurm", "launch.backend.submit=false")  # the next job starts


BENCHMARK = """\
defaults: [base, stage@stages.sft: sft, stage@stages.benchmark: benchmark, stage@stages.report: report, _self_]
stages:
  sft: {data: {source: "bundled:quickstart/conversations"}}
  benchmark: {arms: [base, "stage:sft"], tasks: [both, shout], bootstrap_samples: 100}
  report: {evaluation: null}
"""


def test_a_run_measures_shows_and_reuses_benchmarks(new_forked: Callable[[], Align], tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    (tmp_path / "mine.yaml").write_text(BENCHMARK)
    shutil.copytree(TASKS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    align = replace(new_forked(), recipe=str(tmp_path / "mine.yaml"))
    own = f"stages.benchmark.task_folders=['{folder}']"
    printed = align("run", own)
    assert f"benchmark runs your code: {folder}/words.py:cleaned" in printed
    assert "capitals/acc, 2-shot, 20 rows: base 0." in printed
    assert "sft against base in capitals/acc: " in printed
    manifest = verify(align.artifact("benchmark"), content=True)
    assert {"both/acc/sft", "capitals/acc/base", "shout/exact_match,first_word/sft", "rows"} <= set(manifest.metrics)
    files = {path.name for path in align.artifact("benchmark").iterdir()}
    assert files == {"benchmark.json", "samples.jsonl", "manifest.json"}
    page = (align.output / "runs/mine/report.html").read_text()
    assert "capitals/acc" in page.split('<section id="results">')[1].split("</section>")[0]
    assert "3 reused" in align("plan", own)
    task = folder / "capitals.yaml"
    task.write_text(task.read_text().replace("num_fewshot: 2", "num_fewshot: 1"))
    assert re.search(r"\bbenchmark .*run .*task_folders\[0\] changed", align("plan", own))


def test_a_plan_says_what_its_stages_would_need_and_the_next_one_remembers(
    new_forked: Callable[[], Align], tmp_path: Path
) -> None:
    align = replace(new_forked(), recipe="sft_dpo")
    asks = {"role": "user", "content": "When?"}
    sft = [{"messages": [asks, {"role": "assistant", "content": f"At {number}."}]} for number in (8, 9)]
    dpo = [{"messages": [asks], "chosen": f"At {number}.", "rejected": "No."} for number in (8, 9)]
    fewer = ["~stages.evaluate", "~stages.report"]
    for stage, rows in (("sft", sft), ("dpo", dpo)):
        file = tmp_path / f"{stage}.jsonl"  # of one length, because each has operations to time
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        settings = (f"data.source=path:{file}", "optim.batch_size=1", "optim.micro_batch_tokens=2048")
        fewer += [f"stages.{stage}.{setting}" for setting in settings]
    printed = align("plan", "--cost", *fewer)
    lines = {line.split()[0]: line for line in printed.splitlines() if " GB " in line and "stages." not in line}
    assert set(lines) >= {"sft", "dpo"}
    assert "estimating sft (1 of 2)\nestimating dpo (2 of 2; about " in printed, "it says how far it is"
    assert "not estimated" not in printed
    assert not (align.output / "runs").exists()
    assert [path.name for path in (align.output / "artifacts").iterdir()] == [".cost"]
    again = align("plan", *fewer)
    (time,) = [line for line in printed.splitlines() if line.startswith("time: ")]
    assert lines["dpo"] in again
    assert time in again
    assert {path.suffix for path in (align.output / "artifacts" / ".cost").iterdir()} == {".json"}
