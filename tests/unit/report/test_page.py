"""The page as its reader gets it: complete, self-contained, safe against hostile text, honest about what is missing."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import subprocess
import sys

import pytest

from alignment.core.errors import ArtifactError, ConfigError
from alignment.records.cost import FILE as COST
from alignment.records.cost import PhaseCost, RunCost, StageCost
from alignment.records.stages import CUT, FAULT, LEFT_OUT_FILE, LOST, SET_ASIDE, TOO_LONG, Note
from alignment.report.run_page.render import build
from tests.browser import browser, opened
from tests.unit.report.conftest import (
    HOSTILE,
    HOSTILE_PARTS,
    TASKS,
    Page,
    assert_harmless,
    row_of,
    section,
    write_lines,
)


def test_an_ordinary_page_is_self_contained_and_complete(fake_run):
    html = fake_run.html()
    assert_harmless(html)
    assert "http" not in html.replace("http-equiv", "")
    assert "<title>quickstart · alignment report</title>" in html
    for absent in ("not finished", "quality over rows", "More data"):
        assert absent not in html
    for label in ("base", "base+prompt", "sft", "dpo", "ppo"):
        assert row_of(html, label)
    for stage, entry in fake_run.run["stages"].items():
        assert f">{stage}</text>" in html
        assert entry["artifact"] in html
    assert "reused · 5\u202fmin 12\u202fs" in html  # the time of the run that made it, not the zero of this one
    assert "0.71<small>0.66 to 0.76</small>" in html
    wide = html.split('<div class="scroll chain-scroll">')[1].split("</svg>")[0]
    assert wide.count('class="box') == 7  # six stages and the base model
    # base→sft, base→evaluate, sft→reward, sft→dpo, sft→ppo, sft→evaluate, reward→ppo, reward→evaluate, dpo→evaluate,
    # ppo→evaluate, evaluate→report
    assert wide.count('class="arrow"') == 11


def test_hostile_text_anywhere_stays_text(fake_run):
    hostile = HOSTILE
    fake_run.run.update(name=hostile, recipe=hostile, overrides=[hostile], started=hostile)
    fake_run.run["config"]["model"]["source"] = hostile
    fake_run.run["config"]["stages"]["dpo"][hostile] = {hostile: [hostile]}
    fake_run.run["stages"]["ppo"].update(state=hostile, reason=hostile, kind=hostile)
    for arm in fake_run.evaluation["arms"]:
        arm["label"] = arm["label"] + hostile
    fake_run.evaluation["tasks"][hostile] = {"stage:sft": 0.5}
    for row in fake_run.samples:
        row.update(id=row["id"] + hostile, task=hostile, reference=hostile)
        row["messages"] = [{"role": hostile, "content": hostile}]
        for answer in row["answers"].values():
            answer.update(text=hostile, scores={hostile: 0.5})
    status(fake_run, "ppo", error=hostile)
    html = fake_run.html(num_samples=40)
    assert_harmless(html)
    visible = re.sub("[\ud800\x00\x1b\u202e\u2067]", "\ufffd", hostile)
    assert " ".join(visible.split()) in Page(html).text


def status(run, stage, **fields):
    """How a stage ended, as its worker says it."""
    (run.folder / stage).mkdir(parents=True, exist_ok=True)
    (run.folder / stage / "status.json").write_text(json.dumps(fields), encoding="utf-8")


JUNK = [None, True, -1, 1e308, float("nan"), "", "x", [], [None], {}, {"mean": "x"}, [[{}]]]


@pytest.mark.parametrize("seed", range(4))
def test_values_of_the_wrong_kind_never_stop_the_page(fake_run, seed):
    rng = random.Random(seed)
    for tree in (fake_run.evaluation, fake_run.samples[:4], fake_run.metrics["dpo"][:5], fake_run.run["config"]):
        for _ in range(4):
            spoil(tree, rng)
    fake_run.samples[:4] = [row for row in fake_run.samples[:4] if isinstance(row, dict)]
    for entry in fake_run.run["stages"].values():
        for key in ("kind", "state", "reason", "seconds", "inputs"):
            if rng.random() < 0.2:
                entry[key] = copy.deepcopy(rng.choice(JUNK))
    fake_run.metrics = {stage: rows for stage, rows in fake_run.metrics.items() if isinstance(rows, list)}
    assert_harmless(fake_run.html())


def spoil(tree, rng: random.Random) -> None:
    """Puts a value of another kind somewhere into nested dicts and lists."""
    while keys := list(tree) if isinstance(tree, dict) else list(range(len(tree))):
        key = rng.choice(keys)
        if not (isinstance(tree[key], (dict, list)) and tree[key] and rng.random() < 0.8):
            tree[key] = copy.deepcopy(rng.choice(JUNK))
            return
        tree = tree[key]


def test_the_same_files_give_the_same_bytes_wherever_they_lie(fake_run, tmp_path):
    first = fake_run.html()
    assert fake_run.html() == first
    for stage, entry in fake_run.run["stages"].items():
        entry["artifact"] = str(fake_run.artifact(stage))
    (fake_run.folder / "run.json").write_text(json.dumps(fake_run.run), encoding="utf-8")
    assert fake_run.built() == first, "artifacts that are recorded by absolute path"
    moved = tmp_path / "elsewhere"
    for part in ("runs", "artifacts"):
        shutil.move(fake_run.root / part, moved / part)
    build(moved / "runs" / "quickstart", moved / "report.html", num_samples=12)
    assert (moved / "report.html").read_text(encoding="utf-8") == first
    assert str(tmp_path) not in first


# ---- what is missing or damaged -------------------------------------------------------------------------------------


def without_answers(run):
    run.samples = []
    run.run["stages"]["ppo"].update(state="waiting", inputs={}, artifact=None)


def in_a_cycle(run):
    run.run["stages"]["sft"]["inputs"] = {"init": "stage:ppo"}
    run.run["stages"]["dpo"]["inputs"] = {"init": "stage:dpo", "other": "stage:gone"}


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        (
            lambda run: vars(run).update(evaluation=None, samples=None),
            [
                "The evaluation (evaluate) has no result yet. Nothing can be said yet about which stage helped.",
                "Samples come from the evaluation, which has no result yet.",
            ],
        ),
        (without_answers, ["The evaluation has no answers.", "ppo has no finished artifact and no inputs."]),
        (
            lambda run: [run.run["stages"].pop(name) for name in ("evaluate", "report")],
            ["This run has no evaluate stage."],
        ),
        (lambda run: vars(run).update(run={"name": "nothing"}), ["This run has no stages."]),
        (in_a_cycle, []),
        (lambda run: run.metrics.pop("dpo"), ["It left no metrics.jsonl, so there are no curves."]),
    ],
)
def test_what_a_run_lacks_is_said(fake_run, change, sentences):
    change(fake_run)
    html = fake_run.html()
    assert_harmless(html)
    assert [sentence for sentence in sentences if sentence not in Page(html).text] == []
    for part in html.split("<section")[1:]:
        assert Page(part.split("</h2>")[1]).text, f"every section says something: {part[:80]}"


@pytest.mark.parametrize(
    ("stage", "file", "content", "sentence"),
    [
        *(
            ("evaluate", "evaluation.json", content, "The file evaluation.json")
            for content in ("", '{"arms": []}', '{"arms": [3, {"words": 1}]}')
        ),
        ("dpo", "manifest.json", "{", "Its manifest cannot be read"),
        ("sft", "metrics.jsonl", '{"step": 1}\n{"st', "1 line of its metrics.jsonl cannot be read and is left out."),
        (
            "dpo",
            LEFT_OUT_FILE,
            None,
            "Its left_out.jsonl cannot be read (IsADirectoryError), so rows that it left out are not",
        ),
    ],
)
def test_a_damaged_file_is_said(fake_run, stage, file, content, sentence):
    fake_run.write()
    path = fake_run.artifact(stage) / file
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    assert sentence in Page(fake_run.built()).text


def test_arms_at_long_paths_that_end_alike_have_labels_of_their_own(fake_run):
    paths = {arm: f"path:/scratch/{arm}/{'experiments/' * 8}checkpoint-500" for arm in ("base", "base+prompt")}
    for arm, path in paths.items():
        for part in ("evaluation", "samples"):
            written = json.dumps(getattr(fake_run, part)).replace(json.dumps(arm), json.dumps(path))
            setattr(fake_run, part, json.loads(written))
    html = fake_run.html(num_samples=1)
    for path in paths.values():
        assert row_of(html, path)
    assert Page(html).text.count("checkpoint-500") > 4


def test_an_interrupted_run_shows_what_there_is(fake_run):
    fake_run.run["stages"]["ppo"].update(state="failed", reason="no result yet", seconds=None)
    fake_run.run["stages"]["evaluate"].update(state="waiting", artifact=None, seconds=None)
    status(fake_run, "ppo", state="failed", exit_code=6, error="loss is NaN at update 7", where="stages.ppo")
    html = fake_run.html()
    page = Page(html).text
    assert "The run is not complete: ppo (failed) and evaluate (waiting)." in page
    assert "This run is not finished (running): 3 of 6 stages have a result." in page
    assert "<title>quickstart · unfinished run · alignment report</title>" in html
    assert "loss is NaN at update 7" in page
    assert "ppo (failed): " not in page, "why it ran is not why it failed"
    assert 'aria-label="ppo, KL to the reference' in html, "the curves lie in the work folder"
    (fake_run.folder / "ppo" / "status.json").unlink()
    folder = fake_run.artifact("ppo")
    fake_run.run["stages"]["ppo"]["artifact"] = None
    stage_file = fake_run.folder / "ppo" / "stage.yaml"
    stage_file.write_text(f"stage: ppo\nartifact: {folder}\n", encoding="utf-8")
    html = fake_run.html()
    assert "ppo (failed): it left no error" in Page(html).text
    assert 'aria-label="ppo, KL to the reference' in html, "found through its stage file"
    for text in (f"a: {'[' * 2_000}{']' * 2_000}", "a: [" + "1, " * 20_000 + "1]"):  # it may be somebody else's
        stage_file.write_text(f"artifact: ppo-12345678\n{text}", encoding="utf-8")
        assert "The run is not complete: ppo (failed)" in Page(fake_run.html()).text


@pytest.mark.parametrize("content", [None, "{"])
def test_a_folder_that_holds_no_run_is_an_artifact_error(fake_run, tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"run\.json"):
        build(tmp_path, tmp_path / "report.html", num_samples=12)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ConfigError, match="num_samples: -1 is negative"):
        fake_run.html(num_samples=-1)


# ---- rows that were left out ----------------------------------------------------------------------------------------


def left_out_cells(html: str) -> list[str]:
    body = section(html, "left-out").partition("<tbody>")[2].partition("</tbody>")[0]
    return [" ".join(word.split()) for word in Page(body).words if word.strip()]


def test_rows_that_a_stage_left_out_or_cut_are_counted_by_reason(fake_run):
    assert "left-out" not in fake_run.html()
    notes = [
        Note(where=f"/data/pairs.jsonl:{row}", kind=TOO_LONG, reason=f"the row has {row} tokens") for row in (9, 4)
    ]
    notes += [Note(where="/data/pairs.jsonl:4", kind=TOO_LONG, reason="the row has 5 tokens")]  # the same row
    notes += [Note(where=f"pairs.jsonl:{row}", kind=SET_ASIDE, reason="the answers are tied") for row in range(1500)]
    notes += [Note(where="/data/pairs.jsonl:5", kind=CUT, reason="the prompt has 600 tokens of 512")]
    lost = f"{LOST}: thoughts of earlier turns"
    notes += [Note(where="pairs.jsonl:6", kind=lost, reason="the chat template leaves it out")]
    notes += [Note(where="pairs.jsonl:8", kind=FAULT, reason="<b>'chosen'</b> is missing", remedy="add it")]
    write_lines(fake_run.artifact("dpo") / LEFT_OUT_FILE, [note.as_row() for note in notes])
    asked = Note(where="prompts.jsonl:2", reason="its prompt repeats an earlier row")
    (fake_run.artifact("ppo") / LEFT_OUT_FILE).write_text(f'{json.dumps(asked.as_row())}\n{{"where": "prom')
    html = fake_run.built()
    assert_harmless(html)
    assert left_out_cells(html) == [
        *("dpo", "1 500", "the answers are tied", "pairs.jsonl:0: the answers are tied"),
        *("dpo", "2", "too long", "pairs.jsonl:9: the row has 9 tokens"),
        *("dpo", "1", "cut, because it was too long", "pairs.jsonl:5: the prompt has 600 tokens of 512"),
        *("dpo", "1", "faulty", "pairs.jsonl:8: <b>'chosen'</b> is missing"),
        *("dpo", "1", "the chat template leaves out thoughts of earlier turns"),
        "pairs.jsonl:6: the chat template leaves it out",
        *("ppo", "1", "a line of left_out.jsonl that cannot be read", "–"),
        *("ppo", "1", "its prompt repeats an earlier row", "prompts.jsonl:2: its prompt repeats an earlier row"),
    ]
    notes = [Note(where=f"p.jsonl:{row}", reason=f"resembles row {row:02}") for row in range(20)]
    write_lines(fake_run.artifact("ppo") / LEFT_OUT_FILE, [note.as_row() for note in notes])
    cells = left_out_cells(fake_run.built())
    assert [cell for cell in cells if cell.startswith("resembles")] == [f"resembles row {row:02}" for row in range(7)]
    assert cells[-4:] == ["ppo", "13", "other reasons", "p.jsonl:7: resembles row 07"]


# ---- answers --------------------------------------------------------------------------------------------------------


def test_samples_spread_over_tasks_whatever_their_order(fake_run):
    first = fake_run.html(num_samples=8)
    random.Random(0).shuffle(fake_run.samples)
    assert fake_run.html(num_samples=8) == first
    for why in ("arms differ most", "by hash"):
        assert first.count(f"<small>{why}</small>") == 4
    for task in TASKS:
        assert first.count(f'<span class="task"><bdi>{task}</bdi></span>') >= 1
    assert "8 of 40 held-out prompts." in first
    for wanted, shown in ((0, 0), (1, 1), (40, 40), (99, 40)):
        assert fake_run.built(num_samples=wanted).count('<details class="sample"') == shown


def gap(sample) -> float:
    """How far the scores of the arms' answers by the primary metric are apart."""
    qualities = [answer["scores"]["quality"] for answer in sample["answers"].values()]
    return max(qualities) - min(qualities)


