"""Tasks of lm-evaluation-harness: the figures are those of its own class for transformers models, and errors name what
is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from alignment import worker
from alignment.commands.export.export_options import ExportOptions
from alignment.commands.export.worker import export
from alignment.core.artifacts import read_manifest
from alignment.core.errors import AlignmentError, ConfigError, DataError, ModelError, NonFiniteError, StageError
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.job import StageInput, StageSpec
from alignment.records.benchmark import (
    Benchmark,
    BenchmarkArm,
    BenchmarkRow,
    BenchmarkTask,
    Measurement,
    TaskMetric,
    read_rows,
)
from alignment.rehearse import check_model
from alignment.stages import registry
from alignment.stages.benchmark import harness_model, harness_run, run
from alignment.stages.benchmark.answer_ends import StopTexts
from alignment.stages.benchmark.config import BenchmarkConfig
from alignment.stages.benchmark.harness_model import HarnessModel, Sizes
from alignment.stages.benchmark.kind import content
from alignment.training.context import StageContext
from alignment.training.trackers.all_trackers import Trackers
from tests.chained import LORA, Chained
from tests.hub import COMMIT, leave_data_set
from tests.oracles.close import close
from tests.tiny import pythia_tokenizer, save_tiny_model, tiny_model, tiny_tokenizer

TASKS = Path(__file__).parents[2] / "data" / "tasks"
NAMES = ["both", "shout", "notes"]
PLAIN = BenchmarkConfig(
    arms=["base", "stage:sft", "path:twin"],
    tasks=NAMES,
    task_folders=[str(TASKS)],
    micro_batch_tokens=300,
    batch_size=3,
    bootstrap_samples=100,
)
IN_TURNS = replace(PLAIN, arms=["stage:sft"], apply_chat_template=True, max_length=40)
"""Prompts are longer than 40 tokens, so they lose their beginning."""


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chained]:
    """A base, an sft policy on it, the same policy exported, and a copy of the base from outside."""
    chain = Chained(tmp_path_factory.mktemp("benchmark"))
    chain.run("sft", LORA, identity={"kind": "sft", "base": {"dtype": "float32"}, "arms": {}})
    sft = chain.inputs["sft"].path
    assert sft is not None
    export(sft, chain.base, chain.folder / "exported", ExportOptions(form="model", max_gap=1.0))
    shutil.copytree(chain.base, chain.folder / "twin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(chain.folder / "datasets"))
        yield chain


def spec_of(chain: Chained, config: BenchmarkConfig, name: str) -> StageSpec:
    artifact = chain.folder / "artifacts" / f"benchmark-{name}"
    run_folder = chain.folder / "runs" / name
    run_folder.mkdir(parents=True, exist_ok=True)
    folders = {"stage:sft": chain.inputs["sft"].path}
    return replace(
        chain.spec("sft", LORA, config=config),
        stage="benchmark",
        inputs={},
        arms={
            arm: StageInput(ref=arm, path=folders.get(arm, chain.folder / arm[5:] if arm[:5] == "path:" else None))
            for arm in config.arms
        },
        artifact=artifact,
        work=artifact.with_name(f"{artifact.name}.work"),
        run_folder=run_folder,
        produces="benchmark",
    )


def measure(chain: Chained, config: BenchmarkConfig, name: str, **changes: Any) -> Path:
    """Runs the stage as the worker does; returns its artifact."""
    spec = replace(spec_of(chain, config, name), **changes)
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    return spec.artifact


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the stage wrote."""

    record: Benchmark
    rows: list[BenchmarkRow]
    metrics: dict[str, float]

    def row(self, task: str, number: int) -> BenchmarkRow:
        return next(row for row in self.rows if (row.task, row.number) == (task, number))

    def arm(self, name: str) -> Any:
        return next(arm for arm in self.record.arms if arm.name == name)


def read(artifact: Path) -> Measured:
    manifest = read_manifest(artifact)
    assert manifest is not None
    return Measured(record=Benchmark.read(artifact), rows=list(read_rows(artifact)), metrics=manifest.metrics)


@pytest.fixture(scope="module")
def plain(chain: Chained) -> Measured:
    return read(measure(chain, PLAIN, "plain"))


@pytest.fixture(scope="module")
def in_turns(chain: Chained) -> Measured:
    return read(measure(chain, IN_TURNS, "in_turns"))


