"""Which files is the live page made of, and how are they sent?

They hold no secret, so they need no key: what the page shows it has to ask for, with one.
"""

import mimetypes
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

_SECURITY = {
    # Nothing from elsewhere; no other page may show this one in a frame.
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # the files of another version have the same names
}


class Assets:
    """The page's files, in memory."""

    def __init__(self) -> None:
        static = Path(__file__).with_name("static")
        self._files = {
            path.relative_to(static).as_posix(): path.read_bytes()
            for path in static.rglob("*")
            if path.is_file()
        }

    def routes(self) -> list[Route]:
        """Return where the page and its files are found."""
        return [
            Route("/", self.lead_to_page),
            Route("/headway", self.get_page),
            Route("/headway/page/{name:path}", self.get_file),
        ]

    async def lead_to_page(self, request: Request) -> Response:
        """Answer with where the page is."""
        return RedirectResponse("headway/")  # relative: a proxy may have put us below a path

    async def get_page(self, request: Request) -> Response:
        """Answer with the page, whose links are relative to the slash at its end."""
        raw_path: bytes = request.scope.get("raw_path") or b""
        if not raw_path.partition(b"?")[0].endswith(b"/"):
            return RedirectResponse("headway/")
        return self._reply("index.html")

    async def get_file(self, request: Request) -> Response:
        """Answer with one of its files; 404 for what is none."""
        return self._reply(request.path_params["name"])

    def _reply(self, name: str) -> Response:
        content = self._files.get(name)
        if content is None:
            raise HTTPException(404)
        kind = mimetypes.guess_type(name)[0] or "text/plain"
        return Response(content, media_type=kind, headers=_SECURITY)
