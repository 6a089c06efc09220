"""The page as its reader gets it: complete, self-contained, safe against hostile text, honest about what is missing."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from alignment.core.errors import ArtifactError, ConfigError
from alignment.records.left_out import CUT, FAULT, FILE, LOST, SET_ASIDE, TOO_LONG, Note
from alignment.report.kit.render import build
from tests.browser import browser, opened
from tests.unit.report.conftest import write_lines

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></textarea><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% for x in y %}",
    "\u202egnp.exe \u2067مرحبا",
    "\x00\x1b[31m\ud800",
    "W" * 3000,
    "<a href='https://example.com/'>x</a> @import url(https://example.com/x.css)",
]
REQUESTS = {"src", "srcset", "data", "action", "formaction", "background", "poster", "ping", "xlink:href", "style"}
TAGS = {"html", "head", "meta", "title", "style", "body", "main", "header", "nav", "section", "div", "p", "a", "pre"}
TAGS |= {"h1", "h2", "h3", "b", "bdi", "small", "span", "code", "ul", "li", "dl", "dt", "dd", "details", "summary"}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption"}
TAGS |= {"svg", "g", "rect", "path", "line", "circle", "text"}


class Page(HTMLParser):
    """Every tag with its attributes, and the text of elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.styles: list[str] = []
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        (self.styles if self._inside == "style" else self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def unlabelled(html: str) -> str:
    """Without the labels that cells have for narrow screens."""
    return re.sub(r' data-label="[^"]*"', "", html)


def assert_harmless(html: str) -> None:
    page = Page(html)
    assert {tag for tag, _ in page.tags} <= TAGS
    for tag, attributes in page.tags:
        assert not REQUESTS & attributes.keys(), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert attributes.get("href", "#").startswith("#")
    (style,) = page.styles
    assert "@import" not in style
    assert "url(" not in style
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def test_an_ordinary_page_is_self_contained(fake_run):
    html = fake_run.html()
    assert_harmless(html)
    assert "http://" not in html
    assert "https://" not in html


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_anywhere_stays_text(fake_run, hostile):
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
    fake_run.write()
    (fake_run.folder / "ppo").mkdir()
    (fake_run.folder / "ppo" / "status.json").write_text(json.dumps({"error": hostile}), encoding="utf-8")
    html = fake_run.html(num_samples=40)
    assert_harmless(html)
    visible = hostile.replace("\ud800", "\ufffd").replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    visible = visible.replace("\u202e", "\ufffd").replace("\u2067", "\ufffd")
    assert " ".join(visible.split()) in Page(html).text


def test_every_arm_and_stage_is_shown_with_its_state(fake_run):
    html = fake_run.html()
    page = Page(html).text
    for label in ("base", "base+prompt", "sft", "dpo", "ppo"):
        assert f'<th scope="row"><bdi>{label}</bdi></th>' in html
    for stage, entry in fake_run.run["stages"].items():
        assert f">{stage}</text>" in html
        assert entry["artifact"] in html
    assert "reused · 5\u202fmin 12\u202fs" in html  # the time of the run that made it, not the zero of this one
    assert "0.71" in page
    assert "0.66 to 0.76" in page


def test_chain_arrows_follow_the_inputs(fake_run):
    wide = fake_run.html().split('<div class="scroll chain-wide">')[1].split("</svg>")[0]
    assert wide.count('class="box') == 7  # six stages and the base model
    # base→sft, base→evaluate, sft→reward, sft→dpo, sft→ppo, sft→evaluate, reward→ppo, reward→evaluate, dpo→evaluate,
    # ppo→evaluate, evaluate→report
    assert wide.count('class="arrow"') == 11


def test_a_cycle_of_inputs_still_gives_a_page(fake_run):
    fake_run.run["stages"]["sft"]["inputs"] = {"init": "stage:ppo"}
    fake_run.run["stages"]["dpo"]["inputs"] = {"init": "stage:dpo", "other": "stage:gone"}
    assert_harmless(fake_run.html())


def test_the_same_files_give_the_same_bytes_wherever_they_lie(fake_run, tmp_path):
    first = fake_run.html()
    assert fake_run.html() == first
    moved = tmp_path / "elsewhere"
    shutil.move(fake_run.root / "runs", moved / "runs")
    shutil.move(fake_run.root / "artifacts", moved / "artifacts")
    build(moved / "runs" / "quickstart", moved / "report.html", num_samples=12)
    assert (moved / "report.html").read_text(encoding="utf-8") == first
    assert str(tmp_path) not in first


def test_artifacts_recorded_by_absolute_path_are_found(fake_run):
    by_name = fake_run.html()
    for stage, entry in fake_run.run["stages"].items():
        entry["artifact"] = str(fake_run.artifact(stage))
    (fake_run.folder / "run.json").write_text(json.dumps(fake_run.run), encoding="utf-8")
    build(fake_run.folder, fake_run.root / "other.html", num_samples=12)
    assert (fake_run.root / "other.html").read_text(encoding="utf-8") == by_name


def test_a_missing_evaluation_is_said(fake_run):
    fake_run.evaluation = fake_run.samples = None
    page = Page(fake_run.html()).text
    assert "The evaluation (evaluate) has no result yet. Nothing can be said yet about which stage helped." in page
    assert "Samples come from the evaluation, which has no result yet." in page


def test_a_run_without_an_evaluate_stage_is_said(fake_run):
    for stage in ("evaluate", "report"):
        del fake_run.run["stages"][stage]
    assert "This run has no evaluate stage." in Page(fake_run.html()).text


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"arms": []}', '{"arms": [3, {"words": 1}]}', '{"arms": {}}']
)
def test_a_damaged_evaluation_is_said(fake_run, content):
    fake_run.write()
    (fake_run.artifact("evaluate") / "evaluation.json").write_text(content)
    build(fake_run.folder, fake_run.root / "report.html", num_samples=12)
    assert "The file evaluation.json" in (fake_run.root / "report.html").read_text(encoding="utf-8")


