"""A model behind ``transformers serve`` grades what PPO learns from and judges the outcome; a run is killed meanwhile.

The calls pass through a server of this process, which counts them and kills the run in the middle of some. The runs
after it ask for nothing that was answered, and end with the bytes of an undisturbed run.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.conftest import environment
from tests.judge_server import Response, listening
from tests.proofs.common import Claim, Skipped
from tests.proofs.stories import OPENINGS, Stories
from tests.transformers_server import missing, model_served

ANSWERS, PROMPTS = 16, 4
CALLS = ANSWERS + 2 * PROMPTS
"""A grade for each answer, then verdicts in both orders; equal answers to equal prompts are graded once."""
REPEATED = 4
"""Answers that may repeat another one."""
KILLED_AT = (3, 11, ANSWERS + 4)
"""Calls during which a run is killed: of the first update, of the second, of the judge."""
UNGRADED = -1.0
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
RECIPE = """\
defaults: [base, stage@stages.ppo: ppo, stage@stages.evaluate: evaluate, _self_]
summary: a served model grades and judges
model: {{source: "path:{model}", dtype: float32, chat_template: "path:{folder}/template.jinja"}}
output: {output}
launch: {{threads: 1}}
stages:
  ppo:
    init: base
    reward: null
    scorers: [{{source: grade, grader: {{endpoint: {endpoint}, ungraded: {ungraded}}}}}]
    data: {{source: "path:{folder}/openings.jsonl"}}
    updates: 2
    num_minibatches: 1
    max_new_tokens: 16
    optim: {{lr: 1e-3, batch_size: 8}}
  evaluate:
    data: {{source: "path:{folder}/heldout.jsonl"}}
    arms: [base, "stage:ppo"]
    reference: base
    reward: null
    max_new_tokens: 16
    judge: {{kind: endpoint, max_invalid: 1.0, max_prompts: {prompts}, endpoint: {endpoint}}}
"""


@dataclass
class Asked:
    """The calls of one or several runs: the questions that were answered, and the run to kill in the call ``fatal``."""

    url: str
    answered: Counter[str] = field(default_factory=Counter)
    fatal: int | None = None
    process: subprocess.Popen[bytes] | None = None
    killed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, body: dict[str, Any], number: int) -> Response | None:
        """What the model says, or nothing from the fatal call on."""
        if self.fatal is not None and number >= self.fatal:
            self._kill()
            return None
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            text = response.read().decode()
        with self.lock:
            if self.killed:
                return None
            self.answered[json.dumps(body["messages"])] += 1
        return Response(body=text)

    def _kill(self) -> None:
        """SIGKILL to the driver and all its processes; replies that were sent before have had time to be saved."""
        with self.lock:
            if self.killed or self.process is None:
                return
            self.killed = True
            time.sleep(0.5)
            driver = psutil.Process(self.process.pid)
            for process in [*driver.children(recursive=True), driver]:
                with suppress(psutil.Error, ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)


def run(folder: Path) -> list[Claim]:
    """An undisturbed run, and one that is killed three times."""
    if reason := missing():
        raise Skipped(reason)
    model = Stories().folder
    with model_served(folder) as (url, name):
        straight, expected = _made(folder / "straight", model, url, name, kills=())
        killed, answered = _made(folder / "killed", model, url, name, kills=KILLED_AT)
    grades = [sample["scorers"]["grade"] for sample in _lines(straight, "ppo", "samples.jsonl")]
    verdicts = [call["verdict"] for call in _lines(straight, "evaluate", "judgements.jsonl")]
    return [
        Claim(
            figure="calls of the undisturbed run",
            values=(float(expected.total()),),
            at_least=CALLS - REPEATED,
            at_most=CALLS,
        ),
        Claim(
            figure="questions answered twice, or in one of the runs alone",
            values=(_apart(expected, answered),),
            at_most=0,
        ),
        Claim(
            figure="samples with a grade or the score of none", values=(float(sum(map(_is_score, grades))),), at_least=1
        ),
        Claim(
            figure="samples with another score", values=(float(len(grades) - sum(map(_is_score, grades))),), at_most=0
        ),
        Claim(figure="verdicts", values=(float(len(verdicts)),), at_least=2 * PROMPTS),
        Claim(figure="files of the results", values=(float(len(_files(straight))),), at_least=4),
        Claim(figure="files that differ", values=(float(_differing(_files(straight), _files(killed))),), at_most=0),
    ]


def _made(folder: Path, model: Path, url: str, name: str, *, kills: Sequence[int]) -> tuple[Path, Counter[str]]:
    """The folder of a run that was killed so often and ended, and how often each question was answered."""
    folder.mkdir()
    answered: Counter[str] = Counter()
    with socket.socket() as free:  # one address for all runs, because that of a judge counts
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for number, fatal in enumerate((*kills, None)):
        asked = Asked(url=url, fatal=None if fatal is None else fatal - answered.total())
        with listening(asked.answer, port=port) as served:
            argv = [sys.executable, "-m", "alignment.cli", "run", str(_recipe(folder, model, served.url, name))]
            with (folder / f"printed-{number}.txt").open("wb") as sink:
                asked.process = subprocess.Popen(argv, stdout=sink, stderr=sink, env=environment())
                code = asked.process.wait(600)
        if code != (0 if fatal is None else -signal.SIGKILL):
            raise RuntimeError(f"exit code {code}\n{(folder / f'printed-{number}.txt').read_text()[-3000:]}")
        answered += asked.answered
    return folder, answered


def _recipe(folder: Path, model: Path, url: str, name: str) -> Path:
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    for file, openings in (("openings.jsonl", OPENINGS[:64]), ("heldout.jsonl", OPENINGS[-PROMPTS:])):
        (folder / file).write_text(
            "".join(f"{json.dumps({'prompt': opening})}\n" for opening in openings), encoding="utf-8"
        )
    endpoint = f'{{base_url: "{url}", model: "{name}", max_tokens: 12, timeout: 60, concurrency: 2}}'
    settings = {"model": model, "folder": folder, "output": folder / "out", "endpoint": endpoint}
    file = folder / "mine.yaml"
    file.write_text(RECIPE.format(**settings, ungraded=UNGRADED, prompts=PROMPTS), encoding="utf-8")
    return file


def _is_score(score: float) -> bool:
    return score == UNGRADED or score in range(1, 11)


def _apart(expected: Counter[str], answered: Counter[str]) -> float:
    """Questions of one run alone, or that were answered more often than in the other."""
    return float(((expected - answered) + (answered - expected)).total())


def _artifact(folder: Path, stage: str) -> Path:
    record = json.loads((folder / "out/runs/mine/run.json").read_text(encoding="utf-8"))
    return Path(record["stages"][stage]["artifact"])


def _lines(folder: Path, stage: str, name: str) -> list[dict[str, Any]]:
    written = (_artifact(folder, stage) / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in written.splitlines()]


def _files(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights, the answers and the verdicts."""
    return {
        f"{stage}/{path.relative_to(_artifact(folder, stage))}": hashlib.sha256(path.read_bytes()).hexdigest()
        for stage in ("ppo", "evaluate")
        for path in sorted(_artifact(folder, stage).rglob("*"))
        if path.suffix == ".safetensors" or path.name in ("samples.jsonl", "judgements.jsonl")
    }


def _differing(expected: dict[str, str], actual: dict[str, str]) -> int:
    return sum(expected.get(name) != actual.get(name) for name in expected.keys() | actual.keys())
