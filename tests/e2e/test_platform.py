"""What an operator does to a running platform: edit, break, kill, stop."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.runtime.logs import Follower
from tests.e2e.running import COMMAND, Running, running_platform, wait_until

pytestmark = pytest.mark.e2e

CLASS = '''
import os
import time
import numpy as np
from serve.models.base import Signature, TensorSpec

class Double:
    """Doubles, and tells which process it is."""

    def __init__(self, factor=2):
        self.factor = factor
        self.signature = Signature(
            inputs=(TensorSpec("x", "FP32", (-1, -1), "numbers"),),
            outputs=(TensorSpec("y", "FP32", (-1, -1), "numbers"), TensorSpec("pid", "INT64", (-1,), "process")),
            example={"x": np.array([1, 2], np.float32)},
        )

    def predict(self, batch):
        if any(item["x"].min() < 0 for item in batch):
            print("a number below zero")
            raise ValueError("burst")
        return [{"y": item["x"] * self.factor, "pid": os.getpid()} for item in batch]

class Slow(Double):
    """Takes three seconds over anything but its example, and leaves a file as it begins."""

    def __init__(self, mark):
        super().__init__()
        self.mark = mark

    def predict(self, batch):
        if any(item["x"][0] == 3 for item in batch):
            open(self.mark, "w").close()
            time.sleep(3)
        return super().predict(batch)

class Broken:
    signature = None

    def load(self, context):
        raise ValueError("its weights are garbage")

    def predict(self, batch):
        return batch
'''


def entry(name: str, class_name: str = "Double", more: str = "") -> str:
    return f"  - {{name: {name}, task: python, source: 'file:model.py', options: {{class: {class_name}{more}}}}}\n"


def infer(url: str, model: str, values: list[float], **headers: str) -> httpx.Response:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, len(values)], "data": values}
    return httpx.post(f"{url}/v2/models/{model}/infer", json={"inputs": [tensor]}, headers=headers, timeout=60)


def answer(url: str, model: str) -> tuple[list[float], int]:
    """Return what a model makes of [1, 2], and its process id."""
    response = infer(url, model, [1, 2])
    assert response.status_code == 200, response.text
    outputs = {tensor["name"]: tensor["data"] for tensor in response.json()["outputs"]}
    return outputs["y"], outputs["pid"][0]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("platform")
    (folder / "model.py").write_text(CLASS)
    declaration = folder / "models.yaml"
    declaration.write_text("models:\n" + entry("one") + entry("two"))
    with running_platform(declaration, folder) as running:
        running.wait_for("one")
        running.wait_for("two")
        yield running


class Load:
    """Steady requests to one model from a thread; what they were answered with."""

    def __init__(self, url: str, model: str) -> None:
        self.statuses: Counter[int | str] = Counter()
        self._url, self._model = url, model
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with httpx.Client(timeout=60) as client:
            tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}
            while not self._stop.wait(0.01):
                try:
                    response = client.post(f"{self._url}/v2/models/{self._model}/infer", json={"inputs": [tensor]})
                    self.statuses[response.status_code] += 1
                except httpx.HTTPError as error:
                    self.statuses[repr(error)] += 1

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def test_a_users_class_answers(platform: Running):
    values, _ = answer(platform.url, "one")
    assert values == [2, 4]


def test_the_documents_show_a_request_that_it_answers(platform: Running):
    page = html.unescape(httpx.get(f"{platform.url}/docs").raise_for_status().text)
    assert '"shape": [1, 2]' in page
    assert '"shape": [1, 2]' in "".join(found["message"] for found in events(platform.log))


def test_the_log_of_a_failing_predict_is_one_line_with_the_requests_identifier(platform: Running):
    folder = logs(platform)
    [log] = (folder / "roundhouse").glob("model-one_*.log")
    printed = Follower(folder, log_format="json")
    list(printed.poll())
    headers = {"x-request-id": "order-7", "traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    assert infer(platform.url, "one", [-1], **headers).status_code == 500
    wait_until(lambda: "order-7" in log.read_text())
    [found] = [found for found in events(log) if found.get("request_id") == "order-7"]
    assert (found["model"], found["level"], found["trace_id"]) == ("one", "error", "ab" * 16)
    assert (found["exception"]["type"], found["exception"]["message"]) == ("ValueError", "burst")
    assert 'raise ValueError("burst")' in found["exception"]["stack"]
    # What it printed meanwhile is there at once, and `up` shows what went wrong.
    assert {"model": "one", "message": "a number below zero"}.items() <= json.loads(next(printed.poll())).items()
    wait_until(lambda: "order-7" in platform.log.read_text())


def test_an_edit_changes_only_its_model(platform: Running):
    _, one_before = answer(platform.url, "one")
    with Load(platform.url, "one") as other, Load(platform.url, "two") as own:
        platform.declaration.write_text("models:\n" + entry("one") + entry("two", more=", arguments: {factor: 3}"))
        wait_until(lambda: answered(platform.url, "two") == [3, 6])
    values, one_after = answer(platform.url, "one")
    assert (values, one_after) == ([2, 4], one_before)
    assert set(other.statuses) == {200}
    assert set(own.statuses) == {200}


def test_an_edit_that_fails_leaves_what_was_before(platform: Running):
    before = platform.declaration.read_text()
    values, pid = answer(platform.url, "two")
    with Load(platform.url, "two") as load:
        platform.declaration.write_text("models:\n" + entry("one") + entry("two", "Broken"))
        wait_until(lambda: "two ready: its change failed" in platform.log.read_text())
    assert "its weights are garbage" in platform.log.read_text()
    assert set(load.statuses) == {200}
    assert answer(platform.url, "two") == (values, pid)
    platform.declaration.write_text(before)
    wait_until(lambda: all(not found.get("message") for found in platform.index()))


def test_a_wrong_edit_changes_nothing(platform: Running):
    before = platform.declaration.read_text()
    _, pid = answer(platform.url, "one")
    platform.declaration.write_text(before.replace("task: python", "taks: python", 1))
    wait_until(lambda: "did you mean" in platform.log.read_text())
    assert answer(platform.url, "one")[1] == pid
    platform.declaration.write_text(before)


def test_what_takes_the_place_of_the_declaration_changes_nothing(platform: Running):
    before = platform.declaration.read_text()
    _, pid = answer(platform.url, "one")
    aside = platform.declaration.with_suffix(".before")
    wicked: list[tuple[Callable[[], object], str]] = [
        (lambda: None, "no such file"),
        (platform.declaration.mkdir, "is a folder"),
        (lambda: os.mkfifo(platform.declaration), "is no regular file"),
        (lambda: platform.declaration.symlink_to("/dev/zero"), "is no regular file"),
        (lambda: platform.declaration.symlink_to(platform.declaration), "levels of symbolic links"),
        (lambda: platform.declaration.symlink_to("n" * 300), "name too long"),
        (lambda: platform.declaration.write_bytes(b"models: \xff\x00"), "models.yaml:1"),
        (lambda: platform.declaration.write_bytes(b"#" * 2**22), "is larger than 1 MiB"),
    ]
    platform.declaration.rename(aside)
    try:
        for put, says in wicked:
            told = platform.log.stat().st_size
            put()
            wait_until(lambda says=says, told=told: says in platform.log.read_bytes()[told:].decode())
            told = platform.log.stat().st_size
            remove(platform.declaration)
            platform.declaration.write_text(before)
            wait_until(lambda told=told: "models.yaml changed: " in platform.log.read_bytes()[told:].decode())
            assert answer(platform.url, "one")[1] == pid
            platform.declaration.unlink()
    finally:
        remove(platform.declaration)
        aside.rename(platform.declaration)


def remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except IsADirectoryError:
        path.rmdir()


def test_of_many_quick_edits_the_last_is_served(platform: Running):
    before = platform.declaration.read_text()
    _, pid = answer(platform.url, "one")
    values, _ = answer(platform.url, "two")
    with Load(platform.url, "one") as other, Load(platform.url, "two") as own:
        for factor in range(5, 25):
            edit = platform.declaration.with_suffix(".new")
            edit.write_text("models:\n" + entry("one") + entry("two", more=f", arguments: {{factor: {factor}}}"))
            edit.replace(platform.declaration)
            time.sleep(0.4)  # an editor's pace, faster than a replica starts
        wait_until(lambda: answered(platform.url, "two") == [24, 48])
        platform.declaration.write_text(before)
        wait_until(lambda: answered(platform.url, "two") == values)
    assert answer(platform.url, "one")[1] == pid
    assert set(other.statuses) == {200}
    assert set(own.statuses) == {200}


def test_a_rename_serves_the_new_name_and_ends_the_old(platform: Running):
    before = platform.declaration.read_text()
    with Load(platform.url, "one") as load:
        platform.declaration.write_text(before.replace("name: two,", "name: second,"))
        platform.wait_for("second")
        wait_until(lambda: is_unknown(platform.url, "two"))
        platform.declaration.write_text(before)
        platform.wait_for("two")
        wait_until(lambda: is_unknown(platform.url, "second"))
    assert set(load.statuses) == {200}


def test_a_model_that_fails_says_why_and_stops_nobody(platform: Running):
    before = platform.declaration.read_text()
    platform.declaration.write_text(before + entry("bad", "Broken"))
    platform.wait_for("bad", "failed")
    # The gateway and the fallback each learn of it within a moment.
    wait_until(lambda: "its weights are garbage" in infer(platform.url, "bad", [1]).text)
    response = infer(platform.url, "bad", [1])
    assert response.status_code == 503
    assert "Retry-After" in response.headers
    assert answer(platform.url, "one")[0] == [2, 4]
    platform.declaration.write_text(before)
    wait_until(lambda: all(found["name"] != "bad" for found in platform.index()))


def test_a_killed_replica_comes_back_and_the_others_do_not_notice(platform: Running):
    _, victim = answer(platform.url, "two")
    with Load(platform.url, "one") as other, Load(platform.url, "two") as own:
        wait_until(lambda: own.statuses[200] > 20)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: came_back(platform.url, "two", victim))
    assert set(other.statuses) == {200}
    # What a client sees meanwhile, as the README says: 503, or a connection that is closed in the middle of an answer.
    assert {status for status in own.statuses if isinstance(status, int)} <= {200, 503}


def counted(url: str, model: str) -> float:
    """Requests that replicas of a model have answered, as Prometheus would read it."""
    told = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    wanted = {"model": model, "protocol": "open_inference", "outcome": "ok"}
    name = "roundhouse_requests_total"
    (found,) = (one.value for family in told for one in family.samples if (one.name, one.labels) == (name, wanted))
    return float(found)


def test_a_killed_replica_takes_no_count_with_it(platform: Running):
    for _ in range(5):
        _, victim = answer(platform.url, "two")
    before = counted(platform.url, "two")
    assert before >= 5
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: came_back(platform.url, "two", victim))
    assert counted(platform.url, "two") > before


def test_an_haproxy_that_is_killed_is_soon_replaced(platform: Running):
    # After a change there may be two for a while: the one before finishes what it has.
    victims = proxies(platform)
    assert victims
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    wait_until(lambda: proxies(platform) - victims, within_s=20)  # Ray's own patience is half a minute
    wait_until(lambda: answered(platform.url, "one"))


def test_rays_agent_does_not_look_every_second_for_a_dashboard_that_is_not_there(platform: Running):
    log = logs(platform) / "dashboard_agent.log"
    known = "Get dashboard http address failed"
    wait_until(lambda: time.time() - log.stat().st_mtime > 5 or log.read_text().count(known) > 20)
    assert log.read_text().count(known) <= 20


def test_what_is_open_without_a_token_listens_on_this_machine_alone(platform: Running):
    listening = [
        tuple(found.laddr)
        for process in proxies(platform)
        for found in process.net_connections("tcp")
        if found.status == psutil.CONN_LISTEN
    ]
    assert ("127.0.0.1", platform.port) in listening
    assert {address for address, _ in listening} == {"127.0.0.1"}


def test_status_is_json_for_scripts(platform: Running):
    # A replica that another test ended is back before the gateway has been told of it.
    platform.wait_for("two")
    done = platform.command("status", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {model["name"]: model["phase"] for model in told["models"]} == {"one": "ready", "two": "ready"}


def test_predict_asks_a_model(platform: Running):
    done = platform.command("predict", "one", "1,2,3")
    assert done.returncode == 0, done.stderr
    assert "2, 4, 6" in done.stdout


def test_a_taken_port_is_named(platform: Running):
    done = platform.command("up", str(platform.declaration))
    assert done.returncode == 1
    assert str(platform.port) in done.stderr
    assert "Traceback" not in done.stderr


def test_down_answers_what_is_in_flight_and_leaves_no_process_port_or_file(tmp_path: Path):
    (tmp_path / "model.py").write_text(CLASS)
    declaration = tmp_path / "models.yaml"
    mark = tmp_path / "mark"
    declaration.write_text("models:\n" + entry("one") + entry("slow", "Slow", f", arguments: {{mark: '{mark}'}}"))
    before = set(Path("/tmp").glob("rh-*"))
    with running_platform(declaration, tmp_path) as running, ThreadPoolExecutor() as pool:
        running.wait_for("one")
        running.wait_for("slow")
        in_flight = pool.submit(infer, running.url, "slow", [3])
        wait_until(mark.exists)
        family = psutil.Process(running.process.pid).children(recursive=True)
        assert len(family) > 3
        done = running.command("down")
        assert done.returncode == 0, done.stderr
        assert running.process.wait(timeout=60) == 0
        assert in_flight.result().status_code == 200
        assert [
            process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        ] == []
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", running.port)) != 0
        assert set(Path("/tmp").glob("rh-*")) <= before
        assert running.command("status").returncode == 1
        assert list((tmp_path / "state").glob("*")) == []


@pytest.fixture
def heard_hangup() -> Iterator[None]:
    """The end of a terminal, as a program on one hears of it: below `nohup` it is ignored, by the platform as well."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heard_hangup")
