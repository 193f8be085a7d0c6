"""What /metrics counts, as Prometheus' own parser reads it, and who may read it."""

from __future__ import annotations

from typing import Any

import aiohttp
from conftest import Proxy, Start
from prometheus_client.parser import text_string_to_metric_families

import stockyard

CHAT: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi canary-text"}]}
PATH = "/v1/chat/completions"
ROW: dict[str, Any] = {
    "provider": "p", "upstream_model": "m", "key_id": "k", "status": 200, "cache": "bypass", "error": "", "input_tokens": 3,
    "output_tokens": 5, "cached_tokens": 0, "cache_write_tokens": 0, "reasoning_tokens": None, "cost_nanousd": 1500,
    "saved_nanousd": 0, "latency_ms": 20.0, "first_token_ms": None, "overhead_ms": 0.4,
}  # fmt: skip


def row(**changed: Any) -> list[Any]:
    return [*({**ROW, **changed}).values()]


def parse(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Samples by name and labels; each stands in the text once."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}
    assert len(found) == len(samples)
    return found


def of(found: dict[Any, float], name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    return sum(
        value
        for (known, pairs), value in found.items()
        if known == f"stockyard_{name}" and labels.items() <= set(pairs)
    )


async def read(proxy: Proxy, key: str) -> tuple[int, str, str]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession() as session, session.get(proxy.url + "/metrics", headers=headers) as answer:
        return answer.status, answer.headers["content-type"], await answer.text()


async def test_calls_of_every_end_are_counted(start: Start) -> None:
    async with start() as proxy:
        for _ in range(2):
            assert (await proxy.post(PATH, {**CHAT, "temperature": 0}))[0] == 200
        await proxy.post(PATH, {**CHAT, "stream": True})
        assert (await proxy.post(PATH, {"model": "gpt-4o-mini"}))[0] == 400
        rows = await proxy.rows()
        status, kind, text = await read(proxy, proxy.gateway.admin_key)
        assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
        found = parse(text)
        assert of(found, "requests_total") == len(rows) == 4
        assert of(found, "requests_total", status="200", provider="openai", model="gpt-4o-mini", key="") == 3
        assert of(found, "cache_requests_total", result="hit") == 1
        assert of(found, "errors_total", error=rows[-1]["error"]) == 1
        for bucket in ("input", "output", "cached"):
            assert of(found, "tokens_total", bucket=bucket) == sum(row[f"{bucket}_tokens"] or 0 for row in rows)
        assert round(of(found, "cost_usd_total") * 1e9) == round(sum(row["cost_usd"] or 0 for row in rows) * 1e9) > 0
        assert of(found, "saved_usd_total") > 0
        assert of(found, "latency_seconds_count") == of(found, "latency_seconds_bucket", le="+Inf") == 4
        assert of(found, "build_info", version=stockyard.__version__) == 1
        for name in ("in_flight", "held_usd", "bound_violations_total", "lost_rows_total", "log_failing", "draining"):
            assert (f"stockyard_{name}", ()) in found and of(found, name) == 0, name
        for secret in ("canary", proxy.gateway.admin_key):
            assert secret not in text


async def test_metrics_are_for_operators(start: Start) -> None:
    async with start() as proxy:
        admin = {"authorization": f"Bearer {proxy.gateway.admin_key}"}
        _, _, viewer = await proxy.post("/api/keys", {"name": "scrape", "role": "viewer"}, **admin)
        _, _, client = await proxy.post("/api/keys", {"name": "app"}, **admin)
        assert [(await read(proxy, key))[0] for key in ("", client["key"], viewer["key"])] == [401, 403, 200]
        assert viewer["key"] not in (await read(proxy, viewer["key"]))[2]


async def test_breakers_of_routes_are_told(start: Start) -> None:
    toml = '[routes.chat]\ntargets = ["openai/gpt-4o-mini"]\n'
    async with start(toml=toml) as proxy:
        [health] = proxy.gateway.router.health.values()
        for _ in range(stockyard.Health.BREAK_AFTER):
            health.end(health.begin(proxy.gateway.tick()), False, 0.1, proxy.gateway.tick())
        found = parse((await read(proxy, proxy.gateway.admin_key))[2])
        assert of(found, "breaker_open", provider="openai", model="gpt-4o-mini") == 1


def test_histograms_are_cumulative_and_bounds_belong_to_their_bucket() -> None:
    metrics = stockyard.Metrics([*ROW])
    metrics.add(row(latency_ms=value) for value in (1.0, 1.1, 1e9))
    found = parse(metrics.text())
    assert [of(found, "latency_seconds_bucket", le=le) for le in ("0.001", "0.0025", "300.0", "+Inf")] == [1, 2, 2, 3]
    assert of(found, "latency_seconds_sum") == 1000000.0021
    assert of(found, "first_token_seconds_count") == 0


def test_labels_are_bounded_and_nothing_goes_uncounted() -> None:
    metrics, calls = stockyard.Metrics([*ROW]), stockyard.SERIES_MAX + 50
    metrics.add(row(upstream_model=f"m{n}", error=f"e{n}") for n in range(calls))
    metrics.add([row(upstream_model="m0")])
    found = parse(metrics.text())
    assert of(found, "requests_total") == calls + 1 and of(found, "requests_total", model="m0") == 2
    assert of(found, "requests_total", model="other", provider="other", key="other") == 50
    assert of(found, "errors_total", error="other") == calls - stockyard.SERIES_MAX // 10


def test_odd_label_values_are_escaped() -> None:
    metrics = stockyard.Metrics([*ROW])
    name = 'a"b\\n\nstockyard_forged 1\n'
    metrics.add([row(upstream_model=name), row(upstream_model="\ud800")])
    found = parse(metrics.text())
    assert of(found, "requests_total", model=name) == 1 and of(found, "requests_total", model="?") == 1
    assert of(found, "forged") == 0


def test_a_row_that_cannot_be_counted_takes_no_other_with_it() -> None:
    metrics = stockyard.Metrics([*ROW])
    metrics.add([row(cost_nanousd=object()), row()])
    assert metrics.uncounted == 1
    assert of(parse(metrics.text()), "cost_usd_total") == 1500 / 1e9
