"""The fault matrix: every way a provider can fail, in every dialect, plain and streamed, as one table.

Each row tells what clients see, how often the provider is asked, what the one log row says and what may be billed. Going on
to other targets is test_failover.py's, life before the first byte to a client (keys, budgets) test_gateway.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import Proxy, Start
from upstreams import GOLDENS, STREAM, Answer, Golden, event, plain, stream

import stockyard

JSON = {"content-type": "application/json"}
SSE = {"content-type": "text/event-stream"}
#: Client dialect, provider dialect, the model to ask for: the same on both sides passes bytes, different ones translate.
WAYS = (
    ("openai", "openai", "gpt-4o-mini"), ("anthropic", "anthropic", "claude-sonnet-4-5"), ("responses", "responses", "gpt-4o-mini"),
    ("gemini", "gemini", "gemini-2.5-flash"), ("anthropic", "openai", "gpt-4o-mini"), ("gemini", "openai", "gpt-4o-mini"),
    ("responses", "openai", "openai_compatible/m"), ("openai", "anthropic", "claude-sonnet-4-5"),
    ("openai", "gemini", "gemini-2.5-flash"), ("gemini", "anthropic", "claude-sonnet-4-5"),
)  # fmt: skip
#: What ends a stream well, by client dialect, and what must be there when it did not end well.
SUCCESS = {
    "openai": b"[DONE]",
    "anthropic": b"message_stop",
    "responses": b"response.completed",
    "gemini": b'"finishReason":"STOP"',
}
FAILURE = {
    "openai": b'data: {"error":',
    "anthropic": b"event: error\n",
    "responses": b"event: response.failed\n",
    "gemini": b'data: {"error":',
}


class NoWait(random.Random):
    """Retries wait a random share of some time: none of it."""

    def random(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Fault:
    """What the provider does, and what comes of it. `told` is status and log code of a plain call, `streamed` of a
    stream; code "" is success, "*" any. Status 200 with a code is a stream that broke after its first content."""

    answer: Callable[[Golden, bool], Answer]
    told: tuple[int, str]
    streamed: tuple[int, str]
    again: bool = True
    billed: str = "perhaps"
    #: Provider dialects whose plain answers pass unread to clients of the same dialect.
    passes: tuple[str, ...] = ()


def body(golden: Golden, streamed: bool) -> bytes:
    return b"".join(golden.pieces) if streamed else json.dumps(golden.plain).encode()


def half(golden: Golden, streamed: bool) -> bytes:
    """A part with content in it: the first half of a stream's events, an answer without its last bytes."""
    return b"".join(golden.pieces[: len(golden.pieces) // 2]) if streamed else body(golden, False)[:-9]


def head(streamed: bool, *more: str, status: str = "200 OK") -> bytes:
    return "\r\n".join(
        [f"HTTP/1.1 {status}", "content-type: " + (SSE if streamed else JSON)["content-type"], *more, "", ""]
    ).encode()


def whole(golden: Golden, streamed: bool) -> Answer:
    return stream(golden.pieces) if streamed else plain(golden.plain)


def raw(make: Callable[[Golden, bool], bytes], **more: Any) -> Callable[[Golden, bool], Answer]:
    return lambda golden, streamed: Answer(raw=make(golden, streamed), **more)


def packed(golden: Golden, streamed: bool) -> bytes:
    return gzip.compress(body(golden, streamed))


def refusal(status: int, code: str, again: bool, seen: int | None = None, billed: str = "no") -> Fault:
    return Fault(
        lambda *_: plain({"error": {"message": "no"}}, status),
        (seen or status, code),
        (seen or status, code),
        again,
        billed,
    )


def inside(*pieces: bytes) -> Callable[[Golden, bool], Answer]:
    """These bytes after the first content of a stream, or as a whole plain answer."""
    return lambda golden, streamed: (
        stream([half(golden, True), *pieces], gap_s=0.01)
        if streamed
        else Answer(200, JSON, [pieces[0].removeprefix(b"data: ")], chunked=False)
    )


def length(golden: Golden, streamed: bool) -> str:
    return f"content-length: {len(body(golden, streamed))}"


BROKEN, MALFORMED, SILENT = (502, "upstream_truncated"), (502, "upstream_malformed"), (502, "upstream_disconnected")
CUT, LATE = (200, "upstream_truncated"), (504, "upstream_timeout")
#: Bytes that need no translation pass unread after the first content, so that a broken event may show at the end only.
GARBLED = (200, "*")
FINE = (200, "")

FAULTS: dict[str, Fault] = {
    "none": Fault(whole, FINE, FINE, again=False, billed="yes"),
    "reset at once": Fault(raw(lambda *_: b"", reset=True), SILENT, SILENT),
    "closed at once": Fault(raw(lambda *_: b""), SILENT, SILENT),
    "black hole": Fault(lambda *_: Answer(hang_s=9), LATE, LATE),
    "slow first byte": Fault(lambda g, s: dataclasses.replace(whole(g, s), hang_s=0.03), FINE, FINE, False, "yes"),
    "reset in the headers": Fault(raw(lambda *_: b"HTTP/1.1 200 OK\r\ncontent-", reset=True), SILENT, SILENT),
    "stalls in the headers": Fault(raw(lambda *_: b"HTTP/1.1 200 OK\r\ncontent-", stays_s=9), LATE, LATE),
    "stalls in the body": Fault(raw(lambda g, s: head(s, "content-length: 99999") + half(g, s), stays_s=9), LATE, (200, "upstream_timeout")),
    "reset in the body": Fault(raw(lambda g, s: head(s, "content-length: 99999") + half(g, s), reset=True), BROKEN, CUT),
    "truncated content-length": Fault(raw(lambda g, s: head(s, "content-length: 99999") + half(g, s)), BROKEN, CUT),
    "truncated chunks": Fault(lambda g, s: Answer(headers=SSE if s else JSON, pieces=[half(g, s)], cut=True), BROKEN, CUT),
    "truncated inside a chunk": Fault(raw(lambda g, s: head(s, "transfer-encoding: chunked") + b"ffff\r\n" + half(g, s)), BROKEN, CUT),
    "close-delimited, whole": Fault(raw(lambda g, s: head(s) + body(g, s)), FINE, FINE, False, "yes"),
    "close-delimited, cut": Fault(raw(lambda g, s: head(s) + half(g, s)), MALFORMED, CUT),
    "ends before its end": Fault(lambda g, s: Answer(headers=SSE if s else JSON, pieces=[half(g, s)]), MALFORMED, CUT),
    "empty answer": Fault(raw(lambda g, s: head(s, "content-length: 0")), MALFORMED, BROKEN),
    "204": Fault(raw(lambda g, s: head(s, status="204 No Content")), MALFORMED, BROKEN),
    "error event": Fault(inside(event({"error": {"message": "boom"}})), (502, "*"), (200, "*"), billed="*"),
    "HTML": Fault(lambda *_: Answer(200, {"content-type": "text/html"}, [b"<html>no</html>"]), MALFORMED, MALFORMED),
    "invalid JSON": Fault(inside(b"data: {broken\n\n"), MALFORMED, GARBLED),
    "JSON of another shape": Fault(inside(event({"choices": 5, "content": 5, "output": 5, "candidates": 5, "type": 7})), MALFORMED, GARBLED, passes=("gemini",)),
    "JSON of strings": Fault(inside(event({"choices": ["x"], "content": ["x"], "output": ["x"], "candidates": ["x"]})), MALFORMED, GARBLED, passes=("gemini",)),
    "a JSON list": Fault(inside(b"data: [1]\n\n"), MALFORMED, GARBLED),
    "a JSON number": Fault(inside(b"data: 17\n\n"), MALFORMED, GARBLED),
    "invalid UTF-8": Fault(inside(b'data: {"a":"\xff\xfe"}\n\n'), MALFORMED, GARBLED),
    "gzip unasked": Fault(
        lambda g, s: Answer(200, {**(SSE if s else JSON), "content-encoding": "gzip"}, [packed(g, s)]), FINE, MALFORMED, True, "*"
    ),
    "unknown coding": Fault(lambda g, s: Answer(200, {**(SSE if s else JSON), "content-encoding": "br"}, [b"x"]), MALFORMED, MALFORMED),
    "bad gzip": Fault(lambda g, s: Answer(200, {**JSON, "content-encoding": "gzip"}, [b"no gzip"]), MALFORMED, MALFORMED),
    "zip bomb": Fault(
        lambda g, s: Answer(200, {**JSON, "content-encoding": "gzip"}, [gzip.compress(b" " * 30_000_000)]),
        (502, "upstream_too_large"), MALFORMED, False,
    ),
    "redirect": Fault(lambda *_: Answer(307, {"location": "http://127.0.0.1:1/"}, []), (502, "upstream_redirect"), (502, "upstream_redirect"), False, "no"),
    "100 and 103 first": Fault(
        raw(lambda g, s: b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + head(s, length(g, s)) + body(g, s)),
        FINE, FINE, False, "yes",
    ),
    "header too long": Fault(raw(lambda g, s: head(s, "x-a: " + "a" * 40_000, length(g, s)) + body(g, s)), MALFORMED, MALFORMED),
    "too many headers": Fault(
        raw(lambda g, s: head(s, *(f"x-{n}: a" for n in range(500)), length(g, s)) + body(g, s)), MALFORMED, MALFORMED
    ),
    "two lengths": Fault(raw(lambda g, s: head(s, length(g, s), "content-length: 3") + body(g, s)), MALFORMED, MALFORMED),
    "length and chunks": Fault(raw(lambda g, s: head(s, length(g, s), "transfer-encoding: chunked") + b"3\r\nabc\r\n0\r\n\r\n"), MALFORMED, MALFORMED),
    "bad chunk size": Fault(raw(lambda g, s: head(s, "transfer-encoding: chunked") + b"zz\r\nabc\r\n0\r\n\r\n"), MALFORMED, MALFORMED),
    "no HTTP": Fault(raw(lambda *_: b"SSH-2.0-x\r\n\r\n"), MALFORMED, MALFORMED),
    "oversize body": Fault(
        raw(lambda g, s: head(False, "content-length: 3000000") + b" " * 3_000_000), (502, "upstream_too_large"), MALFORMED, False
    ),
    "endless event": Fault(
        lambda g, s: stream([half(g, True), b'data: {"a":"' + b"a" * 300_000], gap_s=0.01) if s else Answer(200, JSON, [b'{"a":"' + b"a" * 300_000]),
        MALFORMED, GARBLED,
    ),
    "slow drip": Fault(
        lambda g, s: dataclasses.replace(stream(g.pieces), gap_s=0.01) if s else
        Answer(200, JSON, [body(g, s)[:40], body(g, s)[40:]], gap_s=0.02, chunked=False), FINE, FINE, False, "yes",
    ),
    "one byte at a time": Fault(
        lambda g, s: Answer(200, SSE if s else JSON, [bytes([byte]) for byte in body(g, s)]), FINE, FINE, False, "yes"
    ),
    "terminal event twice": Fault(lambda g, s: stream([*g.pieces, g.pieces[-1]]) if s else whole(g, s), FINE, FINE, False, "yes"),
    "events after the end": Fault(lambda g, s: stream([*g.pieces, g.pieces[-2]]) if s else whole(g, s), FINE, FINE, False, "yes"),
    "comments and odd line ends": Fault(
        lambda g, s: stream([b"\xef\xbb\xbf: hello\n\n", b"retry: 5\n\n", *[p.replace(b"\n", b"\r\n") for p in g.pieces]]) if s else whole(g, s),
        FINE, FINE, False, "yes",
    ),
    "no usage": Fault(lambda g, s: without_usage(g, s), FINE, FINE, False, "yes"),
    "400": refusal(400, "*", False), "403": refusal(403, "upstream_authentication", False, 502), "404": refusal(404, "*", False), "413": refusal(413, "*", False),
    "422": refusal(422, "*", False), "401": refusal(401, "upstream_authentication", False, 502),
    "408": refusal(408, "*", True), "409": refusal(409, "*", True), "429": refusal(429, "*", True), "500": refusal(500, "*", True, billed="perhaps"),
    "502": refusal(502, "*", True, billed="perhaps"), "503": refusal(503, "*", True), "529": refusal(529, "*", True),
}  # fmt: skip


def without_usage(golden: Golden, streamed: bool) -> Answer:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: strip(inner) for name, inner in value.items() if name not in ("usage", "usageMetadata")}
        return value

    if not streamed:
        return plain(strip(golden.plain))
    lines = [line for piece in golden.pieces for line in piece.splitlines(keepends=True)]
    kept = [event(strip(json.loads(line[6:])))[:-1] if line.startswith(b"data: {") else line for line in lines]
    return stream([b"".join(kept)])


def request_of(client: str, model: str, streamed: bool) -> tuple[str, dict[str, Any]]:
    golden = GOLDENS[client]
    if client == "gemini":
        method = "streamGenerateContent?alt=sse" if streamed else "generateContent"
        return f"/v1beta/models/{model}:{method}", golden.request
    return golden.path, {**golden.request, "model": model, "stream": streamed}


def shape_fault(client: str, status: int, told: Any) -> str:
    """Why an error body is not what clients of this dialect read; "" where it is."""
    error = told.get("error") if isinstance(told, dict) else None
    if not isinstance(error, dict) or not error.get("message"):
        return "no error object with a message"
    if client == "gemini":
        return "" if error.get("code") == status and isinstance(error.get("status"), str) else "no code and status"
    if client == "anthropic" and told.get("type") != "error":
        return "no type"
    return "" if isinstance(error.get("type"), str) else "no error type"


async def wrongs(proxy: Proxy, name: str, way: tuple[str, str, str], streamed: bool) -> list[str]:
    """Play one fault on one way and say all that is not as the table has it. Overload is 529 to Anthropic's clients and
    503 to all others; after a 404 of a moved Responses address its chat completions are asked."""
    (client, spoken, model), fault = way, FAULTS[name]
    proxy.upstream.answers, proxy.upstream.seen = [fault.answer(GOLDENS[spoken], streamed)], []
    path, request = request_of(client, model, streamed)
    before = len(await proxy.rows())
    status, headers, told = await proxy.post(path, request)
    rows = (await proxy.rows())[before:]
    found = stockyard.find_request(proxy.gateway.store, rows[-1]["id"]) if rows else None
    want_status, want_code = fault.streamed if streamed else fault.told
    want_status = (529 if client == "anthropic" else 503) if want_status in (503, 529) else want_status
    again = fault.again or (streamed and want_code == "upstream_malformed") or (name == "404" and way == WAYS[2])
    calls = 2 if again and want_code and not (streamed and want_status == 200) else 1
    wrong = []

    def check(holds: bool, what: str) -> None:
        if not holds:
            wrong.append(f"{client} over {spoken}, {'stream' if streamed else 'plain'}: {what}")

    check(len(rows) == 1 and found is not None, f"{len(rows)} rows")
    if len(rows) != 1 or found is None:
        return wrong
    row, lines = rows[0], found["attempt_log"]
    code = row["error"]
    check(status == want_status, f"status {status}")
    check(bool(code) if want_code == "*" else code == want_code, f"logged {code!r}")
    check(code != "internal_error", "an error of our own")
    check(
        len(proxy.upstream.seen) == calls and (name == "404" or len(lines) == calls),
        f"{len(proxy.upstream.seen)} calls",
    )
    check(fault.billed in ("*", lines[-1]["billed"]), f"billed {lines[-1]['billed']}")
    check(headers.get("x-stockyard-request-id") == row["id"], "no request id")
    check((row["status"] < 400) is (want_code == ""), f"row status {row['status']}")
    if want_code == "":
        check(b"Hello" in (told if isinstance(told, bytes) else json.dumps(told).encode()), "no text")
        check(not streamed or told.count(SUCCESS[client]) >= 1, "no end")
        check(not streamed or FAILURE[client] not in told, "an error in a good stream")
        check(
            (row["cost_usd"] is None) is ("compatible" in model or row["output_tokens"] is None),
            f"cost {row['cost_usd']}",
        )
    elif isinstance(told, bytes):
        check(streamed and want_status == 200, "no JSON")
        check(SUCCESS[client] not in told, "an end that lies")
        check(told.count(FAILURE[client]) == 1, f"{told.count(FAILURE[client])} error events")
        check(row["output_tokens"] is not None and row["output_tokens"] > 0, "content without usage")
    else:
        check(not shape_fault(client, status, told), shape_fault(client, status, told))
        check(row["cost_usd"] is None, f"cost {row['cost_usd']}")
        check(not fault.again or headers.get("x-should-retry") == "false", "SDKs would try again")
    return wrong


VARIABLES = {f"{name}_API_KEY": "k" for name in ("ANTHROPIC", "GEMINI", "OPENAI_COMPATIBLE")}
ADDRESSES = {f"{name}_BASE_URL": "UPSTREAM" for name in ("ANTHROPIC", "GEMINI", "OPENAI_COMPATIBLE")}


def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stockyard, "UPSTREAM_MAX_BODY_BYTES", 2_000_000)
    monkeypatch.setattr(stockyard, "SSE_MAX_EVENT_BYTES", 200_000)


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("name", FAULTS)
async def test_the_fault_matrix(start: Start, name: str, streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small_bounds(monkeypatch)
    is_late = "upstream_timeout" in (FAULTS[name].told[1], FAULTS[name].streamed[1])
    deadlines = dict.fromkeys(("first_byte_timeout", "idle_timeout"), 0.15 if is_late else 20)
    async with start(cache="off", **deadlines, **VARIABLES, **ADDRESSES) as proxy:
        proxy.gateway.random = NoWait()
        wrong = []
        for way in WAYS:
            if not streamed and way[0] == way[1] and way[1] in FAULTS[name].passes:
                continue
            wrong += await wrongs(proxy, name, way, streamed)
        assert proxy.gateway.internal_errors == 0
    assert not wrong, "\n".join(wrong)


def flow_of(client: str, spoken: str, translation: stockyard.Translation) -> stockyard.Flow:
    asked, answers = stockyard.DIALECTS[client], stockyard.DIALECTS[spoken]
    transcript = stockyard.Transcript()
    if client == spoken == "openai":
        assert isinstance(answers, stockyard.OpenAiChat)
        return stockyard.OpenAiFlow(answers, translation.provider, True, transcript, lambda _: None)
    if client == spoken:
        return stockyard.NativeFlow(answers.decoder(translation), transcript, lambda _: None)
    request = {**GOLDENS[client].request, "stream": True}
    renderer = asked.renderer(request, translation.new_id, translation.now_s)
    return stockyard.TranslatingFlow(answers.decoder(translation), renderer, transcript, lambda _: None)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0]} over {way[1]}")
