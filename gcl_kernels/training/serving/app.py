"""The HTTP side of the search page: a JSON API, the pictures of documents, and three static files.

Whatever is asked, a request costs a bounded amount: the query's length, the number of results, the bytes and pixels of a
picture are limited. Searches run beside the event loop, those that wait together.
"""

from __future__ import annotations

import asyncio
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware

import gcl_kernels
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.serving.state import Asked, State
from gcl_kernels.training.serving.turns import Turns

STATIC = Path(__file__).with_name("static")

LONGEST_QUERY, MOST_RESULTS, MOST_NAMED = 1000, 100, 64
"""Characters of a query, results, and weights or filters of a request."""

MOST_BYTES, UPLOADS, UPLOAD_SECONDS = 10_000_000, 4, 30
"""Of pictures to search by: bytes of one, how many are in memory at a time, and how long one may take to arrive."""

TOGETHER = 32
"""Searches that are answered together at most."""

SECURITY = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Found(BaseModel):
    """A document that was found."""

    rank: int = Field(description="1 is the best")
    id: str
    score: float = Field(description="Its similarity to the query, a cosine, -1 to 1")
    title: str
    image: str | None = Field(description="Where its picture is, if it has one")
    columns: dict[str, str] = Field(description="The columns that are shown")
    grade: int | None = Field(
        description="Its grade for this query: 0 where it was not judged, null where no document was"
    )


class Milliseconds(BaseModel):
    """How long the server took."""

    embed: float
    search: float


class Answer(BaseModel):
    """The documents that a model finds for a query, best first."""

    model: str
    judged: bool = Field(description="Whether there are grades for this query")
    results: list[Found]
    milliseconds: Milliseconds


class Model(BaseModel):
    """A model and the fields of the documents that it embeds."""

    key: str = Field(description="What it is called in requests: a or b")
    name: str
    size: int = Field(description="Documents that it has embedded")
    dimensions: int
    fields: dict[str, float] = Field(description="Weights as trained")
    exact: bool = Field(description="Whether it searches without an approximate index")


class Corpus(BaseModel):
    """The documents that are searched."""

    name: str
    size: int
    columns: dict[str, list[str]] = Field(description="Columns that are shown, and their values where these are few")
    models: list[Model]
    judged: int = Field(description="Queries with grades")
    queries: list[str] = Field(description="The first with graded documents of this corpus")


class Fault(BaseModel):
    """Why a request was refused."""

    detail: str


def create_app(state: State, *, hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The application.

    Args:
        hosts: names in the `Host` header that are answered. Only the server's own keep a page of another site, whose name
            was made to point here, from reading the corpus.
    """
    app = FastAPI(
        title="gcl-serve", version=gcl_kernels.__version__, docs_url=None, redoc_url=None,
        description="Ranked search over a corpus with one or two trained models.",
    )  # fmt: skip
    turns, pictures = Turns(state.search, TOGETHER), anyio.CapacityLimiter(1)
    uploads = asyncio.Semaphore(UPLOADS)

    async def answer(
        picture: bytes | None,
        q: str,
        model: str,
        k: int,
        weights: list[str],
        query_weights: list[str],
        where: list[str],
    ) -> dict[str, Any]:
        filters: dict[str, list[str]] = {}
        for column, value in map(_named, where):
            filters.setdefault(column, []).append(value)
        return await turns(Asked(model, q, picture, k, _numbers(weights), _numbers(query_weights) or {}, filters))

    @app.get("/api/search", response_model=Answer, responses={400: {"model": Fault}})
    async def search(
        q: Text,
        model: Key = "a",
        k: Count = 10,
        weights: Weights = (),
        query_weights: QueryWeights = (),
        where: Where = (),
    ) -> Any:
        """Search by a text."""
        return await answer(None, q, model, k, list(weights), list(query_weights), list(where))

    @app.post(
        "/api/search", response_model=Answer, responses={status: {"model": Fault} for status in (400, 408, 413)},
        openapi_extra={"requestBody": {"required": True, "description": f"The picture, at most {MOST_BYTES:,} bytes",
                                       "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}},
    )  # fmt: skip
    async def search_by_picture(
        request: Request, q: Text = "", model: Key = "a", k: Count = 10, weights: Weights = (),
        query_weights: QueryWeights = (), where: Where = (),
    ) -> Any:  # fmt: skip
        """Search by a picture, which is the body of the request, or by a picture and a text."""
        async with uploads:
            picture = await _body(request)
            return await answer(picture, q, model, k, list(weights), list(query_weights), list(where))

    @app.get("/api/corpus", response_model=Corpus)
    async def corpus() -> Any:
        """What is searched, and by which models."""
        return state.about()

    @app.get(
        "/image/{document_id:path}", response_class=Response,
        responses={200: {"content": {"image/png": {}, "image/jpeg": {}}}, 404: {"model": Fault}},
    )  # fmt: skip
    async def image(document_id: str) -> Response:
        """The picture of a document of the corpus, made small."""
        found = await anyio.to_thread.run_sync(state.picture, document_id, limiter=pictures)
        if found is None:
            raise HTTPException(404, "no document of this id has a picture")
        return Response(found[0], media_type=found[1], headers={"Cache-Control": "private, max-age=3600"})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page_of(app.openapi()))

    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC))

    @app.exception_handler(InputError)
    async def refused(request: Request, error: InputError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(SecurityHeaders)
    return app


Text = Annotated[str, Query(description="The query's text", max_length=LONGEST_QUERY)]
Key = Annotated[str, Query(description="a or b", max_length=20)]
Count = Annotated[int, Query(description="How many documents", ge=1, le=MOST_RESULTS)]
Weights = Annotated[
    Sequence[str],
    Query(description="FIELD=NUMBER, of the documents' fields; default: as trained", max_length=MOST_NAMED),
]
QueryWeights = Annotated[
    Sequence[str], Query(description="text=NUMBER or image=NUMBER; default: as trained, else 1", max_length=MOST_NAMED)
]
Where = Annotated[
    Sequence[str],
    Query(description="COLUMN=VALUE: of one column any value, of several columns all", max_length=MOST_NAMED),
]


class SecurityHeaders:
    """Middleware that adds `SECURITY` to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY)
            await send(message)

        await self.app(scope, receive, with_headers)