def test_a_closed_terminal_drains_and_leaves_no_process(tmp_path: Path):
    (tmp_path / "model.py").write_text(CLASS)
    declaration = tmp_path / "models.yaml"
    mark = tmp_path / "mark"
    declaration.write_text("models:\n" + entry("slow", "Slow", f", arguments: {{mark: '{mark}'}}"))
    with running_platform(declaration, tmp_path) as running, ThreadPoolExecutor() as pool:
        running.wait_for("slow")
        in_flight = pool.submit(infer, running.url, "slow", [3])
        wait_until(mark.exists)
        family = psutil.Process(running.process.pid).children(recursive=True)
        # Its terminal's kernel tells every process of the group, and a shell tells once more.
        os.killpg(running.process.pid, signal.SIGHUP)
        os.kill(running.process.pid, signal.SIGHUP)
        assert running.process.wait(timeout=60) == 0
        assert in_flight.result().status_code == 200
        wait_until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family))


def test_a_node_that_ends_is_told_with_its_log_and_leaves_no_process(tmp_path: Path):
    (tmp_path / "model.py").write_text(CLASS)
    declaration = tmp_path / "models.yaml"
    declaration.write_text("models:\n" + entry("one"))
    with running_platform(declaration, tmp_path) as running:
        running.wait_for("one")
        family = psutil.Process(running.process.pid).children(recursive=True)
        next(process for process in family if process.name() == "raylet").kill()
        assert running.process.wait(timeout=60) == 1
        [told] = re.findall(r"Ray's raylet has ended \(signal 9\).* look into (\S+)", running.log.read_text())
        assert Path(told).is_file()
        shutil.rmtree(Path(told).parents[1])
        wait_until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family))


