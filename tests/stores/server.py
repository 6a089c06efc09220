"""A SeaweedFS server on this machine, which speaks S3, and what a test looks at in it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ACCESS_KEY = "AKIAALIGNMENTTEST"
SECRET_KEY = "s3cr3t-of-the-tests-0123456789"
BUCKET = "models"
_START_SECONDS = 60.0


def program() -> str | None:
    """The ``weed`` program beside this interpreter or on the path, if it is installed."""
    beside = Path(sys.prefix) / "bin" / "weed"
    return str(beside) if beside.is_file() else shutil.which("weed")


def free_port() -> int:
    """A port that nobody listens on, and whose gRPC port, 10,000 above, is free too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            if port > 30_000 and port + 10_000 > 65_535:
                port -= 20_000
            try:
                second.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            return port


class S3Server:
    """The server with one bucket; ``environment`` is what a client needs."""

    def __init__(self, weed: str, folder: Path) -> None:
        self._weed, self._folder = weed, folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a client that nothing of this machine's own settings reaches."""
        return environment_for(f"http://127.0.0.1:{self.port}")

    def start(self) -> None:
        allowed = {"credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}], "actions": ["Admin"]}
        config = self._folder / "identities.json"
        config.write_text(json.dumps({"identities": [{"name": "tests", **allowed}]}))
        data = self._folder / "data"
        data.mkdir()
        ports = {name: free_port() for name in ("master", "volume", "filer")}
        argv = [
            *(self._weed, "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"),
            *(f"-s3.port={self.port}", f"-s3.config={config}", f"-master.port={ports['master']}"),
            *(f"-volume.port={ports['volume']}", f"-filer.port={ports['filer']}", "-volume.max=50"),
            *("-master.volumeSizeLimitMB=64", "-master.telemetry=false", "-s3.autoCreateBucket=false"),
            *("-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        ]
        environment = {**os.environ, "TMPDIR": str(self._folder)}
        with (self._folder / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                argv, stdout=log, stderr=subprocess.STDOUT, cwd=self._folder, env=environment
            )
        self._wait()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @functools.cache  # noqa: B019 - one client for the one server of a session
    def files(self) -> Any:
        """A client of our own, for looking at what is stored."""
        import s3fs

        return s3fs.S3FileSystem(
            key=ACCESS_KEY,
            secret=SECRET_KEY,
            client_kwargs={"endpoint_url": f"http://127.0.0.1:{self.port}", "region_name": "us-east-1"},
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def keys(self, prefix: str) -> list[str]:
        """The keys under a prefix of the bucket, without bucket and prefix."""
        start = f"{BUCKET}/{prefix}/"
        return sorted(path.removeprefix(start) for path in self.files().find(start))

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            assert self._process is not None
            assert self._process.poll() is None, (self._folder / "log.txt").read_text()[-3000:]
            try:
                files = self.files()
                files.mkdir(BUCKET)
                files.pipe_file(f"{BUCKET}/ready", b"1")
                return
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)


def environment_for(endpoint: str) -> dict[str, str]:
    """The variables of a client of a server at ``endpoint``."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
