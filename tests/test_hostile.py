"""Input made to break it: JSON of all bad kinds, framing that two servers would read differently, clients that are slow.

Framing that no client sends by mistake, order on a connection, and Host and Origin checks are test_lane.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Proxy, Start
from test_lane import BODY, HEAD, REQUEST, talk
from upstreams import COMPLETION, Answer

import stockyard

#: After each comes a request which, if it were answered, would have been smuggled or would follow unread bytes.
SMUGGLING: dict[str, bytes] = {
    "TE after CL": HEAD + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG",
    "TE before CL": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\nG",
    "TE twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "TE identity": HEAD + b"Transfer-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}",
    "TE chunked, identity": HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "TE with a tab": HEAD + b"Transfer-Encoding:\tchunked\r\nContent-Length: 2\r\n\r\n{}",
    "TE with a vertical tab": HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "TE folded": HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "TE quoted": HEAD + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "TE in the name of another": HEAD + b"X: y\rTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}",
    "TE under a space": HEAD + b" Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}",
    "minus length": HEAD + b"Content-Length: -1\r\n\r\n",
    "length in hex": HEAD + b"Content-Length: 0x2\r\n\r\n{}",
    "length with a comma": HEAD + b"Content-Length: 2, 2\r\n\r\n{}",
    "length with an underscore": HEAD + b"Content-Length: 1_0\r\n\r\n0123456789",
    "length of other digits": HEAD + "Content-Length: ٢\r\n\r\n{}".encode(),
    "length twice, the same": HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "empty length": HEAD + b"Content-Length: \r\n\r\n{}",
    "length past 64 bits": HEAD + b"Content-Length: 18446744073709551618\r\n\r\n{}",
    "space in the method": b"PO ST" + REQUEST[4:],
    "no version": REQUEST.replace(b" HTTP/1.1", b""),
    "version 0.9": REQUEST.replace(b"HTTP/1.1", b"HTTP/0.9"),
    "two hosts": REQUEST.replace(b"Host: localhost", b"Host: localhost\r\nHost: evil.example"),
    "chunk size with a sign": HEAD + b"Transfer-Encoding: chunked\r\n\r\n+2\r\n{}\r\n0\r\n\r\n",
    "chunk size in hex form": HEAD + b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n",
    "chunk size past 64 bits": HEAD + b"Transfer-Encoding: chunked\r\n\r\n10000000000000002\r\n{}\r\n0\r\n\r\n",
    "chunk without its end": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n",
    "LF in a chunk extension": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2;a=\n\r\n{}\r\n0\r\n\r\n",
    "chunks with bare LF": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\n{}\n0\n\n",
    "a NUL": HEAD + b"X-\0A: b\r\nContent-Length: 2\r\n\r\n{}",
    "CR in a value": HEAD + b"X-A: a\rb\r\nContent-Length: 2\r\n\r\n{}",
    "no colon": HEAD + b"Content-Length 2\r\n\r\n{}",
    "an empty name": HEAD + b": 2\r\nContent-Length: 2\r\n\r\n{}",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 60,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "CONNECT": b"CONNECT example.org:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TRACE": b"TRACE / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


async def everything(proxy: Proxy, payload: bytes) -> bytes:
    """All that comes back until the connection ends, or is quiet for a while."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
    writer.write(payload)
    got = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while True:
            async with asyncio.timeout(0.3):
                piece = await reader.read(65536)
            if not piece:
                break
            got += piece
    writer.close()
    return got


