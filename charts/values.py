"""The schema of the chart's values, from which values.schema.json and the tables of its README are made."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.alias_generators import to_camel

from serve.schema import json_schema
from serve.settings import Settings

#: The one that both Helm 3 and Helm 4 read.
DIALECT = "http://json-schema.org/draft-07/schema#"

#: Settings that the chart itself decides, since they name places and ports of its pods, or has values of its own for.
_OWN_SETTINGS = frozenset(
    {"cache_dir", "state_dir", "host", "port", "proxies_url", "metrics_dir", "log_format", "access_log"}
)

Mapping = dict[str, Any]
Texts = dict[str, str]
Count = Annotated[int, Field(ge=0, le=10_000)]
Seconds = Annotated[int, Field(ge=1, le=86_400)]
Port = Annotated[int, Field(ge=1, le=65535)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?([kMGTP]|[KMGTP]i)?$")]
#: With the longest name of a release, `worker-GROUP` still fits into a label's 63 characters.
GroupName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=15)]


class Part(BaseModel):
    """Base of every part of the values: unknown keys fail, keys are in camel case."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel)


class Image(Part):
    """The image of every pod."""

    repository: str = Field("roundhouse", min_length=1, description="Where it is, without a tag.")
    tag: str = Field("", description="Its tag; empty takes the chart's appVersion.")
    digest: str = Field("", pattern=r"^(sha256:[0-9a-f]{64})?$", description="`sha256:...`, in place of the tag.")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field("IfNotPresent", description="When it is pulled.")


class Placement(Part):
    """Where pods are put."""

    node_selector: Texts = Field({}, description="Labels that a node must have.")
    tolerations: list[Mapping] = Field([], description="Taints of nodes that do not matter.")
    affinity: Mapping = Field({}, description="Affinity of the pods.")
    priority_class_name: str = Field("", description="Priority class of the pods.")


class Token(Part):
    """The token that every call to Ray carries."""

    existing_secret: str = Field(
        "", description="Secret with the key `auth_token`; empty makes one, which upgrades keep."
    )


class Head(Placement):
    """Ray's head."""

    resources: Mapping = Field(
        {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"memory": "4Gi"}},
        description="Requests and limits; it runs no model.",
    )


class WorkerGroup(Placement):
    """Workers that are alike."""

    replicas: Count = Field(1, description="How many there are; with KubeRay's autoscaling, at least.")
    max_replicas: Count | None = Field(
        None, description="With KubeRay's autoscaling, how many there are at most; null is `replicas`."
    )
    cpus: float = Field(4, gt=0, le=1024, description="CPUs of one, for Ray and as the pod's request.")
    memory: Quantity = Field("8Gi", description="Memory of one, as the pod's request and limit.")
    gpus: Annotated[int, Field(ge=0, le=64)] = Field(0, description="GPUs of one.")
    gpu_resource: str = Field("nvidia.com/gpu", description="Resource of the device plugin.")
    accelerator_type: str = Field(
        "",
        pattern=r"^[A-Za-z0-9._-]*$",
        description="Ray's name of the GPU, such as `A100` or `L4`: Ray's label of the node, for Ray's lists.",
    )
    resources: Mapping = Field(
        {},
        description="Requests and limits in place of those made of cpus and memory, which Ray counts still; the GPUs"
        " are always a limit.",
    )
    topology_spread_constraints: list[Mapping] = Field(
        [], description="How the pods spread over zones or nodes; empty spreads all workers over nodes where it can."
    )
    runtime_class_name: str = Field("", description="Runtime class of the pods.")


class Autoscaling(Part):
    """Whether KubeRay adds and removes workers."""

    enabled: bool = Field(True, description="Add workers for replicas that find no room, and remove idle ones.")
    idle_timeout_seconds: Seconds = Field(300, description="How long a worker idles before it is removed.")


class KubeRay(Part):
    """What only KubeRay has."""

    upgrade_strategy: Literal["NewCluster", "None"] = Field(
        "NewCluster",
        description="When its pods change: a new cluster beside the old one, which takes twice the room, or nothing.",
    )
    autoscaling: Autoscaling = Autoscaling()
    operator_namespace: str = Field(
        "", description="Namespace of its operator, which network policies let in; empty lets in that of any."
    )


