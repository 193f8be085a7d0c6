"""The Ledger section: keys, budgets, holds, rate windows, bounds."""

from __future__ import annotations

import base64
import datetime
import json
import math
import os
import re
import unicodedata
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stockyard import (
    BOUNDED_TOOLS,
    DAY_MS,
    DEAREST_BOUND,
    INPUT_BOUNDS,
    KEY_MEMBERS,
    UNBOUNDED_MEMBERS,
    Books,
    Budget,
    BudgetExceeded,
    Forbidden,
    InvalidRequest,
    KeyRing,
    Ledger,
    LimitExceeded,
    RateLimit,
    RateLimiter,
    Unauthenticated,
    VirtualKey,
    asked_terms,
    create_key,
    digest_secret,
    format_duration,
    input_token_bound,
    matches_pattern,
    mint_secret,
    output_allowed,
    output_token_cap,
    parse_budget,
    parse_rate_limit,
    parse_usd,
    patch_key,
    read_budget,
    read_budgets,
    read_limits,
    text_bytes,
    token_estimate,
    window_at,
    window_start_ms,
)

PEPPER = b"pepper" * 6


def moment_ms(text: str) -> int:
    return int(datetime.datetime.fromisoformat(text).timestamp() * 1000)


NOW_MS = moment_ms("2026-11-22T12:00:00+00:00")  # a Sunday


class Ids:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count:06d}"


def make_key(**body: object) -> VirtualKey:
    return create_key({"name": "test", **body}, "key_1", "d" * 64, NOW_MS)


def make_ledger(*budgets: Budget) -> Ledger:
    return Ledger(budgets, Ids(), NOW_MS)


def admit(ledger: Ledger, nanousd: int | None, now_ms: int = NOW_MS, **matching: object):
    call = {"key": None, "tags": {}, "model": "gpt-5", "provider": "openai", **matching}
    tags = ledger.tags_of(call["tags"])
    touched = (call["key"].id if call["key"] else "", tags, call["model"], call["provider"], "")
    return ledger.admit(touched, nanousd, now_ms)


def balance_of(ledger: Ledger, budget_id: str, now_ms: int = NOW_MS) -> tuple[int, int]:
    row = next(row for row in ledger.snapshot(now_ms) if row["id"] == budget_id)
    return row["settled_nanousd"], row["held_nanousd"]


# ----- patterns, windows, settings


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("gpt-5", "gpt-5", True),
        ("gpt-5", "gpt-5-mini", False),
        ("gpt-*", "gpt-5", True),
        ("*", "", True),
        ("*mini", "gpt-5-mini", True),
        ("a*a", "a", False),
        ("a*b*c", "a1b2c", True),
        ("a*b*c", "a1c2b", False),
        ("**", "x", True),
        ("a*bc*bc", "abc", False),
        ("a*bc*bc", "abcbc", True),
        ("*aa*aa*", "aaa", False),
        ("GPT-*", "gpt-5", False),
    ],
)
def test_patterns(pattern: str, name: str, fits: bool) -> None:
    assert matches_pattern(pattern, name) is fits


@given(st.text("ab", max_size=8), st.lists(st.text("ab", max_size=3), min_size=1, max_size=4))
def test_patterns_agree_with_a_regular_expression(name: str, pieces: list[str]) -> None:
    assert matches_pattern("*".join(pieces), name) == bool(re.fullmatch(".*".join(pieces), name))


@pytest.mark.parametrize(
    ("period", "at", "key", "end"),
    [
        ("day", "2026-11-22T23:59:59+00:00", "2026-11-22", "2026-11-23"),
        ("day", "2026-12-31T00:00:00+00:00", "2026-12-31", "2027-01-01"),
        ("month", "2026-12-31T23:59:59+00:00", "2026-12", "2027-01-01"),
        ("month", "2028-02-29T12:00:00+00:00", "2028-02", "2028-03-01"),
        ("month", "2027-01-31T12:00:00+00:00", "2027-01", "2027-02-01"),
        ("week", "2026-11-22T12:00:00+00:00", "2026-W47", "2026-11-23"),
        ("week", "2026-11-23T00:00:00+00:00", "2026-W48", "2026-11-30"),
        ("week", "2027-01-01T12:00:00+00:00", "2026-W53", "2027-01-04"),
        ("week", "2024-12-30T12:00:00+00:00", "2025-W01", "2025-01-06"),
    ],
)
def test_windows_at_boundaries(period: str, at: str, key: str, end: str) -> None:
    assert window_at(period, moment_ms(at)) == (key, moment_ms(end + "T00:00:00+00:00"))


@given(st.sampled_from(["day", "week", "month"]), st.integers(0, 80_000 * DAY_MS))
def test_a_window_holds_its_moment_and_meets_the_next(period: str, at_ms: int) -> None:
    window = window_at(period, at_ms)
    assert window_start_ms(window.key) <= at_ms < window.end_ms
    assert window_at(period, window.end_ms - 1) == window
    assert window_start_ms(window_at(period, window.end_ms).key) == window.end_ms


def test_settings_are_parsed() -> None:
    assert parse_budget("20/day") == Budget("global:day", 20 * 10**9, "day")
    assert parse_budget(" $0.5 / total ").limit_nanousd == 500_000_000
    assert parse_budget("1000000000/day") == read_budget({"usd": 10**9, "period": "day"}, "", "global", "")
    assert read_limits({"queue_ms": 600_000}).queue_ms == 600_000
    assert read_limits({"rpm": 5}).queue_ms == 0
    assert parse_rate_limit("64parallel, 600rpm,1000000tpm") == RateLimit(600, 1_000_000, 64)
    assert parse_rate_limit("5rpm") == RateLimit(rpm=5)


@pytest.mark.parametrize("text", ["20", "20/year", "x/day", "/day", "-1/day", "nan/day", "1e999/day", "2000000000/day"])
def test_bad_budget_settings_say_so(text: str) -> None:
    with pytest.raises(ValueError, match="dollars"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["", "5", "0rpm", "5rpm,5rpm", "5 rps", "-5rpm", "5rpm,", "\u0665rpm"])
def test_bad_rate_settings_say_so(text: str) -> None:
    with pytest.raises(ValueError, match="is no rate limit"):
        parse_rate_limit(text)


# ----- keys


def test_secrets_are_160_bits_in_text() -> None:
    assert mint_secret(bytes(20)) == "sy-" + "0" * 32
    assert mint_secret(b"\xff" * 20) == "sy-" + "z" * 32
    assert len({mint_secret(bytes([n]) + bytes(19)) for n in range(256)}) == 256
    with pytest.raises(ValueError, match="20 random bytes"):
        mint_secret(bytes(19))


def key_with(secret: str, **fields: object) -> VirtualKey:
    return VirtualKey(
        **{"id": "key_1", "name": "n", "digest": digest_secret(secret, PEPPER), "created_at_ms": 0, **fields}
    )


def test_a_key_is_found_by_its_secret_also_the_second_time() -> None:
    ring = KeyRing(PEPPER, [key_with("sy-a"), key_with("sy-b", id="key_2")])
    assert [ring.authenticate(secret, 0).id for secret in ("sy-a", "sy-b", "sy-a")] == ["key_1", "key_2", "key_1"]
    assert len(ring) == 2


@pytest.mark.parametrize("secret", ["", "sy-", "sy-wrong", "d" * 64, "\udcff\ud800", "sy-a" * 1000])
def test_unknown_secrets_are_refused(secret: str) -> None:
    with pytest.raises(Unauthenticated):
        KeyRing(PEPPER, [key_with("sy-a")]).authenticate(secret, 0)


