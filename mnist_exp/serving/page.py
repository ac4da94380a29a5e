"""The drawing page: a local web application around a classifier."""

import io
from collections.abc import Awaitable, Callable
from pathlib import Path

import jinja2
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.requests import ClientDisconnect

from mnist_exp.errors import UserError
from mnist_exp.learning.pictures import open_picture
from mnist_exp.paths import NAME
from mnist_exp.serving.classifier import Classifier

PAGE = Path(__file__).with_name("page.html")
MAX_REQUEST = 300_000  # bytes; the page's canvas takes some 5,000
MAX_PIXELS = 1_000_000
HEADERS = {
    # Nothing from another address, and the page in no other page.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def create_app(classifier: Classifier, port: int) -> FastAPI:
    """Return the application: the page at `/`, and `/predict`, which takes a PNG and returns JSON.

    Args:
        classifier: The model.
        port: The port of this machine that it is served at. Requests that name another host, as through DNS rebinding, or come
            from pages of another address are refused.
    """
    names = ("127.0.0.1", "localhost")
    hosts = {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())  # browsers leave out port 80
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(PAGE.read_text(encoding="utf-8"))
    content = template.render(summary=classifier.summary, names=classifier.data.class_names)  # names come from a store
    app = FastAPI(title=NAME, docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def protect(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        origin = request.headers.get("origin")
        is_ours = origin is None or origin in {f"http://{host}" for host in hosts}
        if request.headers.get("host") not in hosts or not is_ours:
            response: Response = JSONResponse({"error": "This address is not answered."}, status_code=403)
        else:
            response = await proceed(request)
        response.headers.update(HEADERS)
        return response

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(content)

    @app.post("/predict")
    async def predict(request: Request) -> JSONResponse:
        content = bytearray()
        try:
            async for part in request.stream():
                content += part
                if len(content) > MAX_REQUEST:
                    return JSONResponse({"error": f"The picture has more than {MAX_REQUEST:,} bytes."}, status_code=413)
        except ClientDisconnect:  # nobody waits for the answer
            return JSONResponse({}, status_code=400)
        try:
            predictions = classifier(open_picture(io.BytesIO(content), formats=("PNG",), max_pixels=MAX_PIXELS))
        except UserError as error:
            return JSONResponse({"error": str(error)}, status_code=422)
        return JSONResponse(
            {
                "label": int(predictions.labels[0]),
                "name": predictions.names[0],
                "probabilities": [float(value) for value in predictions.probabilities[0]],
                "image": predictions.images[0].tolist(),
            }
        )

    return app
