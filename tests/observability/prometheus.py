"""A real Prometheus: Debian's package, started on a free port of the loopback interface."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from demo.preflight import cache_dir
from tests.e2e.kube import wait_for

START_SECONDS = 30


@dataclass(frozen=True)
class Prometheus:
    """Answers queries over HTTP."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result vector of an instant query, now."""
        answer = self._get("query", query=expression)
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def targets(self) -> list[dict[str, Any]]:
        """What is scraped now."""
        found: list[dict[str, Any]] = self._get("targets", state="active")["data"]["activeTargets"]
        return found

    def _get(self, path: str, **parameters: str) -> dict[str, Any]:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address, timeout=10) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


@contextmanager
def running(config: dict[str, Any], folder: Path) -> Iterator[Prometheus]:
    """Runs Prometheus with a configuration; its data and log are in `folder`."""
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    subprocess.run([binary("promtool"), "check", "config", str(file)], check=True, capture_output=True, timeout=60)
    port = _free_port()
    command = [
        binary("prometheus"),
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    log = folder / "prometheus.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder)
    try:
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        wait_for("Prometheus", lambda: _answers(prometheus), START_SECONDS, log.read_text)
        yield prometheus
    finally:
        process.terminate()
        process.wait(30)


def binary(name: str) -> str:
    """`prometheus` or `promtool`: of PATH, else unpacked from Debian's package, which is not installed (it is a service)."""
    if found := shutil.which(name):
        return found
    folder = cache_dir() / "tools" / "prometheus"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as new:
            # apt drops its rights for a download, and complains where it cannot write then.
            options = ["-o", "APT::Sandbox::User=root"]
            if os.geteuid() == 0:
                subprocess.run(["apt-get", "update", "-qq"], check=True, timeout=300)
            subprocess.run(["apt-get", *options, "download", "-qq", "prometheus"], cwd=new, check=True, timeout=300)
            package = next(Path(new).glob("prometheus_*.deb"))
            subprocess.run(["dpkg-deb", "--extract", str(package), f"{new}/root"], check=True, timeout=60)
            (Path(new) / "root").rename(folder)
    return str(folder / "usr" / "bin" / name)


def _answers(prometheus: Prometheus) -> bool:
    try:
        return bool(prometheus.query("vector(1)"))
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
