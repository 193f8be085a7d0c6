"""From names to targets: routes, their strategies and conditions, breakers, resting keys, retry budgets."""

from __future__ import annotations

import collections
import random
from typing import Any

import pytest

import stockyard
from stockyard import Asked, Deadlines, Health, RetryBudget, Router, SettingsError, UpstreamError, UpstreamRefused

PRICES = stockyard.PriceBook.load(stockyard.read_asset("prices.json"))
DEADLINES = Deadlines(5, 120, 60, 900)
KEYS = {"OPENAI_API_KEY": "sk-1", "GROQ_API_KEY": "gsk-1,gsk-2,gsk-3", "ANTHROPIC_API_KEY": "ak"}
NOW_S = 1_790_000_000.0


def router(toml: str, before: Router | None = None, **variables: str) -> Router:
    settings = stockyard.read_settings({}, {}, toml)
    return Router.load(
        stockyard.configured_providers({**KEYS, **variables}), PRICES, settings.tables, DEADLINES, before
    )


def names(found: Router, asked: Asked | None = None, seed: int = 1) -> list[str]:
    targets = found.order(found.routes["r"], asked or Asked(), random.Random(seed), NOW_S)
    return [f"{target.provider.id}/{target.model}" for target in targets]


def test_an_ordered_route_goes_to_its_targets_and_then_to_its_fallbacks() -> None:
    found = router('[routes.r]\ntargets = ["openai/gpt-4o", "groq/llama"]\nfallbacks = ["anthropic/claude-haiku-4-5"]')
    assert names(found) == ["openai/gpt-4o", "groq/llama", "anthropic/claude-haiku-4-5"]
    assert [target.provider.id for target in found.targets("r")] == ["openai", "groq", "anthropic"]


def test_weights_share_calls_out_and_sessions_stick() -> None:
    found = router(
        '[routes.r]\nstrategy = "weighted"\ntargets = [{to = "openai/a", weight = 3}, {to = "groq/b", weight = 1}]'
    )
    source = random.Random(7)
    first = collections.Counter(
        found.order(found.routes["r"], Asked(), source, NOW_S)[0].provider.id for _ in range(4000)
    )
    assert 0.72 < first["openai"] / 4000 < 0.78
    by_session = [names(found, Asked(session=f"s{number}"), seed=number)[0] for number in range(2000)]
    assert by_session == [names(found, Asked(session=f"s{number}"), seed=99)[0] for number in range(2000)]
    assert 0.7 < by_session.count("openai/a") / 2000 < 0.8


def test_a_route_that_is_not_sticky_draws_for_each_call() -> None:
    found = router('[routes.r]\nstrategy = "weighted"\nsticky = false\ntargets = ["openai/a", "groq/b"]')
    assert len({names(found, Asked(session="s"), seed=number)[0] for number in range(20)}) == 2


def test_conditions_on_prompt_size_and_tags_choose() -> None:
    found = router("""
        [routes.r]
        targets = [{to = "groq/small", max_prompt_tokens = 1000}, {to = "openai/large", tags = {team = "x"}}]
        fallbacks = [{to = "anthropic/huge", min_prompt_tokens = 1000}]
    """)
    assert names(found) == ["groq/small"]
    assert names(found, Asked(5000)) == ["anthropic/huge"]
    assert names(found, Asked(5000, {"team": "x"})) == ["openai/large", "anthropic/huge"]
    with pytest.raises(stockyard.UnknownModel, match="groq/small: prompt of about 1000000 tokens"):
        names(router('[routes.r]\ntargets = [{to = "groq/small", max_prompt_tokens = 1000}]'), Asked(1_000_000))


def test_the_cheapest_goes_first_and_what_has_no_price_last() -> None:
    found = router(
        '[routes.r]\nstrategy = "cheapest"\ntargets = ["openai/no-such", "openai/gpt-4o", "openai/gpt-4o-mini"]'
    )
    assert names(found) == ["openai/gpt-4o-mini", "openai/gpt-4o", "openai/no-such"]


def test_latency_and_load_order_targets() -> None:
    found = router('[routes.r]\nstrategy = "least_latency"\ntargets = ["openai/a", "groq/b"]')
    slow, fast = (target.health for target in found.targets("r"))
    assert slow is not None
    assert fast is not None
    for health, latency_s in ((slow, 2.0), (fast, 0.5)):
        health.end(health.begin(0), True, latency_s, 0)
    assert names(found) == ["groq/b", "openai/a"]
    for _ in range(4):  # five times half a second is more than two seconds
        fast.begin(0)
    assert names(found) == ["openai/a", "groq/b"]
    loaded = router('[routes.r]\nstrategy = "fewest_in_flight"\ntargets = ["openai/a", {to = "groq/b", weight = 4}]')
    first, second = (target.health for target in loaded.targets("r"))
    assert first is not None
    assert second is not None
    first.begin(0)
    for _ in range(3):
        second.begin(0)
    assert names(loaded) == ["groq/b", "openai/a"]


