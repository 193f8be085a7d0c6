"""The life of a call: what clients see, what goes upstream, what is charged, and the one row that stays."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import threading
import types
from typing import Any

import aiohttp
import pytest
import yarl
from conftest import NOON_S, Proxy, Start, until
from upstreams import COMPLETION, DONE, GOLDENS, STREAM, USAGE_EVENT, Answer, chunk, event, plain, stream

import stockyard

CHAT: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
CHAT_PATH = "/v1/chat/completions"
# Chunked uploads do not fit the lane, so each test that takes `way` runs over both ways in.
WAYS = [pytest.param(False, id="lane"), pytest.param(True, id="aiohttp")]


async def ask(proxy: Any, body: Any, chunked: bool, **headers: str) -> tuple[int, Any, Any]:
    data = json.dumps(body).encode()

    async def pieces() -> Any:
        yield data[:7]
        yield data[7:]

    payload = pieces() if chunked else data
    async with proxy.session.post(
        proxy.url + CHAT_PATH, data=payload, headers={"content-type": "application/json", **headers}
    ) as answer:
        raw = await answer.read()
        return answer.status, answer.headers, json.loads(raw) if answer.content_type == "application/json" else raw


@pytest.mark.parametrize("chunked", WAYS)
async def test_a_plain_call_passes_bytes_and_leaves_one_row(start: Start, chunked: bool) -> None:
    async with start() as proxy:
        body = {**CHAT, "temperature": 0.5, "unknown_field": {"deep": [1, 2.50]}}
        status, headers, told = await ask(proxy, body, chunked)
        [seen] = proxy.upstream.seen
        [row] = await proxy.rows()
    assert status == 200
    assert told["choices"][0]["message"]["content"] == "Hello there"
    assert seen.body == json.dumps(body).encode()
    assert seen.headers["authorization"] == "Bearer sk-canary-openai"
    assert (headers["x-stockyard-provider"], headers["x-stockyard-model"]) == ("openai", "gpt-4o-mini")
    assert headers["cache-control"] == "private, no-store"
    # 6 uncached at 0.15, 4 cached at 0.075, 5 out at 0.60 dollars a million
    assert headers["x-stockyard-cost-usd"] == "0.0000042"
    assert headers["x-stockyard-request-id"] == row["id"]
    assert (row["status"], row["input_tokens"], row["cached_tokens"], row["output_tokens"]) == (200, 6, 4, 5)
    assert row["cost_usd"] == 0.0000042
    assert row["finish_reason"] == "stop"
    assert row["latency_ms"] >= row["overhead_ms"] >= 0


@pytest.mark.parametrize("chunked", WAYS)
@pytest.mark.parametrize("asked", [True, False])
async def test_a_stream_asks_for_usage_and_shows_it_to_who_asked(start: Start, chunked: bool, asked: bool) -> None:
    body = {**CHAT, "stream": True, **({"stream_options": {"include_usage": True}} if asked else {})}
    async with start() as proxy:
        status, headers, told = await ask(proxy, body, chunked)
        [seen] = proxy.upstream.seen
        [row] = await proxy.rows()
    events = [json.loads(line[6:]) for line in told.decode().split("\n\n") if line.startswith("data: {")]
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert "x-stockyard-cost-usd" not in headers
    assert seen.json["stream_options"] == {"include_usage": True}
    assert told.endswith(DONE)
    assert (
        "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"])
        == 'Hello "there" \u00e9\u4e2d'
    )
    usage = [e["usage"] for e in events if e.get("usage")]
    assert [u["cost"] for u in usage] == ([0.0000045] if asked else [])
    assert (row["input_tokens"], row["output_tokens"], row["cost_usd"]) == (10, 5, 0.0000045)
    assert row["first_token_ms"] is not None


async def test_the_log_keeps_the_assembled_answer_of_a_stream(start: Start) -> None:
    async with start() as proxy:
        await proxy.post(CHAT_PATH, {**CHAT, "stream": True})
        [row] = await proxy.rows()
        found = stockyard.find_request(proxy.gateway.store, row["id"])
    assert found is not None
    assert found["response"]["choices"][0]["message"]["content"] == 'Hello "there" \u00e9\u4e2d'
    assert found["request"]["messages"] == CHAT["messages"]


@pytest.mark.parametrize("status", [500, 503, 429, 529])
async def test_what_may_pass_is_tried_again_and_never_seen(start: Start, status: int) -> None:
    async with start() as proxy:
        proxy.upstream.answers = [
            plain({"error": {"message": "busy"}}, status),
            plain({**stockyard.orjson.loads(b"{}"), **_completion()}),
        ]
        got, headers, _ = await proxy.post(CHAT_PATH, CHAT)
        [row] = await proxy.rows()
    assert (got, headers["x-stockyard-attempts"], row["attempts"], row["error"]) == (200, "2", 2, "")


def _completion() -> dict[str, Any]:
    from upstreams import COMPLETION

    return COMPLETION


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (
            plain({"error": {"message": "no", "type": "invalid_request_error", "code": "bad", "param": "top_p"}}, 400),
            400,
            "bad",
        ),
        (plain({"error": {"message": "bad key"}}, 401), 502, "upstream_authentication"),
        (plain({"detail": [{"loc": ["body", "seed"], "msg": "extra"}]}, 422), 422, "upstream_refused"),
        (Answer(302, {"location": "http://127.0.0.1:1/"}, [], chunked=False), 502, "upstream_redirect"),
        (Answer(200, {"content-type": "text/html"}, [b"<html>hi</html>"], chunked=False), 502, "upstream_malformed"),
        (
            Answer(200, {"content-type": "application/json"}, [b'{"choices": [', b"{"], cut=True),
            502,
            "upstream_truncated",
        ),
        (plain({"error": {"message": "out", "code": "insufficient_quota"}}, 429), 429, "insufficient_quota"),
    ],
)
async def test_failures_end_in_one_error_and_one_row(start: Start, answer: Answer, status: int, code: str) -> None:
    async with start(retries=0) as proxy:
        proxy.upstream.answers = [answer]
        got, headers, told = await proxy.post(CHAT_PATH, CHAT)
        [row] = await proxy.rows()
        assert len(proxy.upstream.seen) == 1
    assert (got, told["error"]["code"]) == (status, code)
    assert told["error"]["request_id"] == row["id"] == headers["x-stockyard-request-id"]
    assert headers["x-should-retry"] == "false"
    assert (row["status"], row["error"], row["cost_usd"], row["priced"]) == (status, code, None, False)


async def test_an_unknown_model_names_the_variable_and_reaches_nobody(start: Start) -> None:
    async with start() as proxy:
        status, _, told = await proxy.post(CHAT_PATH, {**CHAT, "model": "claude-sonnet-4-5"})
        other, _, nothing = await proxy.post(CHAT_PATH, {**CHAT, "model": "no-such-model"})
    assert (status, told["error"]["code"]) == (404, "model_not_found")
    assert "ANTHROPIC_API_KEY" in told["error"]["message"]
    assert (other, nothing["error"]["code"]) == (404, "model_not_found")
    assert not [seen for seen in proxy.upstream.seen if seen.method == "POST"]


async def test_a_failure_before_the_first_content_is_retried_and_after_it_is_an_error_event(start: Start) -> None:
    async with start() as proxy:
        proxy.upstream.answers = [stream(STREAM[:1], cut=True), stream(STREAM)]
        status, headers, told = await proxy.post(CHAT_PATH, {**CHAT, "stream": True})
        assert (status, headers["x-stockyard-attempts"]) == (200, "2")
        assert told.count(b'"role":"assistant"') == 1
        proxy.upstream.answers = [stream(STREAM[:3], cut=True)]
        status, _, told = await proxy.post(CHAT_PATH, {**CHAT, "stream": True})
        rows = await proxy.rows()
    assert status == 200
    assert DONE not in told
    last = json.loads(told.decode().strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "upstream_truncated"
    assert [row["error"] for row in rows] == ["", "upstream_truncated"]
    assert rows[1]["output_tokens"] > 0


@pytest.mark.parametrize("at", range(0, sum(map(len, STREAM)), 23))
async def test_a_stream_cut_anywhere_never_looks_whole(start: Start, at: int) -> None:
    whole = b"".join(STREAM)
    finished = (
        whole[:at].find(b'"finish_reason":"stop"') >= 0 and b"\n\n" in whole[whole.find(b'"finish_reason":"stop"') : at]
    )
    async with start(retries=0) as proxy:
        proxy.upstream.answers = [stream([whole[:at]] if at else [], cut=True)]
        status, _, told = await proxy.post(CHAT_PATH, {**CHAT, "stream": True})
        [row] = await proxy.rows()
    assert DONE not in (told if isinstance(told, bytes) else b"")
    assert row["error"], (at, finished)
    assert status in (200, 502)


async def test_a_stream_in_any_split_gives_the_same_bytes(start: Start) -> None:
    whole = b"".join(STREAM)
    async with start() as proxy:
        answers = []
        for size in (1, 2, 3, 7, 64, len(whole)):
            proxy.upstream.answers = [stream([whole[at : at + size] for at in range(0, len(whole), size)])]
            answers.append((await proxy.post(CHAT_PATH, {**CHAT, "stream": True}))[2])
        proxy.upstream.answers = [stream([whole.replace(b"\n", b"\r\n")])]
        answers.append((await proxy.post(CHAT_PATH, {**CHAT, "stream": True}))[2])
    assert len(set(answers)) == 1
    assert b"".join(piece for piece in STREAM if piece != USAGE_EVENT) == answers[0]


@pytest.mark.parametrize(
    "piece",
    [event({"error": {"message": "boom", "code": 503}}), b"data: {broken\n\n", chunk({}, "error"), b"data: [1]\n\n"],
)
async def test_errors_inside_a_stream_are_told(start: Start, piece: bytes) -> None:
    async with start(retries=0) as proxy:
        proxy.upstream.answers = [stream([b"".join(STREAM[:2]), piece], gap_s=0.1)]
        _, _, told = await proxy.post(CHAT_PATH, {**CHAT, "stream": True})
        [row] = await proxy.rows()
    assert b'"error":' in told
    assert DONE not in told
    assert row["error"]
    assert row["status"] >= 500


async def test_a_client_that_leaves_ends_the_providers_work_and_leaves_a_row(start: Start) -> None:
    async with start() as proxy:
        proxy.upstream.answers = [stream([b"".join(STREAM[:2])], gap_s=20)]
        answer = await proxy.session.post(proxy.url + CHAT_PATH, json={**CHAT, "stream": True})
        assert await answer.content.readany()
        answer.close()
        await until(lambda: proxy.upstream.hung_up and not proxy.gateway.in_flight)
        assert proxy.upstream.hung_up == 1
        [row] = await proxy.rows()
    assert (row["status"], row["error"]) == (499, "client_closed_request")
    assert row["output_tokens"] > 0


@pytest.mark.parametrize("path", [CHAT_PATH])
async def test_deadlines(start: Start, path: str) -> None:
    async with start(retries=0, first_byte_timeout=0.2, idle_timeout=0.3) as proxy:
        proxy.upstream.answers = [Answer(hang_s=20)]
        status, _, told = await proxy.post(path, CHAT)
        proxy.upstream.answers = [stream([b"".join(STREAM[:2])], gap_s=20)]
        _, _, streamed = await proxy.post(path, {**CHAT, "stream": True})
        unreachable, _, refused = await proxy.post(path, {**CHAT, "model": "groq/llama"})
    assert (status, told["error"]["code"]) == (504, "upstream_timeout")
    assert b"upstream_timeout" in streamed
    assert (unreachable, refused["error"]["code"]) == (404, "model_not_found")


async def test_heartbeats_keep_a_waiting_stream_open(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stockyard, "HEARTBEAT_S", 0.05)
    async with start() as proxy:
        proxy.upstream.answers = [stream(STREAM, hang_s=0.3)]
        _, _, told = await proxy.post(CHAT_PATH, {**CHAT, "stream": True})
    assert told.startswith(b": heartbeat\n\n")
    assert told.endswith(DONE)


async def test_usage_and_text_survive_translation_to_every_client_dialect(start: Start) -> None:
    asked = {
        "/v1/messages": {"model": "gpt-4o-mini", "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]},
        "/v1/responses": {"model": "openai_compatible/m", "input": "Hi"},
        "/v1beta/models/gpt-4o-mini:generateContent": {"contents": [{"parts": [{"text": "Hi"}]}]},
    }
    async with start(OPENAI_COMPATIBLE_BASE_URL="UPSTREAM") as proxy:
        told = {path: (await proxy.post(path, body))[2] for path, body in asked.items()}
        rows = await proxy.rows()
    assert told["/v1/messages"]["content"] == [{"type": "text", "text": "Hello there"}]
    assert told["/v1/messages"]["usage"]["cache_read_input_tokens"] == 4
    assert told["/v1/responses"]["output"][-1]["content"][0]["text"] == "Hello there"
    gemini = told["/v1beta/models/gpt-4o-mini:generateContent"]
    assert gemini["candidates"][0]["content"]["parts"] == [{"text": "Hello there"}]
    assert gemini["usageMetadata"]["totalTokenCount"] == 15
    assert [(row["client_dialect"], row["output_tokens"]) for row in rows] == [
        ("anthropic", 5),
        ("responses", 5),
        ("gemini", 5),
    ]


async def test_what_cannot_be_carried_is_named_or_refused(start: Start) -> None:
    body = {"model": "gpt-4o-mini", "max_tokens": 9, "top_k": 3, "messages": [{"role": "user", "content": "Hi"}]}
    async with start() as proxy:
        _, headers, _ = await proxy.post("/v1/messages", body)
        status, _, told = await proxy.post("/v1/messages", body, **{"x-stockyard-strict": "true"})
        seen = proxy.upstream.seen[0].json
    assert headers["x-stockyard-dropped"] == "top_k"
    assert "top_k" not in seen
    assert seen["max_completion_tokens"] == 9
    assert (status, told["type"], told["error"]["type"]) == (400, "error", "invalid_request_error")


@pytest.mark.parametrize("spaced", [False, True])
async def test_thinking_of_another_provider_is_not_given_to_anthropic(start: Start, spaced: bool) -> None:
    """A conversation that began elsewhere holds thinking that nobody signed, which Anthropic would refuse."""
    said = [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "yes"}]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "b"},
    ]
    body = {"model": "claude-sonnet-4-5", "max_tokens": 50, "messages": messages}
    text = json.dumps(body, separators=None if spaced else (",", ":")).encode()
    answer = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-4-5", "stop_reason": "end_turn",
        "content": [{"type": "text", "text": "ok"}], "usage": {"input_tokens": 1, "output_tokens": 1},
    }  # fmt: skip
    async with start(ANTHROPIC_API_KEY="sk-ant-x", ANTHROPIC_BASE_URL="UPSTREAM") as proxy:
        proxy.upstream.answers = [plain(answer)]
        status, headers, told = await proxy.post("/v1/messages", text)
        sent = proxy.upstream.seen[0].json["messages"][1]["content"]
    assert (status, told["content"]) == (200, [{"type": "text", "text": "ok"}])
    assert [block["type"] for block in ([{"type": "text"}] if isinstance(sent, str) else sent)] == ["text"]
    assert headers["x-stockyard-dropped"] == "thinking_blocks"


async def test_secrets_reach_no_sink(start: Start, tmp_path: Any, capfd: pytest.CaptureFixture[str]) -> None:
    async with start(retries=0) as proxy:
        proxy.upstream.answers = [
            plain({"error": {"message": "no"}}, 500),
            plain({"error": "x"}, 401),
            stream(STREAM[:2], cut=True),
        ]
        seen = [
            str(await proxy.post(CHAT_PATH, {**CHAT, "stream": n == 2}, authorization="Bearer sk-canary-client"))
            for n in range(3)
        ]
        admin = proxy.gateway.admin_key
        async with proxy.session.get(
            proxy.url + "/api/providers", headers={"authorization": f"Bearer {admin}"}
        ) as answer:
            seen.append(await answer.text())
        await proxy.rows()
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.name != "admin.key")
    printed = "".join(capfd.readouterr())
    for secret in ("sk-canary-openai", "sk-canary-client", admin):
        assert secret.encode() not in written
        assert secret not in printed
        assert not any(secret in text for text in seen)


async def test_passthrough_uploads_and_files(start: Start) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nopenai/whisper-1\r\n--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\n\r\n'
    form += b"\x00" * 3000 + b"\r\n--b--\r\n"
    async with start() as proxy:
        proxy.upstream.answers = [plain({"text": "hi"})]
        status, _, told = await proxy.post(
            "/v1/audio/transcriptions", form, **{"content-type": "multipart/form-data; boundary=b"}
        )
        named = proxy.url + "/proxy/openai/v1/chat/completions?key=secret&x=1&%6bEy=secret"
        async with proxy.session.post(yarl.URL(named, encoded=True), json=CHAT) as answer:
            raw = answer.status
        async with proxy.session.post(
            yarl.URL(proxy.url + "/proxy/openai/a/%2e%2e/b", encoded=True), json=CHAT
        ) as answer:
            climbed = answer.status
        unknown, _, _ = await proxy.post("/proxy/nobody/x", CHAT)
        rows = await proxy.rows()
    upload, passed = proxy.upstream.seen
    assert (status, told) == (200, {"text": "hi"})
    assert b'name="model"\r\n\r\nwhisper-1\r\n' in upload.body
    assert len(upload.body) == len(form) - len("openai/")
    assert (raw, passed.path) == (200, "/v1/chat/completions?x=1")
    assert (climbed, unknown) == (400, 404)
    assert [row["status"] for row in rows] == [200, 200, 400, 404]


async def test_what_the_provider_took_is_none_of_the_overhead(start: Start) -> None:
    async with start(cache="off", retries=1) as proxy:
        slow, failing = plain(COMPLETION), plain({"error": {"message": "overloaded"}}, 503)
        slow.hang_s = failing.hang_s = 0.1
        proxy.upstream.answers = [failing, slow]
        assert (await proxy.post(CHAT_PATH, CHAT))[0] == 200
        [row] = await proxy.rows()
    assert row["attempts"] == 2 and 0 <= row["overhead_ms"] <= row["latency_ms"] - 199


async def test_with_full_durability_a_call_and_the_end_of_its_answer_wait_for_the_disk(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start(durability="full", cache="off") as proxy:
        waiting, turns = [], threading.Semaphore(0)
        real = os.fsync

        def slow(file: int) -> None:
            waiting.append(file)
            turns.acquire(timeout=20)
            real(file)

        monkeypatch.setattr(os, "fsync", slow)
        call = asyncio.create_task(proxy.post(CHAT_PATH, CHAT))
        await until(lambda: len(waiting) == 1)
        assert proxy.upstream.seen == []
        turns.release()
        await until(lambda: len(waiting) == 2)
        assert (len(proxy.upstream.seen), call.done()) == (1, False)
        turns.release(9)  # the end of the proxy needs some as well
        assert (await call)[0] == 200


async def test_a_hard_budget_admits_what_fits_and_no_more(start: Start) -> None:
    body = {**CHAT, "max_tokens": 100}
    async with start(budget="0.000001/day", require_key="never") as proxy:
        status, _, told = await proxy.post(CHAT_PATH, body)
        needed = told["error"]["needed_nanousd"]
        assert (status, told["error"]["code"], proxy.upstream.seen) == (429, "insufficient_quota", [])
        five = stockyard.Budget("five", needed * 11 // 2, "total", scope="model", value="gpt-4o-mini")
        proxy.gateway.drop_budget("global:day")
        proxy.gateway.set_budgets([five])
        go = asyncio.Event()
        proxy.upstream.answers = [dataclasses.replace(plain(_completion()), go=go)]
        calls = [asyncio.create_task(proxy.post(CHAT_PATH, body)) for _ in range(60)]
        await until(lambda: sum(call.done() for call in calls) == 55)
        go.set()
        statuses = [(await call)[0] for call in calls]
        [account] = [row for row in proxy.gateway.ledger.snapshot(0) if row["id"] == "five"]
    assert statuses.count(200) == 5
    assert statuses.count(429) == 55
    assert account["held_nanousd"] == 0
    assert account["settled_nanousd"] == 5 * 4200


async def test_a_missing_cap_is_injected_under_a_hard_budget(start: Start) -> None:
    async with start(budget="20/day") as proxy:
        await proxy.post(CHAT_PATH, CHAT)
        await proxy.post(
            "/v1/messages", {"model": "gpt-4o-mini", "max_tokens": 7, "messages": [{"role": "user", "content": "Hi"}]}
        )
        unpriced, _, told = await proxy.post(CHAT_PATH, {**CHAT, "model": "openai/unheard-of"})
    caps = [seen.json.get("max_completion_tokens") for seen in proxy.upstream.seen]
    assert caps == [4096, 7]
    assert (unpriced, told["error"]["code"]) == (429, "insufficient_quota")


async def test_virtual_keys_are_required_once_one_exists_and_limit_what_they_say(start: Start) -> None:
    async with start() as proxy:
        assert (await proxy.post(CHAT_PATH, CHAT))[0] == 200
        key, secret = proxy.gateway.create_key(
            {"name": "team", "models": ["gpt-4o*"], "rate_limit": {"rpm": 2}, "tags": {"team": "a"}}
        )
        bearer = {"authorization": f"Bearer {secret}"}
        assert (await proxy.post(CHAT_PATH, CHAT))[0] == 401
        assert (await proxy.post(CHAT_PATH, CHAT, authorization="Bearer sy-wrong"))[0] == 401
        status, headers, _ = await proxy.post(CHAT_PATH, CHAT, **bearer, **{"x-stockyard-tags": "team=b,x=1"})
        assert (status, headers["x-ratelimit-remaining-requests"]) == (200, "1")
        assert (await proxy.post("/v1/messages", {**CHAT, "max_tokens": 5}, **{"x-api-key": secret}))[0] == 200
        limited, headers, told = await proxy.post(CHAT_PATH, CHAT, **bearer)
        assert (limited, told["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(headers["retry-after"]) <= 61
        rows = await proxy.rows()
        proxy.gateway.keep_key(stockyard.patch_key(key, {"models": ["o3"], "rate_limit": None}))
        assert (await proxy.post(CHAT_PATH, CHAT, **bearer))[0] == 403
    assert [row["tags"] for row in rows if row["status"] == 200] == ["", "team=a,x=1", "team=a"]
    assert rows[-1]["key_id"] == key.id


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"max_tokens": 5}, 200),
        ({"max_tokens": 5, "max_completion_tokens": 5}, 200),
        ({"max_completion_tokens": 5, "max_tokens": 90_000}, 429),
        ({"max_completion_tokens": 5, "max_tokens": "90000"}, 429),
        ({"max_tokens": 5, "chat_template_kwargs": {"max_new_tokens": 90_000}}, 429),
    ],
)
async def test_a_second_cap_allows_no_more_than_is_held(start: Start, body: dict[str, Any], status: int) -> None:
    async with start(budget="0.01/day") as proxy:
        told = await proxy.post(CHAT_PATH, {**CHAT, **body})
        assert (told[0], "write 90000 tokens" in json.dumps(told[2])) == (status, status == 429)
        assert len(proxy.upstream.seen) == (status == 200)
        [balance] = proxy.gateway.ledger.snapshot(0)
        assert (balance["held_nanousd"], balance["settled_nanousd"] > 0) == (0, status == 200)


async def test_caps_that_an_encoder_raises_are_held_for(start: Start) -> None:
    variables = {
        "AWS_BEARER_TOKEN_BEDROCK": "k", "BEDROCK_BASE_URL": "UPSTREAM", "REPLICATE_API_TOKEN": "k", "REPLICATE_BASE_URL": "UPSTREAM",
    }  # fmt: skip
    bedrock = {
        "model": "bedrock/anthropic.claude-3-7-sonnet-20250219-v1:0",
        "messages": CHAT["messages"],
        "max_tokens": 10,
    }
    replicate = {**bedrock, "model": "replicate/anthropic/claude-3.7-sonnet"}
    prices = "".join(
        f'[[prices]]\nmodel = "{asked["model"].partition("/")[2]}"\ninput = 1\noutput = 1000\n'
        for asked in (bedrock, replicate)
    )
    async with start(**variables, budget="1000/day", toml=prices) as proxy:
        for asked in (
            {**bedrock, "reasoning_effort": "low"}, replicate, {**bedrock, "inferenceConfig": {"maxTokens": 60_000}},
        ):  # fmt: skip
            call = proxy.gateway.begin(stockyard.HOT_ENDPOINTS[CHAT_PATH], {}, json.dumps(asked).encode(), "")
            proxy.gateway.read(call)
            proxy.gateway.interpret(call)
            [target] = await proxy.gateway.route(call)
            hold = await proxy.gateway.hold(call, target)
            assert hold is not None
            try:
                sent = json.loads(proxy.gateway.prepare(call, target).body)
            except stockyard.BudgetExceeded:
                assert "inferenceConfig" in asked
                continue
            cap = stockyard.output_allowed(sent)
            assert cap is not None
            assert cap > 10
            assert hold.nanousd >= cap * 1_000_000, "a token of output costs 0.001 dollars"


SAMPLE_BODY: dict[str, Any] = {
    "model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "input": "x", "prompt": "x",
    "query": "x", "documents": ["x"], "contents": [{"parts": [{"text": "Hi"}]}], "content": {"parts": [{"text": "Hi"}]},
    "requests": [{"model": "models/gemini-2.5-flash", "content": {"parts": [{"text": "Hi"}]}}],
}  # fmt: skip
SAMPLE_MODELS = {"/v1/messages/count_tokens": "claude-haiku-4-5", "/v1/rerank": "cohere/rerank-v3.5"}


def sample_paths(row: stockyard.RouteRow, request_id: str) -> list[str]:
    """Paths that a route takes, whatever its handler makes of them."""
    path = row.path.replace("{provider}/{path:.*}", "openai/chat/completions").replace("{name}", "openai")
    path = path.replace("{rest:(/.*)?}", "").replace("{id:.+}", "gpt-4o-mini")
    path = path.replace("{id}", "resp_x" if "responses" in path else request_id if "requests" in path else "key_x")
    if "{target:.+}" in path:
        return [path.replace("{target:.+}", f"gemini-2.5-flash:{method}") for method in stockyard.GEMINI_ENDPOINTS]
    return [path]


async def reach(proxy: Any, row: stockyard.RouteRow, method: str, path: str) -> tuple[int, list[str]]:
    """Ask one route once: the status, and the paths that the provider was asked for (lists of models cost nothing)."""
    proxy.upstream.seen.clear()
    given: dict[str, Any] = {"json": {**SAMPLE_BODY, "model": SAMPLE_MODELS.get(path, "gpt-4o-mini")}}
    if row.endpoint is not None and row.endpoint.upload:
        given = {"data": aiohttp.FormData({"model": "gpt-4o-mini"}, default_to_multipart=True)}
    headers = {"authorization": f"Bearer {proxy.gateway.admin_key}", "x-stockyard-cache": "off"}
    if "/files" in path or "/batches" in path:
        headers["x-stockyard-provider"] = "openai"
    sent = {} if method == "GET" else given
    async with proxy.session.request(method, proxy.url + path, headers=headers, **sent) as answer:
        return answer.status, [
            seen.path for seen in proxy.upstream.seen if seen.path.partition("?")[0][-7:] != "/models"
        ]


async def test_every_route_that_spends_is_admitted(start: Start) -> None:
    """Walk the router: what reaches a provider at all is refused under a spent budget, and under a full rate limit."""
    given = {f"{name}_BASE_URL": "UPSTREAM" for name in ("ANTHROPIC", "GEMINI", "COHERE")}
    given |= {"ANTHROPIC_API_KEY": "k", "GOOGLE_API_KEY": "k", "CO_API_KEY": "k"}
    reached = set()
    async with start(**given) as proxy:
        proxy.upstream.answers = [plain(COMPLETION)]
        _, headers, _ = await proxy.post(CHAT_PATH, CHAT)
        request_id = headers["x-stockyard-request-id"]
        call = proxy.gateway.begin(stockyard.RESPONSES_ENDPOINT, {}, b"", "")
        call.provider = "openai"
        stockyard.keep_response(proxy.gateway.store, call, "resp_x", None, None)
        ways = [
            (row, method, path)
            for row in stockyard.ROUTES for method in row.methods.split() for path in sample_paths(row, request_id)
        ]  # fmt: skip
        for row, method, path in ways:
            if (await reach(proxy, row, method, path))[1]:
                reached.add((row.path, method, path))
    spending = {(row.path, method, path) for row, method, path in ways if row.spends}
    assert reached == spending
    for limit, code in (({"budget": "0.000000001/day"}, "insufficient_quota"), ({"rate_limit": "1rpm"}, "rate_limit_exceeded")):  # fmt: skip
        async with start(**given, **limit) as proxy:
            proxy.upstream.answers = [plain(COMPLETION)]
            await proxy.post(CHAT_PATH, CHAT)
            for row, method, path in ways:
                if (row.path, method, path) in reached:
                    status, paths = await reach(proxy, row, method, path)
                    if "budget" in limit and path.endswith(("count_tokens", ":countTokens")):  # costs nothing
                        assert (status != 429, len(paths)) == (True, 1), path
                    else:
                        told = 200 if path.endswith("/replay") else 429  # a replay tells of its refusal
                        assert (status, paths) == (told, []), (limit, method, path)
                        assert (await proxy.rows())[-1]["error"] == code, (method, path)


@pytest.mark.parametrize("packed", [True, False])
async def test_embeddings_are_packed_as_the_sdks_ask_whoever_packs_them(start: Start, packed: bool) -> None:
    vector = "AAAAPwAAgL4=" if packed else [0.5, -0.25]
    async with start(MISTRAL_API_KEY="k", MISTRAL_BASE_URL="UPSTREAM") as proxy:
        proxy.upstream.answers = [
            plain({"object": "list", "data": [{"index": 0, "embedding": vector}], "usage": {"prompt_tokens": 1}})
        ]
        asked = {"model": "mistral/mistral-embed", "input": "x", "encoding_format": "base64", "dimensions": 2}
        status, _, told = await proxy.post("/v1/embeddings", asked)
    assert (status, told["data"][0]["embedding"]) == (200, "AAAAPwAAgL4=")
    assert proxy.upstream.seen[0].json["output_dimension"] == 2


VERTEX_KEYS = {"VERTEX_ACCESS_TOKEN": "t", "GOOGLE_CLOUD_PROJECT": "p", "VERTEX_BASE_URL": "UPSTREAM"}
GEMINI_KEYS = {"GEMINI_API_KEY": "k", "GEMINI_BASE_URL": "UPSTREAM"}


@pytest.mark.parametrize(
    ("keys", "model", "sent_to"),
    [
        (GEMINI_KEYS, "gemini/gemini-embedding-001", "/v1beta/models/gemini-embedding-001:embedContent"),
        (VERTEX_KEYS, "vertex/text-embedding-005", ".../publishers/google/models/text-embedding-005:predict"),
    ],
)
async def test_one_content_embedded_by_a_gemini_client(
    start: Start, keys: dict[str, str], model: str, sent_to: str
) -> None:
    vector = {"values": [0.5]}
    async with start(**keys) as proxy:
        proxy.upstream.answers = [plain({"embedding": vector, "predictions": [{"embeddings": vector}]})]
        asked = {"content": {"parts": [{"text": "x"}]}}
        status, _, told = await proxy.post(f"/v1beta/models/{model}:embedContent", asked)
    assert (status, told["embedding"]) == (200, vector)
    assert proxy.upstream.seen[0].path.endswith(sent_to.removeprefix("..."))
    body = proxy.upstream.seen[0].json
    assert body == asked if "gemini/" in model else body["instances"] == [{"content": "x"}]


@pytest.mark.parametrize("spoken", GOLDENS)
@pytest.mark.parametrize("streamed", [False, True])
async def test_the_log_says_in_one_language_why_an_answer_ended(start: Start, spoken: str, streamed: bool) -> None:
    golden = GOLDENS[spoken]
    path = golden.path + ("streamGenerateContent?alt=sse" if streamed else "generateContent") * (spoken == "gemini")
    request = golden.request | ({"stream": True} if streamed and spoken != "gemini" else {})
    async with start(ANTHROPIC_API_KEY="k", ANTHROPIC_BASE_URL="UPSTREAM", **GEMINI_KEYS) as proxy:
        proxy.upstream.answers = [stream(golden.pieces) if streamed else plain(golden.plain)]
        assert (await proxy.post(path, request))[0] == 200
        assert [row["finish_reason"] for row in await proxy.rows()] == ["stop"]


def test_why_an_answer_ended_in_each_dialects_words() -> None:
    for dialect, answer, finish in (
        ("anthropic", {"stop_reason": "max_tokens"}, "length"),
        ("anthropic", {"stop_reason": "tool_use"}, "tool_calls"),
        ("gemini", {"candidates": [{"finishReason": "MAX_TOKENS"}]}, "length"),
        (
            "gemini",
            {"candidates": [{"finishReason": "STOP", "content": {"parts": [{"functionCall": {}}]}}]},
            "tool_calls",
        ),
        ("gemini", {"candidates": [{"finishReason": "MALFORMED_FUNCTION_CALL"}]}, "malformed_function_call"),
        ("gemini", {"promptFeedback": {"blockReason": "SAFETY"}}, ""),
        ("responses", {"status": "completed", "output": [{"type": "function_call"}]}, "tool_calls"),
        ("responses", {"status": "incomplete", "output": [{"type": "message"}]}, "length"),
        ("openai", {"choices": [{"finish_reason": "length"}]}, "length"),
        ("openai", {"data": []}, ""),
    ):
        assert stockyard.DIALECTS[dialect].read_finish(answer) == finish, answer


def test_azure_deployments_and_v1() -> None:
    row = stockyard.PROVIDERS_BY_ID["azure"]
    variables = {"AZURE_OPENAI_API_KEY": "k", "AZURE_OPENAI_ENDPOINT": "https://a.openai.azure.com/"}
    new = stockyard.configure_provider(row, variables)
    old = stockyard.configure_provider(row, {**variables, "OPENAI_API_VERSION": "2024-10-21"})
    assert new is not None
    assert old is not None
    assert new.base_url + new.row.path("chat", "d") == "https://a.openai.azure.com/openai/v1/chat/completions"
    assert (
        old.base_url + old.row.path("chat", "d")
        == "https://a.openai.azure.com/openai/deployments/d/chat/completions?api-version=2024-10-21"
    )


async def test_errors_outside_of_calls_tell_their_id_and_what_the_client_can_do(start: Start) -> None:
    async with start(require_key="always") as proxy:
        for path, said in (
            ("/v1/models", "missing"),
            ("/v1/chat/completions", "missing"),
            ("/v1/nothing", "nothing is served"),
        ):
            _, headers, told = await (proxy.post(path, CHAT) if "models" not in path else fetch(proxy, "GET", path))
            assert said in told["error"]["message"]
            assert "admin" not in told["error"]["message"]
            assert headers["x-stockyard-request-id"] == told["error"]["request_id"]
        _, _, told = await fetch(proxy, "GET", "/v1/models", authorization="Bearer sy-wrong")
        assert "not valid here" in told["error"]["message"]
        status, headers, _ = await fetch(proxy, "DELETE", CHAT_PATH)
        assert (status, headers["allow"]) == (405, "POST")


async def fetch(proxy: Proxy, method: str, path: str, **headers: str) -> tuple[int, Any, Any]:
    async with proxy.session.request(method, proxy.url + path, headers=headers) as answer:
        return answer.status, answer.headers, await answer.json()


@pytest.mark.parametrize("model", ["claude-haiku-4-5", "gpt-4o-mini"])
async def test_counting_tokens_costs_nothing_and_is_no_unknown_cost(start: Start, model: str) -> None:
    async with start(ANTHROPIC_API_KEY="k", ANTHROPIC_BASE_URL="UPSTREAM") as proxy:
        proxy.upstream.answers = [plain({"input_tokens": 3})]
        asked = {"model": model, "messages": CHAT["messages"]}
        _, headers, told = await proxy.post("/v1/messages/count_tokens", asked)
        assert (told["input_tokens"] > 0, headers["x-stockyard-cost-usd"]) == (True, "0")
        assert [(row["priced"], row["cost_usd"]) for row in await proxy.rows()] == [(True, 0)]
        assert stockyard.unpriced_models(proxy.gateway.store, int(proxy.gateway.clock() * 1000)) == []


async def test_a_passed_call_is_explained_by_the_price_it_was_charged(start: Start) -> None:
    async with start() as proxy:
        proxy.upstream.answers = [plain(COMPLETION)]
        await proxy.post("/proxy/openai/chat/completions", CHAT)
        [row] = await proxy.rows()
        found = stockyard.find_request(proxy.gateway.store, row["id"])
        assert found is not None
        assert row["price_id"] == stockyard.explain_request(found, proxy.gateway.prices)["cost"]["price_id"]
        assert not any(
            "not hold any more" in line for line in stockyard.explain_request(found, proxy.gateway.prices)["summary"]
        )


async def test_lists_for_operators_end_with_their_cursor(start: Start) -> None:
    async with start() as proxy:
        proxy.upstream.answers = [plain({"data": []})]
        key = f"Bearer {proxy.gateway.admin_key}"
        for name in ("requests", "keys", "spend", "timeseries", "budgets", "providers", "models", "audit", "config"):
            status, _, told = await fetch(proxy, "GET", f"/api/{name}", authorization=key)
            assert (status, isinstance(told["data"], list), told["next"]) == (200, True, None), name


@pytest.mark.parametrize(("limit", "again"), [({"budget": "0.000000001/day"}, "false"), ({"rate_limit": "1rpm"}, None)])
async def test_sdks_try_again_only_where_waiting_helps(start: Start, limit: dict[str, str], again: str | None) -> None:
    async with start(**limit) as proxy:
        proxy.upstream.answers = [plain(COMPLETION)]
        await proxy.post(CHAT_PATH, CHAT)
        status, headers, _ = await proxy.post(CHAT_PATH, CHAT)
    assert (status, headers.get("x-should-retry"), headers["retry-after"] > "0") == (429, again, True)


# -- one step of a call's life at a time, on a gateway without a server

TODAY, MIDNIGHT_S = "2100-11-23", NOON_S + 43_200
OUTPUT_NANOUSD = 10_000  # a token, as the gateway's prices say


def call_of(gateway: stockyard.Gateway, kind: str = "chat", **more: Any) -> stockyard.Call:
    body = {"model": "m", "messages": CHAT["messages"], "max_tokens": 100, **more}
    call = gateway.begin(stockyard.Endpoint(kind, CHAT_PATH), {}, stockyard.dump_json(body), "127.0.0.1")
    call.request, call.model = body, "m"
    return call


def target_of(gateway: stockyard.Gateway, model: str = "m", **more: Any) -> stockyard.Target:
    return stockyard.Target(gateway.router.providers["openai"], model, **more)


def hold_at_most(gateway: stockyard.Gateway, nanousd: int, **more: Any) -> None:
    gateway.put_budget(stockyard.Budget("b", nanousd, "day", **more))


def shown_budget(gateway: stockyard.Gateway) -> tuple[str, int, int]:
    [row] = gateway.ledger.snapshot(int(gateway.clock() * 1000))
    return row["window"], row["settled_nanousd"], row["held_nanousd"]


async def test_a_call_begins_with_its_time_and_the_parts_of_its_path(gateway: stockyard.Gateway) -> None:
    plainly = call_of(gateway)
    assert (plainly.ts_ms, plainly.started_s, plainly.id[:4]) == (NOON_S * 1000, 10.0, "req_")
    named = gateway.begin(plainly.endpoint, {"a": "b"}, b"{}", "::1", {"id": "x"})
    assert (named.path_parameters, plainly.path_parameters) == ({"id": "x"}, {})
    assert (named.headers, named.body, named.client_ip) == ({"a": "b"}, b"{}", "::1")


@pytest.mark.parametrize("why", ["draining", "full"])
async def test_who_comes_at_a_bad_time_is_told_when_to_come_again(
    gateway: stockyard.Gateway, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    call = call_of(gateway)
    call.headers = {"x-stockyard-session": " s\n1 "}
    gateway.admit(call)
    assert call.session == stockyard.clean_header(" s\n1 ")
    monkeypatch.setattr(*(gateway, "draining", True) if why == "draining" else (stockyard, "QUEUE_MAX_ROWS", 0))
    with pytest.raises(stockyard.GatewayError) as caught:
        gateway.admit(call)
    assert (caught.value.status, caught.value.retry_after_s) == (503, 1)


async def test_the_shortest_deadline_of_any_route_is_looked_after(
    gateway: stockyard.Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    heeded: list[stockyard.Deadlines] = []
    monkeypatch.setattr(gateway.upstream, "heed", heeded.append)
    own = dataclasses.replace(gateway.upstream.deadlines, idle_s=0.5)
    routes = {name: types.SimpleNamespace(deadlines=deadlines) for name, deadlines in (("a", None), ("b", own))}
    monkeypatch.setattr(gateway.router, "routes", routes)
    gateway.heed_routes()
    assert heeded == [gateway.upstream.deadlines, own]


class Watched(stockyard.Health):
    """Notes what it is told of the end of an attempt."""

    __slots__ = ("ends",)

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[tuple[Any, ...]] = []

    def begin(self, now_s: float) -> bool:
        return now_s > 15

    def end(self, *told: Any) -> None:
        self.ends.append(told)


@pytest.mark.parametrize(
    ("raised", "told", "outcome"),
    [
        (None, (200, "", "yes"), True),
        (stockyard.UpstreamTimeout("late"), (504, "upstream_timeout", "perhaps"), False),
        (stockyard.UpstreamUnreached("away"), (502, "upstream_error", "no"), False),
        (stockyard.UpstreamRefused("no", status=403), (403, "upstream_refused", "perhaps"), None),
        (stockyard.InvalidRequest("no"), (400, "invalid_request", "no"), None),
        (asyncio.CancelledError(), (0, "cancelled", "perhaps"), None),
    ],
)
async def test_an_attempt_tells_the_log_and_its_target_how_it_ended(
    gateway: stockyard.Gateway, raised: BaseException | None, told: tuple[Any, ...], outcome: bool | None
) -> None:
    call, health, now_s = call_of(gateway), Watched(), 12.0
    target, gateway.tick = target_of(gateway, "up", health=health), lambda: now_s
    call.usage, call.cost_nanousd, call.usage_estimated = stockyard.Usage(1, 1), 7, True

    async def attempt(tried: stockyard.Call, at: stockyard.Target) -> str:
        nonlocal now_s
        assert (tried, at, tried.provider, tried.upstream_model) == (call, target, "openai", "up")
        assert (tried.usage is None, tried.cost_nanousd is None) == (now_s > 15,) * 2, "a later try begins anew"
        now_s += 3
        if raised is not None:
            raise raised
        call.first_token_s = now_s - 2
        return "answer"

    for _ in range(2):
        try:
            assert (await gateway.attempted(call, target, attempt), raised) == ("answer", None)
        except BaseException as error:
            assert error is raised
        now_s += 1
    lines = [(line.provider, line.model, line.started_ms, line.ended_ms) for line in call.attempts]
    assert lines == [("openai", "up", 2000.0, 5000.0), ("openai", "up", 6000.0, 9000.0)]
    assert [(line.status, line.error, line.billed) for line in call.attempts] == [told] * 2
    latency_s = 3.0 if raised else 1.0
    assert health.ends == [(False, outcome, latency_s, 15.0), (True, outcome, latency_s, 19.0)]
    assert (call.upstream_s, call.usage_estimated) == (6.0, False)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("held", [False, True])
async def test_the_journal_knows_of_a_call_before_it_leaves_and_of_every_hold(
    gateway: stockyard.Gateway, monkeypatch: pytest.MonkeyPatch, held: bool, full: bool
) -> None:
    told: list[str] = []

    async def synced() -> None:
        told.append("synced")

    async def attempt(call: stockyard.Call, target: stockyard.Target) -> None:
        told.append("left")

    def begin(call: stockyard.Call, record: bytes | None) -> None:
        told.append("begun" if record is None else "held")

    monkeypatch.setattr(gateway.store.journal, "synced", synced)
    monkeypatch.setattr(gateway.store, "begin", begin)
    monkeypatch.setattr(gateway.store, "full_sync", full)
    if held:
        hold_at_most(gateway, 10**9)
    call = call_of(gateway)
    for _ in range(2):
        await gateway.attempted(call, target_of(gateway), attempt)
    first = ["held" if held else "begun", *["synced"] * full, "left"]
    assert told == first + (first if held else ["left"])


@pytest.mark.parametrize(
    ("line", "cost", "estimated", "charged"),
    [
        ({"status": 200}, 5, False, 5),
        ({"status": 200}, 5, True, None),
        ({"status": 200}, None, False, None),
        ({"status": 500}, 5, False, None),
        ({"status": 500, "is_unbilled": True}, 5, False, 0),
        ({"error": "cancelled"}, None, False, None),
    ],
)
@pytest.mark.parametrize("bound", [70, None])
async def test_a_hold_ends_at_what_is_known(
    gateway: stockyard.Gateway,
    line: dict[str, Any], cost: int | None, estimated: bool, charged: int | None, bound: int | None,
) -> None:  # fmt: skip
    """None is charged whole where there is a bound; else at what the call seems to cost."""
    hold_at_most(gateway, 1000, mode="soft")
    call, tried = call_of(gateway), stockyard.Attempt("openai", "m", 0.0, **line)
    call.usage, call.usage_estimated, call.cost_nanousd = stockyard.Usage(1, 1), estimated, cost
    hold = await gateway.set_aside(("", (), "m", "openai", "m"), bound)
    assert shown_budget(gateway) == (TODAY, 0, bound or 0)
    gateway.charge(call, hold, tried)
    whole = bound if bound is not None else cost or 0
    charged = whole if charged is None else charged
    assert shown_budget(gateway) == (TODAY, charged, 0)
    assert (tried.hold, tried.charged_nanousd) == (hold, charged)


async def test_ends_of_holds_are_written_together_and_thresholds_told(
    gateway: stockyard.Gateway, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    timers: list[tuple[float, Any]] = []
    monkeypatch.setattr(gateway, "loop", types.SimpleNamespace(call_later=lambda s, what: timers.append((s, what))))
    alerts: list[dict[str, Any]] = []
    monkeypatch.setattr(gateway.alerts, "tell", lambda kind, text, **told: alerts.append({"text": text, **told}))
    journal = gateway.store.journal
    hold_at_most(gateway, 1000)

    async def spend(nanousd: int) -> None:
        hold = await gateway.set_aside(("", (), "m", "openai", "m"), nanousd)
        gateway.record_end(gateway.ledger.settle(hold, nanousd))

    await spend(300)
    await spend(300)
    assert [after_s for after_s, _ in timers] == [stockyard.SETTLED_WITHIN_S]
    assert journal._deferred.count(b'"settle"') == 2
    timers[0][1]()
    assert (journal._deferred, len(timers), gateway.is_settling) == (b"", 1, False)
    await spend(300)
    assert len(timers) == 2
    timers[1][1]()
    [alert] = [alert for alert in alerts if alert["percent"] == 80]
    assert (alert["budget"], alert["window"]) == ("b", TODAY)
    assert alert["text"] in capfd.readouterr().err and "80 % spent" in alert["text"]


@pytest.mark.parametrize(
    ("kind", "model", "more", "needed"),
    [
        ("count_tokens", "m", {}, 0),
        ("chat", "unpriced", {}, None),
        ("images", "m", {}, None),
        ("chat", "m", {"service_tier": "gold"}, None),
        ("chat", "m", {"service_tier": "flex"}, 100 * OUTPUT_NANOUSD),
        ("chat", "m", {}, 100 * OUTPUT_NANOUSD),
        ("chat", "m", {"n": 3}, 300 * OUTPUT_NANOUSD),
        ("chat", "m", {"tools": [{"type": "web_search"}]}, None),
    ],
)
async def test_the_most_that_a_call_can_cost(
    gateway: stockyard.Gateway, kind: str, model: str, more: dict[str, Any], needed: int | None
) -> None:
    call, target = call_of(gateway, kind, **more), target_of(gateway, model)
    cap, found = gateway.cost_bound(call, target)
    if not needed:
        assert (cap, found) == (None, needed)
        return
    assert found is not None and cap is not None
    assert (cap.tokens, cap.injected, cap.total_tokens) == (100, False, needed // OUTPUT_NANOUSD)
    given = found - needed
    bound = stockyard.INPUT_BOUNDS["openai"]
    assert given == (len(call.body) + bound.request + bound.message) * 1000
    call.must_translate = True
    call.canonical = {**call.request, "added": "x" * 50_000}
    changed = gateway.cost_bound(call, target)[1]
    assert changed is not None and 50_000_000 < changed - found < 51_000_000, "what is added is held for"
    each = cap.total_tokens // 100
    for room, tokens in ((found, 100), (found - 1, 99), (given + 16 * each * OUTPUT_NANOUSD, 16), (given, 100)):
        cap, clamped = gateway.cost_bound(call_of(gateway, kind, **more), target, room)
        assert cap is not None and (cap.tokens, cap.total_tokens) == (tokens, tokens * each)
        assert clamped is not None and clamped - found == (tokens - 100) * each * OUTPUT_NANOUSD


@pytest.mark.parametrize("most", [None, "5"])
async def test_a_clamping_budget_leaves_today_what_yesterday_did_not(
    gateway: stockyard.Gateway, most: str | None
) -> None:
    now_s = MIDNIGHT_S - 0.001
    gateway.clock = lambda: now_s
    call, target = call_of(gateway), target_of(gateway)
    call.headers = {"x-stockyard-max-cost-usd": most} if most else {}
    _, needed = gateway.cost_bound(call, target)
    assert needed is not None
    hold_at_most(gateway, 2 * needed - 10 * OUTPUT_NANOUSD, clamp=True)
    told = []
    for _ in range(2):
        hold = await gateway.hold(call, target)
        assert hold is not None
        gateway.ledger.settle(hold, None)
        told.append((call.clamped, call.output_cap, call.held_tokens, shown_budget(gateway)[0]))
    with pytest.raises(stockyard.BudgetExceeded):
        await gateway.hold(call, target)
    now_s += 0.001
    assert await gateway.hold(call, target) is not None
    told.append((call.clamped, call.output_cap, call.held_tokens, shown_budget(gateway)[0]))
    assert told == [(False, None, 100, TODAY), (True, 90, 90, TODAY), (False, None, 100, "2100-11-24")]


async def test_a_budget_that_comes_back_on_its_day_has_spent_what_it_had(gateway: stockyard.Gateway) -> None:
    now_s = NOON_S
    gateway.clock = lambda: now_s
    budgets = [stockyard.Budget(name, 1000, "day") for name in ("a", "b")]

    def stored() -> list[str]:
        return sorted(row[0] for row in gateway.store.read("SELECT id FROM budgets"))

    def settled() -> dict[str, int]:
        return {row["id"]: row["settled_nanousd"] for row in gateway.ledger.snapshot(int(now_s * 1000))}

    gateway.put_budget(stockyard.Budget("own", 1000, "day", "key", "key_1"))
    gateway.set_budgets(budgets)
    gateway.ledger.settle(await gateway.set_aside(("key_1", (), "m", "openai", "m"), 50), 40)
    for given, ids in ((budgets[:1], ["a"]), ([], []), (budgets, ["a", "b"])):
        gateway.set_budgets(given)
        await gateway.store.flush()
        assert (stored(), settled(), gateway.has_budgets) == (ids, dict.fromkeys(["own", *ids], 40), True)
    gateway.set_budgets([])
    now_s = MIDNIGHT_S
    gateway.set_budgets(budgets)
    assert settled() == {"own": 0, "a": 0, "b": 0}


@pytest.mark.parametrize(
    ("error", "again", "should"),
    [
        (stockyard.LimitExceeded("later", retry_after_s=0.2, fields={"a": 1}), "1", None),
        (stockyard.LimitExceeded("later", retry_after_s=2.1), "3", None),
        (stockyard.BudgetExceeded("never"), "1", "false"),
        (stockyard.Draining("soon"), "1", None),
        (stockyard.InvalidRequest("no"), None, None),
        (stockyard.InvalidRequest("no", retry_after_s=4), "4", None),
        (stockyard.UpstreamError("broken"), None, "false"),
        (stockyard.UpstreamExhausted("busy", retry_after_s=5), "5", "false"),
        (stockyard.UpstreamRefused("slow", status=429, retry_after_s=5), "5", "false"),
    ],
)
async def test_a_refusal_says_when_to_try_again_and_whether(
    gateway: stockyard.Gateway, error: stockyard.GatewayError, again: str | None, should: str | None
) -> None:
    call = call_of(gateway)
    reply = gateway.turn_away(call, error)
    headers = dict(reply.headers)
    assert (headers.get("retry-after"), headers.get("x-should-retry")) == (again, should)
    assert (reply.status, call.status, call.error, call.ended_s) == (error.status, error.status, error.code, 10.0)
    assert (reply.body, json.loads(call.answer)["error"]["code"]) == (call.answer, error.code)
    assert call.refusal == (error.fields if isinstance(error, stockyard.LimitExceeded) else None)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, (500, "")),
        ({"status": 200}, (200, "")),
        ({"status": 404, "error": "model_not_found"}, (404, "model_not_found")),
        ({"status": 200, "is_gone": True}, (499, "client_closed_request")),
    ],
)
async def test_a_call_is_closed_once_with_one_row(
    gateway: stockyard.Gateway, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], told: tuple[int, str]
) -> None:
    rows: list[stockyard.Call] = []
    monkeypatch.setattr(gateway.store, "put", rows.append)
    call, gateway.in_flight = call_of(gateway), 2
    for name, value in given.items():
        setattr(call, name, value)
    gateway.finish(call)
    gateway.tick = lambda: 11.0
    call.is_gone = True
    gateway.settle(call)
    assert (rows, gateway.in_flight, call.ended_s) == ([call], 1, 10.0)
    assert (call.status, call.error) == told
    gateway.in_flight = 0


@pytest.mark.parametrize("full", [False, True])
async def test_the_end_of_an_answer_waits_for_the_disk_where_asked_and_leaves_without_it(
    gateway: stockyard.Gateway, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    told: list[str] = []

    async def synced() -> None:
        told.append("synced")
        raise stockyard.StorageUnavailable("no disk")

    monkeypatch.setattr(gateway.store.journal, "synced", synced)
    monkeypatch.setattr(gateway.store, "full_sync", full)
    monkeypatch.setattr(gateway.store, "put", lambda call: told.append("row"))
    await gateway.close_row(call_of(gateway))
    assert told == ["row", *["synced"] * full]


@pytest.mark.parametrize(
    ("kind", "held", "body", "passes"),
    [
        ("chat", None, {}, True),
        ("embeddings", 5, {}, True),
        ("chat", 5, {}, False),
        ("chat", 5, {"max_tokens": 5}, True),
        ("chat", 5, {"max_tokens": 6}, False),
        ("completions", 5, {"max_tokens": 6}, False),
        ("chat", 5, {"max_tokens": 3, "n": 2}, False),
        ("chat", 0, {"max_tokens": 1}, False),
    ],
)
async def test_no_body_allows_more_than_is_held(
    gateway: stockyard.Gateway, kind: str, held: int | None, body: dict[str, Any], passes: bool
) -> None:
    call = call_of(gateway, kind)
    call.held_tokens = held
    with contextlib.nullcontext() if passes else pytest.raises(stockyard.BudgetExceeded):
        gateway.check_cap(call, body)


@pytest.mark.parametrize(("model", "price_id", "cost"), [("m", True, 60_000), ("unpriced", False, None)])
async def test_what_is_learned_of_an_answer_is_priced(
    gateway: stockyard.Gateway, model: str, price_id: bool, cost: int | None
) -> None:
    call, target = call_of(gateway), target_of(gateway, model)
    gateway.learn(call, target, None, "length")
    assert (call.finish_reason, call.usage, call.price_id, call.cost_nanousd) == ("length", None, "", None)
    usage = stockyard.Usage(10, output_tokens=5)
    gateway.learn(call, target, usage, "stop")
    assert (call.finish_reason, call.usage, bool(call.price_id), call.cost_nanousd) == ("stop", usage, price_id, cost)
    assert gateway.price(call, target, usage) == cost
    counted = call_of(gateway, "count_tokens")
    gateway.learn(counted, target, None, "")
    assert (counted.price_id, counted.cost_nanousd) == (stockyard.FREE.id, 0)


@pytest.mark.parametrize(
    ("queue_ms", "wait_s", "waits"),
    [(0, 1, False), (2000, None, False), (2000, 3, True), (2000, 3.5, False), (100, 1, True), (100, 1.5, False)],
)
async def test_only_who_may_get_a_turn_in_time_waits_for_it(
    gateway: stockyard.Gateway, monkeypatch: pytest.MonkeyPatch, queue_ms: int, wait_s: float | None, waits: bool
) -> None:
    def limit(call: stockyard.Call, body_bytes: int | None) -> None:
        raise stockyard.LimitExceeded("full", retry_after_s=wait_s)

    monkeypatch.setattr(gateway, "limit", limit)
    gateway.set_limits(stockyard.Limits(queue_ms=queue_ms))
    assert gateway.takes_turns == bool(queue_ms)
    turn = asyncio.ensure_future(gateway.take_turn(call_of(gateway)))
    await asyncio.sleep(0)
    assert (turn.done(), bool(gateway.lines)) == (not waits, waits)
    turn.cancel()
    await asyncio.gather(turn, return_exceptions=True)
    assert not gateway.lines


async def test_turns_go_to_those_who_are_still_there_and_to_all_whom_nothing_limits(
    gateway: stockyard.Gateway,
) -> None:
    gateway.set_limits(stockyard.Limits(stockyard.RateLimit(parallel=1), queue_ms=600_000))
    calls = [call_of(gateway) for _ in range(6)]
    turns = [asyncio.ensure_future(gateway.take_turn(call)) for call in calls]
    await asyncio.sleep(0)
    turns[1].cancel()
    gateway.settle(calls[0])
    assert [call.rate_hold is not None for call in calls] == [True, False, True, False, False, False]
    await asyncio.gather(turns[0], turns[2])
    assert [len(line) for line in gateway.lines.values()] == [3]
    gateway.settle(calls[2])
    gateway.set_limits(stockyard.Limits(queue_ms=600_000))
    gateway.serve_lines()
    await asyncio.gather(*turns[3:])
    assert (turns[1].cancelled(), gateway.lines) == (True, {})
    gateway.settle(calls[3])


async def test_a_call_reserves_the_tokens_of_its_body_and_its_cap(gateway: stockyard.Gateway) -> None:
    def taken(size: int | None, **more: Any) -> int | None:
        call = call_of(gateway, **more)
        gateway.limit(call, size)
        assert call.rated == (call.rate_hold is not None)
        return None if call.rate_hold is None else call.rate_hold.tokens

    assert taken(None) is None
    gateway.set_limits(stockyard.Limits(stockyard.RateLimit(tpm=100_000)))
    own = len(call_of(gateway).body)
    assert (taken(None), taken(4000)) == (stockyard.token_estimate(own, 100), stockyard.token_estimate(4000, 100))
    assert taken(4000, max_tokens=900) == stockyard.token_estimate(4000, 900)
    gateway.set_limits(stockyard.Limits(models={"m": stockyard.RateLimit(tpm=100_000)}))
    assert taken(4000) == stockyard.token_estimate(4000, 100)
