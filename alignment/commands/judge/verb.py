"""``align judge``: people say which of two arms answers better."""

from __future__ import annotations

import argparse
import unicodedata
import webbrowser
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import partial
from pathlib import Path

from rich.console import Console

from alignment.commands.shared.arguments import add_output, runs_of
from alignment.commands.shared.following import run_folder
from alignment.commands.shared.listening import listening, refuse_without_page_libraries
from alignment.config.faults import suggestion
from alignment.core.artifacts import verify
from alignment.core.errors import ArtifactError, ConfigError, DataError
from alignment.core.files import cut_unfinished_line
from alignment.core.locks import held
from alignment.core.wording import counted
from alignment.evaluation.answer_pairs import AnswerPair, pairs_of_samples, queue, shown_first
from alignment.pipeline.execute.run_differences import evaluations
from alignment.records.evaluation import FEWEST_PROMPTS, SAMPLES, Evaluation, read_samples
from alignment.records.votes import FILE, TIE, Vote, append_vote, read_votes, remove_vote

LONGEST_NAME = 40


class Choice(str, Enum):
    """What an annotator says of a pair, by the key for it: the answer shown first or second, or neither."""

    first = "1"
    second = "2"
    tie = "0"


class Refused(Exception):
    """A vote or an undo that cannot be taken; nothing was written. ``status`` is the one of HTTP."""

    def __init__(self, message: str, *, status: int = 409) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How far an annotator is: ``pair`` is the next one, with its ``answers`` in the order shown; None once all
    ``total`` are judged."""

    annotator: str
    judged: int
    total: int
    pair: AnswerPair | None
    answers: tuple[str, ...]


class Ballots:
    """The pairs of an evaluation's two arms, with the votes in ``file``."""

    def __init__(self, file: Path, pairs: Sequence[AnswerPair], arms: tuple[str, str]) -> None:
        """Raises DataError if the file holds something else than votes."""
        ordered = queue(pairs)
        self._file = file
        self._pairs = {pair.key: pair for pair in ordered if not pair.same}
        self._votes = read_votes(file)
        self.num_same = len(ordered) - len(self._pairs)
        self.num_prompts = sum(not pair.same for pair in pairs)  # with different answers; a prompt may repeat
        about = [vote for vote in self._votes if set(vote.answers) == set(arms)]
        self.num_stale = sum(vote.pair not in self._pairs for vote in about)

    @property
    def total(self) -> int:
        """The number of pairs that each annotator judges."""
        return len(self._pairs)

    def judged(self) -> dict[str, int]:
        """The number of pairs that each annotator has judged, in the order of the first votes."""
        return dict(Counter(vote.annotator for vote in self._votes if vote.pair in self._pairs))

    def standing(self, annotator: str) -> Standing:
        """How far the annotator is, and the next pair."""
        judged = {vote.pair for vote in self._own(annotator)}
        pair = next((pair for key, pair in self._pairs.items() if key not in judged), None)
        answers = () if pair is None else tuple(pair.answers[arm] for arm in _shown(pair, annotator))
        return Standing(annotator=annotator, judged=len(judged), total=self.total, pair=pair, answers=answers)

    def vote(self, annotator: str, key: str, choice: Choice) -> None:
        """Stores a vote; when this returns, it is on the disk. Raises Refused, OSError."""
        pair = self._pairs.get(key)
        if pair is None:
            raise Refused("There is no such pair in this evaluation.", status=404)
        if any(vote.pair == key for vote in self._own(annotator)):
            raise Refused(f"{annotator} has judged this pair already. Undo that vote first.")
        first, second = _shown(pair, annotator)
        vote = Vote(
            pair=key,
            annotator=annotator,
            messages=pair.messages,
            answers=pair.answers,
            preferred={Choice.first: first, Choice.second: second, Choice.tie: TIE}[choice],
            shown_first=first,
            id=pair.id,
            task=pair.task,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        append_vote(self._file, vote)
        self._votes.append(vote)

    def undo(self, annotator: str) -> None:
        """Takes the annotator's last vote back. Raises Refused, OSError, DataError."""
        own = self._own(annotator)
        if not own:
            raise Refused(f"{annotator} has no vote to undo.")
        remove_vote(self._file, own[-1])
        self._votes.remove(own[-1])

    def _own(self, annotator: str) -> list[Vote]:
        """The annotator's votes on these pairs, in the order in which they were given."""
        return [vote for vote in self._votes if vote.annotator == annotator and vote.pair in self._pairs]


def annotator_name(text: str) -> str:
    """The name without superfluous spaces. Raises ValueError."""
    name = unicodedata.normalize("NFC", " ".join(text.split()))
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise ValueError(f"a name must have 1 to {LONGEST_NAME} printable characters")
    return name


def _shown(pair: AnswerPair, annotator: str) -> tuple[str, str]:
    """The arms in the order in which the annotator sees them."""
    first = shown_first(pair, annotator)
    return first, next(arm for arm in pair.answers if arm != first)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run, two of its arms, and who judges."""
    parser.description = (
        "Serves a page on this machine where people compare the answers of two arms without knowing which arm gave "
        "which. Every vote is stored at once. Ctrl-C ends the page, and the same command continues."
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="the name or the recipe's path of a run with a finished evaluation")
    add(
        "--arm",
        dest="arms",
        action="append",
        default=[],
        metavar="ARM",
        help="an arm of the evaluation, such as sft; give the option twice (default: the evaluation's arms, if it "
        "has just two)",
    )
    add("--stage", metavar="NAME", help="the evaluation, if the run has several")
    add("--annotator", metavar="NAME", help="the name of the person who judges (default: the page asks)")
    add("--votes", metavar="FILE", help="where votes are stored (default: runs/RUN/STAGE/votes.jsonl in this folder)")
    add("--port", type=int, default=0, metavar="N", help="port on 127.0.0.1 (default: any free port)")
    add("--open", dest="opens_browser", action="store_true", help="open the page in a browser")
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Serves the page until the user ends it; returns the exit code."""
    output, (run,) = runs_of(arguments, arguments.run)
    options = {name: getattr(arguments, name) for name in ("stage", "annotator", "votes", "port", "opens_browser")}
    return judge(console, run, arguments.arms, output=output, **options)


def judge(
    console: Console,
    run: str,
    arms: Sequence[str],
    *,
    output: Path,
    stage: str | None = None,
    annotator: str | None = None,
    votes: str | None = None,
    port: int = 0,
    opens_browser: bool = False,
) -> int:
    """Serves the page until Ctrl-C; returns the exit code. Raises ConfigError, DataError, ArtifactError, Busy."""
    refuse_without_page_libraries(where="align judge", needs="the page needs")
    from alignment.commands.judge.web_app import application
    from alignment.commands.shared.page_server import PageServer

    try:
        name = None if annotator is None else annotator_name(annotator)
    except ValueError as error:
        raise ConfigError(f"{annotator!r:.60}: {error}", where="--annotator", remedy="give another name") from None
    stage, artifact = _evaluation(run, stage, output)
    pair = _two_arms(arms, Evaluation.read(artifact))
    file = _votes_file(votes, output / "runs" / run / stage)
    pairs = _pairs(artifact, pair)
    judge_settings = "{kind: people}" if votes is None else f"{{kind: people, votes: {file}}}"
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        held(file.with_name(f"{file.name}.lock"), wait=False, remedy="judge on its page, or stop it"),
        listening(port) as listener,
    ):
        if cut_unfinished_line(file):
            say(f"{file}: an incomplete vote at the end was removed; it was never confirmed")
        ballots = Ballots(file, pairs, pair)
        page = PageServer(lambda token: application(ballots, token, run=run, annotator=name), listener)
        _introduce(say, ballots, file, pair, stage=stage)
        say(f"judge at {page.address} (Ctrl-C ends)")
        if opens_browser:
            webbrowser.open(page.address)
        page.serve()
        _summarise(say, ballots, file, judge_settings, stage=stage)
    return 0


