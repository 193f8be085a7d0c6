"""The two ways in over raw sockets: framing is strict, order is kept, and odd requests are refused, not guessed at."""

from __future__ import annotations

import asyncio
import json

import pytest
from conftest import Proxy, Start

BODY = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "ab"}]}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


async def talk(proxy: Proxy, *pieces: bytes, pause_s: float = 0.0, answers: int = 1) -> bytes:
    """Send pieces and read until so many answers came, or the connection ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
    got = b""
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
        async with asyncio.timeout(8):
            while got.count(b"HTTP/1.1 ") < answers or not got.rstrip().endswith((b"}", b"[DONE]", b"0")):
                piece = await reader.read(65536)
                if not piece:
                    break
                got += piece
    except ConnectionError:
        pass
    finally:
        writer.close()
    return got


async def test_a_request_split_at_every_byte_is_one_request(start: Start) -> None:
    async with start() as proxy:
        for at in range(1, len(REQUEST), 5):
            got = await talk(proxy, REQUEST[:at], REQUEST[at:], pause_s=0.001)
            assert got.startswith(b"HTTP/1.1 200"), at
            assert b"Echo: ab" in got
        assert len(await proxy.rows()) == len(range(1, len(REQUEST), 5))


async def test_pipelined_requests_are_answered_in_order(start: Start) -> None:
    texts = [f"n{number}" for number in range(12)]
    bodies = [json.dumps({"model": "echo", "messages": [{"role": "user", "content": text}]}).encode() for text in texts]
    async with start() as proxy:
        got = await talk(
            proxy, b"".join(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in bodies), answers=12
        )
    places = [got.index(f'Echo: {text}"'.encode()) for text in texts]
    assert places == sorted(places)


async def test_one_connection_serves_hot_and_other_requests_in_turn(start: Start) -> None:
    other = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with start() as proxy:
        got = await talk(proxy, REQUEST, other, REQUEST, other, REQUEST, pause_s=0.1, answers=5)
        together = await talk(proxy, REQUEST + other + REQUEST, answers=3)
    assert got.count(b"HTTP/1.1 200") == 5
    assert together.count(b"HTTP/1.1 200") == 3
    assert together.index(b"Echo") < together.index(b'"status"')


async def test_a_large_body_that_waited_behind_a_call_is_read_to_its_end(start: Start) -> None:
    slow = {"model": "echo", "delay_ms": 300, "messages": [{"role": "user", "content": "ab"}]}
    large = {"model": "echo", "messages": [{"role": "user", "content": "a" * 3_000_000}]}
    bodies = [json.dumps(request).encode() for request in (slow, large, slow)]
    async with start(body_timeout=3) as proxy:
        got = await talk(
            proxy, b"".join(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in bodies), answers=3
        )
    assert got.count(b"HTTP/1.1 200") == 3


ODD = {
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "signed length": HEAD + b"Content-Length: +5\r\n\r\nhello",
    "folded header": HEAD + b"X-A: b\r\n c\r\nContent-Length: 2\r\n\r\n{}",
    "bare newlines": REQUEST.replace(b"\r\n", b"\n"),
    "space before colon": HEAD + b"Content-Length : 2\r\n\r\n{}",
    "no host": b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
    "bad chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nxx\r\n\r\n",
    "wrong coding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "nul in a header": HEAD + b"X-A: a\0b\r\nContent-Length: 2\r\n\r\n{}",
    "a whole URL": REQUEST.replace(b"POST /v1", b"POST http://localhost/v1"),
    "an upgrade": REQUEST.replace(b"Content-Type", b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Type"),
    "a strange version": REQUEST.replace(b"HTTP/1.1", b"HTTP/2.0"),
    "a header bomb": HEAD + b"X-A: " + b"a" * 20_000 + b"\r\nContent-Length: 2\r\n\r\n{}",
    "many headers": HEAD + b"".join(b"X-%d: a\r\n" % n for n in range(300)) + b"Content-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("name", ODD)
async def test_odd_requests_are_refused(start: Start, name: str) -> None:
    async with start() as proxy:
        got = await talk(proxy, ODD[name])
        assert got[:5] == b"HTTP/"
        assert got[8:13] == b" 400 ", got[:200]
        told = json.loads(got.partition(b"\r\n\r\n")[2])["error"]
        assert (told["type"], bool(told["request_id"])) == ("invalid_request_error", True)
        assert not [row for row in await proxy.rows() if row["status"] == 200]
        assert (await talk(proxy, REQUEST)).startswith(b"HTTP/1.1 200")


async def test_bodies_that_are_late_or_too_large_are_refused(start: Start) -> None:
    async with start(body_timeout=0.2, max_body_mb=0.001) as proxy:
        late = await talk(proxy, REQUEST[:-3])
        large = await talk(proxy, HEAD + b"Content-Length: 5000\r\n\r\n" + b" " * 5000)
        chunked = await talk(
            proxy, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"5dc\r\n" + b" " * 1500 + b"\r\n0\r\n\r\n"
        )
        slow = await talk(proxy, HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n")
        assert sorted(row["status"] for row in await proxy.rows()) == [408, 408, 413, 413]
    assert late.startswith(b"HTTP/1.1 408")
    assert large.startswith(b"HTTP/1.1 413")
    assert chunked.startswith(b"HTTP/1.1 413")
    assert slow.startswith(b"HTTP/1.1 408")


async def test_old_clients_and_those_that_wait_for_leave(start: Start) -> None:
    async with start() as proxy:
        old = await talk(proxy, REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0"))
        waiting = await talk(
            proxy, REQUEST.replace(b"Content-Type", b"Expect: 100-continue\r\nContent-Type"), answers=2
        )
        closing = await talk(proxy, REQUEST.replace(b"Content-Type", b"Connection: close\r\nContent-Type"))
    assert b" 200 " in old.split(b"\r\n")[0]
    assert b"HTTP/1.1 100" in waiting
    assert b"HTTP/1.1 200" in waiting
    assert b"connection: close" in closing.lower()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"null", b"{", b'{"a":1}x', b'{"model":"echo","model":"echo"}', b'{"model" :"a","model":"b"}', b'{"a":NaN}', b'{"a":1e999}',
        b'{"a":"\\ud800"}', b"\xff\xfe{\x00}\x00", b'{"a":"\xff"}', b'{"a":' + b"[" * 101 + b"]" * 101 + b"}", b'{"a":' + b"1" * 5000 + b"}",
        b"{'a':1}", b'{"a":1,}', b'{"a":01}', b'{"a":.5}', b'{"a":"\n"}', b"\xef\xbb\xbf{}", b'{"messages":[]}', b'{"model":5,"messages":[]}',
        b'{"model":"echo"}', b'{"model":"echo","messages":[]}', b'{"model":"echo","messages":"x"}', b'{"model":"echo","messages":[1]}',
        b'{"model":"echo","stream":"yes","messages":[{"role":"user","content":"x"}]}',
    ],
)  # fmt: skip
async def test_doubtful_json_is_a_400_in_the_clients_dialect(start: Start, body: bytes) -> None:
    async with start() as proxy:
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses"):
            status, _, told = await proxy.post(path, body)
            assert (status, told["error"]["type"]) == (400, "invalid_request_error"), path


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:1"}, 200), ({"Host": "127.0.0.1"}, 200), ({"Host": "[::1]:80"}, 200), ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403), ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403),
    ],
)  # fmt: skip
async def test_foreign_hosts_and_origins_are_refused_on_both_ways_in(
    start: Start, headers: dict[str, str], status: int
) -> None:
    async with start() as proxy:
        hot, _, _ = await proxy.post("/v1/chat/completions", BODY, **headers)
        async with proxy.session.get(proxy.url + "/v1/models", headers=headers) as other:
            assert (hot, other.status) == (status, status)
