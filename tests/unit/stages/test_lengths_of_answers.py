"""How long answers are where a win rate is corrected for their lengths: by words, or by characters without spaces."""

from __future__ import annotations

from alignment.config.evaluating import JudgeConfig, JudgeKind
from alignment.evaluation.answer_pairs import pair_of
from alignment.evaluation.arms import Answer, Answered
from alignment.stages.evaluate.judging import _words
from alignment.stages.evaluate.people import _extra_words

TEXTS = ["今天休息。", "Closed today.", "休息 today"]
WORDS = [4.0, 2.0, 3.0]


def test_a_judge_counts_the_characters_of_scripts_without_spaces() -> None:
    answers = [Answer(ids=[5, 2], text=text, ended=True) for text in TEXTS]
    arm = Answered(answers=answers, logprobs=None, references=[None] * 3, seconds=1.0)
    for kind in (JudgeKind.endpoint, JudgeKind.metric):
        assert _words(arm, JudgeConfig(kind=kind), range(3)) == WORDS


def test_votes_count_them_too() -> None:
    question = [{"role": "user", "content": "Open?"}]
    pairs = [pair_of(question, {"stage:dpo": text, "stage:sft": "No."}, id="", task="") for text in TEXTS]
    assert _extra_words(pairs, "stage:dpo", "stage:sft") == [words - 1 for words in WORDS]
