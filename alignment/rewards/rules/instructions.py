"""The rules ``instructions_strict`` and ``instructions_loose``: IFEval's checks (Zhou et al. 2023), by ``lm_eval``. The
library's checks draw what a row leaves open, guess languages at random, and fetch data for splitting sentences when
they are imported. So a row has to give every argument, the guesses are seeded, and nothing is fetched here."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from io import StringIO
from types import ModuleType
from typing import Any

from alignment.config.faults import suggestion
from alignment.core.errors import DataError
from alignment.data.records import HasRow
from alignment.rewards.rules.rule_kind import Package, Rule, lacking

PACKAGE = Package(
    modules=("lm_eval", "langdetect", "immutabledict", "nltk"),
    requirement="'lm_eval>=0.4.13,<0.4.14' langdetect immutabledict 'nltk>=3.9.1'",
)
IDS, ARGUMENTS = "instruction_id_list", "kwargs"
_EXAMPLE = f'rows are as in google/IFEval: {{"prompt": "…", "{IDS}": ["punctuation:no_comma"], "{ARGUMENTS}": [{{}}]}}'
_NEEDS_SENTENCES = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
_SENTENCES = "tokenizers/punkt_tab"


def instructions(*, loose: bool) -> Rule:
    """1 for an answer that follows all of its row's instructions, else 0: IFEval's accuracy by prompt. ``loose`` also
    accepts an answer that follows them without its first or last line, or without asterisks."""
    checks = _checks()
    follows = checks.test_instruction_following_loose if loose else checks.test_instruction_following_strict
    return Rule(
        expected=_instructions_of, score=lambda text, expected: float(follows(expected, text).follow_all_instructions)
    )


def _instructions_of(record: HasRow) -> Any:
    """The row's instructions, as the library takes them. Raises DataError: they are missing, unknown, lack an argument,
    or need data that is not on this machine."""
    ids, arguments = record.row.get(IDS), record.row.get(ARGUMENTS)
    if not isinstance(ids, list) or not ids:
        lacking(record, IDS, _EXAMPLE)
    if not isinstance(arguments, list) or len(arguments) != len(ids):
        lacking(record, ARGUMENTS, f"it needs one group for each of the {len(ids)} instructions; {_EXAMPLE}")
    for name, given in zip(ids, arguments, strict=True):
        if problem := _problem(name, given):
            raise DataError(f"'{IDS}' {problem}", where=record.where, remedy=_EXAMPLE)
    messages = getattr(record, "messages", ())
    question = str(messages[-1].content) if messages else ""
    return _checks().InputExample(key=0, instruction_id_list=ids, prompt=question, kwargs=arguments)


def _problem(name: Any, given: Any) -> str:
    known = _checks().instructions_registry.INSTRUCTION_DICT
    if not isinstance(name, str) or name not in known:
        return f"has {name!r:.60}, which is not an instruction; {suggestion(str(name), list(known))}"
    if not isinstance(given, Mapping):
        return f"has {name} with arguments {given!r:.60}, which are not a group"
    arguments = {key: value for key, value in given.items() if value}
    instruction = known[name](name)
    try:
        with _same_random_state():
            instruction.build_description(**arguments)
    except (TypeError, ValueError) as error:
        return f"has {name} with arguments that it does not accept: {error}"
    drawn = sorted(set(instruction.get_instruction_args_keys()) - set(arguments) - {"prompt"})
    if drawn:
        return f"has {name} without its argument {drawn[0]!r}"
    if name in _NEEDS_SENTENCES and not _can_split():
        return f"has {name}, which needs NLTK's sentence data; fetch it once: python -m nltk.downloader punkt_tab"
    return ""


@contextmanager
def _same_random_state() -> Iterator[None]:
    """Checks draw what a row leaves open from Python's own generator, which others may rely on."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


@cache
def _can_split() -> bool:
    import nltk

    try:
        nltk.data.find(_SENTENCES)
    except LookupError:
        return False
    return True


@cache
def _checks() -> ModuleType:
    """The library's checks, imported without the download that the import would start."""
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0  # otherwise the same text may be of another language the next time
    fetch, nltk.download = nltk.download, lambda *_, **__: False
    try:
        with redirect_stdout(StringIO()):  # it says that it downloaded something, whether it did or not
            from lm_eval.tasks.ifeval import utils
    finally:
        nltk.download = fetch
    checks: ModuleType = utils
    return checks
