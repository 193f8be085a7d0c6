"""The admin JSON: who may ask, what is told, what changes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import Proxy, Start
from upstreams import COMPLETION, Answer, plain

import stockyard

CHAT: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
CHAT_PATH = "/v1/chat/completions"


DOCUMENT: Any = json.loads(stockyard.dump_json(stockyard.describe_routes(stockyard.ROUTES)))


def assert_described(method: str, path: str, status: int) -> None:
    """Every status that a test gets stands in /openapi.json for the path it asked."""
    path = path.partition("?")[0]
    plain_first = sorted(DOCUMENT["paths"], key=lambda shown: shown.count("{"))
    shown = next(shown for shown in plain_first if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", shown), path))
    assert str(status) in DOCUMENT["paths"][shown][method.lower()]["responses"], (method, shown, status)


class Admin:
    """Asks the admin JSON with the admin key, or with what `headers` says instead."""

    def __init__(self, proxy: Proxy, **headers: str) -> None:
        self.proxy = proxy
        self.headers = headers or {"authorization": f"Bearer {proxy.gateway.admin_key}"}

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        url = self.proxy.url + path
        async with (
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session,
            session.request(method, url, json=body, headers=self.headers) as answer,
        ):
            raw = await answer.read()
            assert_described(method, path, answer.status)
            return answer.status, json.loads(raw) if answer.content_type == "application/json" else raw.decode()

    async def get(self, path: str) -> Any:
        status, told = await self.ask("GET", path)
        assert status == 200, told
        return told


async def sign_in(proxy: Proxy, body: dict[str, str]) -> tuple[Admin, dict[str, Any], str]:
    """A caller with the session's cookie and header token, the session, and the Set-Cookie header."""
    async with proxy.session.post(proxy.url + "/api/session", json=body) as answer:
        told = await answer.json()
        assert answer.status == 200, told
        cookie = answer.headers["set-cookie"]
    headers = {"cookie": cookie.split(";")[0], "x-stockyard-csrf": told["csrf"]}
    return Admin(proxy, **headers), told, cookie


async def test_signing_in_with_the_admin_key_opens_a_session_that_ends(start: Start) -> None:
    async with start() as proxy:
        admin, told, cookie = await sign_in(proxy, {"key": proxy.gateway.admin_key})
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and "Max-Age=43200" in cookie
        assert told["role"] == "admin" and told["csrf"] not in cookie
        assert await admin.get("/api/session") == told
        assert (await admin.get("/api/providers"))["data"]
        assert (await admin.ask("POST", "/api/keys", {"name": "a"}))[0] == 201
        plain = Admin(proxy, cookie=admin.headers["cookie"])
        status, refused = await plain.ask("POST", "/api/keys", {"name": "b"})
        assert (status, refused["error"]["code"]) == (403, "csrf")
        assert (await plain.ask("DELETE", "/api/session"))[0] == 403
        assert (await Admin(proxy, **admin.headers, origin="https://evil.example").ask("GET", "/api/keys"))[0] == 403
        assert (await admin.ask("DELETE", "/api/session"))[0] == 200
        assert (await admin.ask("GET", "/api/keys"))[0] == 401


async def test_a_link_signs_in_once_and_not_late(start: Start) -> None:
    async with start() as proxy:
        now_ms = int(proxy.gateway.clock() * 1000)
        token, late = proxy.gateway.sessions.offer(now_ms), proxy.gateway.sessions.offer(now_ms - 3_600_000)
        admin, told, _ = await sign_in(proxy, {"token": token})
        assert told["role"] == "admin" and await admin.get("/api/keys")
        for used in (token, late, ""):
            assert (await Admin(proxy).ask("POST", "/api/session", {"token": used}))[0] == 401


async def test_a_viewers_session_reads_and_ends_with_its_key(start: Start) -> None:
    async with start() as proxy:
        key = (await Admin(proxy).ask("POST", "/api/keys", {"name": "eye", "role": "viewer"}))[1]
        client = (await Admin(proxy).ask("POST", "/api/keys", {"name": "app"}))[1]
        assert (await Admin(proxy).ask("POST", "/api/session", {"key": client["key"]}))[0] == 403
        viewer, told, _ = await sign_in(proxy, {"key": key["key"]})
        assert told["role"] == "viewer" and await viewer.get("/api/requests")
        assert (await viewer.ask("DELETE", "/api/cache"))[0] == 403
        assert (await viewer.ask("POST", CHAT_PATH, CHAT))[0] == 401
        await Admin(proxy).ask("DELETE", f"/api/keys/{key['id']}")
        assert (await viewer.ask("GET", "/api/requests"))[0] == 401


