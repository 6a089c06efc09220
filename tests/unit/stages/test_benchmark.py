"""Tasks of lm-evaluation-harness: the figures are those of its own class for transformers models, and errors name what
is wrong."""

from __future__ import annotations

import json
import re
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
from transformers import AutoModelForCausalLM

from alignment import worker
from alignment.commands.export.export_options import ExportOptions
from alignment.commands.export.worker import export
from alignment.core import typed_json
from alignment.core.artifacts import read_manifest
from alignment.core.errors import AlignmentError, ConfigError, DataError, ModelError, NonFiniteError, StageError
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.job import StageInput, StageSpec
from alignment.models.forward.flat import use_flat_attention
from alignment.records.benchmark import (
    SAMPLES,
    Benchmark,
    BenchmarkArm,
    BenchmarkRow,
    BenchmarkTask,
    Measurement,
    TaskMetric,
)
from alignment.rehearse import check_model
from alignment.stages import registry
from alignment.stages.benchmark import harness_model, harness_run, run
from alignment.stages.benchmark.harness_model import HarnessModel, StopTexts
from alignment.stages.benchmark.kind import BenchmarkConfig, content
from alignment.training.context import StageContext
from alignment.training.trackers.all_trackers import Trackers
from tests.chained import LORA, Chained
from tests.hub import COMMIT, leave_data_set
from tests.oracles.close import close
from tests.tiny import pythia_tokenizer, save_tiny_model, tiny_tokenizer

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


def spec_of(chain: Chained, config: BenchmarkConfig, name: str, **changes: Any) -> StageSpec:
    """An arm ``path:NAME`` is a folder of the chain."""
    artifact, run_folder = chain.folder / "artifacts" / f"benchmark-{name}", chain.folder / "runs" / name
    run_folder.mkdir(parents=True, exist_ok=True)
    paths = {arm: chain.folder / arm[5:] for arm in config.arms if arm.startswith("path:")}
    paths["stage:sft"] = chain.inputs["sft"].path
    fields: dict[str, Any] = {
        "stage": "benchmark",
        "inputs": {},
        "arms": {arm: StageInput(ref=arm, path=paths.get(arm)) for arm in config.arms},
        "artifact": artifact,
        "work": artifact.with_name(f"{artifact.name}.work"),
        "run_folder": run_folder,
        "produces": "benchmark",
    }
    return replace(chain.spec("sft", LORA, config=config), **{**fields, **changes})


def measure(chain: Chained, config: BenchmarkConfig, name: str, **changes: Any) -> Path:
    """Runs the stage as the worker does; returns its artifact."""
    spec = spec_of(chain, config, name, **changes)
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
    return Measured(
        record=Benchmark.read(artifact),
        rows=list(typed_json.lines(artifact / SAMPLES, BenchmarkRow)),
        metrics=manifest.metrics,
    )


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


