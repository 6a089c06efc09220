"""``python -m benchmarks``: measures works, one after another; ``make bench WORK=sft`` calls it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from alignment.core.errors import AlignmentError
from alignment.core.hardware import count_cores
from benchmarks.harness import Options, measure
from benchmarks.machine import RESULTS
from benchmarks.measurement import Failed
from benchmarks.search_run import search_work
from benchmarks.searched import NoSearch
from benchmarks.works import ALIASES, WORKS, works_named


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 well, 1 a work could not be measured, 2 a wrong option, 130 interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no worker outlives this process
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        names = works_named(arguments.works)
    except ValueError as error:
        parser.error(str(error))
    known = {contestant for name in names for contestant in WORKS[name].contestants}
    contestants = tuple(filter(None, (arguments.contestants or "").split(",")))
    if unknown := sorted(set(contestants) - known):
        parser.error(f"no contestant {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if arguments.data is not None and not arguments.data.is_dir():
        parser.error("--data is no folder")

    def options_of(name: str) -> Options:
        return Options(
            repetitions=arguments.repetitions or WORKS[name].repetitions,
            contestants=contestants,
            data=None if arguments.data is None else arguments.data.absolute(),
            threads=arguments.threads,
            amx=not arguments.no_amx,
            results=arguments.results,
        )

    if arguments.search:
        searched = [name for name in names if WORKS[name].rivals]
        if contestants or not searched:
            parser.error("--search goes with works that have rivals, and with all of their settings")
        return _each(searched, search_work, options_of)
    wanted = [name for name in names if not contestants or set(contestants) & set(WORKS[name].contestants)]
    return _each(wanted, measure, options_of)


def _each(names: Sequence[str], act: Callable[[str, Options], Path], options_of: Callable[[str], Options]) -> int:
    code = 0
    for name in names:
        print(f"{name}", flush=True)
        try:
            act(name, options_of(name))
        except KeyboardInterrupt:
            print(f"{name}: stopped; nothing was written, as a run that is stopped is not published", file=sys.stderr)
            return 130
        except (AlignmentError, Failed, FileNotFoundError, NoSearch) as error:
            print(f"{name}: {error}", file=sys.stderr)
            code = 1
    return code


def _parser() -> argparse.ArgumentParser:
    folder = os.environ.get("ALIGNMENT_BENCH_DATA")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--works", default="all", help=f"comma-separated: {', '.join([*ALIASES, *WORKS])}")
    parser.add_argument("--contestants", help="comma-separated; all if not given")
    parser.add_argument("--repetitions", type=_positive, help="the work's own number if not given")
    parser.add_argument("--data", type=Path, default=Path(folder) if folder else None, help="folder of public data")
    parser.add_argument("--threads", type=_positive, default=count_cores())
    parser.add_argument("--no-amx", action="store_true", help="no AMX tiles for anyone, as on a CPU without them")
    parser.add_argument("--search", action="store_true", help="search the settings of the rivals, for later tables")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON and the table go")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