def test_unknown_expired_and_revoked_keys_read_the_same() -> None:
    keys = [
        key_with("sy-expired", id="key_e", expires_at_ms=100),
        key_with("sy-revoked", id="key_r", revoked_at_ms=50),
        key_with("sy-replaced", id="key_x"),
    ]
    ring = KeyRing(PEPPER, keys)
    assert ring.authenticate("sy-expired", 99).id == "key_e"
    assert ring.authenticate("sy-replaced", 99).id == "key_x"
    ring.drop("key_x")
    messages = set()
    for secret in ("sy-expired", "sy-revoked", "sy-replaced", "sy-unknown"):
        with pytest.raises(Unauthenticated) as caught:
            ring.authenticate(secret, 100)
        messages.add((caught.value.message, caught.value.status, str(caught.value.fields)))
    assert len(messages) == 1


def test_a_rotated_key_takes_its_old_secret_for_the_grace_time_only() -> None:
    ring = KeyRing(PEPPER, [key_with("sy-old")])
    ring.authenticate("sy-old", 0)
    ring.put(ring.by_id["key_1"].rotated(digest_secret("sy-new", PEPPER), 1000, grace_ms=500))
    assert ring.authenticate("sy-old", 1499) is ring.authenticate("sy-new", 1499)
    with pytest.raises(Unauthenticated):
        ring.authenticate("sy-old", 1500)
    ring.put(ring.by_id["key_1"].rotated(digest_secret("sy-newer", PEPPER), 2000, grace_ms=0))
    for dead in ("sy-old", "sy-new"):
        with pytest.raises(Unauthenticated):
            ring.authenticate(dead, 2000)
    assert ring.authenticate("sy-newer", 10**15).id == "key_1"


def test_a_dropped_key_takes_its_old_secret_with_it() -> None:
    ring = KeyRing(PEPPER, [key_with("sy-old").rotated(digest_secret("sy-new", PEPPER), 0, grace_ms=1000)])
    assert ring.authenticate("sy-old", 0) is ring.authenticate("sy-new", 0)
    ring.drop("key_1")
    for dead in ("sy-old", "sy-new"):
        with pytest.raises(Unauthenticated):
            ring.authenticate(dead, 0)


def test_allow_lists() -> None:
    key = make_key(models=["gpt-*", "fast"], providers=["openai", "azure*"])
    key.check("openai", "gpt-5")
    key.check("azure-eu", "fast", "some-upstream-name")
    with pytest.raises(Forbidden, match="model 'claude'"):
        key.check("openai", "claude")
    with pytest.raises(Forbidden, match="provider 'groq'"):
        key.check("groq", "gpt-5")
    make_key().check("anything", "any")


def test_a_client_cannot_tag_itself_out_of_its_keys_tags() -> None:
    assert make_key(tags={"team": "a"}).tagged({"team": "b", "job": "x"}) == {"team": "a", "job": "x"}


def test_no_view_of_a_key_tells_a_secret() -> None:
    key = make_key(
        budget={"usd": 2.5, "period": "week", "mode": "soft", "clamp": True},
        rate_limit={"rpm": 5, "tpm": None},
        models=["*"],
        tags={"a": "b"},
        provider_keys={"openai": {"env": "TEAM_KEY"}},
        expires_at="2026-12-31T00:00:00Z",
    ).rotated("e" * 64, NOW_MS, 10)
    shown = json.dumps(key.as_json(NOW_MS)) + repr(key)
    assert "d" * 64 not in shown
    assert "e" * 64 not in shown
    view = key.as_json(NOW_MS)
    assert view["budget"] == {"usd": 2.5, "period": "week", "mode": "soft", "clamp": True}
    assert view["rate_limit"] == {"rpm": 5, "tpm": None, "parallel": None}
    assert (view["expires_at"], view["created_at"]) == ("2026-12-31T00:00:00Z", "2026-11-22T12:00:00Z")
    assert (view["provider_keys"], view["status"]) == ({"openai": {"env": "TEAM_KEY"}}, "active")
    again = VirtualKey.from_record(json.loads(json.dumps(key.as_record())))
    assert again == key
    writable = {name: value for name, value in view.items() if name in KEY_MEMBERS}
    assert patch_key(again, writable) == key


def test_keys_budget_carries_the_keys_id() -> None:
    key = make_key(budget={"usd": "0.000000001", "period": "total"})
    assert key.budget == Budget("key:key_1:total", 1, "total", "key", "key_1")
    assert create_key({}, "key_9", "", 0).name == "key_9"


def test_patch_changes_what_it_names_and_null_clears() -> None:
    key = make_key(budget={"usd": 1, "period": "day"}, tags={"a": "b"}, models=["x"], expires_at=1_900_000_000)
    changed = patch_key(key, {"models": ["y"], "budget": None})
    assert (changed.models, changed.budget, changed.tags) == (("y",), None, {"a": "b"})
    with pytest.raises(InvalidRequest, match="provider_keys"):
        patch_key(key, {"provider_keys": {"openai": "sk-literal"}})
    cleared = patch_key(changed, {"models": None, "tags": None, "expires_at": None, "name": None, "role": None})
    assert (cleared.models, cleared.tags, cleared.expires_at_ms) == ((), {}, None)
    assert (cleared.name, cleared.role) == ("test", "client")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], "body"),
        ({"nmae": "x"}, "body"),
        ({"name": 5}, "name"),
        ({"name": " "}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"models": "gpt"}, "models"),
        ({"models": [1]}, "models[0]"),
        ({"role": "root"}, "role"),
        ({"role": ["admin"]}, "role"),
        ({"budget": 5}, "budget"),
        ({"budget": {"usd": 5}}, "budget.period"),
        ({"budget": {"usd": 5, "period": "year"}}, "budget.period"),
        ({"budget": {"period": "day"}}, "budget.usd"),
        ({"budget": {"usd": True, "period": "day"}}, "budget.usd"),
        ({"budget": {"usd": -1, "period": "day"}}, "budget.usd"),
        ({"budget": {"usd": 1e30, "period": "day"}}, "budget.usd"),
        ({"budget": {"usd": "x", "period": "day"}}, "budget.usd"),
        ({"budget": {"usd": [], "period": "day"}}, "budget.usd"),
        ({"budget": {"usd": 5, "period": "day", "mode": "firm"}}, "budget.mode"),
        ({"budget": {"usd": 5, "period": "day", "clamp": 1}}, "budget.clamp"),
        ({"budget": {"usd": 5, "period": "day", "extra": 1}}, "budget"),
        ({"rate_limit": {}}, "rate_limit"),
        ({"rate_limit": {"rpm": 0}}, "rate_limit.rpm"),
        ({"rate_limit": {"rpm": 1.5}}, "rate_limit.rpm"),
        ({"rate_limit": {"tpm": True}}, "rate_limit.tpm"),
        ({"rate_limit": {"rps": 1}}, "rate_limit"),
        ({"tags": ["a"]}, "tags"),
        ({"tags": {"a b": "c"}}, "tags"),
        ({"tags": {"a": 1}}, "tags.a"),
        ({"tags": {"a": "b,c"}}, "tags.a"),
        ({"tags": {str(n): "x" for n in range(33)}}, "tags"),
        ({"expires_at": "soon"}, "expires_at"),
        ({"expires_at": True}, "expires_at"),
        ({"expires_at": 0}, "expires_at"),
        ({"expires_at": 1 << 34}, "expires_at"),
        ({"expires_at": 10**30}, "expires_at"),
        ({"expires_at": "0001-01-01T00:00:00+23:00"}, "expires_at"),
        ({"expires_at": "9999-12-31T23:59:59-23:00"}, "expires_at"),
        ({"provider_keys": []}, "provider_keys"),
        ({"provider_keys": {"openai": "sk-literal"}}, "provider_keys.openai"),
        ({"provider_keys": {"openai": {"env": "sk-literal"}}}, "provider_keys.openai"),
        ({"provider_keys": {"openai": {"env": "STOCKYARD_ADMIN_KEY"}}}, "provider_keys.openai"),
        ({"provider_keys": {"openai": {"env": "A", "key": "sk-literal"}}}, "provider_keys.openai"),
        ({"provider_keys": {"nobody": {"env": "A"}}}, "provider_keys"),
        ({"provider_keys": {"echo": {"env": "A"}}}, "provider_keys"),
    ],
)
def test_bad_key_bodies_name_the_field(body: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        create_key(body, "key_1", "", 0)
    assert caught.value.param == param
    assert param in caught.value.message


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEY_MEMBERS, "usd", "rpm"]), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(list(KEY_MEMBERS)), JSON_VALUES))
def test_any_json_makes_a_key_or_an_invalid_request(body: dict[str, object]) -> None:
    key = refused = None
    try:
        key = create_key(body, "key_1", "", 0)
    except InvalidRequest as error:
        refused = error
    if key is None:
        assert refused.param
    else:
        assert VirtualKey.from_record(json.loads(json.dumps(key.as_record()))) == key


