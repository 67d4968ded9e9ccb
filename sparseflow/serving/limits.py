"""Around every request: how much it may send, and what is noted of it."""

import logging
import time

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparseflow.serving.api_error import ApiError
from sparseflow.serving.metrics import Metrics

BODY_NBYTES_MAX = 16 << 20
_log = logging.getLogger("sparseflow.serving")


class BodyLimit:
    """Takes a request's body before anybody looks at it, and refuses one that is too large."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > BODY_NBYTES_MAX:
                error = ApiError(413, "body_too_large", f"the body has more than {BODY_NBYTES_MAX} bytes; send less")
                await JSONResponse(error.body(), error.status, {"Connection": "close"})(scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def received() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, received, send)


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
        finally:
            took_s = time.perf_counter() - begin_s
            # The route's own pattern: paths that clients make up would make labels without end.
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, scope["method"], str(status)).inc()
            self._metrics.request_s.labels(route).observe(took_s)
            _log.info(
                "%s %s %d %.3f s", scope["method"], scope["path"], status, took_s,
                extra={"method": scope["method"], "path": scope["path"], "status": status, "seconds": took_s},
            )  # fmt: skip
