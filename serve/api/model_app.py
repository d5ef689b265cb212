"""The HTTP application of one model: the Open Inference Protocol and the OpenAI surface over its Host."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import orjson
from starlette.routing import BaseRoute, Route

from serve.api import documents, genai, openai_surface
from serve.api.application import Answer, Application, Endpoint, Meter, exemplar_of, note_failure
from serve.api.body import Uploads, asked_encoding, check_media_type, compress, parse_object, read_apart, read_body
from serve.api.deadlines import timeout_s
from serve.api.errors import describe, open_inference_shape, openai_shape
from serve.api.explanation import unscaled
from serve.api.multipart import parse_form
from serve.api.open_inference import HEADER_LENGTH, OpenInference
from serve.api.pages import model_page
from serve.api.wire import (
    JSON_HEADER,
    Receive,
    Scope,
    Send,
    cancelled_on_disconnect,
    echoed,
    send_bytes,
    unless_disconnected,
)
from serve.errors import InvalidInput, ModelNotFound, NotReady
from serve.host import Host
from serve.models.base import Item
from serve.settings import Settings
from serve.telemetry.passage import Passage
from serve.telemetry.tracing import Tracer

Headers = dict[bytes, bytes]
Result = Mapping[str, Any]
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_LONGEST_CONTENT = 4096
_READERS = {"chat/completions": openai_surface.read_chat, "completions": openai_surface.read_completions}


def build_model_app(
    host: Host,
    *,
    settings: Settings,
    watch_disconnect: bool = False,
    tracer: Tracer | None = None,
    explain: Callable[[], dict[str, Any]] | None = None,
) -> Application:
    """Return the application of a loaded model, to be mounted anywhere (`root_path`).

    Args:
        host: Loaded; its signature is final.
        settings: As for every application.
        watch_disconnect: Drop the work of a client that left. Ray's replica does that by cancelling the request's task;
            a plain ASGI server does not, and needs it.
        tracer: What records its requests; the host's, so that their batches are in their traces.
        explain: Returns why the model has the replicas that it has; may block. None where nothing scales it.

    Raises:
        NotReady: The host is not loaded.
    """
    routes = ModelRoutes(host, watch_disconnect=watch_disconnect, tracer=tracer, explain=explain)
    return routes.application(access_log=settings.access_log)


class ModelRoutes:
    """What answers each route of one model."""

    def __init__(
        self,
        host: Host,
        *,
        watch_disconnect: bool,
        tracer: Tracer | None,
        explain: Callable[[], dict[str, Any]] | None,
    ) -> None:
        self._host = host
        self._tracer = tracer
        self._explain = explain or partial(unscaled, host.spec)
        self._spec = host.spec
        self._signature = host.signature
        self._protocol = OpenInference(host.spec, host.signature)
        self._limit = host.spec.limits.max_request_bytes
        self._uploads = Uploads(
            max(self._limit, host.spec.batching.max_queue_bytes), within_s=host.spec.deadline_ms / 1000
        )
        self._watch = watch_disconnect
        self._document = documents.model_document(self._protocol)
        host.metrics.objectives.promise(host.spec.objectives)

    def application(self, *, access_log: bool = False) -> Application:
        """Return the application."""
        meter, openai_meter = self._meter("open_inference"), self._meter("openai")
        infer = Endpoint(
            self.infer, open_inference_shape, meter=meter, tracer=self._tracer, route="/v2/models/{model}/infer"
        )
        openai = {
            "embeddings": self.embeddings,
            "chat/completions": self._text("chat/completions"),
            "completions": self._text("completions"),
            "audio/transcriptions": self.transcriptions,
        }
        hot = {
            "/infer": infer,
            f"/versions/{self._protocol.version}/infer": infer,
            **{
                f"/v1/{endpoint}": Endpoint(
                    answer,
                    openai_shape,
                    meter=openai_meter,
                    tracer=self._tracer,
                    route="/v2/models/{model}/v1/" + endpoint,
                )
                for endpoint, answer in openai.items()
            },
        }
        name = self._spec.name
        return Application(
            hot=hot, routes=self._routes(), access_log=access_log, title=name, description=self._spec.description
        )

    def _meter(self, protocol: str) -> Meter:
        metrics = self._host.metrics
        objectives = metrics.objectives
        tracer = self._tracer

        def ended(passage: Passage, headers: Mapping[bytes, bytes]) -> None:
            trace = exemplar_of(passage, headers, tracer)
            metrics.requests.ended(protocol, passage.outcome, passage.ended - passage.began, trace)
            if passage.outcome != "ok":
                objectives.failed(passage.outcome)
            elif passage.answered:
                objectives.answered(passage.replied - passage.began)
                metrics.passed(read_s=passage.arrived - passage.began, respond_s=passage.ended - passage.answered)

        return ended

    def _routes(self) -> list[BaseRoute]:
        protocol = self._protocol
        model = openai_surface.model_object(self._spec.name)
        told: dict[str, Any] = {
            "/": protocol.metadata,
            "/ready": self.ready,
            "/config": protocol.config,
            "/stats": self.stats,
        }
        routes: list[BaseRoute] = []
        for path, make in told.items():
            routes.append(Route(path, self._telling(make), methods=["GET"]))
            routes.append(Route("/versions/{version}" + path.rstrip("/"), self._telling(make), methods=["GET"]))
        other_version = self._telling(dict)
        listed = Endpoint.telling(lambda _: {"object": "list", "data": [model]}, openai_shape)
        page = model_page(self._document)
        return [
            *routes,
            Route("/versions/{version}/infer", other_version, methods=["POST"]),
            Route("/explain", Endpoint(self.explain, open_inference_shape), methods=["GET"]),
            Route("/v1/models", listed, methods=["GET"]),
            Route("/v1/models/{model:path}", Endpoint.telling(self._one_model, openai_shape), methods=["GET"]),
            Route("/openapi.json", Endpoint.telling(lambda _: self._document, open_inference_shape), methods=["GET"]),
            Route("/docs", Endpoint.telling(lambda _: page, open_inference_shape), methods=["GET"]),
        ]

    def _telling(self, make: Callable[[], Any]) -> Endpoint:
        def checked(found: dict[str, str]) -> Any:
            if "version" in found:
                self._protocol.check_version(found["version"])
            return make()

        return Endpoint.telling(checked, open_inference_shape)

    def _one_model(self, found: dict[str, str]) -> dict[str, Any]:
        if found["model"] != self._spec.name:
            raise ModelNotFound(found["model"], near=[self._spec.name])
        return openai_surface.model_object(self._spec.name)

    def ready(self) -> dict[str, Any]:
        """Return that the model answers.

        Raises:
            NotReady: It does not.
        """
        name, phase = self._spec.name, self._host.phase
        if phase != "ready":
            raise NotReady(f"model {name!r} is {phase}", phase=phase, retry_after_s=2.0)
        return {"name": name, "ready": True}

    def stats(self) -> dict[str, Any]:
        """Return the statistics in Triton's words (statistics extension); what is not measured here is zero."""
        stats = self._host.stats()
        none = {"count": 0, "ns": 0}
        parts = (
            "success",
            "fail",
            "queue",
            "compute_input",
            "compute_infer",
            "compute_output",
            "cache_hit",
            "cache_miss",
        )
        entry = {
            "name": self._spec.name,
            "version": self._protocol.version,
            "last_inference": 0,
            "inference_count": stats.items,
            "execution_count": stats.batches,
            "inference_stats": dict.fromkeys(parts, none) | {"success": {"count": stats.items, "ns": 0}},
            "batch_stats": [],
            "response_stats": {},
            "memory_usage": [],
            "queue": {"items": stats.queued, "bytes": stats.queued_bytes, "running": stats.running},
            "dropped_count": stats.dropped,
            "items_per_second": stats.items_per_s,
        }
        return {"model_stats": [entry]}

    async def explain(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """`GET /explain`: why there are as many replicas as there are."""
        told = await asyncio.to_thread(self._explain)
        await send_bytes(send, 200, [JSON_HEADER, *echoed(headers)], orjson.dumps(told))

    # Hot routes

    def _tell_content(self, scope: Scope, body: bytes) -> None:
        """Have a recorded request's span hold what was sent, where that is asked for."""
        if self._tracer is not None and self._tracer.sampling.content:
            Passage.of(scope).tell({"roundhouse.request.body": body[:_LONGEST_CONTENT].decode("utf-8", "replace")})

    async def _infer(
        self, scope: Scope, items: Sequence[Item], receive: Receive, *, timeout_s: float | None, size_bytes: int
    ) -> Sequence[Result]:
        passage = Passage.of(scope)
        work = self._host.infer(items, timeout_s=timeout_s, size_bytes=size_bytes, passage=passage)
        return await (unless_disconnected(work, receive) if self._watch else work)

    async def infer(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        """`POST /infer`: tensors in, tensors out."""
        wait_s = timeout_s(headers)
        check_media_type(headers)
        body = await read_body(headers, receive, limit=self._limit, uploads=self._uploads)
        self._tell_content(scope, body)
        request = await read_apart(partial(self._protocol.read, header_length=headers.get(HEADER_LENGTH)), body)
        if request.timeout_s is not None:
            wait_s = request.timeout_s if wait_s is None else min(wait_s, request.timeout_s)
        results = await self._infer(scope, request.items, receive, timeout_s=wait_s, size_bytes=len(body))
        answer, content = self._protocol.write(request, results)
        answer += echoed(headers)
        encoding = asked_encoding(headers)
        if encoding is not None:
            content = compress(content, encoding)
            answer.append((b"content-encoding", encoding.encode()))
        await send_bytes(send, 200, answer, content)

    async def embeddings(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        """`POST /v1/embeddings`: texts in, vectors out."""
        openai_surface.check_task("embeddings", self._spec)
        wait_s = timeout_s(headers)
        check_media_type(headers)
        body = await read_body(headers, receive, limit=self._limit, uploads=self._uploads)
        self._tell_content(scope, body)
        request = await read_apart(
            lambda raw: openai_surface.read_embeddings(parse_object(raw), self._spec, self._signature), body
        )
        items = [{"text": text} for text in request.texts]
        with _about_field("input"):
            results = await self._infer(scope, items, receive, timeout_s=wait_s, size_bytes=len(body))
        passage = Passage.of(scope)
        if passage.trace is not None:
            passage.tell(genai.embedding_details(self._spec.name, results))
        answer = openai_surface.embeddings_answer(request, results, model=self._spec.name)
        content = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        await send_bytes(send, 200, [JSON_HEADER, *echoed(headers)], content)

    async def transcriptions(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        """`POST /v1/audio/transcriptions`: a recording in, its words out."""
        openai_surface.check_task("audio/transcriptions", self._spec)
        wait_s = timeout_s(headers)
        body = await read_body(headers, receive, limit=self._limit, uploads=self._uploads)
        form = await read_apart(partial(parse_form, headers.get(b"content-type")), body)
        request = openai_surface.read_transcription(form, self._spec, self._signature)
        with _about_field("file"):
            results = await self._infer(scope, [request.item], receive, timeout_s=wait_s, size_bytes=len(body))
        answer = openai_surface.transcription_answer(request, results[0])
        if isinstance(answer, str):
            kind = (b"content-type", b"text/plain; charset=utf-8")
            await send_bytes(send, 200, [kind, *echoed(headers)], answer.encode())
        else:
            await send_bytes(send, 200, [JSON_HEADER, *echoed(headers)], orjson.dumps(answer))

    def _tell_text(
        self,
        passage: Passage,
        request: openai_surface.TextRequest,
        told: openai_surface.TextAnswer,
        results: Sequence[Result],
    ) -> None:
        if passage.trace is not None:
            operation = "chat" if request.field == "messages" else "text_completion"
            usage = told.usage(results)
            passage.tell(genai.text_details(operation, self._spec.name, request, results, usage))

    def _text(self, endpoint: str) -> Answer:
        """Return what answers `POST /v1/<endpoint>`: a prompt or a chat in, text out, whole or as events."""
        read = _READERS[endpoint]

        async def answer(scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
            openai_surface.check_task(endpoint, self._spec)
            wait_s = timeout_s(headers)
            check_media_type(headers)
            body = await read_body(headers, receive, limit=self._limit, uploads=self._uploads)
            self._tell_content(scope, body)
            request = await read_apart(lambda raw: read(parse_object(raw), self._spec, self._signature), body)
            told = openai_surface.TextAnswer(
                request,
                chat=endpoint.startswith("chat/"),
                number=uuid.uuid4().hex,
                created=int(time.time()),
                model=self._spec.name,
            )
            with _about_field(request.field, choices=request.choices):
                if request.stream:
                    await self._stream(request, told, scope, headers, receive, send, wait_s, len(body))
                    return
                results = await self._infer(scope, request.items, receive, timeout_s=wait_s, size_bytes=len(body))
            self._tell_text(Passage.of(scope), request, told, results)
            content = orjson.dumps(told.whole(results), option=orjson.OPT_SERIALIZE_NUMPY)
            await send_bytes(send, 200, [JSON_HEADER, *echoed(headers)], content)

        return answer

    async def _stream(
        self,
        request: openai_surface.TextRequest,
        told: openai_surface.TextAnswer,
        scope: Scope,
        headers: Headers,
        receive: Receive,
        send: Send,
        wait_s: float | None,
        size_bytes: int,
    ) -> None:
        """Send the choices as server-sent events; an error before the first part has its status, later an event."""
        last: dict[int, Result] = {}
        started = False
        passage = Passage.of(scope)
        try:
            together = merged(self._host, request.items, timeout_s=wait_s, size_bytes=size_bytes, passage=passage)
            async with cancelled_on_disconnect(receive), together as parts:
                async for index, part in parts:
                    events = told.chunks(index, part)
                    if not started:
                        started = True
                        start = {"type": "http.response.start", "status": 200, "headers": [*_EVENTS, *echoed(headers)]}
                        await send(start)
                        events = [event for i in range(len(request.items)) if (event := told.opening(i))] + events
                    if part.get("finish_reason") is not None:
                        last[index] = part
                    if events:
                        await _send_events(send, events)
                results = [last[index] for index in sorted(last)]
                self._tell_text(passage, request, told, results)
                closing = told.closing(results)
                await _send_events(send, [closing] if closing else [], end=b"data: [DONE]\n\n")
        except Exception as error:
            if not started:
                raise
            note_failure(passage, error)
            await _send_events(send, [openai_shape(*describe(error))], end=b"")
        if started:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_events(send: Send, events: Sequence[dict[str, Any]], *, end: bytes = b"") -> None:
    body = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events) + end
    await send({"type": "http.response.body", "body": body, "more_body": True})


@contextlib.contextmanager
def _about_field(field: str, *, choices: int = 1) -> Any:
    """Tell errors about an item as errors about the request's field that it, or `choices` of them, came from."""
    try:
        yield
    except InvalidInput as error:
        raise openai_surface.of_request(error, field, choices=choices) from error


@contextlib.asynccontextmanager
async def merged(
    host: Host,
    items: Sequence[Item],
    *,
    timeout_s: float | None,
    size_bytes: int,
    passage: Passage | None = None,
) -> AsyncIterator[AsyncIterator[tuple[int, Result]]]:
    """Stream several items at once: yields an iterator of (which item, part) that ends with the last of them.

    Leaving the block closes every stream, so that its slot is free within one step.
    """
    queue: asyncio.Queue[tuple[int, Result] | Exception | None] = asyncio.Queue(maxsize=4 * len(items))

    async def pump(index: int, item: Item) -> None:
        try:
            share = size_bytes // len(items)
            stream = host.stream(item, timeout_s=timeout_s, size_bytes=share, passage=passage)
            async with contextlib.aclosing(stream) as parts:  # type: ignore[type-var]
                async for part in parts:
                    await queue.put((index, part))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    async def parts() -> AsyncIterator[tuple[int, Result]]:
        ended = 0
        while ended < len(items):
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                ended += 1
            else:
                yield found

    pumps: list[Awaitable[None]] = [asyncio.ensure_future(pump(index, item)) for index, item in enumerate(items)]
    try:
        yield parts()
    finally:
        for task in pumps:
            task.cancel()  # type: ignore[attr-defined]
        await asyncio.gather(*pumps, return_exceptions=True)
