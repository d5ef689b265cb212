"""The controller's process and the chart's hooks, wired from what the command line says."""

from __future__ import annotations

import datetime
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serve.cluster.controller import Controller
from serve.cluster.crd import GROUP, PLURAL, custom_resource_definition
from serve.cluster.health import serve_health
from serve.cluster.kube import MANAGER, Cluster, Missing, connect
from serve.cluster.leader import Leadership
from serve.cluster.targets import RayServeApi, RayService, Target, token_in
from serve.settings import Settings
from serve.telemetry.lines import renderer
from serve.telemetry.logs import Log, to_stream

_DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
_LEASES = "/apis/coordination.k8s.io/v1/leases"
_POLL_S = 1.0

#: Of the Lease that every namespace with a controller of the chart has.
LEASE = "roundhouse-controller"


@dataclass(frozen=True, slots=True)
class ControllerOptions:
    """What a controller is told.

    Args:
        context: Of the kubeconfig; None in a pod.
        rayservice: Name of the RayService that is written; empty where Ray is told directly.
        ray_url: `http://host:8265` of the head; not used with `rayservice`.
        ray_token_file: The cluster's token.
        lease: Name of the Lease.
        identity: Of this process.
    """

    namespace: str
    context: str | None
    rayservice: str
    ray_url: str
    ray_token_file: Path
    gateway_url: str
    public_url: str
    lease: str
    identity: str
    health_port: int
    gateway_replicas: int


def run_controller(options: ControllerOptions) -> None:
    """Run until SIGTERM or SIGINT.

    Raises:
        ApiUnavailable: There is no way to a cluster.
        ControllerBroken: One of its threads ended.
        SpecError: A setting of the environment is wrong.
    """
    settings = Settings.from_environment()
    render = renderer(settings.log_format, is_terminal=sys.stderr.isatty(), colour=Settings.wants_colour())
    about = {"component": "controller", "replica": options.identity}
    with Log(render, to_stream(sys.stderr), level=settings.log_level, about=about):
        _run(options)


def _run(options: ControllerOptions) -> None:
    cluster = Cluster(connect(options.context), options.namespace)
    leadership = Leadership(
        cluster,
        name=options.lease,
        identity=options.identity,
        clock=time.monotonic,
        now=lambda: datetime.datetime.now(datetime.UTC),
    )
    controller = Controller(
        cluster,
        _target(cluster, options),
        leadership,
        gateway_replicas=options.gateway_replicas,
        public_url=options.public_url,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: controller.stop())
    server = serve_health(controller, leads=lambda: leadership.holds, port=options.health_port)
    try:
        controller.run()
    finally:
        server.shutdown()


def _target(cluster: Cluster, options: ControllerOptions) -> Target:
    token = token_in(options.ray_token_file)

    def head(url: str) -> RayServeApi:
        return RayServeApi(url, token=token, gateway_url=options.gateway_url)

    if not options.rayservice:
        return head(options.ray_url)
    path = f"/apis/ray.io/v1/namespaces/{options.namespace}/rayservices/{options.rayservice}"
    named = {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": options.rayservice}}
    how = {"fieldManager": MANAGER, "force": "true"}
    return RayService(
        lambda name: head(f"http://{name}-head-svc:8265"),  # as KubeRay names a cluster's head
        get=lambda: cluster.call("GET", path),
        patch=lambda part: cluster.call(
            "PATCH", path, query=how, body=named | dict(part), kind="application/apply-patch+yaml"
        ),
    )


def install_crd(*, context: str | None) -> None:
    """Apply the Model resource's definition; raises ApiUnavailable."""
    definition = custom_resource_definition()
    Cluster(connect(context), "default").call(
        "PATCH",
        f"{_DEFINITIONS}/{PLURAL}.{GROUP}",
        query={"fieldManager": MANAGER, "force": "true"},
        body=definition,
        kind="application/apply-patch+yaml",
    )


def remove_models(
    namespace: str, *, context: str | None, with_definition: bool, timeout_s: float, say: Callable[[str], None]
) -> bool:
    """Delete a namespace's Models and wait until they are gone; return whether they are.

    Args:
        with_definition: Delete the resource's definition as well, unless another namespace has Models or a controller.

    Raises:
        ApiUnavailable: The API server refuses.
    """
    cluster = Cluster(connect(context), namespace)
    ends = time.monotonic() + timeout_s
    left = -1
    while True:
        try:
            names = [model["metadata"]["name"] for model in cluster.list_models()[0]]
        except Missing:
            return True  # the resource itself is gone
        if not names:
            break
        if left < 0:
            cluster.delete_models()
        if len(names) != left:
            left = len(names)
            say(f"{left} model{'' if left == 1 else 's'} to go: {', '.join(names[:5])}{' ...' if left > 5 else ''}")
        if time.monotonic() > ends:
            say(f"gave up after {timeout_s:g} s; is the controller running?")
            return False
        time.sleep(_POLL_S)
    say("no model is left")
    if with_definition:
        _remove_definition(cluster, namespace, say)
    return True


def _remove_definition(cluster: Cluster, namespace: str, say: Callable[[str], None]) -> None:
    try:
        others = cluster.call("GET", f"/apis/{GROUP}/v1alpha1/{PLURAL}", query={"limit": "1"})["items"]
        if others:
            say(f"the Model resource stays: namespace {others[0]['metadata']['namespace']} has models")
            return
        # The API server lets an account list by one name, and only where the request says so.
        leases = cluster.call("GET", _LEASES, query={"fieldSelector": f"metadata.name={LEASE}"})["items"]
        elsewhere = sorted({lease["metadata"]["namespace"] for lease in leases} - {namespace})
        if elsewhere:
            say(f"the Model resource stays: namespace {elsewhere[0]} has a controller")
            return
        cluster.call("DELETE", f"{_DEFINITIONS}/{PLURAL}.{GROUP}")
        say("the Model resource is removed")
    except Missing:
        say("the Model resource was gone already")
