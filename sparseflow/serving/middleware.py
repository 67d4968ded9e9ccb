"""Around every request: who may ask, how much it may send, and what is noted of it (plain ASGI: streams pass)."""

import asyncio
import hmac
import logging
import time

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparseflow.serving.api_error import ApiError
from sparseflow.serving.metrics import Metrics

BODY_NBYTES_MAX = 16 << 20
BODY_S = 60.0
_METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")
_log = logging.getLogger("sparseflow.serving")


class KeyCheck:
    """Asks for an API key under `/v1`, before anything of a request is read."""

    def __init__(self, app: ASGIApp, keys: frozenset[str]) -> None:
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        is_private = scope["type"] == "http" and scope["path"].startswith("/v1/")
        if self._keys and is_private and not self._is_known(Headers(scope=scope).get("authorization", "")):
            text = "no API key, or a wrong one; send it as `Authorization: Bearer KEY`"
            await _refuse(ApiError(401, "invalid_api_key", text), scope, receive, send, {"WWW-Authenticate": "Bearer"})
            return
        await self._app(scope, receive, send)

    def _is_known(self, header: str) -> bool:
        scheme, _, key = header.partition(" ")
        # All are compared, so that the time taken tells nothing of them.
        n_equal = sum(hmac.compare_digest(key.encode("latin-1"), known) for known in self._keys)
        return scheme.lower() == "bearer" and n_equal > 0


class BodyLimit:
    """Takes a request's body before anybody looks at it, and refuses one that is too large or too slow."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_S):
                body = await _body(receive)
        except TimeoutError:
            error = ApiError(408, "body_too_slow", f"the body was not there within {BODY_S:g} s; send it again")
            await _refuse(error, scope, receive, send)
            return
        except ApiError as error:
            await _refuse(error, scope, receive, send)
            return
        if body is None:  # the client hung up
            return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def received() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, received, send)


async def _body(receive: Receive) -> bytes | None:
    """None where the client hung up. What is too much is read to its end, or the client would not see the answer."""
    body, size, more = bytearray(), 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size, more = size + len(part), message.get("more_body", False)
        if size > BODY_NBYTES_MAX:
            body.clear()
        else:
            body += part
    if size > BODY_NBYTES_MAX:
        text = f"a body of {size} bytes, taken are {BODY_NBYTES_MAX}; send several requests"
        raise ApiError(413, "body_too_large", text)
    return bytes(body)


async def _refuse(
    error: ApiError, scope: Scope, receive: Receive, send: Send, headers: dict[str, str] | None = None
) -> None:
    response = JSONResponse(error.body(), error.status, {"Connection": "close"} | (headers or {}))
    await response(scope, receive, send)


class Observed:
    """Counts each request and logs one line of it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin_s, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = status or 500  # which is answered outside of here
            raise
        finally:
            self._note(scope, status, time.perf_counter() - begin_s)

    def _note(self, scope: Scope, status: int, took_s: float) -> None:
        # The route's own pattern, and known methods: what clients make up would make labels without end.
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.requests.labels(route, method, str(status)).inc()
        self._metrics.request_s.labels(route).observe(took_s)
        fields = {"method": method, "path": scope["path"], "status": status, "seconds": took_s}
        _log.info("%s %r %d %.3f s", method, scope["path"], status, took_s, extra=fields)
