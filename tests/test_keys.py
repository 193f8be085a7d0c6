"""Whose provider key a call uses: the operator's, one that its virtual key names, or the one its client brought."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Start
from upstreams import COMPLETION, plain

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