class Ray(Part):
    """The Ray cluster."""

    provider: Literal["builtin", "kuberay"] = Field(
        "builtin", description="Who runs it: the chart's own pods, or KubeRay's operator by a RayService."
    )
    token: Token = Token()
    head: Head = Head()
    worker_groups: dict[GroupName, WorkerGroup] = Field(
        {"cpu": WorkerGroup(replicas=2)},
        description="Groups of workers by name.",
        json_schema_extra={"additionalProperties": False},
    )
    drain_seconds: Seconds = Field(
        300, description="Time in which a worker that ends hands over its replicas and finishes what is in flight."
    )
    kuberay: KubeRay = KubeRay()


class GcsPersistence(Part):
    """The volume of Ray's control store."""

    enabled: bool = Field(True, description="With it all replicas survive the head's restart.")
    existing_claim: str = Field("", description="A claim that is there; empty makes one.")
    storage_class: str = Field("", description="Storage class of the claim; empty is the cluster's default.")
    size: Quantity = Field("1Gi", description="Size of the claim.")


class Gcs(Part):
    """Ray's control store."""

    persistence: GcsPersistence = GcsPersistence()


class Gateway(Part):
    """What answers requests that name their model in the body."""

    replicas: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        None,
        description="One a worker at most; null takes as many as there are workers. With fewer, a worker that neither a"
        " gateway nor a model runs on is not Ready, and `helm install --wait` waits for it in vain.",
    )


class Controller(Placement):
    """What makes Ray serve the Models."""

    replicas: Annotated[int, Field(ge=1, le=10)] = Field(1, description="One of them acts; the others stand by.")
    resources: Mapping = Field(
        {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
        description="Requests and limits.",
    )


class Service(Part):
    """The Service of inference requests."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field("ClusterIP", description="Type of the Service.")
    port: Port = Field(80, description="Its port.")
    node_port: Port | None = Field(None, description="Port on the nodes; null lets Kubernetes choose.")
    annotations: Texts = Field({}, description="Annotations of the Service.")


class Ingress(Part):
    """An Ingress for inference requests."""

    enabled: bool = Field(False, description="Whether there is one.")
    class_name: str = Field("", description="Ingress class; empty is the cluster's default.")
    annotations: Texts = Field({}, description="Annotations, such as limits of bodies and times.")
    host: str = Field("", description="Host that it answers for; required.")
    tls_secret_name: str = Field("", description="Secret of its certificate; empty is plain HTTP.")


class HttpRoute(Part):
    """An HTTPRoute of the Gateway API for inference requests."""

    enabled: bool = Field(False, description="Whether there is one.")
    parent_refs: list[Mapping] = Field([], description="Gateways that it belongs to; at least one is required.")
    hostnames: list[str] = Field([], description="Hosts that it answers for; empty is all of the gateway.")


class Cache(Part):
    """Where downloaded and converted models are kept, shared by the workers."""

    type: Literal["emptyDir", "pvc", "hostPath"] = Field(
        "emptyDir", description="`hostPath` needs a namespace below Pod Security's baseline."
    )
    existing_claim: str = Field("", description="With `pvc`, a claim that is there; empty makes one.")
    storage_class: str = Field("", description="Storage class of the claim; empty is the cluster's default.")
    access_modes: list[Literal["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]] = Field(
        ["ReadWriteMany"],
        min_length=1,
        description="Access modes of the claim; more than one worker takes `ReadWriteMany`.",
    )
    size: Quantity = Field("50Gi", description="Size of the claim.")
    host_path: str = Field(
        "",
        pattern="^(/.*)?$",
        description="With `hostPath`, the folder on the nodes. It has to exist on each and to belong to user 10001.",
    )
    keep: bool = Field(False, description="Whether an uninstall leaves the claim.")


class Logs(Part):
    """What pods log."""

    format: Literal["json", "text"] = Field(
        "json", description="One event of JSON a line, also for what models print, or text for people."
    )
    access: bool = Field(False, description="Whether each request has a line.")


class NetworkPolicy(Part):
    """Who may reach whom."""

    enabled: bool = Field(True, description="Whether pods are closed but for what they need.")
    from_: list[Mapping] = Field([], alias="from", description="Peers that may reach the models; empty lets everybody.")
    metrics_from: list[Mapping] = Field(
        [],
        description="Peers that may collect metrics, of the controller (port 8081) and of Ray's nodes (6385, and with"
        " `monitoring` 6386 and the head's 8000); empty is nobody from outside.",
    )
    to: list[Mapping] = Field(
        [],
        description="Peers that workers may connect to besides Ray and DNS; empty lets them reach any address, as"
        " downloads need.",
    )


class PodMonitor(Part):
    """PodMonitors of the Prometheus Operator: of Ray's nodes, of the platform as a whole, and of the controller."""

    enabled: bool = Field(False, description="Whether there are such.")
    labels: Texts = Field({}, description="Their labels, by which a Prometheus selects them.")
    interval: str = Field("30s", pattern=r"^([0-9]+(ms|s|m|h))+$", description="Time between scrapes.")


class PrometheusRules(Part):
    """A PrometheusRule with what `roundhouse rules` prints."""

    enabled: bool = Field(
        False, description="Whether there is one. It is about every namespace: one release of a Prometheus has it."
    )
    labels: Texts = Field({}, description="Its labels, by which a Prometheus selects it.")
    runbooks: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="URL of a copy of docs/runbooks, for the links of alerts; empty leaves them as paths.",
    )


