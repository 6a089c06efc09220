"""A folder like the reader's: data files of the names that the documentation uses, and the files that its blocks are.
Nothing here imports torch before ``tiny_model`` is called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet
from safetensors.numpy import save_file

from alignment.core.artifacts import REWARD_MODEL, Manifest, publish
from alignment.records.votes import pair_key
from tests.documented.blocks import ROOT, Block, all_blocks

SHIPPED = ROOT / "data"
NUMBER = 600
"""Rows of the generated files; an example takes 500 of one."""
LIKE_TINY = ("tiny", "policy", "draft")
"""Names under which the reader has ``tiny_model``; before it is made, links to nothing."""
CAPITALS = [("Norway", "Oslo", "Bergen"), ("Kenya", "Nairobi", "Mombasa"), ("Peru", "Lima", "Cusco")]


def build(folder: Path) -> Path:
    for name, source in {
        "conversations.jsonl": "quickstart/conversations.jsonl",
        "pairs.jsonl": "quickstart/preferences.jsonl",
        "my_labels.jsonl": "quickstart/preferences.jsonl",
        "heldout.jsonl": "quickstart/heldout.jsonl",
        "mine.jsonl": "quickstart/conversations.jsonl",
        "general/conversations.jsonl": "general/conversations.jsonl",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(SHIPPED / source, folder / name)
    _write(folder / "prompts.jsonl", ({"prompt": f"When does shop {n} open?"} for n in range(NUMBER)))
    scored = {"prompt": "2 + 2?", "chosen": "4.", "rejected": "5.", "chosen_score": 8, "rejected_score": 3}
    _write(folder / "scored.jsonl", ({**scored, "prompt": f"2 + {n}?"} for n in range(NUMBER)))
    for name in ("sums.jsonl", "gsm8k/train.jsonl", "gsm8k/test.jsonl"):
        _write(folder / name, ({"question": f"{n} + 2?", "answer": f"Add.\n#### {n + 2}"} for n in range(NUMBER)))
    for name in ("harmless_base.jsonl", "hh/first_half.jsonl", "hh/second_half.jsonl", "hh/heldout.jsonl"):
        _write(folder / name, (_transcripts(f"{name} {n}") for n in range(NUMBER)))
    code = [{"prompt": f"Write {n} in Python.", "completion": f"print({n})"} for n in range(NUMBER)]
    parquet.write_table(pyarrow.Table.from_pylist(code), folder / "code.parquet")
    rows = [{"country": country, "choices": list(cities), "right": 0} for country, *cities in CAPITALS]
    _write(folder / "tasks/capitals.jsonl", rows)
    _model(folder / "more")
    _reward_model(folder / "runs-of-mine/artifacts/reward-0a1b2c3d")
    (folder / "docs").symlink_to(ROOT / "docs")
    for block in all_blocks():
        if block.page != "README.md" and "file" in block.comments:
            _save(block, folder)
    (vote,) = [block.text for block in all_blocks() if block.page == "docs/judging.md" and block.language == "json"]
    _write(folder / "runs/quickstart/evaluate/votes.jsonl", (_vote(json.loads(vote), n) for n in range(NUMBER)))
    (folder / "mine.yaml").write_text(first_recipe(), encoding="utf-8")
    with (folder / "score.py").open("a", encoding="utf-8") as file:
        file.write("\n\ndef keeps_to_it(prompts, completions, rows):\n    return [1.0] * len(rows)\n")
    return folder


def for_page(folder: Path, page: str, into: Path) -> Path:
    """The same files in the folder ``into``, with those that blocks of this page are saved as in their places."""
    for path in (path for path in folder.iterdir() if path.name not in LIKE_TINY):
        (into / path.name).symlink_to(path)
    for name in LIKE_TINY:
        (into / name).symlink_to(folder / "tiny")
    for block in all_blocks():
        if block.page == page and "file" in block.comments and "/" not in block.comments["file"]:
            (into / block.comments["file"]).unlink()
            _save(block, into)
    return into


def tiny_model() -> Path:
    """A tiny random model in the reader's folder, made at the first call; it takes the place of larger ones."""
    folder = Path(LIKE_TINY[0]).absolute()
    if not folder.exists():
        from tests.tiny import save_tiny_model  # torch takes seconds to import

        save_tiny_model(folder.readlink())
    return folder


def first_recipe() -> str:
    """The recipe that the README says to save as mine.yaml."""
    recipes = [block.text for block in all_blocks() if block.page == "README.md" and block.language == "yaml"]
    assert recipes, "the README shows a recipe"
    return recipes[0]


def _save(block: Block, folder: Path) -> None:
    path = folder / block.comments["file"]
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(block.text, encoding="utf-8")


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _vote(row: dict[str, Any], number: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"2 + {number}?"}]
    return {**row, "messages": messages, "pair": pair_key(messages, row["answers"])}


def _transcripts(asked: str) -> dict[str, str]:
    opened = f"\n\nHuman: What is {asked}?\n\nAssistant:"
    return {"chosen": f"{opened} A number.", "rejected": f"{opened} Ask somebody else."}


def _model(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    save_file({"weight": np.zeros(1, dtype=np.float32)}, folder / "model.safetensors")


def _reward_model(folder: Path) -> None:
    """An artifact as a plan sees it; nothing could load it."""
    content = folder.with_suffix(".content")
    content.mkdir(parents=True)
    save_file({"weight": np.zeros(1, dtype=np.float32)}, content / "head.safetensors")
    manifest = Manifest(stage="reward", kind=REWARD_MODEL, fingerprint="0a1b2c3d" * 8, identity={})
    publish(content, folder, manifest)