def by_the_harness(folder: Path, config: BenchmarkConfig) -> dict[str, Any]:
    """The same tasks by the harness itself, with its own class for models."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    results: dict[str, Any] = simple_evaluate(
        model=hflm(folder, max_length=config.max_length),
        tasks=list(config.tasks),
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=100,
        apply_chat_template=config.apply_chat_template,
    )
    return results


def hflm(folder: Path, **more: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, **more)


@pytest.mark.parametrize("case", ["plain", "in_turns"])
def test_figures_and_log_likelihoods_are_those_of_the_harness_itself(
    chain: Chained, case: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: Measured = request.getfixturevalue(case)
    config = {"plain": PLAIN, "in_turns": IN_TURNS}[case]
    monkeypatch.chdir(TASKS)  # where the harness looks for data
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # asks the machine's tools for seconds
    results = by_the_harness(chain.folder / "exported", config)
    arm = measured.arm("stage:sft")
    compared = 0
    for task, of_task in {**results["results"], **results["groups"]}.items():
        for key, value in of_task.items():
            metric, comma, of_filter = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            ours = arm.values[f"{task}/{metric}" + ("" if of_filter == "none" else f",{of_filter}")]
            assert ours.value == pytest.approx(value, rel=1e-5), f"{task} {key}"
            stderr = of_task.get(f"{metric}_stderr,{of_filter}")
            assert ours.stderr == (pytest.approx(stderr) if isinstance(stderr, float) else None), f"{task} {key}"
            compared += 1
    assert compared == len(arm.values) == 9
    for task, samples in results["samples"].items():
        for sample in samples:
            row = measured.row(task, sample["doc_id"])
            answer = row.answers["stage:sft"]
            assert row.prompt == sample["arguments"][0][0]
            responses = [resps[0] for resps in sample["resps"]]
            if isinstance(responses[0], str):
                assert answer.text == responses[0]
            else:
                sums = [value[0] if isinstance(value, tuple) else value for value in responses]
                close(answer.logprobs, sums, rtol=0.0, atol=1e-4)


def test_a_task_has_its_metric_filter_examples_rows_and_version(plain: Measured) -> None:
    tasks = {task.name: task for task in plain.record.tasks}
    assert list(tasks) == ["capitals", "capitals_without", "shout", "notes", "both"]
    capitals, shout, notes, both = (tasks[name] for name in ("capitals", "shout", "notes", "both"))
    assert (capitals.num_fewshot, capitals.num_rows, capitals.all_rows, capitals.version) == (2, 20, 20, "1.0")
    assert tasks["capitals_without"].num_fewshot == 0
    assert [metric.title for metric in shout.metrics] == ["exact_match,first_word", "exact_match"]
    assert [(m.name, m.higher_is_better, m.by_row) for m in notes.metrics] == [
        ("word_perplexity", False, False),
        ("bits_per_byte", False, False),
    ]
    assert (both.group, both.num_rows, both.num_fewshot) == (True, 40, None)
    assert plain.record.harness.startswith("0.4.")
    assert {name.rpartition("/")[2] for name in plain.metrics if "/" in name} == {"base", "sft", "twin"}
    assert (plain.metrics["rows"], plain.metrics["rows_left_out"]) == (53.0, 0.0)
    assert plain.metrics["capitals/acc/sft"] == plain.arm("stage:sft").values["capitals/acc"].value


def test_every_arm_gets_the_same_examples(plain: Measured) -> None:
    """Else a copy of the base would differ from the base."""
    assert plain.arm("base").values == plain.arm("path:twin").values
    for row in plain.rows:
        assert row.answers["base"] == row.answers["path:twin"]
    assert any(row.answers["base"] != row.answers["stage:sft"] for row in plain.rows)


def test_arms_are_compared_row_by_row_in_two_families(plain: Measured) -> None:
    first, other = plain.record.comparisons, plain.record.other_comparisons
    assert {item.metric for item in first} == {"capitals/acc", "capitals_without/acc", "shout/exact_match,first_word"}
    assert {item.metric for item in other} == {
        "capitals/acc_norm",
        "capitals_without/acc_norm",
        "shout/exact_match",
    }
    pairs = [("stage:sft", "base"), ("path:twin", "base"), ("path:twin", "stage:sft")]
    assert [(item.arm, item.against) for item in first if item.metric == "capitals/acc"] == pairs
    sft = next(item for item in first if (item.metric, item.arm) == ("capitals/acc", "stage:sft"))
    rows = [row for row in plain.rows if row.task == "capitals"]
    differences = [row.answers["stage:sft"].scores["acc"] - row.answers["base"].scores["acc"] for row in rows]
    assert sft.difference == pytest.approx(sum(differences) / 20)
    twin = next(item for item in first if (item.metric, item.arm, item.against) == ("capitals/acc", *pairs[1]))
    assert (twin.difference, twin.adjusted_p) == (0.0, 1.0)


def test_trackers_get_a_row_for_each_value(chain: Chained, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}
    monkeypatch.setattr(Trackers, "table", lambda self, name, rows: sent.update({name: rows}))
    measured = read(measure(chain, replace(PLAIN, arms=["base"], tasks=["capitals"]), "tracked"))
    value = measured.arm("base").values["capitals/acc"]
    row = {"task": "capitals", "metric": "acc", "arm": "base", "examples": 2, "rows": 20}
    assert sent["benchmarks"][0] == row | {"value": value.value, "stderr": value.stderr}
    assert (len(sent["benchmarks"]), len(sent["samples"])) == (2, 20)


def test_a_limit_makes_its_figures_worthless_and_says_so(chain: Chained) -> None:
    config = replace(PLAIN, arms=["base"], tasks=["capitals"], limit=5, num_fewshot=1)
    measured = read(measure(chain, config, "limited"))
    assert (measured.metrics["rows"], measured.metrics["rows_left_out"]) == (5.0, 15.0)
    assert measured.record.cut
    assert measured.record.tasks[0].num_fewshot == 1
    assert measured.rows[0].prompt.count("Q: ") == 2
    (doubt,) = registry.doubts("benchmark", measured.metrics)
    assert "limit left out 15 of 20 rows" in doubt
    assert registry.doubts("benchmark", {"rows": 20.0, "rows_left_out": 0.0}) == []


# ---- what the harness asks of a model --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request in the form of the harness."""

    args: tuple[Any, ...]