@pytest.mark.parametrize("body", [{"key": "wrong"}, {"token": "wrong"}, {"key": ""}])
async def test_signing_in_with_something_else_is_refused(start: Start, body: dict[str, str]) -> None:
    async with start() as proxy:
        assert (await Admin(proxy).ask("POST", "/api/session", body))[0] == 401
        assert (await Admin(proxy).ask("POST", "/api/session", {}))[0] == 400


async def test_sessions_are_bounded_and_expire(start: Start) -> None:
    async with start() as proxy:
        sessions = proxy.gateway.sessions
        secrets = [sessions.begin("admin", "", 0)[0] for _ in range(101)]
        alive = [sessions.find(f"a=b; stockyard_session={secret}; c=d", 1) is not None for secret in secrets]
        assert alive == [False] + [True] * 100
        for now_ms, lives in ((12 * 3_600_000 - 1, True), (12 * 3_600_000, False), (13 * 3_600_000, False)):
            assert (sessions.find(f"stockyard_session={secrets[-1]}", now_ms) is not None) == lives


@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/moderations"])
async def test_the_playground_calls_with_the_session_and_its_header_token(start: Start, path: str) -> None:
    async with start(require_key="always") as proxy:
        admin, _, _ = await sign_in(proxy, {"key": proxy.gateway.admin_key})
        plain = Admin(proxy, cookie=admin.headers["cookie"])
        assert (await plain.ask("POST", path, CHAT))[0] == 401
        assert (await admin.ask("POST", path, CHAT))[0] == 200
        assert (await plain.get("/v1/models"))["data"]
        assert "stockyard_session" not in str(proxy.upstream.seen)


async def test_the_live_log_shows_a_call_as_it_ends(start: Start) -> None:
    async with start() as proxy:
        await proxy.post(CHAT_PATH, CHAT)
        async with proxy.session.get(proxy.url + "/api/events", headers=Admin(proxy).headers) as events:
            assert events.content_type == "text/event-stream"
            assert await events.content.readuntil(b"\n\n") == b": watching\n\n"
            await proxy.post(CHAT_PATH, {**CHAT, "stream": True})
            kind, data, _ = (await events.content.readuntil(b"\n\n")).split(b"\n", 2)
            [_, row] = await proxy.rows()
            assert (kind, json.loads(data[6:])) == (b"event: request", row)
        assert await Admin(proxy).get("/api/requests")
        assert proxy.gateway.watchers == []


async def test_a_slow_reader_of_the_live_log_is_told_what_it_missed() -> None:
    watcher = stockyard.Watcher()
    for number in range(1003):
        watcher.put(b"%d " % number)
    assert (await watcher.take()).endswith(b' 999 event: lost\ndata: {"lost":3}\n\n')
    watcher.put(b"next")
    assert await watcher.take() == b"next"


async def test_the_live_log_ends_with_its_session_and_with_the_proxy(start: Start) -> None:
    async with aiohttp.ClientSession() as session, start() as proxy:
        admin, _, _ = await sign_in(proxy, {"key": proxy.gateway.admin_key})
        proxy.gateway.watchers += [stockyard.Watcher()] * 31
        async with proxy.session.get(proxy.url + "/api/events", headers=admin.headers) as events:
            await events.content.readuntil(b"\n\n")
            assert (await admin.ask("GET", "/api/events"))[0] == 429
            await admin.ask("DELETE", "/api/session")
            await proxy.post(CHAT_PATH, CHAT)
            assert await events.content.read() == b""
        proxy.gateway.watchers.clear()
        staying = await session.get(proxy.url + "/api/events", headers=Admin(proxy).headers)
        staying_ends = asyncio.create_task(staying.content.read())
    assert await staying_ends in (b": watching\n\n", b": watching\n\n: waiting\n\n")