def _evaluation(run: str, stage: str | None, output: Path) -> tuple[str, Path]:
    """The evaluation of a run: its stage and its artifact, whose content is what was made."""
    artifacts = evaluations(run_folder(output, run))
    if not artifacts:
        message = "has no finished evaluation, so there are no answers to judge"
        raise ConfigError(message, where=run, remedy="add a stage of kind evaluate to its recipe, and run it")
    if stage is None and len(artifacts) > 1:
        raise ConfigError(f"the run has several evaluations: {', '.join(artifacts)}", where="--stage")
    name = next(iter(artifacts)) if stage is None else stage.removeprefix("stage:")
    if name not in artifacts:
        raise ConfigError(f"no finished evaluation {name!r}; {suggestion(name, artifacts)}", where="--stage")
    verify(artifacts[name], content=True)
    return name, artifacts[name]


def _two_arms(arms: Sequence[str], evaluation: Evaluation) -> tuple[str, str]:
    named = {name: arm.name for arm in evaluation.arms for name in (arm.label, arm.name)}
    labels = [arm.label for arm in evaluation.arms]
    arms = labels if not arms and len(labels) == 2 else arms
    for arm in arms:
        if arm not in named:
            raise ConfigError(f"no arm {arm!r} in this evaluation; {suggestion(arm, labels)}", where="--arm")
    chosen, remedy = [named[arm] for arm in arms], f"its arms: {', '.join(labels)}"
    if not chosen:
        remedy = f"name two of them, `--arm {' --arm '.join(labels[:2])}`; {remedy}"
        raise ConfigError(f"the evaluation has {len(labels)} arms, and two are compared", where="--arm", remedy=remedy)
    if len(chosen) != 2:
        given = "one arm was" if len(chosen) == 1 else f"{len(chosen)} arms were"
        raise ConfigError(f"{given} given, but two are compared", where="--arm", remedy=remedy)
    if chosen[0] == chosen[1]:
        raise ConfigError(f"{arms[0]!r} cannot be compared with itself", where="--arm", remedy="name two arms")
    return chosen[0], chosen[1]