def ours(folder: Path, **changes: Any) -> HarnessModel:
    from transformers import AutoModelForCausalLM

    from alignment.models.forward.flat import use_flat_attention

    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    use_flat_attention(model)
    sizes = Sizes(max_length=None, max_new_tokens=8, micro_batch_tokens=200, batch_size=2)
    return HarnessModel(
        model,
        tokenizer,
        replace(sizes, **changes),
        end_ids=[tokenizer.eos_token_id],
        where="arm base",
        progress=lambda _: None,
    )


TEXTS = [
    ("", "The shop is closed."),
    ("The shop", " is closed on Monday."),
    ("The shop ", "is closed on Monday."),
    ("The shop is closed on", " M"),
    ("The shop is closed on", " F"),
    ("The shop is closed on", " Friday"),
    ("The note says that the shop is closed on Monday and that the keys are with the caretaker in the hall.", " You"),
    ("<|im_start|>user", "\nPlease"),
]


@pytest.mark.parametrize("max_length", [None, 12])
@pytest.mark.parametrize("tokenizer", ["with BOS", "without BOS"])
def test_contexts_are_cut_and_begun_as_by_the_harness(
    tmp_path: Path, chain: Chained, max_length: int | None, tokenizer: str
) -> None:
    folder = chain.base
    if tokenizer == "without BOS":
        plain = pythia_tokenizer()
        plain.bos_token = None
        folder = save_tiny_model(tmp_path / "model", architecture="gpt_neox", tokenizer=plain)
    requests = [Asked(args=text) for text in TEXTS if max_length is None or len(text[1]) < 10]
    expected = hflm(folder, max_length=max_length).loglikelihood(requests, disable_tqdm=True)
    scored = ours(folder, max_length=max_length).loglikelihood(requests)  # type: ignore[arg-type]
    close([logprob for logprob, _ in scored], [logprob for logprob, _ in expected], rtol=0.0, atol=1e-4)
    assert [greedy for _, greedy in scored] == [greedy for _, greedy in expected]