def test_an_arm_with_nothing_but_a_name_is_shown_with_dashes(fake_run):
    fake_run.evaluation["arms"][1] = {
        "name": "base+prompt",
        "reward": None,
        "greedy_log_ratio": None,
        "metrics": {"quality": {"mean": None}},
    }
    html = unlabelled(fake_run.html())
    row = re.search(r"<tr><th scope=\"row\"><bdi>base\+prompt</bdi></th>(.*?)</tr>", html).group(1)
    assert row.count("<td>–</td>") == 8, "nobody has a loss, a perplexity or refusals, so these have no column"


def test_arms_at_long_paths_that_end_alike_have_labels_of_their_own(fake_run):
    paths = {arm: f"path:/scratch/{arm}/{'experiments/' * 8}checkpoint-500" for arm in ("base", "base+prompt")}
    for arm, path in paths.items():
        for part in ("evaluation", "samples"):
            written = json.dumps(getattr(fake_run, part)).replace(json.dumps(arm), json.dumps(path))
            setattr(fake_run, part, json.loads(written))
    html = fake_run.html(num_samples=1)
    for path in paths.values():
        assert f'<th scope="row"><bdi>{path}</bdi></th>' in html
    assert Page(html).text.count("checkpoint-500") > 4


def test_a_finished_run_is_not_called_unfinished(fake_run):
    html = fake_run.html()
    assert "<title>quickstart · alignment report</title>" in html
    assert "not finished" not in html


