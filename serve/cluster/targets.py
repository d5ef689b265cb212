"""Where models run: what is asked of Ray and told to it, the same for both ways of having a Ray cluster."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import httpx
import yaml

from serve.applications import ANSWERING
from serve.cluster.kube import WRITE_S, ApiUnavailable, Conflict, Missing
from serve.cluster.resource import Application, Observed, changes
from serve.errors import RoundhouseError

_TIMEOUT_S = 30.0
_GATEWAY_TIMEOUT_S = 5.0
# Beginning to connect until the last piece is begun, one piece, and the answer: together no longer than `WRITE_S`.
_SEND_S = WRITE_S / 4
_WRITE_TIMEOUT = httpx.Timeout(WRITE_S / 2, connect=_SEND_S, write=_SEND_S, pool=_SEND_S)
_PIECE = 2**16
# etcd takes 1.5 MiB at once; the rest of a RayService has room beside it.
_LARGEST_CONFIG = 1_572_864 - 2**17
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
_PLACED = ANSWERING | {"STARTING", "STOPPING"}


class TargetUnavailable(RoundhouseError):
    """Ray does not answer, or refuses; the message says who and why. Trying again may help."""


class Target(Protocol):
    """A Ray cluster that serves."""

    def observe(self) -> Observed:
        """Return what runs; raises TargetUnavailable."""

    def apply(self, config: Mapping[str, Any]) -> None:
        """Make a whole Ray Serve config the one that runs; raises TargetUnavailable."""


class RayServeApi:
    """Ray Serve's REST API on the head node (`/api/serve/applications/`).

    Args:
        url: `http://host:8265`.
        token: Returns the cluster's token, read anew for each request, so that it may be rotated.
        gateway_url: Where the gateway tells how far each model is; without an answer phases are left out.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        url: str,
        *,
        token: Callable[[], str],
        gateway_url: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._token = token
        self._clock = clock
        self._client = httpx.Client(base_url=url, timeout=_TIMEOUT_S)
        # A connection for each question, so that no gateway is held on to that is going.
        fresh = httpx.Limits(max_keepalive_connections=0)
        self._gateway = httpx.Client(base_url=gateway_url, timeout=_GATEWAY_TIMEOUT_S, limits=fresh)

    def observe(self) -> Observed:
        """Return what runs; raises TargetUnavailable."""
        told = self._ask("GET", "/api/serve/applications/")
        with _of_form(f"Ray at {self._client.base_url} tells of its applications"):
            entries = told.json().get("applications", {})
            applications = {name: application(name, entry) for name, entry in entries.items()}
        told = self._ask("GET", "/api/v0/nodes", params={"detail": "1", "limit": "10000"})
        with _of_form(f"Ray at {self._client.base_url} tells of its nodes"):
            nodes = _nodes(told.json()["data"]["result"]["result"])
        return Observed(applications=applications, nodes=nodes, phases=self._phases())

    def apply(self, config: Mapping[str, Any]) -> None:
        """Make a whole Ray Serve config the one that runs; raises TargetUnavailable."""
        body = json.dumps(config).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        content = _pieces(body, until=self._clock() + _SEND_S, clock=self._clock)
        self._ask("PUT", "/api/serve/applications/", content=content, headers=headers, timeout=_WRITE_TIMEOUT)

    def _phases(self) -> dict[str, tuple[str, str]]:
        """Return how far the gateway says each model is, or nothing where it does not answer."""
        try:
            told = self._gateway.post("/v2/repository/index").raise_for_status().json()
            return {entry["name"]: (entry["phase"], entry["message"]) for entry in told}
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            return {}

    def _ask(self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **how: Any) -> httpx.Response:
        try:
            authorised = {"Authorization": f"Bearer {self._token()}", **(headers or {})}
            response = self._client.request(method, path, headers=authorised, **how)
        except (httpx.HTTPError, OSError) as error:
            raise TargetUnavailable(f"Ray at {self._client.base_url} does not answer: {error}") from error
        if response.status_code != 200:
            raise TargetUnavailable(
                f"Ray at {self._client.base_url} answers {response.status_code} to {method} {path}: "
                f"{response.text[:500]}"
            )
        return response


def _pieces(body: bytes, *, until: float, clock: Callable[[], float]) -> Iterator[bytes]:
    """Yield a body, which is never sent whole where its last piece would be late: half a request changes nothing."""
    for begin in range(0, len(body), _PIECE):
        if clock() > until:
            raise httpx.WriteTimeout("sending took too long")
        yield body[begin : begin + _PIECE]


