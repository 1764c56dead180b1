"""The routes: /v1/models, /v1/chat/completions, /health, /ready, /metrics. Who may ask is guard.py's matter.

Errors have OpenAI's form. A client that disconnects, streaming or not, frees the model within two tokens.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from ming_app.engine.types import DEADLINE, PATIENCE, Event, Queued, Start
from ming_app.errors import NotReadyError
from ming_app.serve.answers import events
from ming_app.serve.completions import Completion, fingerprint
from ming_app.serve.errors import ApiError, api_error, invalid
from ming_app.serve.guard import language
from ming_app.serve.metrics import Metrics
from ming_app.serve.schema import ChatRequest
from ming_app.settings import Settings

logger = logging.getLogger(__name__)
T = TypeVar("T")

GONE = Response(status_code=499)  # for nobody
SSE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Api:
    """`engine` gives the Engine, or raises ApiError while there is none."""

    def __init__(self, engine: Callable[[], Any], settings: Settings, metrics: Metrics):
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.router = APIRouter()
        add = self.router.add_api_route
        add("/v1/models", self.models, methods=["GET"], summary="The model that is served")
        add("/v1/models/{name:path}", self.model, methods=["GET"], summary="One model")
        add(
            "/v1/chat/completions",
            self.complete,
            methods=["POST"],
            summary="Answers a conversation",
            response_model=None,
        )
        add("/health", self.health, methods=["GET"], summary="The process is alive")
        add("/ready", self.ready, methods=["GET"], summary="The model can answer", response_model=None)
        add("/metrics", self.measured, methods=["GET"], summary="Counters for Prometheus", response_model=None)
        add(
            "/v1/{rest:path}",
            self.nothing_here,
            methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            include_in_schema=False,
            response_model=None,
        )

    def models(self) -> dict[str, Any]:
        """The list of one: this server has one model."""
        return {"object": "list", "data": [self._card()]}

    def model(self, name: str) -> dict[str, Any]:
        """Raises ApiError for a name that is not served."""
        self._check_model(name)
        return self._card()

    def health(self) -> dict[str, str]:
        """Whatever the model does."""
        return {"status": "ok"}

    def ready(self) -> JSONResponse:
        """200 once the model can answer; 503 while it loads, when it could not be loaded, and while the server stops."""
        try:
            engine = self.engine()
            if engine.draining:
                return JSONResponse({"status": "closing"}, 503)
            running, waiting = engine.load_now()
        except NotReadyError as error:
            return JSONResponse({"status": api_error(error).code}, 503)
        return JSONResponse({"status": "ready", "running": running, "waiting": waiting})

    def measured(self) -> Response:
        """Prometheus' text form."""
        return Response(self.metrics.text(), media_type=self.metrics.content_type)

    def nothing_here(self, rest: str) -> None:
        raise ApiError(
            404,
            "invalid_request_error",
            "not_found",
            "There is no such address here. This server has /v1/models and /v1/chat/completions.",
            "没有这个地址。本服务提供 /v1/models 和 /v1/chat/completions。",
        )

    async def complete(self, request: Request, asked: ChatRequest) -> Response:
        """One answer, whole or as server-sent events."""
        try:
            return await self._complete(request, asked)
        except Exception as error:
            raise _told(error) from None

    async def _complete(self, request: Request, asked: ChatRequest) -> Response:
        engine, lang = self.engine(), language(request.scope)
        self._check_model(asked.model)
        if asked.top_logprobs and not asked.logprobs:
            raise invalid(
                "top_logprobs", "top_logprobs needs logprobs: true.", "使用 top_logprobs 须设置 logprobs: true。"
            )
        messages = [one.message() for one in asked.messages]
        params = asked.params(_visitor(request, asked), DEADLINE, PATIENCE)
        completion = await run_in_threadpool(  # looking for signs of an emergency takes a while in a long text
            Completion,
            engine.info,
            engine.tokenizer,
            messages,
            lang,
            self.settings.region,
            logprobs=asked.logprobs,
            trace=asked.router_trace,
        )
        stream = events(engine, messages, params)
        if not asked.stream:
            return await _while_connected(request, self._whole(engine, stream, completion)) or GONE
        first = await _while_connected(request, anext(stream))  # a refusal has its status
        if first is None:
            await stream.aclose()
            return GONE
        completion.info = engine.info  # of several engines it is now known which one answers
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        sent = _server_sent(first, stream, completion, lang, usage)
        return StreamingResponse(sent, media_type="text/event-stream", headers=SSE)

    async def _whole(self, engine: Any, stream: AsyncGenerator[Event], completion: Completion) -> Response:
        async with aclosing(stream):
            async for event in stream:
                if isinstance(event, Start):
                    completion.info = engine.info
                if not isinstance(event, Queued):
                    completion.take(event)
        return JSONResponse(await run_in_threadpool(completion.whole))

    def _check_model(self, name: str) -> None:
        if name not in ("", self.engine().info.model):
            raise ApiError(
                404,
                "invalid_request_error",
                "model_not_found",
                f"This server has the model {self.engine().info.model} only.",
                f"本服务只提供模型 {self.engine().info.model}。",
                param="model",
            )

    def _card(self) -> dict[str, Any]:
        info = self.engine().info
        return {
            "id": info.model,
            "object": "model",
            "created": 0,
            "owned_by": "ming-app",
            "ming": {
                "title": info.title,
                "backend": info.backend,
                "precision": info.precision,
                "device": info.device,
                "context_limit": info.context_limit,
                "num_layers": info.num_layers,
                "num_experts": info.num_experts,
                "top_k": info.top_k,
                "fingerprint": fingerprint(info),
            },
        }