async def test_charts_count_by_bucket_and_name_with_quantiles_and_savings(start: Start) -> None:
    async with start() as proxy:
        for _ in range(2):
            await proxy.post(CHAT_PATH, {**CHAT, "temperature": 0})
        await proxy.post(CHAT_PATH, {**CHAT, "stream": True})
        await proxy.post(CHAT_PATH, {**CHAT, "model": "gpt-unknown-9"})
        await proxy.post(CHAT_PATH, {"model": "gpt-4o-mini"})
        admin, rows = Admin(proxy), await proxy.rows()
        chart = await admin.get("/api/timeseries?by=model")
        named = {point["name"]: point for point in chart["data"]}
        mini = named["gpt-4o-mini"]
        assert (chart["bucket"], chart["by"], mini["ts"][13:]) == ("hour", "model", ":00:00Z")
        assert (mini["requests"], mini["errors"], mini["cache_hits"], mini["unpriced"]) == (4, 1, 1, 0)
        assert mini["cost_usd"] == pytest.approx(0.0000042 + 0.0000045)
        assert mini["saved_usd"] == 0.0000042
        good = sorted(row["latency_ms"] for row in rows if row["model"] == "gpt-4o-mini" and row["status"] == 200)
        assert mini["latency_ms"] == pytest.approx({"p50": good[1], "p95": good[2], "p99": good[2]}, rel=0.1)
        first_ms = next(row["first_token_ms"] for row in rows if row["stream"])
        assert mini["first_token_ms"]["p50"] == pytest.approx(first_ms, rel=0.1)
        assert (named["gpt-unknown-9"]["unpriced"], named["gpt-unknown-9"]["cost_usd"]) == (1, None)
        [day] = (await admin.get("/api/timeseries?bucket=day&model=gpt-4o-mini"))["data"]
        assert (day["requests"], day["name"]) == (4, "")
        seen = await admin.get("/api/overview?since=1h")
        assert (seen["total"]["requests"], seen["before"]) == (5, None)
        assert [point["name"] for point in seen["model"]] == ["gpt-4o-mini", "gpt-unknown-9"]
        assert (await admin.get("/api/timeseries?until=2020-01-01"))["data"] == []


@pytest.mark.parametrize("query", ["bucket=year", "by=day", "status=200", "since=9000d", "since=soon", "until=later"])
async def test_charts_refuse_what_they_do_not_know(start: Start, query: str) -> None:
    async with start() as proxy:
        status, told = await Admin(proxy).ask("GET", f"/api/timeseries?{query}")
        assert (status, told["error"]["type"]) == (400, "invalid_request_error")


async def explained(proxy: Proxy) -> dict[str, Any]:
    """The explanation of the newest call, by the API; the command line's function is the same."""
    told: dict[str, Any] = await Admin(proxy).get(f"/api/requests/{(await proxy.rows())[-1]['id']}/explain")
    return told


async def test_an_explanation_tells_route_attempts_and_the_arithmetic_of_the_cost(start: Start) -> None:
    async with start() as proxy:
        proxy.upstream.answers = [plain({"error": {"message": "busy"}}, 503), plain(COMPLETION)]
        await proxy.post(CHAT_PATH, {**CHAT, "temperature": 0})
        told = await explained(proxy)
        proxy.upstream.answers = []
        await proxy.post(CHAT_PATH, {**CHAT, "temperature": 0})
        hit = await explained(proxy)
        await proxy.post(CHAT_PATH, {**CHAT, "model": "grok-4"})
        lost = await explained(proxy)
        await proxy.post(CHAT_PATH, {**CHAT, "model": "gpt-unknown-9"})
        unpriced = await explained(proxy)
    assert told["route"]["targets"] == [{"provider": "openai", "upstream_model": "gpt-4o-mini", "via": "model list"}]
    assert [line["status"] for line in told["attempts"]] == [503, 200]
    assert [(line["unit"], line["count"], line["usd"]) for line in told["cost"]["lines"]] == [
        ("input", 6, "0.15"),
        ("cached", 4, "0.075"),
        ("output", 5, "0.6"),
    ]
    assert sum(line["total_usd"] for line in told["cost"]["lines"]) == pytest.approx(told["cost"]["cost_usd"])
    assert "6 input x $0.15/1000000 + 4 cached x $0.075/1000000 + 5 output x $0.6/1000000 = $0.0000042" in str(
        told["summary"]
    )
    assert (hit["cache"]["result"], hit["cache"]["saved_usd"], hit["cost"]["cost_usd"]) == ("hit", 0.0000042, 0)
    assert hit["cost"]["lines"] == [] and "paid for before" in str(hit["summary"])
    assert (lost["route"]["targets"], lost["attempts"]) == ([], [])
    assert "was not routed" in lost["summary"][0] and lost["summary"][-1].startswith("End: 404 model_not_found")
    assert not unpriced["cost"]["priced"] and "no price is known" in str(unpriced["summary"])


async def test_an_explanation_tells_what_a_budget_held_and_why_it_refused(start: Start) -> None:
    async with start(budget="0.001/day", rate_limit="100rpm,100000tpm") as proxy:
        await proxy.post(CHAT_PATH, {**CHAT, "max_tokens": 20})
        held = await explained(proxy)
        await proxy.post(CHAT_PATH, {**CHAT, "max_tokens": 16000})
        refused = await explained(proxy)
    [hold] = held["budget"]["holds"]
    assert hold["held_usd"] > hold["charged_usd"] == held["cost"]["cost_usd"] > 0
    assert len(hold["budgets"]) == 1
    assert held["limits"]["taken"] == ["this Stockyard"] and held["limits"]["estimated_tokens"] > 0
    assert "was held in" in str(held["summary"])
    assert refused["refusal"]["limit_usd"] == "0.001" and float(refused["refusal"]["needed_usd"]) > 0.001
    assert refused["attempts"] == [] and "Refusal: " in str(refused["summary"])