async def test_no_framing_smuggles_a_request_or_breaks_the_server(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = []
    after = REQUEST.replace(b"Content-Type", b"X-Key: sk-canary-client\r\nConnection: close\r\nContent-Type")
    async with start() as proxy:
        for name, payload in SMUGGLING.items():
            before = len(await proxy.rows())
            got = await everything(proxy, payload + after)
            rows = (await proxy.rows())[before:]
            statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", got)]
            served = got.count(b"Echo: ab")
            # A refused request closes its connection; one that was understood may be followed by the second one.
            if served > 1 or len(rows) > 2 or any(status >= 500 for status in statuses):
                wrong.append(f"{name}: {statuses}, {served} served, {len(rows)} rows")
            if served and statuses[0] == 400:
                wrong.append(f"{name}: answered after a 400")
        assert proxy.gateway.internal_errors == 0
        assert (await talk(proxy, REQUEST)).startswith(b"HTTP/1.1 200")
    assert not wrong, "\n".join(wrong)
    assert not caplog.records  # a stranger fills no log, and malformed heads may hold keys


def nested(levels: int) -> bytes:
    return b'{"a":' + b"[" * levels + b"]" * levels + b"}"


BAD_JSON: dict[str, bytes] = {
    "a million levels": nested(1_000_000), "a million levels, open": b'{"a":' + b"[" * 1_000_000, "objects in objects": b'{"a":' * 50_000,
    "101 levels": nested(101), "a million arrays": b'{"a":[' + b",".join([b"[]"] * 1_000_000) + b"]}",
    "unterminated strings": b'{"a":[' + b'"\\",' * 200_000 + b"[" * 101, "quotes without end": b'{"a":"' + b'\\"' * 500_000,
    "duplicate": b'{"a":1,"a":2}', "duplicate deep": b'{"a":[{"b":1,"c":2,"b":1}]}', "duplicate escaped": b'{"a":1,"\\u0061":2}',
    "duplicate, spaced": b'{"a" : 1, "b": {"x" :1,"x"\n:2}}', "duplicate in 1e5 keys": b"{" + b",".join(b'"%d":1' % n for n in range(50_000)) + b',"7":1}',
    "NaN": b'{"a":NaN}', "Infinity": b'{"a":-Infinity}', "1e999": b'{"a":1e999}', "5000 digits": b'{"a":' + b"1" * 5_000 + b"}",
    "UTF-16": '{"a":1}'.encode("utf-16"), "UTF-16 LE": '{"a":1}'.encode("utf-16-le"), "UTF-32": '{"a":1}'.encode("utf-32"),
    "UTF-32 BE": '{"a":1}'.encode("utf-32-be"), "BOM": b"\xef\xbb\xbf{}", "overlong": b'{"a":"\xc0\xaf"}', "half a letter": b'{"a":"\xe4\xb8"}',
    "surrogate bytes": b'{"a":"\xed\xa0\x80"}', "lone high": b'{"a":"\\ud800"}', "lone low": b'{"a":"\\udc00"}', "lone in a key": b'{"\\ud800":1}',
    "swapped pair": b'{"a":"\\udc00\\ud800"}', "trailing text": b"{} x", "two objects": b"{}{}", "trailing NUL": b"{}\0", "comment": b"{}//x",
    "single quotes": b"{'a':1}", "bare key": b"{a:1}", "trailing comma": b'{"a":1,}', "leading comma": b'{,"a":1}', "no colon": b'{"a" 1}',
    "leading zero": b'{"a":01}', "plus": b'{"a":+1}', "dot first": b'{"a":.5}', "dot last": b'{"a":5.}', "hex": b'{"a":0x1}', "e alone": b'{"a":1e}',
    "raw newline": b'{"a":"\n"}', "raw NUL": b'{"a":"\0"}', "raw tab": b'{"a":"\t"}', "bad escape": b'{"a":"\\x41"}', "short escape": b'{"a":"\\u12"}',
    "True": b'{"a":True}', "word": b"null", "list": b"[]", "number": b"7", "string": b'"x"', "nothing": b"", "space": b" \n ", "brace": b"{",
    "form": b"model=echo&messages=x", "XML": b"<a/>", "form feed": b"\x0c{}", "vertical tab": b"{\x0b}", "no-break space": b"\xc2\xa0{}",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_refused_quickly(name: str) -> None:
    began_s = time.thread_time()
    with pytest.raises(ValueError, match=r"\w"):
        stockyard.parse_json_object(BAD_JSON[name])
    assert time.thread_time() - began_s < 1.0  # a few ms each; a quadratic one would take minutes


async def test_bad_json_is_a_400_with_a_row_over_the_wire(start: Start) -> None:
    async with start() as proxy:
        small = {name: body for name, body in BAD_JSON.items() if len(body) < 1_000_000}
        for name, body in small.items():
            status, _, told = await proxy.post("/v1/chat/completions", body)
            assert (status, told["error"]["type"]) == (400, "invalid_request_error"), name
        rows = await proxy.rows()
        assert proxy.gateway.internal_errors == 0
    assert {row["status"] for row in rows} == {400}
    assert len(rows) == len(small)


@pytest.mark.parametrize("depth", [100, 50])
def test_good_json_is_taken_whole(depth: int) -> None:
    for text in (
        nested(depth - 1),
        b'{"a":"' + b"[{" * 300 + b'"}',
        b'{"a":"\\"[[' + b"[" * 200 + b'"}',
        b' {"a" : "\\ud83d\\ude00"} \n',
    ):
        assert stockyard.parse_json_object(text) == json.loads(text)


@pytest.mark.parametrize("few", [0, stockyard.FEW_VALUES])
@pytest.mark.parametrize("pad", [b"", b" " * 20_000])
def test_a_member_given_twice_is_found_by_either_way_of_counting(
    few: int, pad: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockyard, "FEW_VALUES", few)
    texts = (b'"x"', b'"\\":"', b'"\\\\"', b'"\\u0022:"', b'" :"', b'"\\\\\\":,"', b'[1,"":"",2]'.replace(b":", b","))
    for text in texts:
        for colon in (b":", b" :", b"\n:", b": "):
            once = b'{"a"' + colon + text + b',"b":[{"c":1},{"a":' + text + b"}]" + pad + b"}"
            assert stockyard.parse_json_object(once) == json.loads(once)
            for twice in (once.replace(b'"b":', b'"a":'), once.replace(b'{"c":1', b'{"c":1,"\\u0063":2')):
                with pytest.raises(ValueError, match="twice"):
                    stockyard.parse_json_object(twice)


def test_millions_of_values_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b'{"input":[' + b"1," * stockyard.FEW_VALUES + b'{"a":1}]}'
    for name in ("_count_keys", "_refuse_duplicates"):
        monkeypatch.setattr(stockyard, name, None)
    assert len(stockyard.parse_json_object(body)["input"]) == stockyard.FEW_VALUES + 1


async def test_a_false_content_encoding_is_refused(start: Start) -> None:
    async with start() as proxy:
        for coding in (b"gzip", b"deflate", b"br", b"zstd", b"gzip, gzip", b"\xff"):
            got = await talk(
                proxy, HEAD + b"Content-Encoding: " + coding + b"\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
            )
            assert got[9:12] in (b"415", b"400"), (coding, got[:80])
        assert [row for row in await proxy.rows() if row["status"] == 200] == []


async def test_what_passes_through_packed_is_said_to_be_packed(start: Start) -> None:
    packed = gzip.compress(BODY)
    async with start() as proxy:
        proxy.upstream.answers = [Answer(200, {"content-type": "application/json"}, [b"{}"])]
        status, _, _ = await proxy.post("/proxy/openai/chat/completions", packed, **{"content-encoding": "gzip"})
        [seen] = proxy.upstream.seen
    assert (status, seen.headers["content-encoding"], seen.body) == (200, "gzip", packed)


async def test_slow_uploads_are_cut_off_and_long_ones_are_not(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nopenai/whisper-1\r\n--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
    head = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 99999\r\n\r\n"
    proxied = b"POST /proxy/openai/x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99999\r\n\r\n"
    async with start(body_timeout=0.3) as proxy:
        for payload in (head, head + form, proxied + b"{"):
            assert (await talk(proxy, payload)).startswith(b"HTTP/1.1 408"), payload
        monkeypatch.setattr(stockyard, "MIN_UPLOAD_BYTES_PER_S", 100_000)
        trickle = await talk(proxy, proxied, *[b"a"] * 12, pause_s=0.08)
        assert trickle.startswith(b"HTTP/1.1 408")
        rows = await proxy.rows()
    assert [(row["status"], row["error"]) for row in rows] == [(408, "request_timeout")] * 4


async def test_slow_headers_and_idle_connections_are_closed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stockyard, "KEEPALIVE_S", 0.4)
    async with start() as proxy:
        for pieces in ([], [HEAD[:10], *[b"a"] * 30], [REQUEST], [REQUEST, *[b"POST /"[n : n + 1] for n in range(6)]]):
            began_s = time.monotonic()
            reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.05)
                async with asyncio.timeout(8):
                    while await reader.read(65536):
                        pass
            writer.close()
            assert time.monotonic() - began_s < 6


async def read_nothing(proxy: Proxy, payload: bytes) -> socket.socket:
    """Send and never read, with the smallest buffers there are."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", int(proxy.url.rpartition(":")[2])))
    await loop.sock_sendall(client, payload)
    return client


@pytest.mark.parametrize("way", ["lane", "aiohttp", "plain", "proxy", "pipelined"])
async def test_a_client_that_reads_nothing_is_cut_off_and_not_its_providers_fault(start: Start, way: str) -> None:
    text = "word " * 400_000
    request: dict[str, Any] = {
        "model": "gpt-4o-mini",
        "stream": way in ("lane", "aiohttp"),
        "messages": [{"role": "user", "content": "Hi"}],
    }
    body = json.dumps(request).encode()
    path = b"/proxy/openai/x" if way == "proxy" else b"/v1/chat/completions"
    payload = HEAD.replace(b"/v1/chat/completions", path) + b"Content-Length: %d\r\n\r\n" % len(body) + body
    if way == "aiohttp":
        payload = HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    large = json.dumps(
        {
            "object": "chat.completion",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        }
    )
    event = (
        b'data: {"choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n' % text[:100_000].encode()
    )
    async with start(idle_timeout=0.4, cache="off") as proxy:
        streamed = Answer(headers={"content-type": "text/event-stream"}, pieces=[event] * 200)
        proxy.upstream.answers = [
            streamed
            if request["stream"]
            else Answer(200, {"content-type": "application/json"}, [large.encode()], chunked=False)
        ]
        client = await read_nothing(proxy, payload * (12 if way == "pipelined" else 1))
        async with asyncio.timeout(20):
            while proxy.gateway.in_flight or not await proxy.rows() or proxy.gateway.in_flight:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.6)
        calls = len(proxy.upstream.seen)
        client.close()
        rows = await proxy.rows()
    assert calls < 12  # what nobody reads is not asked for
    if request["stream"]:
        assert [(row["status"], row["error"]) for row in rows] == [(499, "client_closed_request")]


async def test_a_passed_answer_that_breaks_off_breaks_off(start: Start) -> None:
    async with start() as proxy:
        for chunked in (True, False):
            head = (
                b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n" if chunked else b"content-length: 99\r\n\r\nhello"
            )
            proxy.upstream.answers = [
                Answer(raw=b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n" + head, reset=False, stays_s=0.05)
            ]
            got = await talk(
                proxy,
                HEAD.replace(b"/v1/chat/completions", b"/proxy/openai/x") + b"Content-Length: 2\r\n\r\n{}",
                answers=2,
            )
            assert got.count(b"HTTP/1.1") == 1
            assert b"hello" in got
            assert not got.endswith(b"0\r\n\r\n")
        rows = await proxy.rows()
    assert [(row["status"], row["error"]) for row in rows] == [(502, "upstream_truncated")] * 2


LITTLE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_{}, ({}, {}))
sys.argv = ["stockyard", "serve"]
sys.modules |= dict.fromkeys({})
import stockyard
stockyard.main()
"""


@contextlib.contextmanager
def little(
    tmp_path: Path, kind: str = "NOFILE", limit: int = 64, without: tuple[str, ...] = ()
) -> Iterator[tuple[int, int]]:
    """A proxy that has little of something: with 64 files, 16 clients. Its port, and its process."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "STOCKYARD_DATA_DIR": str(tmp_path),
        "STOCKYARD_PORT": "0",
    }
    with subprocess.Popen(
        [sys.executable, "-c", LITTLE.format(kind, limit, limit, without)],
        cwd=Path(stockyard.__file__).parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        try:
            yield int(re.findall(r"http://127.0.0.1:(\d+)", run.stdout.readline())[0]), run.pid
            run.terminate()
            _, told = run.communicate(timeout=60)
        finally:
            run.kill()
    assert run.returncode == 0
    assert len(told.splitlines()) < 30, told[:2000]


def until_answered(port: int, status: bytes) -> bytes:
    """Ask on new connections until one is answered so; what came last."""
    deadline_s, got = time.monotonic() + 15, b""
    while not got.startswith(b"HTTP/1.1 " + status) and time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as again:
            again.settimeout(2)
            again.sendall(REQUEST)
            got = again.recv(1000)
    assert got.startswith(b"HTTP/1.1 " + status), got
    return got


def test_running_out_of_files_is_survived_in_silence(tmp_path: Path) -> None:
    """More connections than files, all idle: the oldest of them make room for whoever has something to ask."""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 200
    with little(tmp_path) as (port, _), contextlib.ExitStack() as held:
        for _ in range(120):
            held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        until_answered(port, b"200")
        held.close()
        until_answered(port, b"200")


def test_clients_past_the_cap_are_told_so_while_all_others_are_at_work(tmp_path: Path) -> None:
    body = b'{"model":"echo","stream":true,"chunk_ms":700,"messages":[{"role":"user","content":"%b"}]}' % (b"a " * 90)
    with little(tmp_path) as (port, _), contextlib.ExitStack() as held:
        at_work = []
        for _ in range(stockyard.connection_cap(64)):
            at_work.append(held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)))
            at_work[-1].sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert {client.recv(12) for client in at_work} == {b"HTTP/1.1 200"}
        got = until_answered(port, b"503")
        assert b"\r\nretry-after: 1\r\n" in got
        assert b"too_many_connections" in got
        held.close()
        until_answered(port, b"200")


def cpu_s(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("without", [(), ("uvloop",)])
def test_without_a_free_file_it_waits_and_goes_on(tmp_path: Path, without: tuple[str, ...]) -> None:
    """Every file in use, and strangers knocking: no spinning, calls under way end well, then all is as before."""
    request = {"model": "echo", "stream": True, "chunk_ms": 100, "messages": [{"role": "user", "content": "a " * 30}]}
    body = json.dumps(request).encode()
    with little(tmp_path, without=without) as (port, process), contextlib.ExitStack() as held:
        at_work = [held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(5)]
        for client in at_work:
            client.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        begun = [client.recv(12) for client in at_work]
        used = len(os.listdir(f"/proc/{process}/fd"))
        resource.prlimit(process, resource.RLIMIT_NOFILE, (used, 64))
        for _ in range(30):
            held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        before_s = cpu_s(process)
        time.sleep(1.5)
        assert cpu_s(process) - before_s < 0.9  # a loop that spins would take all of it
        answers = [
            first + b"".join(iter(lambda client=client: client.recv(65536), b""))
            for first, client in zip(begun, at_work, strict=True)
        ]
        assert all(b"data: [DONE]" in answer for answer in answers)
        held.close()
        resource.prlimit(process, resource.RLIMIT_NOFILE, (64, 64))
        until_answered(port, b"200")


def peak_kb(process: int) -> int:
    return int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[0])


async def half_a_body(port: int, path: bytes, size: int) -> bytes:
    """Send the most of a large body, and wait a while for an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = HEAD.replace(b"/v1/chat/completions", path)
    writer.write(head + b"Content-Length: %d\r\n\r\n" % (size * 3) + b'{"a":"' + b"x" * size)
    try:
        async with asyncio.timeout(4):
            await writer.drain()
            return await reader.readuntil(b"}")
    except (TimeoutError, ConnectionError):
        return b""
    finally:
        writer.close()


async def test_slow_bodies_of_many_clients_do_not_fill_the_memory(tmp_path: Path) -> None:
    """60 x 8 MB of 24 MB each, where 64 MB are meant for bodies: those that are too many are told to come back."""
    with little(tmp_path, "DATA", 512 * 1024 * 1024) as (port, process):
        answers = await asyncio.gather(*(half_a_body(port, b"/v1/chat/completions", 8_000_000) for _ in range(60)))
        refused = [answer for answer in answers if answer]
        assert 45 < len(refused) < 60
        assert all(
            answer.startswith(b"HTTP/1.1 503") and b"\r\nretry-after: 1\r\n" in answer.lower() for answer in refused
        )
        assert peak_kb(process) < 300_000
        await asyncio.to_thread(until_answered, port, b"200")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (b"/v1/chat/completions", b'{"error":{"message":"the bodies of'),
        (b"/v1/messages", b'{"type":"error","error":{"type":"overloaded_error"'),
        (b"/v1beta/models/m:generateContent", b'{"error":{"code":503,"message":"the bodies of'),
        (b"/api/session", b'{"error":{"message":"the bodies of'),
    ],
)
async def test_a_body_that_finds_no_room_is_refused_and_room_comes_back(
    start: Start, monkeypatch: pytest.MonkeyPatch, path: bytes, told: bytes
) -> None:
    monkeypatch.setattr(stockyard, "memory_bytes", lambda: 0)
    async with start(max_body_mb=1, body_timeout=0.5) as proxy:
        port = int(proxy.url.rpartition(":")[2])
        assert proxy.gateway.max_bodies_bytes == 2 * 1024 * 1024
        answers = await asyncio.gather(*(half_a_body(port, path, 200_000) for _ in range(20)))
        refused = [answer for answer in answers if told in answer]
        assert 5 < len(refused) < 15
        status = b"HTTP/1.1 529" if path == b"/v1/messages" else b"HTTP/1.1 503"
        assert all(answer.startswith(status) and b"\r\nretry-after: 1\r\n" in answer.lower() for answer in refused)
        assert all(answer.startswith((status, b"HTTP/1.1 408")) for answer in answers)
        errors = [row["error"] for row in await proxy.rows()]
        if path != b"/api/session":
            assert sorted(errors) == ["request_timeout"] * (20 - len(refused)) + ["too_many_bodies"] * len(refused)
        large = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "a " * 400_000}]}).encode()
        for _ in range(4):
            assert (await proxy.post("/v1/chat/completions", large))[0] == 200
        assert proxy.gateway.body_bytes == 0


