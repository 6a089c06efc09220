"""An engine for the time of a stage: it dies and is started again with its weights, or the stage ends and says why."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from alignment.config.launch import Engine, SamplingConfig
from alignment.core.errors import ConfigError, StageError
from alignment.engines.completions import Asked, EngineAnswer, Generation
from alignment.engines.engine_session import RESTARTS, EngineSession, Weights
from alignment.engines.server_process import VllmOptions
from alignment.models.assembly.engine_weights import write_model
from tests.engine_server import COMPLETIONS, Failure, FakeEngine, Planted, engine_server, interpreter_of
from tests.tiny import liven, tiny_model

ASKED = [Asked(prompt=[5, 9], answers=3, seed=11), Asked(prompt=[8], answers=1, seed=40)]
GENERATION = Generation(max_new_tokens=4, temperature=1.0, end_ids=[2])
WHERE = "stages.ppo.sampling"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
REPLACING = ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"]
"""Calls that replace all weights, in order."""


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Weights]:
    folder = tmp_path_factory.mktemp("adapters")
    weights = []
    for number in range(2):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(str(base)), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        )
        liven(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(1.0 + number)
        model.save_pretrained(str(folder / f"policy-{number}"))
        weights.append(Weights(name=f"policy-{number}-abcd", folder=folder / f"policy-{number}"))
    return weights


def options(base: Path, **changes: Any) -> VllmOptions:
    return replace(VllmOptions(model=base, dtype="float32", max_length=64, rank=4), **changes)


@contextmanager
def session_with(folder: Path, **settings: Any) -> Iterator[EngineSession]:
    config = SamplingConfig(engine=Engine.vllm, **{"timeout": 20.0, "retries": 0, **settings})
    log = folder / "engine.log"
    with EngineSession(config, where=WHERE, log=log, waiting=lambda: None, on_peak=lambda _: None) as session:
        yield session


@contextmanager
def at_url(base: Path, folder: Path, **settings: Any) -> Iterator[tuple[FakeEngine, EngineSession]]:
    with engine_server(base) as engine, session_with(folder, url=f"{engine.url}/v1/", **settings) as session:
        session.start(options(base))
        yield engine, session


@contextmanager
def started(base: Path, folder: Path, planted: Planted, **settings: Any) -> Iterator[EngineSession]:
    with session_with(folder, python=str(interpreter_of(folder, planted)), **settings) as session:
        session.start(options(base))
        yield session


def servers_under(folder: Path) -> list[psutil.Process]:
    named = []
    for process in psutil.process_iter(["environ", "status"]):
        alive = process.info["status"] != psutil.STATUS_ZOMBIE
        if alive and (process.info["environ"] or {}).get("TMPDIR") == str(folder):
            named.append(process)
    return named


def answers_of(base: Path, folder: Path, weights: Weights) -> list[list[EngineAnswer]]:
    with at_url(base, folder) as (_, session):
        session.use(weights)
        return session.answers(weights, ASKED, GENERATION)


def test_answers_are_those_of_the_weights_that_were_loaded_last_and_others_are_forgotten(
    base: Path, tmp_path: Path, adapters: list[Weights]
) -> None:
    with at_url(base, tmp_path) as (engine, session):
        given = [session.answers(Weights(), ASKED, GENERATION)]
        for weights in adapters:
            session.use(weights)
            given.append(session.answers(weights, ASKED, GENERATION))
            assert engine.names == ["base", weights.name]
            assert engine.paths(COMPLETIONS)[-1]["model"] == weights.name
        session.use(Weights())
        assert engine.names == ["base"]
        assert session.answers(Weights(), ASKED, GENERATION) == given[0]
        changes = [(path, body["lora_name"]) for path, body in engine.calls if path in (LOAD, UNLOAD)]
        session.use(replace(adapters[0], name="another"))
        session.close()
        assert engine.names == ["base"], "a server of the user has no adapter of ours left"
    first, second = (weights.name for weights in adapters)
    assert changes == [(LOAD, first), (LOAD, second), (UNLOAD, first), (UNLOAD, second)], "loaded before forgotten"
    assert given[0] != given[1] != given[2]


def test_whole_weights_are_replaced_and_their_version_is_asked_for(base: Path, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=24, seed=3)
    weights = Weights(
        name="policy-7-abcd",
        folder=write_model(
            model, dict(model.named_parameters(remove_duplicate=False)), torch.float32, tmp_path / "policy-7"
        ),
        whole=True,
    )
    untied = write_model(
        AutoModelForCausalLM.from_pretrained(str(base)),
        AutoModelForCausalLM.from_pretrained(str(base)).state_dict(),
        torch.float32,
        tmp_path / "untied",
    )
    model.save_pretrained(str(tmp_path / "other"))
    expected = answers_of(tmp_path / "other", tmp_path, Weights())
    with at_url(untied, tmp_path) as (engine, session):
        calls = len(engine.calls)
        session.use(weights)
        assert [path for path, _ in engine.calls[calls:]] == REPLACING
        assert session.answers(weights, ASKED, GENERATION) == expected
        assert {body["model"] for body in engine.paths(COMPLETIONS)} == {"base"}
        engine.version = "policy-6-abcd"  # somebody else replaced them
        with pytest.raises(
            StageError, match="the engine answers with the weights 'policy-6-abcd' instead of 'policy-7"
        ):
            session.answers(weights, ASKED, GENERATION)


# ---- servers of the user --------------------------------------------------------------------------------------------


def test_a_server_with_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    with engine_server(base) as engine, session_with(tmp_path, url=engine.url) as session:
        engine.failing = lambda path, number: Failure(status=200, content={"data": [{"id": "gpt-3"}]})
        with pytest.raises(
            ConfigError, match=f"the server at {engine.url} has no model 'base'; it has 'gpt-3'"
        ) as raised:
            session.start(options(base))
    assert raised.value.where == f"{WHERE}.url"
    assert "--served-model-name base" in raised.value.remedy


def test_the_key_is_that_of_the_variable(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINE_KEY", raising=False)
    with engine_server(base, key="secret") as engine:
        with session_with(tmp_path, url=engine.url, api_key_env="ENGINE_KEY") as session:
            with pytest.raises(ConfigError, match="the environment variable ENGINE_KEY is not set"):
                session.start(options(base))
            monkeypatch.setenv("ENGINE_KEY", "secret")
            session.start(options(base))
            assert session.address == (engine.url, "secret")
        with session_with(tmp_path, url=engine.url) as stranger, pytest.raises(StageError, match="401"):
            stranger.start(options(base))


# ---- servers of the stage -------------------------------------------------------------------------------------------


def test_a_server_that_dies_is_started_again_with_the_weights_that_it_had(
    base: Path, tmp_path: Path, adapters: list[Weights], caplog: pytest.LogCaptureFixture
) -> None:
    planted = Planted(dies_at=1, once=str(tmp_path / "died"))
    with started(base, tmp_path, planted) as session, caplog.at_level(logging.WARNING):
        session.use(adapters[0])
        address = session.address
        given = session.answers(adapters[0], ASKED, GENERATION)
        assert session.address != address
        session.use(adapters[1])
        second = session.answers(adapters[1], ASKED, GENERATION)
        folder = session.folder
    assert (tmp_path / "died").exists()
    assert given == answers_of(base, tmp_path, adapters[0])
    assert second == answers_of(base, tmp_path, adapters[1])
    assert "vLLM ended with exit code 3; it will be started again." in caplog.text
    assert not folder.exists()
    assert servers_under(folder) == []


def test_a_server_that_always_dies_is_given_up(base: Path, tmp_path: Path) -> None:
    with started(base, tmp_path, Planted(dies_at=1)) as session:
        with pytest.raises(StageError, match="vLLM ended with exit code 3") as raised:
            session.answers(Weights(), ASKED, GENERATION)
        folder = session.folder
    assert (tmp_path / "engine.log").read_text().count("listening") == 1 + RESTARTS
    assert str(tmp_path / "engine.log") in raised.value.remedy
    assert not folder.exists()


def test_a_hanging_server_is_not_started_again(base: Path, tmp_path: Path) -> None:
    with started(base, tmp_path, Planted(hangs_at=1), timeout=1.0) as session:
        before = time.monotonic()
        with pytest.raises(StageError, match="timed out") as raised:
            session.answers(Weights(), ASKED[:1], GENERATION)
        assert time.monotonic() - before < 15
    assert f"({WHERE}.timeout)" in raised.value.remedy
    assert (tmp_path / "engine.log").read_text().count("listening") == 1


def test_a_session_that_was_closed_starts_nothing(base: Path, tmp_path: Path) -> None:
    """Answers may still be asked for ahead when a stage ends."""
    with started(base, tmp_path, Planted()) as session:
        folder = session.folder
        assert len(servers_under(folder)) == 1
        session.close()
        with pytest.raises(StageError):
            session.answers(Weights(), ASKED, GENERATION)
        assert session._keeper is None
    assert servers_under(folder) == []