def test_half_of_the_shown_samples_have_the_widest_gaps_of_their_tasks(fake_run):
    by_id = {sample["id"]: sample for sample in fake_run.samples}
    shown = {"arms differ most": [], "by hash": []}
    for block in fake_run.html(num_samples=12).split('<details class="sample"')[1:]:
        why, name = (re.search(pattern, block)[1] for pattern in (r"<small>(.*?)</small>", r'"id"><code>(.*?)</code>'))
        shown[why].append(by_id[name])
    assert [len(samples) for samples in shown.values()] == [6, 6]
    for task in TASKS:
        gaps = sorted((gap(sample) for sample in fake_run.samples if sample["task"] == task), reverse=True)
        of_task = [gap(sample) for sample in shown["arms differ most"] if sample["task"] == task]
        assert of_task == gaps[: len(of_task)]


def test_a_sample_shows_its_turns_answers_and_scores_in_order(fake_run):
    answer = {"text": "An answer.", "scores": {"quality": 0.25, "tone": 0.5, "truth": None}}
    turns = [{"text": "At half past seven."}, {"text": " "}]
    fake_run.samples = fake_run.samples[:1]
    fake_run.samples[0] |= {
        "later_turns": ["And back?"],
        "reference": "At 7:30.",
        "later_references": ["At noon."],
        "answers": {
            "stage:sft": answer,
            "stage:ppo": {"text": " "},
            "stage:dpo": {"text": "At half past seven.", "scores": {"quality": 0.5}, "turns": turns},
        },
    }
    page = Page(fake_run.html()).text
    assert "An answer. quality 0.25 tone 0.50" in page
    assert "ppo (no answer)" in page
    assert "reference At 7:30. user And back? assistant At noon." in page
    assert "dpo At half past seven. user And back? assistant (no answer) quality 0.50" in page