def test_latency_rises_at_once_and_falls_slowly() -> None:
    health = Health()
    for latency_s, at_s in ((0.1, 0.0), (3.0, 1.0)):
        health.end(health.begin(at_s), True, latency_s, at_s)
    assert health.latency_s == 3.0
    health.end(health.begin(2), True, 0.1, 2)
    assert 2.0 < health.latency_s < 3.0
    health.end(health.begin(60), True, 0.1, 60)
    assert health.latency_s < 0.2


def fail(health: Health, now_s: float, times: int = 1) -> None:
    for _ in range(times):
        health.end(health.begin(now_s), False, 0, now_s)


def test_a_breaker_opens_lets_one_probe_through_and_closes() -> None:
    health = Health()
    fail(health, 0, Health.BREAK_AFTER - 1)
    assert health.admits(0)
    fail(health, 0)
    assert (health.state(1), health.admits(1)) == ("open", False)
    after_s = Health.OPEN_S
    assert (health.state(after_s), health.admits(after_s)) == ("half_open", True)
    probe = health.begin(after_s)
    assert probe
    assert not health.admits(after_s)
    health.end(probe, None, 0, after_s)  # a 429 or a hang-up says nothing, and gives the probe back
    assert health.admits(after_s)
    fail(health, after_s)
    assert not health.admits(after_s + Health.OPEN_S)  # twice as long after a probe that failed
    later_s = after_s + 2 * Health.OPEN_S
    health.end(health.begin(later_s), True, 0.1, later_s)
    assert (health.state(later_s), health.in_flight) == ("closed", 0)


def test_a_breaker_opens_when_half_of_the_calls_fail_and_not_for_a_few() -> None:
    few, half = Health(), Health()
    for _ in range(100):
        few.end(few.begin(0), True, 0.1, 0)
        half.end(half.begin(0), True, 0.1, 0)
    fail(few, 0, 3)
    assert few.admits(0)
    for _ in range(150):
        fail(half, 0, 2)
        half.end(half.begin(0), True, 0.1, 0)
        if not half.admits(0):
            break
    assert not half.admits(0)


def test_a_retry_budget_is_a_share_of_the_calls_and_a_trickle() -> None:
    budget = RetryBudget(3)
    assert [budget.take(0) for _ in range(4)] == [True, True, True, False]
    budget.calls += 10
    assert [budget.take(0) for _ in range(3)] == [True, True, False]
    assert budget.take(1.0)
    assert not budget.take(1.0)


def wait_s(found: Router, error: UpstreamError, tries: int = 1, most: int = 1) -> float | None:
    return found.retry_wait_s(found.targets("r")[0], error, tries, most, 0.0, 0.5)


def failure(status: int, code: str | None = None, **more: Any) -> UpstreamError:
    return stockyard.upstream_failure(status, "…", code=code, **more)


@pytest.mark.parametrize(
    ("error", "again", "elsewhere", "breaks"),
    [
        (failure(400), False, False, False),
        (failure(404), False, False, False),
        (failure(422), False, False, False),
        (failure(400, "context_length_exceeded"), False, False, False),
        (failure(401), False, True, False),
        (failure(402), False, True, False),
        (failure(429, "insufficient_quota"), False, True, False),
        (failure(429, "slow_down"), True, True, False),
        (failure(429, "RESOURCE_EXHAUSTED"), True, True, False),
        (failure(498), True, True, False),
        (failure(408), True, True, True),
        (failure(409), True, True, True),
        (failure(500), True, True, True),
        (failure(503, "server_is_overloaded"), True, True, True),
        (failure(529, "overloaded_error"), True, True, True),
        (stockyard.UpstreamTimeout("…"), True, True, True),
        (UpstreamError("…", code="upstream_unreachable"), True, True, True),
        (UpstreamError("…", code="upstream_redirect"), False, True, True),
        (UpstreamRefused("…", status=413), False, False, False),
    ],
)
def test_what_a_failure_means(error: UpstreamError, again: bool, elsewhere: bool, breaks: bool) -> None:
    reaction = stockyard.reaction_to(error)
    assert (reaction.again, reaction.elsewhere, reaction.breaks) == (again, elsewhere, breaks)
    assert (wait_s(router('[routes.r]\ntargets = ["openai/a"]'), error) is not None) == again


