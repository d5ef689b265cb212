"""The chart's hooks against an API server that lets them do what the chart's roles say, and commands without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from kubernetes import client as kube

from serve.cli import main
from serve.cluster import commands
from serve.cluster.commands import LEASE, install_crd, remove_models
from serve.cluster.kube import ApiUnavailable
from tests.chart.rendering import of
from tests.cluster.fakes import MODELS, Answer, FakeApi, Faults
from tests.cluster.kubeconfigs import WRONG, configuration, put

DEFINITION = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/models.roundhouse.dev"


class GuardedApi(FakeApi):
    """A cluster with namespaces besides ours, which asks each call's right of the chart's roles."""

    def __init__(self, case: str = "default") -> None:
        super().__init__(Faults())
        self.defined = True
        self.elsewhere: list[dict[str, Any]] = []
        self.controllers = ["here"]
        roles = [*of(case, "Role"), *of(case, "ClusterRole")]
        self._rules = [rule for role in roles if role["metadata"]["name"].endswith("-hooks") for rule in role["rules"]]

    def _may(self, verb: str, resource: str, name: str = "") -> bool:
        return any(
            verb in rule["verbs"] and resource in rule["resources"] and name in rule.get("resourceNames", [name])
            for rule in self._rules
        )

    def answer(self, method: str, path: str, body: Any, request: Any) -> Answer:
        parts = urlsplit(path)
        query = parse_qs(parts.query)
        if parts.path == DEFINITION:
            verbs = {"PATCH": ["patch"] if self.defined else ["patch", "create"], "DELETE": ["delete"]}[method]
            if not all(self._may(verb, "customresourcedefinitions", "models.roundhouse.dev") for verb in verbs):
                return 403, {"message": f"may not {verbs}"}
            self.defined = method == "PATCH"
            return 200, {}
        if parts.path == "/apis/coordination.k8s.io/v1/leases":
            (selector,) = query["fieldSelector"]
            if not self._may("list", "leases", selector.removeprefix("metadata.name=")):
                return 403, {"message": "may not list leases"}
            return 200, {"items": [{"metadata": {"name": LEASE, "namespace": each}} for each in self.controllers]}
        if not self.defined:
            return 404, {"message": "no such resource"}
        if not self._may("deletecollection" if method == "DELETE" else "list", "models"):
            return 403, {"message": "may not"}
        if parts.path == "/apis/roundhouse.dev/v1alpha1/models":
            return 200, {"items": self.elsewhere}
        if parts.path == MODELS and method == "DELETE":
            for name in [*self.models]:
                self.delete(name)
            return 200, {}
        return super().answer(method, path, body, request)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch):
    made = GuardedApi()
    monkeypatch.setattr(commands, "connect", lambda _: kube.ApiClient(kube.Configuration(host=made.url)))
    with made.running():
        yield made


def removed(**more: Any) -> tuple[bool, list[str]]:
    said: list[str] = []
    told = {"context": None, "with_definition": True, "timeout_s": 0.5, "say": said.append}
    return remove_models("here", **told | more), said


def test_a_definition_that_is_gone_is_made_again(api: GuardedApi) -> None:
    api.defined = False
    install_crd(context=None)
    assert api.defined


def test_the_last_release_takes_the_definition_with_it(api: GuardedApi) -> None:
    api.put("a")
    assert removed() == (True, ["1 model to go: a", "no model is left", "the Model resource is removed"])
    assert not api.defined


def test_the_definition_stays_while_another_namespace_has_a_controller(api: GuardedApi) -> None:
    api.controllers = ["other", "here"]
    assert removed() == (True, ["no model is left", "the Model resource stays: namespace other has a controller"])
    assert api.defined


def test_the_definition_stays_while_another_namespace_has_models(api: GuardedApi) -> None:
    api.elsewhere = [{"metadata": {"name": "b", "namespace": "other"}}]
    assert removed() == (True, ["no model is left", "the Model resource stays: namespace other has models"])
    assert api.defined


def test_models_that_nobody_lets_go_are_told(api: GuardedApi) -> None:
    api.put("a")
    api.models["a"]["metadata"]["finalizers"] = ["roundhouse.dev/held"]
    gone, said = removed()
    assert not gone
    assert said == ["1 model to go: a", "gave up after 0.5 s; is the controller running?"]
    assert api.defined


def test_a_resource_that_is_gone_already_has_no_models(api: GuardedApi) -> None:
    api.defined = False
    assert removed() == (True, [])


def test_a_hook_that_is_to_keep_the_definition_may_not_remove_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = GuardedApi("no-persistence")
    monkeypatch.setattr(commands, "connect", lambda _: kube.ApiClient(kube.Configuration(host=made.url)))
    with made.running():
        assert removed(with_definition=False)[0]
        with pytest.raises(ApiUnavailable, match="may not"):
            removed()
    assert made.defined


HOOKS = [["install-crd"], ["remove-models", "--namespace", "here"]]
CONTROLLER = ["controller", "--namespace=here", "--ray-url=http://127.0.0.1:1", "--ray-token-file=/dev/null"]
CONTROLLER += ["--gateway-url=http://127.0.0.1:1", "--public-url=http://127.0.0.1:1", "--identity=me"]
REFUSED = "the API server, http://127.0.0.1:1, does not answer "


@pytest.mark.parametrize(
    ("command", "written", "said"),
    [(command, *case) for command in [*HOOKS, CONTROLLER] for case in WRONG]
    + [(command, configuration(1), REFUSED) for command in HOOKS],
)
def test_a_cluster_that_cannot_be_asked_is_told_in_one_sentence(
    command: list[str],
    written: Any,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "kubeconfig"
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    put(path, written)
    assert main([*command, "--context", ""]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("roundhouse: ")
    assert said.format(path=path) in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


@pytest.mark.parametrize("command", [*HOOKS, CONTROLLER])
def test_outside_of_a_cluster_a_command_asks_for_a_context(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert main(command) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("roundhouse: this is no pod with an account of its cluster (")
    assert "--context" in printed
    assert printed.count("\n") == 1