class RayService:
    """A RayService of KubeRay: its `serveConfigV2` is written, and the Ray cluster made for it asked what came of it.

    Args:
        ray: Returns the head of a Ray cluster of that name.
        get: Returns the object.
        patch: Applies a part of it, server-side.
    """

    def __init__(
        self,
        ray: Callable[[str], RayServeApi],
        *,
        get: Callable[[], Mapping[str, Any]],
        patch: Callable[[Mapping[str, Any]], object],
    ) -> None:
        self._ray = functools.lru_cache(maxsize=4)(ray)
        self._get = get
        self._patch = patch
        self._read: tuple[str, dict[str, Mapping[str, Any]]] = ("", {})

    def observe(self) -> Observed:
        """Return what runs, beside the config that the object holds; raises TargetUnavailable."""
        service = self._call(self._get)
        with _of_form("the RayService holds its serveConfigV2"):
            configs = self._configs(service.get("spec", {}).get("serveConfigV2", ""))
        told = self._ray(_cluster_of(service)).observe()
        # KubeRay passes a config on some seconds after it is written: until then Ray tells of the one before.
        under_way = changes({"applications": list(configs.values())}, told)
        applications = {}
        for name in configs.keys() | told.applications.keys():
            seen = told.applications.get(name, Application(name=name, status="DEPLOYING"))
            status = seen.status if name not in under_way else "DEPLOYING" if name in configs else "DELETING"
            applications[name] = replace(seen, config=configs.get(name, {}), status=status)
        return replace(told, applications=applications)

    def apply(self, config: Mapping[str, Any]) -> None:
        """Write the config; KubeRay puts it in place."""
        text = _written(config)
        size = len(json.dumps(text))
        if size > _LARGEST_CONFIG:
            raise TargetUnavailable(
                f"the Serve config takes {size} bytes of the RayService, at most {_LARGEST_CONFIG}, which is what etcd "
                "keeps of an object: declare fewer Models, or smaller ones"
            )
        self._call(lambda: self._patch({"spec": {"serveConfigV2": text}}))

    def _configs(self, text: str) -> dict[str, Mapping[str, Any]]:
        if text != self._read[0]:
            self._read = (text, {entry["name"]: entry for entry in _parsed(text).get("applications", ())})
        return self._read[1]

    def _call(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except (ApiUnavailable, Conflict, Missing) as error:
            raise TargetUnavailable(f"the RayService cannot be had: {error}") from error


def _cluster_of(service: Mapping[str, Any]) -> str:
    """Return the Ray cluster that serves, or the one that is to; raises TargetUnavailable."""
    status = service.get("status", {})
    for which in ("activeServiceStatus", "pendingServiceStatus"):
        if name := status.get(which, {}).get("rayClusterName"):
            return str(name)
    raise TargetUnavailable("KubeRay has made no Ray cluster yet; is its operator running?")


@contextlib.contextmanager
def _of_form(what: str) -> Iterator[None]:
    """Read what another wrote; raises TargetUnavailable where it is of another form."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise TargetUnavailable(f"{what} in a form that is not known: {type(error).__name__}: {first}") from error


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text) or {}


def _written(config: Mapping[str, Any]) -> str:
    """Return a config as JSON that is YAML as well: the pairs of escapes that JSON has for a character are not.

    YAML itself costs a hundred times as much, at each pass.
    """
    text = json.dumps(config, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def application(name: str, entry: Mapping[str, Any]) -> Application:
    """Return an application from Ray Serve's details of it (`ray.serve.schema.ApplicationDetails`)."""
    deployments: Sequence[Mapping[str, Any]] = list(entry.get("deployments", {}).values())
    replicas = [(deployment, replica) for deployment in deployments for replica in deployment.get("replicas", ())]
    return Application(
        name=name,
        status=entry["status"],
        message="\n".join(filter(None, [entry.get("message", ""), *(d.get("message", "") for d in deployments)])),
        config=entry.get("deployed_app_config") or {},
        deployed_at=entry.get("last_deployed_time_s", 0.0),
        wanted=sum(deployment.get("target_num_replicas", 0) for deployment in deployments),
        running=sum(replica["state"] in ANSWERING for _, replica in replicas),
        waiting=sum(
            replica["state"] in ("STARTING", "PENDING") and not replica.get("node_id") for _, replica in replicas
        ),
        leaving=tuple(replica["node_id"] for _, replica in replicas if replica["state"] == "PENDING_MIGRATION"),
        held=tuple(
            (replica["node_id"], deployment.get("required_resources", {}))
            for deployment, replica in replicas
            if replica.get("node_id") and replica["state"] in _PLACED
        ),
    )


def _nodes(entries: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, float]]:
    return {entry["node_id"]: entry.get("resources_total") or {} for entry in entries if entry.get("state") == "ALIVE"}


def token_in(file: Path) -> Callable[[], str]:
    """Return what reads the token from a file that a Secret is mounted at."""

    def read() -> str:
        return file.read_text().strip()

    return read
