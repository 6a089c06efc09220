"""``align serve``: policies behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.console import Console

from alignment.commands.serve.vllm_layout import VllmFiles, VllmLayout, refuse_prefix, vllm_layout
from alignment.commands.shared.arguments import add_output, add_policies, runs_of
from alignment.commands.shared.listening import listening, refuse_without_page_libraries
from alignment.commands.shared.policy_finder import PolicyFinder
from alignment.commands.shared.stored_policy import StoredPolicy, written_error
from alignment.core import hardware
from alignment.core.errors import ConfigError, StageError
from alignment.core.files import write_text
from alignment.core.terminal import Terminal, shorten
from alignment.engines import server_process
from alignment.engines.engine_environment import interpreter
from alignment.engines.server_process import HOST, PORT, Keeper, ServerCommand, ServerProcess
from alignment.evaluation.endpoint_client import api_key
from alignment.pipeline.backends import command

ENGINES = ("transformers", "vllm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run, its arms, and what serves them."""
    parser.description = (
        "Serves policies of a run on this machine (127.0.0.1) with an OpenAI-compatible API, each under its own "
        "model name, until Ctrl-C."
    )
    add_policies(parser)
    add = parser.add_argument
    add("--engine", choices=ENGINES, default=ENGINES[0], help="the engine that serves (default: transformers)")
    add("--port", type=int, default=8000, metavar="N", help="port; 0 takes any free port (default: 8000)")
    add(
        "--engine-python",
        metavar="PATH",
        help="Python of the environment that has vLLM (default: ALIGNMENT_ENGINE_PYTHON, or "
        "~/.cache/alignment/engines/vllm)",
    )
    add("--api-key-env", metavar="VARIABLE", help="the environment variable with the key that clients must send (vLLM)")
    add("--tool-parser", metavar="NAME", help="vLLM's parser for tool calls in answers (default: hermes)")
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Serves until the user ends it; returns the exit code."""
    options = Options(**{field.name: getattr(arguments, field.name) for field in fields(Options)})
    output, (result,) = runs_of(arguments, arguments.result)
    return serve(console, result, arguments.arms, options=options, output=output)


WHERE = "align serve"
KEY_WHERE, _WITHOUT = "--api-key-env", "leave the option out"
START_SECONDS = 3600.0
"""Loading large weights from a slow disk takes long; Ctrl-C ends the wait."""
_SLOW_ON_CPU = "there is no GPU here: on a CPU the default engine was faster than vLLM (docs/serving.md#engines)"
_LINES = 30
"""Lines of a log that are shown when a server has failed."""
_POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The options of the command line; None where the default applies."""

    engine: str = "transformers"
    port: int = 8000
    engine_python: str | None = None
    api_key_env: str | None = None
    tool_parser: str | None = None


def serve(console: Console, result: str, arms: Sequence[str], *, options: Options, output: Path) -> int:
    """Serves until Ctrl-C; returns the exit code. Raises ConfigError, ArtifactError, ModelError, DataError, Busy,
    StageError."""
    python = _environment(options)
    policies = PolicyFinder(console, result, output).policies(arms)
    names = [policy.name for policy in policies]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        message = f"{names.count(repeated)} arms are called {repeated}"
        raise ConfigError(message, where="--arm", remedy="name each once")
    for policy in policies:
        refuse_prefix(policy)
    layout = None if python is None else vllm_layout(policies)
    if python is not None and not hardware.count_devices():
        _print(console, _SLOW_ON_CPU)
    with listening(options.port):
        pass  # a port that cannot be had is refused before anything is loaded
    with Keeper() as keeper:
        log = keeper.folder / "server.log"
        try:
            command = _command(console, keeper, log, policies, layout, python, options)
            server = _start(keeper, command, log, options.port or None)
            _introduce(console, server, policies, layout, options)
            with suppress(KeyboardInterrupt):
                while not server.has_ended:
                    shorten(log)
                    time.sleep(_POLL_SECONDS)
                raise server.failure()
            _print(console, "stopped")
        except StageError:
            if log.is_file():
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES:]
                _print(Terminal(stderr=True), "\n".join(lines))
            raise
    return 0


def _environment(options: Options) -> Path | None:
    """The interpreter that has vLLM, or None for the default engine."""
    if options.engine == "vllm":
        api_key(options.api_key_env, where=KEY_WHERE, without=_WITHOUT)  # refused before anything is written
        return interpreter(options.engine_python, package="vllm", where="--engine-python")
    for name in ("engine_python", "api_key_env", "tool_parser"):
        if getattr(options, name) is not None:
            where, remedy = f"--{name.replace('_', '-')}", "leave it out, or use --engine vllm"
            raise ConfigError("only vLLM has this option", where=where, remedy=remedy)
    refuse_without_page_libraries(where=WHERE, needs="the default engine needs")
    return None