@pytest.mark.parametrize(("files", "cap"), [(1, 1), (64, 16), (256, 96), (1024, 480), (1_048_576, 524_256)])
def test_the_cap_leaves_files_for_providers_and_the_log(files: int, cap: int) -> None:
    assert stockyard.connection_cap(files) == cap


async def test_a_bomb_from_a_provider_is_not_unpacked(start: Start) -> None:
    """Text that shrinks a thousandfold is refused, whether or not it would fit; what shrinks as text does is taken."""
    words = " ".join(str(number) for number in range(300_000))
    coded = {"content-type": "application/json", "content-encoding": "gzip"}
    async with start(cache="off", retries=0) as proxy:
        for text, status in ((" " * 20_000_000, 502), (words, 200)):
            answer = json.dumps(COMPLETION).replace("Hello there", text)
            proxy.upstream.answers = [Answer(200, coded, [gzip.compress(answer.encode())])]
            got, _, _ = await proxy.post("/v1/chat/completions", BODY.replace(b"echo", b"gpt-4o-mini"))
            assert got == status
        assert [row["error"] for row in await proxy.rows()] == ["upstream_too_large", ""]


async def test_a_judged_answer_of_passthrough_is_bounded(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stockyard, "UPSTREAM_MAX_BODY_BYTES", 100_000)
    async with start(redact="reversible") as proxy:
        proxy.upstream.answers = [Answer(200, {"content-type": "application/json"}, [b" " * 60_000] * 3)]
        status, _, told = await proxy.post("/proxy/openai/x", {"input": "write to anna@example.org"})
        [row] = await proxy.rows()
    assert (status, told["error"]["code"], row["error"]) == (502, "upstream_too_large", "upstream_too_large")


