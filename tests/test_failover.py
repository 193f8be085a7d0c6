"""What happens when a provider fails: where calls go next, what clients see, what the one row tells."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from conftest import Start, until
from upstreams import COMPLETION, DONE, STREAM, Answer, chunk, fake_upstream, plain, stream

import stockyard

CHAT: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"
SECOND = {"GROQ_API_KEY": "gsk-canary-groq"}
ROUTE = """
[routes.chat]
targets = ["openai/gpt-4o-mini"]
first_byte_timeout = 0.4
idle_timeout = 0.5
connect_timeout = 1
"""
FALLBACK = ROUTE + 'fallbacks = ["groq/llama-3.3-70b-versatile"]\n'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


#: Where nobody listens: a free port found first could be taken by another server meanwhile.
NOBODY = {"OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}


def answered(told: Any) -> str:
    """The text of an answer, plain or streamed."""
    if isinstance(told, dict):
        return str(told["choices"][0]["message"]["content"])
    events = [json.loads(line[6:]) for line in told.decode().split("\n\n") if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])


#: A first target that fails, by what it does; None stands for a port where nobody listens.
FAULTS: dict[str, Answer | None] = {
    "refused": None,
    "black hole": Answer(hang_s=30),
    "slow first byte": Answer(hang_s=2, pieces=[json.dumps(COMPLETION).encode()]),
    "500": plain({"error": {"message": "boom"}}, 500),
    "503": plain({"error": {"message": "boom", "code": "server_is_overloaded"}}, 503),
    "429": plain({"error": {"message": "slow down"}}, 429, **{"retry-after": "30"}),
    "529": plain({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}, 529),
    "408": plain({"error": {"message": "late"}}, 408),
    "refused key": plain({"error": {"message": "bad key"}}, 401),
    "out of credit": plain({"error": {"message": "pay", "code": "insufficient_quota"}}, 429),
    "lying content-length": Answer(raw=HEAD + b'content-length: 9999\r\n\r\n{"id": "x"'),
    "reset in the headers": Answer(raw=b"HTTP/1.1 200 O", reset=True),
    "no HTTP": Answer(raw=b"hello\r\n\r\n"),
    "HTML": Answer(200, {"content-type": "text/html"}, [b"<html>"], chunked=False),
    "stalls in its body": Answer(raw=HEAD + b"content-length: 9999\r\n\r\n{", stays_s=5),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_failing_target_is_answered_by_the_configured_second(start: Start, fault: str, streamed: bool) -> None:
    answer, moved = FAULTS[fault], {}
    if answer is None:
        moved = NOBODY
    async with fake_upstream() as second, start(toml=FALLBACK, **SECOND, GROQ_BASE_URL=second.url, **moved) as proxy:
        proxy.upstream.answers = [answer] if answer else []
        began_s = time.monotonic()
        status, headers, told = await proxy.post(PATH, {**CHAT, "stream": streamed})
        took_s = time.monotonic() - began_s
        [row] = await proxy.rows()
        found = stockyard.find_request(proxy.gateway.store, row["id"])
    assert status == 200
    assert answered(told).startswith("Hello")
    assert took_s < 5  # the first target may take 0.4 s to its first byte, and 0.5 s between two
    assert (headers["x-stockyard-provider"], headers["x-stockyard-attempts"]) == ("groq", "2")
    assert second.seen[0].json["model"] == "llama-3.3-70b-versatile"
    assert "sk-canary-openai" not in json.dumps([seen.headers for seen in second.seen])
    assert (row["attempts"], row["provider"], row["error"]) == (2, "groq", "")
    assert found is not None
    first, last = found["attempt_log"]
    assert (first["provider"], last["provider"], last["status"], last["billed"]) == ("openai", "groq", 200, "yes")
    assert first["status"] >= 400
    assert first["error"]
    assert first["started_ms"] <= first["ended_ms"] <= last["started_ms"] <= last["ended_ms"]
    assert first["billed"] in ("no", "perhaps")


@pytest.mark.parametrize("fault", FAULTS)
async def test_with_no_fallback_configured_no_other_target_is_ever_tried(start: Start, fault: str) -> None:
    answer, moved = FAULTS[fault], {}
    if answer is None:
        moved = NOBODY
    async with (
        fake_upstream() as second,
        start(toml=ROUTE, retries=0, first_byte_timeout=0.4, idle_timeout=0.5, **SECOND, GROQ_BASE_URL=second.url, **moved) as proxy,
    ):  # fmt: skip
        proxy.upstream.answers = [answer] if answer else []
        for model in ("chat", "gpt-4o-mini"):
            status, headers, told = await proxy.post(PATH, {**CHAT, "model": model})
            assert status in (429, 408, 409, 500, 502, 503, 504)
            assert told["error"]["code"] != "upstream_exhausted"
            assert headers["x-stockyard-attempts"] == "1"
    assert second.seen == []


async def test_a_400_goes_nowhere_else(start: Start) -> None:
    async with fake_upstream() as second, start(toml=FALLBACK, **SECOND, GROQ_BASE_URL=second.url) as proxy:
        proxy.upstream.answers = [plain({"error": {"message": "no", "code": "context_length_exceeded"}}, 400)]
        status, headers, told = await proxy.post(PATH, CHAT)
    assert (status, told["error"]["code"], second.seen) == (400, "context_length_exceeded", [])
    assert "retry-after" not in headers


async def test_a_stream_that_dies_before_content_moves_on_and_after_it_does_not(start: Start) -> None:
    async with fake_upstream() as second, start(toml=FALLBACK, **SECOND, GROQ_BASE_URL=second.url) as proxy:
        proxy.upstream.answers = [stream(STREAM[:1], cut=True)]
        status, headers, told = await proxy.post(PATH, {**CHAT, "stream": True})
        assert (status, headers["x-stockyard-provider"]) == (200, "groq")
        assert answered(told).startswith("Hello")
        assert told.count(b'"role":"assistant"') == 1
        proxy.upstream.answers = [stream(STREAM[:2], cut=True)]
        status, _, told = await proxy.post(PATH, {**CHAT, "stream": True})
        rows = await proxy.rows()
    assert len(second.seen) == 1
    assert DONE not in told
    assert [(row["attempts"], row["error"]) for row in rows] == [(2, ""), (1, "upstream_truncated")]


async def test_when_all_fail_the_client_learns_of_each_and_when_to_come_back(start: Start) -> None:
    async with fake_upstream() as second, start(toml=FALLBACK, **SECOND, GROQ_BASE_URL=second.url) as proxy:
        proxy.upstream.answers = [plain({"error": {"message": "boom"}}, 500)]
        second.answers = [plain({"error": {"message": "slow"}}, 429, **{"retry-after": "20"})]
        status, headers, told = await proxy.post(PATH, CHAT)
        error = told["error"]
        assert (status, error["code"], headers["x-should-retry"]) == (503, "upstream_exhausted", "false")
        assert [(row["provider"], row["status"], row["code"]) for row in error["attempts"]] == [
            ("openai", 500, "upstream_500"), ("groq", 429, "upstream_429"),
        ]  # fmt: skip
        assert all(row["ms"] >= 0 for row in error["attempts"])
        assert 15 <= int(headers["retry-after"]) <= 20
        assert "canary" not in json.dumps(told)
        proxy.upstream.answers = [plain({"error": {"message": "slow"}}, 429, **{"retry-after": "9"})]
        status, headers, _ = await proxy.post(PATH, CHAT)  # the second rests, the first is throttled as well
        assert (status, headers["x-stockyard-attempts"]) == (429, "1")
        assert 5 <= int(headers["retry-after"]) <= 9
        status, headers, told = await proxy.post(PATH, CHAT)  # now both rest: nobody is asked
        assert (status, told["error"]["code"], headers["x-stockyard-attempts"]) == (503, "upstream_exhausted", "0")
    assert (len(proxy.upstream.seen), len(second.seen)) == (2, 1)


async def test_the_header_keeps_a_call_at_its_first_target(start: Start) -> None:
    async with fake_upstream() as second, start(toml=FALLBACK, retries=0, **SECOND, GROQ_BASE_URL=second.url) as proxy:
        proxy.upstream.answers = [plain({"error": {"message": "boom"}}, 500)]
        status, _, told = await proxy.post(PATH, CHAT, **{"x-stockyard-no-fallback": "true"})
    assert (status, told["error"]["code"], second.seen) == (500, "upstream_500", [])
    assert "x-stockyard-no-fallback" not in proxy.upstream.seen[0].headers


async def test_a_breaker_spares_a_target_that_fails_and_lets_one_probe_back(start: Start) -> None:
    async with fake_upstream() as second, start(toml=FALLBACK, **SECOND, GROQ_BASE_URL=second.url) as proxy:
        offset_s = 0.0
        proxy.gateway.tick = lambda: time.monotonic() + offset_s
        proxy.upstream.answers = [plain({"error": {"message": "boom"}}, 500)]
        for _ in range(8):
            assert (await proxy.post(PATH, CHAT))[0] == 200
        assert len(proxy.upstream.seen) == stockyard.Health.BREAK_AFTER
        found = stockyard.find_request(proxy.gateway.store, (await proxy.rows())[-1]["id"])
        assert found is not None
        told = " ".join(stockyard.explain_request(found, proxy.gateway.prices)["summary"])
        assert "Passed over: openai/gpt-4o-mini" in told
        proxy.upstream.answers = []
        offset_s = stockyard.Health.OPEN_S
        for _ in range(2):
            status, headers, _ = await proxy.post(PATH, CHAT)
            assert (status, headers["x-stockyard-provider"]) == (200, "openai")
        health = proxy.gateway.router.health["openai", "gpt-4o-mini"]
        assert 0 < health.latency_s <= max(row["latency_ms"] for row in await proxy.rows()) / 1000


async def test_several_keys_of_a_provider_are_tried_and_rest_one_by_one(start: Start) -> None:
    async with start(retries=0, OPENAI_API_KEY="sk-a,sk-b,sk-c") as proxy:
        proxy.upstream.answers = [
            plain({"error": {"message": "bad"}}, 401),
            plain({"error": {"message": "slow"}}, 429, **{"retry-after": "60"}),
            plain(COMPLETION),
        ]
        for _ in range(4):
            assert (await proxy.post(PATH, {**CHAT, "model": "gpt-4o-mini"}))[0] == 200
    used = [seen.headers["authorization"].removeprefix("Bearer ") for seen in proxy.upstream.seen]
    assert sorted(used[:3]) == ["sk-a", "sk-b", "sk-c"]
    assert used[3:] == [used[2]] * 3


HEDGED = FALLBACK.replace("0.4", "5").replace("0.5", "5") + "hedge_after_ms = 100\n"


@pytest.mark.parametrize("cached", [False, True], ids=["", "cacheable"])
@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
async def test_a_slow_target_is_hedged_and_cut_off(start: Start, streamed: bool, cached: bool) -> None:
    async with fake_upstream() as second, start(toml=HEDGED, **SECOND, GROQ_BASE_URL=second.url) as proxy:
        proxy.upstream.answers = [Answer(hang_s=20)]
        began_s = time.monotonic()
        body = {**CHAT, "stream": streamed, **({"temperature": 0} if cached else {})}
        status, headers, told = await proxy.post(PATH, body)
        took_s = time.monotonic() - began_s
        [row] = await proxy.rows()
        found = stockyard.find_request(proxy.gateway.store, row["id"])
        await until(lambda: proxy.upstream.hung_up)
    assert (status, headers["x-stockyard-provider"], headers["x-stockyard-attempts"]) == (200, "groq", "2")
    assert answered(told).startswith("Hello")
    assert took_s < 4
    assert proxy.upstream.hung_up == 1
    assert (row["provider"], row["status"], row["error"], row["attempts"]) == ("groq", 200, "", 2)
    assert row["output_tokens"] == 5
    assert found is not None
    assert [line["error"] for line in found["attempt_log"]] == ["cancelled", ""]


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
async def test_a_quick_target_is_not_hedged(start: Start, streamed: bool) -> None:
    async with (
        fake_upstream() as second,
        start(toml=HEDGED.replace("= 100", "= 4000"), **SECOND, GROQ_BASE_URL=second.url) as proxy,
    ):
        status, headers, _ = await proxy.post(PATH, {**CHAT, "stream": streamed})
    assert (status, headers["x-stockyard-provider"], second.seen) == (200, "openai", [])


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
async def test_a_slower_hedge_loses(start: Start, streamed: bool) -> None:
    async with fake_upstream() as second, start(toml=HEDGED, **SECOND, GROQ_BASE_URL=second.url) as proxy:
        second.answers = [Answer(hang_s=20)]
        first = stream(STREAM) if streamed else plain(COMPLETION)
        first.begin = asyncio.Event()
        proxy.upstream.answers = [first]
        call = asyncio.create_task(proxy.post(PATH, {**CHAT, "stream": streamed}))
        await until(lambda: second.seen)
        first.begin.set()
        status, headers, told = await call
        [row] = await proxy.rows()
    assert (status, headers["x-stockyard-provider"], len(second.seen)) == (200, "openai", 1)
    assert answered(told).startswith("Hello")
    assert (row["provider"], row["attempts"], row["output_tokens"]) == ("openai", 2, 5)


async def test_a_hedged_stream_that_breaks_after_content_ends_in_an_error_event(start: Start) -> None:
    async with fake_upstream() as second, start(toml=HEDGED, **SECOND, GROQ_BASE_URL=second.url) as proxy:
        proxy.upstream.answers = [Answer(hang_s=20)]
        second.answers = [stream(STREAM[:2], cut=True)]
        status, _, told = await proxy.post(PATH, {**CHAT, "stream": True})
        [row] = await proxy.rows()
    assert (status, row["error"], DONE in told) == (200, "upstream_truncated", False)
    assert told.count(b'"error"') == 1
    assert len(second.seen) == 1


@pytest.mark.parametrize("hedged", [False, True], ids=["in turn", "hedged"])
async def test_a_hard_budget_holds_over_all_attempts(start: Start, hedged: bool) -> None:
    """Every attempt may have been billed, as the provider that never answers makes likely: each keeps its whole hold."""
    toml = (
        '[routes.chat]\nfirst_byte_timeout = 0.2\ntargets = ["openai/gpt-4o-mini"]\n'
        'fallbacks = ["groq/llama-3.3-70b-versatile", "openai/gpt-4o", "openai/gpt-4.1-nano"]\n'
    ) + ("hedge_after_ms = 50\n" if hedged else "")
    body = {**CHAT, "max_tokens": 500}
    async with fake_upstream() as second, start(toml=toml, budget="0.002/day", **SECOND, GROQ_BASE_URL=second.url) as proxy:  # fmt: skip
        proxy.upstream.answers = second.answers = [Answer(hang_s=20)]
        ledger = proxy.gateway.ledger
        most = 0
        statuses = set()
        for _ in range(4):
            calls = [asyncio.create_task(proxy.post(PATH, body)) for _ in range(3)]
            while not all(call.done() for call in calls):
                [account] = ledger.snapshot(int(time.time() * 1000))
                most = max(most, account["settled_nanousd"] + account["held_nanousd"])
                await asyncio.sleep(0.01)
            statuses |= {call.result()[0] for call in calls}
        [account] = ledger.snapshot(int(time.time() * 1000))
    assert account["held_nanousd"] == 0
    assert 0 < account["settled_nanousd"] <= account["limit_nanousd"]
    assert most <= account["limit_nanousd"]
    assert 429 in statuses


async def test_a_stream_below_its_rate_is_stalled(start: Start) -> None:
    toml = FALLBACK.replace("0.5", "1.5") + "min_bytes_per_s = 5000\n"
    async with fake_upstream() as second, start(toml=toml, **SECOND, GROQ_BASE_URL=second.url) as proxy:
        slow = [chunk({"role": "assistant", "content": ""}), *(chunk({}) for _ in range(100))]
        proxy.upstream.answers = [stream(slow, gap_s=0.1)]
        status, headers, told = await proxy.post(PATH, {**CHAT, "stream": True})
        assert (status, headers["x-stockyard-provider"]) == (200, "groq")
        proxy.upstream.answers = [stream([STREAM[1], *slow], gap_s=0.1)]
        status, _, told = await proxy.post(PATH, {**CHAT, "stream": True})
        rows = await proxy.rows()
    assert status == 200
    assert DONE not in told
    assert rows[1]["error"] == "upstream_stalled"
    assert len(second.seen) == 1


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
async def test_a_shadow_gets_a_copy_and_delays_nobody(start: Start, streamed: bool) -> None:
    toml = ROUTE.replace("0.4", "5").replace("0.5", "5") + 'shadow = ["groq/llama-3.3-70b-versatile"]\n'
    async with fake_upstream() as second, start(toml=toml, **SECOND, GROQ_BASE_URL=second.url) as proxy:
        late = stream(STREAM) if streamed else plain(COMPLETION)
        late.begin = asyncio.Event()
        second.answers = [late]
        status, headers, told = await proxy.post(PATH, {**CHAT, "stream": streamed})
        assert (status, headers["x-stockyard-provider"]) == (200, "openai")
        assert answered(told).startswith("Hello")
        late.begin.set()
        await until(lambda: not proxy.gateway.shadows)
        first, shadow = await proxy.rows()
    assert second.seen[0].json["messages"] == CHAT["messages"]
    assert (first["provider"], first["attempts"]) == ("openai", 1)
    assert (shadow["provider"], shadow["status"], shadow["output_tokens"]) == ("groq", 200, 5)
    assert first["id"] != shadow["id"]


async def test_a_shadow_that_fails_or_finds_no_money_is_its_own_affair(start: Start) -> None:
    toml = ROUTE + 'shadow = ["groq/no-price-for-this"]\n'
    async with fake_upstream() as second, start(toml=toml, budget="1/day", **SECOND, GROQ_BASE_URL=second.url) as proxy:
        status, _, _ = await proxy.post(PATH, CHAT)
        while proxy.gateway.shadows:
            await asyncio.sleep(0.01)
        rows = await proxy.rows()
    assert (status, second.seen) == (200, [])
    assert sorted(row["error"] for row in rows) == ["", "insufficient_quota"]


RULES = """
[routes.chat]
targets = ["openai/gpt-4o-mini"]
fallbacks = ["anthropic/claude-haiku-4-5"]
defaults = {temperature = 0.25}
forced = {user = "team-a"}
system_prefix = "Be brief."
max_output_tokens = 50
headers = {openai-organization = "org-1"}
"""
DIALECT_BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "openai": (PATH, {**CHAT, "max_tokens": 5000}),
    "responses": ("/v1/responses", {"model": "chat", "input": "Hi", "store": False}),
    "anthropic": ("/v1/messages", {"model": "chat", "max_tokens": 5000, "messages": CHAT["messages"]}),
    "gemini": ("/v1beta/models/chat:generateContent", {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}),
}


@pytest.mark.parametrize("dialect", DIALECT_BODIES)
async def test_the_rules_of_a_route_hold_in_every_dialect(start: Start, dialect: str) -> None:
    path, body = DIALECT_BODIES[dialect]
    async with start(toml=RULES, ANTHROPIC_API_KEY="ak", ANTHROPIC_BASE_URL="UPSTREAM") as proxy:
        status, _, told = await proxy.post(path, body)
        [seen] = proxy.upstream.seen
    sent = json.dumps(seen.json)
    assert status == 200, told
    assert seen.json["model"] == "gpt-4o-mini"
    assert (seen.json["temperature"], seen.json["user"]) == (0.25, "team-a")
    assert "Be brief." in sent
    assert 50 in [seen.json.get(name) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")]
    assert "5000" not in sent
    assert seen.headers["openai-organization"] == "org-1"


async def test_bytes_pass_where_no_rule_applies(start: Start) -> None:
    async with start(toml=ROUTE + "max_output_tokens = 500\n") as proxy:
        body = b'{"model": "chat",  "max_completion_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}'
        await proxy.post(PATH, body)
    assert proxy.upstream.seen[0].body == body.replace(b"chat", b"gpt-4o-mini")


async def test_the_api_tells_the_route_without_sending_anything(start: Start) -> None:
    async with fake_upstream() as second, start(toml=FALLBACK, **SECOND, GROQ_BASE_URL=second.url) as proxy:
        admin = {"authorization": f"Bearer {proxy.gateway.admin_key}"}
        async with proxy.session.get(proxy.url + "/api/route?model=chat&tokens=10", headers=admin) as answer:
            rows = (await answer.json())["targets"]
        async with proxy.session.get(proxy.url + "/api/route?model=chat&tokens=x", headers=admin) as answer:
            assert answer.status == 400
        async with proxy.session.get(proxy.url + "/v1/models") as answer:
            assert "chat" in [row["id"] for row in (await answer.json())["data"]]
        assert [(row["provider"], row["fallback"], row["breaker"]) for row in rows] == [
            ("openai", False, "closed"), ("groq", True, "closed"),
        ]  # fmt: skip
        assert not [seen for seen in (*proxy.upstream.seen, *second.seen) if seen.method == "POST"]
        assert "canary" not in json.dumps(rows)


async def test_a_heartbeat_before_a_hedge_wins_opens_the_stream_once(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockyard, "HEARTBEAT_S", 0.05)
    async with fake_upstream() as second, start(toml=HEDGED, **SECOND, GROQ_BASE_URL=second.url) as proxy:
        proxy.upstream.answers = [Answer(hang_s=20)]
        second.answers = [stream(STREAM, hang_s=0.5)]
        status, _, told = await proxy.post(PATH, {**CHAT, "stream": True})
        [row] = await proxy.rows()
    assert (status, row["provider"], row["status"]) == (200, "groq", 200)
    assert told.startswith(b": heartbeat")
    events = told.replace(b": heartbeat\n\n", b"")
    assert events.endswith(DONE)
    assert answered(events).startswith("Hello")


async def test_a_client_that_leaves_a_hedged_call_ends_both_attempts(start: Start) -> None:
    async with fake_upstream() as second, start(toml=HEDGED, **SECOND, GROQ_BASE_URL=second.url) as proxy:
        proxy.upstream.answers = second.answers = [Answer(hang_s=20)]
        client = asyncio.create_task(proxy.post(PATH, CHAT))
        await until(lambda: proxy.upstream.seen and second.seen)
        client.cancel()
        await until(lambda: proxy.upstream.hung_up and second.hung_up and not proxy.gateway.in_flight)
        [row] = await proxy.rows()
    assert (proxy.upstream.hung_up, second.hung_up) == (1, 1)
    assert (row["status"], row["attempts"]) == (499, 2)


async def test_a_budget_of_a_model_holds_for_a_route_that_leads_there(start: Start) -> None:
    toml = (
        ROUTE
        + '[aliases]\nfast = "openai/gpt-4o-mini"\n'
        + ('[[budgets]]\nscope = "model"\nvalue = "gpt-4o*"\nusd = 0.000001\nperiod = "day"\n')
    )
    async with start(toml=toml) as proxy:
        told = [await proxy.post(PATH, {**CHAT, "model": model}) for model in ("chat", "fast", "openai/gpt-4o-mini")]
    assert [(status, body["error"]["code"]) for status, _, body in told] == [(429, "insufficient_quota")] * 3
    assert proxy.upstream.seen == []
