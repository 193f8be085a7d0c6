"""Who may do what on every route, whatever the path or the headers pretend; and what must never be connected to, or written.

Host and Origin alone are test_lane.py's, sessions test_api.py's, that every spending route is admitted test_gateway.py's.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import inspect
import json
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import Proxy, Start
from test_gateway import SAMPLE_BODY, sample_paths
from test_lane import HEAD, talk
from upstreams import COMPLETION, GOLDENS, STREAM, Answer, plain, stream

import stockyard

WHO = (
    "nobody",
    "wrong key",
    "expired key",
    "client key",
    "viewer key",
    "admin key",
    "viewer session",
    "admin session",
    "admin session, no token",
)


def may(row: stockyard.RouteRow, method: str, who: str) -> bool:
    """The table: what a role means, written once more and apart from the code that keeps it."""
    if row.role == "anyone":
        return True
    if who in ("nobody", "wrong key", "expired key"):
        return False
    if row.role == "client" and row.spends:
        return who in ("client key", "admin key", "admin session")
    if row.role == "client":
        return True
    if who == "admin session, no token":
        return method == "GET"
    if who == "viewer key":
        return method == "GET" or row.role == "viewer"
    if who == "viewer session":
        return method == "GET" or row.role == "viewer"
    return who in ("admin key", "admin session")


def credentials(proxy: Proxy) -> dict[str, dict[str, str]]:
    gateway = proxy.gateway
    now_ms = int(gateway.clock() * 1000)
    secrets = {}
    for name, more in (
        ("client key", {}),
        ("viewer key", {"role": "viewer"}),
        ("expired key", {"expires_at": now_ms // 1000 - 60}),
    ):
        secrets[name] = gateway.create_key({"name": name, **more})[1]
    viewer = next(key for key in gateway.keys.by_id.values() if key.role == "viewer")
    sessions = {"viewer session": ("viewer", viewer.id), "admin session": ("admin", "")}
    told: dict[str, dict[str, str]] = {"nobody": {}, "wrong key": {"authorization": "Bearer sy-wrong"}}
    told |= {name: {"authorization": f"Bearer {secret}"} for name, secret in secrets.items()}
    told["admin key"] = {"authorization": f"Bearer {gateway.admin_key}"}
    for name, (role, key_id) in sessions.items():
        secret, session = gateway.sessions.begin(role, key_id, now_ms)
        told[name] = {"cookie": f"{stockyard.SESSION_COOKIE}={secret}", "x-stockyard-csrf": session.csrf}
    told["admin session, no token"] = {"cookie": told["admin session"]["cookie"]}
    return told


async def ask(proxy: Proxy, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    """Status and error code; a stream without end is not read."""
    body = {} if method in ("GET", "HEAD") else {"json": SAMPLE_BODY}
    async with proxy.session.request(
        method, proxy.url + path, headers=headers, allow_redirects=False, **body
    ) as answer:
        if answer.status < 400 or answer.content_type != "application/json" or method == "HEAD":
            return answer.status, ""
        return answer.status, str((await answer.json())["error"].get("code"))


@pytest.mark.parametrize("who", WHO)
async def test_every_route_is_open_to_whom_its_row_says_and_to_nobody_else(start: Start, who: str) -> None:
    wrong = []
    async with start(rate_limit="100000rpm") as proxy:
        proxy.upstream.answers = [plain(COMPLETION)]
        for row in stockyard.ROUTES:
            for method in row.methods.split():
                headers = credentials(proxy)[who]
                path = sample_paths(row, "req_x")[0]
                if path == "/api/session" and method == "POST":
                    continue  # it reads its own key from its body
                status, code = await ask(proxy, method, path, headers)
                if (status not in (401, 403)) is not may(row, method, who):
                    wrong.append(f"{method} {row.path}: {status} {code}")
                if status >= 500 and code != "storage_unavailable":
                    wrong.append(f"{method} {row.path}: {status} {code}")
    assert not wrong, "\n".join(wrong)


TRICKS = (
    "//api/keys", "/api//keys", "/api/keys/", "/api/%6beys", "/%61pi/keys", "/%2fapi/keys", "/./api/keys", "/x/../api/keys", "/health/../api/keys",
    "/ui/../api/keys", "/ui/%2e%2e/api/keys", "/ui/..%2fapi%2fkeys", "/v1/models/../../api/keys", "/api/keys;x=1", "/api/keys%00", "/api/keys%20",
    "/API/keys", "/api\\keys", "/api/keys?x=/health", "/api/keys#/health", "/health?/api/keys", "http://localhost/api/keys", "http://127.0.0.1/api/keys",
    "/proxy/openai/../../api/keys", "/proxy/openai/%2e%2e/%2e%2e/api/keys",
)  # fmt: skip
FORGED = (
    "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Host: localhost", "X-Real-IP: 127.0.0.1", "Forwarded: for=127.0.0.1", "X-Original-URL: /health",
    "X-Rewrite-URL: /health", "X-HTTP-Method-Override: GET", "X-Forwarded-User: admin", "Cookie: stockyard_session=", "X-Api-Key: ", "Authorization: Bearer ",
    "Authorization: Basic YWRtaW46YWRtaW4=", "X-Stockyard-Csrf: x", "X-Forwarded-Proto: https\r\nX-Forwarded-Prefix: /api",
)  # fmt: skip


async def test_neither_paths_nor_headers_talk_anybody_past_the_roles(start: Start) -> None:
    async with start() as proxy:
        proxy.gateway.create_key({"name": "sy-canary-name"})
        lines = [(path, "X-A: b") for path in TRICKS] + [("/api/keys", forged) for forged in FORGED]
        for path, forged in lines:
            got = await talk(
                proxy, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{forged}\r\nConnection: close\r\n\r\n".encode()
            )
            assert b"sy-canary-name" not in got, (path, forged)
            assert got[9:10] == b"4" or path.startswith("/health?"), (path, forged, got[:60])
        for foreign in ("Host: evil.example", "Host: localhost\r\nOrigin: http://evil.example", "Host: localhost\r\nOrigin: null",
                        "Host: 127.0.0.1.evil.example", "Host: localhost@evil.example", "Host: "):  # fmt: skip
            for path in ("/api/keys", "/v1/models", "/health", "/ui"):
                got = await talk(
                    proxy,
                    f"GET {path} HTTP/1.1\r\n{foreign}\r\nAuthorization: Bearer {proxy.gateway.admin_key}\r\nConnection: close\r\n\r\n".encode(),
                )
                assert got[9:12] in (b"403", b"400"), (foreign, path, got[:60])


async def test_a_form_of_another_site_changes_nothing(start: Start) -> None:
    """What a browser sends across sites without asking first: simple methods and types, with cookies, without our header."""
    async with start() as proxy:
        cookie = credentials(proxy)["admin session"]["cookie"]
        before = len(proxy.gateway.keys)
        for kind in (
            "application/x-www-form-urlencoded",
            "text/plain",
            "multipart/form-data; boundary=b",
            "application/json",
        ):
            for path in ("/api/keys", "/api/config", "/api/cache", "/api/keys/key_x/rotate", "/v1/chat/completions"):
                async with proxy.session.post(
                    proxy.url + path, data=b'{"name":"x"}', headers={"content-type": kind, "cookie": cookie}
                ) as answer:
                    assert answer.status in (401, 403, 405), (kind, path)
        assert len(proxy.gateway.keys) == before


async def test_nothing_in_a_request_makes_the_proxy_connect_elsewhere(start: Start) -> None:
    caught: list[bytes] = []

    async def catch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        caught.append(b"connected")
        writer.close()

    trap = await asyncio.start_server(catch, "127.0.0.1", 0)
    port = trap.sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}/x"
    image = {"type": "image_url", "image_url": {"url": url}}
    fields = (
        "api_base",
        "base_url",
        "api_url",
        "webhook",
        "callback_url",
        "file_url",
        "custom_host",
        "endpoint",
        "proxy",
        "url",
    )
    async with start() as proxy:
        proxy.upstream.answers = [plain(COMPLETION)]
        for model in ("gpt-4o-mini", "echo", url, f"openai/{url}", f"{url}/gpt-4o-mini"):
            body = {"model": model, "messages": [{"role": "user", "content": [{"type": "text", "text": url}, image]}]}
            await proxy.post("/v1/chat/completions", {**body, **dict.fromkeys(fields, url)})
            await proxy.post(
                "/v1/responses",
                {"model": model, "input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]},
            )
            await proxy.post(
                "/v1/messages",
                {
                    **body,
                    "max_tokens": 5,
                    "messages": [
                        {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": url}}]}
                    ],
                },
            )
        for name in (
            "x-stockyard-provider",
            "x-stockyard-base-url",
            "x-portkey-custom-host",
            "x-forwarded-host",
            "x-original-url",
            "referer",
            "forwarded",
        ):
            await proxy.post(
                "/v1/chat/completions",
                {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]},
                **{name: url},
            )
        for path in (
            f"/proxy/{url}",
            f"/proxy/openai/{url}",
            f"/proxy/openai/@127.0.0.1:{port}/x",
            f"/proxy/openai@127.0.0.1:{port}/x",
            f"/proxy/127.0.0.1:{port}/x",
        ):
            await talk(
                proxy,
                HEAD.replace(b"/v1/chat/completions", path.encode())
                + b"Content-Length: 2\r\nConnection: close\r\n\r\n{}",
            )
        proxy.upstream.answers = [Answer(307, {"location": url}, [])]
        for path in ("/v1/chat/completions", "/proxy/openai/x", "/v1/embeddings"):
            status, _, _ = await proxy.post(
                path, {"model": "gpt-4o-mini", "input": "x", "messages": [{"role": "user", "content": "Hi"}]}
            )
            assert status == 502
    trap.close()
    assert caught == []


async def test_no_secret_reaches_a_sink_on_any_route_or_fault(
    start: Start, tmp_path: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    async with start(retries=0, rate_limit="100000rpm") as proxy:
        given = credentials(proxy)
        admin, client = proxy.gateway.admin_key, given["client key"]["authorization"].removeprefix("Bearer ")
        secrets = {"sk-canary-openai": b"", admin: b"", client: b""}
        told: list[str] = []
        faults = [plain(COMPLETION), stream(STREAM[:2], cut=True), plain({"error": {"message": "no", "code": "x"}}, 500),
                  plain({"error": "no"}, 401), Answer(200, {"content-type": "text/html"}, [b"<p>"]), Answer(raw=b"no HTTP\r\n\r\n")]  # fmt: skip
        for fault in faults:
            proxy.upstream.answers = [fault]
            for row in stockyard.ROUTES:
                method, path = row.methods.split()[0], sample_paths(row, "req_x")[0]
                if path in ("/api/events", "/api/backup"):
                    continue  # endless; and a copy of the database, which is looked at itself
                for secret in (admin, client):
                    keyed = f"{path}?key={secret}" if "v1beta" in path else path
                    headers = {"authorization": f"Bearer {secret}", "x-stockyard-session": "s"}
                    body = {} if method in ("GET", "HEAD") else {"json": SAMPLE_BODY}
                    async with proxy.session.request(method, proxy.url + keyed, headers=headers, **body) as answer:
                        told.append(str(answer.headers))
                        with contextlib.suppress(aiohttp.ClientPayloadError):  # a passed answer may break off
                            told.append((await answer.read()).decode("utf-8", "replace"))
        await proxy.rows()
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name != "admin.key")
    printed = "".join(capfd.readouterr())
    for secret in secrets:
        assert secret.encode() not in written
        assert secret not in printed
        assert not [text[:200] for text in told if secret in text]


def test_keys_are_compared_in_constant_time() -> None:
    """By digest, then with compare_digest; a digest's place in a dict tells nothing of the key."""
    for compared in (stockyard.is_admin_key, stockyard.KeyRing.authenticate):
        source = inspect.getsource(compared)
        assert "digest" in source
        assert "== secret" not in source and "secret ==" not in source
    assert stockyard.is_admin_key("a" * 40, "a" * 40)
    assert not stockyard.is_admin_key("a" * 39, "a" * 40)