ODD_VALUES = (
    "\u00b2",
    "\u2089",
    "9" * 18,
    "9" * 30,
    "9" * 5000,
    "-1",
    "1e9",
    "1e999",
    "nan",
    "\0",
    "%",
    "'; --",
    "a" * 5000,
    "5xx",
    "[",
    "",
)


async def test_no_value_of_a_query_breaks_a_route(start: Start) -> None:
    """Every parameter that `/openapi.json` names, on every route that only reads."""
    wrong = []
    async with start() as proxy:
        admin = {"authorization": f"Bearer {proxy.gateway.admin_key}"}
        await proxy.post("/v1/chat/completions", BODY)
        async with proxy.session.get(proxy.url + "/openapi.json") as answer:
            paths = (await answer.json())["paths"]
        for path, methods in paths.items():
            named = [one["name"] for one in methods.get("get", {}).get("parameters", ()) if one["in"] == "query"]
            for name in named if path != "/api/events" else ():  # which has no end
                for value in ODD_VALUES:
                    query = {"model": "echo", name: value}
                    async with proxy.session.get(proxy.url + path, params=query, headers=admin) as answer:
                        if answer.status >= 500:
                            wrong.append(f"{path} {name}={value[:20]!r}: {answer.status}")
        assert not wrong, "\n".join(wrong)
        assert proxy.gateway.internal_errors == 0


