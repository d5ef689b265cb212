"""The HTTP application at `/`: what names its model in the body, what names none, and models that have no route yet."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
from fastapi import FastAPI
from starlette.routing import BaseRoute, Route

from serve import __version__
from serve.api import documents, openai_surface
from serve.api.application import Answer, Application, Endpoint, Meter, exemplar_of, note_failure
from serve.api.body import Uploads, check_media_type, json_type, parse_object, quoted, read_apart, read_body
from serve.api.deadlines import HEADER, timeout_s
from serve.api.directory import Directory, ModelStatus, find, not_ready
from serve.api.errors import (
    OUTCOMES_OF_STATUS,
    PathNotFound,
    ReplicaLost,
    Shape,
    describe,
    open_inference_shape,
    openai_shape,
)
from serve.api.explanation import explanation
from serve.api.forward import Reply, Upstream, UpstreamError
from serve.api.headers import PROXYS_OWN
from serve.api.insight import NO_INSIGHT, Insight, samples
from serve.api.multipart import parse_form
from serve.api.pages import gateway_page
from serve.api.wire import (
    JSON_HEADER,
    Headers,
    Receive,
    Scope,
    Send,
    cancelled_on_disconnect,
    echoed,
    send_bytes,
)
from serve.errors import DeadlineExceeded, InvalidInput, NotReady
from serve.settings import Settings
from serve.telemetry.metrics import GatewayMetrics
from serve.telemetry.passage import Passage
from serve.telemetry.recent import find as find_request
from serve.telemetry.tracing import Attempt, Tracer

_PASSED_ON = (
    b"content-type", b"accept", b"x-request-id", b"traceparent", b"tracestate", b"baggage", b"x-request-timeout-ms",
)  # fmt: skip
# What concerns one connection alone (RFC 9110, section 7.6.1), or is written anew for each.
_OF_ONE_HOP = frozenset((
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"content-length", b"host", b"expect", b"date", b"server",
))  # fmt: skip
# A request that one of these applications passes on says so; where it comes back to one, it found no replica.
_PASSED_ALONG = b"x-roundhouse-passed-along"
_UNROUTED = b"x-roundhouse-unrouted"
_STATES = {"ready": "READY", "failed": "UNAVAILABLE", "draining": "UNLOADING"}
_EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
_ROUTE_RETRY_S = 1.0
_ROUTE_WAIT_S = 10.0
_ROUTE_POLL_S = 0.2
_ARRIVING_BYTES = 256 * 2**20
_ARRIVING_S = 60.0


def build_gateway_app(
    directory: Directory,
    *,
    settings: Settings,
    base_url: str,
    watch_disconnect: bool = False,
    tracer: Tracer | None = None,
    insight: Insight = NO_INSIGHT,
) -> Application:
    """Return the gateway's application.

    Args:
        directory: The declared models, as of now.
        settings: As for every application.
        base_url: `http://host:port` of what routes `/v2/models/<name>/...` to that model's replicas.
        watch_disconnect: As in `build_model_app`.
        tracer: What records requests; None records none.
        insight: What the platform tells of itself, for metrics and explanations.
    """
    return GatewayRoutes(
        directory,
        settings=settings,
        base_url=base_url,
        watch_disconnect=watch_disconnect,
        tracer=tracer,
        insight=insight,
    ).application()


class GatewayRoutes:
    """What answers each route of the gateway."""

    def __init__(
        self,
        directory: Directory,
        *,
        settings: Settings,
        base_url: str,
        watch_disconnect: bool,
        tracer: Tracer | None,
        insight: Insight,
    ) -> None:
        self._directory = directory
        self._tracer = tracer
        self._insight = insight
        self._upstream = Upstream(base_url, spare_url=settings.proxies_url)
        self._uploads = Uploads(_ARRIVING_BYTES, within_s=_ARRIVING_S)
        self._watch = watch_disconnect
        self._metrics_dir = settings.metrics_dir
        self._metrics = GatewayMetrics(settings.metrics_dir)
        self._access_log = settings.access_log

    def application(self) -> Application:
        """Return the application."""

        @contextlib.asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            yield
            self._upstream.close()

        meter = self._meter("openai")
        hot = {
            f"/v1/{endpoint}": Endpoint(
                self._forwarded(endpoint), openai_shape, meter=meter, tracer=self._tracer, route=f"/v1/{endpoint}"
            )
            for endpoint in openai_surface.ENDPOINTS
        }
        return Application(
            hot=hot, routes=self._routes(), access_log=self._access_log, title="Roundhouse", lifespan=lifespan
        )

    def _routes(self) -> list[BaseRoute]:
        def get(path: str, make: Callable[[dict[str, str]], Any], shape: Shape = open_inference_shape) -> Route:
            return Route(path, Endpoint.telling(make, shape), methods=["GET"])

        every = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        openai = Endpoint(
            self._unrouted,
            openai_shape,
            meter=self._meter("openai"),
            tracer=self._tracer,
            route="/v2/models/{model}/v1/{rest}",
        )
        open_inference = Endpoint(
            self._unrouted,
            open_inference_shape,
            meter=self._meter("open_inference"),
            tracer=self._tracer,
            route="/v2/models/{model}/{rest}",
        )
        return [
            get("/v2", lambda _: server_metadata()),
            get("/v2/health/live", lambda _: {"live": True, "ready": not self._waiting()}),
            get("/v2/health/ready", lambda _: self._ready()),
            Route("/v2/repository/index", Endpoint(self._index, open_inference_shape), methods=["POST"]),
            *(
                Route(f"/v2/repository/models/{{name}}/{verb}", self._refusing(verb), methods=["POST"])
                for verb in ("load", "unload")
            ),
            Route("/v2/models/stats", Endpoint(self._stats, open_inference_shape), methods=["GET"]),
            Route("/v2/models/{name}/explain", Endpoint(self._explained, open_inference_shape), methods=["GET"]),
            Route("/v2/models/{name}/v1/{rest:path}", openai, methods=every),
            Route("/v2/models/{name}/{rest:path}", open_inference, methods=every),
            Route("/v2/models/{name}", open_inference, methods=every),
            Route("/metrics", Endpoint(self._exposed, open_inference_shape), methods=["GET"]),
            Route("/v2/requests/{id:path}", Endpoint(self._request, open_inference_shape), methods=["GET"]),
            get("/v1/models", lambda _: self._listed(), openai_shape),
            get("/v1/models/{name:path}", self._one_model, openai_shape),
            get("/openapi.json", lambda _: documents.gateway_document(self._directory.models())),
            Route("/docs", Endpoint(self._page, open_inference_shape), methods=["GET"]),
            Route("/", Endpoint(self._page, open_inference_shape), methods=["GET"]),
        ]

    def _meter(self, protocol: str) -> Meter:
        tracer = self._tracer

        def ended(passage: Passage, headers: Mapping[bytes, bytes]) -> None:
            metrics = self._metrics.of(passage.model)
            if passage.is_raised:
                metrics.objectives.failed(passage.outcome)
            trace = exemplar_of(passage, headers, tracer)
            metrics.requests.ended(protocol, passage.outcome, passage.ended - passage.began, trace)

        return ended

    # Documents

    async def _exposed(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:  # noqa: ARG002
        """`GET /metrics`: what all processes of this node have recorded."""
        if self._metrics_dir is None:
            raise PathNotFound("no metrics are kept here: ROUNDHOUSE_METRICS_DIR is not set")
        accept = headers.get(b"accept", b"").decode("latin-1")
        models = self._directory.models()
        text, content_type = await asyncio.to_thread(_exposed, self._metrics_dir, accept, models, self._insight)
        await send_bytes(send, 200, [(b"content-type", content_type.encode())], text)

    async def _request(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:  # noqa: ARG002
        """`GET /v2/requests/<x-request-id>`: how a request went, hop by hop, as this node remembers it."""
        name = scope["path_params"]["id"]
        hops = await asyncio.to_thread(find_request, self._metrics_dir, name) if self._metrics_dir is not None else []
        if not hops:
            raise PathNotFound(
                f"no request {name!r:.100} is remembered: those sent with x-request-id are, for a while, on the node "
                "that answered them"
            )
        body = orjson.dumps({"request_id": name, "trace_id": hops[0]["trace_id"], "hops": hops})
        await send_bytes(send, 200, [JSON_HEADER, *echoed(headers)], body)

    async def _explained(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:  # noqa: ARG002
        """`GET /v2/models/<name>/explain`: of any declared model, whether it answers or not."""
        status = find(self._directory, scope["path_params"]["name"])
        kept = await asyncio.to_thread(self._insight.kept, status.name)
        told = explanation(status, kept, now=time.time())
        await send_bytes(send, 200, [JSON_HEADER, *echoed(headers)], orjson.dumps(told))

    def _waiting(self) -> list[ModelStatus]:
        """Return the models that are on their way; one that failed holds up nobody."""
        return [status for status in self._directory.models() if not status.ready and status.phase != "failed"]

    def _ready(self) -> dict[str, Any]:
        waiting = self._waiting()
        if waiting:
            told = ", ".join(f"{status.name} ({status.phase})" for status in waiting)
            soonest = min(status.retry_after_s for status in waiting)
            raise NotReady(f"not ready yet: {told}", phase=waiting[0].phase, retry_after_s=soonest)
        return {"live": True, "ready": True}

    def _listed(self) -> dict[str, Any]:
        models = [openai_surface.model_object(status.name) for status in self._directory.models()]
        return {"object": "list", "data": models}

    def _one_model(self, found: dict[str, str]) -> dict[str, Any]:
        return openai_surface.model_object(find(self._directory, found["name"]).name)

    def _refusing(self, verb: str) -> Endpoint:
        def refuse(found: dict[str, str]) -> None:
            name = find(self._directory, found["name"]).name
            raise InvalidInput(f"{name!r} is declared in the models' file: edit the file to {verb} it", place="model")

        return Endpoint.telling(refuse, open_inference_shape)

    async def _index(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:  # noqa: ARG002
        body = await read_body(headers, receive, limit=65536, uploads=self._uploads)
        only_ready = parse_object(body).get("ready", False) if body.strip() else False
        if type(only_ready) is not bool:
            raise InvalidInput(f"must be true or false, not {quoted(only_ready)}", place="ready")
        entries = [index_entry(status) for status in self._directory.models() if status.ready or not only_ready]
        await send_bytes(send, 200, [JSON_HEADER, *echoed(headers)], orjson.dumps(entries))

    async def _stats(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:  # noqa: ARG002
        async def of_model(name: str) -> list[Any]:
            try:
                async with self._upstream.exchange("GET", f"/v2/models/{name}/stats", []) as reply:
                    told = orjson.loads(await reply.read()) if reply.status == 200 else {}
            except UpstreamError:
                return []
            found: list[Any] = told.get("model_stats", [])
            return found

        names = [status.name for status in self._directory.models() if status.ready]
        entries = [entry for found in await asyncio.gather(*map(of_model, names)) for entry in found]
        await send_bytes(send, 200, [JSON_HEADER, *echoed(headers)], orjson.dumps({"model_stats": entries}))

    async def _page(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:  # noqa: ARG002
        models = self._directory.models()
        host = headers.get(b"host", b"127.0.0.1").decode("latin-1")
        page = gateway_page(
            models, documents.gateway_document(models), base_url=f"{scope.get('scheme', 'http')}://{host}"
        )
        await send_bytes(send, 200, [(b"content-type", b"text/html; charset=utf-8"), *echoed(headers)], page.encode())

    async def _unrouted(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        """Answer for a model to which the proxy knew no way: it is not ready, or the proxy has not heard of it yet."""
        name = scope["path_params"]["name"]
        passage = Passage.of(scope)
        passage.is_counted = scope["method"] == "POST" and _PASSED_ALONG not in headers
        status = find(self._directory, name)
        passage.model = status.name
        if _PASSED_ALONG in headers:
            await send_bytes(send, 503, [(_UNROUTED, b"1")], b"")
            return
        if not status.ready:
            raise not_ready(status)
        body = await read_body(headers, receive, limit=status.max_request_bytes, uploads=self._uploads)
        passed = [
            (key, value) for key, value in headers.items() if key not in _OF_ONE_HOP and key != b"content-encoding"
        ]
        query = scope.get("query_string", b"").decode("latin-1")
        path = quote(scope["path"]) + (f"?{query}" if query else "")
        async with self._watching(receive):
            await self._deliver(name, passage, scope["method"], path, passed, body, send)

    # Hot routes

    def _forwarded(self, endpoint: str) -> Answer:
        """Return what passes `POST /v1/<endpoint>` on to the model that the body names."""
        is_form = endpoint == "audio/transcriptions"

        async def answer(scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
            if not is_form:
                check_media_type(headers)
            models = self._directory.models()
            limit = max((status.max_request_bytes for status in models), default=2**20)
            body = await read_body(headers, receive, limit=limit, uploads=self._uploads)
            read = partial(form_model, headers.get(b"content-type")) if is_form else body_model
            name = await read_apart(read, body)
            status = find(self._directory, name)
            passage = Passage.of(scope)
            passage.model = status.name
            if not status.ready:
                raise not_ready(status)
            passed = [(key, headers[key]) for key in _PASSED_ON if key in headers]
            path = f"/v2/models/{name}/v1/{endpoint}"
            async with self._watching(receive):
                await self._deliver(name, passage, "POST", path, passed, body, send)

        return answer

    def _watching(self, receive: Receive) -> contextlib.AbstractAsyncContextManager[None]:
        return cancelled_on_disconnect(receive) if self._watch else contextlib.nullcontext()

    async def _deliver(
        self, name: str, passage: Passage, method: str, path: str, headers: Headers, body: bytes, send: Send
    ) -> None:
        """Pass a request on to a replica of a model that is ready.

        Proxies learn of a new replica within moments, each in its own time: until one does, nothing was computed, and
        the request is sent again, with what is left of its deadline.
        """
        wait_s = timeout_s(dict(headers))
        began = time.monotonic()
        headers.append((_PASSED_ALONG, b"1"))
        while not await self._attempt(name, passage, method, path, headers, body, send):
            status = find(self._directory, name)
            waited_s = time.monotonic() - began
            if not status.ready or waited_s > _ROUTE_WAIT_S:
                raise _unreachable(status)
            if wait_s is not None:
                left_s = wait_s - waited_s - _ROUTE_POLL_S
                if left_s <= 0:
                    raise DeadlineExceeded(f"{_unreachable(status)}; the request's {wait_s:g} s are over")
                headers = [*(header for header in headers if header[0] != HEADER), (HEADER, b"%.3f" % (left_s * 1000))]
            await asyncio.sleep(_ROUTE_POLL_S)

    async def _attempt(
        self, name: str, passage: Passage, method: str, path: str, headers: Headers, body: bytes, send: Send
    ) -> bool:
        """Pass a request on within its trace; return whether it was answered."""
        trace = passage.trace
        if trace is None:
            return await self._pass_on(name, passage, method, path, headers, body, send)
        attempt = trace.attempt()
        traced = [header for header in headers if header[0] != b"traceparent"]
        traced.append((b"traceparent", trace.header_of(attempt)))
        try:
            return await self._pass_on(name, passage, method, path, traced, body, send, attempt)
        finally:
            attempt.end()

    async def _pass_on(
        self,
        name: str,
        passage: Passage,
        method: str,
        path: str,
        headers: Headers,
        body: bytes,
        send: Send,
        attempt: Attempt | None = None,
    ) -> bool:
        """Return whether it was answered; where it was not, it reached no replica."""
        is_started = False
        is_events = False
        try:
            async with self._upstream.exchange(method, path, headers, body) as reply:
                if attempt is not None:
                    attempt.status = reply.status
                if _is_unrouted(reply):
                    return False
                is_events = reply.headers.get(b"content-type", b"").startswith(b"text/event-stream")
                if reply.status >= 400:
                    passage.outcome = OUTCOMES_OF_STATUS.get(reply.status, "internal_error")
                    if not is_events:
                        await self._check_refusal(name, reply)
                part, more = await reply.next_chunk()
                is_started = True
                await send({"type": "http.response.start", "status": reply.status, "headers": _head(reply, part, more)})
                await send({"type": "http.response.body", "body": part, "more_body": more})
                while more:
                    part, more = await reply.next_chunk()
                    await send({"type": "http.response.body", "body": part, "more_body": more})
        except UpstreamError as error:
            lost = self._lost(name, str(error))
            if not (is_started and is_events):
                raise lost from error
            note_failure(passage, lost)
            event = orjson.dumps(openai_shape(*describe(lost)))
            await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": False})
        return True

    async def _check_refusal(self, name: str, reply: Reply) -> None:
        """Turn what the proxy or Ray says in its own words into the protocol's; a replica always answers in JSON."""
        if _is_json(reply) and PROXYS_OWN not in reply.headers:
            return
        if reply.status == 408:
            raise DeadlineExceeded(f"model {name!r} did not answer in time")
        if reply.status >= 500:
            raise self._lost(name, f"the proxy said {reply.status}")

    def _lost(self, name: str, why: str) -> Exception:
        status = find(self._directory, name)
        if not status.ready:
            return not_ready(status)
        return ReplicaLost(
            f"the replica of model {name!r} went away before its answer was there ({why}); "
            "whether it was computed is not known, and it was not repeated",
            retry_after_s=status.retry_after_s,
        )