#: Made for this test alone; 1024 bits are quick, and sign nothing.
RSA_KEY = (
    "MIICdwIBADANBgkqhkiG9w0BAQEFAASCAmEwggJdAgEAAoGBAMRRLtsK+7KtisgzyOjKQZADDQuxa+mKC6yVTv8IVJOXHJlavxdX"
    "YxNxrbtq6zlY+yvK+Y2iH4Y+6C/PBH8G+tbFn44o6PfdMOLD1wZCi1GOBzM5AGUST5+x/BdcGBeMhBGZgPa8+VNlX/d02lbFAOVI"
    "OEczqgtyNnl5HdgAkV5xAgMBAAECgYEAw9QvpzS3iq7uR3LQsNZAvEUu2EEtYhLgPlHaMTDAHVGZp6gMAl6baCP3p4KqDdSjCDY6"
    "5XuZcrKBrl8VHxl5UNCyZiLb3eEuLMGpKGEaOWlgpPDxHesClkOQs2VYDQZvNkEKoA02M3zz68PL8PtPxXEMFQGAYm7CLr5+8wKA"
    "iCECQQDqbE2wOJnL+XvoENllz9D3cgUth9Epl0j85KwkfePRbI3rZs/zmI0E1SGqbPlFFLjf1X4jfSx896CYTvVCoU9dAkEA1mL9"
    "2UV7sOpoMslS0H0mngvY0fQfOsG/Yy6e8EmgX1s51x866EYSx7y6pYhPxfvBg+ywRugdg7BfNyPS/IQeJQJAfmRMctHhokduVg4X"
    "mLw2l+OjBQxwarNFyAxm//ncRkL4Nc6mGlnK1qsvTpsYvvVQRGbwbqQDw5Ejxlr0A6vDhQJBAJpTrlreitjjFNkiVcwhm1AARTd2"
    "HZkFaclzARUGWzzphayXHaeg8dn4wP9yLcLepQJbutWAN+bZauFdl38ReEUCQFB/RVg/P9C6UeQd+oG/B324JKLdQ6ygd4lH95F0"
    "4LFbl6OwGqbiQgecnsoZEyDUVSYna4XXN0N6vdKORrmZLe0="
)