def test_a_second_bos_is_not_added(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    begin = ("<|im_start|>", 1)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    folder = save_tiny_model(tmp_path / "model", tokenizer=tokenizer)
    model, harness = ours(folder), hflm(folder)
    assert model.tok_encode("a")[0] == model.tok_encode("<|im_start|>a")[0] == 1
    assert model.tok_encode("<|im_start|>a") == model.tok_encode("a") == harness.tok_encode("a")
    requests = [Asked(args=(text, " is closed.")) for text in ("<|im_start|>The shop", "The shop", "")]
    scored = model.loglikelihood(requests)  # type: ignore[arg-type]
    expected = harness.loglikelihood(requests, disable_tqdm=True)
    close([logprob for logprob, _ in scored], [logprob for logprob, _ in expected], rtol=0.0, atol=1e-4)


def test_a_continuation_is_greedy_if_every_token_is_the_likeliest(chain: Chained) -> None:
    model = ours(chain.base)
    prompt = "The shop is"
    greedy = model.generate_until([Asked(args=(prompt, {"until": [], "max_gen_toks": 3}))])[0]  # type: ignore[list-item]
    assert len(greedy) >= 3
    continuations = [greedy, greedy[:-1] + ("x" if greedy[-1] != "x" else "y"), greedy[:1]]
    scored = model.loglikelihood([Asked(args=(prompt, text)) for text in continuations])  # type: ignore[misc]
    expected = hflm(chain.base).loglikelihood([Asked(args=(prompt, text)) for text in continuations], disable_tqdm=True)
    assert [flag for _, flag in scored] == [flag for _, flag in expected]
    assert {flag for _, flag in scored} == {True, False}


def test_what_requests_have_in_common_is_read_once(chain: Chained, monkeypatch: pytest.MonkeyPatch) -> None:
    context = "The note says that the shop is closed on Monday and that the keys are with the caretaker."
    choices = [" Yes", " No", " Perhaps", " The keys are in the hall"]
    model = ours(chain.base, micro_batch_tokens=4096)
    read_tokens: list[int] = []
    stream = harness_model.stream

    def counted(rows: Any, device: Any) -> Any:
        streamed = stream(rows, device)
        read_tokens.append(len(streamed.input_ids))
        return streamed

    monkeypatch.setattr(harness_model, "stream", counted)
    together = model.loglikelihood([Asked(args=(context, choice)) for choice in choices])  # type: ignore[misc]
    ends = [model.tok_encode(choice, add_special_tokens=False) for choice in choices]
    assert sum(read_tokens) <= len(model.tok_encode(context)) + sum(map(len, ends))
    alone = [model.loglikelihood([Asked(args=(context, choice))])[0] for choice in choices]  # type: ignore[list-item]
    close([logprob for logprob, _ in together], [logprob for logprob, _ in alone], rtol=0.0, atol=1e-4)


def test_an_answer_ends_before_a_stop_text_that_several_tokens_make(
    chain: Chained, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, harness = ours(chain.base, max_new_tokens=40), hflm(chain.base)
    prompts = ["The shop is", "Please answer", "You are tiny."]
    whole = model.generate_until([Asked(args=(p, {"until": []})) for p in prompts])  # type: ignore[misc]
    tokens: list[int] = []
    generate = harness_model.generate

    def counted(*arguments: Any, **more: Any) -> Any:
        answers = generate(*arguments, **more)
        tokens.extend(map(len, answers))
        return answers

    monkeypatch.setattr(harness_model, "generate", counted)
    for prompt, text in zip(prompts, whole, strict=True):
        stop = text[6:10]
        request = Asked(args=(prompt, {"until": [stop, "\n\n\n"], "max_gen_toks": 40}))
        assert model.generate_until([request])[0] == text[: text.index(stop)]  # type: ignore[list-item]
        assert model.generate_until([request]) == harness.generate_until([request], disable_tqdm=True)  # type: ignore[list-item]
    assert max(tokens) < 20, "generation ended there too"


def test_a_control_token_may_be_a_stop_text() -> None:
    """As in the tasks of the harness for models whose end of text is another token."""
    tokenizer = tiny_tokenizer()
    stops = StopTexts(tokenizer, ["Question:", "<|im_start|>"])
    answer = [*tokenizer("It is 4.")["input_ids"], tokenizer.bos_token_id]
    assert [stops.ends(answer[:length]) for length in range(1, len(answer) + 1)] == [False] * (len(answer) - 1) + [True]
    assert stops.text(answer) == "It is 4."


def test_a_metric_that_only_some_rows_have_is_no_score_of_each_row() -> None:
    results = {
        "higher_is_better": {"sums": {}},
        "results": {"sums": {"acc,none": 0.5, "acc_easy,none": 1.0}},
        "samples": {"sums": [{"filter": "none", "acc": 1.0, "acc_easy": 1.0}, {"filter": "none", "acc": 0.0}]},
    }
    metrics = list(harness_run._metrics(results, "sums"))
    assert metrics == [TaskMetric(name="acc"), TaskMetric(name="acc_easy", by_row=False)]


def test_a_metric_that_one_arm_lacks_is_shown_of_the_others_and_not_compared() -> None:
    right, parsed = TaskMetric(name="acc"), TaskMetric(name="parsed")
    task = BenchmarkTask(name="sums", metrics=[right])
    runs = {
        "base": SimpleNamespace(tasks=[task]),
        "stage:sft": SimpleNamespace(tasks=[replace(task, metrics=[right, parsed])]),
    }
    (together,) = run._of_all(runs)
    assert together.metrics == [right, replace(parsed, by_row=False)]
    values = {"sums/acc": Measurement(value=0.5)}
    arms = [
        BenchmarkArm(name="base", values=values),
        BenchmarkArm(name="stage:sft", values={**values, "sums/parsed": Measurement(value=0.75)}),
    ]
    table = run._table(Benchmark(tasks=[together], arms=arms))
    assert [(row["metric"], row["arm"], row["value"]) for row in table] == [
        ("acc", "base", 0.5),
        ("acc", "sft", 0.5),
        ("parsed", "sft", 0.75),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, "samples its answers"),
        ({"num_beams": 4}, "sets num_beams in its generation_kwargs"),
        ({"max_gen_toks": 5000}, "answers of 5000 tokens leave no room for a prompt in max_length, 4096 tokens"),
    ],
)
def test_answers_of_another_kind_are_refused(chain: Chained, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ours(chain.base).generate_until([Asked(args=("Hi", {"until": [], **settings}))])  # type: ignore[list-item]


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def own_tasks(tmp_path: Path) -> Callable[[str, str, str], BenchmarkConfig]:
    """A copy of the tasks in which a file's text is replaced, and the settings that use it."""

    def copy(file: str, old: str, new: str) -> BenchmarkConfig:
        folder = tmp_path / "tasks"
        shutil.copytree(TASKS, folder, ignore=shutil.ignore_patterns("__pycache__"))
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))
        return replace(PLAIN, arms=["base"], task_folders=[str(folder)])

    return copy


