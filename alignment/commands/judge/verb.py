"""``align judge``: people say which of two arms answers better."""

from __future__ import annotations

import argparse
import webbrowser
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from alignment.commands.judge.ballots import Ballots, annotator_name
from alignment.commands.shared.arguments import add_output, runs_of
from alignment.commands.shared.following import run_folder
from alignment.commands.shared.listening import listening, refuse_without_page_libraries
from alignment.config.faults import suggestion
from alignment.core.artifacts import verify
from alignment.core.errors import ArtifactError, ConfigError, DataError
from alignment.core.files import cut_unfinished_line
from alignment.core.locks import held
from alignment.core.wording import counted
from alignment.evaluation.answer_pairs import AnswerPair, pairs_of_samples
from alignment.pipeline.execute.run_differences import evaluations
from alignment.records.evaluation import FEWEST_PROMPTS, SAMPLES, Evaluation, read_samples
from alignment.records.votes import FILE


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
    """Serves the page until Ctrl-C; returns the exit code.

    Raises:
        ConfigError: a library is missing; there is no such run, evaluation or arm; the same arm is named twice; or an
            option is not valid.
        DataError: the file of votes is damaged.
        ArtifactError: the evaluation is damaged.
        Busy: another server writes the same votes, or the port is taken.
    """
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
        message = f"the run {run!r} has no finished evaluation, so there are no answers to judge"
        raise ConfigError(message, where="RUN", remedy="add a stage of kind evaluate to its recipe, and run it")
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
