"""A finished run whose evaluation has three arms, as people judge them: nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignment.core.artifacts import Manifest, publish
from alignment.evaluation.answer_pairs import AnswerPair, pair_of
from alignment.records.evaluation import ArmResult, Evaluation, Sample, SampleAnswer, write_samples
from alignment.records.run import RunRecord, StageEntry
from alignment.records.votes import TIE, Vote

SFT, DPO = "stage:sft", "stage:dpo"
ARMS = (SFT, DPO)


def sample(number: int, **answers: str) -> Sample:
    """A prompt with the answers of ``base``, ``stage:sft`` and ``stage:dpo``; ``sft`` and ``dpo`` replace theirs."""
    texts = {"base": f"Well, {number}!", SFT: f"It is {number} from sft.", DPO: f"It is {number} from dpo."}
    texts |= {f"stage:{arm}": text for arm, text in answers.items()}
    return Sample(
        id=f"p{number}",
        task="counting",
        messages=[{"role": "user", "content": f"Which number comes after {number - 1}?"}],
        answers={arm: SampleAnswer(text=text) for arm, text in texts.items()},
    )


def finished_run(
    output: Path,
    samples: Sequence[Sample],
    *,
    run: str = "mine",
    stage: str = "evaluate",
    arms: Sequence[str] = ("base", *ARMS),
) -> Path:
    """Records a run with this evaluation in ``output``; returns the evaluation's artifact."""
    content, artifact = output / "content", output / "artifacts" / f"{stage}-00000000"
    content.mkdir(parents=True)
    Evaluation(num_prompts=len(samples), arms=[ArmResult(name=name) for name in arms]).write(content)
    write_samples(content, list(samples))
    publish(content, artifact, Manifest(stage=stage, kind="evaluation", fingerprint="0" * 64, identity={}))
    folder = output / "runs" / run
    folder.mkdir(parents=True)
    entry = StageEntry(kind="evaluate", state="done", artifact=str(artifact))
    RunRecord(name=run, stages={stage: entry}).write(folder)
    return artifact


def pair(number: int, *, sft: str | None = None, dpo: str | None = None) -> AnswerPair:
    turns = [{"role": "user", "content": f"Which number comes after {number - 1}?"}]
    answers = {SFT: sft or f"It is {number} from sft.", DPO: dpo or f"It is {number} from dpo."}
    return pair_of(turns, answers, id=f"p{number}", task="counting")


def vote(about: AnswerPair, preferred: str = DPO, *, annotator: str = "ada", shown_first: str = SFT) -> Vote:
    """A vote on a pair; ``preferred`` may be ``TIE``."""
    assert preferred in (*about.answers, TIE)
    return Vote(
        pair=about.key,
        annotator=annotator,
        messages=about.messages,
        answers=about.answers,
        preferred=preferred,
        shown_first=shown_first,
        id=about.id,
        task=about.task,
    )