def explain_errors(app: FastAPI) -> None:
    """Every error of the app's own routes in the API's form, in the client's language."""

    async def told(request: Request, error: Exception) -> JSONResponse:
        return _told(error).response(language(request.scope))

    async def wrong(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _invalid(error).response(language(request.scope))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        said = ApiError(
            error.status_code, "invalid_request_error", kind, "This cannot be done here.", "此处无法执行该操作。"
        )
        response = said.response(language(request.scope))
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(RequestValidationError, wrong)
    app.add_exception_handler(HTTPException, http)
    for kind in (ApiError, NotReadyError):
        app.add_exception_handler(kind, told)


def _told(error: BaseException) -> ApiError:
    """Logs a bug by its kind and place, without anybody's words."""
    said = api_error(error)
    if said is not error and said.code == "internal_error":
        logger.error(
            "a request failed: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
        )
    return said


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong, by the name of its field."""
    first = error.errors()[0]
    kind, place = first["type"], [part for part in first["loc"] if part != "body"]
    if kind == "json_invalid" or not place:
        return invalid(
            None,
            "The body must be a JSON object, sent as application/json.",
            "请求体应为 JSON 对象，并以 application/json 发送。",
            "invalid_json",
        )
    shown = [str(part) for part in place if not isinstance(part, str) or part.isidentifier()]
    name = ".".join(part[:60] for part in shown)
    if kind == "extra_forbidden":
        return invalid(name, f"{name} is not supported here.", f"不支持 {name}。", "unsupported_parameter")
    if kind == "missing":
        return invalid(name, f"{name} is missing.", f"缺少 {name}。", "missing_required_parameter")
    return invalid(name, f"{name}: {first['msg']}.", f"{name} 的值无效（{first['msg']}）。")


def _visitor(request: Request, asked: ChatRequest) -> str:
    """Who takes turns with the others: a key, or one of its users; on this machine without keys only a named user."""
    key = request.state.visitor
    if not asked.user:
        return key
    return f"{key}:{hashlib.sha256(asked.user.encode('utf-8', 'replace')).hexdigest()[:16]}"


async def _while_connected(request: Request, answering: Awaitable[T]) -> T | None:
    """Runs to the end; None when the client goes away: nothing else would notice while no byte is sent."""
    work = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        return None
    finally:
        for task in (work, gone):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _server_sent(
    first: Event, stream: AsyncGenerator[Event], completion: Completion, lang: str, usage: bool
) -> AsyncIterator[str]:
    """Server-sent events. While it waits for its turn a comment says so, which clients skip."""
    opened = False
    try:
        async with aclosing(stream):
            event: Event | None = first
            while event is not None:
                if isinstance(event, Queued):
                    yield f": {event.before} before you, about {event.seconds:.0f} s\n\n"
                else:
                    text = completion.take(event)
                    if not opened:
                        opened = True
                        yield _data(completion.opening_chunk())
                    if text:
                        yield _data(completion.text_chunk(text))
                event = await anext(stream, None)
    except Exception as error:  # after the status has been sent
        yield _data(_told(error).body(lang))
        return
    yield _data(await run_in_threadpool(completion.closing_chunk))
    if usage:
        yield _data(completion.usage_chunk())
    yield "data: [DONE]\n\n"


def _data(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