# ---- lineage, settings and costs ------------------------------------------------------------------------------------


def test_lineage_settings_and_the_command_are_there(fake_run):
    fake_run.run["overrides"] = ["stages.dpo.beta=0.3", "name=it's mine"]
    fake_run.headlines["dpo"] = {"engine/gap": 1.2e-5}
    page = Page(fake_run.html()).text
    path = fake_run.artifact("dpo") / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for words in (
        manifest["fingerprint"],
        f"data.sha256: {manifest['identity']['data']['sha256']}",
        *("adapters/0-sft → adapters/1-dpo", "torch 2.9.0", "4f2c9d1e0b7a", "2.4 GB", "1.2e-5"),
        "align run quickstart stages.dpo.beta=0.3 'name=it'\"'\"'s mine'",
    ):
        assert words in page
    assert re.search(r"eval_accuracy\s+0\.967", page)
    assert re.search(r"rows\s+270", page)
    assert "in vLLM" not in page
    usage = manifest["usage"] | {"peak_engine_bytes": 1.7e9}
    path.write_text(json.dumps(manifest | {"git_commit": "", "base": {"files": {"a": {"b": 1}}}, "usage": usage}))
    html = fake_run.built()
    assert Page(html).text.count("2.4 GB, and 1.7 GB in vLLM") == 1
    lineage = section(html, "lineage")
    assert "None" not in lineage, "what a manifest does not have is left out"
    assert "files.a.b: 1" in lineage


