# SPDX-License-Identifier: Apache-2.0
"""The dashboard page: one file, whose scripts the browser checks against their hashes."""

import base64
import hashlib
import re
from importlib.resources import files

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HTML = files("vllm_mixprec.serving").joinpath("dashboard.html").read_text(encoding="utf-8")
_ROOT_TAG = '<html lang="en">'
# To a browser that has sent no key yet, the same page says so at once.
_LOCKED_HTML = _HTML.replace(_ROOT_TAG, '<html lang="en" data-locked="true">')


def _hash_elements(tag: str) -> str:
    """Return the CSP sources of a page's inline elements of one kind."""
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", _HTML, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(body.encode()).digest()) for body in bodies)
    return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)


_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hash_elements('script')}; "
        f"style-src {_hash_elements('style')}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def dashboard() -> HTMLResponse:
    """Return the page. It holds nothing about the model; its script asks for that."""
    return HTMLResponse(_HTML, headers=_HEADERS)


class KeyPrompt:
    """Gives a browser that opens the page without the API key the page that asks for one.

    A browser cannot send a header when a user types an address. The status stays vLLM's 401; only
    its body becomes the page, which is the same for everybody.
    """

    def __init__(self, app: ASGIApp, path: str) -> None:
        self._app, self._path = app, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._concerns(scope):
            await self._app(scope, receive, send)
            return
        replaced = False

        async def send_page(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] == 401:
                replaced = True
                page = HTMLResponse(_LOCKED_HTML, status_code=401, headers=_HEADERS)
                await page(scope, receive, send)
            elif not replaced:
                await send(message)

        await self._app(scope, receive, send_page)

    def _concerns(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["method"] != "GET":
            return False
        # A program that sends a wrong key gets vLLM's own answer.
        if "authorization" in Headers(scope=scope):
            return False
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        return path == self._path
