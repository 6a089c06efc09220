"""A million short conversations → token rows: ours beside plain ``datasets.map``.

``python -m benchmarks.tokens [--rows N]`` writes ``results/tokens.json`` and ``tokens.md``. Each measurement is a fresh
process that begins with the JSON Lines file and ends with rows on disk; ours a second time finds them there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from alignment.pipeline.sources import bundled_model
from benchmarks.machine import RESULTS, processor

ROWS = 1_000_000
REPETITIONS = 3
SEED = 42
MAX_LENGTH = 512
_TEXT = "the shop opens at nine and closes early on Monday because of a meeting in hall two, please bring your own keys"
CONTESTANTS = {
    "ours": "alignment.data.tokens.token_table: validation, templates, labels on the assistant's turns, ledger",
    "ours_again": "the same file once more",
    "datasets_map": "load_dataset('json') and map(apply_chat_template(tokenize=True)), a process a core; no labels",
    "datasets_map_batched": "the same with a thousand rows a call (batched=True)",
}
RIVALS = ("datasets_map", "datasets_map_batched")


def write_rows(path: Path, rows: int) -> None:
    """Conversations of one question of 4 to 24 words and an answer as long."""
    rng, words = random.Random(SEED), _TEXT.split()
    with path.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            question, answer = (" ".join(rng.choices(words, k=rng.randint(4, 24))) for _ in range(2))
            turns = [
                {"role": "user", "content": f"{number}: {question}?"},
                {"role": "assistant", "content": f"{answer}."},
            ]
            stream.write(json.dumps({"messages": turns}) + "\n")


def ours(file: Path, folder: Path, model: Path) -> int:
    """Tokens in all rows."""
    from alignment.config.data import SourceConfig
    from alignment.core.hardware import count_cores
    from alignment.data.tokens.row_kinds import CONVERSATIONS, Limits
    from alignment.data.tokens.token_table import token_table
    from alignment.data.tokens.tokenizer import load_tokenizer

    table = token_table(
        file,
        SourceConfig(source=f"path:{file}"),
        CONVERSATIONS,
        Limits(row=MAX_LENGTH),
        load_tokenizer(model),
        cache=folder,
        processes=count_cores(),
    )
    return _tokens(table.rows)


def datasets_map(file: Path, folder: Path, model: Path, *, batched: bool = False) -> int:
    """Tokens in all rows."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder))
    cores = len(os.sched_getaffinity(0))

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)
        return {"input_ids": encoded["input_ids"]}

    return _tokens(rows.map(tokenize, batched=batched, num_proc=cores, remove_columns=rows.column_names))


def datasets_map_batched(file: Path, folder: Path, model: Path) -> int:
    """Tokens in all rows. The template takes a list of conversations as well as one."""
    return datasets_map(file, folder, model, batched=True)


def _tokens(rows: Any) -> int:
    return sum(len(column) for batch in rows.with_format("arrow").iter(10_000) for column in batch["input_ids"])


def measure(contestant: str, file: Path, folder: Path, model: Path) -> dict[str, float]:
    """Seconds, tokens and the highest memory of the process and its children, each page counted once (PSS)."""
    argv = [sys.executable, "-m", "benchmarks.tokens", "--contestant", contestant.removesuffix("_again")]
    argv += [str(path) for path in ("--file", file, "--folder", folder, "--model", model)]
    started = time.perf_counter()
    process = psutil.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _memory(process))
        time.sleep(0.5)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{contestant} ended with {process.returncode}")
    return {"seconds": seconds, "tokens": int(process.stdout.read().split()[-1]), "peak_memory": peak}


def _memory(process: psutil.Popen) -> int:
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            total += member.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def run(rows: int, repetitions: int) -> dict[str, Any]:
    """All measurements, in turn, and their medians."""
    name = "smollm2-135m"
    model = bundled_model.ensure(bundled_model.lookup(name, where="benchmarks"), announce=print)
    measurements: dict[str, list[dict[str, float]]] = {contestant: [] for contestant in CONTESTANTS}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "rows.jsonl"
        write_rows(file, rows)
        for repetition in range(repetitions):
            for contestant, measured in measurements.items():
                folder = Path(temporary) / contestant.removesuffix("_again")
                if not contestant.endswith("_again"):
                    shutil.rmtree(folder, ignore_errors=True)
                measured.append(measure(contestant, file, folder, model))
                print(f"{repetition} {contestant:<14} {measured[-1]['seconds']:.1f} s", flush=True)
    medians = {
        contestant: {key: statistics.median(measurement[key] for measurement in measured) for key in measured[0]}
        for contestant, measured in measurements.items()
    }
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{processor()['model']}, {processor()['cores']} cores",
        "rows": rows,
        "repetitions": repetitions,
        "medians": medians,
        **{f"rows_per_second_over_{rival}": medians[rival]["seconds"] / medians["ours"]["seconds"] for rival in RIVALS},
        "measurements": measurements,
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# tokens",
        "",
        f"{result['date']}, {result['machine']}; {result['rows']:,} rows; median of {result['repetitions']}.",
        "",
        "| contestant | seconds | rows/s | peak memory (PSS) | what |",
        "|---|---|---|---|---|",
    ]
    for name, figures in result["medians"].items():
        speed, memory = result["rows"] / figures["seconds"], figures["peak_memory"] / 1e9
        lines.append(f"| {name} | {figures['seconds']:.1f} | {speed:,.0f} | {memory:.2f} GB | {CONTESTANTS[name]} |")
    ratios = [f"{result[f'rows_per_second_over_{rival}']:.2f} times as fast as {rival}" for rival in RIVALS]
    lines += ["", f"Ours is {' and '.join(ratios)}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, or is measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokens", description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--contestant", choices=["ours", *RIVALS], help=argparse.SUPPRESS)
    for name in ("--file", "--folder", "--model"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        works = {"ours": ours, "datasets_map": datasets_map, "datasets_map_batched": datasets_map_batched}
        print(works[options.contestant](options.file, options.folder, options.model))
        return
    result = run(options.rows, options.repetitions)
    whole = options.rows == ROWS and options.repetitions >= REPETITIONS
    name = "tokens" if whole else "tokens-partial"
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