def _command(
    console: Console,
    keeper: Keeper,
    log: Path,
    policies: Sequence[StoredPolicy],
    layout: VllmLayout | None,
    python: Path | None,
    options: Options,
) -> ServerCommand:
    settings = keeper.folder / "serve.json"
    write_text(settings, json.dumps({"policies": list(map(asdict, policies)), "engine": options.engine}))
    if python is None or layout is None:
        _print(console, f"loading {', '.join(policy.name for policy in policies)} …")
        return worker_command("the server", settings)
    key = api_key(options.api_key_env, where=KEY_WHERE, without=_WITHOUT)
    _print(console, "writing what vLLM loads …")
    code = keeper.run(worker_command("", settings), log=log)
    if error := written_error(keeper.folder / "error.json"):
        raise error
    if code != 0:
        raise StageError(f"the files for vLLM could not be written (exit code {code})", where=WHERE, remedy=_LOOK)
    _print(console, "starting vLLM, which takes about a minute …")
    files = VllmFiles(folder=keeper.folder)
    return vllm_command(python, files, layout, dtype=policies[0].dtype, api_key=key, tool_parser=options.tool_parser)


_LOOK = "the end of its log is above"


def _start(keeper: Keeper, command: ServerCommand, log: Path, port: int | None) -> ServerProcess:
    try:
        return ServerProcess(keeper, command, log=log, where=WHERE, start_timeout=START_SECONDS, port=port, look=_LOOK)
    except StageError as error:
        raise (written_error(keeper.folder / "error.json") or error) from error


def _introduce(
    console: Console,
    server: ServerProcess,
    policies: Sequence[StoredPolicy],
    layout: VllmLayout | None,
    options: Options,
) -> None:
    width = max(len(policy.name) for policy in policies)
    _print(console, f"serving at {server.url}/v1 (Ctrl-C ends):")
    for policy in policies:
        _print(console, f"  {policy.name:<{width}}  {policy.described}")
    names = [policy.name for policy in policies]
    if layout is not None and layout.weights_name not in names:
        _print(console, f"their shared base also answers, as {layout.weights_name}")
    _print(console, f"try:\n  {_curl(server.url, names[-1], options.api_key_env)}")


def _curl(url: str, model: str, key_variable: str | None) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64}
    key = f' -H "Authorization: Bearer ${key_variable}"' if key_variable else ""
    return (
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


CACHE, CACHE_GB = "VLLM_CPU_KVCACHE_SPACE", "1"
"""The variable for GiB of keys and values without a GPU, and its value unless the user sets another."""
TOOL_PARSER = "hermes"
"""Reads ``<tool_call>{…}</tool_call>``, which most ChatML families write; other answers stay text."""


def worker_command(name: str, settings: Path) -> ServerCommand:
    """The process on the worker's side, which serves with transformers or writes files for vLLM."""
    return ServerCommand(
        name=name,
        argv=[sys.executable, "-m", "alignment.commands.serve.worker", str(settings), PORT],
        environment=command.of_worker(hardware.count_cores(), os.environ.get("PYTHONPATH", "")),
        smaller="serve fewer arms",
    )


def vllm_command(
    python: Path, files: VllmFiles, layout: VllmLayout, *, dtype: str, api_key: str, tool_parser: str | None
) -> ServerCommand:
    """A vLLM server of the layout's policies. An empty ``api_key`` asks for none."""
    on_gpu = hardware.count_devices() > 0
    variables = server_process.quiet_environment() | {"VLLM_API_KEY": api_key}
    if not on_gpu:
        variables |= {CACHE: os.environ.get(CACHE, CACHE_GB)} | server_process.NO_BINDING
    adapters = [json.dumps({"name": arm.name, "path": str(files.adapter(arm))}) for arm in layout.arms]
    rank = max((arm.rank for arm in layout.arms), default=0)
    return ServerCommand(
        name="vLLM",
        argv=[
            *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(layout.weights or files.merged), "--served-model-name", layout.weights_name),
            *("--tokenizer", str(files.tokenizer), "--generation-config", str(files.generation)),
            *("--dtype", dtype, "--max-model-len", "-1"),  # the longest that fits
            *("--enable-auto-tool-choice", "--tool-call-parser", tool_parser or TOOL_PARSER),
            *("--host", HOST, "--port", PORT, "--disable-uvicorn-access-log"),
            *server_process.adapter_arguments(rank, len(adapters)),
            *(("--lora-modules", *adapters) if adapters else ()),
            *(() if on_gpu else server_process.ON_CPU),
        ],
        environment=variables,
        smaller="use a smaller model" if on_gpu else f"lower {CACHE} (GiB)",
        larger="use a smaller model" if on_gpu else f"raise {CACHE} (GiB)",
    )