def test_tasks_are_recorded_and_arms_compared_row_by_row_in_two_families(plain: Measured, chain: Chained) -> None:
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
    lines = (chain.folder / "artifacts/benchmark-plain/samples.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert (len(lines), first["task"], first["number"]) == (53, "capitals", 0)
    assert set(first["answers"]["base"]["scores"]) == {"acc", "acc_norm"}
    assert len(first["answers"]["base"]["logprobs"]) == 4
    assert plain.arm("base").values == plain.arm("path:twin").values
    assert all(row.answers["base"] == row.answers["path:twin"] for row in plain.rows)
    assert any(row.answers["base"] != row.answers["stage:sft"] for row in plain.rows)
    first, other = plain.record.comparisons, plain.record.other_comparisons
    assert {item.metric for item in first} == {"capitals/acc", "capitals_without/acc", "shout/exact_match,first_word"}
    assert {item.metric for item in other} == {"capitals/acc_norm", "capitals_without/acc_norm", "shout/exact_match"}
    pairs = [("stage:sft", "base"), ("path:twin", "base"), ("path:twin", "stage:sft")]
    of_capitals = {(item.arm, item.against): item for item in first if item.metric == "capitals/acc"}
    assert list(of_capitals) == pairs
    rows = [row for row in plain.rows if row.task == "capitals"]
    differences = [row.answers["stage:sft"].scores["acc"] - row.answers["base"].scores["acc"] for row in rows]
    assert of_capitals[pairs[0]].difference == pytest.approx(sum(differences) / 20)
    assert (of_capitals[pairs[1]].difference, of_capitals[pairs[1]].adjusted_p) == (0.0, 1.0)


def test_a_limit_makes_its_figures_worthless_and_says_so_and_trackers_get_them(
    chain: Chained, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Any] = {}
    monkeypatch.setattr(Trackers, "table", lambda self, name, rows: sent.update({name: rows}))
    config = replace(PLAIN, arms=["base"], tasks=["capitals"], limit=5, num_fewshot=1)
    measured = read(measure(chain, config, "limited"))
    assert (measured.metrics["rows"], measured.metrics["rows_left_out"]) == (5.0, 15.0)
    assert measured.record.cut
    assert measured.record.tasks[0].num_fewshot == 1
    assert measured.rows[0].prompt.count("Q: ") == 2
    (doubt,) = registry.doubts("benchmark", measured.metrics)
    assert "limit left out 15 of 20 rows" in doubt
    assert registry.doubts("benchmark", {"rows": 20.0, "rows_left_out": 0.0}) == []
    value = measured.arm("base").values["capitals/acc"]
    row = {"task": "capitals", "metric": "acc", "arm": "base", "examples": 1, "rows": 5}
    assert sent["benchmarks"][0] == row | {"value": value.value, "stderr": value.stderr}
    assert (len(sent["benchmarks"]), len(sent["samples"])) == (2, 5)


def asked(*arguments: tuple[Any, ...]) -> Any:
    """Requests in the form of the harness."""
    return [SimpleNamespace(args=args) for args in arguments]


def scored_alike(model: HarnessModel, harness: Any, requests: Any) -> list[bool]:
    """Whether each continuation is greedy; its log-likelihood and this are what the harness says."""
    ours, expected = model.loglikelihood(requests), harness.loglikelihood(requests, disable_tqdm=True)
    close([logprob for logprob, _ in ours], [logprob for logprob, _ in expected], rtol=0.0, atol=1e-4)
    assert [flag for _, flag in ours] == [flag for _, flag in expected]
    return [flag for _, flag in ours]


def ours(folder: Path, **changes: Any) -> HarnessModel:
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    use_flat_attention(model)
    sizes = replace(BenchmarkConfig(max_new_tokens=8, micro_batch_tokens=200, batch_size=2), **changes)
    ends = [tokenizer.eos_token_id]
    return HarnessModel(model, tokenizer, sizes, end_ids=ends, where="arm base", progress=lambda _: None)


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
    requests = asked(*(text for text in TEXTS if max_length is None or len(text[1]) < 10))
    scored_alike(ours(folder, max_length=max_length), hflm(folder, max_length=max_length), requests)


def test_a_second_bos_is_not_added(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    begin = ("<|im_start|>", 1)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    folder = save_tiny_model(tmp_path / "model", tokenizer=tokenizer)
    model, harness = ours(folder), hflm(folder)
    assert model.tok_encode("a")[0] == 1
    assert model.tok_encode("<|im_start|>a") == model.tok_encode("a") == harness.tok_encode("a")
    scored_alike(model, harness, asked(*((text, " is closed.") for text in ("<|im_start|>The shop", "The shop", ""))))


def test_a_continuation_is_greedy_if_every_token_is_the_likeliest(chain: Chained) -> None:
    model, prompt = ours(chain.base), "The shop is"
    greedy = model.generate_until(asked((prompt, {"until": [], "max_gen_toks": 3})))[0]
    assert len(greedy) >= 3
    continuations = [greedy, greedy[:-1] + ("x" if greedy[-1] != "x" else "y"), greedy[:1]]
    assert set(scored_alike(model, hflm(chain.base), asked(*((prompt, text) for text in continuations)))) == {
        True,
        False,
    }


def test_what_requests_have_in_common_is_read_once(chain: Chained, monkeypatch: pytest.MonkeyPatch) -> None:
    context = "The note says that the shop is closed on Monday and that the keys are with the caretaker."
    requests = asked(*((context, choice) for choice in (" Yes", " No", " Perhaps", " The keys are in the hall")))
    model = ours(chain.base, micro_batch_tokens=4096)
    read_tokens: list[int] = []
    stream = harness_model.stream

    def counted(rows: Any, device: Any) -> Any:
        streamed = stream(rows, device)
        read_tokens.append(len(streamed.input_ids))
        return streamed

    monkeypatch.setattr(harness_model, "stream", counted)
    together = model.loglikelihood(requests)
    ends = [model.tok_encode(request.args[1], add_special_tokens=False) for request in requests]
    assert sum(read_tokens) <= len(model.tok_encode(context)) + sum(map(len, ends))
    alone = [model.loglikelihood([request])[0] for request in requests]
    close([logprob for logprob, _ in together], [logprob for logprob, _ in alone], rtol=0.0, atol=1e-4)


def test_an_answer_ends_before_a_stop_text_that_several_tokens_make(
    chain: Chained, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, harness = ours(chain.base, max_new_tokens=40), hflm(chain.base)
    prompts = ["The shop is", "Please answer", "You are tiny."]
    whole = model.generate_until(asked(*((prompt, {"until": []}) for prompt in prompts)))
    tokens: list[int] = []
    generate = harness_model.generate

    def counted(*arguments: Any, **more: Any) -> Any:
        answers = generate(*arguments, **more)
        tokens.extend(map(len, answers))
        return answers

    monkeypatch.setattr(harness_model, "generate", counted)
    for prompt, text in zip(prompts, whole, strict=True):
        stop = text[6:10]
        request = asked((prompt, {"until": [stop, "\n\n\n"], "max_gen_toks": 40}))
        assert model.generate_until(request) == [text[: text.index(stop)]]
        assert model.generate_until(request) == harness.generate_until(request, disable_tqdm=True)
    assert max(tokens) < 20, "generation ended there too"


def test_a_control_token_may_be_a_stop_text() -> None:
    """As in the tasks of the harness for models whose end of text is another token."""
    tokenizer = tiny_tokenizer()
    stops = StopTexts(tokenizer, ["Question:", "<|im_start|>"])
    answer = [*tokenizer("It is 4.")["input_ids"], tokenizer.bos_token_id]
    assert [stops.ends(answer[:length]) for length in range(1, len(answer) + 1)] == [False] * (len(answer) - 1) + [True]
    assert stops.text(answer) == "It is 4."


def test_a_metric_that_some_rows_or_one_arm_lack_is_not_compared() -> None:
    results = {
        "higher_is_better": {"sums": {}},
        "results": {"sums": {"acc,none": 0.5, "acc_easy,none": 1.0}},
        "samples": {"sums": [{"filter": "none", "acc": 1.0, "acc_easy": 1.0}, {"filter": "none", "acc": 0.0}]},
    }
    metrics = list(harness_run._metrics(results, "sums"))
    assert metrics == [TaskMetric(name="acc"), TaskMetric(name="acc_easy", by_row=False)]
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
        ours(chain.base).generate_until(asked(("Hi", {"until": [], **settings})))


OwnTasks = Callable[[str, str, str], BenchmarkConfig]


@pytest.fixture
def own_tasks(tmp_path: Path) -> OwnTasks:
    """A copy of the tasks in which a file's text is replaced, and the settings that use the task of its name."""

    def copy(file: str, old: str, new: str) -> BenchmarkConfig:
        folder = tmp_path / "tasks"
        shutil.copytree(TASKS, folder, ignore=shutil.ignore_patterns("__pycache__"))
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))
        return replace(PLAIN, arms=["base"], task_folders=[str(folder)], tasks=[file.removesuffix(".yaml")])

    return copy


def test_a_function_that_raises_is_named_with_its_line(chain: Chained, own_tasks: OwnTasks) -> None:
    config = own_tasks("shout.yaml", "doc_to_target: answer", "doc_to_target: !function words.broken")
    words = Path(config.task_folders[0]) / "words.py"
    words.write_text(words.read_text() + '\n\ndef broken(doc):\n    return doc["missing"]\n')
    with pytest.raises(DataError, match=r"cannot load shout: KeyError at .*words\.py:10: 'missing'"):
        measure(chain, config, "raising")
    words.write_text(words.read_text().replace('doc["missing"]', 'doc["answer"] if doc["word"] != "text" else 1 / 0'))
    failed = r"the harness failed: ZeroDivisionError at .*words\.py:10: division by zero"
    with pytest.raises(StageError, match=failed):
        measure(chain, config, "raising-later")
    (note,) = check_model(spec_of(chain, config, "tried"))
    assert re.match(rf"with made-up answers {failed}; ", note), "a metric may divide by the number of right answers"


@pytest.mark.parametrize(
    ("body", "kind", "remedy"),
    [
        ("import sklearn.no_such_part", DataError, "pip install scikit-learn"),
        ("import nltk; nltk.data.find('corpora/no_such')", DataError, "python -m nltk.downloader no_such"),
        ("if doc['word'] == 'text': import no_such_package", StageError, "pip install no_such_package"),
        ("__import__('transformers').AutoTokenizer.from_pretrained('org/no_such')", DataError, "hf download ORG/NAME"),
    ],
)
def test_what_a_task_needs_is_tried_before_training_and_named(
    chain: Chained,
    own_tasks: OwnTasks,
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    kind: type[AlignmentError],
    remedy: str,
) -> None:
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    config = own_tasks("shout.yaml", "doc_to_target: answer", "doc_to_target: !function words.needs")
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


def test_a_data_set_of_a_hub_is_read_from_its_snapshot(chain: Chained, own_tasks: OwnTasks, tmp_path: Path) -> None:
    config = own_tasks(
        "capitals.yaml",
        "dataset_path: json\ndataset_kwargs: {data_files: {test: capitals.jsonl}}",
        "dataset_path: org/name\ndataset_kwargs: {revision: v1}",
    )
    snapshot = leave_data_set(tmp_path, {"data/test.jsonl": (TASKS / "capitals.jsonl").read_text()}, revision="v1")
    data = {
        "extra_data": {"hub:org/name@v1": snapshot},
        "identity": {"extra_data": {"hub:org/name@v1": f"hub:org/name@{COMMIT}"}},
    }
    assert read(measure(chain, config, "of_hub", **data)).metrics["rows"] == 20.0


def test_rows_that_changed_since_the_plan_or_have_no_right_answer_are_refused(
    chain: Chained, own_tasks: OwnTasks
) -> None:
    config = own_tasks("capitals.yaml", "doc_to_target: right", "doc_to_target: wrong")
    planned = {"files": dict(content(config, "stages.benchmark"))}
    with pytest.raises(DataError, match=r"of row 0 is 'wrong', which is not one of its choices: 'Paris', 'Lisbon'"):
        measure(chain, config, "lacking", identity=planned)
    rows = Path(config.task_folders[0]) / "capitals.jsonl"
    rows.write_text(rows.read_text() + "{}\n")
    with pytest.raises(DataError, match="changed since the run was planned"):
        measure(chain, config, "changed", identity=planned)


def test_an_arm_that_cannot_be_measured_is_named(chain: Chained) -> None:
    ruined = save_tiny_model(chain.folder / "ruined") / "model.safetensors"
    weights = load_file(ruined)
    weights["model.norm.weight"] *= torch.nan
    save_file(weights, ruined, metadata={"format": "pt"})
    save_tiny_model(chain.folder / "no_template", architecture="gpt_neox", tokenizer=pythia_tokenizer())
    capitals = replace(PLAIN, tasks=["capitals"])
    for error, words, config in (
        (NonFiniteError, "arm path:ruined gives", replace(capitals, arms=["path:ruined"])),
        (
            ConfigError,
            "5000 is more than the 4096 positions of base",
            replace(capitals, arms=["base"], max_length=5000),
        ),
        (
            ModelError,
            "path:no_template has a tokenizer without",
            replace(capitals, arms=["path:no_template"], apply_chat_template=True),
        ),
    ):
        with pytest.raises(error, match=words):
            measure(chain, config, "refused")