def test_settings_read_as_one_would_type_them(fake_run):
    stage = fake_run.run["config"]["stages"]["ppo"]
    stage["scorers"] = [{"source": "reward", "clip": None}, {"source": "length", "normalize": True}]
    stage["data"] = {"limit": None, "columns": {}, "mix": [], "placeholders": {"a": "b"}}
    html = section(fake_run.html(), "settings")
    shown = dict(re.findall(r"<dt>(.*?)</dt><dd><code>(.*?)</code></dd>", html.split("<bdi>ppo</bdi>")[1]))
    expected = {
        "scorers[0].source": "reward",
        "scorers[0].clip": "not set",
        "scorers[1].normalize": "true",
        "optim.micro_batch_tokens": "auto: 4096",  # with the size that the stage chose
        "data.limit": "not set",
        "data.columns": "none",
        "data.mix": "none",
        "data.placeholders.a": "b",
        "adapter.target_modules": "[&#34;all-linear&#34;]",
    }
    assert {name: shown.get(name) for name in expected} == expected
    assert "{" not in html
    assert "null" not in html


PHASES = {"training": PhaseCost(peak=1_000_000_000, held=1_500_000_000, seconds=90.0)}


@pytest.mark.parametrize(
    ("planned", "seconds", "memory"),
    [({"fixed": 500_000_000}, "1\u202fmin 30\u202fs", "2.0\u202fGB"), ({"first_rows": 1_000}, "–", "1.5\u202fGB")],
)
def test_planned_time_and_memory_stand_beside_the_measured_ones(fake_run, planned, seconds, memory):
    """The time of the first rows is not that of the stage."""
    (fake_run.folder / "sft").mkdir(parents=True)
    cost = StageCost(stage="sft", kind="sft", phases=PHASES, **planned)
    RunCost(device="this", stages=[cost]).write(fake_run.folder / "sft" / COST)
    html = fake_run.html()
    cells = re.findall(r'data-label="planned (?:time|memory)">(.*?)</td>', html)
    assert (seconds, memory) in zip(cells[::2], cells[1::2], strict=True)
    for content in ("{", None):
        file = fake_run.folder / "sft" / COST
        file.unlink() if content is None else file.write_text(content, encoding="utf-8")
        assert "planned memory" not in fake_run.html(), "a damaged plan is none"


def test_the_report_never_imports_torch():
    unwanted = "('torch', 'transformers', 'hydra')"
    code = f"import sys, alignment.report.run_page.render; print(sorted(m for m in sys.modules if m in {unwanted}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.skipif(browser() is None, reason="no chromium on PATH: the page was not opened in a browser")
def test_a_browser_opens_it_without_a_word(fake_run, tmp_path):
    fake_run.run["name"] = HOSTILE_PARTS[1]
    for row in fake_run.samples:
        row["messages"][0]["content"] = HOSTILE_PARTS[2] + HOSTILE_PARTS[4]
    fake_run.html()
    shown = opened(fake_run.root / "report.html", tmp_path / "picture.png")
    assert shown.console == []
    assert "<script" not in shown.dom
    assert "<img" not in shown.dom
    assert "Run it again" in shown.dom
