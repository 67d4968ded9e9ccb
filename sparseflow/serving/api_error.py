"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP. code: a name for programs. param: the field that is at fault, where one is.
    """

    def __init__(self, status: int, code: str, text: str, param: str | None = None, retry_after_s: int | None = None):
        super().__init__(text)
        self.status, self.code, self.text, self.param = status, code, text, param
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}

    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.text, "type": kind, "param": self.param, "code": self.code}}