class Dashboards(Part):
    """A ConfigMap for each dashboard, as Grafana's sidecar loads them."""

    enabled: bool = Field(False, description="Whether there are such.")
    labels: Texts = Field({"grafana_dashboard": "1"}, description="Their labels, by which the sidecar finds them.")
    annotations: Texts = Field({}, description="Their annotations, such as the folder's.")


class Monitoring(Part):
    """What Prometheus and Grafana take."""

    enabled: bool = Field(
        False, description="Whether each of Ray's pods tells its own metrics on port 6386, some 50 MB of memory each."
    )
    pod_monitor: PodMonitor = PodMonitor()
    prometheus_rule: PrometheusRules = PrometheusRules()
    dashboards: Dashboards = Dashboards()


class PodDisruptionBudget(Part):
    """How many workers of a group may be drained at once."""

    enabled: bool = Field(True, description="Whether there are such budgets.")
    max_unavailable: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern="^[0-9]+%$")] = Field(
        1, description="Workers of a group, or a percentage such as `25%`."
    )


class ServiceAccount(Part):
    """The account of Ray's pods, which has no rights in the cluster."""

    annotations: Texts = Field({}, description="Annotations that give it an identity of a cloud, for its stores.")


class Crd(Part):
    """The Model resource."""

    keep: bool = Field(
        False,
        description="Whether an uninstall leaves it; it goes only if no other namespace has a Model or a controller.",
    )


#: Of the platform, without those that the chart decides; each is `ROUNDHOUSE_*` in Ray's pods.
PlatformSettings = create_model(
    "PlatformSettings",
    __base__=Part,
    __doc__="Settings of the platform, as environment variables `ROUNDHOUSE_*`; one left out takes its own default.",
    **{name: (field.annotation, field) for name, field in Settings.model_fields.items() if name not in _OWN_SETTINGS},
)