def test_a_function_that_raises_is_named_with_its_line(
    chain: Chained, own_tasks: Callable[[str, str, str], BenchmarkConfig]
) -> None:
    config = own_tasks("shout.yaml", "doc_to_target: answer", "doc_to_target: !function words.broken")
    words = Path(config.task_folders[0]) / "words.py"
    words.write_text(words.read_text() + '\n\ndef broken(doc):\n    return doc["missing"]\n')
    with pytest.raises(DataError, match=r"cannot load shout: KeyError at .*words\.py:10: 'missing'"):
        measure(chain, replace(config, tasks=["shout"]), "raising")
    words.write_text(words.read_text().replace('doc["missing"]', 'doc["answer"] if doc["word"] != "text" else 1 / 0'))
    with pytest.raises(StageError, match=r"the harness failed: ZeroDivisionError at .*words\.py:10: division by zero"):
        measure(chain, replace(config, tasks=["shout"]), "raising-later")


@pytest.mark.parametrize(
    ("body", "kind", "remedy"),
    [
        ("import no_such_package.part", DataError, "pip install no_such_package"),
        ("import sklearn.no_such_part", DataError, "pip install scikit-learn"),
        ("import nltk; nltk.data.find('corpora/no_such')", DataError, "python -m nltk.downloader no_such"),
        ("if doc['word'] == 'text': import no_such_package", StageError, "pip install no_such_package"),
        (
            "if doc['word'] == 'text': __import__('nltk').data.find('corpora/x')",
            StageError,
            "python -m nltk.downloader x",
        ),
        ("__import__('transformers').AutoTokenizer.from_pretrained('org/no_such')", DataError, "hf download ORG/NAME"),
        ("__import__('datasets').load_dataset('org/no_such')", DataError, "datasets.load_dataset"),
    ],
)
def test_what_a_task_needs_is_tried_before_training_and_named(
    chain: Chained,
    own_tasks: Callable[[str, str, str], BenchmarkConfig],
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    kind: type[AlignmentError],
    remedy: str,
) -> None:
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    config = replace(
        own_tasks("shout.yaml", "doc_to_target: answer", "doc_to_target: !function words.needs"), tasks=["shout"]
    )
    words = Path(config.task_folders[0]) / "words.py"
    words.write_text(words.read_text() + f'\n\ndef needs(doc):\n    {body}\n    return doc["answer"]\n')
    with pytest.raises(kind) as caught:
        check_model(spec_of(chain, config, "tried"))
    assert remedy in caught.value.remedy


