"""What the command line asks of a cluster through the kubeconfig."""

from __future__ import annotations

import contextlib
import queue
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import urllib3
from kubernetes import client as kube
from kubernetes import stream as kube_stream
from kubernetes.client.exceptions import ApiException

from serve.cluster.kube import ApiUnavailable, Cluster, Missing, connect, find_context, root_of
from serve.errors import RoundhouseError
from serve.telemetry.lines import Render, parsed

_WORKERS = "app.kubernetes.io/part-of=roundhouse,app.kubernetes.io/component=worker"
_PORT = 8000
_AT_ONCE = 64 * 1024


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the command line asks: a context of the kubeconfig, by its name, and a namespace."""

    context: str
    namespace: str

    def client(self) -> kube.ApiClient:
        """Return a client of its own."""
        return connect(self.context)

    @contextlib.contextmanager
    def cluster(self) -> Iterator[Cluster]:
        """Yield the namespace, and tell of an API server that does not answer where it should be and why."""
        client = self.client()
        try:
            yield Cluster(client, self.namespace)
        except ApiUnavailable as error:
            if not isinstance(error.__cause__, (urllib3.exceptions.HTTPError, OSError)):
                raise
            raise ApiUnavailable(
                f"the API server of context {self.context!r}, {client.configuration.host}, does not answer "
                f"({root_of(error.__cause__)}); `kubectl --context {self.context} version` shows whether it is "
                "reached from here"
            ) from error


def _place(context: str, namespace: str | None) -> _Place:
    """Return a context, empty for the kubeconfig's current one, and the namespace, by default the context's.

    Raises:
        ApiUnavailable: There is no such context.
    """
    name, own = find_context(context)
    return _Place(name, namespace or own)


def fetch_models(context: str, namespace: str | None) -> tuple[str, list[dict[str, Any]]]:
    """Return the namespace, and its Model objects.

    Raises:
        ApiUnavailable: There is no such context, or the API server refuses or does not answer.
    """
    place = _place(context, namespace)
    return place.namespace, _models_of(place)


def _models_of(place: _Place) -> list[dict[str, Any]]:
    try:
        with place.cluster() as cluster:
            return cluster.list_models()[0]
    except Missing as error:
        raise ApiUnavailable("the cluster has no Model resource; install the chart first") from error


def fetch_nodes(context: str) -> dict[str, Any]:
    """Return a cluster's nodes, a list object; raises ApiUnavailable as `fetch_models`."""
    with _place(context, None).cluster() as cluster:
        return cluster.call("GET", "/api/v1/nodes")