def _votes_file(votes: str | None, folder: Path) -> Path:
    if votes is None:
        return folder / FILE
    file = Path(votes).expanduser().resolve()  # the lock is beside the file itself, whatever links lead there
    if file.suffix != ".jsonl" or (file.exists() and not file.is_file()) or not file.parent.is_dir():
        remedy = "name a .jsonl file in a folder that exists"
        raise ConfigError(f"{votes!r} cannot store votes", where="--votes", remedy=remedy)
    return file


def _pairs(artifact: Path, arms: tuple[str, str]) -> list[AnswerPair]:
    samples = list(read_samples(artifact))
    if any(sample.later_turns for sample in samples):
        message = "has prompts with several turns, but people judge single answers"
        remedy = "judge an evaluation whose prompts have one turn"
        raise DataError(message, where=str(artifact / SAMPLES), remedy=remedy)
    pairs = pairs_of_samples(samples, arms)
    if not pairs:
        remedy = "run it again"
        raise ArtifactError("has no prompt with answers of both arms", where=str(artifact / SAMPLES), remedy=remedy)
    return pairs


def _introduce(say: Callable[[str], None], ballots: Ballots, file: Path, arms: tuple[str, str], *, stage: str) -> None:
    say(f"{arms[0]} and {arms[1]}: {ballots.total} pairs of answers to judge")
    if ballots.num_same:
        same = ("has two identical answers and counts as a tie", "have two identical answers and count as ties")
        more = same[ballots.num_same > 1]
        say(f"{ballots.num_same} more {more} without a vote")
    if ballots.num_stale:
        are, do = ("vote in the file is", "does") if ballots.num_stale == 1 else ("votes in the file are", "do")
        say(f"{ballots.num_stale} {are} for other answers of these arms and {do} not count")
    if ballots.num_prompts < FEWEST_PROMPTS:
        say(
            f"note: at most {counted(ballots.num_prompts, 'prompt')} can be judged, but a win rate needs "
            f"{FEWEST_PROMPTS}; evaluate on more held-out prompts (stages.{stage}.data), and judge those"
        )
    say(f"votes: {file}")


def _summarise(say: Callable[[str], None], ballots: Ballots, file: Path, settings: str, *, stage: str) -> None:
    judged = ballots.judged()
    counts = ", ".join(f"{name} {count} of {ballots.total}" for name, count in judged.items())
    finished = [name for name, count in judged.items() if count == ballots.total]
    left = f", so nothing is left for {' and '.join(finished)}" if finished else ""
    say(f"judged: {counts or 'nothing yet'}{left}; votes: {file}")
    if judged:
        say(
            f"to count them: put `judge: {settings}` into stages.{stage} of the recipe, and run it again; "
            "if you only give it as an override, a later run without it leaves the votes out of its report"
        )