def test_waits_that_providers_tell_are_read_whatever_they_write() -> None:
    for value in (*ODD_VALUES, "\u0669", "1.5.5", ".", "\udcff"):
        for name in ("retry-after-ms", "retry-after", "x-ratelimit-reset-requests"):
            wait_s = stockyard.read_retry_after({name: value, "x-ratelimit-remaining-requests": "0"}, 1e9)
            assert wait_s is None or 0 <= wait_s <= 3600


def test_what_is_remembered_of_strangers_is_bounded() -> None:
    guard = stockyard.RequestGuard(stockyard.read_settings({}, {}, ""))
    for number in range(1500):
        assert guard.check({"host": f"h{number}.localhost"}) is None
    assert len(guard._good) == 1000


def test_a_sign_in_link_works_once_and_up_to_its_last_millisecond() -> None:
    count = iter(range(99))
    sessions = stockyard.Sessions(lambda size: next(count).to_bytes(size))
    first, second = sessions.offer(5), sessions.offer(5)
    assert not sessions.redeem(first, 5 + stockyard.LINK_MS)
    assert sessions.redeem(second, 4 + stockyard.LINK_MS)
    assert not sessions.redeem(second, 6)


def test_secrets_that_are_remembered_are_bounded_and_forgotten_when_a_key_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stockyard, "MAX_REMEMBERED", 3)
    secrets = [f"sy-{number}" for number in range(5)]
    keys = [stockyard.create_key({}, f"key_{s}", stockyard.digest_secret(s, b"p"), 0) for s in secrets]
    ring = stockyard.KeyRing(b"p", keys)
    for secret, key in zip(secrets, keys, strict=True):
        assert ring.recognise(secret, 1) is None
        assert ring.authenticate(secret, 1) is key
        assert ring.recognise(secret, 1) is key
    assert [ring.recognise(secret, 1) for secret in secrets] == [None, None, None, *keys[3:]]
    ring.drop(keys[0].id)
    assert ring.recognise(secrets[4], 1) is None