def test_a_key_takes_so_many_tags() -> None:
    assert len(create_key({"tags": {str(n): "x" for n in range(32)}}, "key_1", "", 0).tags) == 32


def test_budget_lists_are_read() -> None:
    rows = [
        {"usd": 20, "period": "day"},
        {"scope": "tag", "value": "team=a", "usd": 5, "period": "month", "mode": "soft"},
        {"scope": "model", "value": "gpt-*", "usd": 5, "period": "month", "clamp": True},
    ]
    assert read_budgets(rows) == [
        Budget("global:day", 20 * 10**9, "day"),
        Budget("tag:team=a:month", 5 * 10**9, "month", "tag", "team=a", "soft"),
        Budget("model:gpt-*:month", 5 * 10**9, "month", "model", "gpt-*", clamp=True),
    ]


@pytest.mark.parametrize(
    ("rows", "param"),
    [
        ({}, "budgets"),
        ([5], "budgets[0]"),
        ([{"scope": "team"}], "budgets[0].scope"),
        ([{"scope": "key", "usd": 1, "period": "day"}], "budgets[0].value"),
        ([{"scope": "tag", "value": "team", "usd": 1, "period": "day"}], "budgets[0].value"),
        ([{"usd": 1, "period": "day"}, {"usd": 2, "period": "day"}], "budgets[1]"),
    ],
)
def test_bad_budget_lists_name_the_place(rows: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_budgets(rows)
    assert caught.value.param == param


# ----- holds and settlement


def test_a_call_without_budgets_needs_no_record() -> None:
    ledger = make_ledger()
    hold = admit(ledger, None)
    assert hold.record is None
    assert ledger.settle(hold, 5) == (5, None, ())
    assert ledger.settle(hold, 5) == (0, None, ())
    assert (ledger.repeated_ends, ledger.bound_violations) == (1, 0)


def test_a_hold_is_settled_once_and_leaves_records() -> None:
    ledger = make_ledger(Budget("global:day", 1000, "day"))
    hold = admit(ledger, 400)
    where = [["global:day", "2026-11-22"]]
    assert json.loads(hold.record) == {
        "op": "hold",
        "id": hold.id,
        "budgets": where,
        "nanousd": 400,
        "at": NOW_MS,
    }
    assert (balance_of(ledger, "global:day"), ledger.held_nanousd) == ((0, 400), 400)
    done = ledger.settle(hold, 150)
    ended = {"op": "settle", "id": hold.id, "nanousd": 150}
    assert (json.loads(done.record), done.cost_nanousd) == (ended, 150)
    for _ in range(2):
        assert ledger.settle(hold, 150) == (0, None, ())
        assert ledger.release(hold) == (0, None, ())
    assert (balance_of(ledger, "global:day"), ledger.repeated_ends, ledger.held_nanousd) == ((150, 0), 4, 0)


def test_unknown_usage_costs_the_hold_and_a_release_nothing() -> None:
    ledger = make_ledger(Budget("global:day", 1000, "day"))
    assert ledger.settle(admit(ledger, 300), None).cost_nanousd == 300
    assert json.loads(ledger.release(admit(ledger, 300)).record)["op"] == "release"
    assert balance_of(ledger, "global:day") == (300, 0)


def test_a_cost_above_its_hold_is_charged_and_counted() -> None:
    ledger = make_ledger(Budget("global:day", 1000, "day"))
    hold = admit(ledger, 300)
    ledger.settle(hold, 1200)
    ledger.settle(hold, 1200)
    assert (balance_of(ledger, "global:day"), ledger.bound_violations) == ((1200, 0), 1)
    with pytest.raises(BudgetExceeded):
        admit(ledger, 0)


def test_all_matching_budgets_or_none() -> None:
    key = make_key(budget={"usd": "0.000001", "period": "day"}, tags={"team": "a"})
    budgets = [
        Budget("g", 10_000, "total"),
        key.budget,
        Budget("t", 10_000, "week", "tag", "team=a"),
        Budget("m", 10_000, "month", "model", "gpt-*"),
        Budget("exact", 10_000, "month", "model", "gpt-5"),
        Budget("p", 500, "day", "provider", "openai"),
        Budget("other", 0, "day", "key", "key_2"),
        Budget("other-tag", 0, "day", "tag", "team=b"),
        Budget("other-model", 0, "day", "model", "claude-*"),
    ]
    ledger = make_ledger(*budgets)
    before = ledger.snapshot(NOW_MS)
    with pytest.raises(BudgetExceeded) as caught:
        admit(ledger, 501, key=key, tags=key.tags)
    assert caught.value.fields["budget"] == "p"
    assert ledger.snapshot(NOW_MS) == before
    hold = admit(ledger, 500, key=key, tags=key.tags)
    touched = {budget_id for budget_id, _ in json.loads(hold.record)["budgets"]}
    assert touched == {"g", "key:key_1:day", "t", "m", "exact", "p"}
    assert ledger.release(hold).record
    assert ledger.snapshot(NOW_MS) == before


def test_a_call_of_an_unknown_model_touches_the_budgets_of_all_models() -> None:
    ledger = make_ledger(Budget("m", 10, "day", "model", "gpt-4o"), Budget("p", 10, "day", "model", "claude-*"))
    assert [b.budget.id for b in admit(ledger, 4, model="").windows.balances] == ["m", "p"]
    assert balance_of(ledger, "p") == (0, 4)
    with pytest.raises(BudgetExceeded):
        admit(ledger, None, model="")


def test_a_refusal_tells_the_arithmetic() -> None:
    ledger = make_ledger(Budget("global:day", parse_usd(20), "day"))
    ledger.settle(admit(ledger, parse_usd(15)), None)
    admit(ledger, parse_usd(3))
    with pytest.raises(BudgetExceeded) as caught:
        admit(ledger, parse_usd("6.5"))
    error = caught.value
    assert (error.status, error.code, error.retry_after_s) == (429, "insufficient_quota", 12 * 3600)
    assert error.fields == {
        "budget": "global:day",
        "scope": "global",
        "window": "2026-11-22",
        "resets_at": "2026-11-23T00:00:00Z",
        "limit_usd": "20",
        "limit_nanousd": 20 * 10**9,
        "spent_usd": "15",
        "spent_nanousd": 15 * 10**9,
        "held_usd": "3",
        "held_nanousd": 3 * 10**9,
        "needed_usd": "6.5",
        "needed_nanousd": 6_500_000_000,
    }
    for part in ("$20 a day", "$15 is spent", "$3 is held", "$6.5", "2026-11-23T00:00:00Z"):
        assert part in error.message


@pytest.mark.parametrize(
    ("period", "needed", "retry_after_s"),
    [("day", 50, 1.0), ("day", 60, 1.0), ("day", 101, None), ("total", 61, None), ("day", 61, 43_200.0)],
)
def test_retry_after_says_when_waiting_helps(period: str, needed: int, retry_after_s: float | None) -> None:
    ledger = make_ledger(Budget("b", 100, period))
    ledger.settle(admit(ledger, 40), None)
    admit(ledger, 60)
    with pytest.raises(BudgetExceeded) as caught:
        admit(ledger, needed)
    assert caught.value.retry_after_s == retry_after_s


def test_unknown_prices_are_refused_under_hard_budgets_only() -> None:
    hard = make_ledger(Budget("b", 100, "day"))
    with pytest.raises(BudgetExceeded, match="not known") as caught:
        admit(hard, None)
    assert caught.value.fields["needed_nanousd"] is None
    soft = make_ledger(Budget("b", 100, "day", mode="soft"))
    soft.settle(admit(soft, None), 250)
    assert (balance_of(soft, "b"), soft.bound_violations) == ((250, 0), 0)
    assert soft.settle(admit(soft, None), None).cost_nanousd == 0


def test_negative_amounts_are_a_programming_error() -> None:
    ledger = make_ledger(Budget("b", 100, "day"))
    with pytest.raises(ValueError, match="never negative"):
        admit(ledger, -1)
    hold = admit(ledger, 1)
    with pytest.raises(ValueError, match="never negative"):
        ledger.settle(hold, -1)
    assert balance_of(ledger, "b") == (0, 1)


def test_a_soft_budget_only_warns() -> None:
    ledger = make_ledger(Budget("b", 100, "day", mode="soft"))
    events = ledger.settle(admit(ledger, 1000), 1000).events
    assert [event.percent for event in events] == [50, 80, 100]
    assert ledger.snapshot(NOW_MS)[0]["remaining_nanousd"] == 0
    assert ledger.settle(admit(ledger, 1), 10**18).events == ()  # a billion dollars cross no further one


def test_thresholds_are_told_once_in_a_window() -> None:
    ledger = make_ledger(Budget("b", 1000, "day"))
    told = []
    for _ in range(10):
        told += [(e.percent, e.settled_nanousd, e.window) for e in ledger.settle(admit(ledger, 100), None).events]
    assert told == [(50, 500, "2026-11-22"), (80, 800, "2026-11-22"), (100, 1000, "2026-11-22")]
    ledger.put_budget(Budget("b", 2000, "day"), NOW_MS)
    assert ledger.settle(admit(ledger, 900), None).events == ()
    events = ledger.settle(admit(ledger, 1500, NOW_MS + DAY_MS), None).events
    assert [(e.percent, e.window) for e in events] == [(50, "2026-11-23")]


def test_a_lowered_limit_brings_the_next_threshold_nearer() -> None:
    ledger = make_ledger(Budget("b", 1000, "day"))
    assert ledger.settle(admit(ledger, 100), None).events == ()
    ledger.put_budget(Budget("b", 220, "day"), NOW_MS)
    assert [event.percent for event in ledger.settle(admit(ledger, 10), None).events] == [50]


def test_restored_balances_do_not_tell_again() -> None:
    books = Books({("b", "2026-11-22"): 850})
    ledger, _ = Ledger.restore([Budget("b", 1000, "day")], books, Ids(), NOW_MS)
    assert [e.percent for e in ledger.settle(admit(ledger, 150), None).events] == [100]


def test_a_soft_budget_of_nothing_tells_of_the_first_spend() -> None:
    ledger = make_ledger(Budget("s", 0, "day", mode="soft"))
    assert [event.percent for event in ledger.settle(admit(ledger, 1), None).events] == [50, 80, 100]


def test_books_hold_the_balance_of_yesterday_while_a_call_of_yesterday_is_open() -> None:
    ledger, tomorrow_ms = make_ledger(Budget("b", 1000, "day")), NOW_MS + 86_400_000
    ledger.settle(admit(ledger, 10), None)
    late = admit(ledger, 20)
    admit(ledger, 5, tomorrow_ms)
    books = ledger.books()
    assert (books.settled["b", "2026-11-22"], books.settled["b", "2026-11-23"]) == (10, 0)
    ledger.settle(late, 7)
    assert ("b", "2026-11-22") not in ledger.books().settled


def test_headroom_is_what_clamping_budgets_leave() -> None:
    roomy, tight = Budget("g", 1000, "day"), Budget("k", 300, "day", "model", "gpt-5", clamp=True)
    ledger = make_ledger(roomy, tight)
    touched = ("", (), "gpt-5", "openai", "")
    assert [ledger.headroom(touched, needed, NOW_MS) for needed in (200, 300, 900, 1001)] == [200, 300, 300, 0]
    assert admit(ledger, ledger.headroom(touched, 900, NOW_MS)).windows.is_hard
    assert ledger.headroom(touched, 1, NOW_MS) == 0
    assert ledger.headroom(("", (), "other", "openai", ""), 10, NOW_MS) == 10
    assert not admit(make_ledger(Budget("s", 1, "day", mode="soft")), 1).windows.is_hard


def test_a_burst_on_five_and_a_half_worst_cases_admits_five() -> None:
    ledger = make_ledger(Budget("b", 5500, "day"))
    holds, refused = [], 0
    for _ in range(200):
        try:
            holds.append(admit(ledger, 1000))
        except BudgetExceeded:
            refused += 1
    assert (len(holds), refused) == (5, 195)
    for hold in holds:
        ledger.settle(hold, 0)
    assert admit(ledger, 5500)


def test_a_hold_belongs_to_the_window_it_was_made_in() -> None:
    ledger = make_ledger(Budget("b", 100, "day"))
    hold = admit(ledger, 100)
    tomorrow = NOW_MS + DAY_MS
    fresh = admit(ledger, 100, tomorrow)
    books = Ledger.replay([json.loads(record) for record in (hold.record, ledger.settle(hold, 70).record)])
    assert books.settled == {("b", "2026-11-22"): 70}
    assert balance_of(ledger, "b", tomorrow) == (0, 100)
    assert json.loads(fresh.record)["budgets"] == [["b", "2026-11-23"]]


def test_a_window_ends_with_its_last_millisecond() -> None:
    ledger = make_ledger(Budget("b", 100, "day"))
    midnight_ms = moment_ms("2026-11-23T00:00:00+00:00")
    assert json.loads(admit(ledger, 100, midnight_ms - 1).record)["budgets"] == [["b", "2026-11-22"]]
    assert json.loads(admit(ledger, 100, midnight_ms).record)["budgets"] == [["b", "2026-11-23"]]


def test_a_clock_that_goes_back_reopens_nothing_and_forth_refills_once() -> None:
    ledger = make_ledger(Budget("b", 100, "day"))
    tomorrow = NOW_MS + DAY_MS
    admit(ledger, 100, tomorrow)
    for now_ms in (NOW_MS, tomorrow, NOW_MS - 30 * DAY_MS, tomorrow):
        with pytest.raises(BudgetExceeded):
            admit(ledger, 1, now_ms)
    again, _ = Ledger.restore([Budget("b", 100, "day")], ledger.books(), Ids(), NOW_MS)
    with pytest.raises(BudgetExceeded) as caught:
        admit(again, 1, NOW_MS)
    assert caught.value.fields["window"] == "2026-11-23"
    ledger.put_budget(Budget("c", 100, "day"), NOW_MS)
    assert [row["window"] for row in ledger.snapshot(NOW_MS)] == ["2026-11-23"] * 2


def test_an_open_hold_keeps_the_clock_from_going_back_over_a_crash() -> None:
    ledger = make_ledger(Budget("b", 100, "day"))
    books = Ledger.replay([json.loads(admit(ledger, 100, NOW_MS + DAY_MS).record)])
    again, _ = Ledger.restore([Budget("b", 100, "day")], books, Ids(), NOW_MS)
    with pytest.raises(BudgetExceeded):
        admit(again, 1, NOW_MS)


def test_a_changed_limit_keeps_the_balance() -> None:
    ledger = make_ledger(Budget("b", 100, "day"))
    hold = admit(ledger, 80)
    ledger.put_budget(Budget("b", 50, "day"), NOW_MS)
    with pytest.raises(BudgetExceeded):
        admit(ledger, 1)
    ledger.put_budget(Budget("b", 90, "day"), NOW_MS)
    admit(ledger, 10)
    ledger.settle(hold, 80)
    assert balance_of(ledger, "b") == (80, 10)


def test_a_dropped_budget_comes_back_with_its_balance() -> None:
    ledger = make_ledger(Budget("b", 100, "day"))
    spent, hold = admit(ledger, 30), admit(ledger, 20)
    records = [spent.record, hold.record, ledger.settle(spent, 30).record]
    ledger.drop_budget("b")
    ledger.drop_budget("b")
    assert admit(ledger, 10_000).record is None
    ledger.put_budget(Budget("b", 100, "day"), NOW_MS)
    assert balance_of(ledger, "b") == (30, 20)
    ledger.drop_budget("b")
    records.append(ledger.settle(hold, 20).record)
    ledger.put_budget(Budget("b", 100, "day"), NOW_MS, Ledger.replay(map(json.loads, records)).settled)
    assert balance_of(ledger, "b") == (50, 0)


def test_a_crash_settles_open_holds_whole_in_their_own_windows() -> None:
    budgets = [Budget("d", 100, "day"), Budget("gone", 100, "day")]
    ledger = make_ledger(*budgets)
    old = admit(ledger, 60)
    new = admit(ledger, 90, NOW_MS + DAY_MS)
    books = Ledger.replay(map(json.loads, (old.record, new.record)))
    again, settled = Ledger.restore(budgets[:1], books, Ids(), NOW_MS + DAY_MS)
    assert [(done.cost_nanousd, json.loads(done.record)["id"]) for done in settled] == [(60, old.id), (90, new.id)]
    assert [event.percent for done in settled for event in done.events] == [50, 80]
    assert (balance_of(again, "d", NOW_MS + DAY_MS), again.held_nanousd) == ((90, 0), 0)
    whole = Ledger.replay((json.loads(done.record) for done in settled), books)
    expected = {(b, w): n for b in ("d", "gone") for w, n in (("2026-11-22", 60), ("2026-11-23", 90))}
    assert (whole.settled, whole.open) == (expected, {})


def test_replay_takes_a_record_twice_and_overlaps() -> None:
    ledger = make_ledger(Budget("b", 100, "day"))
    hold = admit(ledger, 60)
    records = [json.loads(record) for record in (hold.record, ledger.settle(hold, 25).record)]
    books = Ledger.replay(records + records)
    assert (books.settled, books.open) == ({("b", "2026-11-22"): 25}, {})
    overlapping = Ledger.replay(records, Books(books.settled, closed=[hold.id]))
    assert overlapping.settled == books.settled


def test_snapshot_shows_amounts_and_reset() -> None:
    ledger = make_ledger(Budget("b", parse_usd(1), "week", clamp=True), Budget("t", 5, "total", "tag", "a=b", "soft"))
    ledger.settle(admit(ledger, parse_usd("0.25")), None)
    admit(ledger, parse_usd("0.5"))
    week, total = ledger.snapshot(NOW_MS)
    assert week == {
        "id": "b",
        "scope": "global",
        "value": "",
        "period": "week",
        "mode": "hard",
        "clamp": True,
        "window": "2026-W47",
        "limit_usd": "1",
        "limit_nanousd": 10**9,
        "settled_usd": "0.25",
        "settled_nanousd": 250_000_000,
        "held_usd": "0.5",
        "held_nanousd": 500_000_000,
        "remaining_usd": "0.25",
        "remaining_nanousd": 250_000_000,
        "resets_at": "2026-11-23T00:00:00Z",
    }
    assert (total["window"], total["resets_at"]) == ("total", None)


class LedgerMachine(RuleBasedStateMachine):
    """Drives the ledger beside a model of its own: a plain list of what was held and what was paid."""

    LIMITS: ClassVar = {
        "global": ("hard", "day"),
        "key": ("hard", "total"),
        "model": ("soft", "month"),
        "tag": ("hard", "week"),
    }
    VALUES: ClassVar = {"global": "", "key": "key_1", "model": "gpt-*", "tag": "team=a"}

    def __init__(self) -> None:
        super().__init__()
        self.now_ms, self.ids, self.journal = NOW_MS, Ids(), []
        self.budgets = {scope: self.budget(scope, 1000) for scope in self.LIMITS}
        self.ledger = Ledger(self.budgets.values(), self.ids, NOW_MS)
        self.open: list = []
        self.paid: dict[tuple[str, str], int] = {}
        self.ceiling: dict[tuple[str, str], int] = {}

    def budget(self, scope: str, limit_nanousd: int) -> Budget:
        mode, period = self.LIMITS[scope]
        return Budget(scope, limit_nanousd, period, scope, self.VALUES[scope], mode)

    def rooms(self) -> dict[str, int]:
        rows = {row["id"]: row for row in self.ledger.snapshot(self.now_ms)}
        return {
            scope: budget.limit_nanousd - rows[scope]["settled_nanousd"] - rows[scope]["held_nanousd"]
            for scope, budget in self.budgets.items()
            if budget.mode == "hard"
        }

    @rule(nanousd=st.integers(0, 700), tagged=st.booleans(), keyed=st.booleans())
    def hold(self, nanousd: int, tagged: bool, keyed: bool) -> None:
        concerned = {"global"} | ({"tag"} if tagged else set()) | ({"key"} if keyed else set())
        fits = all(nanousd <= room for scope, room in self.rooms().items() if scope in concerned)
        key = make_key() if keyed else None
        try:
            hold = admit(self.ledger, nanousd, self.now_ms, key=key, tags={"team": "a"} if tagged else {})
        except BudgetExceeded:
            assert not fits
            return
        assert fits
        assert {budget_id for budget_id, _ in json.loads(hold.record)["budgets"]} == concerned | {"model"}
        self.journal.append(json.loads(hold.record))
        self.open.append(hold)

    def pay(self, line: bytes, nanousd: int) -> None:
        record = json.loads(line)
        self.journal.append(record)
        for budget_id, window in next(hold["budgets"] for hold in self.journal if hold["id"] == record["id"]):
            self.paid[budget_id, window] = self.paid.get((budget_id, window), 0) + nanousd

    @precondition(lambda self: self.open)
    @rule(data=st.data(), percent=st.integers(0, 100) | st.none())
    def settle(self, data: st.DataObject, percent: int | None) -> None:
        hold = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        cost = None if percent is None else hold.nanousd * percent // 100
        done = self.ledger.settle(hold, cost)
        self.pay(done.record, hold.nanousd if cost is None else cost)
        assert self.ledger.settle(hold, cost).record is None

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        hold = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.pay(self.ledger.release(hold).record, 0)

    @rule(lost_ms=st.integers(-3 * DAY_MS, 3 * DAY_MS))
    def crash(self, lost_ms: int) -> None:
        self.now_ms += lost_ms
        books = Ledger.replay(self.journal)
        self.ledger, settled = Ledger.restore(self.budgets.values(), books, self.ids, self.now_ms)
        assert [json.loads(done.record)["id"] for done in settled] == [hold.id for hold in self.open]
        for done, hold in zip(settled, self.open, strict=True):
            assert done.cost_nanousd == hold.nanousd
            self.pay(done.record, hold.nanousd)
        self.open = []

    @rule(jump_ms=st.integers(-40 * DAY_MS, 40 * DAY_MS) | st.integers(-5000, 5000))
    def clock_jumps(self, jump_ms: int) -> None:
        self.now_ms += jump_ms

    @rule(scope=st.sampled_from(sorted(LIMITS)), limit_nanousd=st.integers(0, 3000))
    def limit_changes(self, scope: str, limit_nanousd: int) -> None:
        self.budgets[scope] = self.budget(scope, limit_nanousd)
        self.ledger.put_budget(self.budgets[scope], self.now_ms, Ledger.replay(self.journal).settled)

    @precondition(lambda self: not self.open)
    @rule()
    def the_exact_remainder_can_be_spent(self) -> None:
        assert self.ledger.held_nanousd == 0
        room = min(self.rooms().values())
        if room < 0:
            return
        call = {"key": make_key(), "tags": {"team": "a"}}
        with pytest.raises(BudgetExceeded):
            admit(self.ledger, room + 1, self.now_ms, **call)
        hold = admit(self.ledger, room, self.now_ms, **call)
        self.journal.append(json.loads(hold.record))
        self.pay(self.ledger.release(hold).record, 0)

    @invariant()
    def hard_limits_hold(self) -> None:
        rows = {row["id"]: row for row in self.ledger.snapshot(self.now_ms)}
        for scope, budget in self.budgets.items():
            taken = rows[scope]["settled_nanousd"] + rows[scope]["held_nanousd"]
            place = scope, rows[scope]["window"]
            self.ceiling[place] = max(self.ceiling.get(place, 0), budget.limit_nanousd)
            assert budget.mode == "soft" or taken <= self.ceiling[place]

    @invariant()
    def money_is_conserved_and_replay_equals_live(self) -> None:
        replayed, live = Ledger.replay(self.journal), self.ledger.books()
        assert replayed.settled == self.paid
        for place, nanousd in live.settled.items():
            assert nanousd == replayed.settled.get(place, 0)
        assert live.open == replayed.open
        assert self.ledger.held_nanousd == sum(hold.nanousd for hold in self.open)
        assert self.ledger.bound_violations == 0


TestLedgerMachine = LedgerMachine.TestCase
# LEDGER_STEPS=50000 in the environment makes a long run of it.
TestLedgerMachine.settings = settings(
    max_examples=int(os.environ.get("LEDGER_STEPS", "1800")) // 30, stateful_step_count=30
)


# ----- rate windows


def limiter(**limit: int) -> tuple[RateLimiter, VirtualKey]:
    return RateLimiter(None, {}), make_key(rate_limit=limit)


def test_requests_are_limited_and_the_wait_is_right_to_the_second() -> None:
    rates, key = limiter(rpm=2)
    for now_ms in (500, 20_000):
        rates.settle(rates.admit(key, "m", 0, now_ms), 0)
    with pytest.raises(LimitExceeded) as caught:
        rates.admit(key, "m", 0, 30_250)
    error = caught.value
    assert (error.status, error.code, error.retry_after_s) == (429, "rate_limit_exceeded", 31.0)
    assert error.fields == {"limit_name": "rpm", "scope": "this key", "limit": 2, "used": 2, "needed": 1}
    with pytest.raises(LimitExceeded):
        rates.admit(key, "m", 0, 60_999)
    assert rates.admit(key, "m", 0, 61_250)


def test_a_minute_is_over_a_second_late_and_not_a_minute() -> None:
    rates, key = limiter(rpm=1)
    up_s = 90 * 86_400  # the monotonic clock counts from the start of the machine
    rates.admit(key, "m", 0, up_s * 1000)
    with pytest.raises(LimitExceeded) as caught:
        rates.admit(key, "m", 0, up_s * 1000 + 60_000)
    assert caught.value.retry_after_s == 1.0
    assert rates.admit(key, "m", 0, up_s * 1000 + 61_000)


def test_tokens_are_reserved_and_corrected() -> None:
    rates, key = limiter(tpm=1000)
    first = rates.admit(key, "m", 900, 0)
    with pytest.raises(LimitExceeded):
        rates.admit(key, "m", 200, 0)
    rates.settle(first, 300)
    second = rates.admit(key, "m", 700, 1000)
    rates.settle(second, 1500)
    with pytest.raises(LimitExceeded) as caught:
        rates.admit(key, "m", 1, 2000)
    assert (caught.value.fields["used"], caught.value.retry_after_s) == (1800, 60.0)
    assert rates.admit(key, "m", 1000, 62_000)


def test_a_late_correction_owes_but_does_not_give_back() -> None:
    rates, key = limiter(tpm=1000)
    cheap, dear = rates.admit(key, "m", 500, 0), rates.admit(key, "m", 500, 0)
    rates.settle(rates.admit(key, "m", 600, 120_000), None)
    rates.settle(cheap, 0)
    rates.settle(dear, 700)
    headers = rates.headers(key, "m", 120_000)
    assert headers["x-ratelimit-remaining-tokens"] == "200"
    last = rates.admit(key, "m", 200, 121_000)
    rates.admit(key, "m", 10, 182_000)
    rates.settle(last, 0)
    assert rates.headers(key, "m", 182_000)["x-ratelimit-remaining-tokens"] == "990"


def test_what_never_fits_is_told_without_a_wait() -> None:
    rates, key = limiter(tpm=100)
    with pytest.raises(LimitExceeded, match="never fits") as caught:
        rates.admit(key, "m", 101, 0)
    assert caught.value.retry_after_s is None


def test_places_in_parallel_come_back_exactly_once() -> None:
    rates, key = limiter(parallel=2)
    first, second = rates.admit(key, "m", 0, 0), rates.admit(key, "m", 0, 0)
    with pytest.raises(LimitExceeded, match="calls at once") as caught:
        rates.admit(key, "m", 0, 0)
    assert caught.value.retry_after_s == 1.0
    assert caught.value.fields == {"limit_name": "parallel", "scope": "this key", "limit": 2, "used": 2, "needed": 1}
    rates.settle(first, 1)
    rates.settle(first, 1)
    rates.admit(key, "m", 0, 0)
    with pytest.raises(LimitExceeded):
        rates.admit(key, "m", 0, 0)
    rates.settle(second, None)
    assert (rates.repeated_ends, bool(rates.admit(key, "m", 0, 0))) == (1, True)


def test_key_model_and_global_limits_are_taken_together_or_not_at_all() -> None:
    rates = RateLimiter(RateLimit(rpm=10), {"gpt-*": RateLimit(rpm=3, parallel=3)})
    key, other = make_key(rate_limit={"rpm": 2}), make_key()
    for _ in range(2):
        rates.admit(key, "gpt-5", 0, 0)
    with pytest.raises(LimitExceeded, match="this key"):
        rates.admit(key, "gpt-5", 0, 0)
    rates.admit(other, "gpt-5-mini", 0, 0)
    with pytest.raises(LimitExceeded, match=r"the model gpt-\*"):
        rates.admit(other, "gpt-5", 0, 0)
    for _ in range(7):
        rates.admit(None, "claude", 0, 0)
    with pytest.raises(LimitExceeded, match="this Stockyard"):
        rates.admit(None, "claude", 0, 0)
    assert rates.headers(key, "gpt-5", 0)["x-ratelimit-limit-requests"] == "2"
    assert rates.headers(other, "gpt-5", 0)["x-ratelimit-limit-requests"] == "3"
    assert rates.headers(other, "claude", 0)["x-ratelimit-limit-requests"] == "10"


def test_headers_forget_a_call_after_sixty_one_seconds_and_no_sooner() -> None:
    rates, key = limiter(rpm=5)
    rates.admit(key, "m", 0, 0)
    left = [rates.headers(key, "m", now_ms)["x-ratelimit-remaining-requests"] for now_ms in (0, 60_999, 61_000)]
    assert left == ["4", "4", "5"]


def test_headers_are_in_openais_form() -> None:
    rates, key = limiter(rpm=60, tpm=1000)
    rates.admit(key, "m", 250, 1_500)
    assert rates.headers(key, "m", 61_880) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "120ms",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "750",
        "x-ratelimit-reset-tokens": "120ms",
    }
    assert rates.headers(key, "m", 62_000)["x-ratelimit-reset-requests"] == "0s"
    assert rates.headers(None, "m", 0) == {}
    assert rates.headers(make_key(), "m", 0) == {}


