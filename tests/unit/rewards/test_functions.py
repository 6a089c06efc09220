"""A function of the user's is called with lists, and what it gives is believed only where it is numbers."""

from __future__ import annotations

import errno
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.core.errors import DataError, RewardError
from alignment.core.fingerprint import file_sha256
from alignment.data.turns import Message
from alignment.rewards.functions import FunctionScorer, load_function
from alignment.rewards.scorer_sources import FunctionSource
from alignment.rewards.scorers import Answers
from alignment.training.session import Preempted
from tests.unit.rewards.conftest import answers_to, prompt

PROMPTS = [prompt("Hi?", line=4, weight=2.5), prompt("And?", line=9, weight=0.5)]
ANSWERS = answers_to(PROMPTS, ["Hello there.", "No."])


def score(folder: Path, body: str, *, preamble: str = "", answers: Answers = ANSWERS) -> list[float]:
    file = folder / "score.py"
    file.write_text(f"{preamble}\ndef brevity(prompts, completions, rows):\n    {body}\n")
    scores: list[float] = scorer_of(file, "brevity").scores(answers).tolist()
    return scores


def test_a_function_sees_messages_text_and_the_whole_row(tmp_path: Path) -> None:
    body = """return [
        row["weight"] * len(completion.split()) + len(prompt) + (prompt[-1]["role"] == "user") + len(row["messages"])
        for prompt, completion, row in zip(prompts, completions, rows)
    ]"""
    assert score(tmp_path, body) == [2.5 * 2 + 3, 0.5 + 3]


def test_what_a_function_changes_in_its_arguments_changes_nothing_else(tmp_path: Path) -> None:
    body = """for row in rows: row["messages"].clear(); row["weight"] = 0
    prompts[1][0]["tool_calls"][0]["function"]["arguments"] = "{}"
    completions.clear(); prompts[0][0]["content"] = ""; prompts.clear()
    return [1, 2]"""
    call: dict[str, Any] = {"type": "function", "function": {"name": "look", "arguments": {"at": "the lid"}}}
    called = Message(role="assistant", content="", tool_calls=(call,))
    asked = replace(PROMPTS[1], messages=(called, Message(role="user", content="And?")))
    answers = answers_to([PROMPTS[0], asked], ["Hello there.", "No."])
    assert score(tmp_path, body, answers=answers) == [1.0, 2.0]
    assert [question.row["weight"] for question in PROMPTS] == [2.5, 0.5]
    assert PROMPTS[0].row["messages"][0]["content"] == PROMPTS[0].messages[0].content == "Hi?"
    assert list(answers.texts) == ["Hello there.", "No."]
    assert call["function"]["arguments"] == {"at": "the lid"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("(1, -2)", [1.0, -2.0]),
        ("[numpy.float32(0.5), numpy.int64(3)]", [0.5, 3.0]),
        ("[Fraction(1, 4), True]", [0.25, 1.0]),
        ("[numpy.bool_(False), numpy.bool_(True)]", [0.0, 1.0]),
    ],
)
def test_numbers_of_any_kind_are_scores(tmp_path: Path, values: str, expected: list[float]) -> None:
    assert score(tmp_path, f"return {values}", preamble="import numpy\nfrom fractions import Fraction") == expected


IN_FRONT = "import os, sys; sys.path.insert(0, os.path.dirname(__file__)); "


def constant_of(folder: Path, value: float, *, imports: str = "from helper import VALUE", lazily: bool = False) -> Any:
    (folder / "package").mkdir(parents=True)
    (folder / "package/__init__.py").write_text("from package.constants import VALUE\n")
    (folder / "package/constants.py").write_text(f"VALUE = {value}\n")
    library = folder.parent / f"library-{folder.name}.py"
    library.write_text("from package import VALUE\n")
    (folder / "helper.py").symlink_to(library)
    top, inside = ("", f"{imports}; ") if lazily else (imports, "")
    body = f"{inside}return [VALUE, VALUE]"
    (folder / "score.py").write_text(f"{top}\ndef constant(prompts, completions, rows):\n    {body}\n")
    return scorer_of(folder / "score.py")


@pytest.mark.parametrize(
    ("lazily", "before", "on_path"), [(False, "", False), (True, "", True), (True, IN_FRONT, False)]
)
def test_files_of_different_folders_may_have_modules_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazily: bool, before: str, on_path: bool
) -> None:
    (tmp_path / "real").mkdir()
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "first").symlink_to(tmp_path / "real")
    if on_path:
        monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), *sys.path])
    imports = f"{before}from helper import VALUE"
    path, modules = list(sys.path), set(sys.modules)
    first, second = (
        constant_of(tmp_path / folder, value, imports=imports, lazily=lazily)
        for folder, value in (("first", 1.0), ("second", 2.0))
    )
    for _ in range(2):
        assert first.scores(ANSWERS).tolist() == [1.0, 1.0]
        assert second.scores(ANSWERS).tolist() == [2.0, 2.0]
    assert sys.path == path or before, "what a file itself puts on the path stays"
    assert {name for name in set(sys.modules) - modules if not name.startswith("_reward_")} == set()