async def test_reasoning_is_a_line_of_its_own_where_it_costs_otherwise() -> None:
    book = stockyard.PriceBook.load(stockyard.read_asset("prices.json")).with_overrides(
        [{"model": "m", "input": "1", "output": "2", "reasoning": "3", "requests": "5"}]
    )
    price = book.find("openai", "m", 0)
    usage = stockyard.Usage(input_tokens=1000, output_tokens=100, reasoning_tokens=40)
    assert price is not None
    lines = {line["unit"]: (line["count"], line["per"]) for line in price.lines(usage)}
    assert lines == {"input": (1000, 10**6), "output": (60, 10**6), "reasoning": (40, 10**6), "requests": (1, 1000)}
    assert sum(line["total_usd"] for line in price.lines(usage)) * 1e9 == pytest.approx(price.cost(usage))


async def test_a_logged_call_shows_times_and_feedback(start: Start) -> None:
    async with start() as proxy:
        admin = Admin(proxy)
        await proxy.post(CHAT_PATH, {**CHAT, "stream": True})
        [row] = await proxy.rows()
        path = f"/api/requests/{row['id']}"
        assert (await admin.ask("POST", path + "/feedback", {"score": 1, "label": "good", "comment": "ä"}))[0] == 201
        for wrong in ({}, {"score": "5"}, {"score": True}, {"label": 5}, {"label": "x" * 101}, {"more": 1}):
            assert (await admin.ask("POST", path + "/feedback", wrong))[0] == 400
        assert (await admin.ask("POST", "/api/requests/req_none/feedback", {"score": 1}))[0] == 404
        found = await admin.get(path)
    assert [(note["score"], note["label"], note["comment"]) for note in found["feedback"]] == [(1.0, "good", "ä")]
    assert [span["name"] for span in found["spans"]] == ["call", "admit, read, route", "attempt 1: openai", "stream"]
    assert all(0 <= span["start_ms"] <= span["end_ms"] <= row["latency_ms"] + 0.01 for span in found["spans"])
    assert found["attempt_log"][0]["status"] == 200


async def test_a_replay_is_a_call_of_its_own_and_shows_the_difference(start: Start) -> None:
    async with start() as proxy:
        admin = Admin(proxy)
        await proxy.post(CHAT_PATH, {**CHAT, "temperature": 0, "stream": True})
        [row] = await proxy.rows()
        path = f"/api/requests/{row['id']}/replay"
        status, told = await admin.ask("POST", path)
        assert (status, told["same"], told["original"]["text"]) == (200, False, 'Hello "there" \u00e9\u4e2d')
        assert (told["replay"]["status"], told["replay"]["text"]) == (200, "Hello there")
        assert told["diff"][0]["op"] == "equal"
        assert "".join(step["after"] for step in told["diff"]) == "Hello there"
        assert "".join(step["before"] for step in told["diff"]) == told["original"]["text"]
        assert told["cost_usd"] == pytest.approx(0.0000042 - 0.0000045)
        assert "stream" not in proxy.upstream.seen[-1].json
        status, other = await admin.ask("POST", path, {"model": "echo"})
        assert (other["replay"]["provider"], other["replay"]["text"]) == ("echo", "Echo: Hi")
        lost = (await admin.ask("POST", path, {"model": "grok-4"}))[1]["replay"]
        assert (lost["status"], lost["error"]) == (404, "model_not_found")
        rows = await proxy.rows()
        again = await admin.get(f"/api/requests/{told['replay']['id']}")
    assert again["notes"]["replay_of"] == row["id"] and again["cache"] == "bypass"
    assert [r["id"] for r in rows] == [row["id"], told["replay"]["id"], other["replay"]["id"], lost["id"]]


async def test_what_was_translated_is_replayed_in_the_dialect_it_was_sent_in(start: Start) -> None:
    async with start(require_key="always") as proxy:
        admin = Admin(proxy)
        asked = {"model": "gpt-4o-mini", "max_tokens": 20, "messages": [{"role": "user", "content": "Hi"}]}
        await proxy.post("/v1/messages", asked, **admin.headers)
        [row] = await proxy.rows()
        status, told = await admin.ask("POST", f"/api/requests/{row['id']}/replay")
        assert (status, told["same"], told["replay"]["text"]) == (200, True, "Hello there")
        assert [step["op"] for step in told["diff"]] == ["equal"]
        body = {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}
        await proxy.post("/v1beta/models/echo:streamGenerateContent", body, **admin.headers)
        gemini = (await proxy.rows())[-1]
        told = (await admin.ask("POST", f"/api/requests/{gemini['id']}/replay", {"model": "gpt-4o-mini"}))[1]
        assert (told["replay"]["text"], told["original"]["text"]) == ("Hello there", "Echo: Hi")