def test_waits_grow_honour_the_provider_and_end() -> None:
    found = router('[routes.r]\ntargets = ["openai/a"]')
    assert wait_s(found, failure(500)) == pytest.approx(0.2)
    assert wait_s(found, failure(500), 3, 5) == pytest.approx(0.8)
    assert wait_s(found, failure(429, retry_after_s=3.0)) == 3.0
    assert wait_s(found, failure(429, retry_after_s=60.0)) is None
    assert wait_s(found, failure(500), 2, 1) is None
    found.retries = RetryBudget(0)
    assert wait_s(found, failure(500)) is None


def test_keys_rest_one_by_one_and_come_back() -> None:
    found = router('[routes.r]\ntargets = ["groq/llama"]')
    [target] = found.targets("r")
    assert sorted(found.next_key(target.provider, 0) for _ in range(3)) == ["gsk-1", "gsk-2", "gsk-3"]
    found.note_failure(target, "gsk-1", failure(429, retry_after_s=30.0), 0)
    found.note_failure(target, "gsk-2", failure(401), 0)
    assert {found.next_key(target.provider, 1) for _ in range(6)} == {"gsk-3"}
    assert wait_s(found, failure(401)) == 0.0  # another key is tried at once
    assert found.rests(target, 1) == 0
    found.note_failure(target, "gsk-3", failure(429, "insufficient_quota"), 0)
    assert found.rests(target, 1) == 29.0
    assert {found.next_key(target.provider, 31) for _ in range(6)} == {"gsk-1"}
    assert wait_s(found, failure(401), most=0) is None
    assert found.rests(target, 31) == 0


def test_a_reload_keeps_what_was_known_of_targets() -> None:
    toml = '[routes.r]\ntargets = ["openai/a", "groq/b"]'
    before = router(toml)
    health = before.targets("r")[0].health
    assert health is not None
    fail(health, 0, Health.BREAK_AFTER)
    after = router(toml + '\nstrategy = "weighted"', before)
    assert after.rests(after.targets("r")[0], 1) > 0
    assert after.rests(after.targets("r")[1], 1) == 0


def test_an_alias_stands_for_a_model_or_a_route() -> None:
    found = router("""
        aliases = {fast = "groq/llama", bare = "gpt-4o-mini", same = "r"}
        [routes.r]
        targets = ["openai/a"]
    """)
    told = {name: [(t.provider.id, t.model, t.via) for t in found.targets(name)] for name in ("fast", "bare", "same")}
    assert told == {
        "fast": [("groq", "llama", "alias")], "bare": [("openai", "gpt-4o-mini", "alias")], "same": [("openai", "a", "route")],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("[routes.r]", r"\[routes.r\]: say where calls go"),
        ('[routes.r]\ntarget = ["openai/a"]', "'target' is not known"),
        ('[routes.r]\ntargets = ["openai"]', r"targets\[0\]: 'openai' must be provider/model"),
        ('[routes.r]\ntargets = ["mistral/a"]', "Mistral AI is not configured; set MISTRAL_API_KEY"),
        ('[routes.r]\ntargets = [{to = "openai/a", wait = 1}]', r"targets\[0\]: 'wait' is not known"),
        ('[routes.r]\ntargets = [{to = "openai/a", weight = -1}]', "weight must be between"),
        ('[routes.r]\nstrategy = "best"\ntargets = ["openai/a"]', "strategy must be one of ordered"),
        ('[routes.r]\nsticky = 3\ntargets = ["openai/a"]', "sticky must be one of true, false"),
        ('[routes.r]\ntargets = ["openai/a"]\nforced = {max_tokens = 5}', "forced must be a table of parameters"),
        ('[routes.r]\ntargets = ["openai/a"]\nheaders = {authorization = "x"}', "headers must be a table"),
        ('[routes.r]\ntargets = ["openai/a"]\nheaders = {x-title = "a\\nb"}', "headers must be a table"),
        ('[routes.r]\ntargets = ["openai/a"]\nshadow = ["groq/a", "groq/b"]', "shadow takes one target"),
        ('[aliases]\na = "b"\nb = "gpt-4o"', "a must name a model"),
        ('[aliases]\na = "mistral/x"', "MISTRAL_API_KEY"),
        ('aliases = {r = "gpt-4o"}\n[routes.r]\ntargets = ["openai/a"]', "r is a route as well"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(toml: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        router(toml)


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "Mon, 21 Sep 2026 14:13:30 GMT"}, 10),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "99999999"}, 3600),
        ({"retry-after": "soon"}, None),
        ({"x-ratelimit-reset-tokens": "6m0s", "x-ratelimit-remaining-tokens": "0"}, 360),
        ({"x-ratelimit-reset-requests": "120ms", "x-ratelimit-remaining-requests": "0"}, 0.12),
        ({"x-ratelimit-reset-requests": "1h", "x-ratelimit-remaining-requests": "5"}, None),
        ({"anthropic-ratelimit-tokens-reset": "2026-09-21T14:13:40Z", "anthropic-ratelimit-tokens-remaining": "0"}, 20),
        ({}, None),
    ],
)  # fmt: skip
def test_how_long_providers_ask_to_wait(headers: dict[str, str], wait_s: float | None) -> None:
    assert stockyard.read_retry_after(headers, NOW_S) == (wait_s if wait_s is None else pytest.approx(wait_s))


