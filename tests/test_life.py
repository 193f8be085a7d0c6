"""Many calls at once, and the end of a process: clients that leave, markers that must not mix, stops that will not wait.

A stop that lets streams end, kill -9 and second instances are test_process.py's; kill -9 under load is test_store.py's.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import time
import tracemalloc
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import Start
from test_process import Process
from upstreams import DONE, STREAM, stream

import stockyard

CHAT: dict[str, Any] = {"model": "gpt-4o-mini", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"


async def test_clients_that_leave_at_any_time_end_the_providers_work(start: Start) -> None:
    count, draw = 200, random.Random(11)
    async with start(cache="off") as proxy, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        proxy.upstream.answers = [stream([b"".join(STREAM[:2])], gap_s=30)]

        async def leave(after_s: float) -> None:
            answer = await session.post(proxy.url + PATH, json=CHAT)
            await answer.content.readany()
            await asyncio.sleep(after_s)
            answer.close()

        await asyncio.gather(*(leave(draw.random() * 0.5) for _ in range(count)))
        began_s = time.monotonic()
        while proxy.upstream.hung_up < count or proxy.gateway.in_flight:
            await asyncio.sleep(0.02)
            assert time.monotonic() - began_s < 20  # under a second where nothing else runs
        rows = await proxy.rows()
    assert [(row["status"], row["error"]) for row in rows] == [(499, "client_closed_request")] * count
    assert all(row["output_tokens"] > 0 for row in rows)


async def test_streams_at_once_do_not_mix(start: Start) -> None:
    count = 300
    async with start() as proxy, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(number: int) -> list[str]:
            marker = f"<m{number}x>"
            text = " ".join([marker] * 8)
            body = {"model": "echo", "stream": True, "chunk_ms": 5, "messages": [{"role": "user", "content": text}]}
            path, body = (PATH, body) if number % 2 else ("/v1/messages", {**body, "max_tokens": 99})
            async with session.post(proxy.url + path, json=body) as answer:
                told = (await answer.read()).decode()
            events = [json.loads(line[6:]) for line in told.split("\n") if line.startswith("data: {")]
            said = [(e.get("delta") or (e.get("choices") or [{}])[0].get("delta") or {}) for e in events]
            whole = "".join(delta.get("text") or delta.get("content") or "" for delta in said)
            assert whole.count(marker) == 8, told[:300]
            return re.findall(r"<m\d+x>", whole)

        found = await asyncio.gather(*(ask(number) for number in range(count)))
        rows = await proxy.rows()
    assert [set(markers) for markers in found] == [{f"<m{number}x>"} for number in range(count)]
    assert [row["status"] for row in rows] == [200] * count


async def test_memory_stays_flat_over_many_streams(start: Start) -> None:
    async with start(cache="off") as proxy:

        async def run(count: int) -> None:
            for _ in range(count):
                _, _, told = await proxy.post(PATH, CHAT)
                assert told.endswith(DONE)
            proxy.upstream.seen.clear()
            await proxy.rows()

        await run(80)
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        await run(150)
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert after - before < 1_500_000  # ten KB a stream would be a leak of as much


SLOW = {
    "model": "echo",
    "stream": True,
    "chunk_ms": 400,
    "messages": [{"role": "user", "content": "a b c d e f g h i j k l m n o p"}],
}


async def begin(session: aiohttp.ClientSession, url: str, number: int) -> aiohttp.ClientResponse:
    """A stream under way, on the lane or on aiohttp's side."""

    async def pieces() -> Any:
        yield json.dumps(SLOW).encode()

    answer = await session.post(url + PATH, data=pieces() if number % 2 else json.dumps(SLOW).encode())
    await answer.content.readany()
    return answer


async def test_a_stop_that_waits_no_longer_tells_every_stream_so(tmp_path: Path) -> None:
    running = await asyncio.to_thread(Process, tmp_path, STOCKYARD_DRAIN_TIMEOUT="0.5")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        answers = await asyncio.gather(*(begin(session, running.url, number) for number in range(50)))
        running.run.send_signal(signal.SIGTERM)
        told = [await answer.read() for answer in answers]
    _, printed = await asyncio.to_thread(running.run.communicate, timeout=30)
    assert running.run.returncode == 0, printed
    bad = [(number, text[-150:]) for number, text in enumerate(told) if b"shutting_down" not in text or DONE in text]
    assert not bad, bad[:4]
    store = stockyard.LogStore(tmp_path / "stockyard.db")
    rows = stockyard.find_page(store, {}, 100, 0).rows
    store.close()
    assert [(row["status"], row["error"]) for row in rows] == [(503, "shutting_down")] * 50


async def ask(session: aiohttp.ClientSession, method: str, url: str, **more: Any) -> tuple[int, Any, Any]:
    async with session.request(method, url, **more) as answer:
        return answer.status, answer.headers, await answer.json()


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_stop_says_so_to_who_comes_and_a_second_signal_waits_for_nothing(tmp_path: Path, workers: str) -> None:
    running = await asyncio.to_thread(Process, tmp_path, STOCKYARD_DRAIN_TIMEOUT="60", STOCKYARD_WORKERS=workers)
    async with aiohttp.ClientSession() as session:
        answer = await begin(session, running.url, 0)
        running.run.send_signal(signal.SIGTERM)
        status = 200
        async with asyncio.timeout(20):
            while status == 200:
                status = (await ask(session, "GET", running.url + "/ready"))[0]
        assert status == 503
        assert (await ask(session, "GET", running.url + "/health"))[0] == 200
        status, headers, told = await ask(session, "POST", running.url + PATH, json=CHAT)
        assert (status, headers["retry-after"], told["error"]["code"]) == (503, "1", "shutting_down")
        running.run.send_signal(signal.SIGTERM)
        await asyncio.to_thread(running.run.communicate, timeout=10)
        answer.close()
    assert running.run.returncode == 1


async def test_a_call_refused_at_a_stop_has_its_row_with_its_session(start: Start) -> None:
    async with start() as proxy:
        proxy.gateway.draining = True
        status, headers, _ = await proxy.post(PATH, CHAT, **{"x-stockyard-session": "s7"})
        [row] = await proxy.rows()
    assert (status, headers["retry-after"], row["error"], row["session"]) == (503, "1", "shutting_down", "s7")
