# SPDX-License-Identifier: Apache-2.0
"""The HTTP side of `jaxllm serve`: routes, checks, streams, and the server's thread."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, StreamingResponse
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from jaxllm.chat import TextModel
from jaxllm.errors import UserError
from jaxllm.peft.combine import Choice
from jaxllm.serve.engine import Engine, Event, Job
from jaxllm.serve.protocol import (
    ApiError,
    ChatRequest,
    Piece,
    Request,
    Response,
    TextRequest,
    Usage,
    models,
)
from jaxllm.untrusted import parse_json

KEY = "JAXLLM_API_KEY"  # environment variable with the key that requests must have
MOST_BYTES = 8 << 20  # of a request's body
SECONDS = 30  # for a client to send its body
PAGES = {  # path: (file, type)
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
# The page may load its own style and script and send requests to its own server, and nothing else.
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
T = TypeVar("T")


class Gone(Exception):
    """The client has closed the connection."""


# ---- checks before a route


class Guard:
    """Refuses requests to /v1 without the key or, if there is none, all requests for other hosts.

    A page of another site can send requests to a server on this machine if its name is made to
    resolve to 127.0.0.1 (DNS rebinding); the Host header then has that name. Such a page does not
    have the key. hosts: names that are allowed besides localhost and IP addresses.
    """

    def __init__(self, app: Any, hosts: frozenset[str], key: str | None) -> None:
        self.app, self.hosts, self.key = app, hosts, key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app = self.app
        if scope["type"] == "http":
            try:
                self.check(scope["path"], Headers(scope=scope))
            except ApiError as error:
                app = answered(error)
        await app(scope, receive, send)

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        if self.key is None:
            host = host_of(headers.get("host", ""))
            if host not in self.hosts and not is_address(host):
                problem = f"the Host header names {host[:200]!r}, which is not this server"
                raise ApiError(403, f"{problem}; with a key ({KEY}) it answers under any name")
            return
        if not path.startswith("/v1"):
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.encode("latin-1")  # as it was sent
        if kind.lower() != "bearer" or not hmac.compare_digest(given, self.key.encode()):
            message = "the Authorization header must be: Bearer, and the server's key"
            raise ApiError(401, message, code="invalid_api_key")


def host_of(header: str) -> str:
    """A Host header without its port, in lower case."""
    name = header.lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if ":" in name else name


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def answered(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status)


async def read_body(request: HttpRequest) -> Any:
    """The JSON of a request. Raises ApiError if it is none, too large, or not sent in time."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        # Browsers send JSON to another site only if that site allows it.
        raise ApiError(415, "the Content-Type header must be application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise ApiError(413, f"a body has at most {MOST_BYTES:,} bytes")
        return parse_json(body.decode(), "the body")
    except TimeoutError:
        raise ApiError(408, f"the body was not sent within {SECONDS} s") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason}") from None
    except UserError as error:
        raise ApiError(400, " ".join(str(error).split())) from None


# ---- routes