async def _body(request: Request) -> bytes:
    """The body of a request, refused as soon as it is too long."""
    too_long = HTTPException(413, f"expected a picture of at most {MOST_BYTES:,} bytes")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > MOST_BYTES:
        raise too_long
    content = bytearray()
    try:
        with anyio.fail_after(UPLOAD_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > MOST_BYTES:
                    raise too_long
    except TimeoutError:
        raise HTTPException(408, f"expected a picture within {UPLOAD_SECONDS} s") from None
    if not content:
        raise HTTPException(400, "expected a picture, got an empty body")
    return bytes(content)


def _named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"expected NAME=VALUE, got '{text[:100]}'")
    return name, value


def _numbers(texts: Sequence[str]) -> dict[str, float] | None:
    numbers = {}
    for name, value in map(_named, texts):
        try:
            numbers[name] = float(value)
        except ValueError:
            numbers[name] = math.nan
        if not 0 <= numbers[name] < math.inf:
            raise InputError(f"expected NAME=NUMBER, a number >= 0, got '{name[:100]}={value[:100]}'")
    return numbers or None


def page_of(schema: Mapping[str, Any]) -> str:
    """An OpenAPI schema as a plain page, without scripts."""
    lines = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        "<title>API</title><link rel=stylesheet href=/static/style.css><main class=prose><h1>API</h1>",
        "<p>The whole schema is <a href=/openapi.json>openapi.json</a>. <a href=/>Back to the search</a></p>",
    ]
    for path, methods in schema["paths"].items():
        for method, of in methods.items():
            lines.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            lines.append(f"<p>{html.escape(of.get('description', ''))}</p>")
            if body := of.get("requestBody"):
                lines.append(f"<p>Body: {html.escape(body['description'])}.</p>")
            if of.get("parameters"):
                lines.append("<table><tr><th>parameter<th>in<th>default<th>is")
            for parameter in of.get("parameters", ()):
                default = parameter["schema"].get("default", "required" if parameter["required"] else "")
                cells = (parameter["name"], parameter["in"], default, parameter.get("description", ""))
                lines.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in cells))
            lines.append("</table>" if of.get("parameters") else "")
    for name, of in schema["components"]["schemas"].items():
        if "description" in of:
            lines.append(f"<h2>{html.escape(name)}</h2><p>{html.escape(of['description'])}</p><table>")
            for key, value in of["properties"].items():
                kind = value.get("type") or value.get("$ref", "").rpartition("/")[2] or "or null"
                cells = (key, kind, value.get("description", ""))
                lines.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in cells))
            lines.append("</table>")
    return "\n".join(lines)