BAD = [
    ("[1.0]", "1 scores for 2 answers to rows.jsonl:4, rows.jsonl:9"),
    ("None", "NoneType"),
    ("'ab'", "str: 'ab'"),
    ("{1: 2, 3: 4}", "dict: {1: 2, 3: 4}"),
    ("[1, None]", "None (NoneType) for an answer to rows.jsonl:9,"),
    ("['1', 2]", "'1' (str) for an answer to rows.jsonl:4,"),
    ("[1, numpy.float64('nan')]", "np.float64(nan) for an answer to rows.jsonl:9,"),
    ("[1e6, -1e30]", "-1e+30 for an answer to rows.jsonl:9,"),
    ("[10 ** 400, 1]", "for an answer to rows.jsonl:4,"),
]


@pytest.mark.parametrize(("values", "words"), BAD, ids=[values for values, _ in BAD])
def test_what_is_no_score_is_refused_by_function_row_and_value(tmp_path: Path, values: str, words: str) -> None:
    with pytest.raises(RewardError) as caught:
        score(tmp_path, f"return {values}", preamble="import numpy")
    assert caught.value.where == f"{tmp_path}/score.py:brevity"
    assert words in caught.value.message
    assert caught.value.exit_code == 9


@pytest.mark.parametrize(
    ("preamble", "body", "words"),
    [
        ("", "return [1 / 0, 2]", ["ZeroDivisionError: division by zero at line 3", "rows.jsonl:4, rows.jsonl:9"]),
        ("", "import sys; sys.exit(3)", ["SystemExit: 3 at line 3"]),
        ("", "raise KeyboardInterrupt", ["KeyboardInterrupt at line 3"]),
        ("def helper(): raise ValueError('deep')", "return helper()", ["ValueError: deep at line 1"]),
        ("", "return {}[1]", ["KeyError: 1 at line 3", "rows.jsonl:4, rows.jsonl:9;"]),
        ("raise KeyboardInterrupt", "return [1, 2]", ["KeyboardInterrupt at line 1", "imported"]),
        ("import nowhere_at_all", "return [1, 2]", ["'nowhere_at_all' at line 1"]),
    ],
)
def test_a_function_or_file_that_raises_is_named_with_the_line_that_did(
    tmp_path: Path, preamble: str, body: str, words: list[str]
) -> None:
    for _ in range(2):
        with pytest.raises(RewardError) as caught:
            score(tmp_path, body, preamble=preamble)
        assert caught.value.where == f"{tmp_path}/score.py:brevity"
        assert [text for text in words if text not in caught.value.message] == []


def test_rows_that_lack_a_column_are_named(tmp_path: Path) -> None:
    prompts = [prompt(line=4, facts=1), prompt(line=9), prompt(line=11), prompt(line=12, facts=2)]
    with pytest.raises(RewardError) as caught:
        score(tmp_path, "return [row['facts'] for row in rows]", answers=answers_to(prompts, ["No."] * 4))
    for words in ("rows.jsonl:9, rows.jsonl:11 and 1 more", "these rows have no 'facts': rows.jsonl:9, rows.jsonl:11;"):
        assert words in caught.value.message


@pytest.mark.parametrize("error", [Preempted(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_request_to_stop_and_a_full_disk_are_no_fault_of_the_function(tmp_path: Path, error: BaseException) -> None:
    def interrupted(*_: Any) -> Any:
        raise error

    with pytest.raises(type(error)) as caught:
        FunctionScorer(FunctionSource(file=tmp_path / "x.py", name="f"), interrupted).scores(ANSWERS)
    assert caught.value is error


def test_a_file_s_neighbours_can_be_imported_but_never_hide_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (tmp_path / "reward_neighbour.py").write_text("VALUE = 0.75\n")
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('hidden')\n")
    preamble = "import colorsys\nfrom reward_neighbour import VALUE"
    assert score(tmp_path, "return [VALUE, colorsys.ONE_THIRD * 3]", preamble=preamble) == [0.75, 1.0]


def test_two_functions_of_a_file_share_its_module_and_a_changed_file_is_another(tmp_path: Path) -> None:
    file = tmp_path / "score.py"
    file.write_text(
        "seen = []\ndef one(p, c, r):\n    seen.extend(c)\n    return [0, 0]\ndef two(p, c, r): return seen\n"
    )
    planned = file_sha256(file)
    note, noted = (load_function(FunctionSource(file=file, name=name), planned=planned) for name in ("one", "two"))
    note([], ["a", "b"], [])
    assert noted([], [], []) == ["a", "b"]
    file.write_text("def one(p, c, r): return 'new'\n")
    assert load_function(FunctionSource(file=file, name="one"), planned=None)([], [], []) == "new"
    with pytest.raises(DataError, match=r"score\.py: changed"):
        load_function(FunctionSource(file=file, name="one"), planned=planned)


def test_the_example_in_the_documentation_is_a_function_that_scores(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs/rewards.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "score.py").write_text(example)
    prompts = [prompt(), prompt(max_words=2), prompt(max_words=2)]
    answers = answers_to(prompts, ["It is closed on Monday.", "On Monday.", "It is closed on Monday."])
    scores = scorer_of(tmp_path / "score.py", "brevity").scores(answers)
    assert scores.tolist() == pytest.approx([1.0, 1.0, 0.7])


def scorer_of(file: Path, name: str = "constant") -> FunctionScorer:
    source = FunctionSource(file=file, name=name)
    return FunctionScorer(source, load_function(source, planned=file_sha256(file)))