def test_an_interrupted_run_shows_what_there_is(fake_run):
    fake_run.run["stages"]["ppo"].update(state="failed", reason="no result yet", seconds=None)
    fake_run.run["stages"]["evaluate"].update(state="waiting", artifact=None, seconds=None)
    fake_run.write()
    (fake_run.folder / "ppo").mkdir()
    status = {"state": "failed", "exit_code": 6, "error": "loss is NaN at update 7", "where": "stages.ppo"}
    (fake_run.folder / "ppo" / "status.json").write_text(json.dumps(status), encoding="utf-8")
    html = fake_run.html()
    page = Page(html).text
    assert "The run is not complete: ppo (failed) and evaluate (waiting)." in page
    assert "This run is not finished (running): 3 of 6 stages have a result." in page
    assert "<title>quickstart · unfinished run · alignment report</title>" in html
    assert "loss is NaN at update 7" in page
    assert "ppo (failed): " not in page, "why it ran is not why it failed"
    (fake_run.folder / "ppo" / "status.json").unlink()
    assert "ppo (failed): it left no error" in Page(fake_run.html()).text
    assert 'aria-label="ppo, KL to the reference' in html  # the curves lie in the work folder


def test_a_stage_file_without_bounds_does_not_end_a_report(fake_run):
    """A run may come from somebody else."""
    fake_run.run["stages"]["ppo"].update(state="failed", seconds=None, artifact=None)
    (fake_run.folder / "ppo").mkdir(parents=True)
    for text in (f"a: {'[' * 2_000}{']' * 2_000}", "a: [" + "1, " * 20_000 + "1]"):
        (fake_run.folder / "ppo" / "stage.yaml").write_text(f"artifact: ppo-12345678\n{text}", encoding="utf-8")
        assert "The run is not complete: ppo (failed)." in Page(fake_run.html()).text


def test_a_stage_that_run_json_gives_no_artifact_is_found_through_its_stage_file(fake_run):
    fake_run.run["stages"]["ppo"].update(state="failed", seconds=None)
    fake_run.write()
    folder = fake_run.artifact("ppo")
    fake_run.run["stages"]["ppo"]["artifact"] = None
    (fake_run.folder / "ppo").mkdir()
    (fake_run.folder / "ppo" / "stage.yaml").write_text(f"stage: ppo\nartifact: {folder}\n", encoding="utf-8")
    assert 'aria-label="ppo, KL to the reference' in fake_run.html()


