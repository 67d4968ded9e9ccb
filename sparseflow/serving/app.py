"""The HTTP routes: `/v1/models`, `/v1/completions`, `/v1/chat/completions`, `/health`, `/metrics`."""

import asyncio
import itertools
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

import sparseflow
from sparseflow.serving.api_error import ApiError
from sparseflow.serving.front import Front
from sparseflow.serving.middleware import BodyLimit, KeyCheck, Observed
from sparseflow.serving.requests import ChatMessage, ChatRequest, CompletionRequest, StreamOptions
from sparseflow.serving.responses import ChatResponse, CompletionResponse
from sparseflow.serving.responses import Response as Answer
from sparseflow.serving.work import Work

_log = logging.getLogger(__name__)
_HUNG_UP = 499  # nginx's number for it; nobody sees it but the log
_SEND_S = 60.0  # for a client that reads nothing of its stream
_FIELDS = {*CompletionRequest.model_fields, *ChatRequest.model_fields, *ChatMessage.model_fields}
_FIELDS |= {*StreamOptions.model_fields, "text", "type"}


def make_app(front: Front) -> FastAPI:
    """The application around an open front."""
    app = FastAPI(title="SparseFlow", version=sparseflow.__version__, openapi_url=None)
    app.add_middleware(BodyLimit)
    app.add_middleware(KeyCheck, keys=front.api_keys)
    app.add_middleware(Observed, metrics=front.metrics)
    _add_error_handlers(app)
    job_ids = itertools.count(1)

    @app.get("/health")
    def health() -> JSONResponse:  # in a thread, as /metrics: both ask the weight server
        state = front.health()
        return JSONResponse(state, status_code=200 if state["status"] == "ok" else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return PlainTextResponse(generate_latest(front.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [front.model_card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        front.require_model(name)
        return front.model_card()

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        front.require_model(asked.model)
        jobs = front.fitting(asked.jobs(job_ids))
        answer = CompletionResponse(
            front.name, front.fidelity, asked.n, len(jobs) // asked.n, asked.logprobs is not None
        )
        work = Work(front.pool, jobs, front.metrics)
        return await _respond(request, work, answer, asked.stream, asked.tells_usage)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        front.require_model(asked.model)
        front.require_chat_template()
        answer = ChatResponse(front.name, front.fidelity, asked.n, 1, asked.logprobs)
        work = Work(front.pool, front.fitting(asked.jobs(job_ids)), front.metrics)
        return await _respond(request, work, answer, asked.stream, asked.tells_usage)

    return app


def _add_error_handlers(app: FastAPI) -> None:
    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def wrong_field(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(_of_validation(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        codes = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}
        response = answer(ApiError(error.status_code, codes.get(error.status_code, "http"), error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return answer(ApiError(500, "internal", f"{type(error).__name__}; see the log"))


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong, in one line."""
    first = error.errors()[0]
    # Beside the fields' names there are those of the alternatives that were tried.
    place = [str(part) for part in first["loc"] if isinstance(part, int) or part in _FIELDS]
    param = place[0] if place else None
    if first["type"] == "extra_forbidden":
        unknown = str(first["loc"][-1])
        place += [unknown] if place[-1:] != [unknown] else []  # a field of the other way to ask has its name in there
        param = param or unknown
        return ApiError(400, "unknown_field", f"{'.'.join(place)}: not known here; leave it out", param)
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_json", f"the body is no JSON ({first['ctx']['error']})")
    text = first["msg"].removeprefix("Value error, ")
    return ApiError(400, "invalid_value", f"{'.'.join(place)}: {text}" if place else text, param)


# --- answering


async def _respond(request: Request, work: Work, answer: Answer, streams: bool, tells_usage: bool) -> Response:
    """Answer with all of it, or with a stream once the first message is there: until then an error has a status."""
    messages = work.messages()
    first: list[Any] = []
    stream: Response | None = None
    try:
        is_there = await _unless_hung_up(
            request, _take_first(messages, first) if streams else _take_all(messages, answer)
        )
        if is_there and streams:
            stream = _EventStream(work, _events(first, messages, answer, tells_usage))
            return stream
        return JSONResponse(answer.whole()) if is_there else Response(status_code=_HUNG_UP)
    finally:
        if stream is None:
            await work.close()


async def _take_all(messages: AsyncIterator[Any], answer: Answer) -> None:
    async for number, message in messages:
        answer.take(number, message)


async def _take_first(messages: AsyncIterator[Any], first: list[Any]) -> None:
    first.append(await anext(messages))


async def _unless_hung_up(request: Request, taking: Any) -> bool:
    """Whether it was done before the client hung up."""

    async def until_hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    done, hung_up = asyncio.ensure_future(taking), asyncio.ensure_future(until_hung_up())
    try:
        await asyncio.wait({done, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            done.result()
        return done.done()
    finally:
        done.cancel()
        hung_up.cancel()
        await asyncio.gather(done, hung_up, return_exceptions=True)


async def _events(
    first: list[Any], messages: AsyncIterator[Any], answer: Answer, tells_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events. An error in the midst of it is the last one."""
    try:
        for event in answer.first_events():
            yield _sent(event)
        for number, message in first:
            answer.take(number, message)
        async for number, message in messages:
            if (told := answer.take(number, message)) is not None:
                yield _sent(told)
        if tells_usage:
            yield _sent(answer.usage_event())
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _sent(error.body())


def _sent(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class _EventStream(StreamingResponse):
    """A stream that ends its work, whether its client stays, hangs up, or stops reading."""

    def __init__(self, work: Work, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(_SEND_S):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            _log.warning("a client has read nothing of its stream for %g s; it was left", _SEND_S)
        finally:
            await self._work.close()
