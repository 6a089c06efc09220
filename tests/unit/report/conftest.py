"""A run folder as the driver and the workers leave it, with figures that a test can change, and its page."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from alignment.core.artifacts import Manifest
from alignment.report.run_page.render import build

ARMS = {"base": 0.31, "base+prompt": 0.42, "stage:sft": 0.62, "stage:dpo": 0.71, "stage:ppo": 0.65}
TASKS = ("summarise", "answer", "rewrite", "extract")
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft", "inputs": {"init": "base"}, "seconds": 312.4},
    "reward": {"kind": "reward", "inputs": {"init": "stage:sft"}, "seconds": 154.0},
    "dpo": {"kind": "dpo", "inputs": {"init": "stage:sft"}, "seconds": 402.9},
    "ppo": {"kind": "ppo", "inputs": {"init": "stage:sft", "reward": "stage:reward"}, "seconds": 1204.0},
    "evaluate": {
        "kind": "evaluate",
        "inputs": {"arms": list(ARMS), "reference": "stage:sft", "reward": "stage:reward"},
        "seconds": 188.0,
    },
    "report": {"kind": "report", "inputs": {"evaluation": "stage:evaluate"}, "seconds": None},
}


class FakeRun:
    """The contents of a run's files as plain values; ``write`` puts them on disk, ``html`` makes the report of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "runs" / "quickstart"
        self.run = run_json()
        self.headlines: dict[str, dict[str, float]] = {"reward": {"eval_accuracy": 0.9667, "rows": 270.0}}
        self.identities: dict[str, dict[str, Any]] = {}
        self.metrics = {kind: metrics(kind) for kind in ("sft", "reward", "dpo", "ppo")}
        self.evaluation: dict[str, Any] | None = evaluation_json()
        self.samples: list[dict[str, Any]] | None = [sample(index) for index in range(40)]

    def artifact(self, stage: str) -> Path:
        """The folder that a stage's artifact has."""
        return self.root / "artifacts" / self.run["stages"][stage]["artifact"]

    def write(self) -> None:
        """Writes every file. A stage that is not done or reused gets a work folder and no manifest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "run.json").write_text(json.dumps(self.run), encoding="utf-8")
        for stage, entry in self.run.get("stages", {}).items():
            if entry["artifact"] is None:
                continue
            complete = entry["state"] in ("done", "reused")
            folder = self.artifact(stage)
            folder = folder if complete else folder.with_name(folder.name + ".work") / "content"
            folder.mkdir(parents=True, exist_ok=True)
            if complete:
                made = manifest(stage, entry, self.headlines.get(stage, {}))
                made = replace(made, identity=self.identities.get(stage, made.identity))
                (folder / "manifest.json").write_text(json.dumps(asdict(made)), encoding="utf-8")
            if stage in self.metrics:
                write_lines(folder / "metrics.jsonl", self.metrics[stage])
            if entry["kind"] == "evaluate" and self.evaluation is not None:
                (folder / "evaluation.json").write_text(json.dumps(self.evaluation), encoding="utf-8")
            if entry["kind"] == "evaluate" and self.samples is not None:
                write_lines(folder / "samples.jsonl", self.samples)

    def html(self, *, num_samples: int = 12) -> str:
        """The report of what stands on disk after ``write``."""
        self.write()
        return self.built(num_samples=num_samples)

    def built(self, *, num_samples: int = 12) -> str:
        """The report of what stands on disk."""
        output = self.root / "report.html"
        build(self.folder, output, num_samples=num_samples)
        return output.read_text(encoding="utf-8")

    def add(self, stage: str, kind: str, inputs: dict[str, Any], file: str, content: str | None) -> None:
        """Gives the run a finished stage that left this file, and writes all."""
        entry = {"kind": kind, "inputs": inputs, "seconds": 9.0, "state": "done", "reason": "new"}
        self.run["stages"][stage] = entry | {"artifact": f"{stage}-01234567"}
        self.write()
        if content is not None:
            (self.artifact(stage) / file).write_text(content, encoding="utf-8")

    def drop_arms(self, keep: list[str]) -> None:
        """Leaves only the arms in ``keep``, everywhere."""
        assert self.samples is not None
        self.evaluation["arms"] = [arm for arm in self.evaluation["arms"] if arm["name"] in keep]
        pairs = self.evaluation["comparisons"]
        self.evaluation["comparisons"] = [p for p in pairs if p["arm"] in keep and p["against"] in keep]
        for row in self.samples:
            row["answers"] = {arm: answer for arm, answer in row["answers"].items() if arm in keep}


@pytest.fixture
def fake_run(tmp_path: Path) -> FakeRun:
    """A complete, ordinary run: five arms, dpo really better than sft, ppo not shown to be."""
    return FakeRun(tmp_path)


# ---- pages ----------------------------------------------------------------------------------------------------------

HOSTILE_PARTS = [
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
HOSTILE = "\n".join(HOSTILE_PARTS)
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

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
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
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def section(html: str, name: str) -> str:
    """The inside of a section of the page; empty without it."""
    return html.partition(f'<section id="{name}">')[2].partition("</section>")[0]


def row_of(html: str, label: str) -> str:
    """The cells of the first row of a table that begins with this label, without the labels for narrow screens."""
    pattern = rf'<tr><th scope="row"><bdi>{re.escape(label)}</bdi></th>(.*?)</tr>'
    row = re.search(pattern, unlabelled(html), re.DOTALL)
    assert row is not None, label
    return row[1]


# ---- files ----------------------------------------------------------------------------------------------------------


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON Lines as the workers write them: NaN stands as the word ``NaN``."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_json() -> dict[str, Any]:
    """run.json of a finished run whose report is being made."""
    stages = copy.deepcopy(STAGES)
    for name, entry in stages.items():
        entry.update(state="done", reason="new", artifact=f"{name}-{digest(name)[:8]}")
    stages["sft"].update(state="reused", reason="same fingerprint", seconds=0.0)
    stages["report"].update(state="running")
    optim = {"lr": 2e-4, "micro_batch_tokens": "auto", "batch_size": 8, "epochs": 1, "schedule": "cosine"}
    adapter = {"kind": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.0, "target_modules": ["all-linear"]}
    configs = {name: {"kind": entry["kind"]} for name, entry in stages.items()}
    for name in ("sft", "reward", "dpo", "ppo"):
        data = {"source": "bundled:quickstart/preferences", "limit": None}
        configs[name] |= {"init": "stage:sft", "adapter": adapter, "data": data, "optim": optim, "max_length": 1024}
    configs["dpo"] |= {"beta": 0.1, "loss": "sigmoid"}
    return {
        "name": "quickstart",
        "recipe": "quickstart",
        "overrides": ["stages.dpo.beta=0.1", "name=quickstart"],
        "config": {"name": "quickstart", "seed": 42, "model": {"source": "bundled:smollm2-135m"}, "stages": configs},
        "started": "2026-03-14T09:26:53Z",
        "finished": None,
        "state": "running",
        "stages": stages,
    }


def digest(name: str) -> str:
    """A stand-in for a fingerprint: 64 hexadecimal digits, the same for the same name."""
    return f"{random.Random(name).getrandbits(256):064x}"


def manifest(stage: str, entry: dict[str, Any], headlines: dict[str, float]) -> Manifest:
    """The manifest of a finished stage."""
    return Manifest(
        stage=stage,
        kind={"sft": "policy", "dpo": "policy", "ppo": "policy"}.get(stage, stage),
        fingerprint=digest(stage),
        identity={"config": {"kind": entry["kind"]}, "data": {"sha256": digest("data of " + stage)}, "seed": 42},
        inputs={"init": digest("sft")} if stage in ("dpo", "reward", "ppo") else {},
        base={"source": "bundled:smollm2-135m", "sha256": digest("base")},
        adapters=["adapters/0-sft", f"adapters/1-{stage}"] if stage in ("dpo", "ppo") else ["adapters/0-sft"],
        usage={"seconds": 312.4 if stage == "sft" else entry["seconds"] or 1.0, "peak_rss_bytes": 2.4e9}
        | ({"micro_batch_tokens": 4096.0} if stage == "ppo" else {}),
        metrics=headlines,
        versions={"torch": "2.9.0", "transformers": "5.3.1", "trl": "1.16.0"},
        git_commit="4f2c9d1e0b7a",
        created="2026-03-14T09:40:11Z",
    )


def metrics(kind: str) -> list[dict[str, Any]]:
    """Curves of a believable shape; the same every time."""
    rng = random.Random(kind)
    rows = []
    for step in range(1, {"sft": 120, "reward": 60, "dpo": 57, "ppo": 16}[kind] + 1):
        noise, done = rng.gauss(0, 1), 1 - math.exp(-step / 25)
        rows.append({"step": step, "seconds": 2.5 * step, "lr": 1e-4} | FIGURES[kind](noise, done, step))
    return rows


FIGURES: dict[str, Callable[[float, float, int], dict[str, float]]] = {
    "sft": lambda n, d, step: {"loss": 2.4 - 0.9 * d + 0.08 * n, "mean_token_accuracy": 0.48 + 0.17 * d + 0.015 * n},
    "reward": lambda n, d, step: (
        {"loss": 0.69 - 0.4 * d + 0.05 * n, "accuracy": min(1.0, 0.5 + 0.4 * d + 0.06 * n), "margin": 1.7 * d + 0.2 * n}
    ),
    "dpo": lambda n, d, step: {
        "loss": 0.69 - 0.35 * d + 0.04 * n,
        "rewards/accuracies": min(1.0, 0.5 + 0.38 * d + 0.06 * n),
        "rewards/margins": 1.3 * d + 0.12 * n,
        "logps/chosen": -41.0 - 3 * d + 2 * n,
        "logps/rejected": -47.0 - 21 * d + 2 * n,
    },
    "ppo": lambda n, d, step: {
        "objective/score": -0.4 + 2.2 * d + 0.15 * n,
        "objective/kl": 9.0 * d + 0.4 * n,
        "objective/kl_coef": 0.05,
        "loss/policy": -0.012 + 0.004 * n,
        "loss/value": 0.9 - 0.7 * d + 0.05 * n,
        "policy/clipfrac": 0.05 + 0.02 * d + 0.005 * n,
        "val/explained_variance": 0.1 + 0.7 * d + 0.05 * n,
        "response_length": 44 - 12 * d + 1.5 * n,
        "eos_rate": min(1.0, 0.8 + 0.2 * d),
    },
}


def interval(mean: float, half: float) -> dict[str, float]:
    """An interval as evaluation.json writes it."""
    return {"mean": mean, "low": mean - half, "high": mean + half}


def comparison(arm: str, against: str, difference: float, half: float) -> dict[str, Any]:
    """A comparison as evaluation.json writes it."""
    low, high = difference - half, difference + half
    entry = {"arm": arm, "against": against, "difference": difference, "low": low, "high": high}
    return entry | {"real": low > 0 or high < 0}


def evaluation_json() -> dict[str, Any]:
    """evaluation.json of five arms."""
    arms = []
    for position, (name, quality) in enumerate(ARMS.items()):
        trained = name.startswith("stage:")
        arms.append(
            {
                "name": name,
                "label": name.removeprefix("stage:"),
                "metrics": {
                    "quality": interval(quality, 0.045),
                    "tone": interval(min(1.0, quality + 0.2), 0.03),
                    "truth": interval(min(1.0, quality + 0.12), 0.04),
                },
                "words": {"mean": 61.0 - 9 * position},
                "reward": interval(-1.2 + position * 0.7, 0.21),
                "greedy_log_ratio": interval(2.0 + 2.1 * position, 0.6) if trained else None,
                "distinct": 0.99,
                "ended": {"mean": 1.0},
                "seconds": 41.0,
            }
        )
    pairs = [("base+prompt", "base", 0.11), ("stage:sft", "base", 0.31), ("stage:sft", "base+prompt", 0.2)]
    pairs += [("stage:dpo", "stage:sft", 0.09), ("stage:ppo", "stage:sft", 0.03), ("stage:ppo", "stage:dpo", -0.06)]
    shift = {task: 0.06 * index - 0.09 for index, task in enumerate(TASKS)}
    return {
        "num_prompts": 100,
        "metrics": [{"name": name, "higher_is_better": True} for name in ("quality", "tone", "truth")],
        "primary": "quality",
        "arms": arms,
        "comparisons": [comparison(arm, against, difference, 0.055) for arm, against, difference in pairs],
        "tasks": {task: {arm: quality + shift[task] for arm, quality in ARMS.items()} for task in TASKS},
        "version": 2,
    }


def sample(index: int) -> dict[str, Any]:
    """A row of samples.jsonl; its arms differ by an amount that depends on the row."""
    rng = random.Random(f"sample {index}")
    note = (
        f"Note {index}: the ferry to Norra leaves at 7:30 from pier {index % 5 + 1} and takes 25 minutes. Bicycles "
        "travel free on weekdays. In high wind the crossing is cancelled and a bus runs from the market square instead."
    )
    answers = {}
    for arm, level in ARMS.items():
        quality = round(min(1.0, max(0.0, rng.gauss(level, 0.25))), 2)
        opening = "Sure! Here is a summary of the note: the" if quality < 0.4 else "The"
        words = f"{opening} ferry leaves at 7:30 from pier {index % 5 + 1} and takes 25 minutes."
        scores = {"quality": quality, "tone": min(1.0, quality + 0.2), "truth": 1.0}
        answers[arm] = {"text": words, "scores": scores}
    return {
        "id": f"heldout-{index:03d}",
        "task": TASKS[index % len(TASKS)],
        "messages": [{"role": "user", "content": f"Summarise this note for a visitor.\n\n{note}"}],
        "reference": f"The 7:30 ferry to Norra leaves from pier {index % 5 + 1}; a bus replaces it in high wind.",
        "answers": answers,
    }