async def test_a_replay_is_refused_where_the_log_does_not_hold_the_request(start: Start) -> None:
    async with start(log_bodies="none", budget="1/day") as proxy:
        admin = Admin(proxy)
        await proxy.post(CHAT_PATH, CHAT)
        [row] = await proxy.rows()
        status, told = await admin.ask("POST", f"/api/requests/{row['id']}/replay")
        assert (status, told["error"]["code"]) == (400, "not_replayable")
        assert "STOCKYARD_LOG_BODIES" in told["error"]["message"]
        found = {**(await admin.get(f"/api/requests/{row['id']}")), "request": CHAT}
        for change in ({"redactions": 1}, {"request": "cut off"}, {"endpoint": "/proxy"}):
            with pytest.raises(stockyard.InvalidRequest, match="cannot be replayed"):
                stockyard.replay_call(proxy.gateway, {**found, **change}, "", "", "")
        assert (await admin.ask("POST", f"/api/requests/{row['id']}/replay", {"model": 5}))[0] == 400
        assert len(await proxy.rows()) == 1


async def test_a_replay_is_admitted_by_budgets(start: Start) -> None:
    async with start() as proxy:
        await proxy.post(CHAT_PATH, {**CHAT, "max_tokens": 1000})
        [row] = await proxy.rows()
        budget = {"budgets": [{"scope": "global", "usd": 0.0001, "period": "day"}]}
        assert (await Admin(proxy).ask("PUT", "/api/budgets", budget))[0] == 200
        told = (await Admin(proxy).ask("POST", f"/api/requests/{row['id']}/replay"))[1]
    assert (told["replay"]["status"], told["replay"]["error"]) == (429, "insufficient_quota")
    assert len(proxy.upstream.seen) == 1


def test_long_answers_are_compared_by_lines_and_very_long_ones_whole() -> None:
    lines = [f"line {number} of many words\n" for number in range(1000)]
    steps = stockyard.compare_texts("".join(lines), "".join([*lines, "more\n"]))
    assert [(step["op"], step["after"][-5:]) for step in steps] == [("equal", "ords\n"), ("insert", "more\n")]
    assert [step["op"] for step in stockyard.compare_texts("a\n" * 2000, "b\n" * 2000)] == ["replace"]


async def test_sessions_and_tags_group_and_filter(start: Start) -> None:
    async with start() as proxy:
        for number in range(5):
            headers = {"x-stockyard-session": f"s{number % 3}", "x-stockyard-tags": f"team=t{number},app=x"}
            await proxy.post(CHAT_PATH, CHAT, **headers)
        await proxy.post(CHAT_PATH, CHAT)
        admin = Admin(proxy)
        first = await admin.get("/api/sessions?limit=2")
        rest = await admin.get(f"/api/sessions?limit=2&cursor={first['next']}")
        assert [(s["session"], s["requests"]) for s in first["data"] + rest["data"]] == [
            ("s1", 2),
            ("s0", 2),
            ("s2", 1),
        ]
        assert rest["next"] is None and first["data"][0]["models"] == ["gpt-4o-mini"]
        assert first["data"][0]["cost_usd"] == pytest.approx(2 * 0.0000042)
        assert len((await admin.get("/api/requests?session=s1"))["data"]) == 2
        assert len((await admin.get("/api/requests?tag=app%3Dx"))["data"]) == 5
        assert len((await admin.get("/api/requests?tag=team%3Dt1"))["data"]) == 1
        assert [row["session"] for row in (await admin.get("/api/spend?by=session"))["data"]][-1] == "s2"


