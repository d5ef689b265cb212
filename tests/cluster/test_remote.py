"""The command line against a cluster, over HTTP to a small API server."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from serve.api.explanation import example
from serve.cli import main
from tests.cluster.kubeconfigs import WRONG, configuration, put

MODELS = "/apis/roundhouse.dev/v1alpha1/namespaces/shop/models"
PODS = "/api/v1/namespaces/shop/pods"
METADATA = {"platform": "roundhouse_python", "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}]}
ANSWERED = {"outputs": [{"name": "label", "datatype": "BYTES", "shape": [1], "data": ["a purring cat"]}]}


@contextlib.contextmanager
def serving(handler):
    """Yield the port that an HTTP server answers on."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


class Answers(BaseHTTPRequestHandler):
    """Answers what `answers` has for a path: text as it is, anything else as JSON, a port by forwarding to it."""

    answers: dict[str, tuple[int, object]]

    def do_GET(self):
        status, answer = self.answers.get(self.path.partition("?")[0], (404, {"message": "not found"}))
        if status == 101:
            forward(self, answer)
            return
        body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass


def forward(request, port):
    """Do as the API server does with a port that is forwarded: a WebSocket, whose frames begin with their channel."""
    key = request.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    request.send_response(101)
    request.send_header("upgrade", "websocket")
    request.send_header("connection", "upgrade")
    request.send_header("sec-websocket-protocol", "v4.channel.k8s.io")
    request.send_header("sec-websocket-accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
    request.end_headers()
    request.close_connection = True

    def send(channel, data, kind=0x82):
        payload = bytes([channel]) + data if kind == 0x82 else b""
        request.wfile.write(struct.pack(">BBH", kind, 126, len(payload)) + payload)

    for channel in (0, 1):
        send(channel, struct.pack("<H", 8000))
    with socket.create_connection(("127.0.0.1", port)) as pod:

        def back():
            while data := pod.recv(2**14):
                send(0, data)
            send(0, b"", kind=0x88)

        thread = threading.Thread(target=back)
        thread.start()
        with contextlib.suppress(OSError):
            while (data := receive(request.rfile)) is not None:
                pod.sendall(data[1:])
            pod.shutdown(socket.SHUT_WR)
        thread.join()


def receive(stream):
    """Return the payload of a client's frame, or None at the end."""
    begin = stream.read(2)
    if len(begin) < 2 or begin[0] & 15 == 8:
        return None
    length = begin[1] & 127
    if length == 126:
        (length,) = struct.unpack(">H", stream.read(2))
    mask = stream.read(4)
    return bytes(byte ^ mask[n % 4] for n, byte in enumerate(stream.read(length)))


@pytest.fixture
def kubeconfig(tmp_path, monkeypatch):
    """Return the path that is taken for the user's kubeconfig; nothing is there."""
    path = tmp_path / "kubeconfig"
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    return path


@pytest.fixture
def api(kubeconfig):
    """Yield path -> (status, answer), which an API server behind the kubeconfig gives."""
    answers = {}
    with serving(type("Api", (Answers,), {"answers": answers})) as port:
        kubeconfig.write_text(yaml.safe_dump(configuration(port)))
        yield answers


def listed(**status):
    model = {"metadata": {"name": "a"}, "spec": {"task": "forecast"}, "status": status}
    return 200, {"metadata": {"resourceVersion": "1"}, "items": [model]}


def test_status_shows_the_models_of_the_contexts_namespace(api, capsys):
    api[MODELS] = listed(phase="Ready", replicas=2, readyReplicas=2)
    assert main(["status", "--context", ""]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["a", "forecast", "Ready", "2/2"]


@pytest.mark.parametrize(
    "asked",
    [["--context", "here", "status"], ["--context=", "--namespace", "shop", "status"], ["status", "--context="]],
)
def test_the_cluster_may_be_named_before_the_command_or_after_it(api, capsys, asked):
    api[MODELS] = listed(phase="Ready")
    assert main(asked) == 0
    assert "forecast" in capsys.readouterr().out


def test_a_namespace_without_a_cluster_is_refused(capsys):
    assert main(["--namespace", "shop", "status"]) == 1
    assert "give --context too" in capsys.readouterr().err


def test_a_model_that_lacks_its_task_is_shown_with_the_others(api, capsys):
    api[MODELS] = 200, {"metadata": {"resourceVersion": "1"}, "items": [{"metadata": {"name": "a"}, "spec": {}}]}
    assert main(["status", "--context", ""]) == 1
    assert capsys.readouterr().out.splitlines()[1].split() == ["a", "-", "Queued", "0/0"]


def test_status_fails_while_a_model_is_not_ready(api, capsys):
    api[MODELS] = listed(phase="Loading", message="half way")
    assert main(["status", "--context", "here", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["models"][0]["status"]["message"] == "half way"


def test_a_context_that_is_not_there_is_told_with_those_that_are(api, capsys):
    assert main(["status", "--context", "there"]) == 1
    assert "no context 'there'; it has here" in capsys.readouterr().err


def test_a_missing_permission_is_told_in_the_api_servers_words(api, capsys):
    api[MODELS] = (403, {"message": "models is forbidden: cannot list"})
    assert main(["status", "--context", ""]) == 1
    assert "cannot list" in capsys.readouterr().err


def test_a_cluster_without_the_resource_is_told_so(api, capsys):
    assert main(["status", "--context", ""]) == 1
    assert "install the chart" in capsys.readouterr().err


UNREACHED = "the API server of context 'here', http://127.0.0.1:1, does not answer (Connection refused"


@pytest.mark.parametrize(("written", "said"), [*WRONG, (configuration(1), UNREACHED)])
@pytest.mark.parametrize("command", [["status"], ["logs", "a"], ["predict", "a", "b"], ["explain", "a"], ["plan"]])
def test_a_cluster_that_cannot_be_asked_is_told_in_one_sentence(
    kubeconfig, tmp_path, monkeypatch, capsys, command, written, said
):
    (tmp_path / "models.yaml").write_text("models: []")
    monkeypatch.chdir(tmp_path)
    put(kubeconfig, written)
    assert main([*command, "--context", ""]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("roundhouse: ")
    assert said.format(path=kubeconfig) in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def worker(name, *, ready=True):
    return {"metadata": {"name": name}, "status": {"conditions": [{"type": "Ready", "status": str(ready)}]}}


@pytest.mark.parametrize("follow", [[], ["--follow"]])
def test_logs_are_those_of_the_model_with_their_pods(api, capsys, follow):
    api[MODELS] = listed()
    api[PODS] = 200, {"items": [worker("w1"), worker("w2")]}
    api[f"{PODS}/w1/log"] = 200, "a | one\nb | of another\na | two\n"
    api[f"{PODS}/w2/log"] = 200, "ab | of a third\na | three"
    assert main(["logs", "a", *follow]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == ["w1 one", "w1 two", "w2 three"]


def test_logs_in_json_are_those_of_the_model_with_their_pods(api, capsys, monkeypatch):
    api[MODELS] = listed()
    api[PODS] = 200, {"items": [worker("w1")]}
    about = {"time": "2026-01-31T12:00:00.000Z", "level": "error", "logger": "serve.stepping"}
    events = [
        {**about, "message": "the model raised", "model": "a", "request_id": "r 1"},
        {**about, "message": "of another", "model": "b"},
        {**about, "message": "of the gateway", "model": "a", "component": "gateway"},
    ]
    api[f"{PODS}/w1/log"] = 200, "\n".join(["ray started", *map(json.dumps, events)])
    monkeypatch.setenv("ROUNDHOUSE_LOG_FORMAT", "json")
    assert main(["logs", "a"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [events[0] | {"pod": "w1"}]
    monkeypatch.setenv("ROUNDHOUSE_LOG_FORMAT", "text")
    assert main(["logs", "a"]) == 0
    assert capsys.readouterr().out == 'a | 2026-01-31T12:00:00.000Z ERROR the model raised request_id="r 1" pod=w1\n'


@pytest.mark.parametrize("follow", [[], ["--follow"]])
def test_a_pod_that_has_no_log_yet_is_skipped(api, capsys, follow):
    api[MODELS] = listed()
    api[PODS] = 200, {"items": [worker("w1"), worker("w2"), worker("w3")]}
    api[f"{PODS}/w1/log"] = 400, {"message": "container ray is waiting to start: ContainerCreating"}
    api[f"{PODS}/w3/log"] = 200, "a | hello\n"
    assert main(["logs", "a", *follow]) == 0
    printed = capsys.readouterr()
    assert printed.out == "w3 hello\n"
    first, second = sorted(printed.err.splitlines())
    assert first.startswith("roundhouse: skipped pod w1: ")
    assert first.endswith("ContainerCreating")
    assert second.startswith("roundhouse: skipped pod w2: ")


def test_logs_fail_where_no_pod_has_one(api, capsys):
    api[MODELS] = listed()
    api[PODS] = 200, {"items": [worker("w1")]}
    assert main(["logs", "a"]) == 1
    assert "no worker in namespace shop has a log to read" in capsys.readouterr().err


def test_logs_of_a_model_that_is_not_there_are_refused(api, capsys):
    api[MODELS] = listed()
    assert main(["logs", "b"]) == 1
    assert "namespace shop has no Model 'b'" in capsys.readouterr().err


def test_predict_asks_a_ready_worker_through_the_api_server(api, capsys):
    platform = {"/v2/models/a": (200, METADATA), "/v2/models/a/infer": (200, ANSWERED)}
    with serving(type("Platform", (Answers,), {"answers": platform})) as port:
        api[PODS] = 200, {"items": [worker("w1", ready=False), worker("w2")]}
        api[f"{PODS}/w2/portforward"] = 101, port
        assert main(["predict", "a", "hello", "--context", ""]) == 0
    assert "a purring cat" in capsys.readouterr().out


def test_an_answer_of_many_frames_comes_whole(api, capsys):
    labels = [f"label {n}" for n in range(20_000)]
    answered = {"outputs": [{"name": "label", "datatype": "BYTES", "shape": [len(labels)], "data": labels}]}
    platform = {"/v2/models/a": (200, METADATA), "/v2/models/a/infer": (200, answered)}
    with serving(type("Platform", (Answers,), {"answers": platform})) as port:
        api[PODS] = 200, {"items": [worker("w")]}
        api[f"{PODS}/w/portforward"] = 101, port
        assert main(["predict", "a", "hello", "--context", "", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == answered


def test_explain_asks_a_ready_worker_through_the_api_server(api, capsys):
    platform = {"/v2/models/a/explain": (200, example("a"))}
    with serving(type("Platform", (Answers,), {"answers": platform})) as port:
        api[PODS] = 200, {"items": [worker("w")]}
        api[f"{PODS}/w/portforward"] = 101, port
        assert main(["--context", "", "explain", "a"]) == 0
    assert "a: 3 wanted, 2 starting, 1 ready; 1 to 3 allowed" in capsys.readouterr().out


def test_predict_without_a_ready_worker_says_so(api, capsys):
    api[PODS] = 200, {"items": [worker("w", ready=False)]}
    assert main(["predict", "a", "hello", "--context", ""]) == 1
    assert "no worker in namespace shop is ready" in capsys.readouterr().err


def test_predict_says_why_the_api_server_lets_nothing_through(api, capsys):
    api[PODS] = 200, {"items": [worker("w")]}
    api[f"{PODS}/w/portforward"] = 403, {"message": "cannot create pods/portforward"}
    assert main(["predict", "a", "hello", "--context", ""]) == 1
    said = capsys.readouterr().err
    assert "does not forward to pod w: " in said
    assert "403" in said
