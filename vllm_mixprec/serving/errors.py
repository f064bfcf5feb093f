# SPDX-License-Identifier: Apache-2.0
"""Every failure of our routes as JSON: ``{"error": {"type", "message", "field"?}}``."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMUnprocessableEntityError
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from vllm_mixprec.errors import MixPrecError

logger = init_logger("vllm.mixprec")

_SHOWN_PROBLEMS = 5
# vLLM's names of what our requests call otherwise.
_FIELDS = {"max_tokens": "max_new_tokens", "max_output_tokens": "max_new_tokens"}


class ApiError(Exception):
    """A request that is answered with an error.

    ``type`` is for programs: ``invalid_request``, ``forbidden``, ``conflict``, ``unavailable``,
    ``timeout``, ``not_implemented``, ``internal``.
    """

    def __init__(self, status: int, type: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.type, self.message, self.field = status, type, message, field

    def response(self) -> JSONResponse:
        error = {"type": self.type, "message": self.message}
        if self.field is not None:
            error["field"] = self.field
        return JSONResponse({"error": error}, status_code=self.status)


class MixPrecRoute(APIRoute):
    """A route whose errors are ours; vLLM's handlers would answer a bad field with 400."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_errors(request: Request) -> Response:
            try:
                self.admit()
                return await handle(request)
            except Exception as error:
                return explain(error, request).response()

        return handle_errors

    def admit(self) -> None:
        """Refuse a request before its body is read.

        Raises:
            ApiError: it may not be made.
        """


def explain(error: Exception, request: Request) -> ApiError:
    """Say what an exception means to the client; what nobody foresaw is logged."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _explain_fields(error.errors())
        case MixPrecError():
            return ApiError(503, "unavailable", str(error))
        case EngineDeadError():
            return ApiError(
                503, "unavailable", "the engine has died; the server's log says why. Restart it"
            )
        case TimeoutError() | asyncio.TimeoutError():  # two classes in Python 3.10
            message = str(error) or "the engine did not answer in time. Try again"
            return ApiError(504, "timeout", message)
        case GracefulHTTPError():
            return ApiError(int(error.http_status), "unavailable", str(error))
        case VLLMClientError():
            status = 422 if isinstance(error, VLLMUnprocessableEntityError) else 400
            field: str | None = getattr(error, "parameter", None)
            return ApiError(status, "invalid_request", str(error), _FIELDS.get(field or "", field))
        case EngineGenerateError():
            return ApiError(
                500, "internal", "the engine failed on this request; the server's log says why"
            )
        case _:
            logger.exception("%s %s failed", request.method, request.url.path)
            return ApiError(500, "internal", "the request failed; the server's log says why")


def _explain_fields(problems: Sequence[Any]) -> ApiError:
    """Name the fields, never repeat their values: they can be megabytes."""
    named = [(_name_field(problem), _spell(problem)) for problem in problems[:_SHOWN_PROBLEMS]]
    message = "; ".join(f"{field}: {what}" for field, what in named)
    if len(problems) > _SHOWN_PROBLEMS:
        message += f"; and {len(problems) - _SHOWN_PROBLEMS} more"
    return ApiError(422, "invalid_request", message, named[0][0])


def _spell(problem: Any) -> str:
    if problem["type"] == "model_attributes_type":
        return "expected a JSON object, sent with Content-Type: application/json"
    return str(problem["msg"])


def _name_field(problem: Any) -> str:
    """Spell ``("body", "prompts", 3)`` as ``prompts.3``; the whole body is ``body``."""
    if problem["type"] == "json_invalid":
        return "body"
    return ".".join(str(part) for part in problem["loc"][1:]) or str(problem["loc"][0])
