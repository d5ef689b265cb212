"""What many Models cost a controller: its CPU and memory for one pass over a namespace of the cluster of KUBECONFIG."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from kubernetes.client import ApiClient

from serve.cluster.commands import install_crd
from serve.cluster.kube import Cluster, connect
from tests.cluster.fakes import FakeRay, Faults

NAMESPACE = "roundhouse-many"
MODELS = f"/apis/roundhouse.dev/v1alpha1/namespaces/{NAMESPACE}/models"
MOST_S = 300


def main() -> None:
    """Make the Models, let a controller take them over, and print what it used; Ray's stand-in starts nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=1000)
    count = parser.parse_args().models
    client = connect("")
    cluster = Cluster(client, NAMESPACE)
    install_crd(context="")
    with namespace(client), FakeRay(Faults()).running() as ray, tempfile.TemporaryDirectory() as folder:
        print(f"making {count} Models", flush=True)
        for number in range(count):
            cluster.call("POST", MODELS, body=model(f"model-{number}"))
        token = Path(folder, "token")
        token.write_text(ray.token)
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "serve.cli", "controller", "--context", "", "--namespace", NAMESPACE),
                *("--ray-url", ray.url, "--ray-token-file", str(token), "--gateway-url", ray.url),
                *("--public-url", "http://models", "--identity", "measured", "--health-port", "0"),
            ]
        )
        try:
            measure(psutil.Process(process.pid), cluster, ray, count)
        finally:
            process.terminate()
            process.wait()
            release(cluster)


def measure(process: psutil.Process, cluster: Cluster, ray: FakeRay, count: int) -> None:
    """Print what a controller has used once every Model has a status, and what an idle minute costs it."""
    began = time.monotonic()
    peak = 0
    while time.monotonic() < began + MOST_S:
        peak = max(peak, process.memory_info().rss)
        if sum("status" in each for each in cluster.list_models()[0]) == count:
            break
        time.sleep(2)
    else:
        raise SystemExit(f"not every Model has a status after {MOST_S} s")
    used = process.cpu_times()
    print(
        f"{count} Models: {used.user + used.system:.1f} s of CPU in {time.monotonic() - began:.0f} s, start included; "
        f"{peak / 2**20:.0f} MB; Ray was told {len(ray.configs)} times"
    )
    time.sleep(60)
    later = process.cpu_times()
    idle = later.user + later.system - used.user - used.system
    print(f"in the minute after: {idle:.1f} s of CPU, {process.memory_info().rss / 2**20:.0f} MB")


def model(name: str) -> dict[str, object]:
    """Return a Model object."""
    spec = {"task": "voice-activity", "source": "package:silero_vad"}
    return {"apiVersion": "roundhouse.dev/v1alpha1", "kind": "Model", "metadata": {"name": name}, "spec": spec}


@contextlib.contextmanager
def namespace(client: ApiClient) -> Iterator[None]:
    """Have a namespace of its own, with a Lease for the controller."""
    cluster = Cluster(client, NAMESPACE)
    named = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    cluster.call("POST", "/api/v1/namespaces", body=named)
    lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "roundhouse-controller"}}
    try:
        cluster.call("POST", f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases", body=lease)
        yield
    finally:
        cluster.call("DELETE", f"/api/v1/namespaces/{NAMESPACE}")


def release(cluster: Cluster) -> None:
    """Take off what the controller put on: nobody is left to do it."""
    for each in cluster.list_models()[0]:
        patch = json.loads('[{"op": "remove", "path": "/metadata/finalizers"}]')
        with contextlib.suppress(Exception):
            path = f"{MODELS}/{each['metadata']['name']}"
            cluster.call("PATCH", path, body=patch, kind="application/json-patch+json")


if __name__ == "__main__":
    main()
