"""The chain as a user runs it: what it leaves behind, what a second call does, what survives a kill."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignment.core.artifacts import verify
from alignment.pipeline.sweeps.objectives import of_stage
from alignment.records.training import METRICS, MetricsLog
from alignment.stages.registry import read_spec
from tests.e2e.conftest import Align, environment
from tests.e2e.forked import Forked
from tests.living import kill_each
from tests.unit.training.read_back import curves_of

STAGES = ["sft", "reward", "dpo", "ppo", "evaluate", "report"]


def states(align: Align) -> dict[str, str]:
    return {name: stage["state"] for name, stage in align.stages().items()}


def test_every_stage_leaves_an_artifact_that_verifies(finished: Align) -> None:
    assert set(finished.stages()) == set(STAGES)
    for stage in STAGES:
        manifest = verify(finished.artifact(stage), content=True)
        assert manifest.stage == stage
        assert manifest.usage["seconds"] > 0
        if stage != "report":
            spec = read_spec(finished.output / "runs/quickstart" / stage / "stage.yaml")
            assert [name for name in manifest.metrics if name not in of_stage(spec.config)] == [], (
                "a sweep may ask for it"
            )
    assert not list(finished.output.glob("artifacts/*.work"))


def test_the_report_and_every_arm_are_there(finished: Align) -> None:
    evaluation = json.loads((finished.artifact("evaluate") / "evaluation.json").read_text())
    assert [arm["label"] for arm in evaluation["arms"]] == ["base", "base+prompt", "sft", "dpo", "ppo"]
    assert evaluation["num_prompts"] == 5, "the settings of a small run did not reach the stage"
    page = (finished.output / "runs/quickstart/report.html").read_text()
    for label in ("base+prompt", "sft", "dpo", "ppo"):
        assert label in page


def test_a_run_that_nothing_tracked_is_sent_to_a_tracker_afterwards(finished: Align, forked: Forked) -> None:
    code, printed = forked.run(["track", "quickstart", "--to", "tensorboard", "--output", str(finished.output)])
    assert code == 0, printed
    spec = read_spec(finished.output / "runs/quickstart/dpo/stage.yaml")
    rows = MetricsLog(finished.artifact("dpo") / METRICS).rows()
    stored = curves_of("tensorboard", spec)
    assert [stored["loss", row["step"]] for row in rows] == [[pytest.approx(row["loss"], rel=1e-6)] for row in rows]


def test_a_result_is_exported_and_plain_transformers_reads_it(finished: Align, forked: Forked, tmp_path: Path) -> None:
    def export(result: str, to: str, *more: str, code: int = 0) -> str:
        argv = ["export", result, "--to", str(tmp_path / to), *more, "--output", str(finished.output)]
        ended, printed = forked.run(argv)
        assert ended == code, printed
        return printed

    printed = export("quickstart/dpo", "model")
    assert f"written: {tmp_path / 'model'}" in printed
    assert "loaded by transformers, it gives the same outputs" in printed
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    printed = export("quickstart/dpo", "gguf", "--as", "gguf", "--max-gap", "0.1")
    assert "f16 costs" in printed
    AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model-f16.gguf")
    assert 'stop "<|im_end|>"' in (tmp_path / "gguf" / "Modelfile").read_text()
    assert "export it as a model" in export("quickstart/dpo", "adapter", "--as", "adapter", code=4)
    export("quickstart/sft", "adapter", "--as", "adapter")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(finished.model), tmp_path / "adapter")
    assert "did you mean 'ppo'" in export("quickstart/pppo", "other", code=2)


def test_the_reference_arm_has_a_log_ratio_of_zero_to_itself(finished: Align) -> None:
    evaluation = json.loads((finished.artifact("evaluate") / "evaluation.json").read_text())
    kl = {arm["label"]: arm["greedy_log_ratio"] for arm in evaluation["arms"]}
    assert kl["sft"]["mean"] == 0.0
    assert kl["base"]["mean"] != 0.0
    assert kl["base+prompt"] is None


def test_metrics_stand_once_a_step_and_learning_shows(finished: Align) -> None:
    for stage in ("sft", "reward", "dpo", "ppo"):
        lines = [json.loads(line) for line in (finished.artifact(stage) / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines]
        assert steps == sorted(set(steps)), stage
    sft = [json.loads(line) for line in (finished.artifact("sft") / "metrics.jsonl").read_text().splitlines()]
    assert sft[-1]["loss"] < sft[0]["loss"]


def test_ppo_logs_its_own_names_and_starts_at_ratio_one(finished: Align) -> None:
    lines = [json.loads(line) for line in (finished.artifact("ppo") / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]  # updates, of 2 epochs x 2 minibatches
    assert abs(lines[0]["objective/kl"]) < 1e-4
    for line in lines:
        assert line["policy/approxkl_first"] < 1e-10
        assert {"objective/score", "loss/policy", "loss/value", "val/explained_variance", "eos_rate"} <= set(line)


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


def test_a_second_run_reuses_everything_and_prints_the_arms(finished: Align) -> None:
    printed = finished("run")
    assert set(states(finished).values()) == {"reused"}
    assert "style_and_facts" in printed
    assert "report.html" in printed


def test_a_changed_beta_runs_dpo_evaluation_and_report_only(finished: Align) -> None:
    finished("run", "stages.dpo.beta=0.3")
    stage_states = states(finished)
    assert {name for name, state in stage_states.items() if state == "done"} == {"dpo", "evaluate", "report"}
    assert {name for name, state in stage_states.items() if state == "reused"} == {"sft", "reward", "ppo"}
    finished("run")  # back to what the other tests look at
    assert set(states(finished).values()) == {"reused"}


def test_more_processes_run_nothing_again(finished: Align) -> None:
    finished("run", "launch.num_processes=2")
    assert set(states(finished).values()) == {"reused"}


def test_killed_in_the_middle_it_goes_on_and_ends_the_same(new_forked: Callable[[], Align], finished: Align) -> None:
    align = new_forked()
    for earlier in STAGES[: STAGES.index("ppo")]:
        shutil.copytree(finished.artifact(earlier), align.output / "artifacts" / finished.artifact(earlier).name)
    _kill_during(align, "ppo")
    (work,) = align.output.glob("artifacts/ppo-*.work")
    assert list(work.glob("checkpoints/checkpoint-*/alignment_checkpoint.json"))
    assert not (align.output / "artifacts" / work.name.removesuffix(".work") / "manifest.json").exists()
    assert re.search(r"^ppo +resume +from checkpoint-", align("plan"), re.MULTILINE)
    align("run")
    straight = {name: sha for name, sha in finished.weights().items() if not name.startswith("dpo")}
    assert straight.items() <= align.weights().items()
    steps = [json.loads(line)["step"] for line in (align.artifact("ppo") / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_full_training_runs_the_whole_chain(new_forked: Callable[[], Align]) -> None:
    align = new_forked()
    without = [f"stages.{stage}.adapter.master_weights=false" for stage in ("sft", "ppo")]
    align("run", "adapter=full", "model.dtype=bfloat16", *without, "~stages.evaluate", "~stages.report")
    assert set(states(align).values()) == {"done"}
    for stage, dtype in (("sft", torch.bfloat16), ("dpo", torch.float32), ("ppo", torch.bfloat16)):
        AutoModelForCausalLM.from_pretrained(str(align.artifact(stage) / "model"))
        weights = load_file(align.artifact(stage) / "model/model.safetensors")
        assert weights["model.embed_tokens.weight"].dtype == dtype


def test_a_damaged_input_stops_before_training(new_forked: Callable[[], Align]) -> None:
    align = new_forked()
    align("run", "~stages.reward", "~stages.dpo", "~stages.ppo", "stages.evaluate.reward=null",
          "stages.evaluate.arms=[base,stage:sft]")  # fmt: skip
    weights = next(align.artifact("sft").glob("adapters/*/adapter_model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    printed = align("run", code=7)
    assert "adapter_model.safetensors" in printed


def _kill_during(align: Align, stage: str) -> None:
    """SIGKILL to a driver, its launcher and its worker, none of them forked, once the stage has a sealed checkpoint."""
    process = subprocess.Popen(
        align.argv("run"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    pattern = f"artifacts/{stage}-*.work/checkpoints/checkpoint-*/alignment_checkpoint.json"
    deadline = time.monotonic() + 300
    while not list(align.output.glob(pattern)):
        assert process.poll() is None, f"it ended before it could be killed\n{align.logs()}"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    kill_each(everyone)
    process.wait()
    psutil.wait_procs(everyone, timeout=30)


def test_plain_text_comes_before_conversations_and_pairs(new_forked: Callable[[], Align], tmp_path: Path) -> None:
    """Texts of the user's own, and pairs from a CSV file mixed into those of DPO, a faulty one skipped."""
    align = replace(new_forked(), recipe="cpt_sft_dpo")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Number {number} is open. " * 30}) + "\n" for number in range(6)))
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("prompt,chosen,rejected\nOpen?,Yes it is.,No.\nWhen?,At nine.,\nWhere?,Here.,There.\n")
    printed = align(
        "run",
        f"stages.cpt.data.source=path:{texts}",
        f"stages.dpo.data.mix=[{{source: 'path:{pairs}', count: 2, on_error: skip, max_skipped: 0.5}}]",
    )
    assert set(states(align).values()) == {"done"}, printed
    assert verify(align.artifact("cpt"), content=False).metrics["rows"] > 6, "long texts are cut"
    assert verify(align.artifact("dpo"), content=False).metrics["rows"] == 10
    assert not (align.artifact("cpt") / "left_out.jsonl").exists()
    (left_out,) = (align.artifact("dpo") / "left_out.jsonl").read_text().splitlines()
    assert json.loads(left_out)["where"] == f"{pairs}:3"
    evaluation = json.loads((align.artifact("evaluate") / "evaluation.json").read_text())
    assert [arm["label"] for arm in evaluation["arms"]] == ["base", "base+prompt", "cpt", "sft", "dpo"]


def test_parts_of_the_data_are_trained_on_and_drawn_as_a_curve(new_forked: Callable[[], Align]) -> None:
    align = replace(new_forked(), recipe="learning_curve")
    printed = align("run")
    assert set(states(align).values()) == {"done"}, printed
    parts = ["sft_12", "sft_25", "sft_50", "sft"]
    assert [verify(align.artifact(part), content=False).metrics["rows"] for part in parts] == [2, 3, 6, 12]
    evaluation = json.loads((align.artifact("evaluate") / "evaluation.json").read_text())
    assert [arm["name"] for arm in evaluation["arms"]] == ["base", "base+prompt", *(f"stage:{part}" for part in parts)]
    page = (align.output / "runs/learning_curve/report.html").read_text()
    (spoken,) = re.findall(r'aria-label="sft, style_and_facts over rows: ([^"]*)"', page)
    assert re.findall(r" at (\d+)", spoken) == ["2", "3", "6", "12"]