@pytest.mark.parametrize(
    ("duration_ms", "text"),
    [
        (0, "0s"),
        (120, "120ms"),
        (1000, "1s"),
        (1500, "1.5s"),
        (59_827, "59.827s"),
        (360_000, "6m0s"),
        (3_723_000, "1h2m3s"),
    ],
)
def test_durations(duration_ms: int, text: str) -> None:
    assert format_duration(duration_ms) == text


def test_a_changed_limit_counts_from_what_was_used() -> None:
    rates, key = limiter(rpm=5)
    for _ in range(3):
        rates.admit(key, "m", 0, 0)
    with pytest.raises(LimitExceeded):
        rates.admit(make_key(rate_limit={"rpm": 3}), "m", 0, 0)


def test_idle_keys_are_forgotten_and_busy_ones_are_not() -> None:
    rates = RateLimiter(None, {})
    busy = create_key({"rate_limit": {"parallel": 1}}, "busy", "", 0)
    rates.admit(busy, "m", 0, 0)
    largest = 0
    for n in range(5000):
        key = create_key({"rate_limit": {"rpm": 1, "parallel": 1}}, f"key_{n}", "", 0)
        rates.settle(rates.admit(key, "m", 0, n * 1000), 0)
        largest = max(largest, len(rates))
    assert largest < 130
    with pytest.raises(LimitExceeded):
        rates.admit(busy, "m", 0, 5_000_000)


