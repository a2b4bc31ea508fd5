"""The web application of `realign browse`: a gallery of pairs, their images, and decisions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from realign.data.decisions import CHOICES
from realign.data.images import MAX_BYTES
from realign.errors import RefusedError
from realign.review.browse.guard import Guard
from realign.review.browse.rows import SORTS, STATUSES, Query, Rows
from realign.review.page import SHARED, load_template, thumbnail
from realign.review.pair_view import PairView

HERE = Path(__file__).parent
PAGE_SIZE = 24
MAX_BODY = 16_384
MAX_NOTE = 2000
SORT_LABELS = {
    "index": "order in the file",
    "similarity": "similarity, low first",
    "-similarity": "similarity, high first",
    "cosine": "cosine, low first",
    "-cosine": "cosine, high first",
    "rank": "rank, low first",
    "-rank": "rank, high first",
    "words": "length, short first",
    "-words": "length, long first",
}
KEYS = (
    ("K", "keep"),
    ("D", "drop"),
    ("F", "flag"),
    ("N", "write a note"),
    ("UZ", "undo the last decision"),
    ("↓↑", "next, previous pair"),
    ("→←", "next, previous page"),
    ("?", "these keys"),
)
MAGIC = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"))


def make_app(rows: Rows, title: str, token: str, cookie: str = "realign") -> Starlette:
    """Return the guarded application.

    Args:
        rows: The dataset and its decisions.
        title: Title of the page.
        token: Secret that a browser must send with its first request.
        cookie: Name of the cookie in which the browser keeps the token.
    """
    pages = _Pages(rows, title)
    return Starlette(
        routes=[
            Route("/", pages.gallery),
            Route("/style.css", lambda request: pages.style),
            Route("/browse.js", lambda request: pages.script),
            Route("/thumbnail/{number:int}/{which}", pages.thumbnail),
            Route("/image/{number:int}/{which}", pages.image),
            Route("/decide", pages.decide, methods=["POST"]),
            Route("/undo", pages.undo, methods=["POST"]),
        ],
        exception_handlers={RefusedError: _failed, OSError: _failed},
        middleware=[Middleware(Guard, token=token, cookie=cookie)],
    )


def _failed(request: Request, error: Exception) -> Response:
    """Return the error as the response, so that a damaged decision file does not go unnoticed."""
    return PlainTextResponse(str(error), 500)


class _Pages:
    """Handlers of the routes; Starlette runs the synchronous ones in threads."""

    def __init__(self, rows: Rows, title: str) -> None:
        self._rows, self._title = rows, title
        self._template = load_template("gallery.html.j2", HERE)
        css = (SHARED / "style.css").read_text("utf-8") + (HERE / "browse.css").read_text("utf-8")
        self.style = Response(css, media_type="text/css")
        script = (HERE / "browse.js").read_text("utf-8")
        self.script = Response(script, media_type="text/javascript")

    def gallery(self, request: Request) -> Response:
        """Return a page of pairs."""
        query, start = read_query(request.query_params)
        page = self._rows.page(query, start, PAGE_SIZE)
        asked = {name: value for name, value in request.query_params.items() if name != "start"}

        def link(**changed: object) -> str:
            return "/?" + urlencode({**asked, **changed})

        values = {
            "title": self._title,
            "pairs": [self._pair(number) for number in page.rows],
            "page": page,
            "query": query,
            "counts": self._rows.counts(),
            "num_rows": len(self._rows),
            "previous": "" if page.previous is None else link(start=page.previous),
            "next": "" if page.next is None else link(start=page.next),
            "sorts": SORT_LABELS,
            "statuses": {status: link(status=status) for status in ("", *STATUSES)},
            "choices": CHOICES,
            "reasons": self._rows.reasons,
            "ranks": self._rows.ranks,
            "max_note": MAX_NOTE,
            "keys": KEYS,
            "is_filtered": dataclasses.replace(query, status="") != Query(),
        }
        return HTMLResponse(self._template.render(values))

    def _pair(self, number: int) -> dict[str, Any]:
        try:
            record = self._rows.record(number)
        except RefusedError as error:
            return {"number": number, "problem": str(error)}
        return {
            "number": number,
            "problem": "",
            "key": record.key,
            "view": PairView.of(record),
            "original": _source(number, "original") if record.images else None,
            "retrieved": _source(number, "retrieved") if record.rejected_images else None,
            "reasons": self._rows.tried(number),
            "decision": self._rows.decision(number),
        }

    def thumbnail(self, request: Request) -> Response:
        """Return a thumbnail of a row's image."""
        try:
            return Response(thumbnail(self._raw(request), "image"), media_type="image/webp")
        except RefusedError as error:
            raise HTTPException(415, str(error)) from None

    def image(self, request: Request) -> Response:
        """Return an image of a row as it is in the dataset."""
        raw = self._raw(request)
        media_type = image_type(raw)
        if media_type is None or len(raw) > MAX_BYTES:
            raise HTTPException(415, "Not a PNG, JPEG or WebP image of a permitted size.")
        return Response(raw, media_type=media_type)

    def _raw(self, request: Request) -> bytes:
        number, which = request.path_params["number"], request.path_params["which"]
        if number >= len(self._rows) or which not in ("original", "retrieved"):
            raise HTTPException(404)
        record = self._rows.record(number)
        images = record.images if which == "original" else record.rejected_images
        if not images:
            raise HTTPException(404)
        return images[0]

    async def decide(self, request: Request) -> Response:
        """Write one decision: ``{"number", "key", "decision", "note"}``."""
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise HTTPException(413, f"A decision has at most {MAX_BODY} bytes.")
        number, key, decision, note = _read_decision(body, request.headers, len(self._rows))
        if not await run_in_threadpool(self._rows.decide, number, key, decision, note):
            raise HTTPException(409, "The row changed since the page was loaded. Reload it.")
        return JSONResponse({"counts": await run_in_threadpool(self._rows.counts)})

    def undo(self, request: Request) -> Response:
        """Take back the last decision, and return its row and the row's present decision."""
        _check_is_json(request.headers)
        undone = self._rows.undo()
        if undone is None:
            raise HTTPException(409, "There is no decision to undo.")
        return JSONResponse(
            {
                "number": undone.number,
                "id": undone.decision.id,
                "undone": undone.decision.decision,
                "decision": undone.now.decision if undone.now else "undecided",
                "note": undone.now.note if undone.now else "",
                "counts": self._rows.counts(),
            }
        )


