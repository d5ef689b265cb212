"""What Ray and KubeRay tell is read rightly, and a refusal says who refused what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.applications import application_name, serve_config
from serve.cluster.kube import WRITE_S, Conflict
from serve.cluster.resource import changes
from serve.cluster.targets import RayServeApi, RayService, TargetUnavailable, application, token_in
from serve.spec import ModelSpec
from tests.cluster.fakes import Clock, FakeRay, Faults

NAME = application_name("one")


@pytest.fixture
def ray() -> Iterator[FakeRay]:
    found = FakeRay(Faults())
    with found.running():
        yield found


def config() -> dict[str, Any]:
    return serve_config([ModelSpec(name="one", task="voice-activity", source="package:silero_vad")])


def test_what_was_told_is_what_runs(ray: FakeRay) -> None:
    target = ray.target()
    target.apply(config())
    observed = target.observe()
    assert changes(config(), observed) == set()
    assert (observed.applications[NAME].running, observed.applications[NAME].wanted) == (0, 1)
    ray.settle()
    observed = target.observe()
    assert observed.applications[NAME].running == 1
    assert observed.applications[NAME].held == (("n1", {"CPU": 1}),)
    assert observed.nodes == {"n1": {"CPU": 4.0}}


def test_a_token_is_read_anew_for_each_request(ray: FakeRay, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old\n")
    target = ray.target()
    target._token = token_in(file)
    with pytest.raises(TargetUnavailable, match="answers 401 to GET"):
        target.observe()
    file.write_text(f"{ray.token}\n")
    assert target.observe().applications == {}


def test_ray_that_is_away_is_named(ray: FakeRay) -> None:
    ray.faults.away = {"ray"}
    with pytest.raises(TargetUnavailable, match=f"Ray at {ray.url} does not answer"):
        ray.target().observe()


def test_a_config_that_is_late_is_not_sent_whole(ray: FakeRay) -> None:
    clock = Clock()

    def late() -> float:
        clock.seconds += WRITE_S / 2
        return clock()

    with pytest.raises(TargetUnavailable, match="sending took too long"):
        ray.target(clock=late).apply(config())
    assert ray.configs == []


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"null", b'{"data":{"result":null}}', b'{"data": []}'])
def test_nodes_of_another_form_are_a_sentence(ray: FakeRay, body: bytes) -> None:
    ray.instead["/api/v0/nodes"] = 200, body
    with pytest.raises(TargetUnavailable, match="tells of its nodes in a form that is not known"):
        ray.target().observe()


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"applications": {"a": {}}}', b'{"applications": [1]}'])
def test_applications_of_another_form_are_a_sentence(ray: FakeRay, body: bytes) -> None:
    ray.instead["/api/serve/applications/"] = 200, body
    with pytest.raises(TargetUnavailable, match="tells of its applications in a form that is not known"):
        ray.target().observe()


def test_a_replica_without_a_node_waits() -> None:
    entry = {
        "status": "DEPLOYING",
        "message": "",
        "deployments": {
            "d": {
                "message": "no room",
                "target_num_replicas": 3,
                "required_resources": {"CPU": 1.0},
                "replicas": [
                    {"state": "RUNNING", "node_id": "n1"},
                    {"state": "STARTING", "node_id": None},
                    {"state": "STARTING", "node_id": "n2"},
                    {"state": "PENDING_MIGRATION", "node_id": "n3"},
                ],
            }
        },
    }
    told = application("a", entry)
    assert (told.wanted, told.running, told.waiting, told.message) == (3, 2, 1, "no room")
    assert told.leaving == ("n3",)
    assert told.held == tuple((node, {"CPU": 1.0}) for node in ("n1", "n2", "n3"))


class Service:
    """A RayService as KubeRay keeps it, which puts its config in place when `put_in_place` is called."""

    def __init__(self, ray: FakeRay) -> None:
        self.ray = ray
        self.object: dict[str, Any] = {"spec": {}, "status": {"pendingServiceStatus": {"rayClusterName": "rh-1"}}}
        self.asked: list[str] = []

    def get(self) -> dict[str, Any]:
        return self.object

    def patch(self, part: Any) -> None:
        self.object["spec"] |= part["spec"]

    def put_in_place(self) -> None:
        self.ray.target().apply(yaml.safe_load(self.object["spec"]["serveConfigV2"]))

    def target(self) -> RayService:
        return RayService(self._head, get=self.get, patch=self.patch)

    def _head(self, cluster: str) -> RayServeApi:
        self.asked.append(cluster)
        return self.ray.target()


def test_a_rayservice_keeps_what_was_written_and_ray_tells_what_runs(ray: FakeRay) -> None:
    service = Service(ray)
    target = service.target()
    assert target.observe().applications == {}
    target.apply(config())
    assert yaml.safe_load(service.object["spec"]["serveConfigV2"]) == config()
    observed = target.observe()
    assert changes(config(), observed) == set()
    assert (observed.applications[NAME].status, observed.applications[NAME].running) == ("DEPLOYING", 0)
    service.put_in_place()
    ray.settle()
    observed = target.observe()
    assert (observed.applications[NAME].status, observed.applications[NAME].running) == ("RUNNING", 1)
    assert observed.applications[NAME].deployed_at > 0
    assert observed.applications[NAME].held == (("n1", {"CPU": 1}),)
    assert observed.nodes == {"n1": {"CPU": 4.0}}


def test_an_edit_that_kuberay_has_not_passed_on_is_on_its_way(ray: FakeRay) -> None:
    service = Service(ray)
    target = service.target()
    target.apply(config())
    service.put_in_place()
    ray.settle()
    edited = serve_config(
        [ModelSpec(name="one", task="voice-activity", source="package:silero_vad", description="edited")]
    )
    target.apply(edited)
    observed = target.observe()
    assert (observed.applications[NAME].status, observed.applications[NAME].running) == ("DEPLOYING", 1)
    assert changes(edited, observed) == set()
    target.apply(serve_config([]))
    observed = target.observe()
    assert observed.applications[NAME].status == "DELETING"
    assert changes(serve_config([]), observed) == set()
    service.put_in_place()
    ray.settle()
    assert NAME not in target.observe().applications


def test_the_cluster_that_serves_is_asked_and_before_there_is_one_the_one_that_is_to(ray: FakeRay) -> None:
    service = Service(ray)
    target = service.target()
    target.observe()
    service.object["status"]["activeServiceStatus"] = {"rayClusterName": "rh-1"}
    service.object["status"]["pendingServiceStatus"] = {"rayClusterName": "rh-2"}
    target.observe()
    service.object["status"] = {"activeServiceStatus": {"rayClusterName": "rh-2"}}
    target.observe()
    assert service.asked == ["rh-1", "rh-2"]
    service.object["status"] = {"activeServiceStatus": {}}
    with pytest.raises(TargetUnavailable, match="KubeRay has made no Ray cluster yet"):
        target.observe()


@pytest.mark.parametrize("text", ["a: [", "- 1", "text", "applications: [{}]", "applications: 1", 7])
def test_a_rayservice_that_holds_another_form_is_a_sentence(ray: FakeRay, text: Any) -> None:
    service = Service(ray)
    service.object["spec"]["serveConfigV2"] = text
    with pytest.raises(TargetUnavailable, match="holds its serveConfigV2 in a form that is not known"):
        service.target().observe()


def test_what_a_rayservice_is_told_is_json_and_the_same_as_yaml(ray: FakeRay) -> None:
    service = Service(ray)
    target = service.target()
    odd = "\U0001f600 \x85 \x7f \u2028 \ufeff \\ \" ' \n\t é: - #"
    wanted = serve_config([ModelSpec(name="one", task="voice-activity", source="package:silero_vad", description=odd)])
    target.apply(wanted)
    text = service.object["spec"]["serveConfigV2"]
    assert json.loads(text) == yaml.safe_load(text) == wanted
    assert changes(wanted, target.observe()) == set()


def test_a_rayservice_that_holds_yaml_is_read(ray: FakeRay) -> None:
    service = Service(ray)
    service.object["spec"]["serveConfigV2"] = yaml.safe_dump(config())
    assert changes(config(), service.target().observe()) == set()


def test_a_config_that_etcd_would_not_keep_is_refused_with_a_sentence(ray: FakeRay) -> None:
    service = Service(ray)
    source = "package:silero_vad"
    models = [ModelSpec(name=f"m{number}", task="voice-activity", source=source) for number in range(1500)]
    with pytest.raises(TargetUnavailable, match="bytes of the RayService, at most"):
        service.target().apply(serve_config(models))
    assert service.object["spec"] == {}
    service.target().apply(serve_config(models[:1000]))


def test_a_rayservice_that_another_wrote_is_tried_again(ray: FakeRay) -> None:
    def patch(_: Any) -> None:
        raise Conflict("the object has been modified")

    target = RayService(lambda _: ray.target(), get=dict, patch=patch)
    with pytest.raises(TargetUnavailable, match="has been modified"):
        target.apply(config())
