"""The dashboard: how its files are served, and what must not stand in them."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import Start

import stockyard

ASSETS = Path(__file__).parent.parent / "stockyard_assets"
FILES = sorted(path for path in ASSETS.iterdir() if path.suffix in stockyard.UI_TYPES)
MAKES_MARKUP = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|srcdoc|\beval\b|new Function"
)


async def test_the_page_has_a_nonce_of_its_own_and_a_policy_that_allows_nothing_else(start: Start) -> None:
    async with start() as proxy:
        nonces = []
        for _ in range(2):
            async with proxy.session.get(proxy.url + "/ui?token=x") as answer:
                page, policy = await answer.text(), answer.headers["content-security-policy"]
                assert (answer.status, answer.content_type) == (200, "text/html")
                assert answer.headers["cache-control"] == "no-store"
            [nonce] = set(re.findall(r'nonce="([^"]+)"', page))
            assert policy.startswith(f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}';")
            assert "unsafe" not in policy
            assert "*" not in policy
            nonces.append(nonce)
        async with proxy.session.get(proxy.url + "/", allow_redirects=False) as answer:
            assert (answer.status, answer.headers["location"]) == (302, "/ui")
    assert nonces[0] != nonces[1]


async def test_who_asks_for_the_head_alone_gets_it(start: Start) -> None:
    async with start() as proxy:
        for path in ("/", "/ui", "/ui/app.js", "/ui/icon.svg", "/ui/nothing.js", "/health", "/ready", "/openapi.json"):
            told = []
            for method in ("GET", "HEAD"):
                async with proxy.session.request(method, proxy.url + path, allow_redirects=False) as answer:
                    told.append((answer.status, answer.content_type, answer.headers.get("etag")))
                    body = await answer.read()
            assert told[0] == told[1] and body == b"", path


async def test_files_are_asked_again_by_etag_and_nothing_else_is_served(start: Start) -> None:
    async with start() as proxy:
        for file in FILES:
            async with proxy.session.get(f"{proxy.url}/ui/{file.name}") as answer:
                assert answer.status == 200
                assert answer.headers["x-content-type-options"] == "nosniff"
                etag = answer.headers.get("etag", "")
            if file.name != "index.html":
                async with proxy.session.get(f"{proxy.url}/ui/{file.name}", headers={"if-none-match": etag}) as answer:
                    assert (answer.status, await answer.read()) == (304, b"")
        for name in ("prices.json", "nothing.js", "..%2fsetup.cfg", "%2e%2e%2fstockyard.py"):
            async with proxy.session.get(f"{proxy.url}/ui/{name}") as answer:
                assert answer.status == 404, name


def test_the_files_make_no_markup_of_text_reach_nobody_else_and_are_small() -> None:
    for file in FILES:
        text = file.read_text()
        assert not MAKES_MARKUP.search(text), file.name
        addresses = set(re.findall(r"(?:https?:)?//[a-z][\w.]+", text)) - {"http://www.w3.org"}
        assert not addresses, f"{file.name}: {addresses}"
    page = (ASSETS / "index.html").read_text()
    assert not re.search(r"\son\w+=|\sstyle=", page)
    assert sum(file.stat().st_size for file in FILES) < 150_000