def test_a_stream_cut_at_any_byte_shows_no_success(way: tuple[str, str, str], attempt: Callable[..., Any]) -> None:
    """Over sockets one cut in 23 of OpenAI's own dialect is test_gateway.py's; a clean end after each byte is worse."""
    client, spoken, _ = way
    whole, terminal = b"".join(GOLDENS[spoken].pieces), GOLDENS[spoken].terminal
    if spoken == "openai":
        terminal = b'"finish_reason":"stop"'  # `[DONE]` is forgiven where the reason came
    end = whole.index(b"\n\n", whole.index(terminal))  # the blank line itself is forgiven as well
    for at in range(len(whole) + 1):
        flow = flow_of(client, spoken, attempt("m", stream=True))
        out = flow.feed(whole[:at])
        try:
            last = flow.close()
        except stockyard.UpstreamError:
            last = b""
        if flow.complete:
            out += last
        assert at >= end or not flow.complete, at
        assert at >= end or SUCCESS[client] not in out, at
    assert flow.complete
    assert SUCCESS[client] in out


async def test_who_ends_an_exchange_leaves_the_next_one_on_its_connection_alone(start: Start) -> None:
    """A call learns of its answer a moment after the connection is free again; its clean-up must not hit the next call."""
    async with start() as proxy:
        upstream = proxy.gateway.upstream
        origin = upstream.origin(proxy.upstream.url)
        request = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
        first, second = (stockyard.PlainAnswer(proxy.gateway.loop) for _ in range(2))
        exchange = await upstream.send(origin, request, first)
        await first.done
        assert await upstream.send(origin, request, second) is exchange
        exchange.throttle(first, True)
        exchange.cut(first)
        async with asyncio.timeout(10):
            await second.done
        assert second.status == 200