def _exposed(folder: Path, accept: str, models: Sequence[ModelStatus], insight: Insight) -> tuple[bytes, str]:
    from serve.telemetry.exposition import exposed  # what it needs takes a tenth of a second to import

    return exposed(folder, accept, samples(models, insight))


def _is_json(reply: Reply) -> bool:
    return reply.headers.get(b"content-type", b"").startswith(b"application/json")


def _is_unrouted(reply: Reply) -> bool:
    """Tell whether a request reached no replica: it came back here, or the proxy knows nothing at its path."""
    return _UNROUTED in reply.headers or (reply.status == 404 and not _is_json(reply))


def _head(reply: Reply, part: bytes, more: bool) -> Headers:
    headers = [(key, value) for key, value in reply.headers.items() if key not in _OF_ONE_HOP]
    if not more:
        headers.append((b"content-length", b"%d" % len(part)))
    elif b"content-length" in reply.headers:
        headers.append((b"content-length", reply.headers[b"content-length"]))
    return headers


def _unreachable(status: ModelStatus) -> NotReady:
    if not status.ready:
        return not_ready(status)
    return NotReady(
        f"model {status.name!r} is ready and its route is being set up", phase="starting", retry_after_s=_ROUTE_RETRY_S
    )


def server_metadata() -> dict[str, Any]:
    """Return the server metadata (Open Inference Protocol v2, "Server Metadata")."""
    return {"name": "roundhouse", "version": __version__, "extensions": _EXTENSIONS}


