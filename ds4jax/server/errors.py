"""What a client is told when a request cannot be served, in the shape of the API that it speaks."""

from __future__ import annotations

from typing import Any

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
_ANTHROPIC_KINDS = {413: "request_too_large", 503: "overloaded_error"}


class ApiError(Exception):
    """An error with its HTTP status; the message is for the client, and so is every detail in it.

    param: the field at fault. code: a word that programs look for, such as `context_length_exceeded`.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def openai(self) -> dict[str, Any]:
        """The body of an error of OpenAI's API."""
        kind = _KINDS.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """The body of an error of Anthropic's API."""
        kind = _ANTHROPIC_KINDS.get(self.status) or _KINDS.get(self.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def shaped(self, path: str) -> dict[str, Any]:
        """The body of an error in the API that the path belongs to."""
        return self.anthropic() if path.startswith("/v1/messages") else self.openai()


def internal() -> ApiError:
    """What is told of a fault of the server: nothing but that there was one; the log has the rest."""
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")
