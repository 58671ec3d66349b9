"""The page at `/`: plain files beside this one, and those of `viz/assets` that it shares with reports.

All of them are listed when the app is made; a name that is not in the list is not looked for.
"""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

from foveate import viz
from foveate.server.errors import ApiError

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webp": "image/webp",
    ".woff2": "font/woff2",
}
_OWN = Path(__file__).parent / "page"
_SHARED = Path(viz.__file__).parent / "assets"
_HEADERS = {"Cache-Control": "no-cache"}
"""Asked for again at every visit, as files change with the version."""


def page_router() -> APIRouter:
    """The routes of the page; with the files as they are now."""
    router = APIRouter(include_in_schema=False)
    own, shared = _files(_OWN), _files(_SHARED)

    @router.get("/")
    async def index() -> Response:
        return _response(own, "index.html")

    @router.get("/page/viz/{name}")
    async def shared_file(name: str) -> Response:
        return _response(shared, name)

    @router.get("/page/{name}")
    async def own_file(name: str) -> Response:
        return _response(own, name)

    return router


def _files(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Contents and types by name."""
    if not folder.is_dir():
        return {}
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix in _TYPES]
    return {path.name: (path.read_bytes(), _TYPES[path.suffix]) for path in files}


def _response(files: dict[str, tuple[bytes, str]], name: str) -> Response:
    if name not in files:
        raise ApiError(404, "there is no such file", code="not_found")
    content, kind = files[name]
    return Response(content, media_type=kind, headers=_HEADERS)
