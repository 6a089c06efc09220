"""Rows of the report: those left out, those that people judged, and samples."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from alignment.core.files import parse_json
from alignment.records.evaluation import Evaluation, JudgedByPeople, JudgedPair, Sample
from alignment.records.stages import CUT, FAULT, LEFT_OUT_FILE, LOST, TOO_LONG
from alignment.report.kit import text
from alignment.report.run_page.run_records import LeftOutRows
from alignment.report.run_page.run_tables import Row, judged_row

MOST = 8
"""Reasons that are shown of a stage; the rarest others are added up."""
_WORDS = {FAULT: "faulty", TOO_LONG: "too long", CUT: "cut, because it was too long"}
_OTHER = "other reasons"
_UNREADABLE = f"a line of {LEFT_OUT_FILE} that cannot be read"


def read_left_out(folder: Path | None, notes: list[str]) -> list[LeftOutRows]:
    """The rows of an artifact's list by reason, the most frequent first; empty without a list. If there is one and it
    cannot be read, ``notes`` gets a sentence that says so."""
    if folder is None:
        return []
    try:
        state = (folder / LEFT_OUT_FILE).stat()
        return list(_counted(folder / LEFT_OUT_FILE, state.st_mtime_ns, state.st_size))
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(
            f"Its {LEFT_OUT_FILE} cannot be read ({type(error).__name__}), so rows that it left out are not shown."
        )
        return []


@functools.lru_cache(maxsize=64)
def _counted(file: Path, _changed: int, _size: int) -> tuple[LeftOutRows, ...]:
    """Counted once for each state of a file, because `align watch` draws the page again and again."""
    counts: dict[str, int] = {}
    first: dict[str, str] = {}
    last: dict[str, str] = {}
    for why, where, row in _reasons(file):
        if where and last.get(why) == where:
            continue  # another record of the same row, such as the other answer of a pair
        counts[why] = counts.get(why, 0) + 1
        first.setdefault(why, row)
        last[why] = where
    by_count = sorted(counts, key=lambda why: (-counts[why], why))
    shown = by_count if len(by_count) <= MOST else by_count[: MOST - 1]
    rows = [LeftOutRows(why=why, count=counts[why], first=first[why]) for why in shown]
    if others := by_count[len(shown) :]:
        rows.append(LeftOutRows(why=_OTHER, count=sum(counts[why] for why in others), first=first[others[0]]))
    return tuple(rows)


def _reasons(file: Path) -> Iterator[tuple[str, str, str]]:
    """Why each row is in the list, where the row is, and the row with what is said of it, cleaned for a page."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                where = str(row.get("where", ""))
                name = where.rpartition("/")[2]
                yield _why(row), where, text.name(f"{name}: {row.get('reason', '')}", limit=160)
            else:
                yield _UNREADABLE, "", "–"


def _why(row: dict[str, Any]) -> str:
    """The kind of the row, or its reason if the reason is the same for all rows like it."""
    kind = str(row.get("kind", ""))
    if kind.startswith(LOST):
        return text.name(f"the chat template leaves out {kind.partition(': ')[2]}")
    return _WORDS.get(kind) or text.name(row.get("reason", kind))


PEOPLE = "people"
"""The kind of judge that this table is for."""


def people_rows(evaluation: Evaluation) -> list[Row]:
    """A row for each pair, if people judged; ``stale`` are the votes on other answers, and ``averaged`` says over which
    prompts the win rate is."""
    judge = evaluation.judge
    rows = []
    for pair in judge.pairs if judge is not None and judge.kind == PEOPLE else []:
        if (people := pair.people) is not None:
            own = {
                "judged": f"{people.judged}" if pair.prompts is None else f"{people.judged} of {pair.prompts}",
                "averaged": _averaged(pair, people),
                "votes": f"{people.votes} by {people.annotators}",
                "stale": f"{people.stale} on other answers" if people.stale else "",
                "alpha": text.number(people.alpha),
            }
            rows.append(judged_row(pair, evaluation) | own)
    return rows


def _averaged(pair: JudgedPair, people: JudgedByPeople) -> str:
    identical = pair.counted - people.judged
    if pair.win_rate is None or identical <= 0:
        return ""
    return f"win rate over {pair.counted}, {identical} of them with identical answers"


WIDEST, BY_HASH = "arms differ most", "by hash"


def rule(primary: str | None) -> str:
    """The rule by which prompts were chosen, in words; ``primary`` names the metric that arms are compared by."""
    by_hash = "ordered by a hash of their id and taken from each task in turn."
    if primary is None:
        return f"They are {by_hash}"
    return (
        f"About half are the prompts on which the arms’ scores by {primary} differ most, taken from each task in turn. "
        f"The rest are {by_hash}"
    )


class Chosen(NamedTuple):
    """A sample and the part of the rule that selected it."""

    sample: Sample
    why: str


def choose(samples: list[Sample], num_samples: int, *, primary: str | None, widest: str = WIDEST) -> list[Chosen]:
    """``num_samples`` samples, or all if there are fewer; the same
    samples give the same choice in any order. ``widest`` is the reason given for samples whose answers differ most by
    the primary metric."""
    ordered = sorted(samples, key=lambda s: hashlib.sha256(s.id.encode("utf-8", "replace")).hexdigest())
    by_gap = sorted((s for s in ordered if gap(s, primary) > 0), key=lambda s: -gap(s, primary))
    differing = _in_turn(by_gap, (num_samples + 1) // 2)
    taken = {id(sample) for sample in differing}
    rest = _in_turn([s for s in ordered if id(s) not in taken], num_samples - len(differing))
    return [*(Chosen(sample, widest) for sample in differing), *(Chosen(sample, BY_HASH) for sample in rest)]


def gap(sample: Sample, primary: str | None) -> float:
    """The largest difference between its answers' scores by the primary metric."""
    scores = [answer.scores[primary] for answer in sample.answers.values() if primary in answer.scores]
    return max(scores) - min(scores) if scores else 0.0


def _in_turn(samples: list[Sample], count: int) -> list[Sample]:
    """The first ``count`` samples, taken from each task in turn, in the order in which tasks first appear."""
    queues: dict[str, list[Sample]] = {}
    for sample in samples:
        queues.setdefault(sample.task, []).append(sample)
    dealt = [sample for turn in zip_longest(*queues.values()) for sample in turn if sample is not None]
    return dealt[: max(0, count)]