def test_missing_and_torn_metrics_are_said(fake_run):
    del fake_run.metrics["dpo"]
    fake_run.write()
    with (fake_run.artifact("sft") / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 121, "lo')
    build(fake_run.folder, fake_run.root / "report.html", num_samples=12)
    page = Page((fake_run.root / "report.html").read_text(encoding="utf-8")).text
    assert "It left no metrics.jsonl, so there are no curves." in page
    assert "1 line of its metrics.jsonl cannot be read and is left out." in page


def test_rows_that_a_stage_left_out_or_cut_are_counted_by_reason(fake_run):
    fake_run.write()
    too_long = [
        Note(where=f"/data/pairs.jsonl:{row}", kind=TOO_LONG, reason=f"the row has {row} tokens") for row in (9, 4)
    ]
    cut = Note(where="/data/pairs.jsonl:5", kind=CUT, reason="the prompt has 600 tokens of 512")
    lost = Note(
        where="pairs.jsonl:6", kind=f"{LOST}: thoughts of earlier turns", reason="the chat template leaves it out"
    )
    ties = [Note(where=f"pairs.jsonl:{row}", kind=SET_ASIDE, reason="the answers are tied") for row in range(1500)]
    fault = Note(where="pairs.jsonl:8", kind=FAULT, reason="<b>'chosen'</b> is missing", remedy="add it")
    asked = Note(where="prompts.jsonl:2", reason="its prompt repeats an earlier row")
    of_the_same_row = Note(where="/data/pairs.jsonl:4", kind=TOO_LONG, reason="the row has 5 tokens")
    rows = [note.as_row() for note in (*too_long, of_the_same_row, *ties, cut, lost, fault)]
    write_lines(fake_run.artifact("dpo") / FILE, rows)
    (fake_run.artifact("ppo") / FILE).write_text(f'{json.dumps(asked.as_row())}\n{{"where": "prom')
    build(fake_run.folder, fake_run.root / "report.html", num_samples=12)
    html = (fake_run.root / "report.html").read_text(encoding="utf-8")
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


def test_many_reasons_are_added_up_and_no_list_is_no_section(fake_run):
    assert "left-out" not in fake_run.html()
    notes = [Note(where=f"p.jsonl:{row}", reason=f"resembles row {row:02}") for row in range(20)]
    write_lines(fake_run.artifact("ppo") / FILE, [note.as_row() for note in notes])
    build(fake_run.folder, fake_run.root / "report.html", num_samples=12)
    cells = left_out_cells((fake_run.root / "report.html").read_text(encoding="utf-8"))
    assert [cell for cell in cells if cell.startswith("resembles")] == [f"resembles row {row:02}" for row in range(7)]
    assert cells[-4:] == ["ppo", "13", "other reasons", "p.jsonl:7: resembles row 07"]


def test_a_list_of_left_out_rows_that_cannot_be_read_is_said(fake_run):
    fake_run.write()
    (fake_run.artifact("dpo") / FILE).mkdir()
    build(fake_run.folder, fake_run.root / "report.html", num_samples=12)
    page = Page((fake_run.root / "report.html").read_text(encoding="utf-8")).text
    assert "Its left_out.jsonl cannot be read (IsADirectoryError), so rows that it left out are not shown." in page


def left_out_cells(html: str) -> list[str]:
    body = html.partition('<section id="left-out">')[2].partition("<tbody>")[2].partition("</tbody>")[0]
    return [" ".join(word.split()) for word in Page(body).words if word.strip()]


def test_a_damaged_manifest_is_said(fake_run):
    fake_run.write()
    (fake_run.artifact("dpo") / "manifest.json").write_text("{")
    build(fake_run.folder, fake_run.root / "report.html", num_samples=12)
    page = Page((fake_run.root / "report.html").read_text(encoding="utf-8")).text
    assert "Its manifest cannot be read" in page


def test_an_empty_run_still_gives_a_page(fake_run):
    fake_run.run = {"name": "nothing"}
    html = fake_run.html()
    assert_harmless(html)
    assert "This run has no stages." in html


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_a_folder_that_holds_no_run_is_an_artifact_error(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"run\.json"):
        build(tmp_path, tmp_path / "report.html", num_samples=12)
    assert not (tmp_path / "report.html").exists()


def test_a_negative_number_of_samples_is_a_config_error(fake_run):
    with pytest.raises(ConfigError, match="num_samples: -1 is negative"):
        fake_run.html(num_samples=-1)


def test_samples_spread_over_tasks_and_outcomes_whatever_their_order(fake_run):
    first = fake_run.html(num_samples=8)
    random.Random(0).shuffle(fake_run.samples)
    assert fake_run.html(num_samples=8) == first
    assert first.count('<details class="sample"') == 8
    for why, count in {"arms differ most": 4, "by hash, better half": 2, "by hash, worse half": 2}.items():
        assert first.count(f"<small>{why}</small>") == count
    for task in ("summarise", "answer", "rewrite", "extract"):
        assert first.count(f'<span class="task"><bdi>{task}</bdi></span>') >= 1
    assert "8 of 40 held-out prompts." in first


def qualities(sample) -> list[float]:
    """The score of each arm's answer by the primary metric."""
    return [answer["scores"]["quality"] for answer in sample["answers"].values()]


def gap(sample) -> float:
    """How far the arms' answers are apart."""
    return max(qualities(sample)) - min(qualities(sample))


@pytest.mark.parametrize(("higher_is_better", "sign"), [(True, 1), (False, -1)])
def test_shown_samples_have_the_widest_gaps_of_their_tasks_and_stand_in_the_right_half(
    fake_run, higher_is_better, sign
):
    fake_run.evaluation["metrics"][0]["higher_is_better"] = higher_is_better
    by_id = {sample["id"]: sample for sample in fake_run.samples}
    shown = {"arms differ most": [], "by hash, better half": [], "by hash, worse half": []}
    for block in fake_run.html(num_samples=12).split('<details class="sample"')[1:]:
        why, name = (re.search(pattern, block)[1] for pattern in (r"<small>(.*?)</small>", r'"id"><code>(.*?)</code>'))
        shown[why].append(by_id[name])
    widest, better, worse = shown.values()
    assert {len(widest), len(better) + len(worse)} == {6}
    for task in ("summarise", "answer", "rewrite", "extract"):
        gaps = sorted((gap(sample) for sample in fake_run.samples if sample["task"] == task), reverse=True)
        of_task = [gap(sample) for sample in widest if sample["task"] == task]
        assert of_task == gaps[: len(of_task)]
    means = [[sign * sum(qualities(sample)) / len(qualities(sample)) for sample in half] for half in (better, worse)]
    assert min(means[0]) > max(means[1])


def test_prompts_without_a_score_are_in_neither_half(fake_run):
    for sample in fake_run.samples[:20]:
        sample["answers"] = {arm: {"text": answer["text"]} for arm, answer in sample["answers"].items()}
    html = fake_run.html(num_samples=40)
    shown = {why: html.count(f"<small>{why}</small>") for why in ("by hash, better half", "by hash, worse half")}
    assert html.count("<small>by hash</small>") == 20
    assert sum(shown.values()) + html.count("<small>arms differ most</small>") == 20
    html = fake_run.html(num_samples=20)
    assert "<small>by hash</small>" not in html


@pytest.mark.parametrize(("wanted", "shown"), [(0, 0), (1, 1), (40, 40), (99, 40)])
def test_as_many_samples_as_asked_for_or_as_there_are(fake_run, wanted, shown):
    assert fake_run.html(num_samples=wanted).count('<details class="sample"') == shown


def test_a_sample_shows_the_answer_and_its_scores(fake_run):
    fake_run.samples = fake_run.samples[:1]
    answer = {"text": "An answer.", "scores": {"quality": 0.25, "tone": 0.5, "truth": None}}
    fake_run.samples[0]["answers"] = {"stage:dpo": answer, "stage:ppo": {"text": " "}}
    page = Page(fake_run.html()).text
    assert "An answer. quality 0.25 tone 0.50" in page
    assert "(no answer)" in page


def test_a_conversation_of_several_turns_is_shown_in_order(fake_run):
    fake_run.samples = fake_run.samples[:1]
    turns = [{"text": "At half past seven."}, {"text": " "}]
    fake_run.samples[0] |= {
        "later_turns": ["And back?"],
        "reference": "At 7:30.",
        "later_references": ["At noon."],
        "answers": {"stage:dpo": {"text": "At half past seven.", "scores": {"quality": 0.5}, "turns": turns}},
    }
    page = Page(fake_run.html()).text
    assert "reference At 7:30. user And back? assistant At noon." in page
    assert "dpo At half past seven. user And back? assistant (no answer) quality 0.50" in page


def test_a_metric_has_a_row_for_each_turn_where_prompts_have_several(fake_run):
    assert "By turn" not in Page(fake_run.html()).text
    for number, arm in enumerate(fake_run.evaluation["arms"]):
        arm["by_turn"] = [{"quality": {"mean": mean + number / 10}} for mean in (0.5, 0.25)]
    page = Page(fake_run.html()).text
    assert "By turn quality of the answers to each turn" in page
    assert "10.500.600.700.800.90 20.250.350.450.550.65" in page


def test_lineage_settings_and_the_command_are_there(fake_run):
    fake_run.run["overrides"] = ["stages.dpo.beta=0.3", "name=it's mine"]
    page = Page(fake_run.html()).text
    manifest = json.loads((fake_run.artifact("dpo") / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["fingerprint"] in page
    assert f"data.sha256: {manifest['identity']['data']['sha256']}" in page
    assert "adapters/0-sft → adapters/1-dpo" in page
    assert "torch 2.9.0" in page
    assert "4f2c9d1e0b7a" in page
    assert "2.4 GB" in page
    assert re.search(r"eval_accuracy\s+0\.967", page)
    assert re.search(r"rows\s+270", page)
    assert "adapter.target_modules" in page
    assert '["all-linear"]' in page
    assert "beta" in page
    assert "align run quickstart stages.dpo.beta=0.3 'name=it'\"'\"'s mine'" in page


def test_the_memory_of_an_engine_stands_beside_that_of_the_stage(fake_run):
    assert "in vLLM" not in Page(fake_run.html()).text
    path = fake_run.artifact("dpo") / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["usage"] |= {"peak_rss_bytes": 2.4e9, "peak_engine_bytes": 1.7e9}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    build(fake_run.folder, fake_run.root / "again.html", num_samples=1)
    page = Page((fake_run.root / "again.html").read_text(encoding="utf-8")).text.replace("\u202f", " ")
    assert page.count("2.4 GB, and 1.7 GB in vLLM") == 1


def test_settings_read_as_one_would_type_them(fake_run):
    stage = fake_run.run["config"]["stages"]["ppo"]
    stage["scorers"] = [{"source": "reward", "clip": None}, {"source": "length", "normalize": True}]
    stage["data"] = {"limit": None, "columns": {}, "mix": [], "placeholders": {"a": "b"}}
    html = fake_run.html().split('<section id="settings">')[1].split("</section>")[0]
    shown = dict(re.findall(r"<dt>(.*?)</dt><dd><code>(.*?)</code></dd>", html.split("<bdi>ppo</bdi>")[1]))
    assert shown["scorers[0].source"] == "reward"
    assert shown["scorers[0].clip"] == "not set"
    assert shown["scorers[1].normalize"] == "true"
    assert shown["optim.micro_batch_tokens"] == "auto: 4096", "with the size that the stage chose"
    assert (shown["data.limit"], shown["data.columns"], shown["data.mix"]) == ("not set", "none", "none")
    assert shown["data.placeholders.a"] == "b"
    assert "{" not in html
    assert "null" not in html


def test_lineage_leaves_out_what_a_manifest_does_not_have(fake_run):
    fake_run.write()
    path = fake_run.artifact("dpo") / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"git_commit": "", "base": {"files": {"a": {"b": 1}}}}))
    build(fake_run.folder, fake_run.root / "report.html", num_samples=1)
    section = (fake_run.root / "report.html").read_text(encoding="utf-8").split('<section id="lineage">')[1]
    section = section.split("</section>")[0]
    assert "None" not in section
    assert "files.a.b: 1" in section


