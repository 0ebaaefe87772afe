"""The page at `/`: page.html as it is, under a Content-Security-Policy that allows its own script and style and no other.

Both are named by their hashes, so a script that found its way into the page would not run, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import APIRouter, Response

FILE = Path(__file__).with_name("page.html")


def _hashes(html: str, tag: str) -> str:
    """CSP sources for the contents of every <tag> element."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (hashlib.sha256(text.encode()).digest() for text in found)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


@cache
def content() -> tuple[bytes, dict[str, str]]:
    """The page in UTF-8 and its headers."""
    html = FILE.read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hashes(html, 'script')}; style-src {_hashes(html, 'style')}; img-src data:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin",
    }
    return html.encode(), headers


def router() -> APIRouter:
    """Answers GET and HEAD of `/`. It needs no API key: the page asks for one where the server wants it."""
    from fastapi import APIRouter
    from fastapi.responses import HTMLResponse

    async def page() -> Response:
        body, headers = content()
        return HTMLResponse(body, headers=headers)

    routes = APIRouter()
    routes.add_api_route("/", page, methods=["GET", "HEAD"], include_in_schema=False, response_model=None)
    return routes