def told(models: Sequence[Mapping[str, Any]]) -> str:
    """Return Models as a table for people."""
    rows = [("MODEL", "TASK", "PHASE", "REPLICAS", "MESSAGE")]
    for model in models:
        status = model.get("status", {})
        replicas = f"{status.get('readyReplicas', 0)}/{status.get('replicas', 0)}"
        name, task = model["metadata"]["name"], model.get("spec", {}).get("task", "-")
        rows.append((name, task, status.get("phase", "Queued"), replicas, status.get("message", "")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def all_ready(models: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether every Model answers."""
    return all(model.get("status", {}).get("phase") == "Ready" for model in models)


def logs_of(
    model: str,
    context: str,
    namespace: str | None,
    *,
    lines: int,
    follow: bool,
    say: Callable[[str], None],
    render: Render,
) -> Iterator[str]:
    """Yield what a model's replicas print and log, each line with its pod.

    Args:
        lines: How many lines of each pod's log are looked through.
        follow: Whether to go on with those that come, from the pods that there are now.
        say: Told of each pod whose log cannot be read, such as one that has not started.
        render: Makes lines of events, where the pods' logs are in JSON.

    Raises:
        ApiUnavailable: As `fetch_models`, there is no such Model, or no pod has a log that can be read.
    """
    place = _place(context, namespace)
    if model not in {each["metadata"]["name"] for each in _models_of(place)}:
        raise ApiUnavailable(
            f"namespace {place.namespace} has no Model {model!r}; `roundhouse status --context` lists them"
        )
    with place.cluster() as cluster:
        pods = [pod["metadata"]["name"] for pod in cluster.list_pods(_WORKERS)]
    skipped: list[str] = []

    def read(pod: str) -> Iterator[str]:
        try:
            with place.cluster() as cluster:
                for line in cluster.log_of(pod, lines=lines, follow=follow):
                    if line.startswith(f"{model} | "):
                        yield f"{pod} {line.removeprefix(f'{model} | ')}"
                    elif (event := parsed(line)) and event.get("model") == model and "component" not in event:
                        yield render(event | {"pod": pod})
        except (ApiUnavailable, Missing) as error:
            skipped.append(pod)
            say(f"skipped pod {pod}: {error}")

    if follow:
        yield from _at_once([read(pod) for pod in pods])
    else:
        for pod in pods:
            yield from read(pod)
    if len(skipped) == len(pods):
        raise ApiUnavailable(
            f"no worker in namespace {place.namespace} has a log to read; "
            f"`kubectl get pods --namespace {place.namespace}` tells why"
        )


def _at_once(sources: Sequence[Iterator[str]]) -> Iterator[str]:
    """Yield what several iterators yield, as it comes."""
    arrived: queue.Queue[str | None] = queue.Queue()

    def drain(source: Iterator[str]) -> None:
        for line in source:
            arrived.put(line)
        arrived.put(None)

    for source in sources:
        threading.Thread(target=drain, args=(source,), daemon=True).start()
    for _ in sources:
        yield from iter(arrived.get, None)


@contextlib.contextmanager
def forwarded(context: str, namespace: str | None) -> Iterator[str]:
    """Reach a cluster's models from here, through its API server; yields the URL.

    Raises:
        ApiUnavailable: As `fetch_models`, no worker is ready, or the API server lets nothing through to it.
    """
    place = _place(context, namespace)
    with place.cluster() as cluster:
        pods = [pod for pod in cluster.list_pods(_WORKERS) if _is_ready(pod)]
    if not pods:
        raise ApiUnavailable(
            f"no worker in namespace {place.namespace} is ready; "
            f"`kubectl get pods --namespace {place.namespace}` tells why"
        )
    server = _Forwarder(place, pods[0]["metadata"]["name"])
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    except RoundhouseError as error:
        if not server.refused:
            raise
        raise ApiUnavailable(
            f"the API server does not forward to pod {server.pod}: {server.refused}; "
            f"`kubectl auth can-i create pods/portforward --namespace {place.namespace}` tells whether you may"
        ) from error
    finally:
        server.shutdown()
        server.server_close()


def _is_ready(pod: Mapping[str, Any]) -> bool:
    told = {each["type"]: each["status"] for each in pod.get("status", {}).get("conditions", ())}
    return told.get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"]


class _Forwarder(socketserver.ThreadingTCPServer):
    """Listens here, and passes each connection on to a pod."""

    daemon_threads = True

    def __init__(self, place: _Place, pod: str) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.place, self.pod = place, pod
        self.refused = ""


class _Connection(socketserver.BaseRequestHandler):
    server: _Forwarder

    def handle(self) -> None:
        # A stream changes the client that it goes through, so each has its own.
        core = kube.CoreV1Api(self.server.place.client())
        try:
            ports = kube_stream.portforward(
                core.connect_get_namespaced_pod_portforward,
                self.server.pod,
                self.server.place.namespace,
                ports=str(_PORT),
            )
        except ApiException as error:
            self.server.refused = str(error.reason)
            return
        far = ports.socket(_PORT)
        back = threading.Thread(target=_pump, args=(far, self.request), daemon=True)
        back.start()
        _pump(self.request, far)
        back.join()
        far.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_AT_ONCE):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
