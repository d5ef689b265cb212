"""The Kubernetes API as Roundhouse uses it: Models listed, watched and written, Events, a Lease, and pods' logs."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
import yaml
from kubernetes import client as kube
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException, kube_config, load_incluster_config

from serve.cluster.crd import FINALIZER, GROUP, KIND, PLURAL, VERSION
from serve.errors import RoundhouseError

MANAGER = "roundhouse-controller"
# How long the API server goes on with a watch, and after how long without a word no word is expected any more.
_WATCH_S = 60
_WATCH_SILENCE_S = 70.0
_LOG_SILENCE_S = 330.0
_CONNECT_S = 5.0
_ANSWER_S = 10.0
# A list of hundreds of objects, or the removal of as many, takes the API server longer.
_LONG_ANSWER_S = 60.0
#: The longest from the beginning of a write until nothing of it can happen any more: to connect, to send, to be
#: answered.
WRITE_S = _CONNECT_S + _CONNECT_S + _ANSWER_S
# Deeper than any Model that is right, and than what stands around it in a list.
_MAX_DEPTH = 100
# What the client library raises over a kubeconfig of another form, or whose certificates are not there.
_UNUSABLE = (ConfigException, LookupError, TypeError, AttributeError, ValueError, OSError, RecursionError)
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]')


class ApiUnavailable(RoundhouseError):
    """The API server does not answer or refuses; the message says what was asked. Trying again may help."""


class Refused(ApiUnavailable):
    """The API server answers, and does not take this one request; another about another object it may take."""


class Conflict(RoundhouseError):
    """The object is another than the one that was read, or the list is too old."""


class Missing(RoundhouseError):
    """There is no such object, or no such kind of object."""


@dataclass(frozen=True, slots=True)
class Change:
    """One event of a watch: `ADDED`, `MODIFIED`, `DELETED`, `BOOKMARK`, and the object."""

    kind: str
    model: Mapping[str, Any]


def connect(context: str | None = None) -> kube.ApiClient:
    """Return a client: of the pod's service account, or of the kubeconfig's context (empty for its current one).

    Raises:
        ApiUnavailable: There is neither, or the kubeconfig cannot be used; the message says the likely fix.
    """
    configuration = kube.Configuration()
    if context is not None:
        name, _ = find_context(context)
        with _reading_kubeconfig():
            kube_config.load_kube_config(context=name, client_configuration=configuration)
            return client_of(configuration)
    try:
        load_incluster_config(client_configuration=configuration)
    except ConfigException as error:
        raise ApiUnavailable(
            f"this is no pod with an account of its cluster ({error}); --context names one of the kubeconfig's"
        ) from error
    return client_of(configuration)


def find_context(context: str) -> tuple[str, str]:
    """Return the name of one of the kubeconfig's contexts, empty for its current one, and its namespace.

    Raises:
        ApiUnavailable: There is no such context, or the kubeconfig cannot be used.
    """
    path = kube_config.KUBE_CONFIG_DEFAULT_LOCATION
    with _reading_kubeconfig():
        config = kube_config.KubeConfigMerger(path).config.value
        contexts = {one.value["name"]: one.value["context"] or {} for one in config["contexts"]}
        name = context or config.get("current-context") or ""
        known = ", ".join(contexts) or "none"
        namespace = str(contexts.get(name, {}).get("namespace") or "default")
    if not name:
        raise ApiUnavailable(f"the kubeconfig {path} has no current context; name one with --context: it has {known}")
    if name not in contexts:
        raise ApiUnavailable(f"the kubeconfig {path} has no context {name!r}; it has {known}")
    return name, namespace


@contextlib.contextmanager
def _reading_kubeconfig() -> Iterator[None]:
    """Tell what is wrong with the kubeconfig, of which the client library raises whatever it stumbles over."""
    path = kube_config.KUBE_CONFIG_DEFAULT_LOCATION
    try:
        if not any(Path(part).expanduser().exists() for part in path.split(os.pathsep) if part):
            raise ApiUnavailable(f"there is no kubeconfig {path}; set KUBECONFIG to the file that kubectl takes")
        yield
    except yaml.YAMLError as error:
        told = " ".join(str(error).split())
        raise ApiUnavailable(f"the kubeconfig {path} is not YAML: {told}; mend that line") from error
    except _UNUSABLE as error:
        told = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be used: {' '.join(str(error).split())}"
        raise ApiUnavailable(
            f"the kubeconfig {path} {told}; `kubectl config view` shows it, KUBECONFIG names another"
        ) from error


def client_of(configuration: kube.Configuration) -> kube.ApiClient:
    """Return a client that sends each request once: urllib3 would send it up to four times, each as long as one."""
    configuration.retries = False
    return kube.ApiClient(configuration)


class Cluster:
    """One namespace of a cluster.

    Every call raises ApiUnavailable where the API server does not answer, and Refused where it does not take this one.
    """

    def __init__(self, client: kube.ApiClient, namespace: str) -> None:
        self._client = client
        self._namespace = namespace
        self._objects = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}"

    def list_models(self) -> tuple[list[dict[str, Any]], str]:
        """Return every Model and the version of the list."""
        items: list[dict[str, Any]] = []
        more = ""
        while True:
            query = {"limit": "500", **({"continue": more} if more else {})}
            page = self.call("GET", self._objects, query=query, answer_s=_LONG_ANSWER_S)
            items += page["items"]
            more = page["metadata"].get("continue", "")
            if not more:
                return items, page["metadata"]["resourceVersion"]

    def watch_models(self, version: str, *, silence_s: float = _WATCH_SILENCE_S) -> Iterator[Change]:
        """Yield changes since a version, until the API server ends the watch.

        Args:
            silence_s: After how long without a word the connection counts as broken.

        Raises:
            Conflict: The version is too old; list again.
        """
        query = {
            "watch": "1",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(_WATCH_S),
        }
        for line in self._stream(self._objects, query, silence_s=silence_s):
            event = _parsed(line)
            if event["type"] != "ERROR":
                yield Change(event["type"], event["object"])
            elif event["object"].get("code") == 410:
                raise Conflict("the version is too old")
            else:
                raise ApiUnavailable(f"the watch of Models failed: {event['object'].get('message')}")

    def write_status(self, name: str, status: Mapping[str, Any], *, version: str) -> dict[str, Any]:
        """Apply a Model's status and return the object.

        Raises:
            Conflict: It is no longer at `version`.
            Missing: It is gone.
        """
        return self._apply(name, "/status", {"resourceVersion": version}, {"status": status})

    def hold(self, name: str, *, version: str) -> dict[str, Any]:
        """Add our finalizer to a Model and return the object; raises Conflict as `write_status`."""
        return self._apply(name, "", {"resourceVersion": version, "finalizers": [FINALIZER]}, {})

    def release(self, name: str, *, version: str) -> dict[str, Any]:
        """Take our finalizer from a Model and return the object; raises Conflict as `write_status`."""
        return self._apply(name, "", {"resourceVersion": version}, {})

    def _apply(self, name: str, part: str, metadata: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
        body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "metadata": {"name": name, **metadata}, **rest}
        query = {"fieldManager": MANAGER, "force": "true"}
        path = f"{self._objects}/{name}{part}"
        return self.call("PATCH", path, query=query, body=body, kind="application/apply-patch+yaml")

    def emit(self, event: Mapping[str, Any]) -> None:
        """Create a core/v1 Event about an object of this namespace."""
        about = event["involvedObject"] | {"namespace": self._namespace}
        body = {**event, "involvedObject": about}
        self.call("POST", f"/api/v1/namespaces/{self._namespace}/events", body=body)

    def list_pods(self, labels: str) -> list[dict[str, Any]]:
        """Return the pods that a label selector finds."""
        path = f"/api/v1/namespaces/{self._namespace}/pods"
        return list(self.call("GET", path, query={"labelSelector": labels})["items"])

    def log_of(self, pod: str, *, lines: int, follow: bool) -> Iterator[str]:
        """Yield the last lines of a pod's log, and with `follow` those that come; raises Missing."""
        query = {"tailLines": str(lines), **({"follow": "true"} if follow else {})}
        path = f"/api/v1/namespaces/{self._namespace}/pods/{pod}/log"
        for line in self._stream(path, query, silence_s=_LOG_SILENCE_S):
            yield line.decode(errors="replace")

    def delete_models(self) -> None:
        """Ask for every Model of the namespace to go."""
        self.call("DELETE", self._objects, answer_s=_LONG_ANSWER_S)

    def get_lease(self, name: str) -> dict[str, Any]:
        """Return a Lease (coordination.k8s.io/v1); raises Missing."""
        return self.call("GET", f"{self._leases}/{name}")

    def put_lease(self, name: str, spec: Mapping[str, Any], *, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the Lease that has `metadata`; raises Conflict where another was quicker, and Missing."""
        body: dict[str, Any] = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": spec,
        }
        return self.call("PUT", f"{self._leases}/{name}", body=body)

    @property
    def _leases(self) -> str:
        return f"/apis/coordination.k8s.io/v1/namespaces/{self._namespace}/leases"

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        kind: str = "application/json",
        answer_s: float = _ANSWER_S,
    ) -> dict[str, Any]:
        """Call the API server and return the JSON that it answers.

        Args:
            answer_s: How long it may take to answer; as it stands, a write ends within `WRITE_S`.

        Raises:
            Conflict: 409 and 410.
            Missing: 404.
        """
        response = self._send(method, path, query=query or {}, body=body, kind=kind, read_s=answer_s)
        try:
            found: dict[str, Any] = _parsed(response.read())
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiUnavailable(f"the answer to {method} {path} broke off: {error}") from error
        except ValueError as error:
            raise ApiUnavailable(f"the API server does not answer {method} {path} with JSON") from error
        return found

    def _stream(self, path: str, query: Mapping[str, str], *, silence_s: float) -> Iterator[bytes]:
        """Yield the lines of an answer as they come."""
        response = self._send("GET", path, query=query, body=None, kind="application/json", read_s=silence_s)
        rest = b""
        try:
            for part in response.response.stream(2**16):
                *lines, rest = (rest + part).split(b"\n")
                yield from filter(None, lines)
            if rest:
                yield rest
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiUnavailable(f"the answer to GET {path} broke off: {error}") from error
        finally:
            response.response.close()

    def _send(self, method: str, path: str, *, query: Mapping[str, str], body: Any, kind: str, read_s: float) -> Any:
        arguments = self._client.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params={"Accept": "application/json", "Content-Type": kind},
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            response = self._client.call_api(*arguments, _request_timeout=(_CONNECT_S, read_s))
            if 200 <= response.status < 300:
                return response
            told = _message(response.read())
        except (ApiException, urllib3.exceptions.HTTPError, OSError) as error:
            host = self._client.configuration.host
            raise ApiUnavailable(
                f"the API server, {host}, does not answer {method} {path} ({root_of(error)})"
            ) from error
        if response.status == 404:
            raise Missing(f"{method} {path}: {told}")
        if response.status in (409, 410):
            raise Conflict(f"{method} {path}: {told}")
        # Who is not known yet, or asks too often, is refused everything.
        is_about_this = 400 <= response.status < 500 and response.status not in (401, 408, 429)
        refusal = Refused if is_about_this else ApiUnavailable
        raise refusal(f"the API server refuses {method} {path} ({response.status}): {told}")


def root_of(error: BaseException) -> str:
    """Return the words of what is behind an error, in one line, without the layers that handed it on."""
    while (inner := getattr(error, "reason", None) or error.__cause__) and isinstance(inner, BaseException):
        error = inner
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except RecursionError:
        return json.loads(_shallow(data))


def _shallow(data: bytes) -> bytes:
    """Return JSON with null for what is nested deepest, so that one object does not keep the others from being read."""
    parts, begin, depth = [], 0, 0
    for found in _BRACKETS.finditer(data):
        if found[0] in b"[{":
            depth += 1
            if depth == _MAX_DEPTH:
                parts.append(data[begin : found.start()] + b"null")
        elif found[0] in b"]}":
            depth -= 1
            if depth == _MAX_DEPTH - 1:
                begin = found.end()
    return b"".join([*parts, data[begin:]])


def _message(answer: bytes) -> str:
    """Return the sentence of a Status object, or the answer's beginning where it is none."""
    try:
        return str(json.loads(answer)["message"])
    except (ValueError, LookupError, TypeError):
        return answer[:300].decode(errors="replace")