class Service:
    """The routes of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.began = engine, int(time.time())

    def routes(self) -> list[Route]:
        return [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", partial(self.generate, ChatRequest), methods=["POST"]),
            Route("/v1/completions", partial(self.generate, TextRequest), methods=["POST"]),
            *(Route(path, self.page) for path in PAGES),
        ]

    async def page(self, request: HttpRequest) -> HttpResponse:
        name, media_type = PAGES[request.url.path]
        content = (Path(__file__).parent / name).read_bytes()
        return HttpResponse(content, headers=PAGE_HEADERS, media_type=media_type)

    async def health(self, request: HttpRequest) -> HttpResponse:
        return JSONResponse({"status": "ok"})

    def listed(self) -> dict[str, dict[str, Any]]:
        has_template = bool(self.engine.loaded.tokenizer.chat_template)
        return models(self.engine.names, has_template, self.began)

    async def models(self, request: HttpRequest) -> HttpResponse:
        return JSONResponse({"object": "list", "data": list(self.listed().values())})

    async def model(self, request: HttpRequest) -> HttpResponse:
        name = self.engine.known(request.path_params["name"])
        return JSONResponse(self.listed()[name])

    async def generate(self, kind: type[Request], request: HttpRequest) -> HttpResponse:
        wanted = kind.read(await read_body(request))
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = self.engine.submit(wanted, emit)
        response = Response(wanted, job.model)
        try:
            if not wanted.stream:
                found = await unless_gone(request, collected(events))
                return JSONResponse(response.whole(found, job.usage))
            # An error before the first part is an answer with its status.
            first = await unless_gone(request, following(events))
        except BaseException:
            job.cancel()
            raise
        return Stream(job, server_sent(response, first, events))


class Stream(StreamingResponse):
    """A stream of events, whose job is cancelled when the client closes the connection, even before
    the first part."""

    def __init__(self, job: Job, parts: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(parts, media_type="text/event-stream", headers=headers)
        self.job = job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


async def following(events: asyncio.Queue[Event]) -> Piece | Usage:
    event = await events.get()
    if isinstance(event, ApiError):
        raise event
    return event


async def collected(events: asyncio.Queue[Event]) -> list[Piece]:
    pieces: list[Piece] = []
    while isinstance(event := await following(events), Piece):
        pieces.append(event)
    return pieces


async def server_sent(
    response: Response, event: Piece | Usage, events: asyncio.Queue[Event]
) -> AsyncIterator[str]:
    """The parts of a stream, each an event of text/event-stream."""
    try:
        while isinstance(event, Piece):
            yield as_event(response.chunk(event))
            event = await following(events)
        if (last := response.usage_chunk(event)) is not None:
            yield as_event(last)
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield as_event(error.body)


def as_event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def unless_gone(request: HttpRequest, awaited: Awaitable[T]) -> T:
    """The result of `awaited`. Raises Gone as soon as the client closes the connection."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(awaited), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise Gone
    finally:
        for task in tasks:
            task.cancel()


# ---- the application and its server


def application(engine: Engine, hosts: frozenset[str] = frozenset(), key: str | None = None) -> Any:
    """The ASGI application. hosts: further names of this machine; key: as in `Guard`."""

    async def refused(request: HttpRequest, error: Any) -> HttpResponse:
        return answered(error)

    async def unknown(request: HttpRequest, error: Any) -> HttpResponse:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code)

    async def gone(request: HttpRequest, error: Any) -> HttpResponse:
        return HttpResponse(status_code=499)  # nobody reads it

    return Starlette(
        routes=Service(engine).routes(),
        middleware=[Middleware(Guard, hosts=hosts | {"localhost"}, key=key)],
        exception_handlers={ApiError: refused, HTTPException: unknown, Gone: gone},
    )


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one. Raises UserError if it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "give another --port" if is_loopback(host) else "give another --host or --port"
        raise UserError(f"{host}:{port} cannot be listened on: {reason}; {remedy}") from None


@contextmanager
def listening(app: Any, at: socket.socket) -> Iterator[str]:
    """Serves an application in a thread of its own; yields the address."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([at],), name="http", daemon=True)
    thread.start()
    host, port = at.getsockname()[:2]
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
        at.close()


def serve(
    model: str,
    host: str,
    port: int,
    *,
    use: Sequence[Choice],
    max_new_tokens: int,
    **options: Any,
) -> None:
    """Serves a model until Ctrl-C. use: one choice among its adapters, or none; options: of
    `TextModel.load`. Raises UserError if the model cannot be loaded, or the address not be used."""
    key = os.environ.get(KEY) or None
    socket_ = bound(host, port)
    loaded = TextModel.load(model, **options).for_decoding()
    engine = Engine(loaded, model, use=use, max_new_tokens=max_new_tokens)
    hosts = frozenset[str]()
    if not is_loopback(host):
        hosts = frozenset({host.lower(), socket.gethostname().lower()})
        who = f"with {KEY}'s key" if key else f"without a key (set {KEY})"
        print(f"warning: other machines can use this server, {who}", file=sys.stderr)
    with listening(application(engine, hosts, key), socket_) as address:
        print(loaded.summary(model, options.get("template")))
        print(f"serving at {address}: a chat page, and the API at {address}/v1; Ctrl-C stops")
        sys.stdout.flush()
        with closed_by_signals(engine):
            engine.warm_up()
            engine.run()


@contextmanager
def closed_by_signals(engine: Engine) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the engine's loop after its step, since a process that exits while a
    program runs may crash. The second one ends the process at once."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for name, handler in before.items():
            signal.signal(name, handler)

    def handle(*_: Any) -> None:
        restore()
        engine.close()

    for name in before:
        signal.signal(name, handle)
    try:
        yield
    finally:
        restore()
