"""What is kept, under which key, in which form; and equal calls under way that share one call to the provider."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from typing import Any

import openai
import pytest
from conftest import NOON_S, until
from test_gateway import call_of
from upstreams import COMPLETION, DONE, GOLDENS, STREAM, USAGE_EVENT, Answer, chunk, plain, stream

import stockyard as s

CHAT: dict[str, Any] = {"model": "gpt-4o-mini", "temperature": 0, "messages": [{"role": "user", "content": "Hello"}]}
STREAMED = {**CHAT, "stream": True}
WITH_USAGE = {**STREAMED, "stream_options": {"include_usage": True}}
PATH = "/v1/chat/completions"
TARGETS = [s.Target(s.configure_provider(s.PROVIDERS_BY_ID["openai"], {"OPENAI_API_KEY": "k"}), "gpt-4o-mini")]  # type: ignore[arg-type]


def key_of(request: dict[str, Any], scope: str = "", **changed: Any) -> bytes:
    given = {"place": "chat", "dialect": "openai", "targets": TARGETS, "headers": [], "redaction": "off", **changed}
    return s.cache_key(scope, request=request, **given)


# ----- Keys and policy


CHANGES: list[dict[str, Any]] = [
    {"model": "gpt-4o"}, {"temperature": 1}, {"top_p": 0.5}, {"seed": 1}, {"seed": 2}, {"max_tokens": 5}, {"max_completion_tokens": 5},
    {"stop": ["x"]}, {"presence_penalty": 1}, {"frequency_penalty": 1}, {"logit_bias": {"5": 1}}, {"logprobs": True},
    {"top_logprobs": 2}, {"user": "u"}, {"n": 2}, {"response_format": {"type": "json_object"}}, {"tool_choice": "none"},
    {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"tools": [{"type": "function", "function": {"name": "g"}}]},
    {"parallel_tool_calls": False}, {"reasoning_effort": "low"}, {"service_tier": "flex"}, {"metadata": {"a": "b"}},
    {"store": True}, {"an_unknown_member": 1}, {"messages": []},
    {"messages": [{"role": "user", "content": "Hello "}]}, {"messages": [{"role": "system", "content": "Hello"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
    {"messages": [*CHAT["messages"], {"role": "assistant", "content": "Hi"}]},
]  # fmt: skip


def test_every_changed_parameter_is_another_key() -> None:
    keys = [key_of(CHAT), *(key_of({**CHAT, **change}) for change in CHANGES)]
    assert len(set(keys)) == len(CHANGES) + 1


def test_place_target_headers_and_redaction_are_in_the_key() -> None:
    moved = s.configure_provider(s.PROVIDERS_BY_ID["openai"], {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://h/v1"})
    assert moved is not None
    keys = [
        key_of(CHAT), key_of(CHAT, place="completions"), key_of(CHAT, dialect="anthropic"), key_of(CHAT, redaction="mask"),
        key_of(CHAT, headers=[("openai-beta", "x")]), key_of(CHAT, targets=[s.Target(TARGETS[0].provider, "gpt-4o")]),
        key_of(CHAT, targets=[s.Target(moved, "gpt-4o-mini")]), key_of(CHAT, targets=TARGETS * 2),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)


def test_the_scope_is_in_the_key_and_cannot_be_imitated() -> None:
    assert key_of(CHAT, "key_a") != key_of(CHAT, "key_b") != key_of(CHAT)
    assert key_of({**CHAT, "scope": "key_a", "key_id": "key_a"}) != key_of(CHAT, "key_a")


def test_key_order_and_delivery_are_not_in_the_key() -> None:
    turned = {name: CHAT[name] for name in reversed(CHAT)}
    turned["messages"] = [{"content": "Hello", "role": "user"}]
    assert key_of(turned) == key_of(CHAT) == key_of(WITH_USAGE)


FUNCTION = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("kind", "change", "deterministic", "with_all"),
    [
        ("chat", {}, True, True),
        ("chat", {"temperature": 0.0}, True, True),
        ("chat", {"temperature": 0.1}, False, True),
        ("chat", {"temperature": None}, False, True),
        ("chat", {"temperature": 1, "seed": 7}, True, True),
        ("chat", {"temperature": 1, "seed": 0}, True, True),
        ("chat", {"store": False}, True, True),
        ("chat", {"store": True}, False, True),
        ("chat", {"n": 1}, True, True),
        ("chat", {"n": 2}, False, True),
        ("chat", {"tools": [FUNCTION]}, True, True),
        ("chat", {"tools": [FUNCTION, {"type": "web_search"}]}, False, True),
        ("chat", {"tools": [{"type": "native", "dialect": "anthropic", "tool": {}}]}, False, True),
        ("chat", {"web_search_options": {}}, False, True),
        ("chat", {"conversation": "conv_1"}, False, False),
        ("chat", {"background": True}, False, False),
        ("completions", {}, True, True),
        ("completions", {"temperature": 1}, False, True),
        ("embeddings", {"temperature": 1}, True, True),
        ("rerank", {}, False, True),
        ("count_tokens", {}, False, False),
    ],
)
def test_policy(kind: str, change: dict[str, Any], deterministic: bool, with_all: bool) -> None:
    request = {**CHAT, **change}
    assert s.is_cacheable("deterministic", kind, request, request) is deterministic
    assert s.is_cacheable("all", kind, request, request) is with_all
    assert s.is_cacheable("off", kind, request, request) is False


def test_a_dialect_that_stores_unasked_must_be_told_not_to() -> None:
    assert not s.is_cacheable("deterministic", "chat", CHAT, CHAT, stores_unasked=True)
    assert s.is_cacheable("deterministic", "chat", CHAT, {**CHAT, "store": False}, stores_unasked=True)


@pytest.mark.parametrize("name", ["mcp_servers", "web_search_options"])
def test_what_a_provider_does_beside_answering_counts_wherever_it_is_asked_for(name: str) -> None:
    busy = {**CHAT, name: [{}]}
    assert not s.is_cacheable("deterministic", "chat", CHAT, busy)
    assert not s.is_cacheable("deterministic", "chat", busy, CHAT)


# ----- Memory and disk


def entry(name: str, size: int = 100, expires_ms: int = 10_000, streamed: bool = False) -> s.Entry:
    return s.Entry(name.encode(), "key_a", streamed, expires_ms, "application/json", b"x" * size)


def test_memory_is_bounded_by_bytes_and_the_least_used_go_first() -> None:
    one = entry("0").size_bytes
    memory = s.CacheMemory(3 * one)
    for name in "abc":
        memory.put(entry(name))
    assert memory.get(s.slot_of(b"a", False), 0) is not None
    memory.put(entry("d", expires_ms=20_000))
    held = [name for name in "abcd" if memory.get(s.slot_of(name.encode(), False), 0)]
    assert (held, memory.size_bytes, memory.pushed_out_until_ms) == (["a", "c", "d"], 3 * one, 10_000)
    memory.put(entry("d", size=200))
    assert len(memory) == 2
    assert memory.size_bytes <= memory.max_bytes
    memory.clear()
    assert (len(memory), memory.size_bytes) == (0, 0)


def test_memory_forgets_what_has_expired() -> None:
    memory = s.CacheMemory(10_000)
    memory.put(entry("a"))
    assert memory.get(s.slot_of(b"a", False), 9_999) is not None
    assert memory.get(s.slot_of(b"a", False), 10_000) is None
    assert memory.size_bytes == 0


def test_an_entry_comes_back_from_disk_as_it_was() -> None:
    usage = s.Usage(input_tokens=5, output_tokens=3, reasoning_tokens=1)
    kept = s.Entry(
        b"k", "key_a", True, 5_000, "text/event-stream", b"before", b"usage", b"after", "openai", "m", usage, True, 77, "p1", "stop", ("x",)
    )  # fmt: skip
    restored = s.unpack_entry(kept.slot, kept.scope, kept.expires_ms, *kept.pack())
    assert restored == dataclasses.replace(kept, dropped=["x"])
    assert kept.events(True) == b"beforeusageafter"
    assert kept.size_bytes == len(b"beforeusageafter") + s.ENTRY_OVERHEAD_BYTES
    assert kept.events(False) == b"beforeafter"


def test_slots_are_those_of_earlier_databases() -> None:
    assert [s.slot_of(b"k", streamed) for streamed in (True, False)] == [b"ks", b"kp"]


def test_the_parts_of_a_tape() -> None:
    tape = s.Tape(100)
    assert tape.parts() == (b"", b"", b"")
    tape.add_usage(b"u")
    assert tape.parts() == (b"", b"u", b"")
    tape.add(b"")
    tape.add(b"a")
    tape.add(b"b")
    assert (tape.parts(), tape.pieces) == ((b"", b"u", b"ab"), [b"u", b"a", b"b"])
    unpaid = s.Tape(100)
    unpaid.add(b"a")
    unpaid.add(b"b")
    assert unpaid.parts() == (b"ab", b"", b"")
    unpaid.add_usage(b"")
    assert unpaid.parts() == (b"ab", b"", b"")


@pytest.mark.parametrize(
    ("more_bytes", "changes", "kept"), [(0, {}, "both"), (1, {}, "other"), (0, {"replaces_all": True}, "one")]
)
async def test_an_entry_may_have_its_share_of_the_cache(
    gateway: s.Gateway, monkeypatch: pytest.MonkeyPatch, more_bytes: int, changes: dict[str, bool], kept: str
) -> None:
    cache, later_ms = gateway.cache, int(NOON_S * 1000)
    other = entry("a", expires_ms=later_ms, streamed=True)
    cache.put(other, cache.generation)
    size = cache.entry_max_bytes - s.ENTRY_OVERHEAD_BYTES + more_bytes
    one = entry("a", size, later_ms)
    cache.put(one, cache.generation - 1)
    assert cache.memory.get(one.slot, 0) is None, "it was asked for before the cache was emptied"
    cache.put(one, cache.generation, **changes)
    await gateway.store.flush()
    assert cache.shelf is not None
    cache.shelf.holds_until_ms = later_ms
    forms = {"both": [True, False], "other": [True, True], "one": [False, False]}[kept]
    for is_anew in (False, True):
        found = []
        for streamed in (True, False):
            if is_anew:
                cache.memory.clear()
            told = cache.recall(b"a", streamed) or await cache.fetch(b"a", streamed)
            found.append(told is not None and told.stream)
            assert told is None or told is cache.memory.get(told.slot, 0)
        assert found == forms
    cache.memory.clear()
    monkeypatch.setattr(cache, "_now_ms", lambda: later_ms)
    assert await cache.fetch(b"a", True) is None


async def test_an_entry_that_the_disk_gives_while_the_cache_is_emptied_is_not_kept(
    gateway: s.Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, one, may_end, calls = gateway.cache, entry("a", expires_ms=int(NOON_S * 1000)), threading.Event(), []
    assert cache.shelf is not None
    cache.shelf.holds_until_ms = one.expires_ms
    begun, flush = threading.Event(), gateway.store.flush

    def find(*asked: Any) -> list[s.Entry]:
        begun.set()
        assert may_end.wait(20)
        return [one]

    async def flush_meanwhile() -> None:
        calls.append(asyncio.ensure_future(cache.fetch(b"a", False)))
        await until(begun.is_set)
        await flush()

    monkeypatch.setattr(cache.shelf, "find", find)
    monkeypatch.setattr(gateway.store, "flush", flush_meanwhile)
    await cache.clear()
    may_end.set()
    assert (await calls[0], len(cache.memory)) == (None, 0)


async def test_the_operator_sees_what_is_held_and_what_it_saved(gateway: s.Gateway) -> None:
    cache, one = gateway.cache, entry("a", expires_ms=int(NOON_S * 1000))
    fresh = await cache.view()
    names = (
        "entries",
        "bytes",
        "memory_entries",
        "memory_bytes",
        "in_flight",
        "hits",
        "misses",
        "coalesced",
        "saved_usd",
    )
    assert fresh == {
        "policy": "deterministic", "scope": "key", "ttl_s": 3600.0, "on_disk": True, "max_bytes": 256 * 1024 * 1024,
        "hit_ratio": None, **dict.fromkeys(names, 0),
    }  # fmt: skip
    cache.put(one, cache.generation)
    cache.put(entry("b", 50, one.expires_ms), cache.generation)
    cache.put(entry("c", expires_ms=1), cache.generation)
    for name in (b"bp", b"cp"):
        cache.memory.drop(name)
    cache.hits, cache.misses, cache.coalesced, cache.saved_nanousd = 1, 5, 2, 5 * 10**8
    size = one.size_bytes
    assert await cache.view() == {
        **fresh, "entries": 2, "bytes": 2 * size - 50, "memory_entries": 1, "memory_bytes": size,
        "hits": 1, "misses": 5, "coalesced": 2, "hit_ratio": 3 / 8, "saved_usd": 0.5,
    }  # fmt: skip


TRUNCATED = {"choices": [{"finish_reason": "stop"}, {"finish_reason": "length"}]}


@pytest.mark.parametrize(
    ("kind", "told", "n", "body", "whole"),
    [
        ("embeddings", "", None, {}, True),
        ("chat", "stop", None, {}, True),
        ("chat", "tool_calls", 1, {}, True),
        ("chat", "length", None, COMPLETION, False),
        ("chat", "content_filter", 1, COMPLETION, False),
        ("chat", "", None, COMPLETION, True),
        ("chat", "stop", 2, COMPLETION, True),
        ("chat", "stop", 2, {**COMPLETION, **TRUNCATED}, False),
        ("chat", "", None, {**COMPLETION, "choices": []}, False),
        ("chat", "", None, [], False),
        ("completions", "", None, {"choices": [{"text": "x", "finish_reason": "stop"}]}, True),
        ("completions", "", None, TRUNCATED, False),
        ("completions", "stop", 2, {"choices": [{"finish_reason": None}]}, False),
        ("completions", "", None, {"choices": 5}, False),
    ],
)
async def test_only_whole_answers_are_kept(
    gateway: s.Gateway, kind: str, told: str, n: int | None, body: Any, whole: bool
) -> None:
    call = call_of(gateway, kind, n=n)
    call.finish_reason, call.provider, call.upstream_model = told, "openai", "m"
    assert gateway.is_whole(call, s.dump_json(body)) is whole
    if told == "" and kind != "embeddings":
        assert gateway.is_whole(call, b"no JSON") is False


@pytest.mark.parametrize(("how", "counts"), [("hit", (1, 0)), ("coalesced", (0, 1))])
async def test_what_is_given_again_costs_nothing_and_saves_what_it_cost(
    gateway: s.Gateway, how: str, counts: tuple[int, int]
) -> None:
    first = call_of(gateway)
    first.provider, first.upstream_model, first.price_id, first.finish_reason = "openai", "up", "p1", "stop"
    first.usage, first.usage_estimated, first.cost_nanousd, first.dropped = s.Usage(1), True, 70, ["x"]
    kept = gateway.entry_of(first, b"key", "text/plain", b"b", b"u", b"t")
    assert (kept.key, kept.body, kept.usage_event, kept.tail, kept.content_type) == (
        b"key",
        b"b",
        b"u",
        b"t",
        "text/plain",
    )
    assert kept.expires_ms == NOON_S * 1000 + gateway.cache.ttl_ms == NOON_S * 1000 + 3_600_000
    call, cache = call_of(gateway), gateway.cache
    gateway.credit(call, kept, how)
    assert (call.cache, call.cost_nanousd, call.saved_nanousd, cache.saved_nanousd) == (how, 0, 70, 70)
    for name in ("provider", "upstream_model", "price_id", "finish_reason", "usage", "usage_estimated"):
        assert getattr(call, name) == getattr(first, name)
    assert (call.dropped, cache.hits, cache.coalesced) == (("x",), *counts)
    gateway.credit(call, dataclasses.replace(kept, cost_nanousd=None), how)
    assert (call.saved_nanousd, cache.saved_nanousd) == (0, 70)


def test_what_is_too_long_is_not_kept_while_it_passes() -> None:
    tape = s.Tape(10)
    tape.add(b"12345")
    tape.add_usage(b"67890")
    assert (tape.whole, tape.parts()) == (True, (b"12345", b"67890", b""))
    tape.add(b"1")
    tape.add(b"2")
    assert (tape.whole, [*tape.pieces]) == (False, [])


async def test_the_disk_is_bounded_and_keeps_the_newest(start: Any) -> None:
    async with start() as proxy:
        store = proxy.gateway.store
        shelf = s.CacheShelf(store, 100_000, 0)
        for number in range(40):
            shelf.put(entry(f"{number:02d}", size=5_000), 0)
            await store.flush()
            assert shelf.size(0)[1] <= 100_000
        assert shelf.find(s.slot_of(b"39", False), s.slot_of(b"39", True), 0)
        assert not shelf.find(s.slot_of(b"00", False), s.slot_of(b"00", True), 0)
        shelf.prune(10_000)
        await store.flush()
        assert store.read("SELECT COUNT(*) AS n FROM cache")[0]["n"] == 0


# ----- Hits


async def test_a_hit_costs_nothing_and_is_logged_as_one(start: Any) -> None:
    async with start() as proxy:
        first = await proxy.post(PATH, CHAT)
        again = await proxy.post(PATH, json.dumps({name: CHAT[name] for name in reversed(CHAT)}, indent=3).encode())
        assert first[2] == again[2] == COMPLETION
        assert (first[1]["x-stockyard-cache"], again[1]["x-stockyard-cache"]) == ("miss", "hit")
        assert (again[1]["x-stockyard-attempts"], again[1]["x-stockyard-cost-usd"]) == ("0", "0")
        assert again[1]["x-stockyard-provider"] == "openai"
        assert len(proxy.upstream.seen) == 1
        miss, hit = await proxy.rows()
        assert (miss["cache"], miss["attempts"], hit["cache"], hit["attempts"]) == ("miss", 1, "hit", 0)
        assert miss["cost_usd"] > 0
        assert (hit["cost_usd"], hit["price_id"], hit["finish_reason"]) == (0, miss["price_id"], "stop")
        assert [hit[name] for name in ("input_tokens", "cached_tokens", "output_tokens")] == [6, 4, 5]
        view = await proxy.gateway.cache.view()
        assert (view["hits"], view["misses"], view["entries"], view["hit_ratio"]) == (1, 1, 1, 0.5)
        assert view["saved_usd"] == pytest.approx(miss["cost_usd"])


async def test_random_calls_bypass_the_cache(start: Any) -> None:
    async with start() as proxy:
        for _ in range(2):
            _, headers, _ = await proxy.post(PATH, {**CHAT, "temperature": 1})
            assert headers["x-stockyard-cache"] == "bypass"
        assert len(proxy.upstream.seen) == 2
        assert (await proxy.gateway.cache.view())["misses"] == 0


async def test_embeddings_hit(start: Any) -> None:
    async with start() as proxy:
        body = {"model": "text-embedding-3-small", "input": "hi"}
        answers = [await proxy.post("/v1/embeddings", body) for _ in range(2)]
        assert [headers["x-stockyard-cache"] for _, headers, _ in answers] == ["miss", "hit"]
        assert answers[0][2] == answers[1][2]
        _, headers, _ = await proxy.post("/v1/embeddings", {**body, "input": "ho"})
        assert headers["x-stockyard-cache"] == "miss"


async def test_off_and_refresh(start: Any) -> None:
    async with start() as proxy:
        control = ["", "off", "refresh", ""]
        proxy.upstream.answers = [plain({**COMPLETION, "id": f"c{number}"}) for number in range(4)]
        told = [await proxy.post(PATH, CHAT, **({"x-stockyard-cache": word} if word else {})) for word in control]
        assert [headers["x-stockyard-cache"] for _, headers, _ in told] == ["miss", "bypass", "miss", "hit"]
        assert [body["id"] for _, _, body in told] == ["c0", "c1", "c2", "c2"]
        status, _, body = await proxy.post(PATH, CHAT, **{"x-stockyard-cache": "never"})
        assert (status, body["error"]["param"]) == (400, "x-stockyard-cache")
        assert all("x-stockyard-cache" not in seen.headers for seen in proxy.upstream.seen)


async def test_no_cache_where_it_is_off(start: Any) -> None:
    async with start(cache="off") as proxy:
        for _ in range(2):
            _, headers, _ = await proxy.post(PATH, CHAT)
            assert headers["x-stockyard-cache"] == "bypass"
        assert len(proxy.upstream.seen) == 2


async def test_entries_expire(start: Any) -> None:
    async with start(cache_ttl=60) as proxy:
        clock = [1_790_000_000.0]
        proxy.gateway.clock = lambda: clock[0]
        proxy.gateway.cache._now_ms = lambda: int(clock[0] * 1000)
        told = []
        for step_s in (0, 59, 2, 0):
            clock[0] += step_s
            told.append((await proxy.post(PATH, CHAT))[1]["x-stockyard-cache"])
        assert told == ["miss", "hit", "miss", "hit"]


async def test_hits_survive_a_restart(start: Any) -> None:
    async with start() as proxy:
        url = proxy.upstream.url
        await proxy.post(PATH, CHAT)
        await proxy.post(PATH, {**WITH_USAGE, "seed": 1})
    async with start(OPENAI_BASE_URL=url) as proxy:
        _, headers, body = await proxy.post(PATH, CHAT)
        assert (headers["x-stockyard-cache"], body) == ("hit", COMPLETION)
        _, headers, events = await proxy.post(PATH, {**STREAMED, "seed": 1})
        assert headers["x-stockyard-cache"] == "hit"
        assert events == b"".join(STREAM[:4]) + DONE
        assert proxy.upstream.seen == []
        rows = await proxy.rows()
        assert [row["output_tokens"] for row in rows] == [5, 5, 5, 5]
        assert (await proxy.gateway.cache.view())["entries"] == 2


@pytest.mark.parametrize("asked", [CHAT, STREAMED], ids=["as it came", "in the other form"])
async def test_the_disk_gives_an_answer_in_either_form_and_memory_then_has_it(
    start: Any, asked: dict[str, Any]
) -> None:
    async with start() as proxy:
        url = proxy.upstream.url
        await proxy.post(PATH, CHAT)
    async with start(OPENAI_BASE_URL=url) as proxy:
        for is_there in (False, True):
            assert (len(proxy.gateway.cache.memory) > 0) == is_there
            assert (await proxy.post(PATH, asked))[1]["x-stockyard-cache"] == "hit"
    async with start() as proxy:  # there is something on the disk, but nothing of this provider
        status, headers, _ = await proxy.post(PATH, asked)
        assert (status, headers["x-stockyard-cache"], len(proxy.upstream.seen)) == (200, "miss", 1)


async def test_bodies_that_are_not_logged_are_not_kept_on_disk(start: Any) -> None:
    async with start(log_bodies="none") as proxy:
        await proxy.post(PATH, CHAT)
        assert (await proxy.post(PATH, CHAT))[1]["x-stockyard-cache"] == "hit"
        await proxy.gateway.store.flush()
        assert proxy.gateway.store.read("SELECT COUNT(*) AS n FROM cache")[0]["n"] == 0


async def test_no_answer_crosses_keys(start: Any) -> None:
    async with start() as proxy:
        keys = [proxy.gateway.create_key({"name": name})[1] for name in ("a", "b")]
        told = []
        for secret in (keys[0], keys[1], keys[0], keys[1]):
            told.append((await proxy.post(PATH, CHAT, authorization=f"Bearer {secret}"))[1]["x-stockyard-cache"])
        assert told == ["miss", "miss", "hit", "hit"]


async def test_keys_share_where_they_are_told_to_and_a_key_gets_only_its_models(start: Any) -> None:
    async with start(cache_scope="shared") as proxy:
        free = proxy.gateway.create_key({"name": "a"})[1]
        bound = proxy.gateway.create_key({"name": "b", "models": ["gpt-4o"]})[1]
        told = [await proxy.post(PATH, CHAT, authorization=f"Bearer {secret}") for secret in (free, free, bound)]
        assert [headers["x-stockyard-cache"] for _, headers, _ in told][:2] == ["miss", "hit"]
        assert told[2][0] in (403, 404)


async def test_the_admin_empties_the_cache(start: Any) -> None:
    async with start(cache_mb=2) as proxy:
        admin = {"authorization": f"Bearer {proxy.gateway.admin_key}"}
        await proxy.post(PATH, CHAT)
        async with proxy.session.get(proxy.url + "/api/cache") as answer:
            assert answer.status == 401
        async with proxy.session.get(proxy.url + "/api/cache", headers=admin) as answer:
            view = await answer.json()
            assert (view["entries"], view["policy"], view["scope"]) == (1, "deterministic", "key")
            assert view["max_bytes"] == 2 * 1024 * 1024
            assert (view["ttl_s"], view["on_disk"]) == (3600, True)
        async with proxy.session.delete(proxy.url + "/api/cache", headers=admin) as answer:
            assert await answer.json() == {"deleted": 1}
        assert (await proxy.post(PATH, CHAT))[1]["x-stockyard-cache"] == "miss"


@pytest.mark.parametrize("meanwhile", [False, True], ids=["ends later", "ends meanwhile"])
async def test_what_is_under_way_while_the_cache_is_emptied_is_not_kept(
    start: Any, meanwhile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start() as proxy:
        cache = proxy.gateway.cache
        go = asyncio.Event()
        proxy.upstream.answers = [plain(COMPLETION), dataclasses.replace(plain(COMPLETION), go=go), plain(COMPLETION)]
        await proxy.post(PATH, CHAT)
        slow = asyncio.create_task(proxy.post(PATH, {**CHAT, "seed": 2}))
        await until(lambda: len(proxy.upstream.seen) == 2)
        flush = proxy.gateway.store.flush

        async def end_and_flush(*given: Any) -> None:
            go.set()
            await slow
            await flush(*given)

        if meanwhile:
            monkeypatch.setattr(proxy.gateway.store, "flush", end_and_flush)
        await cache.clear()
        assert proxy.gateway.store.read("SELECT COUNT(*) AS n FROM cache")[0]["n"] == 0
        go.set()
        assert (await slow)[1]["x-stockyard-cache"] == "miss"
        assert (await cache.view())["entries"] == 0
        assert (await proxy.post(PATH, {**CHAT, "seed": 2}))[1]["x-stockyard-cache"] == "miss"


async def test_one_answer_asked_for_by_number_is_kept(start: Any) -> None:
    async with start() as proxy:
        assert [(await proxy.post(PATH, {**CHAT, "n": 1}))[1]["x-stockyard-cache"] for _ in range(2)] == ["miss", "hit"]


# ----- What is never kept


@pytest.mark.parametrize("finish", ["length", "content_filter", None])
async def test_truncated_and_filtered_answers_are_not_kept(start: Any, finish: str | None) -> None:
    async with start() as proxy:
        choice = {**COMPLETION["choices"][0], "finish_reason": finish}
        proxy.upstream.answers = [plain({**COMPLETION, "choices": [choice]})]
        assert [(await proxy.post(PATH, CHAT))[1]["x-stockyard-cache"] for _ in range(2)] == ["miss", "miss"]
        proxy.upstream.answers = [stream([chunk({"content": "a"}), chunk({}, finish), USAGE_EVENT, DONE])]
        assert [(await proxy.post(PATH, STREAMED))[1]["x-stockyard-cache"] for _ in range(2)] == ["miss", "miss"]


@pytest.mark.parametrize(("last", "again"), [("stop", "hit"), ("length", "miss"), (None, "miss")])
@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
async def test_one_truncated_answer_of_several_is_enough(start: Any, path: str, last: Any, again: str) -> None:
    async with start(cache="all") as proxy:
        head = {"text": "Hi"} if path != PATH else {"message": COMPLETION["choices"][0]["message"]}
        choices = [{**head, "index": at, "finish_reason": end} for at, end in enumerate(("stop", last))]
        proxy.upstream.answers = [plain({**COMPLETION, "choices": choices})]
        body = {**CHAT, "prompt": "Hi", "n": 2}
        del body["messages" if path != PATH else "prompt"]
        assert [(await proxy.post(path, body))[1]["x-stockyard-cache"] for _ in range(2)] == ["miss", again]


async def test_errors_and_broken_streams_are_not_kept(start: Any) -> None:
    async with start(retries=0) as proxy:
        for status in (400, 429, 500):
            proxy.upstream.answers = [plain({"error": {"message": "no"}}, status), plain(COMPLETION)]
            told = [await proxy.post(PATH, {**CHAT, "seed": status}) for _ in range(2)]
            assert [answer[0] for answer in told] == [status, 200]
            assert told[1][1]["x-stockyard-cache"] == "miss"
        proxy.upstream.answers = [stream(STREAM[:3], cut=True), stream(STREAM)]
        broken = (await proxy.post(PATH, STREAMED))[2]
        assert b"[DONE]" not in broken
        _, headers, whole = await proxy.post(PATH, STREAMED)
        assert headers["x-stockyard-cache"] == "miss"
        assert whole.endswith(DONE)


async def test_an_answer_too_large_is_passed_on_and_not_kept(start: Any) -> None:
    async with start(cache_mb=1) as proxy:
        text = "x" * 30_000
        pieces = [chunk({"content": text}) for _ in range(4)]
        proxy.upstream.answers = [stream([*pieces, chunk({}, "stop"), DONE])]
        for _ in range(2):
            _, headers, events = await proxy.post(PATH, STREAMED)
            assert headers["x-stockyard-cache"] == "miss"
            assert events.count(text.encode()) == 4


# ----- Plain and streamed


async def test_a_stream_is_replayed_as_it_came(start: Any) -> None:
    async with start() as proxy:
        first = await proxy.post(PATH, STREAMED)
        again = await proxy.post(PATH, STREAMED)
        asked = await proxy.post(PATH, WITH_USAGE)
        assert first[2] == again[2] == b"".join(STREAM[:4]) + DONE
        assert again[1]["x-stockyard-cache"] == asked[1]["x-stockyard-cache"] == "hit"
        assert again[1]["content-type"] == first[1]["content-type"]
        usage = json.loads(asked[2].split(b"\n\n")[4].removeprefix(b"data: "))["usage"]
        assert (usage["completion_tokens"], usage["cost"]) == (5, 0)
        assert len(proxy.upstream.seen) == 1
        rows = await proxy.rows()
        found = s.find_request(proxy.gateway.store, rows[1]["id"])
        assert found is not None
        assert found["response"]["choices"][0]["message"]["content"] == 'Hello "there" \u00e9\u4e2d'


TOOL_CHUNKS = [
    chunk({"role": "assistant", "content": None, "tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]}),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}),
    chunk({}, "tool_calls"),
    USAGE_EVENT,
    DONE,
]  # fmt: skip


def official(proxy: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=proxy.url + "/v1", api_key="any", max_retries=0)


async def gather(client: openai.AsyncOpenAI, **more: Any) -> Any:
    """A streamed call through the SDK, put together by the SDK itself."""
    async with client.chat.completions.stream(**{**CHAT, **more}) as events:
        return await events.get_final_completion()


@pytest.mark.parametrize("pieces", [STREAM, TOOL_CHUNKS], ids=["text", "tools"])
async def test_the_sdk_sees_the_same_answer_streamed_and_plain(start: Any, pieces: list[bytes]) -> None:
    async with start() as proxy, official(proxy) as client:
        proxy.upstream.answers = [stream(pieces)]
        streamed = await gather(client, stream_options={"include_usage": True})
        answer = await client.chat.completions.create(**CHAT)
        [told], [said] = answer.choices, streamed.choices
        assert (told.message.content, told.finish_reason) == (said.message.content, said.finish_reason)
        calls = [
            [(call.id, call.function.arguments) for call in m.tool_calls or []] for m in (told.message, said.message)
        ]
        assert calls[0] == calls[1]
        assert (answer.id, answer.model, answer.usage.total_tokens) == (streamed.id, streamed.model, 15)
        assert answer.object == "chat.completion"
        assert len(proxy.upstream.seen) == 1


async def test_the_sdk_sees_the_same_answer_plain_and_streamed(start: Any) -> None:
    async with start() as proxy, official(proxy) as client:
        calls = [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
        messages: list[dict[str, Any]] = [
            {"content": "Hello there", "refusal": None, "annotations": []},
            {"content": None, "tool_calls": calls},
        ]
        for message in messages:
            choice = {
                "index": 0,
                "message": {"role": "assistant", **message},
                "logprobs": None,
                "finish_reason": "stop",
            }
            proxy.upstream.answers = [plain({**COMPLETION, "choices": [choice]})]
            seed = len(proxy.upstream.seen)
            answer = await client.chat.completions.create(**CHAT, seed=seed)
            streamed = await gather(client, seed=seed, stream_options={"include_usage": True})
            assert streamed.choices[0].message.content == answer.choices[0].message.content
            names = [[call.function.name for call in a.choices[0].message.tool_calls or []] for a in (answer, streamed)]
            assert names[0] == names[1]
            assert (streamed.id, streamed.usage.total_tokens) == (answer.id, 15)
            assert len(proxy.upstream.seen) == seed + 1
        raw = (await proxy.post(PATH, {**STREAMED, "seed": 0}))[2]
        assert b'"usage"' not in raw
        assert raw.endswith(DONE)


async def test_a_converted_stream_tells_usage_to_those_who_ask(start: Any) -> None:
    async with start() as proxy:
        await proxy.post(PATH, CHAT)
        told = [(await proxy.post(PATH, body))[2] for body in (STREAMED, WITH_USAGE, STREAMED)]
        assert [events.count(b'"usage"') for events in told] == [0, 1, 0]
        assert all(events.endswith(DONE) for events in told)
        assert told[0] == told[2]
        assert len(proxy.upstream.seen) == 1


async def test_a_translated_stream_is_replayed_as_it_came_but_free_of_charge(start: Any) -> None:
    async with start(ANTHROPIC_API_KEY="k", ANTHROPIC_BASE_URL="UPSTREAM") as proxy:
        proxy.upstream.answers = [stream(GOLDENS["anthropic"].pieces)]
        asked = {**WITH_USAGE, "model": "claude-sonnet-4-5"}
        told = [(await proxy.post(PATH, body))[2] for body in (asked, asked, {**asked, "stream_options": None})]
        live, again, without = [
            [json.loads(block[6:]) for block in events.split(b"\n\n") if block[6:7] == b"{"] for events in told
        ]
        assert len(proxy.upstream.seen) == 1
    assert live[-1]["usage"].pop("cost") > again[-1]["usage"].pop("cost") == 0
    assert live == again
    assert without == again[:-1]
    assert all(events.endswith(DONE) for events in told)


async def test_an_answer_of_unknown_cost_saves_nothing(start: Any) -> None:
    async with start() as proxy:
        how = [(await proxy.post(PATH, {**CHAT, "model": "openai/unpriced"}))[1]["x-stockyard-cache"] for _ in range(2)]
        assert (how, (await proxy.gateway.cache.view())["saved_usd"]) == (["miss", "hit"], 0)


async def test_a_refresh_replaces_both_forms(start: Any) -> None:
    async with start() as proxy:
        await proxy.post(PATH, STREAMED)
        proxy.upstream.answers = [plain({**COMPLETION, "id": "fresh"})]
        await proxy.post(PATH, CHAT, **{"x-stockyard-cache": "refresh"})
        events = (await proxy.post(PATH, STREAMED))[2]
        assert b'"id":"fresh"' in events
        await proxy.gateway.store.flush()
        assert proxy.gateway.store.read("SELECT COUNT(*) AS n FROM cache")[0]["n"] == 1


async def test_what_cannot_be_told_in_the_other_form_is_a_miss(start: Any) -> None:
    async with start() as proxy:
        audio = chunk({"audio": {"id": "a", "data": "AAAA"}})
        proxy.upstream.answers = [stream([audio, chunk({}, "stop"), DONE]), plain(COMPLETION)]
        told = [(await proxy.post(PATH, body))[1]["x-stockyard-cache"] for body in (STREAMED, CHAT, STREAMED, CHAT)]
        assert told == ["miss", "miss", "hit", "hit"]


MESSAGES = {"model": "gpt-4o-mini", "temperature": 0, "max_tokens": 50, "messages": CHAT["messages"]}


async def test_other_dialects_are_kept_in_their_own_words(start: Any) -> None:
    async with start() as proxy:
        plain_answer = await proxy.post("/v1/messages", MESSAGES)
        hits = [await proxy.post("/v1/messages", body) for body in (MESSAGES, {**MESSAGES, "stream": True})]
        assert plain_answer[2]["content"][0]["text"] == "Hello there"
        assert hits[0][2] == plain_answer[2]
        assert [headers["x-stockyard-cache"] for _, headers, _ in hits] == ["hit", "hit"]
        assert b"Hello there" in hits[1][2]
        assert hits[1][2].endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
        assert (await proxy.post(PATH, {**CHAT, "max_tokens": 50}))[1]["x-stockyard-cache"] == "miss"
        live = await proxy.post("/v1/messages", {**MESSAGES, "stream": True, "max_tokens": 60})
        again = await proxy.post("/v1/messages", {**MESSAGES, "stream": True, "max_tokens": 60})
        assert again[1]["x-stockyard-cache"] == "hit"
        assert b'"cost":0}' in again[2]
        assert b'"cost":0}' not in live[2]
        whole = await proxy.post("/v1/messages", {**MESSAGES, "max_tokens": 60})
        assert whole[1]["x-stockyard-cache"] == "hit"
        assert whole[2]["content"][0]["text"] == 'Hello "there" \u00e9\u4e2d'
        assert len(proxy.upstream.seen) == 3


# ----- Equal calls under way


def on_board(proxy: Any) -> list[int]:
    """How many calls each flight carries."""
    return [len(flight._riders) for flight in proxy.gateway.cache.flights.values()]


async def fly(proxy: Any, calls: list[Any], *flights: tuple[Answer, list[int]]) -> list[tuple[int, Any, Any]]:
    """What calls are told when each answer begins only once its flights have so many calls on board."""
    begins = [asyncio.Event() for _ in flights]
    proxy.upstream.answers = [
        dataclasses.replace(answer, begin=begin) for begin, (answer, _) in zip(begins, flights, strict=True)
    ]
    tasks = [asyncio.ensure_future(call) for call in calls]
    for begin, (_, counts) in zip(begins, flights, strict=True):
        await until(lambda counts=counts: on_board(proxy) == counts)
        begin.set()
    return await asyncio.gather(*tasks)


async def test_fifty_equal_calls_make_one(start: Any) -> None:
    async with start() as proxy:
        told = await fly(proxy, [proxy.post(PATH, CHAT) for _ in range(50)], (plain(COMPLETION), [50]))
        assert len(proxy.upstream.seen) == 1
        assert {answer[0] for answer in told} == {200}
        assert all(answer[2] == COMPLETION for answer in told)
        how = sorted(answer[1]["x-stockyard-cache"] for answer in told)
        assert how == ["coalesced"] * 49 + ["miss"]
        view = await proxy.gateway.cache.view()
        assert (view["coalesced"], view["misses"], view["hit_ratio"]) == (49, 1, 0.98)
        assert len({answer[1]["x-stockyard-request-id"] for answer in told}) == 50
        rows = await proxy.rows()
        assert len(rows) == 50
        assert sum(row["cost_usd"] > 0 for row in rows) == 1
        assert {row["output_tokens"] for row in rows} == {5}
        assert proxy.gateway.cache.flights == {}


async def test_fifty_equal_streams_make_one_and_late_ones_get_it_from_its_start(start: Any) -> None:
    async with start() as proxy:
        go = asyncio.Event()
        proxy.upstream.answers = [stream(STREAM, go=go)]
        calls = [asyncio.ensure_future(proxy.post(PATH, STREAMED))]
        await until(lambda: any(flight._tape.pieces for flight in proxy.gateway.cache.flights.values()))
        calls += [asyncio.ensure_future(proxy.post(PATH, STREAMED)) for _ in range(49)]
        await until(lambda: on_board(proxy) == [50])
        go.set()
        told = await asyncio.gather(*calls)
        assert len(proxy.upstream.seen) == 1
        assert {answer[2] for answer in told} == {b"".join(STREAM[:4]) + DONE}
        how = sorted(answer[1]["x-stockyard-cache"] for answer in told)
        assert how[-1] == "miss"
        assert set(how[:-1]) == {"coalesced"}
        rows = await proxy.rows()
        assert {row["finish_reason"] for row in rows} == {"stop"}
        assert all(row["first_token_ms"] > 0 for row in rows)
        bodies = [s.find_request(proxy.gateway.store, row["id"])["response"] for row in rows]  # type: ignore[index]
        assert {body["choices"][0]["message"]["content"] for body in bodies} == {'Hello "there" \u00e9\u4e2d'}


async def test_calls_of_two_keys_are_not_shared(start: Any) -> None:
    async with start() as proxy:
        keys = [proxy.gateway.create_key({"name": name})[1] for name in ("a", "b")]
        calls = [proxy.post(PATH, CHAT, authorization=f"Bearer {secret}") for secret in keys * 3]
        await fly(proxy, calls, (plain(COMPLETION), [3, 3]))
        assert len(proxy.upstream.seen) == 2


@pytest.mark.parametrize("body", [CHAT, STREAMED], ids=["plain", "stream"])
async def test_a_leaders_failure_is_not_shared(start: Any, body: dict[str, Any]) -> None:
    async with start(retries=0) as proxy:
        failed, whole = (
            plain({"error": {"message": "no"}}, 500),
            stream(STREAM) if body is STREAMED else plain(COMPLETION),
        )
        told = await fly(proxy, [proxy.post(PATH, body) for _ in range(10)], (failed, [10]), (whole, [9]))
        assert sorted(answer[0] for answer in told) == [200] * 9 + [500]
        assert len(proxy.upstream.seen) == 2
        assert sorted(row["cache"] for row in await proxy.rows()) == ["coalesced"] * 8 + ["miss"] * 2


async def test_a_second_failure_is_believed(start: Any) -> None:
    async with start(retries=0) as proxy:
        failed = plain({"error": {"message": "no"}}, 503)
        told = await fly(proxy, [proxy.post(PATH, CHAT) for _ in range(20)], (failed, [20]), (failed, [19]))
        assert {answer[0] for answer in told} == {503}
        assert len(proxy.upstream.seen) == 2
        assert len(await proxy.rows()) == 20


async def test_a_stream_that_breaks_after_content_breaks_for_all(start: Any) -> None:
    async with start(retries=0) as proxy:
        told = await fly(proxy, [proxy.post(PATH, STREAMED) for _ in range(5)], (stream(STREAM[:3], cut=True), [5]))
        assert len(proxy.upstream.seen) == 1
        for _, headers, events in told:
            assert b"upstream_truncated" in events
            assert headers["x-stockyard-request-id"].encode() in events
            assert b"[DONE]" not in events


@pytest.mark.parametrize("body", [CHAT, STREAMED], ids=["plain", "stream"])
async def test_a_leaders_hang_up_does_not_end_the_others(start: Any, body: dict[str, Any]) -> None:
    async with start() as proxy:
        answer, go = stream(STREAM) if body is STREAMED else plain(COMPLETION), asyncio.Event()
        proxy.upstream.answers = [dataclasses.replace(answer, go=go)]
        leader = asyncio.create_task(proxy.post(PATH, body))
        await until(lambda: proxy.upstream.seen)
        [flight] = proxy.gateway.cache.flights.values()
        others = [asyncio.create_task(proxy.post(PATH, body)) for _ in range(5)]
        await until(lambda: proxy.gateway.in_flight == 6)
        leader.cancel()
        await until(lambda: flight.leader.is_carried)
        go.set()
        told = await asyncio.gather(*others)
        assert {answer[0] for answer in told} == {200}
        assert {answer[1]["x-stockyard-cache"] for answer in told} == {"coalesced"}
        assert (len(proxy.upstream.seen), proxy.upstream.hung_up) == (1, 0)
        rows = await proxy.rows()
        [gone] = [row for row in rows if row["status"] == 499]
        assert (gone["cache"], gone["attempts"], gone["output_tokens"], len(rows)) == ("miss", 1, 5, 6)
        assert gone["cost_usd"] > 0
        assert proxy.gateway.in_flight == 0
        assert (await proxy.post(PATH, body))[1]["x-stockyard-cache"] == "hit"


@pytest.mark.parametrize("body", [CHAT, STREAMED], ids=["plain", "stream"])
async def test_the_last_to_hang_up_ends_the_call(start: Any, body: dict[str, Any]) -> None:
    async with start() as proxy:
        proxy.upstream.answers = [stream(STREAM, hang_s=20)]
        riders = [asyncio.create_task(proxy.post(PATH, body)) for _ in range(3)]
        await until(lambda: proxy.upstream.seen and proxy.gateway.in_flight == 3)
        for rider in riders:
            rider.cancel()
        await until(lambda: proxy.upstream.hung_up and not proxy.gateway.in_flight)
        assert proxy.upstream.hung_up == 1
        rows = await proxy.rows()
        assert [row["status"] for row in rows] == [499] * 3
        assert proxy.gateway.cache.flights == {}


async def test_a_refresh_does_not_join_what_began_before(start: Any) -> None:
    async with start() as proxy:
        go = asyncio.Event()
        slow = dataclasses.replace(plain({**COMPLETION, "id": "a"}), go=go)
        proxy.upstream.answers = [slow, plain({**COMPLETION, "id": "b"})]
        first = asyncio.create_task(proxy.post(PATH, CHAT))
        await until(lambda: proxy.upstream.seen)
        fresh = await proxy.post(PATH, CHAT, **{"x-stockyard-cache": "refresh"})
        go.set()
        assert (fresh[2]["id"], (await first)[2]["id"]) == ("b", "a")
        assert len(proxy.upstream.seen) == 2


class SlowClient:
    """A client that is full after its first piece until it is told to go on."""

    def __init__(self, is_quick: bool = False) -> None:
        self.throttle: Any = None
        self.is_quick = is_quick
        self.got: list[bytes] = []
        self.began = 0

    def begin_stream(self, headers: list[tuple[str, str]]) -> None:
        self.began += 1

    def send(self, data: bytes) -> None:
        self.got.append(data)
        if self.throttle is not None and not self.is_quick:
            self.throttle(True)

    def end_stream(self) -> None:
        raise AssertionError("a flight leaves the end to its riders")


async def test_a_slow_rider_waits_alone_until_it_is_too_far_behind(start: Any) -> None:
    async with start() as proxy:
        gateway = proxy.gateway
        held: list[bool] = []
        calls = [gateway.begin(s.HOT_ENDPOINTS[PATH], {}, b"{}", "") for _ in range(2)]
        flight = s.Flight(gateway, calls[0], (b"k", b""))
        flight.throttle = held.append
        landing = asyncio.Event()

        async def work() -> None:
            await landing.wait()

        flight.start(work())
        slow, quick = SlowClient(), SlowClient(is_quick=True)
        rides = [
            asyncio.create_task(flight.ride(s.Rider(call, client)))
            for call, client in zip(calls, (quick, slow), strict=True)
        ]
        await asyncio.sleep(0)
        for piece in (b"a", b"b", b"c"):
            flight.send(piece)
        assert (quick.got, slow.got, held) == ([b"a", b"b", b"c"], [b"a"], [])
        slow.throttle(False)
        assert slow.got == [b"a", b"b"]
        flight.send(b"x" * (flight.BEHIND_MAX_BYTES + 1))
        assert held == [True]
        landing.set()
        await asyncio.gather(*rides)
        assert (b"".join(slow.got), slow.began) == (b"".join(quick.got), 1)


@pytest.mark.parametrize("rule", ['system_prefix = "{}"', 'headers = {{"x-title" = "{}"}}'])
@pytest.mark.parametrize("path", [PATH, "/v1/messages"])
async def test_an_answer_under_other_rules_of_its_route_is_not_given(start: Any, path: str, rule: str) -> None:
    """Rules of a route change the question, which the client's own body does not show."""
    request = {"model": "house", "max_tokens": 9, "temperature": 0, "messages": [{"role": "user", "content": "Hi"}]}
    route = f'[routes.house]\ntargets = ["openai/gpt-4o-mini"]\n{rule}\n'
    seen = []
    async with start(toml=route.format("Be brief.")) as proxy:
        gateway = proxy.gateway
        for prefix in ("Be brief.", "Be long.", "Be long."):
            settings = s.read_settings({"data_dir": gateway.settings.data_dir}, {}, route.format(prefix))
            s.prepare_settings(gateway, settings, gateway.environment)()
            _, headers, _ = await proxy.post(path, request)
            seen.append(headers["x-stockyard-cache"])
    assert seen == ["miss", "miss", "hit"]


async def test_a_shared_cache_is_not_for_keys_with_provider_keys_of_their_own(start: Any) -> None:
    request = {"model": "gpt-4o-mini", "temperature": 0, "messages": [{"role": "user", "content": "Hi"}]}
    own = {"provider_keys": {"openai": {"env": "OPENAI_API_KEY"}}}
    async with start(cache_scope="shared", require_key="always") as proxy:
        seen = []
        for members in ({"name": "a"}, {"name": "b"}, {"name": "c", **own}, {"name": "d", **own}):
            secret = proxy.gateway.create_key(members)[1]
            _, headers, _ = await proxy.post(PATH, request, authorization=f"Bearer {secret}")
            seen.append(headers["x-stockyard-cache"])
    assert seen == ["miss", "hit", "miss", "miss"]


async def test_guardrails_that_judge_no_answers_leave_the_cache_on(start: Any) -> None:
    request = {"model": "gpt-4o-mini", "temperature": 0, "messages": [{"role": "user", "content": "Hi"}]}
    async with start(guard_secrets="block") as proxy:
        seen = [(await proxy.post(PATH, request))[1]["x-stockyard-cache"] for _ in range(2)]
    assert seen == ["miss", "hit"]
