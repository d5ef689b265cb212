"""What HAProxy answers itself, asked of HAProxy as Ray would configure it."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
import pytest

from serve.runtime.front import HOST_VARIABLE, FrontError, haproxy_binary, stand_in, worded
from serve.runtime.local import free_ports, has_haproxy

pytestmark = pytest.mark.skipif(not has_haproxy(), reason="HAProxy is for Linux")

# Two backends without a fallback: a port where nothing listens, and one that ends each connection.
CONFIGURE = """
import sys
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
folder, front, metrics, stats, gone, ending = sys.argv[1], *map(int, sys.argv[2:])
backends = {
    name: BackendConfig(name=name, path_prefix=path, servers=[ServerConfig(name="s", host="127.0.0.1", port=port)])
    for name, path, port in (("gone", "/v2/models/gone", gone), ("ending", "/v2/models/ending", ending))
}
options = HTTPOptions(host="0.0.0.0", port=front)
config = HAProxyConfig(http_options=options, metrics_port=metrics, stats_port=stats, socket_path=f"{folder}/admin.sock")
HAProxyApi(config, backends, config_file_path=f"{folder}/haproxy.cfg")._generate_config_file_internal()
"""


@pytest.fixture(params=["127.0.0.1", None])
async def proxy(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """Where HAProxy answers, started as Ray starts it: on a laptop with a host of its own, on a cluster without."""

    async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"infer" in await reader.readuntil(b"\r\n\r\n"):
            writer.close()
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")  # the proxy asks whether it is well

    ending = await asyncio.start_server(end, "127.0.0.1", 0)
    front, metrics, stats, gone = free_ports(4)
    ports = map(str, (front, metrics, stats, gone, ending.sockets[0].getsockname()[1]))
    environment = {
        **os.environ,
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(tmp_path),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(tmp_path / "server-state"),
    }
    configure = [sys.executable, "-c", CONFIGURE, str(tmp_path), *ports]
    await asyncio.to_thread(subprocess.run, configure, env=environment, check=True, timeout=120)
    config = tmp_path / "haproxy.cfg"
    command = [str(stand_in()), "-db", "-f", str(config)]
    environment = {**os.environ, **({HOST_VARIABLE: request.param} if request.param else {})}
    with (tmp_path / "haproxy.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{front}"
        await answering(url, process, tmp_path / "haproxy.log")
        hosts = {request.param} if request.param else {"*", ""}
        assert set(re.findall(r"^ +bind ([^:]*):", config.read_text(), re.MULTILINE)) == hosts
        assert psutil.Process(process.pid).cmdline()[:1] == [haproxy_binary()]
        yield url
    finally:
        process.kill()
        process.wait()
        ending.close()


async def answering(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + 30
    async with httpx.AsyncClient() as client:
        while True:
            try:
                await client.get(f"{url}/-/routes")
                return
            except httpx.ConnectError:
                assert process.poll() is None and time.monotonic() < ends, log.read_text()
                await asyncio.sleep(0.05)


async def test_its_errors_are_told_as_the_platform_tells_its_own(proxy: str) -> None:
    async with httpx.AsyncClient(base_url=proxy) as client:
        for name, words, code in (
            ("gone", "nothing answers here yet", "model_not_ready"),
            ("ending", "the replica went away before its answer was there", "replica_lost"),
        ):
            reply = await client.post(f"/v2/models/{name}/infer", json={})
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
            assert reply.headers["content-type"] == "application/json"
            assert reply.json()["error"].startswith(words)
            reply = await client.post(f"/v2/models/{name}/v1/infer", json={})
            told = reply.json()["error"]
            assert (reply.status_code, told["type"], told["param"]) == (503, "server_error", None)
            assert told["code"] == code
            assert told["message"].startswith(words)


RAYS = """
frontend prometheus
    bind :9101
frontend http_frontend
    bind *:8000
listen stats
  bind *:8404
defaults
    errorfile 502 /tmp/500.http
    errorfile 503 /tmp/500.http
    errorfile 504 /tmp/500.http
"""


@pytest.mark.parametrize("host", ["192.0.2.1", None])
def test_what_is_worded_already_stays_as_it_is(host: str | None):
    once = worded(RAYS, host)
    assert once != RAYS
    assert worded(once, host) == once


@pytest.mark.parametrize("line", [line for line in RAYS.splitlines() if line.startswith(" ")])
def test_a_configuration_that_is_not_known_is_refused(line: str):
    with pytest.raises(FrontError, match="of HAProxy has"):
        worded(RAYS.replace(line + "\n", "", 1), "192.0.2.1")


def test_the_command_says_what_is_wrong_with_a_configuration(tmp_path: Path):
    unknown = tmp_path / "haproxy.cfg"
    unknown.write_text("global\n")
    for file, words in ((unknown, "of HAProxy has 0 of"), (tmp_path / "none.cfg", "No such file")):
        told = subprocess.run([stand_in(), "-f", file], capture_output=True, text=True, timeout=60, check=False)
        assert (told.returncode, told.stderr.count("\n")) == (1, 1)
        assert told.stderr.startswith("roundhouse-haproxy: ")
        assert words in told.stderr