def google_files(path: Path, address: str) -> dict[str, Path]:
    pem = f"-----BEGIN PRIVATE KEY-----\n{RSA_KEY}\n-----END PRIVATE KEY-----\n"
    documents: dict[str, Any] = {
        "service": {"type": "service_account", "client_email": "a@b.example", "private_key": pem, "token_uri": address},
        "user": {
            "type": "authorized_user",
            "client_id": "c",
            "client_secret": "s",
            "refresh_token": "r",
            "token_uri": address,
        },
        "other": {"type": "external_account", "token_uri": address},
        "half": {"type": "service_account", "token_uri": address},
        "broken": [],
    }
    for name, document in documents.items():
        (path / name).write_text(json.dumps(document))
    return {name: path / name for name in (*documents, "missing")}


async def test_google_tokens_are_asked_for_with_a_signed_claim_once_an_hour(start: Start, tmp_path: Path) -> None:
    now_s = [1_790_000_000.0]
    async with start() as proxy:
        tokens = stockyard.GoogleTokens(proxy.gateway.upstream, lambda: now_s[0])
        files = google_files(tmp_path, proxy.upstream.url + "/token")
        proxy.upstream.answers = [plain({"access_token": "ya29.x", "expires_in": 3600})]
        for later_s in (0, 3500, 100):
            now_s[0] += later_s
            await tokens.refresh(str(files["service"]))
        assert tokens.current(str(files["service"])) == "ya29.x"
        await tokens.refresh(str(files["user"]))
        first, _, user = proxy.upstream.seen
        assert urllib.parse.parse_qs(user.body.decode())["refresh_token"] == ["r"]
        form = urllib.parse.parse_qs(first.body.decode())
        head, claim, signature = form["assertion"][0].split(".")
        told = json.loads(base64.urlsafe_b64decode(claim + "=="))
        assert (told["iss"], told["aud"], told["exp"] - told["iat"]) == (
            "a@b.example",
            proxy.upstream.url + "/token",
            3600,
        )
        modulus, _ = stockyard.read_rsa_key(json.loads(files["service"].read_text())["private_key"])
        opened = pow(int.from_bytes(base64.urlsafe_b64decode(signature + "==")), 65537, modulus).to_bytes(128)
        assert opened.endswith(hashlib.sha256(f"{head}.{claim}".encode()).digest())
        assert opened.startswith(b"\x00\x01\xff\xff")


