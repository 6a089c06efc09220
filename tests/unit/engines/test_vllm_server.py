"""An engine's environment and the command of its server: no defaults of a model, and nothing open needlessly."""

from __future__ import annotations

import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from alignment.config.launch import Engine, SamplingConfig
from alignment.core.files import shipped
from alignment.engines import engine_environment
from alignment.engines.engine_environment import ENGINES, interpreter
from alignment.engines.server_process import VllmOptions, vllm_command

CONFIG = SamplingConfig(engine=Engine.vllm, cache_gb=0.5, gpu_share=0.4)
OPTIONS = VllmOptions(model=Path("/model"), dtype="bfloat16", max_length=640)
ALWAYS = [
    *("/env/python", "-m", "vllm.entrypoints.openai.api_server"),
    *("--model", "/model", "--served-model-name", "base", "--skip-tokenizer-init"),
    *("--dtype", "bfloat16", "--max-model-len", "640"),
    *("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"),
    *("--host", "127.0.0.1", "--port", "{port}", "--disable-uvicorn-access-log"),
]
ON_CPU = ["--enforce-eager", "--no-enable-chunked-prefill", "--kv-cache-memory-bytes", str(1 << 29)]
DEV = "VLLM_SERVER_DEV_MODE"


def test_a_server_on_a_cpu() -> None:
    command = vllm_command(Path("/env/python"), CONFIG, OPTIONS)
    assert list(command.argv) == [*ALWAYS, *ON_CPU]
    assert command.environment["VLLM_API_KEY"] == "{key}"
    assert command.environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "VLLM_CPU_KVCACHE_SPACE" not in command.environment  # vLLM takes whole numbers there
    assert command.environment["VLLM_NO_USAGE_STATS"] == command.environment["DO_NOT_TRACK"] == "1"
    assert (command.smaller, command.larger) == ("lower sampling.cache_gb", "raise sampling.cache_gb")


def test_a_server_on_a_gpu() -> None:
    command = vllm_command(Path("/env/python"), CONFIG, replace(OPTIONS, on_gpu=True))
    assert list(command.argv) == [*ALWAYS, "--gpu-memory-utilization", "0.4"]
    assert not any("CPU" in name for name in command.environment)
    assert command.smaller == "lower sampling.gpu_share"
    assert command.larger == "raise sampling.gpu_share, or use a smaller model"


@pytest.mark.parametrize(("rank", "prepared"), [(1, "8"), (8, "8"), (9, "16"), (512, "512")])
def test_a_server_is_prepared_for_the_rank_above(rank: int, prepared: str) -> None:
    argv = vllm_command(Path("/env/python"), CONFIG, replace(OPTIONS, rank=rank)).argv
    assert list(argv) == [*ALWAYS, *("--enable-lora", "--max-lora-rank", prepared, "--max-loras", "2"), *ON_CPU]


def test_endpoints_without_a_key_are_open_only_where_all_weights_are_replaced() -> None:
    assert DEV not in vllm_command(Path("/env/python"), CONFIG, replace(OPTIONS, rank=8)).environment
    assert vllm_command(Path("/env/python"), CONFIG, replace(OPTIONS, replaceable=True)).environment[DEV] == "1"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ALIGNMENT_ENGINE_PYTHON", raising=False)
    return tmp_path


def wheel(folder: Path, name: str) -> Path:
    path = folder / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{name}-1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        archive.writestr(f"{name}-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.dist-info/RECORD", "")
    return path


def test_an_environment_has_its_engine_and_not_what_does_not_fit(cache: Path, tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("".join(f"{wheel(tmp_path, name)}\n" for name in ("vllm", "torchaudio")))
    assert engine_environment.main(["vllm", "--requirements", str(requirements)]) == 0
    python = interpreter(None, package="vllm", where="sampling.python")
    assert python == cache / "alignment/engines/vllm/bin/python"
    for name, code in (("vllm", 0), ("torchaudio", 1)):
        assert subprocess.run([python, "-c", f"import {name}"], check=False, capture_output=True).returncode == code


@pytest.mark.parametrize(("tool", "name"), [("/usr/bin/nvidia-smi", "vllm.txt"), (None, "vllm-cpu.txt")])
def test_the_build_of_vllm_suits_the_machine(tool: str | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: tool)
    assert engine_environment.requirements_of("vllm") == shipped("launch") / "engines" / name
    assert engine_environment.requirements_of("llama-cpp").name == "llama-cpp.txt"
    assert all((shipped("launch") / "engines" / f"{engine}.txt").is_file() for engine in ENGINES)
