"""Connections to providers over real sockets: what is kept, opened anew, refused, followed, split and signed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

import pytest
from conftest import Start
from test_lane import HEAD
from upstreams import Answer, plain, stream

import stockyard

CHAT = "/v1/chat/completions"


def asking(model: str = "gpt-4o-mini", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], **more}


async def test_a_provider_without_tls_is_not_spoken_to(start: Start) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    other = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = other.sockets[0].getsockname()[1]
    async with other, start(retries=0, OPENAI_BASE_URL=f"https://127.0.0.1:{port}/v1") as proxy:
        status, _, told = await proxy.post(CHAT, asking())
        [row] = await proxy.rows()
    assert (status, told["error"]["code"], row["error"]) == (502, "upstream_tls", "upstream_tls")


async def test_a_provider_that_takes_no_connection_is_not_waited_for(start: Start) -> None:
    with socket.socket() as full, contextlib.ExitStack() as held:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):  # what the system takes by itself
            client = held.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        async with start(
            connect_timeout=0.3, retries=0, OPENAI_BASE_URL=f"http://127.0.0.1:{full.getsockname()[1]}"
        ) as proxy:
            status, _, told = await proxy.post(CHAT, asking())
    assert (status, told["error"]["code"]) == (504, "upstream_connect_timeout")


async def test_a_connection_that_was_idle_for_long_is_not_used_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start(cache="off") as proxy:
        origin = proxy.gateway.upstream.origin(proxy.upstream.url)
        assert (await proxy.post(CHAT, asking()))[0] == 200
        [kept] = origin.idle
        assert (await proxy.post(CHAT, asking()))[0] == 200
        assert origin.idle == [kept]
        monkeypatch.setattr(stockyard.Upstream, "IDLE_MAX_S", -1.0)
        assert (await proxy.post(CHAT, asking()))[0] == 200
        assert kept not in origin.idle


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_pauses_gets_all_of_its_answer(start: Start, streamed: bool) -> None:
    text = "word " * 30_000
    body = json.dumps(asking("echo", stream=streamed, messages=[{"role": "user", "content": text}])).encode()
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        async with start() as proxy:
            await loop.sock_connect(client, ("127.0.0.1", int(proxy.url.rpartition(":")[2])))
            await loop.sock_sendall(client, request * 2)
            while not proxy.gateway.in_flight and not await proxy.rows():
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            got = bytearray()
            async with asyncio.timeout(60):
                while not got.endswith(b"\r\n0\r\n\r\n" if streamed else b"}") or got.count(b"HTTP/1.1 200") < 2:
                    got += await loop.sock_recv(client, 1 << 20)
            assert got.count(b"[DONE]") == (2 if streamed else 0)
            assert got.count(b"word") >= 60_000
            while len(await proxy.rows()) < 2:
                await asyncio.sleep(0.05)
            assert [row["status"] for row in await proxy.rows()] == [200, 200]


# ----- Embeddings of more texts than a provider takes at once


def vectors(*numbers: float) -> Answer:
    return plain({"id": "i", "embeddings": {"float": [[number] for number in numbers]},
                  "meta": {"billed_units": {"input_tokens": len(numbers)}}})  # fmt: skip


async def test_many_texts_are_embedded_in_several_calls_and_one_answer(start: Start) -> None:
    asked = {"model": "cohere/embed-v4.0", "input": [f"text {number}" for number in range(97)]}
    async with start(cache="off", COHERE_API_KEY="sk-cohere", CO_API_URL="UPSTREAM") as proxy:
        proxy.upstream.answers = [vectors(*range(96)), vectors(96)]
        status, _, told = await proxy.post("/v1/embeddings", asked)
        sizes = [len(seen.json["texts"]) for seen in proxy.upstream.seen]
        [row] = await proxy.rows()
    assert (status, sizes) == (200, [96, 1])
    assert [(item["index"], item["embedding"]) for item in told["data"]] == [(n, [n]) for n in range(97)]
    assert (told["usage"]["prompt_tokens"], row["input_tokens"], row["attempts"]) == (97, 97, 1)


@pytest.mark.parametrize(
    ("second", "status", "code"),
    [
        (plain({"message": "too long"}, 400), 400, "upstream_refused"),
        (plain({"embeddings": 5}), 502, "upstream_malformed"),
    ],
)
async def test_one_piece_that_fails_is_the_failure_of_all(start: Start, second: Answer, status: int, code: str) -> None:
    asked = {"model": "cohere/embed-v4.0", "input": ["text"] * 97}
    async with start(cache="off", retries=0, COHERE_API_KEY="sk-cohere", CO_API_URL="UPSTREAM") as proxy:
        proxy.upstream.answers = [vectors(*range(96)), second]
        got, _, told = await proxy.post("/v1/embeddings", asked)
        rows = await proxy.rows()
    assert (got, told["error"]["code"]) == (status, code)
    assert [row["status"] for row in rows] == [status]


# ----- Answers that name the address of the answer


def prediction(status: str, url: str, **more: Any) -> Answer:
    return plain(
        {"id": "p1", "status": status, "urls": {"get": f"{url}/predictions/p1", "stream": f"{url}/stream/p1"}, **more}
    )


REPLICATE: dict[str, Any] = {
    "cache": "off",
    "retries": 0,
    "REPLICATE_API_TOKEN": "r8-canary",
    "REPLICATE_BASE_URL": "UPSTREAM",
}
LLAMA = "replicate/meta/meta-llama-3-70b-instruct"


async def test_a_prediction_is_asked_for_until_it_has_ended(start: Start) -> None:
    async with start(**REPLICATE) as proxy:
        url = proxy.upstream.url
        done = prediction(
            "succeeded", url, output=["Hello", " there"], metrics={"input_token_count": 3, "output_token_count": 2}
        )
        proxy.upstream.answers = [prediction("starting", url), prediction("processing", url), done]
        status, _, told = await proxy.post(CHAT, asking(LLAMA))
        seen = [(seen.method, seen.path.rpartition("/")[2]) for seen in proxy.upstream.seen]
        [row] = await proxy.rows()
    assert (status, told["choices"][0]["message"]["content"]) == (200, "Hello there"), told
    assert seen == [("POST", "predictions"), ("GET", "p1"), ("GET", "p1")]
    assert (row["input_tokens"], row["output_tokens"], row["attempts"]) == (3, 2, 1)


async def test_a_prediction_is_streamed_from_the_address_that_it_names(start: Start) -> None:
    events = [b"event: output\ndata: Hello\n\n", b"event: output\ndata:  there\n\n", b"event: done\ndata: {}\n\n"]
    async with start(**REPLICATE) as proxy:
        proxy.upstream.answers = [prediction("starting", proxy.upstream.url), stream(events)]
        status, _, raw = await proxy.post(CHAT, asking(LLAMA, stream=True))
        asked = proxy.upstream.seen[1]
    said = [json.loads(line[6:]) for line in raw.decode().split("\n\n") if line.startswith("data: {")]
    assert (
        "".join(event["choices"][0]["delta"].get("content") or "" for event in said if event["choices"])
        == "Hello there"
    )
    assert (status, asked.method, asked.path, asked.headers["accept"]) == (
        200,
        "GET",
        "/v1/stream/p1",
        "text/event-stream",
    )
    assert b"[DONE]" in raw


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("first", "status", "code"),
    [
        (plain({"detail": "Input is wrong"}, 422), 422, "upstream_refused"),
        (Answer(200, {"content-type": "application/json"}, [b"{broken"]), 502, "upstream_malformed"),
        (prediction("starting", "https://elsewhere.example"), 502, "upstream_malformed"),
    ],
)
async def test_a_prediction_that_cannot_be_followed(
    start: Start, first: Answer, status: int, code: str, streamed: bool
) -> None:
    async with start(**REPLICATE) as proxy:
        proxy.upstream.answers = [first]
        got, _, told = await proxy.post(CHAT, asking(LLAMA, stream=streamed))
        assert (got, told["error"]["code"], len(proxy.upstream.seen)) == (status, code, 1)


# ----- Signatures


async def test_calls_to_bedrock_are_signed_by_the_keys_of_the_environment(start: Start) -> None:
    answer = {"output": {"message": {"role": "assistant", "content": [{"text": "Hello there"}]}}, "stopReason": "end_turn",
              "usage": {"inputTokens": 3, "outputTokens": 2, "totalTokens": 5}}  # fmt: skip
    keys = {
        "AWS_ACCESS_KEY_ID": "AKIDCANARY",
        "AWS_SECRET_ACCESS_KEY": "secret-canary",
        "AWS_SESSION_TOKEN": "session-canary",
    }
    async with start(cache="off", BEDROCK_BASE_URL="UPSTREAM", AWS_REGION="eu-west-1", **keys) as proxy:
        proxy.upstream.answers = [plain(answer)]
        status, _, told = await proxy.post(CHAT, asking("bedrock/amazon.nova-lite-v1:0"))
        [seen] = proxy.upstream.seen
        [row] = await proxy.rows()
    assert (status, told["choices"][0]["message"]["content"], row["output_tokens"]) == (200, "Hello there", 2)
    assert seen.headers["authorization"].startswith("AWS4-HMAC-SHA256 Credential=AKIDCANARY/")
    assert "/eu-west-1/bedrock/aws4_request" in seen.headers["authorization"]
    assert seen.headers["x-amz-security-token"] == "session-canary"
    assert "secret-canary" not in json.dumps(seen.headers)