async def test_calls_to_vertex_carry_the_token_of_the_credentials_file(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "service"
    async with start(
        GOOGLE_APPLICATION_CREDENTIALS=str(file), GOOGLE_CLOUD_PROJECT="p", VERTEX_BASE_URL="UPSTREAM"
    ) as proxy:
        google_files(tmp_path, proxy.upstream.url + "/token")
        proxy.upstream.answers = [
            plain({"access_token": "ya29.x", "expires_in": 3600}),
            plain(GOLDENS["gemini"].plain),
        ]
        body = {"model": "vertex/gemini-2.5-flash", "messages": [{"role": "user", "content": "Hi"}]}
        status, _, answer = await proxy.post("/v1/chat/completions", body)
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "Hello there")
    token, call = proxy.upstream.seen
    assert (token.path, call.headers["authorization"]) == ("/v1/token", "Bearer ya29.x")


@pytest.mark.parametrize(
    ("name", "status"), [("other", 200), ("half", 200), ("broken", 200), ("missing", 200), ("user", 400), ("user", 200)]
)
async def test_google_credentials_that_do_not_work_are_the_operators_fault(
    start: Start, tmp_path: Path, name: str, status: int
) -> None:
    async with start() as proxy:
        proxy.upstream.answers = [plain({"error": "invalid_grant"}, status)]
        path = google_files(tmp_path, proxy.upstream.url + "/token")[name]
        with pytest.raises(stockyard.UpstreamError) as caught:
            await stockyard.GoogleTokens(proxy.gateway.upstream, lambda: 0).refresh(str(path))
    assert caught.value.code in ("upstream_misconfigured", "upstream_authentication")
    assert caught.value.is_unbilled