def test_every_section_says_something(fake_run):
    fake_run.samples = []
    fake_run.run["stages"]["ppo"].update(state="waiting", inputs={}, artifact=None)
    html = fake_run.html()
    assert "The evaluation has no answers." in html
    assert "<bdi>ppo</bdi> has no finished artifact and no inputs." in html
    for section in html.split("<section")[1:]:
        assert Page(section.split("</h2>")[1]).text, section[:80]


def test_the_report_never_imports_torch():
    unwanted = "('torch', 'transformers', 'hydra')"
    code = f"import sys, alignment.report.kit.render; print(sorted(m for m in sys.modules if m in {unwanted}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_browser_opens_it_without_a_word(fake_run, tmp_path):
    if browser() is None:
        pytest.skip("no chromium on PATH: the page was not opened in a browser")
    fake_run.run["name"] = HOSTILE[1]
    for row in fake_run.samples:
        row["messages"][0]["content"] = HOSTILE[2] + HOSTILE[4]
    fake_run.html()
    shown = opened(fake_run.root / "report.html", tmp_path / "picture.png")
    assert shown.console == []
    assert "<script" not in shown.dom
    assert "<img" not in shown.dom
    assert "Run it again" in shown.dom


JUNK = [None, True, -1, 1e308, float("nan"), "", "x", [], [None], {}, {"mean": "x"}, [[{}]]]