def test_what_a_key_used_this_minute_outlives_the_arrival_of_other_keys() -> None:
    rates, now_ms = RateLimiter(None, {}), 1_800_000_000_000
    early, late = (create_key({"rate_limit": {"rpm": 1}}, name, "", 0) for name in ("early", "late"))
    rates.settle(rates.admit(early, "m", 0, now_ms), 0)
    rates.settle(rates.admit(late, "m", 0, now_ms + 1000), 0)
    with pytest.raises(LimitExceeded):
        rates.admit(early, "m", 0, now_ms + 2000)


@settings(max_examples=150)
@given(
    st.integers(1, 6),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 25_000) | st.just(0), st.integers(0, 3)), max_size=80),
)
def test_never_more_than_the_limits_in_any_minute(rpm: int, parallel: int, steps: list[tuple[int, int]]) -> None:
    rates, key = limiter(rpm=rpm, parallel=parallel)
    now_ms, admitted, running = 0, [], []
    for pause_ms, done in steps:
        now_ms += pause_ms
        for _ in range(min(done, len(running))):
            rates.settle(running.pop(0), None)
        recent = [at for at in admitted if at // 1000 > now_ms // 1000 - 61]
        refused = None
        try:
            running.append(rates.admit(key, "m", 0, now_ms))
            admitted.append(now_ms)
        except LimitExceeded as error:
            refused = error
        if refused:
            assert len(recent) == rpm or len(running) == parallel
        if refused and refused.fields["limit_name"] == "rpm":
            assert refused.retry_after_s == math.ceil((recent[0] // 1000 + 61) - now_ms / 1000)
        assert len(running) <= parallel
    for at in admitted:
        assert sum(at <= other < at + 60_000 for other in admitted) <= rpm


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 60), st.integers(0, 60)), max_size=60))
def test_tokens_of_a_minute_stay_below_the_limit_where_estimates_hold(steps: list[tuple[int, int, int]]) -> None:
    rates, key = limiter(tpm=100)
    now_ms, used = 0, []
    for pause_ms, estimate, actual in steps:
        now_ms += pause_ms
        try:
            hold = rates.admit(key, "m", estimate, now_ms)
        except LimitExceeded as error:
            refused = error
            later_s = now_ms // 1000 + int(refused.retry_after_s)
            counted = [(at // 1000, n) for at, n in used]
        else:
            refused = None
        if refused:
            assert sum(n for at_s, n in counted if at_s > later_s - 61) + estimate <= 100
            continue
        spent = min(actual, estimate)
        rates.settle(hold, spent)
        used.append((now_ms, spent))
    for start, _ in used:
        assert sum(n for at, n in used if start <= at < start + 60_000) <= 100


def test_a_monotonic_clock_that_stalls_or_slips_is_harmless() -> None:
    rates, key = limiter(rpm=2)
    rates.admit(key, "m", 0, 10_000)
    rates.admit(key, "m", 0, 9_000)
    with pytest.raises(LimitExceeded):
        rates.admit(key, "m", 0, 8_000)


# ----- bounds


def chat(*parts: object, **members: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": list(parts) if parts else "hello"}], **members}


def image(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_text_is_bounded_by_its_bytes_and_overheads() -> None:
    row = INPUT_BOUNDS["openai"]
    assert input_token_bound(chat(), 500, "openai") == 500 + row.request + row.message
    tool = {"type": "function", "function": {"name": "f"}}
    with_tools = input_token_bound(chat(tools=[tool, tool]), 500, "openai")
    assert with_tools == 500 + row.request + row.message + row.tools + 2 * row.tool
    assert input_token_bound(chat(), 500) == 500 + DEAREST_BOUND.request + DEAREST_BOUND.message
    assert input_token_bound({"input": ["a", "b"]}, 20, "gemini") == 20 + INPUT_BOUNDS["gemini"].request


def test_images_take_their_maximum_in_place_of_their_bytes() -> None:
    plain = input_token_bound(chat(), 1000, "anthropic")
    assert input_token_bound(chat(image("https://example.com/a.png")), 1000, "anthropic") == plain + 8_500
    data = "data:image/png;base64," + "A" * 5000
    assert input_token_bound(chat(image(data)), 1000 + len(data), "anthropic") == plain + 8_500
    bare = {"type": "image_url", "image_url": "https://example.com/a.png"}
    assert input_token_bound(chat(bare), 1000, "anthropic") == plain + 8_500


def wav(sample_rate: int, codec: int = 1) -> dict[str, object]:
    head = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + codec.to_bytes(2, "little") + b"\1\0" + sample_rate.to_bytes(4, "little")
    return {"format": "wav", "data": base64.b64encode(head + bytes(40)).decode()}


@pytest.mark.parametrize(
    ("part", "is_bounded"),
    [
        ({"type": "text", "text": "x"}, True),
        ("x", True),
        ({"type": "input_audio", "input_audio": {"format": "mp3", "data": "SUQzAAAA"}}, True),
        ({"type": "input_audio", "input_audio": {"format": "mp3", "data": "ZkxhQw=="}}, False),
        ({"type": "input_audio", "input_audio": {"format": "flac", "data": "ZkxhQw=="}}, False),
        ({"type": "input_audio", "input_audio": {"format": "wav", "data": "\u00e9!"}}, False),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, False),
        ({"type": "input_audio"}, False),
        ({"type": "input_audio", "input_audio": wav(16_000)}, True),
        ({"type": "input_audio", "input_audio": wav(4000)}, True),
        ({"type": "input_audio", "input_audio": wav(1 << 24)}, True),
        ({"type": "input_audio", "input_audio": wav(3999)}, False),
        ({"type": "input_audio", "input_audio": {**wav(16_000), "data": "*" + str(wav(16_000)["data"])}}, False),
        ({"type": "input_audio", "input_audio": wav(16_000, codec=0xF1)}, False),
        ({"type": "file", "file": {"file_data": "data:text/plain;base64,AAAA"}}, True),
        ({"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA"}}, False),
        ({"type": "media", "media": {"file_data": "data:video/mp4;base64,AAAA"}}, False),
    ],
)
def test_parts_without_a_bound_take_the_models_window(part: object, is_bounded: bool) -> None:
    alone = input_token_bound(chat(part), 1000, "openai")
    plain = input_token_bound(chat(), 1000, "openai")
    assert alone == (plain if is_bounded else None)
    assert input_token_bound(chat(part), 1000, "openai", 128_000) == plain + (0 if is_bounded else 128_000)


@pytest.mark.parametrize(
    "request_body",
    [
        chat({"type": "file", "file": {"file_id": "file-1"}}),
        chat({"type": "file", "file": {"file_url": "https://x/y"}}),
        chat({"type": "file"}),
        chat({"type": "hologram"}),
        chat(tools=[{"type": "native", "tool": {}}]),
        chat(tools=["web_search"]),
        chat(extra_body={"gemini": {"cached_content": "cachedContents/1"}}),
        {"prompt": {"id": "pmpt_1"}},
        chat(extra_body={"responses": {"prompt": {"id": "pmpt_1"}}}),
        {
            "messages": [
                {"role": "assistant", "content": "", "thinking_blocks": [{"item": {"type": "computer_call_output"}}]}
            ]
        },
        *(chat(**{name: "x"}) for name in sorted(UNBOUNDED_MEMBERS)),
    ],
)
def test_what_is_fetched_from_elsewhere_has_no_bound(request_body: dict[str, object]) -> None:
    assert input_token_bound(request_body, 1000, "openai", 128_000) is None


@pytest.mark.parametrize(
    ("request_body", "terms"),
    [
        ({}, ("", False)),
        ({"service_tier": None, "extra_body": None}, ("", False)),
        ({"service_tier": "auto"}, ("service_tier=auto", False)),
        ({"service_tier": "flex"}, ("service_tier=flex", False)),
        ({"service_tier": "priority"}, ("service_tier=priority", True)),
        ({"serviceTier": {"type": "priority"}}, ("service_tier=priority", True)),
        ({"service_tier": "priority", "serviceTier": "flex"}, ("service_tier=priority", True)),
        ({"service_tier": "default", "extra_body": {"anthropic": {"speed": "fast"}}}, ("speed=fast", True)),
        ({"performanceConfig": {"latency": "optimized"}}, ("latency=optimized", True)),
        ({"speed": ["x" * 1000]}, ("speed=['" + "x" * 38, True)),
    ],
)
def test_terms_that_a_request_asks_for(request_body: dict[str, object], terms: tuple[str, bool]) -> None:
    assert asked_terms(request_body) == terms


def test_bounded_tools_and_empty_members_do_not_matter() -> None:
    tools = [{"type": kind} for kind in sorted(BOUNDED_TOOLS)]
    assert input_token_bound(chat(tools=tools, prediction=None, models=[], prompt="text"), 10)


def test_rerank_reads_its_query_for_each_document() -> None:
    plain = input_token_bound({}, 100)
    for odd in ({"documents": ["a"]}, {"query": "x"}, {"query": "x", "documents": 3}):
        assert input_token_bound(odd, 100) == plain
    assert input_token_bound({"query": 5, "documents": ["a", "b"]}, 100) == plain + 2
    assert input_token_bound({"query": "\u00e9x", "documents": ["a", "b"]}, 100) == plain + 6


@pytest.mark.parametrize("text", ["plain", "\u00e9\u4e2d\U0001f600", "\ufdfa" * 9, "\ufb03", "e\u0301"])
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_text_bytes_cover_what_normalising_tokenizers_see(text: str, ensure_ascii: bool) -> None:
    body = json.dumps({"input": text}, ensure_ascii=ensure_ascii).encode()
    seen = len(unicodedata.normalize("NFKC", text).encode())
    assert text_bytes(body, {"input": text}) >= max(seen, len(body))


def test_token_estimates() -> None:
    assert (token_estimate(400, 50), token_estimate(400, None), token_estimate(0, 0)) == (150, 356, 0)


FIELD = "max_completion_tokens"


@pytest.mark.parametrize(
    ("request_body", "model_max", "affordable", "cap"),
    [
        ({FIELD: 100}, 8000, None, (100, False, 100)),
        ({"max_tokens": 100}, 8000, None, (100, False, 100)),
        ({"max_output_tokens": 7}, None, None, (7, False, 7)),
        ({}, 8000, None, (8000, True, 8000)),
        ({}, None, None, (4096, True, 4096)),
        ({FIELD: 100, "n": 3}, 8000, None, (100, False, 300)),
        ({FIELD: 100, "n": 2, "best_of": 5}, None, None, (100, False, 500)),
        ({FIELD: 100}, None, 40, (40, True, 40)),
        ({FIELD: 100, "n": 3}, None, 50, (16, True, 48)),
        ({"n": 2}, 8000, 100_000, (8000, True, 16_000)),
        ({FIELD: 0}, 8000, None, (0, False, 0)),
        ({FIELD: 10, "max_tokens": 99}, None, None, (10, False, 10)),
        ({FIELD: None, "max_tokens": 9}, None, None, (9, False, 9)),
        ({FIELD: 100, "n": None}, None, None, (100, False, 100)),
        ({FIELD: 100, "n": 2, "prompt": ["a", "b", "c"]}, None, None, (100, False, 600)),
        ({FIELD: 100, "prompt": [1, 2, 3]}, None, None, (100, False, 100)),
    ],
)
def test_output_caps(request_body: dict, model_max: int | None, affordable: int | None, cap: tuple) -> None:
    assert output_token_cap(request_body, model_max, affordable) == cap


def test_a_provider_that_raises_a_cap_is_held_for_what_it_makes_of_it() -> None:
    assert output_token_cap({FIELD: 1, "n": 2}, None, None, 1024) == (1, False, 2048)
    assert output_token_cap({FIELD: 5000}, None, None, 1024) == (5000, False, 5000)


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 90}, 90),
        ({"inferenceConfig": {"maxTokens": 7}, "additionalModelRequestFields": {"max_tokens": 8}}, 8),
        ({"generationConfig": {"maxOutputTokens": 3, "candidateCount": 4}}, 12),
        ({"input": {"max_new_tokens": "250"}}, 250),
        ({"max_tokens": 5, "prompt": ["a", "b"], "n": 2}, 20),
        ({"max_tokens": 5, "prompt": ["a"]}, 5),
        ({"max_tokens": 5, "metadata": {"max_tokens": "900"}, "tools": [{"max_tokens": 900}]}, 5),
        ({"max_tokens": None, "n": 3}, None),
        ({"max_tokens": True}, None),
    ],
)
def test_what_an_outgoing_body_allows_is_read_wherever_it_stands(body: dict, tokens: int | None) -> None:
    assert output_allowed(body) == tokens


@pytest.mark.parametrize(
    "request_body", [{FIELD: "9"}, {FIELD: -1}, {FIELD: True}, {FIELD: 1.5}, {FIELD: 1 << 40}, {"n": 0}, {"n": []}]
)
def test_bad_caps_are_refused(request_body: dict) -> None:
    with pytest.raises(InvalidRequest) as caught:
        output_token_cap(request_body, None)
    assert output_token_cap({FIELD: (1 << 40) - 1}, None).tokens == (1 << 40) - 1
    assert caught.value.param in request_body
