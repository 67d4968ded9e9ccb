"""The HTTP routes: `/v1/models`, `/v1/completions`, `/v1/chat/completions`, `/health`, `/metrics`."""

import asyncio
import hmac
import itertools
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

import sparseflow
from sparseflow.serving.api_error import ApiError
from sparseflow.serving.front import Front
from sparseflow.serving.limits import BodyLimit, Observed
from sparseflow.serving.requests import ChatRequest, CompletionRequest
from sparseflow.serving.responses import ChatResponse, CompletionResponse
from sparseflow.serving.responses import Response as Answer
from sparseflow.serving.work import Work

_log = logging.getLogger(__name__)
_HUNG_UP = 499  # nginx's number for it; nobody sees it but the log


def make_app(front: Front) -> FastAPI:
    """The application around an open front."""
    app = FastAPI(title="SparseFlow", version=sparseflow.__version__, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit)
    app.add_middleware(Observed, metrics=front.metrics)
    _add_error_handlers(app)
    job_ids = itertools.count(1)

    def require_key(request: Request) -> None:
        if front.api_keys and not _is_known(request.headers.get("authorization", ""), front.api_keys):
            raise ApiError(401, "invalid_api_key", "no API key, or a wrong one; send it as `Authorization: Bearer KEY`")

    private = [Depends(require_key)]

    @app.get("/health")
    def health() -> JSONResponse:
        state = front.health()
        return JSONResponse(state, status_code=200 if state["status"] == "ok" else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return PlainTextResponse(generate_latest(front.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", dependencies=private)
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [front.model_card()]}

    @app.get("/v1/models/{name:path}", dependencies=private)
    def model(name: str) -> dict[str, Any]:
        front.require_model(name)
        return front.model_card()

    @app.post("/v1/completions", dependencies=private)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        front.require_model(asked.model)
        jobs = asked.jobs(job_ids)
        answer = CompletionResponse(front.name, front.fidelity, asked.n, len(jobs), asked.logprobs is not None)
        work = Work(front.pool, jobs, front.metrics)
        return await _respond(request, work, answer, asked.stream, asked.tells_usage)

    @app.post("/v1/chat/completions", dependencies=private)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        front.require_model(asked.model)
        front.require_chat_template()
        answer = ChatResponse(front.name, front.fidelity, asked.n, 1, asked.logprobs)
        work = Work(front.pool, asked.jobs(job_ids), front.metrics)
        return await _respond(request, work, answer, asked.stream, asked.tells_usage)

    return app


def _is_known(header: str, keys: frozenset[str]) -> bool:
    scheme, _, key = header.partition(" ")
    # All are compared, so that the time taken tells nothing of them.
    n_equal = sum(hmac.compare_digest(key.encode(), known.encode()) for known in keys)
    return scheme.lower() == "bearer" and n_equal > 0


def _add_error_handlers(app: FastAPI) -> None:
    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    def api_error(request: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    def wrong_field(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(_of_validation(error))

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return answer(ApiError(error.status_code, "not_found" if error.status_code == 404 else "http", error.detail))

    @app.exception_handler(Exception)
    def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return answer(ApiError(500, "internal", f"{type(error).__name__}; see the log"))


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong, in one line."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = place[0] if place else None
    if first["type"] == "extra_forbidden":
        return ApiError(400, "unknown_field", f"{'.'.join(place)}: not known here; leave it out", param)
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_json", f"the body is no JSON ({first['ctx']['error']})")
    text = first["msg"].removeprefix("Value error, ")
    return ApiError(400, "invalid_value", f"{'.'.join(place)}: {text}" if place else text, param)


# --- answering


async def _respond(request: Request, work: Work, answer: Answer, streams: bool, tells_usage: bool) -> Response:
    """Answer with all of it, or with a stream once the first message is there: until then an error has a status."""
    messages = work.messages()
    try:
        if not streams:
            if await _unless_hung_up(request, _take_all(messages, answer)):
                return JSONResponse(answer.whole())
            return Response(status_code=_HUNG_UP)
        first: list[Any] = []
        if not await _unless_hung_up(request, _take_first(messages, first)):
            return Response(status_code=_HUNG_UP)
    except BaseException:
        await work.close()
        raise
    finally:
        if not streams:
            await work.close()
    return _EventStream(work, _events(first, messages, answer, tells_usage))


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
    """A stream that ends its work, whether its client stays or hangs up."""

    def __init__(self, work: Work, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._work.close()