class Values(Part):
    """Values of the chart."""

    image: Image = Image()
    image_pull_secrets: list[Mapping] = Field([], description="Secrets of the registry, `{name: ...}` each.")
    name_override: str = Field("", description="In place of the chart's name.")
    fullname_override: str = Field("", description="In place of the beginning of the name of every object.")
    common_labels: Texts = Field({}, description="Labels of every object.")
    common_annotations: Texts = Field({}, description="Annotations of every object.")
    models: list[Mapping] = Field([], description="Models to serve, as in models.yaml; each becomes a Model object.")
    ray: Ray = Ray()
    gcs: Gcs = Gcs()
    gateway: Gateway = Gateway()
    controller: Controller = Controller()
    service: Service = Service()
    public_url: str = Field(
        "", pattern=r"^(https?://\S+)?$", description="Where callers reach the models; empty is the Ingress or Service."
    )
    ingress: Ingress = Ingress()
    http_route: HttpRoute = HttpRoute()
    cache: Cache = Cache()
    logs: Logs = Logs()
    settings: PlatformSettings = Field(PlatformSettings(), json_schema_extra={"default": {}})
    extra_env_from: list[Mapping] = Field(
        [],
        description="Secrets or ConfigMaps whose keys are variables of Ray's pods, such as tokens of hubs and stores.",
    )
    extra_env: list[Mapping] = Field(
        [], description="Variables of Ray's pods; one that the chart sets too takes the place of the chart's."
    )
    extra_volumes: list[Mapping] = Field([], description="Volumes of Ray's pods.")
    extra_volume_mounts: list[Mapping] = Field([], description="Mounts of Ray's containers.")
    extra_objects: list[Mapping | str] = Field([], description="Further objects, rendered as templates.")
    network_policy: NetworkPolicy = NetworkPolicy()
    monitoring: Monitoring = Monitoring()
    pod_disruption_budget: PodDisruptionBudget = PodDisruptionBudget()
    service_account: ServiceAccount = ServiceAccount()
    crd: Crd = Crd()


def defaults() -> dict[str, Any]:
    """Return what values.yaml must hold."""
    return Values().model_dump(mode="json", by_alias=True, exclude={"settings"}) | {"settings": {}}


def values_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft-07) of the values; a model there is one of models.yaml."""
    document = Values.model_json_schema(by_alias=True)
    models = json_schema()
    definitions = document.pop("$defs") | models["$defs"]
    document["properties"]["models"] |= {"items": models["properties"]["models"]["items"]}
    # What a chart above this one shares is given to each chart below it.
    document["properties"]["global"] = {"type": "object", "description": "Of a chart above this one; not read here."}
    return {"$schema": DIALECT, **_untitled(document), "$defs": _untitled(definitions)}


def _untitled(part: Any) -> Any:
    """Return a schema without the titles that pydantic makes of names."""
    if isinstance(part, dict):
        return {key: _untitled(value) for key, value in part.items() if key != "title" or not isinstance(value, str)}
    return [_untitled(value) for value in part] if isinstance(part, list) else part


def values_table() -> str:
    """Return the table of the values as Markdown."""
    schema = values_schema()
    del schema["properties"]["global"]
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{key}` | {kind} | {default} | {text} |" for key, kind, default, text in _rows(schema, schema, "")]
    return "\n".join(lines)


def _rows(part: dict[str, Any], schema: dict[str, Any], above: str) -> list[tuple[str, str, str, str]]:
    rows = []
    for key, prop in part["properties"].items():
        if "$ref" in prop:
            rows += _rows(_named(prop, schema), schema, f"{above}{key}.")
            continue
        rows.append((f"{above}{key}", _type(prop), _default(prop), prop["description"]))
        for member in prop.get("patternProperties", {}).values():
            rows += _rows(_named(member, schema), schema, f"{above}{key}.NAME.")
    return rows


def _named(prop: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = schema["$defs"][prop["$ref"].rpartition("/")[2]]
    return part


def _type(prop: dict[str, Any]) -> str:
    if "anyOf" in prop:
        return " or ".join(map(_type, prop["anyOf"]))
    if "enum" in prop:
        return ", ".join(f"`{value}`" for value in prop["enum"])
    if prop.get("type") == "array":
        return "list"
    names = {"string": "text", "boolean": "true or false", "object": "mapping", "integer": "whole number"}
    return names.get(prop["type"], prop["type"])


def _default(prop: dict[str, Any]) -> str:
    if "patternProperties" in prop:
        return ", ".join(f"`{name}`" for name in prop["default"])
    return f"`{json.dumps(prop.get('default'))}`"


def between_marks(page: str, table: str) -> str:
    """Return a page with the table in place of what stands between its marks."""
    marks = r"(<!-- values: make charts -->\n).*(<!-- end of values -->)"
    return re.sub(marks, lambda found: f"{found[1]}{table}\n{found[2]}", page, flags=re.DOTALL)