async def test_a_page_of_a_provider_does_not_run_as_the_dashboards_origin(start: Start) -> None:
    page = Answer(200, {"content-type": "text/html", "content-security-policy": "script-src *"}, [b"<script>"])
    async with start() as proxy:
        for path in ("/proxy/openai/containers/c/files/f/content", "/v1/files/file-1/content"):
            proxy.upstream.answers = [page]
            async with proxy.session.get(proxy.url + path) as answer:
                assert (answer.status, await answer.read()) == (200, b"<script>")
                assert answer.headers.getall("content-security-policy") == ["sandbox"]


def form(*parts: tuple[str, str]) -> bytes:
    texts = [f"--bound\r\nContent-Disposition: form-data; {head}\r\n\r\n{value}\r\n" for head, value in parts]
    return ("".join(texts) + "--bound--\r\n").encode()


CHEAP, DEAR, FILE = (
    ('name="model"', "cheap"),
    ('name="model"', "dear"),
    ('name="file"; filename="a.wav"', "RIFF\r\n--b"),
)


@pytest.mark.parametrize(
    "sent",
    [
        form(CHEAP, DEAR, FILE),
        form(CHEAP, FILE, ('name="MODEL"', "dear")),
        form(CHEAP, FILE, ("name=model", "dear")),
        form(CHEAP, ('name="mod\\el"', "dear")),
        form(CHEAP, ("name*=utf-8''model", "dear")),
        form(CHEAP, ('name="x"; name="model"', "dear")),
        form(CHEAP, ('name="x"\r\n ; name="model"', "dear")),
        form(CHEAP, ('name="x"\r\ncontent-disposition: form-data; name="model"', "dear")),
        form(CHEAP, ('name="x"', '--bound\nContent-Disposition: form-data; name="model"\n\ndear\n')),
        form(CHEAP, ('name="model"\n\ndear', "")).replace(b"dear\r\n\r\n", b"dear"),
        form(('name="x"; filename="model"', "cheap"), DEAR),
        form(('name="prompt"', 'name="model"\r\n\r\ncheap'), ("name=model", "dear")),
        form(CHEAP, ('name="x"\r\nX-Long: ' + "x" * 9000, "y"), DEAR),
        form(CHEAP)[:-4] + form(DEAR),
    ],
)
async def test_a_form_names_one_model_however_it_is_read(start: Start, sent: bytes) -> None:
    async with start() as proxy:
        _, key = proxy.gateway.create_key({"name": "k", "models": ["openai/cheap", "cheap"]})
        proxy.upstream.answers = [plain({"text": "hi"})]
        headers = {"content-type": "multipart/form-data; boundary=bound", "x-stockyard-provider": "openai"}
        headers["authorization"] = f"Bearer {key}"
        assert (await proxy.post("/v1/audio/transcriptions", form(CHEAP, FILE), **headers))[0] == 200
        assert (await proxy.post("/v1/audio/transcriptions", sent, **headers))[0] in (400, 403)
    assert [b"dear" in seen.body for seen in proxy.upstream.seen] == [False]


async def test_a_form_is_read_alike_however_it_is_cut() -> None:
    async def read(body: bytes, step: int) -> bytes:
        async def pieces() -> AsyncIterator[bytes]:
            for at in range(0, len(body), step):
                yield body[at : at + step]

        return b"".join([piece async for piece in stockyard.checked_form(pieces(), b"--bound")])

    for step in range(1, 60):
        assert await read(form(CHEAP, FILE), step) == form(CHEAP, FILE)
        with pytest.raises(stockyard.InvalidRequest, match="second"):
            await read(form(CHEAP, FILE, DEAR), step)
