"""A Kubernetes API server and Ray's Serve API, small but over real HTTP, whose every write can be made the last one."""

from __future__ import annotations

import contextlib
import copy
import datetime
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from kubernetes import client as kube

from serve.cluster.kube import Cluster, client_of
from serve.cluster.targets import RayServeApi

MODELS = "/apis/roundhouse.dev/v1alpha1/namespaces/here/models"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/here/leases"
NOW = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
Answer = tuple[int, Any]


class Faults:
    """What both servers do wrong.

    Args:
        writes_left: Writes that still go through; afterwards every request hangs up, as if the caller had died.
    """

    def __init__(self) -> None:
        self.writes_left: int | None = None
        self.away: set[str] = set()
        self.hung_up = 0

    def goes_through(self, server: str, *, is_write: bool) -> bool:
        if server in self.away or self.writes_left == 0:
            self.hung_up += 1
            return False
        if is_write and self.writes_left is not None:
            self.writes_left -= 1
        return True


class _Server:
    """Answers over HTTP by `answer`; hangs up where a fault says so."""

    name = ""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.asked: list[tuple[str, str]] = []
        # Path -> status and body that are answered there instead.
        self.instead: dict[str, tuple[int, bytes]] = {}
        self.before_each: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def _do(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                if len(body) < length:
                    return
                outer.before_each()
                with outer._lock:
                    is_write = self.command != "GET" and "/repository/" not in self.path
                    if not outer.faults.goes_through(outer.name, is_write=is_write):
                        self.close_connection = True
                        return
                    outer.asked.append((self.command, self.path))
                    path = urlsplit(self.path).path
                    if path in outer.instead:
                        status, data = outer.instead[path]
                    else:
                        told = json.loads(body) if body else None
                        status, answer = outer.answer(self.command, self.path, told, self)
                        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = _do

            def log_message(self, *_: object) -> None:
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def answer(self, method: str, path: str, body: Any, request: Any) -> Answer:
        raise NotImplementedError

    def writes(self) -> list[tuple[str, str]]:
        return [each for each in self.asked if each[0] != "GET" and "/repository/" not in each[1]]

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()


class FakeApi(_Server):
    """Models with server-side apply, preconditions, finalizers and status; Leases; Events."""

    name = "api"

    def __init__(self, faults: Faults) -> None:
        super().__init__(faults)
        self.version = 100
        self.models: dict[str, dict[str, Any]] = {}
        self.leases: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        # Model -> status that every write of it is answered with.
        self.refused: dict[str, int] = {}
        self.when_watched: Callable[[], None] = lambda: None
        self._changes: list[tuple[int, str, dict[str, Any]]] = []
        self._client = client_of(kube.Configuration(host=self.url))

    def cluster(self) -> Cluster:
        return Cluster(self._client, "here")

    # What kubectl does

    def put(self, name: str, **spec: Any) -> None:
        spec = {"task": "voice-activity", "source": "package:silero_vad"} | spec
        known = self.models.get(name)
        if known is None:
            metadata = {"name": name, "uid": f"uid-{name}-{self.version}", "generation": 1}
            self.models[name] = self._written({"metadata": metadata, "spec": spec})
        elif known["spec"] != spec:
            known["spec"] = spec
            known["metadata"]["generation"] += 1
            self._written(known)

    def delete(self, name: str) -> None:
        self.models[name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        self._written(self.models[name])

    def _written(self, thing: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        metadata = thing["metadata"]
        metadata["resourceVersion"] = str(self.version)
        if "deletionTimestamp" in metadata and not metadata.get("finalizers"):
            self.models.pop(metadata["name"], None)
        if "spec" in thing:
            kind = "MODIFIED" if metadata["name"] in self.models else "DELETED"
            self._changes.append((self.version, kind, copy.deepcopy(thing)))
        return thing

    # HTTP

    def answer(self, method: str, path: str, body: Any, request: Any) -> Answer:
        parts = urlsplit(path)
        if parts.path == MODELS and method == "GET":
            query = parse_qs(parts.query)
            if "watch" in query:
                return 200, self._watched(int(query["resourceVersion"][0]))
            names = sorted(self.models)
            begin = int(query.get("continue", ["0"])[0])
            end = begin + int(query["limit"][0])
            more = {"continue": str(end)} if end < len(names) else {}
            items = [copy.deepcopy(self.models[name]) for name in names[begin:end]]
            return 200, {"items": items, "metadata": {"resourceVersion": str(self.version), **more}}
        if parts.path.startswith(f"{MODELS}/") and method == "PATCH":
            return self._applied(parts.path.removeprefix(f"{MODELS}/"), body)
        if parts.path.startswith(f"{LEASES}/"):
            return self._lease(method, parts.path.removeprefix(f"{LEASES}/"), body)
        if parts.path.endswith("/events") and method == "POST":
            self.events.append(body)
            return 201, body
        return 404, {"message": f"no {path}"}

    def forget_changes(self) -> None:
        """Have the watch tell nothing of what was before."""
        self._changes.clear()

    def _watched(self, version: int) -> bytes:
        """Return what has changed since a version; a watch ends there, and the next one tells of the rest."""
        self.when_watched()
        new = [{"type": kind, "object": model} for at, kind, model in self._changes if at > version]
        return b"".join(json.dumps(event).encode() + b"\n" for event in new)

    def _applied(self, path: str, body: Any) -> Answer:
        name, _, part = path.partition("/")
        model = self.models.get(name)
        if model is None:
            return 404, {"message": f"models {name!r} not found"}
        if name in self.refused:
            return self.refused[name], {"message": f"admission webhook denied {name!r}"}
        if body["metadata"].get("resourceVersion", "") != model["metadata"]["resourceVersion"]:
            return 409, {"message": "the object has been modified"}
        before = copy.deepcopy(model)
        if part == "status":
            model["status"] = body["status"]
        else:
            model["metadata"]["finalizers"] = body["metadata"].get("finalizers", [])
        return 200, copy.deepcopy(model if model == before else self._written(model))

    def _lease(self, method: str, name: str, body: Any) -> Answer:
        lease = self.leases.get(name)
        if lease is None:
            return 404, {"message": f"leases {name!r} not found"}
        if method == "PUT":
            if body["metadata"]["resourceVersion"] != lease["metadata"]["resourceVersion"]:
                return 409, {"message": "the object has been modified"}
            self.version += 1
            metadata = body["metadata"] | {"resourceVersion": str(self.version)}
            self.leases[name] = {"metadata": metadata, "spec": body["spec"]}
        return 200, copy.deepcopy(self.leases[name])


class FakeRay(_Server):
    """Ray Serve's REST API: applications deploy, run, fail and go when `settle` is called."""

    name = "ray"
    token = "s3cret"

    def __init__(self, faults: Faults) -> None:
        super().__init__(faults)
        self.applications: dict[str, dict[str, Any]] = {}
        self.configs: list[dict[str, Any]] = []
        self.broken: set[str] = set()
        self.takes_configs = True
        self.when_asked: Callable[[], None] = lambda: None
        self.deployed_at = NOW.timestamp()

    def target(self, **how: Any) -> RayServeApi:
        return RayServeApi(self.url, token=lambda: self.token, gateway_url=self.url, **how)

    def settle(self) -> None:
        for name, entry in list(self.applications.items()):
            if entry["status"] == "DELETING":
                del self.applications[name]
                continue
            is_broken = name in self.broken
            entry["status"] = "DEPLOY_FAILED" if is_broken else "RUNNING"
            (deployment,) = entry["deployments"].values()
            deployment["replicas"] = [] if is_broken else [_replica(name, entry["deployed_app_config"])]

    def answer(self, method: str, path: str, body: Any, request: Any) -> Answer:
        self.when_asked()
        if path == "/v2/repository/index":
            return 200, []
        if request.headers["Authorization"] != f"Bearer {self.token}":
            return 401, {"message": "no token"}
        if path.startswith("/api/v0/nodes"):
            node = {"node_id": "n1", "state": "ALIVE", "resources_total": {"CPU": 4.0}}
            return 200, {"data": {"result": {"result": [node]}}}
        if method == "PUT" and not self.takes_configs:
            return 400, {"message": "not this one"}
        if method == "PUT":
            self._deploy(body)
            return 200, {}
        return 200, self.details()

    def details(self) -> dict[str, Any]:
        """Return what `GET /api/serve/applications/` answers."""
        return {
            "controller_info": {},
            "proxy_location": "EveryNode",
            "http_options": {"host": "0.0.0.0", "port": 8000},
            "grpc_options": {},
            "proxies": {},
            "applications": copy.deepcopy(self.applications),
            "target_capacity": None,
            "target_groups": [],
        }

    def _deploy(self, config: dict[str, Any]) -> None:
        self.configs.append(config)
        wanted = {entry["name"]: entry for entry in config["applications"]}
        for name, entry in self.applications.items():
            if name not in wanted:
                entry["status"] = "DELETING"
        self.deployed_at += 1
        for name, entry in wanted.items():
            known = self.applications.get(name)
            if known is None or known["deployed_app_config"] != entry or known["status"] == "DELETING":
                self.applications[name] = _application(name, entry, self.deployed_at)
            # Ray writes the time of a config to all that stands in it.
            self.applications[name]["last_deployed_time_s"] = self.deployed_at


def _application(name: str, config: dict[str, Any], deployed_at: float) -> dict[str, Any]:
    (deployment,) = config["deployments"]
    return {
        "name": name,
        "route_prefix": config["route_prefix"],
        "docs_path": None,
        "external_scaler_enabled": False,
        "status": "DEPLOYING",
        "message": "",
        "last_deployed_time_s": deployed_at,
        "deployed_app_config": config,
        "source": "declarative",
        "deployments": {
            deployment["name"]: {
                "name": deployment["name"],
                "status": "UPDATING",
                "status_trigger": "CONFIG_UPDATE_STARTED",
                "message": "",
                "deployment_config": {"name": deployment["name"]},
                "target_num_replicas": 1,
                "required_resources": {"CPU": 1},
                "replicas": [],
            }
        },
    }


def _replica(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return a replica whose process lives as long as its configuration does."""
    return {
        "replica_id": f"{name}-{abs(hash(json.dumps(config, sort_keys=True))) % 10**8}",
        "state": "RUNNING",
        "pid": 1,
        "actor_name": name,
        "actor_id": "a",
        "worker_id": "w",
        "node_id": "n1",
        "node_ip": "127.0.0.1",
        "node_instance_id": "i",
        "start_time_s": 0.0,
    }


@contextlib.contextmanager
def world() -> Iterator[tuple[FakeApi, FakeRay, Faults]]:
    """Run both servers."""
    faults = Faults()
    api, ray = FakeApi(faults), FakeRay(faults)
    with api.running(), ray.running():
        yield api, ray, faults


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds
