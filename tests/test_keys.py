"""Whose provider key a call uses: the operator's, one that its virtual key names, or the one its client brought."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import Start, until
from upstreams import COMPLETION, GOLDENS, plain, stream

import stockyard

CHAT: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
CHAT_PATH = "/v1/chat/completions"


async def make_key(proxy: Any, **body: Any) -> dict[str, Any]:
    admin = {"authorization": f"Bearer {proxy.gateway.admin_key}"}
    status, _, told = await proxy.post("/api/keys", body, **admin)
    assert status == 201, told
    return {"authorization": f"Bearer {told['key']}"}


def sent_keys(proxy: Any) -> list[str]:
    return [seen.headers.get("authorization", "").removeprefix("Bearer ") for seen in proxy.upstream.seen]


async def test_a_virtual_keys_own_provider_key_is_used_everywhere_and_never_replaced(start: Start) -> None:
    toml = '[routes.both]\ntargets = ["openai/gpt-4o-mini"]\nshadow = ["openai/gpt-4.1-mini"]\nshadow_fraction = 1.0\n'
    async with start(toml=toml, TEAM_KEY="sk-canary-team") as proxy:
        team = await make_key(proxy, provider_keys={"openai": {"env": "TEAM_KEY"}})
        proxy.upstream.answers = [plain(COMPLETION)]
        for path, body in (
            (CHAT_PATH, CHAT), (CHAT_PATH, {**CHAT, "stream": True}), (CHAT_PATH, {**CHAT, "model": "both"}),
            ("/v1/responses", {"model": "gpt-4o-mini", "input": "x"}), ("/proxy/openai/v1/chat/completions", CHAT),
            ("/v1/batches", {"input_file_id": "x"}),
        ):  # fmt: skip
            await proxy.post(path, body, **team, **{"x-stockyard-provider": "openai"} if "batches" in path else {})
        await proxy.gateway.store.flush()
        assert len(sent_keys(proxy)) >= 7
        assert set(sent_keys(proxy)) == {"sk-canary-team"}
        proxy.upstream.seen.clear()
        proxy.gateway.environment = {}
        for path in (CHAT_PATH, "/proxy/openai/v1/chat/completions"):
            status, _, told = await proxy.post(path, CHAT, **team)
            assert (status, told["error"]["code"]) == (403, "provider_key_unusable")
            assert "TEAM_KEY is not set" in told["error"]["message"]
        assert proxy.upstream.seen == []
        assert all("canary" not in str(row) for row in await proxy.rows())


async def test_a_literal_in_an_older_database_is_refused_and_not_told(start: Start, tmp_path: Path) -> None:
    async with start() as proxy:
        team = await make_key(proxy)
        proxy.gateway.store.put_write(
            "UPDATE keys SET record = json_set(record, '$.provider_keys.openai', 'sk-canary')"
        )
        await proxy.gateway.store.flush()
    async with start() as proxy:
        status, _, told = await proxy.post(CHAT_PATH, CHAT, **team)
    assert (status, told["error"]["code"]) == (403, "provider_key_unusable")
    assert "canary" not in str(told)


async def test_answers_got_with_a_key_of_ones_own_are_not_shared(start: Start) -> None:
    async with start(cache_scope="shared", TEAM_KEY="sk-canary-team") as proxy:
        keys = [await make_key(proxy), await make_key(proxy, provider_keys={"openai": {"env": "TEAM_KEY"}})]
        told = [(await proxy.post(CHAT_PATH, {**CHAT, "seed": 1}, **key))[1]["x-stockyard-cache"] for key in keys * 2]
    assert told == ["miss", "miss", "hit", "hit"]


@pytest.mark.parametrize("on", ["on", "off"])
@pytest.mark.parametrize("required", [True, False])
async def test_a_client_brings_its_own_key_for_a_provider_that_it_names(start: Start, on: str, required: bool) -> None:
    toml = '[routes.both]\ntargets = ["openai/gpt-4o-mini"]\n[aliases]\nfast = "openai/gpt-4o-mini"\n'
    async with start(client_keys=on, toml=toml) as proxy:
        brings = {"authorization": "Bearer sk-canary-client"}
        if required:
            brings = {**await make_key(proxy), "x-stockyard-provider-key": "sk-canary-client"}
        named = [
            (CHAT_PATH, {**CHAT, "model": "openai/gpt-4o-mini"}, {}), (CHAT_PATH, CHAT, {"x-stockyard-provider": "OpenAI"}),
            ("/proxy/openai/v1/chat/completions", CHAT, {}),
        ]  # fmt: skip
        for path, body, headers in named:
            status, _, _ = await proxy.post(path, body, **brings, **headers)
            assert status == 200
        assert set(sent_keys(proxy)) == {"sk-canary-client" if on == "on" else "sk-canary-openai"}
        proxy.upstream.seen.clear()
        for model in ("gpt-4o-mini", "both", "fast"):
            await proxy.post(CHAT_PATH, {**CHAT, "model": model}, **brings)
        await proxy.post("/proxy/openai/v1/chat/completions", CHAT, **brings, **{"x-stockyard-provider": "groq"})
        assert set(sent_keys(proxy)) == {"sk-canary-openai"}
        assert not any("x-stockyard-provider-key" in seen.headers for seen in proxy.upstream.seen)
        assert all("canary" not in str(row) for row in await proxy.rows())


async def test_a_key_that_a_client_brings_goes_before_that_of_its_virtual_key(start: Start) -> None:
    async with start(client_keys="on", TEAM_KEY="sk-canary-team") as proxy:
        team = await make_key(proxy, provider_keys={"openai": {"env": "TEAM_KEY"}})
        for brings in ({"x-stockyard-provider-key": "sk-canary-client"}, {}):
            headers = {**team, **brings, "x-stockyard-provider": "openai"}
            assert (await proxy.post(CHAT_PATH, CHAT, **headers))[0] == 200
        assert sent_keys(proxy) == ["sk-canary-client", "sk-canary-team"]


async def test_clients_with_keys_of_their_own_share_no_answers(start: Start) -> None:
    async with start(client_keys="on", cache_scope="shared") as proxy:
        body = {**CHAT, "model": "openai/gpt-4o-mini", "seed": 1}
        told = [
            (await proxy.post(CHAT_PATH, body, authorization=f"Bearer sk-{name}"))[1]["x-stockyard-cache"]
            for name in "abab"
        ]
        status, _, refused = await proxy.post(CHAT_PATH, body, authorization="Bearer sk a")
    assert told == ["miss", "miss", "hit", "hit"]
    assert (status, refused["error"]["param"]) == (400, "x-stockyard-provider-key")


SECRET = "a-secret-of-the-team-0123456789"
DIGEST = "sha256:" + hashlib.sha256(SECRET.encode()).hexdigest()
BY_DIGEST = f'[keys.team]\ndigest = "{DIGEST}"\ntags = {{team = "a"}}\nbudget = {{usd = 5, period = "day"}}\n'
BY_VARIABLE = '[keys.team]\nkey_env = "TEAM_SECRET"\nexpires_at = 2036-01-01T00:00:00Z\n'


def whole_directory(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.iterdir())


@pytest.mark.parametrize("toml", [BY_DIGEST, BY_VARIABLE])
async def test_a_key_of_the_file_works_and_only_the_file_changes_it(start: Start, tmp_path: Path, toml: str) -> None:
    async with start(toml=toml, TEAM_SECRET=SECRET) as proxy:
        assert (await proxy.post(CHAT_PATH, CHAT))[0] == 401
        for _ in range(2):
            assert (await proxy.post(CHAT_PATH, CHAT, authorization=f"Bearer {SECRET}"))[0] == 200
        admin = {"authorization": f"Bearer {proxy.gateway.admin_key}"}
        key = proxy.gateway.keys.by_id["key_toml_team"]
        assert (key.name, key.as_json(0)["managed"]) == ("team", True)
        for method, path in (("PATCH", ""), ("DELETE", ""), ("POST", "/rotate")):
            url = f"{proxy.url}/api/keys/{key.id}{path}"
            async with proxy.session.request(method, url, json={}, headers=admin) as answer:
                told = (await answer.json())["error"]
                assert (answer.status, told["code"]) == (400, "key_is_managed")
                assert "stockyard.toml" in told["message"]
        assert {row["key_id"] for row in await proxy.rows()} == {"", "key_toml_team"}
        shown = stockyard.dump_json(stockyard.config_view(proxy.gateway.settings)).decode()
        assert SECRET not in shown
        assert DIGEST not in shown
    assert SECRET.encode() not in whole_directory(tmp_path)


async def test_keys_of_the_file_follow_it_on_a_reload(start: Start) -> None:
    async with start(toml=BY_DIGEST) as proxy:
        gateway, call = proxy.gateway, {"authorization": f"Bearer {SECRET}"}
        now_s = gateway.clock()
        gateway.clock = lambda: now_s

        def follow(toml: str) -> None:
            settings = stockyard.read_settings({"data_dir": gateway.settings.data_dir, "port": "0"}, {}, toml)
            environment = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": proxy.upstream.url}
            stockyard.prepare_settings(gateway, settings, environment)()

        await proxy.post(CHAT_PATH, CHAT, **call)
        spent = [row["settled_nanousd"] for row in gateway.ledger.snapshot(0)]
        follow(BY_DIGEST.replace("usd = 5", "usd = 0"))
        assert spent[0] > 0
        assert [row["settled_nanousd"] for row in gateway.ledger.snapshot(0)] == spent
        assert (await proxy.post(CHAT_PATH, CHAT, **call))[0] == 429
        follow("")
        assert gateway.ledger.snapshot(0) == []
        assert gateway.keys.by_id["key_toml_team"].revoked_at_ms == int(now_s * 1000)
        assert (await proxy.post(CHAT_PATH, CHAT, **call))[0] == 401
        assert (await proxy.post(CHAT_PATH, CHAT))[0] == 401, "removing the last key opens the proxy to nobody"
        assert gateway.keys.by_id["key_toml_team"].status(0) == "revoked"
        follow(BY_DIGEST)
        assert (await proxy.post(CHAT_PATH, CHAT, **call))[0] == 200


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ('[keys.a]\nkey = "sk-canary-0123456789"', "key_env"),
        ("[keys.a]\nrole = 'client'", "key_env"),
        (f'[keys.a]\nkey_env = "TEAM"\ndigest = "{DIGEST}"', "one of key_env"),
        ('[keys.a]\ndigest = "sha256:canary"', "sha256sum"),
        ('[keys.a]\nkey_env = "TEAM"\nbudgett = {usd = 1, period = "day"}', "budgett"),
        ('[keys.a]\nkey_env = "UNSET"', "variable that is set"),
        ('[keys.a]\nkey_env = "SHORT"', "20 or more"),
        (f'[keys.a]\ndigest = "{DIGEST}"\n[keys.b]\nkey_env = "TEAM"', "another key"),
        ('[keys.a]\nkey_env = "ADMIN"', "another key"),
        ('[keys.a]\nkey_env = "MADE"', "another key"),
        ('[keys.a]\nkey_env = "TEAM"\nprovider_keys = {openai = "sk-canary"}', "never the key"),
        ('[keys."a b"]\nkey_env = "TEAM"', "letters, digits"),
        ("keys = 5", "keys"),
    ],
)
def test_keys_of_the_file_are_refused_with_their_place(toml: str, told: str) -> None:
    environment = {"TEAM": SECRET, "SHORT": "sy-canary", "ADMIN": "admin-secret-of-this-proxy", "MADE": "sy-made-" * 4}
    made = stockyard.VirtualKey("key_1", "made", stockyard.digest_secret(environment["MADE"], b""), 0)
    ring = stockyard.KeyRing(b"", [made])
    with pytest.raises(stockyard.InvalidRequest) as caught:
        stockyard.declare_keys(tomllib.loads(toml)["keys"], environment, ring, environment["ADMIN"], 0)
    assert told in caught.value.message
    assert "canary" not in caught.value.message


def test_a_secret_of_ones_own_may_be_as_short_as_said() -> None:
    [key] = stockyard.declare_keys({"a": {"key_env": "OWN"}}, {"OWN": "s" * 20}, stockyard.KeyRing(b""), "", 0)
    assert key.digest == stockyard.digest_secret("s" * 20, b"")


def test_a_literal_in_the_file_is_masked_where_the_file_is_shown() -> None:
    table = {"a": {"digest": "d" * 64, "key": "sk-canary-" * 3, "provider_keys": {"openai": "sk-canary-" * 3}}}
    shown = stockyard.mask_members({**table, "b": {"provider_keys": {"openai": {"env": "TEAM_KEY"}}}})
    assert "canary-sk" not in json.dumps(shown)
    assert "d" * 20 not in json.dumps(shown)
    assert shown["b"]["provider_keys"]["openai"]["env"] == "TEAM_KEY"


def shown_limits(headers: Any) -> tuple[str, str]:
    return headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]


async def test_rates_by_model_and_for_all_are_told_and_held(start: Start) -> None:
    toml = '[limits]\nrpm = 3\nmodels."gpt-4o*" = {rpm = 2}\n'
    async with start(toml=toml) as proxy:
        told = [await proxy.post(CHAT_PATH, CHAT) for _ in range(3)]
        other, *_ = await proxy.post(CHAT_PATH, {**CHAT, "model": "gpt-4.1-mini"})
        last = await proxy.post(CHAT_PATH, {**CHAT, "model": "gpt-4.1-mini"})
    assert [status for status, _, _ in told] == [200, 200, 429]
    assert [shown_limits(headers) for _, headers, _ in told] == [("2", "1"), ("2", "0"), ("2", "0")]
    assert (other, last[0]) == (200, 429)
    assert "retry-after" not in told[0][1]
    assert re.fullmatch(r"(1m[01]|5[0-9]|60)(\.[0-9]+)?s", told[0][1]["x-ratelimit-reset-requests"])
    assert 55 <= int(told[2][1]["retry-after"]) <= 61
    assert "the model gpt-4o*" in told[2][2]["error"]["message"]
    assert "this Stockyard" in last[2]["error"]["message"]


async def test_estimated_tokens_give_way_to_those_used(start: Start) -> None:
    async with start(toml="[limits]\ntpm = 1000\n", cache="off") as proxy:
        body = {**CHAT, "max_tokens": 500}
        left = 1000 - len(json.dumps(body)) // 4 - 500
        for refused, used in ((False, 0), (False, 15), (True, 30), (False, 30)):
            most = {"x-stockyard-max-cost-usd": "0"} if refused else {}
            status, headers, _ = await proxy.post(CHAT_PATH, body, **most)
            assert (status, headers["x-ratelimit-remaining-tokens"]) == (429 if refused else 200, str(left - used))


async def test_calls_that_come_too_soon_wait_in_turns_by_key(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start(toml="[limits]\nparallel = 1\nqueue_ms = 20000\n") as proxy:
        keys = [await make_key(proxy, name=name) for name in "ab"]
        go = asyncio.Event()
        proxy.upstream.answers = [dataclasses.replace(plain(COMPLETION), go=go)]
        bodies = [{**CHAT, "user": name} for name in "ab"]
        greedy = [asyncio.create_task(proxy.post(CHAT_PATH, bodies[0], **keys[0])) for _ in range(6)]
        await until(lambda: proxy.gateway.in_flight == 6)
        monkeypatch.setattr(stockyard, "PARALLEL_RETRY_S", 1000.0)  # whoever ends lets the next one in
        modest = [asyncio.create_task(proxy.post(CHAT_PATH, bodies[1], **keys[1])) for _ in range(2)]
        await until(lambda: [len(line) for line in proxy.gateway.lines.values()] in ([5, 2], [2, 5]))
        go.set()
        assert {(await call)[0] for call in greedy + modest} == {200}
        assert not proxy.gateway.lines
        order = "".join(seen.json["user"] for seen in proxy.upstream.seen)
    assert order.rindex("b") < 5, "the second key waits for its turns, not for all of the first"


async def test_the_line_has_an_end_and_whoever_hangs_up_leaves_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockyard, "MAX_QUEUED", 2)
    async with start(toml="[limits]\nparallel = 1\nqueue_ms = 300\n") as proxy:
        go = asyncio.Event()
        proxy.upstream.answers = [dataclasses.replace(plain(COMPLETION), go=go)]
        first = asyncio.create_task(proxy.post(CHAT_PATH, CHAT))
        await until(lambda: proxy.upstream.seen)
        second = asyncio.create_task(proxy.post(CHAT_PATH, CHAT))
        await until(lambda: proxy.gateway.lines)
        second.cancel()
        await until(lambda: not proxy.gateway.lines)
        late, *_ = await proxy.post(CHAT_PATH, CHAT)
        assert late == 429
        go.set()
        assert (await first)[0] == 200
        status, *_ = await proxy.post("/proxy/openai/v1/chat/completions", CHAT)
        assert (status, proxy.gateway.lines) == (200, {})
    assert len(proxy.upstream.seen) == 2


async def test_a_call_for_which_the_lines_have_no_room_is_refused_at_once(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockyard, "MAX_QUEUED", 2)
    async with start(toml="[limits]\nparallel = 1\nqueue_ms = 600000\n") as proxy, asyncio.timeout(20):
        many, one = [await make_key(proxy, name=name) for name in "ab"]
        go = asyncio.Event()
        proxy.upstream.answers = [dataclasses.replace(plain(COMPLETION), go=go)]
        calls = [asyncio.create_task(proxy.post(CHAT_PATH, CHAT, **many)) for _ in range(3)]
        await until(lambda: [len(line) for line in proxy.gateway.lines.values()] == [2])
        for key in (one, many):
            assert (await proxy.post(CHAT_PATH, CHAT, **key))[0] == 429
        assert len(proxy.gateway.lines) == 1, "who was refused has no line"
        go.set()
        assert [(await call)[0] for call in calls] == [200] * 3
        assert not proxy.gateway.lines


async def test_who_may_go_on_does_not_wait_behind_those_who_may_not(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockyard, "PARALLEL_RETRY_S", 1000.0)
    async with start(toml="[limits]\nqueue_ms = 600000\n") as proxy, asyncio.timeout(20):
        busy, free = [await make_key(proxy, name=name, rate_limit={"parallel": 1}) for name in "ab"]
        go = asyncio.Event()
        proxy.upstream.answers = [dataclasses.replace(plain(COMPLETION), go=go), plain(COMPLETION)]
        calls = [asyncio.create_task(proxy.post(CHAT_PATH, CHAT, **busy)) for _ in range(2)]
        await until(lambda: proxy.gateway.lines)
        assert (await proxy.post(CHAT_PATH, CHAT, **free))[0] == 200
        assert len(proxy.upstream.seen) == 2 and [len(line) for line in proxy.gateway.lines.values()] == [1]
        go.set()
        assert [(await call)[0] for call in calls] == [200] * 2
        assert not proxy.gateway.lines


async def test_calls_in_line_get_their_turn_when_the_window_has_moved_on(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockyard, "RATE_SLOTS", 2)
    async with start(toml="[limits]\nrpm = 1\nqueue_ms = 50000\n") as proxy:
        told = await asyncio.gather(*(proxy.post(CHAT_PATH, CHAT) for _ in range(3)))
        assert not proxy.gateway.lines
    assert [status for status, *_ in told] == [200] * 3


async def test_a_call_for_which_waiting_is_no_use_is_refused_at_once(start: Start) -> None:
    async with start(toml="[limits]\nrpm = 1\ntpm = 200\nqueue_ms = 50000\n") as proxy, asyncio.timeout(10):
        never = await proxy.post(CHAT_PATH, {**CHAT, "max_tokens": 500})
        told = [await proxy.post(CHAT_PATH, {**CHAT, "max_tokens": 1}) for _ in range(2)]
    assert [status for status, *_ in (never, *told)] == [429, 200, 429]
    assert "never fits" in never[2]["error"]["message"]


@pytest.mark.parametrize(
    "toml", ["[limits]\nrps = 1", "[limits]\nqueue_ms = -1", '[limits]\nmodels."a" = {rpm = 0}', "limits = 5"]
)
def test_wrong_limits_are_refused_with_their_place(toml: str) -> None:
    with pytest.raises(stockyard.SettingsError, match="limits"):
        stockyard.configured_limits(stockyard.read_settings({}, {}, toml))


@pytest.mark.parametrize(
    "more", [{"models": ["m", "dear"]}, {"extra_body": {"x": {"models": ["dear"]}}}, {"models": "dear"}, {"models": 5}]
)
async def test_a_keys_models_bind_those_that_a_provider_may_fall_back_to(start: Start, more: dict[str, Any]) -> None:
    async with start() as proxy:
        _, secret = proxy.gateway.create_key({"name": "k", "models": ["openai/m", "m"]})
        ask = {"model": "openai/m", "messages": [{"role": "user", "content": "Hi"}]}
        bearer = {"authorization": f"Bearer {secret}"}
        assert (await proxy.post("/v1/chat/completions", {**ask, "models": ["m"]}, **bearer))[0] == 200
        status, _, told = await proxy.post("/v1/chat/completions", {**ask, **more}, **bearer)
    assert (status, told["error"]["code"], len(proxy.upstream.seen)) == (403, "model_not_allowed", 1)


FILE, BATCH = {"id": "file-a", "object": "file"}, {"id": "batch_a", "output_file_id": "file-out", "error_file_id": None}


@pytest.mark.parametrize("door", ["/v1", "/proxy/openai/v1", "/proxy/openai"])
async def test_files_and_batches_are_for_the_key_that_made_them(start: Start, door: str) -> None:
    async with start() as proxy:
        ours, theirs = await make_key(proxy), await make_key(proxy)
        own = await make_key(proxy, provider_keys={"openai": {"env": "TEAM_KEY"}})
        proxy.gateway.environment = {"TEAM_KEY": "sk-team"}

        async def ask(method: str, path: str, key: dict[str, str], answer: Any, status: int = 200) -> Any:
            proxy.upstream.answers = [plain(answer, status)]
            async with proxy.session.request(method, proxy.url + door + path, headers=key) as got:
                return await got.json() if got.status == status else got.status

        listed = {"object": "list", "has_more": True, "data": [{"id": "file-b"}, FILE, {"id": "file-out"}]}
        assert await ask("POST", "/files", ours, FILE) == FILE
        assert await ask("GET", "/files", ours, listed) == {**listed, "data": [FILE]}
        assert await ask("GET", "/files", theirs, listed) == {**listed, "data": []}
        assert await ask("GET", "/files", own, listed) == listed
        assert await ask("POST", "/batches", ours, BATCH | {"output_file_id": None}) == BATCH | {"output_file_id": None}
        assert await ask("GET", "/files/file-out/content", ours, {"custom_id": "1"}) == 404
        assert await ask("GET", "/batches/batch_a", ours, BATCH) == BATCH
        assert await ask("GET", "/files/file-out/content", ours, {"custom_id": "1"}) == {"custom_id": "1"}
        asked = len(proxy.upstream.seen)
        for method, path in (
            ("GET", "/files/file-a"), ("GET", "/files/file-a/content"), ("DELETE", "/files/file-a"), ("GET", "/files/file%2Da"),
            ("POST", "/batches/batch_a/cancel"), ("GET", "/batches/batch_a"), ("GET", "/FILES/file-a"), ("GET", "/%66iles/file-a"),
        ):  # fmt: skip
            assert await ask(method, path, theirs, FILE) == 404
        assert len(proxy.upstream.seen) == asked
        assert await ask("GET", "/files/file-a", {"authorization": f"Bearer {proxy.gateway.admin_key}"}, FILE) == FILE
        assert await ask("POST", "/batches/batch_a/cancel", ours, BATCH) == BATCH
        assert await ask("DELETE", "/files/file-a", ours, {"error": {"message": "no"}}, 409) == {
            "error": {"message": "no"}
        }
        assert await ask("DELETE", "/files/file-a", ours, {"id": "file-a", "deleted": True})
        assert await ask("GET", "/files/file-a", ours, FILE) == 404
        assert await ask("GET", "/files", ours, [FILE]) == 502


async def test_one_file_of_an_azure_of_a_dated_version_has_its_id_before_the_query(start: Start) -> None:
    given = {"AZURE_OPENAI_API_KEY": "k", "AZURE_OPENAI_ENDPOINT": "UPSTREAM", "OPENAI_API_VERSION": "2024-10-21"}
    async with start(**given) as proxy:
        proxy.upstream.answers = [plain(FILE)]
        async with proxy.session.get(
            proxy.url + "/v1/files/file-a?x=1", headers={"x-stockyard-provider": "azure"}
        ) as got:
            assert await got.json() == FILE
        [seen] = proxy.upstream.seen
    assert seen.path.endswith("/openai/files/file-a?api-version=2024-10-21&x=1")


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
async def test_a_conversation_that_the_provider_keeps_is_for_the_key_that_began_it(
    start: Start, streamed: bool
) -> None:
    golden = GOLDENS["responses"]
    async with start() as proxy:
        ours, theirs = await make_key(proxy), await make_key(proxy)
        own = await make_key(proxy, provider_keys={"openai": {"env": "TEAM_KEY"}})
        proxy.gateway.environment = {"TEAM_KEY": "sk-team"}
        proxy.upstream.answers = [stream(golden.pieces) if streamed else plain(golden.plain)]
        await proxy.post(golden.path, {**golden.request, "stream": streamed}, **ours)
        body = {**golden.request, "previous_response_id": golden.plain["id"]}
        proxy.upstream.answers = [plain({**golden.plain, "id": "resp_next"})]
        status, _, told = await proxy.post(golden.path, body, **theirs)
        assert (status, told["error"]["code"]) == (400, "previous_response_not_found")
        assert len(proxy.upstream.seen) == 1
        for key in (ours, own, {"authorization": f"Bearer {proxy.gateway.admin_key}"}):
            assert (await proxy.post(golden.path, body, **key))[0] == 200
            assert proxy.upstream.seen[-1].json["previous_response_id"] == golden.plain["id"]