@pytest.mark.parametrize("seed", range(25))
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
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(tree[key], (dict, list)) and tree[key] and rng.random() < 0.8:
            tree = tree[key]
        else:
            tree[key] = copy.deepcopy(rng.choice(JUNK))
            return


def test_an_evaluation_with_a_judge_shows_its_pairs_and_what_can_be_concluded(fake_run):
    rate = {"mean": 0.62, "low": 0.53, "high": 0.71}
    pair = {
        "arm": "stage:dpo", "against": "stage:sft", "wins": 50, "ties": 24, "losses": 26, "win_rate": rate,
        "verdict": "better", "invalid": 0.015, "agreement": 0.81, "position_bias": -0.12, "metric_agreement": 0.7,
        "metric_kappa": 0.44, "metric_prompts": 98, "length_controlled": {"mean": 0.55, "low": 0.47, "high": 0.63},
    }  # fmt: skip
    none = pair | {"against": "base+prompt", "win_rate": None, "verdict": "nothing can be concluded", "invalid": 1.0}
    fake_run.evaluation["judge"] = {"name": "a <b>judge</b>", "num_prompts": 100, "pairs": [pair, none, {"arm": "x"}]}
    fake_run.evaluation["conclusions"] = ["100 prompts, by quality: <i>nothing</i>.", 7]
    html = unlabelled(fake_run.html())
    rows = re.findall(r"<tr><th scope=\"row\"><bdi>dpo</bdi></th><td>(sft|base.prompt)</td>(.*?)</tr>", html)
    assert [against for against, _ in rows] == ["sft", "base+prompt"]
    for shown in ("0.62", "0.53 to 0.71", "0.55", "0.47 to 0.63", "50 / 24 / 26", "81", "−0.12", "κ 0.44", "better"):
        assert shown in rows[0][1]
    assert "<td>–</td>" in rows[1][1]
    assert "nothing can be concluded" in rows[1][1]
    assert "a &lt;b&gt;judge&lt;/b&gt;" in html
    assert "by quality: &lt;i&gt;nothing&lt;/i&gt;." in html