def test_tasks_that_work_pass_their_trial_without_a_model(chain: Chained) -> None:
    spec = spec_of(chain, replace(PLAIN, arms=["base"], apply_chat_template=True), "tried")
    assert check_model(replace(spec, base_path=chain.folder / "no_such")) == []
    assert not spec.artifact.exists()
    assert not spec.work.exists()


def test_a_right_answer_that_is_not_a_choice_is_refused(
    chain: Chained, own_tasks: Callable[[str, str, str], BenchmarkConfig]
) -> None:
    config = own_tasks("capitals.yaml", "doc_to_target: right", "doc_to_target: wrong")
    message = r"capitals: the right answer of row 0 is 'wrong', which is not one of its choices: 'Paris', 'Lisbon'"
    with pytest.raises(DataError, match=message):
        measure(chain, replace(config, tasks=["capitals"]), "lacking")


def test_a_data_set_of_a_hub_is_read_from_its_snapshot(
    chain: Chained, own_tasks: Callable[[str, str, str], BenchmarkConfig], tmp_path: Path
) -> None:
    config = own_tasks(
        "capitals.yaml",
        "dataset_path: json\ndataset_kwargs: {data_files: {test: capitals.jsonl}}",
        "dataset_path: org/name\ndataset_kwargs: {revision: v1}",
    )
    snapshot = leave_data_set(tmp_path, {"data/test.jsonl": (TASKS / "capitals.jsonl").read_text()}, revision="v1")
    planned = {"hub:org/name@v1": f"hub:org/name@{COMMIT}"}
    artifact = measure(
        chain,
        replace(config, tasks=["capitals"]),
        "of_hub",
        extra_data={"hub:org/name@v1": snapshot},
        identity={"extra_data": planned},
    )
    assert read(artifact).metrics["rows"] == 20.0


def test_files_that_changed_since_the_plan_are_refused(
    chain: Chained, own_tasks: Callable[[str, str, str], BenchmarkConfig]
) -> None:
    config = own_tasks("capitals.yaml", "num_fewshot: 2", "num_fewshot: 1")
    planned = {"files": dict(content(config, "stages.benchmark"))}
    rows = Path(config.task_folders[0]) / "capitals.jsonl"
    rows.write_text(rows.read_text() + "{}\n")
    with pytest.raises(DataError, match="changed since the run was planned"):
        measure(chain, config, "changed", identity=planned)


def test_a_ruined_policy_ends_the_stage(chain: Chained) -> None:
    folder = save_tiny_model(chain.folder / "ruined")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = replace(PLAIN, arms=["path:ruined"], tasks=["capitals"])
    with pytest.raises(NonFiniteError, match="arm path:ruined gives log-probabilities that are not finite"):
        measure(chain, config, "ruined")


def test_a_window_beyond_the_positions_is_refused(chain: Chained) -> None:
    with pytest.raises(ConfigError, match="5000 is more than the 4096 positions of base"):
        measure(chain, replace(PLAIN, arms=["base"], max_length=5000), "wide")


def test_turns_need_a_template(chain: Chained) -> None:
    folder = chain.folder / "no_template"
    tokenizer = pythia_tokenizer()
    tiny_model("gpt_neox", vocab_size=len(tokenizer)).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    config = replace(PLAIN, arms=["path:no_template"], apply_chat_template=True, tasks=["capitals"])
    with pytest.raises(ModelError, match="path:no_template has a tokenizer without a chat template"):
        measure(chain, config, "no_template")


def test_rows_are_written_as_lines_of_json(plain: Measured, chain: Chained) -> None:
    lines = (chain.folder / "artifacts" / "benchmark-plain" / "samples.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert (len(lines), first["task"], first["number"]) == (53, "capitals", 0)
    assert set(first["answers"]["base"]["scores"]) == {"acc", "acc_norm"}
    assert len(first["answers"]["base"]["logprobs"]) == 4
