"""Artifacts in S3: reuse and continuation on other machines, kills at any moment, refusals, credentials nowhere."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Align
from tests.stores.conftest import LONG, SHORT, Machine, kill_all, until
from tests.stores.proxy import HoldingProxy
from tests.stores.server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server, environment_for, free_port

pytestmark = pytest.mark.stores

MakeMachine = Callable[[], Machine]


@contextmanager
def held_at(server: S3Server, *, pattern: bytes, holds: str, letting: int = 3000) -> Iterator[HoldingProxy]:
    """A proxy that stops in the middle of the objects that match."""
    proxy = HoldingProxy(server.port, pattern=pattern, holds=holds, letting=letting)
    try:
        yield proxy
    finally:
        proxy.close()


def steps(align: Align, stage: str) -> list[int]:
    lines = (align.artifact(stage) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def states(machine: Machine) -> dict[str, str]:
    return {name: stage["state"] for name, stage in machine.align.stages().items()}


def everything_in(folder: Path) -> Iterator[tuple[Path, bytes]]:
    return ((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())


def test_another_machine_reuses_what_the_first_has_made(
    machines: MakeMachine, server: S3Server, undisturbed: Align
) -> None:
    first, second = machines(), machines()
    first("run", *SHORT)
    assert first.align.weights() == undisturbed.weights()
    manifests = {path.parent.name: path.read_bytes() for path in first.output.glob("artifacts/*/manifest.json")}
    shutil.rmtree(first.output)

    planned = second("plan", *SHORT)
    for name in manifests:
        assert f"{name} from the store" in planned
    assert f"store: s3://{BUCKET}/{second.prefix}" in planned
    assert re.search(r"\bsft .* fetch ", planned, re.MULTILINE)
    assert "0 to run, 2 reused, 2 of them from the store" in planned
    assert not list(second.output.iterdir()), "a plan writes nothing"

    second("run", *SHORT)
    assert states(second) == {"sft": "reused", "dpo": "reused"}
    assert second.align.weights() == undisturbed.weights()
    assert {
        path.parent.name: path.read_bytes() for path in second.output.glob("artifacts/*/manifest.json")
    } == manifests
    assert f"store: s3://{BUCKET}/{second.prefix}" in second.align_status()
    assert not [key for key in server.keys(second.prefix) if not key.startswith("artifacts/")], "nothing is left over"
    assert "here and in the store" in second("plan", *SHORT)


def test_a_lost_machine_s_stage_is_continued_by_another(
    machines: MakeMachine, server: S3Server, undisturbed_long: Align
) -> None:
    first, second = machines(), machines()
    process = first.start(*LONG)
    until(lambda: [key for key in server.keys(first.prefix) if key.endswith("-000000.json")], process)
    kill_all(process)
    shutil.rmtree(first.output)

    resumed = re.search(r"\bsft .* resume +from checkpoint-(\d+) in the store", second("plan", *LONG), re.MULTILINE)
    assert resumed is not None
    assert int(resumed[1]) > 0
    busy = second("run", *LONG, code=8)
    assert f"in use by process {process.pid} on " in busy
    assert "--wait" in busy
    printed = second("run", *LONG, "--wait")
    assert f"checkpoint-{resumed[1]} was downloaded" in printed
    assert second.align.weights() == undisturbed_long.weights()
    assert steps(second.align, "sft") == steps(undisturbed_long, "sft")


def test_a_kill_during_an_upload_leaves_nothing_that_counts(
    machines: MakeMachine, server: S3Server, undisturbed: Align
) -> None:
    first, second = machines(), machines()
    weights = rb"PUT /\S+/artifacts/sft-\S+safetensors"
    with held_at(server, pattern=weights, holds="request") as proxy:
        process = first.through(environment_for(f"http://127.0.0.1:{proxy.port}")).start(*SHORT)
        until(proxy.held.is_set, process)
        kill_all(process)
    assert not [key for key in server.keys(first.prefix) if key.endswith("manifest.json")]

    planned = first("plan", *SHORT)
    assert re.search(r"\bsft .* reuse .*here; a run will upload it", planned, re.MULTILINE), planned
    first("run", *SHORT)
    assert states(first) == {"sft": "reused", "dpo": "done"}
    shutil.rmtree(first.output)
    second("run", *SHORT)
    assert states(second) == {"sft": "reused", "dpo": "reused"}
    assert second.align.weights() == undisturbed.weights()


def test_a_kill_during_a_download_leaves_nothing_that_counts(
    machines: MakeMachine, server: S3Server, undisturbed: Align
) -> None:
    first, second = machines(), machines()
    first("run", *SHORT)
    shutil.rmtree(first.output)
    weights = rb"GET /\S+/artifacts/sft-\S+safetensors"
    with held_at(server, pattern=weights, holds="response") as proxy:
        process = second.through(environment_for(f"http://127.0.0.1:{proxy.port}")).start(*SHORT)
        until(proxy.held.is_set, process)
        kill_all(process)
    assert not list(second.output.glob("artifacts/*/manifest.json"))
    assert list(second.output.glob("artifacts/sft-*.work/download/**/*")), "it was in the middle"
    second("run", *SHORT)
    assert states(second) == {"sft": "reused", "dpo": "reused"}
    assert second.align.weights() == undisturbed.weights()


def test_two_machines_at_once_make_a_stage_once(machines: MakeMachine, undisturbed: Align) -> None:
    first, second = machines(), machines()
    of_first, of_second = first.start(*SHORT, "--wait"), second.start(*SHORT, "--wait")
    printed = [process.communicate(timeout=300)[0] for process in (of_first, of_second)]
    assert [of_first.returncode, of_second.returncode] == [0, 0], printed
    for stage in ("sft", "dpo"):
        assert sorted(states(machine)[stage] for machine in (first, second)) == ["done", "reused"], printed
    for machine in (first, second):
        assert machine.align.weights() == undisturbed.weights()


def test_a_stop_uploads_the_last_checkpoint_before_the_command_ends(machines: MakeMachine, server: S3Server) -> None:
    machine = machines()
    process = machine.start(*LONG, "stages.sft.save_every=100000", "stages.sft.optim.epochs=6000")
    until(lambda: list(machine.output.glob("artifacts/sft-*.work/content/metrics.jsonl")), process)
    time.sleep(1)
    process.terminate()
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 75, printed
    stored = [key for key in server.keys(machine.prefix) if key.endswith("-000000.json")]
    assert len(stored) == 1, printed
    assert not [key for key in server.keys(machine.prefix) if key.endswith("lease.json")], "it has given its lease back"


@pytest.mark.parametrize(
    ("variables", "url", "code", "expected"),
    [
        ({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}, f"s3://{BUCKET}/a", 11, "cannot be reached"),
        ({}, "s3://no-such-bucket/a", 11, "no such bucket"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret-0123456789"}, f"s3://{BUCKET}/a", 11, "refused these credentials"),
        ({"AWS_ACCESS_KEY_ID": "AKIAUNKNOWN00000"}, f"s3://{BUCKET}/a", 11, "refused these credentials"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, f"s3://{BUCKET}/a", 11, "no credentials"),
        ({}, "s3://user:hunter2hunter2@models/a", 2, "without a key or a password in it"),
        (
            {"AWS_ENDPOINT_URL": "http://user:hunter2hunter2@127.0.0.1:1"},
            f"s3://{BUCKET}/a",
            2,
            "contains a user name or a password",
        ),
        ({}, "ftpx://models/a", 2, "stores of the kind ftpx:// are not supported"),
    ],
    ids=["unreachable", "bucket", "secret", "key", "none", "user", "endpoint", "scheme"],
)
def test_a_plan_refuses_a_store_that_it_cannot_use(
    machines: MakeMachine, variables: dict[str, str], url: str, code: int, expected: str
) -> None:
    machine = machines().through(variables)
    started = time.monotonic()
    for verb in ("plan", "run"):
        printed = machine.align(verb, f"artifacts={url}", *SHORT, code=code)
        assert expected in printed
        assert "Traceback" not in printed
        for secret in (SECRET_KEY, "wrong-secret", "hunter2"):
            assert secret not in printed
    assert time.monotonic() - started < 60
    assert not list(machine.output.iterdir()), "nothing was started"


def test_credentials_are_nowhere(machines: MakeMachine, server: S3Server) -> None:
    machine = machines()
    printed = machine("run", *SHORT)
    stored = [(key, server.files().cat_file(f"{BUCKET}/{machine.prefix}/{key}")) for key in server.keys(machine.prefix)]
    assert len(stored) > 10
    for name, content in [*everything_in(machine.output), *stored, ("printed", printed.encode())]:
        assert SECRET_KEY.encode() not in content, name
        assert ACCESS_KEY.encode() not in content, name


def test_a_full_disk_while_downloading_is_said_and_nothing_counts(machines: MakeMachine) -> None:
    first, second = machines(), machines()
    first("run", *SHORT)
    limit = 40_000  # bytes of a file: less than the weights
    argv = second.align.argv("run", f"artifacts=s3://{BUCKET}/{second.prefix}", *SHORT)
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        env=second.align.environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        timeout=120,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 12, printed
    assert "limit on file sizes" in printed
    assert not list(second.output.glob("artifacts/*/manifest.json"))
    second("run", *SHORT)
    assert states(second) == {"sft": "reused", "dpo": "reused"}