def test_a_wrong_declaration_starts_nothing(tmp_path: Path):
    import subprocess

    declaration = tmp_path / "models.yaml"
    declaration.write_text("models:\n  - name: a\n    taks: python\n")
    done = subprocess.run([*COMMAND, "up", str(declaration)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "models.yaml:3" in done.stderr
    assert "did you mean task" in done.stderr


def proxies(platform: Running) -> set[psutil.Process]:
    """Return the HAProxy processes of a platform."""
    found = set()
    for process in psutil.Process(platform.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "haproxy":
                found.add(process)
    return found


def logs(platform: Running) -> Path:
    """Return the folder of Ray's and our logs."""
    [told] = [found for found in events(platform.log) if found["message"].startswith("serving on ")]
    return Path(told["message"].rpartition(" logs in ")[2])


def events(log: Path) -> list[dict[str, Any]]:
    """Return the events of a file that has nothing else; Ray prints a line or two into that of `up`."""
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def answered(url: str, model: str) -> list[float] | None:
    """Return what a model makes of [1, 2], or None while it does not answer."""
    try:
        return answer(url, model)[0]
    except (AssertionError, httpx.HTTPError):
        return None


def is_unknown(url: str, model: str) -> bool:
    """Return whether a model is not served and not to come."""
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/v2/models/{model}").status_code == 404
    return False


def came_back(url: str, model: str, victim: int) -> bool:
    """Return whether a model answers from another process than `victim`."""
    try:
        return answer(url, model)[1] != victim
    except (AssertionError, httpx.HTTPError):
        return False
