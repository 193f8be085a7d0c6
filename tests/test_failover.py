"""What happens when a provider fails: where calls go next, what clients see, what the one row tells."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest
from conftest import Start
from upstreams import COMPLETION, Answer, fake_upstream, plain

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


def dead_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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
        moved = {"OPENAI_BASE_URL": f"http://127.0.0.1:{dead_port()}/v1"}
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
        moved = {"OPENAI_BASE_URL": f"http://127.0.0.1:{dead_port()}/v1"}
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