def index_entry(status: ModelStatus) -> dict[str, Any]:
    """Return a model as the repository index lists it (model repository extension), and what else is known of it."""
    reason = "" if status.ready else f"{status.phase}: {status.message}".removesuffix(": ")
    return {
        "name": status.name,
        "version": status.version,
        "state": _STATES.get(status.phase, "LOADING"),
        "reason": reason,
        "task": status.task,
        "phase": status.phase,
        "message": status.message,
        "ready_replicas": status.ready_replicas,
        "target_replicas": status.target_replicas,
    }


def body_model(body: bytes) -> str:
    """Return the model that a JSON body names.

    Raises:
        InvalidInput: The body is no JSON object, or names none.
    """
    return _named(parse_object(body).get("model"))


def form_model(content_type: bytes | None, body: bytes) -> str:
    """Return the model that a form names.

    Raises:
        InvalidInput, UnsupportedMedia: The body is no form, or names none.
    """
    parts: Sequence[Any] = parse_form(content_type, body).get("model", ())
    return _named(parts[0].content.decode("utf-8", "replace") if len(parts) == 1 else None)


def _named(model: object) -> str:
    if type(model) is not str or not model:
        what = "is missing" if model is None else f"must be a string that is not empty, not {json_type(model)}"
        raise InvalidInput(f"{what}; GET /v1/models lists the models", place="model")
    return model