def test_a_judge_that_was_held_against_people_has_a_row_of_its_own(fake_run):
    labelled = {
        "arm": "chosen", "against": "rejected", "prompts": 50, "wins": 24, "ties": 4, "losses": 22,
        "win_rate": {"mean": 0.52, "low": 0.4, "high": 0.64}, "verdict": "no real difference", "invalid": 0.0,
        "agreement": 0.9, "position_bias": 0.31,
    }  # fmt: skip
    fake_run.evaluation["judge"] = {"name": "m", "num_prompts": 100, "pairs": [], "labelled": labelled}
    page = Page(fake_run.html()).text
    row = page[page.index("chosen by people") :].split("By task")[0]
    for shown in ("rejected", "0.52", "0.40 to 0.64", "24 / 4 / 22", "+0.31", "chance may agree as often"):
        assert shown in row
    assert "chance would give one half" in page


@pytest.mark.parametrize(
    ("kind", "left_out", "rule"),
    [
        ("endpoint", set(), "A win counts if both orders name the same answer"),
        ("reward", {"orders agree", "bias"}, "The better score wins, and equal scores are a tie"),
        ("metric", {"orders agree", "bias", "metric agrees"}, "The better score wins, and equal scores are a tie"),
    ],
)
def test_pairs_that_scores_decide_are_not_said_to_have_been_asked_in_both_orders(fake_run, kind, left_out, rule):
    pair = {"arm": "stage:dpo", "against": "stage:sft", "wins": 50, "ties": 24, "losses": 26, "verdict": "better"}
    fake_run.evaluation["judge"] = {"kind": kind, "name": "m", "num_prompts": 100, "pairs": [pair]}
    judged = fake_run.html().split("<h3>Judged pairs</h3>")[1].split("</table>")[0]
    every = ["arm", "against", "win rate", "at equal lengths", "win / tie / loss", "invalid", "orders agree", "bias"]
    every += ["metric agrees", "verdict"]
    headings = [heading for heading in every if heading not in left_out]
    assert re.findall(r'<th scope="col">(.*?)</th>', judged) == headings
    assert re.findall(r'data-label="(.*?)"', judged) == headings[1:], "a cell for each, behind the arm"
    assert rule in judged
    assert ("Bias is" in judged) == (kind == "endpoint")
    assert ("“Metric agrees” is" in judged) == (kind != "metric")