async def test_an_answer_past_its_bound_is_read_no_further(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    small_bounds(monkeypatch)
    async with start(cache="off") as proxy:
        proxy.upstream.answers = [Answer(200, JSON, [b" " * 1_500_000] * 2 + [b" "] * 99, gap_s=0.3)]
        status, _, _ = await proxy.post("/v1/chat/completions", GOLDENS["openai"].request)
        async with asyncio.timeout(10):
            while not proxy.upstream.hung_up:
                await asyncio.sleep(0.01)
    assert status == 502


async def test_a_broken_stream_leaves_its_connection_to_the_next_call(start: Start) -> None:
    """Its chunks end well, so nothing needs to close; a connection that closes now would cost the next call."""
    async with start(cache="off") as proxy:
        path, request = request_of("openai", "gpt-4o-mini", True)
        body = json.dumps(request).encode()
        head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" % path.encode()
        plain = b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
        for sent in (plain, chunked, plain, chunked):
            proxy.upstream.answers = [stream(STREAM[:2])]
            writer.write(head + sent)
            async with asyncio.timeout(20):
                told = await reader.readuntil(b"\r\n0\r\n\r\n")
            assert told.startswith(b"HTTP/1.1 200")
            assert told.count(FAILURE["openai"]) == 1
        writer.close()


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_refusal_tells_the_providers_reason(start: Start, streamed: bool) -> None:
    async with start(cache="off") as proxy:
        refused = {"error": {"message": "max_tokens is too large", "type": "invalid_request_error"}}
        proxy.upstream.answers = [plain(refused, 400)]
        path, request = request_of("openai", "gpt-4o-mini", streamed)
        status, _, told = await proxy.post(path, request)
    assert status == 400
    assert "max_tokens is too large" in told["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/proxy/openai/chat/completions"])