def test_rules_change_what_is_asked() -> None:
    route = router("""
        [routes.r]
        targets = ["openai/a"]
        defaults = {temperature = 0.2, top_p = 0.5}
        forced = {user = "team"}
        system_prefix = "Be brief."
        max_output_tokens = 100
    """).routes["r"]
    asked = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 1, "max_tokens": 5000, "user": "me"}
    assert route.ruled(asked) == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "temperature": 1, "top_p": 0.5, "user": "team", "max_tokens": 100,
    }  # fmt: skip
    assert route.ruled({"max_completion_tokens": 7, "max_tokens": 9000})["max_completion_tokens"] == 7
    assert route.ruled({"messages": [{"role": "system", "content": "Old."}]})["messages"] == [
        {"role": "system", "content": "Be brief.\n\nOld."}
    ]


def test_the_view_tells_where_a_name_would_go_and_why() -> None:
    found = router("""
        [routes.r]
        targets = [{to = "openai/gpt-4o-mini", weight = 2}, {to = "groq/small", max_prompt_tokens = 10}]
        fallbacks = ["anthropic/claude-haiku-4-5"]
    """)
    rows = found.view("r", "", Asked(100), random.Random(1), 0.0, NOW_S)
    assert [(row["provider"], row.get("fallback"), row.get("left_out")) for row in rows] == [
        ("openai", False, None), ("anthropic", True, None), ("groq", None, "prompt of about 100 tokens"),
    ]  # fmt: skip
    assert (rows[0]["weight"], rows[0]["breaker"], rows[0]["rests_s"]) == (2, "closed", 0)
    assert rows[0]["price"]["input"] == "0.15"
    [row] = found.view("gpt-4o-mini", "", Asked(), random.Random(1), 0.0, NOW_S)
    assert (row["provider"], row["via"], "route" in row) == ("openai", "model list", False)


@pytest.mark.parametrize(
    ("model", "variable"),
    [
        ("llama-3.3-70b-versatile", "GROQ_API_KEY"), ("gpt-oss-120b", "OPENAI_API_KEY"), ("llama3.2:3b", "OLLAMA_BASE_URL"),
        ("amazon.nova-pro-v1:0", "AWS_BEARER_TOKEN_BEDROCK"), ("us.anthropic.claude-sonnet-4-5-v1:0", "AWS_BEARER_TOKEN_BEDROCK"),
        ("groq/anything", "GROQ_API_KEY"), ("gpt-99", "OPENAI_API_KEY"),
    ],
)  # fmt: skip
def test_an_unknown_model_names_the_variable_of_whoever_would_serve_it(model: str, variable: str) -> None:
    bare = stockyard.Router.load({}, stockyard.load_prices(stockyard.Settings()), {}, stockyard.Settings().deadlines)
    with pytest.raises(stockyard.UnknownModel, match=f"not configured; set {variable} and restart"):
        bare.targets(model)


def test_a_bedrock_id_goes_to_bedrock_beside_a_local_server() -> None:
    given = {"AWS_BEARER_TOKEN_BEDROCK": "k", "OLLAMA_BASE_URL": "http://127.0.0.1:9"}
    both = stockyard.load_router(stockyard.Settings(), given, stockyard.load_prices(stockyard.Settings()))
    asked = ("eu.anthropic.claude-new-v1:0", "qwen3:8b")
    assert [both.targets(model)[0].provider.id for model in asked] == ["bedrock", "ollama"]
