"""What the command line asks of a cluster through the kubeconfig."""

from __future__ import annotations

import contextlib
import queue
import socket
import socketserver
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kubernetes import client as kube
from kubernetes import config as kube_config
from kubernetes import stream as kube_stream
from kubernetes.client.exceptions import ApiException

from serve.cluster.kube import ApiUnavailable, Cluster, Missing, connect

_WORKERS = "app.kubernetes.io/part-of=roundhouse,app.kubernetes.io/component=worker"
_PORT = 8000
_AT_ONCE = 64 * 1024


def namespace_of(context: str) -> str:
    """Return the namespace that a context of the kubeconfig names, or `default`.

    Raises:
        ApiUnavailable: There is no such context.
    """
    try:
        contexts, current = kube_config.list_kube_config_contexts()
    except kube_config.ConfigException as error:
        raise ApiUnavailable(f"no way to a cluster: {error}") from error
    named = next((one for one in contexts if one["name"] == context), None) if context else current
    if named is None:
        known = ", ".join(one["name"] for one in contexts) or "none"
        raise ApiUnavailable(f"the kubeconfig has no context {context!r}; it has {known}")
    return str(named["context"].get("namespace") or "default")


def fetch_models(context: str, namespace: str | None) -> tuple[str, list[dict[str, Any]]]:
    """Return the namespace, and its Model objects.

    Raises:
        ApiUnavailable: There is no such context, or the API server refuses or does not answer.
    """
    found = namespace or namespace_of(context)
    try:
        return found, Cluster(connect(context), found).list_models()[0]
    except Missing as error:
        raise ApiUnavailable("the cluster has no Model resource; install the chart first") from error


def told(models: Sequence[Mapping[str, Any]]) -> str:
    """Return Models as a table for people."""
    rows = [("MODEL", "TASK", "PHASE", "REPLICAS", "MESSAGE")]
    for model in models:
        status = model.get("status", {})
        replicas = f"{status.get('readyReplicas', 0)}/{status.get('replicas', 0)}"
        name, task = model["metadata"]["name"], model["spec"]["task"]
        rows.append((name, task, status.get("phase", "Queued"), replicas, status.get("message", "")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def all_ready(models: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether every Model answers."""
    return all(model.get("status", {}).get("phase") == "Ready" for model in models)


def logs_of(model: str, context: str, namespace: str | None, *, lines: int, follow: bool) -> Iterator[str]:
    """Yield what a model's replicas print and log, each line with its pod.

    Args:
        lines: How many lines of each pod's log are looked through.
        follow: Whether to go on with those that come, from the pods that there are now.

    Raises:
        ApiUnavailable: As `fetch_models`, or there is no such Model.
    """
    found, models = fetch_models(context, namespace)
    if model not in {each["metadata"]["name"] for each in models}:
        raise ApiUnavailable(f"namespace {found} has no Model {model!r}; `roundhouse status --context` lists them")
    cluster = Cluster(connect(context), found)
    pods = [pod["metadata"]["name"] for pod in cluster.list_pods(_WORKERS)]
    begins = f"{model} | "
    if not follow:
        for pod in pods:
            for line in cluster.log_of(pod, lines=lines, follow=False):
                if line.startswith(begins):
                    yield f"{pod} {line.removeprefix(begins)}"
        return
    arrived: queue.Queue[str | None] = queue.Queue()

    def read(pod: str) -> None:
        with contextlib.suppress(ApiUnavailable, Missing):
            for line in Cluster(connect(context), found).log_of(pod, lines=lines, follow=True):
                if line.startswith(begins):
                    arrived.put(f"{pod} {line.removeprefix(begins)}")
        arrived.put(None)

    for pod in pods:
        threading.Thread(target=read, args=(pod,), daemon=True).start()
    for _ in pods:
        yield from iter(arrived.get, None)


@contextlib.contextmanager
def forwarded(context: str, namespace: str | None) -> Iterator[str]:
    """Reach a cluster's models from here, through its API server; yields the URL.

    Raises:
        ApiUnavailable: As `fetch_models`, or no worker is ready.
    """
    found = namespace or namespace_of(context)
    pods = [pod for pod in Cluster(connect(context), found).list_pods(_WORKERS) if _is_ready(pod)]
    if not pods:
        raise ApiUnavailable(
            f"no worker in namespace {found} is ready; `kubectl get pods --namespace {found}` tells why"
        )
    server = _Forwarder(context, found, pods[0]["metadata"]["name"])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _is_ready(pod: Mapping[str, Any]) -> bool:
    told = {each["type"]: each["status"] for each in pod.get("status", {}).get("conditions", ())}
    return told.get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"]


class _Forwarder(socketserver.ThreadingTCPServer):
    """Listens here, and passes each connection on to a pod."""

    daemon_threads = True

    def __init__(self, context: str, namespace: str, pod: str) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.context, self.namespace, self.pod = context, namespace, pod


class _Connection(socketserver.BaseRequestHandler):
    server: _Forwarder

    def handle(self) -> None:
        # A stream changes the client that it goes through, so each has its own.
        core = kube.CoreV1Api(connect(self.server.context))
        try:
            ports = kube_stream.portforward(
                core.connect_get_namespaced_pod_portforward, self.server.pod, self.server.namespace, ports=str(_PORT)
            )
        except ApiException:
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