def _source(number: int, which: str) -> dict[str, str]:
    return {
        "src": f"/thumbnail/{number}/{which}",
        "full": f"/image/{number}/{which}",
        "problem": "",
    }


def read_query(values: Mapping[str, str]) -> tuple[Query, int]:
    """Return the query of an address and the start of its page; unknown values count as unset."""
    sort, status = values.get("sort", ""), values.get("status", "")
    rank, start = _number(values.get("rank")), _number(values.get("start"))
    query = Query(
        sort if sort.removeprefix("-") in SORTS else "index",
        status if status in STATUSES else "",
        values.get("reason", ""),
        _number(values.get("least")),
        _number(values.get("most")),
        None if rank is None else int(rank),
        values.get("find", ""),
    )
    return query, max(0, int(start or 0))


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if isfinite(value) else None


def _read_decision(
    body: bytes, headers: Mapping[str, str], num_rows: int
) -> tuple[int, str, str, str]:
    _check_is_json(headers)
    try:
        sent = json.loads(body)
        number, key, decision = sent["number"], sent["key"], sent["decision"]
        note = sent.get("note", "")
        note.encode()  # fails for an unpaired surrogate, which no file can hold
        is_valid = (
            type(number) is int
            and 0 <= number < num_rows
            and isinstance(key, str)
            and decision in CHOICES
            and len(note) <= MAX_NOTE
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_valid = False
    if not is_valid:
        raise HTTPException(
            400,
            f"A decision needs a number, a key, one of {', '.join(CHOICES)}, and a note of at most "
            f"{MAX_NOTE} characters.",
        )
    return number, key, decision, note


def _check_is_json(headers: Mapping[str, str]) -> None:
    # a form on another website cannot send this type
    if headers.get("content-type") != "application/json":
        raise HTTPException(415, "A decision must have the content type application/json.")


def image_type(raw: bytes) -> str | None:
    """Return the media type by the first bytes; None for a format that is not permitted."""
    if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        return "image/webp"
    return next((name for magic, name in MAGIC if raw.startswith(magic)), None)
