"""What stages can only find out with a tokenizer, or by running the user's code: ``python -m alignment.rehearse``.

The driver starts it before the first stage of a run, so that what would stop a later one is said before anything has
trained: no chat template, rows that are all too long, a scorer that fails. It looks at the first rows of each source
and asks each function of the user's once, about one answer. How it ended stands in ``status.json`` beside the log.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from transformers.utils import logging as transformers_logging

from alignment.config.data import DataConfig, OnError, SourceConfig
from alignment.core.errors import AlignmentError
from alignment.data.reading import iterate
from alignment.data.records import Prompt
from alignment.data.tokens.limits import Limits, RowTooLong, refuse_losses
from alignment.data.tokens.row_kinds import Kind, tokenized
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.job import StageSpec
from alignment.records.worker import DONE, FAILED, Status
from alignment.rewards.functions import FunctionScorer, load_function
from alignment.rewards.scorer_sources import function_of, source_field
from alignment.rewards.scorers import Answers
from alignment.stages.registry import as_trained, kind_of, learned_data
from alignment.stages.stage_file import read_spec

LOOKED_AT = 500
"""Records of a source whose tokens are counted."""
TRIED = "Yes."
"""The answer that functions are asked about; a policy says anything."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of the first fault."""
    parser = argparse.ArgumentParser(prog="python -m alignment.rehearse", description=__doc__)
    parser.add_argument("folder", type=Path, help="where status.json is written")
    parser.add_argument("--rows", nargs="*", type=Path, default=[], help="stage files whose rows are looked at")
    parser.add_argument("--scorers", nargs="*", type=Path, default=[], help="stage files whose functions are asked")
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    where = ""
    try:
        for look, files in ((look_at_rows, options.rows), (ask_functions, options.scorers)):
            for file in files:
                spec = read_spec(file)
                where = f"stage {spec.stage}, tried before anything trained"
                look(spec)
    except AlignmentError as error:
        return _say(options.folder, error.exit_code, str(error), where)
    except Exception as error:  # noqa: BLE001 - the last line of defence: the driver must hear of it
        traceback.print_exc()
        return _say(options.folder, 1, f"{type(error).__name__}: {error}", where)
    return _say(options.folder, 0, "", where)


def _say(folder: Path, code: int, error: str, where: str) -> int:
    Status(state=FAILED if code else DONE, exit_code=code, error=error, where=where).write(folder)
    return code


def look_at_rows(spec: StageSpec) -> None:
    """Does nothing if some of the first records of each source can be learned from.

    Raises:
        DataError: none of them can be rendered or tokenised, or a source that was seen as a whole is too long.
        ModelError: there is no usable tokenizer.
    """
    config = as_trained(spec.config)
    assert config is not None, "the driver hands on training stages"
    tokenizer = load_tokenizer(spec.base_path, spec.model.chat_template)
    kind, limits = learned_data(config)
    mixed = [(part, spec.extra_data[f"data.mix[{number}]"]) for number, part in enumerate(config.data.mix)]
    for data, path in [(config.data, spec.data_path), *mixed]:
        _look_at_source(tokenizer, kind, limits, data, path)


def _look_at_source(tokenizer: object, kind: Kind, limits: Limits, data: SourceConfig, path: Path) -> None:
    lenient = replace(data, on_error=OnError.skip, max_skipped=1.0)  # the plan has looked at these faults
    records = list(islice(iterate(path, kind.record, lenient), LOOKED_AT))
    every = list(tokenized(tokenizer, kind, records, limits))
    faults = [row.fault for row in every if row.fault is not None]
    others = [fault for fault in faults if not isinstance(fault, RowTooLong)]
    whole = len(every) < LOOKED_AT
    if every and len(others) == len(every) and (whole or data.on_error is OnError.fail):
        raise others[0]  # further rows of a longer source may be fine, where faulty ones are skipped
    if whole:
        dropped, cut = len(faults) - len(others), sum(row.cut != "" for row in every)
        longest = max((row.tokens for row in every), default=0)
        refuse_losses(limits, dropped=dropped, cut=cut, records=len(every), longest=longest, where=str(path))


def ask_functions(spec: StageSpec) -> None:
    """Does nothing if each function of the user's gives one finite number for an answer to the first prompt.

    Raises:
        RewardError: one does not; says which, and what it gave or raised.
    """
    data = getattr(spec.config, "data", None)
    assert isinstance(data, DataConfig), "the driver hands on stages that score answers"
    prompt = next(iterate(spec.data_path, Prompt, data))
    answers = Answers(prompt_ids=[[]], answer_ids=[[]], texts=[TRIED], prompts=[prompt], rows=[0])
    for field, scorer in kind_of(spec.config).scorers(spec.config).items():
        source = function_of(scorer.source)
        if source is not None:
            planned = spec.identity.get("code", {}).get(source_field(field))
            FunctionScorer(source, load_function(source, planned=planned)).scores(answers)


if __name__ == "__main__":
    sys.exit(main())
