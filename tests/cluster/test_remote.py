"""The command line against a cluster, over HTTP to a small API server."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from serve.cli import main

MODELS = "/apis/roundhouse.dev/v1alpha1/namespaces/shop/models"


@pytest.fixture
def api(tmp_path, monkeypatch):
    """Yield path -> (status, answer), which an API server behind the kubeconfig gives."""
    answers = {}

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            status, answer = answers.get(self.path.partition("?")[0], (404, {"message": "not found"}))
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "shop"}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    yield answers
    server.shutdown()
    thread.join()
    server.server_close()


def listed(**status):
    model = {"metadata": {"name": "a"}, "spec": {"task": "forecast"}, "status": status}
    return 200, {"metadata": {"resourceVersion": "1"}, "items": [model]}


def test_status_shows_the_models_of_the_contexts_namespace(api, capsys):
    api[MODELS] = listed(phase="Ready", replicas=2, readyReplicas=2)
    assert main(["status", "--context", ""]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["a", "forecast", "Ready", "2/2"]


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
