"""Guard the local server: only the browser that was given its address may use it.

Every local program, and every web page open in the browser, can reach a loopback port. Therefore:

- The address contains a token, random at each start, which the browser then keeps in a cookie.
- The host of a request must be a name of this machine, against DNS rebinding.
- Requests from other pages are refused by their origin.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost")
POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Guard:
    """ASGI middleware that refuses requests without the token or from other pages.

    Args:
        app: Application to guard.
        token: Random secret of this start of the server.
        cookie: Name of the cookie with the token. It must differ between servers on different
            ports, which share the cookies of a host.
    """

    app: ASGIApp
    token: str
    cookie: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer refused requests, and pass the others on to the application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        answer = self._answer(Request(scope)) or self.app
        await answer(scope, receive, send_guarded)

    def _answer(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if _hostname(host) not in HOSTS:
            return PlainTextResponse("This server answers to 127.0.0.1 and localhost.", 421)
        given = request.query_params.get("token")
        if request.method == "GET" and request.url.path == "/" and given is not None:
            if not self._is_token(given):
                return _refused()
            answer = RedirectResponse("/", 303)
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
            return answer
        if not self._is_token(request.cookies.get(self.cookie, "")):
            return _refused()
        if request.url.path != "/" and request.headers.get("sec-fetch-site") in (
            "cross-site",
            "same-site",
        ):
            return PlainTextResponse("Another page asked for this.", 403)
        # browsers send the origin of every POST; another port of this machine is another origin
        if request.method not in ("GET", "HEAD") and request.headers.get("origin") != (
            f"http://{host}"
        ):
            return PlainTextResponse("Another page sent this.", 403)
        return None

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _refused() -> Response:
    return PlainTextResponse("Open the address that `realign browse` printed, token included.", 403)