def test_means_by_a_grade_say_over_how_many_prompts_they_are(fake_run):
    assert "Dots are means over 100 held-out prompts, lines their" in Page(fake_run.html()).text
    fake_run.evaluation["gradings"] = [{"metric": "tone", "num_prompts": 70}, {"metric": "quality", "num_prompts": 60}]
    of_graded = "Dots are means over 60 of 100 held-out prompts (those with a grade in every arm), lines their"
    assert of_graded in Page(fake_run.html()).text


def test_differences_have_their_p_values_and_those_of_other_metrics_a_table_of_their_own(fake_run):
    evaluation = fake_run.evaluation
    evaluation["comparisons"][0] |= {"metric": "quality", "p": 0.02, "adjusted_p": 0.0499}
    evaluation["comparisons"][1] |= {"metric": "quality", "p": 0.02, "adjusted_p": 0.12}
    other = {"arm": "stage:dpo", "against": "stage:sft", "difference": 0.07, "low": 0.02, "high": 0.12}
    evaluation["metrics"][1]["higher_is_better"] = False
    evaluation["other_comparisons"] = [
        other | {"metric": "truth", "p": 0.2, "adjusted_p": 0.4},
        other | {"metric": "tone", "p": 0.0001, "adjusted_p": 0.0002},
    ]
    html = unlabelled(fake_run.html())
    assert 'role="cell">real <small>p\u202f0.049</small></span>' in html, "never as a value that is not below the level"
    assert 'role="cell">no real difference <small>p\u202f0.120</small></span>' in html, (
        "though its interval excludes zero"
    )
    rows = re.findall(r'<tr><th scope="row"><bdi>(tone|truth)</bdi></th>(.*?)</tr>', html)
    assert [metric for metric, _ in rows] == ["tone", "truth"], "what is real comes first"
    assert "<td>dpo − sft</td>" in rows[0][1]
    assert "<td>+0.070<small>+0.020 to +0.120</small></td>" in rows[0][1]
    assert "<td>&lt;\u202f0.001</td>" in rows[0][1]
    assert '<td class="verdict bad">worse</td>' in rows[0][1]
    assert '<td class="verdict open">no real difference</td>' in rows[1][1]


def test_an_evaluation_of_before_there_were_judges_is_shown_as_it_was(fake_run):
    html = unlabelled(fake_run.html())
    assert "Judged pairs" not in html
    assert "Differences in the other metrics" not in html
    row = re.search(r"<tr><th scope=\"row\"><bdi>base\+prompt</bdi></th>(.*?)</tr>", html).group(1)
    assert "<td>52.0</td>" in row, "words without an interval"


def test_shares_and_losses_are_shown_with_their_intervals(fake_run):
    figures = {"refusals": {"mean": 0.03, "low": 0.0, "high": 0.07}, "loss": {"mean": 1.5, "low": 1.4, "high": 1.6}}
    figures["ended"] = {"mean": 0.98, "low": 0.95, "high": 1.0}
    fake_run.evaluation["arms"][0] |= figures
    html = fake_run.html()
    row = re.search(r"<tr><th scope=\"row\"><bdi>base</bdi></th>(.*?)</tr>", html).group(1)
    assert "1.40 to 1.60" in row
    assert "3\u202f%<small>0\u202f% to 7\u202f%</small>" in row
    assert "2\u202f% of those from base" in html


def test_a_small_closing_figure_is_shown_with_its_digits(fake_run):
    fake_run.headlines["dpo"] = {"engine/gap": 1.2e-5, "loss": 0.4567}
    fake_run.write()
    shown = Page(fake_run.html()).text
    assert "1.2e-5" in shown
    assert "0.457" in shown