@pytest.mark.parametrize("late", [0.0, 0.05])
async def test_a_second_answer_to_one_request_is_nobodys(start: Start, path: str, late: float) -> None:
    """A provider that says more than it was asked is not listened to on that connection again."""
    answer = json.dumps(GOLDENS["openai"].plain).encode()
    whole = head(False, f"content-length: {len(answer)}") + answer

    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"}]}"):
                writer.write(whole if late else whole + whole.replace(b"Hello", b"STALE"))
                await asyncio.sleep(late)
                writer.write(whole.replace(b"Hello", b"STALE") if late else b"")
        writer.close()

    server = await asyncio.start_server(twice, "127.0.0.1", 0)
    async with start(cache="off", OPENAI_BASE_URL=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1") as proxy:
        for _ in range(4):
            status, _, told = await proxy.post(path, GOLDENS["openai"].request)
            assert (status, told["choices"][0]["message"]["content"]) == (200, "Hello there")
            await asyncio.sleep(0.1)
    server.close()


async def test_what_passes_through_is_bounded_in_time_and_kept_to_meaningful_statuses(start: Start) -> None:
    processing = b"HTTP/1.1 102 Processing\r\n\r\n"
    async with start(total_timeout=0.5, first_byte_timeout=0.4) as proxy:
        for raw_bytes, told in (
            (
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
                (502, "upstream_malformed"),
            ),
            (head(False, "content-length: 2", status="999 Odd") + b"{}", (502, "upstream_malformed")),
            (processing * 3, (504, "upstream_timeout")),
        ):
            proxy.upstream.answers = [Answer(raw=raw_bytes, stays_s=3 if told[0] == 504 else 0)]
            status, _, answer = await proxy.post("/proxy/openai/x", {})
            assert (status, answer["error"]["code"]) == told
            assert (await proxy.rows())[-1]["error"] == told[1]


async def test_counts_that_nobody_can_have_used_are_cut(start: Start) -> None:
    usage = {"prompt_tokens": 10**30, "completion_tokens": -5, "total_tokens": "x"}
    async with start(cache="off", budget="100/day") as proxy:
        proxy.upstream.answers = [plain({**GOLDENS["openai"].plain, "usage": usage})]
        assert (await proxy.post("/v1/chat/completions", {**GOLDENS["openai"].request, "max_tokens": 5}))[0] == 200
        [row] = await proxy.rows()
        assert (row["input_tokens"], row["output_tokens"]) == (2**40, 0)
        assert (await proxy.post("/v1/chat/completions", {**GOLDENS["openai"].request, "max_tokens": 5}))[0] == 429


async def test_a_stream_that_could_not_begin_writes_nothing_later(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heartbeat would stand before the answer of another call on the same connection."""
    monkeypatch.setattr(stockyard, "HEARTBEAT_S", 0.1)
    body = json.dumps({**GOLDENS["openai"].request, "stream": True}).encode()
    async with start(cache="off") as proxy:
        monkeypatch.setattr(proxy.gateway, "renderer", None)
        reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 500")
        assert b"internal_error" in await reader.readuntil(b"}}")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.4)
        writer.close()


@pytest.mark.parametrize(
    ("path", "model", "name"),
    [
        ("/v1/chat/completions", "gpt-4o-mini", "stream_options"),
        ("/v1/completions", "gpt-4o-mini", "stream_options"),
        ("/v1/chat/completions", "claude-sonnet-4-5", "reasoning_effort"),
    ],
)
async def test_members_of_odd_types_are_the_clients_fault(start: Start, path: str, model: str, name: str) -> None:
    ask = {
        "model": model,
        "max_tokens": 9,
        "stream": True,
        "prompt": "a",
        "messages": [{"role": "user", "content": "a"}],
    }
    async with start(ANTHROPIC_API_KEY="sk-a", ANTHROPIC_BASE_URL="UPSTREAM") as proxy:
        for value in (5, [1], True, [{}]):
            status, _, told = await proxy.post(path, {**ask, name: value})
            assert (status, told["error"]["type"]) == (400, "invalid_request_error")
            assert name in told["error"]["message"]


#: By the dialect of a provider: a client of another one, and a model that leads there.
OTHERS = {
    "openai": ("/v1/messages", "gpt-4o-mini"),
    "anthropic": ("/v1/chat/completions", "claude-sonnet-4-5"),
    "responses": ("/v1/chat/completions", "gpt-5-pro"),
}


@pytest.mark.parametrize("client", ["same", "other"])
@pytest.mark.parametrize("spoken", ["openai", "anthropic", "responses"])
@pytest.mark.parametrize("end", [{"gap_s": 5.0}, {"cut": True}], ids=["lingers", "breaks off"])
async def test_what_comes_after_the_end_of_an_answer_is_no_matter(
    start: Start, monkeypatch: pytest.MonkeyPatch, spoken: str, client: str, end: dict[str, Any]
) -> None:
    """The last event proves that it is whole: no heartbeat, no error and no wait follows."""
    monkeypatch.setattr(stockyard, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(stockyard, "LINGER_S", 0.2)
    golden, (path, model) = GOLDENS[spoken], OTHERS[spoken]
    asked = {"model": model, "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}
    if client == "same":
        path, asked = golden.path, golden.request
    async with start(retries=0, ANTHROPIC_API_KEY="k", ANTHROPIC_BASE_URL="UPSTREAM") as proxy, asyncio.timeout(4):
        whole = b"".join(golden.pieces)
        proxy.upstream.answers = [stream([whole, b": bye\n\n"] if "gap_s" in end else [whole], **end)]
        status, _, told = await proxy.post(path, {**asked, "stream": True})
        [row] = await proxy.rows()
    assert (status, row["status"], row["error"], row["output_tokens"]) == (200, 200, "", 5)
    terminal = golden.terminal if client == "same" else b"message_stop" if path == "/v1/messages" else b"[DONE]"
    blocks = told.split(b"\n\n")
    last = next(at for at, block in enumerate(blocks) if terminal in block)
    assert {*blocks[last + 1 :]} <= {b"", b": bye"}