@pytest.fixture
def reloadable(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a proxy that can read its settings again: flags, environment, and stockyard.toml in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    @asynccontextmanager
    async def run(**environment: str) -> AsyncIterator[Proxy]:
        async with start() as proxy:
            flags = {"port": "0", "data_dir": str(tmp_path)}
            variables = {"OPENAI_API_KEY": "sk-canary-openai", "OPENAI_BASE_URL": proxy.upstream.url, **environment}
            proxy.gateway.reload = stockyard.reloader(proxy.gateway, variables, flags)
            yield proxy

    return run


async def test_settings_reload_all_or_nothing(reloadable: Start, tmp_path: Path) -> None:
    toml = tmp_path / "stockyard.toml"
    async with reloadable() as proxy:
        admin = Admin(proxy)
        toml.write_text('retries = 3\nrate_limit = "1rpm"\n[providers.groq]\napi_key = "gsk-1"\n')
        status, told = await admin.ask("POST", "/api/config/reload")
        assert (status, told["changed"]) == (200, ["rate_limit", "retries", "providers"])
        assert {row["name"]: row["source"] for row in told["data"]}["retries"] == "stockyard.toml"
        tables = {row["name"]: (row["value"], row["source"]) for row in told["data"]}
        assert tables["providers"] == ({"groq": {"api_key": "…"}}, "stockyard.toml")
        assert "groq" in proxy.gateway.router.providers
        assert [(await proxy.post(CHAT_PATH, CHAT))[0] for _ in range(2)] == [200, 429]
        for wrong in (
            "retries = 5\nno_such = 1\n",
            "retries = 5\nlog_mb = 5\n",
            'retries = 5\nbudget = "x"\n',
            "retries = '",
        ):
            toml.write_text(wrong)
            status, told = await admin.ask("POST", "/api/config/reload")
            assert (status, told["error"]["code"]) == (400, "invalid_settings")
            assert (proxy.gateway.settings.retries, "groq" in proxy.gateway.router.providers) == (3, True)
        toml.write_text("retries = 5\n[limits]\nrps = 1\n")
        status, told = await admin.ask("POST", "/api/config/reload")
        assert (status, "stockyard.toml, line 3: " in told["error"]["message"]) == (400, True)


async def test_settings_change_by_the_api_and_stay_in_the_file(reloadable: Start, tmp_path: Path) -> None:
    toml = tmp_path / "stockyard.toml"
    async with reloadable(STOCKYARD_RETRIES="2") as proxy:
        admin = Admin(proxy)
        assert (await admin.ask("POST", "/api/config", {"cache_ttl": 60, "budget": "1/day"}))[1]["changed"] == [
            "cache_ttl",
            "budget",
            "retries",
        ]
        assert (proxy.gateway.settings.cache_ttl, proxy.gateway.settings.retries) == (60, 2)
        assert [row["limit_usd"] for row in (await admin.get("/api/budgets"))["data"]] == ["1"]
        before = toml.read_text()
        assert toml.stat().st_mode & 0o777 == 0o600
        for wrong in ({"cache_ttl": "soon"}, {"port": 1}, {"retries": 1}, {"cache_ttl": [1]}, {"nothing": 1}):
            assert (await admin.ask("POST", "/api/config", wrong))[0] == 400
        assert (await admin.ask("POST", "/api/config?check=true", {"cache_ttl": 5}))[1]["changed"] == ["cache_ttl"]
        assert (toml.read_text(), proxy.gateway.settings.cache_ttl) == (before, 60)
        await admin.ask("POST", "/api/config", {"cache_ttl": None, "budget": None})
        assert (toml.read_text(), (await admin.get("/api/budgets"))["data"]) == ("", [])


async def test_keys_old_secrets_and_sessions_end_in_time(start: Start) -> None:
    async with start(require_key="always") as proxy:
        gateway, began_s = proxy.gateway, int(proxy.gateway.clock()) + 1
        now_s = float(began_s)
        gateway.clock = lambda: now_s
        admin, hour = Admin(proxy), 3600

        async def works(key: Any) -> bool:
            status, *_ = await proxy.post(CHAT_PATH, CHAT, authorization=f"Bearer {key['key']}")
            assert status in (200, 401)
            return bool(status == 200)

        _, key = await admin.ask("POST", "/api/keys", {"name": "k", "expires_at": began_s + hour})
        assert (key["created_at"], await works(key)) == (stockyard.format_moment(began_s * 1000), True)
        _, other = await admin.ask("POST", f"/api/keys/{key['id']}/rotate", {"grace_s": 600})
        now_s += 599.999
        assert (await works(key), await works(other)) == (True, True)
        now_s = began_s + 600
        assert (await works(key), await works(other)) == (False, True)
        now_s = began_s + hour - 0.001
        assert await works(other)
        session, _, _ = await sign_in(proxy, {"key": gateway.admin_key})
        _, viewer = await admin.ask(
            "POST", "/api/keys", {"name": "v", "role": "viewer", "expires_at": began_s + 9 * hour}
        )
        seen, _, _ = await sign_in(proxy, {"key": viewer["key"]})
        now_s = began_s + 9 * hour - 0.001
        assert (await Admin(proxy, authorization=f"Bearer {viewer['key']}").ask("GET", "/api/requests"))[0] == 200
        assert (await works(other), (await seen.ask("GET", "/api/session"))[0]) == (False, 200)
        now_s = began_s + 9 * hour
        assert (await seen.ask("GET", "/api/session"))[0] == 401
        now_s = began_s + 13 * hour - 0.01
        assert (await session.ask("GET", "/api/session"))[0] == 200
        now_s = began_s + 13 * hour
        assert (await session.ask("GET", "/api/session"))[0] == 401


async def test_budgets_that_were_set_are_there_after_a_restart(start: Start) -> None:
    day, week = ({"scope": "global", "usd": 1, "period": period} for period in ("day", "week"))
    async with start() as proxy:
        for budgets in ([day, week], [week]):
            _, told = await Admin(proxy).ask("PUT", "/api/budgets", {"budgets": budgets})
            assert sorted(row["period"] for row in told["data"]) == [budget["period"] for budget in budgets]
    async with start() as proxy:
        assert [row["id"] for row in (await Admin(proxy).get("/api/budgets"))["data"]] == ["global:week"]


async def test_a_keys_budget_goes_when_it_is_cleared(start: Start) -> None:
    async with start() as proxy:
        admin = Admin(proxy)
        _, key = await admin.ask("POST", "/api/keys", {"name": "k", "budget": {"usd": 1, "period": "day"}})
        for budget, periods in (({"usd": 1, "period": "week"}, ["week"]), (None, [])):
            assert (await admin.ask("PATCH", f"/api/keys/{key['id']}", {"budget": budget}))[0] == 200
            assert [row["period"] for row in (await admin.get("/api/budgets"))["data"]] == periods


async def test_a_budget_taken_away_and_put_back_reopens_nothing(start: Start) -> None:
    async with start() as proxy:
        admin, budget = Admin(proxy), {"scope": "global", "usd": 1, "period": "day"}
        await admin.ask("PUT", "/api/budgets", {"budgets": [budget]})
        await proxy.post(CHAT_PATH, {**CHAT, "max_tokens": 10})
        await admin.ask("PUT", "/api/budgets", {"budgets": []})
        [row] = (await admin.ask("PUT", "/api/budgets", {"budgets": [budget]}))[1]["data"]
    assert row["settled_usd"] == "0.0000042"


@pytest.mark.parametrize("period", ["day", "total"])
async def test_a_budget_put_back_after_restarts_reopens_nothing(start: Start, period: str) -> None:
    body = {"budgets": [{"scope": "global", "usd": 1, "period": period}]}
    async with start() as proxy:
        await Admin(proxy).ask("PUT", "/api/budgets", body)
        await proxy.post(CHAT_PATH, {**CHAT, "max_tokens": 10})
        await Admin(proxy).ask("PUT", "/api/budgets", {"budgets": []})
    for _ in range(2):
        async with start() as proxy:
            assert proxy.gateway.ledger.budgets == []
    async with start() as proxy:
        [row] = (await Admin(proxy).ask("PUT", "/api/budgets", body))[1]["data"]
    assert row["settled_usd"] == "0.0000042"


async def test_a_hangup_signal_reloads_and_tells(
    reloadable: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with reloadable() as proxy:
        for text in ("retries = 4", "retries = x"):
            (tmp_path / "stockyard.toml").write_text(text)
            stockyard.reload_on_signal(proxy.gateway)
    told = capsys.readouterr().err.splitlines()[-2:]
    assert "changed: retries" in told[0] and "settings not changed" in told[1]


def test_editing_stockyard_toml_keeps_what_else_is_written() -> None:
    text = '# mine\ncache_ttl = 5 # short\n\n[[prices]]\nmodel = "m"\nretries = 1\n'
    edited = stockyard.edit_toml(text, {"cache_ttl": 7, "retries": 2})
    assert edited == 'retries = 2\ncache_ttl = 7\n# mine\n\n[[prices]]\nmodel = "m"\nretries = 1\n'
    assert stockyard.edit_toml("", {"budget": "1/day", "retries": None}) == 'budget = "1/day"\n'


async def test_the_configuration_masks_secrets(start: Start) -> None:
    async with start(admin_key="a-secret-of-the-operator") as proxy:
        rows = {row["name"]: row for row in (await Admin(proxy).get("/api/config"))["data"]}
        assert rows["admin_key"]["value"] == "a-s…or"
        assert (rows["retries"]["live"], rows["port"]["live"], rows["port"]["source"]) == (True, False, "flag --port")
        assert (await Admin(proxy).ask("POST", "/api/config/reload"))[0] == 400


def test_the_description_holds_every_route_and_every_reference_in_it_leads_somewhere() -> None:
    operations = [operation for path in DOCUMENT["paths"].values() for operation in path.values()]
    for row in stockyard.ROUTES:
        for shown in stockyard.plain_paths(row.path):
            shape = re.sub(r"\{\w+\}", "{}", shown)
            [path] = [path for path in DOCUMENT["paths"] if re.sub(r"\{\w+\}", "{}", path) == shape]
            assert {method.lower() for method in row.methods.split()} <= DOCUMENT["paths"][path].keys()
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for path, methods in DOCUMENT["paths"].items():
        for operation in methods.values():
            named = {item["name"] for item in operation["parameters"] if item["in"] == "path"}
            assert named == set(re.findall(r"\{(\w+)\}", path)) and operation["summary"]
            assert all(
                name in DOCUMENT["components"]["securitySchemes"] for way in operation["security"] for name in way
            )
    described = {f"{method.upper()} {path}" for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert {*stockyard.BODIES, *stockyard.SUCCESSES} <= described
    assert {name if " " in name else f"GET {name}" for name in stockyard.QUERIES} <= described
    assert DOCUMENT["paths"].keys() >= stockyard.ANSWER_KINDS.keys()
    for kind, name in re.findall(r'"\$ref": "#/components/(\w+)/(\w+)"', json.dumps(DOCUMENT)):
        assert name in DOCUMENT["components"][kind]


async def test_the_description_is_served_to_anyone(start: Start) -> None:
    async with start(require_key="always") as proxy, proxy.session.get(proxy.url + "/openapi.json") as answer:
        assert (answer.status, await answer.json()) == (200, DOCUMENT)


async def test_an_explanation_of_a_route_tells_every_target_and_who_answered(reloadable: Start, tmp_path: Path) -> None:
    async with reloadable() as proxy:
        toml = '[routes.fast]\ntargets = ["openai/gpt-4o-mini"]\nretries = 0\nfallbacks = ["echo/echo"]\n'
        (tmp_path / "stockyard.toml").write_text(toml)
        assert (await Admin(proxy).ask("POST", "/api/config/reload"))[1]["changed"] == ["routes"]
        proxy.upstream.answers = [plain({"error": {"message": "down"}}, 500)]
        assert (await proxy.post(CHAT_PATH, {**CHAT, "model": "fast"}))[0] == 200
        told = await explained(proxy)
        [openai] = [row for row in (await Admin(proxy).get("/api/providers"))["data"] if row["id"] == "openai"]
        assert (openai["keys"], openai["keys_resting"]) == (["sk-…ai"], 0)
        assert [(t["model"], t["breaker"]) for t in openai["targets"]] == [("gpt-4o-mini", "closed")]
        assert {row["id"]: row["set"] for row in (await Admin(proxy).get("/api/providers"))["others"]}[
            "groq"
        ] == "GROQ_API_KEY"
    assert told["summary"][0] == "Route: `fast` goes to openai as gpt-4o-mini (by route), else echo as echo (by route)."
    assert [(line["provider"], line["status"]) for line in told["attempts"]] == [("openai", 500), ("echo", 200)]


async def test_the_first_screen_holds_a_link_that_signs_in(start: Start) -> None:
    async with start() as proxy:
        link = stockyard.dashboard_line(proxy.gateway, proxy.url).split()[-1]
        assert link.startswith(proxy.url + "/ui?token=")
        await sign_in(proxy, {"token": link.partition("=")[2]})


async def test_a_stored_response_is_its_keys_own(start: Start) -> None:
    async with start(require_key="always") as proxy:
        mine, other = [(await Admin(proxy).ask("POST", "/api/keys", {"name": name}))[1]["key"] for name in "ab"]
        owner = Admin(proxy, authorization=f"Bearer {mine}")
        status, made = await owner.ask("POST", "/v1/responses", {"model": "echo", "input": "Hi"})
        path = f"/v1/responses/{made['id']}"
        assert status == 200
        assert (await Admin(proxy, accept="*/*").ask("GET", path))[0] == 401
        assert (await Admin(proxy, authorization=f"Bearer {other}").ask("DELETE", path))[0] == 404
        assert (await owner.get(path))["id"] == made["id"]
        assert (await owner.ask("DELETE", path))[0] == 200


async def test_a_reload_takes_own_prices_and_timeouts(reloadable: Start, tmp_path: Path) -> None:
    row = '[[prices]]\nprovider = "openai"\nmodel = "gpt-4o-mini"\ninput = "1"\noutput = "1"\n'
    async with reloadable() as proxy:
        (tmp_path / "stockyard.toml").write_text(row)
        assert (await Admin(proxy).ask("POST", "/api/config/reload"))[1]["changed"] == ["prices"]
        assert (await proxy.post(CHAT_PATH, CHAT))[1]["x-stockyard-cost-usd"] == "0.000015"
        (tmp_path / "stockyard.toml").write_text("first_byte_timeout = 0.05")
        assert (await Admin(proxy).ask("POST", "/api/config/reload"))[0] == 200
        assert (await proxy.post(CHAT_PATH, CHAT))[1]["x-stockyard-cost-usd"] == "0.0000042"
        proxy.upstream.answers = [Answer(hang_s=5)]
        assert (await proxy.post(CHAT_PATH, CHAT))[0] == 504
