"""Several workers behind one port, as real processes: money, limits and keys are exact across them, no row is lost when
one or all are killed, and a restart drops no connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from upstreams import COMPLETION, STREAM, FakeUpstream, fake_upstream, plain, stream

import stockyard

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "openai/m", "max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}]}
PRICES = '[[prices]]\nmodel = "m"\ninput = 1\noutput = 10\n'


class Proxy:
    """A supervisor with two workers. Each client session has one connection, and these go to the workers in turn."""

    def __init__(self, data_dir: Path, upstream: FakeUpstream) -> None:
        self.data_dir, self.upstream = data_dir, upstream
        self.url = self.admin_key = ""
        self.process: asyncio.subprocess.Process

    async def start(self, *flags: str, workers: int = 2) -> None:
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(self.data_dir), "STOCKYARD_DATA_DIR": str(self.data_dir),
            "STOCKYARD_PORT": "0", "OPENAI_API_KEY": "sk-x", "OPENAI_BASE_URL": self.upstream.url, "STOCKYARD_RETRIES": "0",
        }  # fmt: skip
        here = Path(stockyard.__file__).parent
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "stockyard", "serve", "--workers", str(workers), *flags,
            cwd=here, env=environment, stdout=PIPE, stderr=PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = (await self.process.stdout.readline()).decode()
        self.url = next(word.rstrip(",") for word in line.split() if word.startswith("http://"))
        self.admin_key = (self.data_dir / "admin.key").read_text().strip()

    async def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """The exit status and what stood on stderr."""
        self.process.send_signal(number)
        _, told = await asyncio.wait_for(self.process.communicate(), 40)
        return self.process.returncode or 0, told.decode()

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return sorted(map(int, children))

    async def admin(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"authorization": f"Bearer {self.admin_key}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.request(method, self.url + path, json=body) as answer,
        ):
            assert answer.status < 300, await answer.text()
            return await answer.json() if answer.content_type == "application/json" else await answer.text()

    async def rows(self) -> dict[str, Any]:
        """The logged calls by id."""
        return {row["id"]: row for row in (await self.admin("GET", "/api/requests?limit=1000"))["data"]}


@contextlib.asynccontextmanager
async def proxy_on(data_dir: Path, *flags: str, toml: str = "") -> AsyncIterator[Proxy]:
    async with fake_upstream() as upstream:
        (data_dir / "stockyard.toml").write_text(toml)
        proxy = Proxy(data_dir, upstream)
        await proxy.start(*flags)
        try:
            yield proxy
        finally:
            if proxy.process.returncode is None:
                status, told = await proxy.stop()
                assert status == 0, told


@contextlib.asynccontextmanager
async def clients(count: int, **headers: str) -> AsyncIterator[list[aiohttp.ClientSession]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=1))
            )
            for _ in range(count)
        ]


async def ask(session: aiohttp.ClientSession, url: str, body: Any = ASK) -> tuple[int, str, Any]:
    """Status, request id and body of one call."""
    async with session.post(url + CHAT, json=body) as answer:
        return answer.status, answer.headers["x-stockyard-request-id"], json.loads(await answer.read())


async def until(found: Any, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not await found():
            await asyncio.sleep(0.05)


async def make_key(proxy: Proxy, **members: Any) -> tuple[str, str]:
    """The id and the secret of a new virtual key."""
    made = await proxy.admin("POST", "/api/keys", {"name": "k", **members})
    return made["id"], made["key"]


async def test_any_worker_shows_the_state_of_all(tmp_path: Path) -> None:
    async with proxy_on(tmp_path) as proxy, clients(6) as sessions:
        assert len(proxy.workers()) == 2
        ids = {(await ask(session, proxy.url))[1] for session in sessions for _ in range(3)}
        assert len({name[-8:] for name in ids}) == 2, "ids of one process end alike"
        assert (await proxy.rows()).keys() == ids
        assert 'status="200"} 18\n' in await proxy.admin("GET", "/metrics")
        for session in sessions:  # a connection that has had a model call answered goes to the supervisor and back
            async with session.get(f"{proxy.url}/v1/models") as answer:
                assert answer.status == 200
            assert (await ask(session, proxy.url))[0] == 200
        async with sessions[0].get(f"{proxy.url}/ui") as answer:
            assert answer.status == 200
        gemini = {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}
        async with sessions[1].post(f"{proxy.url}/v1beta/models/echo:generateContent", json=gemini) as answer:
            assert answer.status == 200
        assert len(await proxy.rows()) == 25


async def test_a_budget_admits_exactly_what_fits_in_it(tmp_path: Path) -> None:
    """Two hundred calls at once, over both workers, against the money of five and a half of them."""
    async with proxy_on(tmp_path, toml=PRICES) as proxy:
        proxy.upstream.answers = [plain({**COMPLETION, "usage": None})]
        proxy.upstream.answers[0].hang_s = 1.0
        _, probe = await make_key(proxy, budget={"usd": 1, "period": "day"})
        async with clients(1, authorization=f"Bearer {probe}") as [session]:
            assert (await ask(session, proxy.url))[0] == 200
        [row] = (await proxy.rows()).values()
        [budget] = (await proxy.admin("GET", "/api/budgets"))["data"]
        worst = budget["settled_nanousd"]
        assert worst > 1_000_000, "a call without usage is charged its hold"
        assert row["status"] == 200
        _, secret = await make_key(proxy, budget={"usd": 5.5 * worst / 1e9, "period": "day"})
        async with clients(200, authorization=f"Bearer {secret}") as sessions:
            statuses = [status for status, _, _ in await asyncio.gather(*(ask(one, proxy.url) for one in sessions))]
        assert sorted(set(statuses)) == [200, 429]
        assert statuses.count(200) == 5
        budgets = (await proxy.admin("GET", "/api/budgets"))["data"]
        assert sorted(one["settled_nanousd"] for one in budgets) == [worst, 5 * worst]
        assert [one["held_nanousd"] for one in budgets] == [0, 0]


async def test_a_limit_counts_the_calls_of_all_workers(tmp_path: Path) -> None:
    async with proxy_on(tmp_path) as proxy:
        _, secret = await make_key(proxy, rate_limit={"rpm": 7})
        async with clients(20, authorization=f"Bearer {secret}") as sessions:
            statuses = [status for status, _, _ in await asyncio.gather(*(ask(one, proxy.url) for one in sessions))]
            assert statuses.count(200) == 7
            async with sessions[0].post(proxy.url + CHAT, json=ASK) as answer:
                assert answer.status == 429
                assert answer.headers["x-ratelimit-remaining-requests"] == "0"
                assert (await answer.json())["error"]["limit_name"] == "rpm"


async def test_calls_that_come_too_soon_wait_in_one_line(tmp_path: Path) -> None:
    async with proxy_on(tmp_path, toml="[limits]\nparallel = 1\nqueue_ms = 5000\n") as proxy, clients(6) as sessions:
        proxy.upstream.answers = [plain(COMPLETION)]
        proxy.upstream.answers[0].hang_s = 0.1
        told = await asyncio.gather(*(ask(one, proxy.url) for one in sessions))
        assert [status for status, _, _ in told] == [200] * 6


async def test_a_revoked_key_is_refused_by_all_workers_at_once(tmp_path: Path) -> None:
    async with proxy_on(tmp_path) as proxy:
        key_id, secret = await make_key(proxy)
        async with clients(8, authorization=f"Bearer {secret}") as sessions:
            assert {(await ask(one, proxy.url))[0] for one in sessions} == {200}
            await proxy.admin("DELETE", f"/api/keys/{key_id}")
            assert {(await ask(one, proxy.url))[0] for one in sessions} == {401}


async def test_the_cache_serves_all_workers_and_is_emptied_everywhere(tmp_path: Path) -> None:
    body = {**ASK, "temperature": 0}
    async with proxy_on(tmp_path, "--cache", "deterministic") as proxy, clients(6) as sessions:
        await ask(sessions[0], proxy.url, body)
        await proxy.rows()  # what was put is on disk now
        for session in sessions:
            assert (await ask(session, proxy.url, body))[0] == 200
        assert len(proxy.upstream.seen) == 1
        assert (await proxy.admin("GET", "/api/cache"))["hits"] == 6
        await proxy.admin("DELETE", "/api/cache")
        for session in sessions:
            await ask(session, proxy.url, body)
        assert 2 <= len(proxy.upstream.seen) <= 3


async def test_a_conversation_goes_on_at_another_worker(tmp_path: Path) -> None:
    async with proxy_on(tmp_path) as proxy, clients(4) as sessions:
        previous = None
        for session in sessions:
            body = {"model": "echo", "input": "Hi", "previous_response_id": previous}
            async with session.post(f"{proxy.url}/v1/responses", json=body) as answer:
                assert answer.status == 200, await answer.text()
                previous = (await answer.json())["id"]


async def test_a_killed_worker_is_replaced_and_loses_no_row(tmp_path: Path) -> None:
    async with proxy_on(tmp_path, toml=PRICES) as proxy:
        _, secret = await make_key(proxy, budget={"usd": 1, "period": "day"})
        answered: list[str] = []

        async def go_on(session: aiohttp.ClientSession) -> None:
            with contextlib.suppress(aiohttp.ClientError):
                while len(answered) < 300:
                    status, request_id, _ = await ask(session, proxy.url)
                    assert status == 200
                    answered.append(request_id)

        async with clients(8, authorization=f"Bearer {secret}") as sessions:
            loads = [asyncio.create_task(go_on(session)) for session in sessions]
            await until(lambda: asyncio.sleep(0, len(answered) > 50))
            before = proxy.workers()
            os.kill(before[0], signal.SIGKILL)
            await asyncio.gather(*loads)
        await until(lambda: asyncio.sleep(0, len(proxy.workers()) == 2 and before[0] not in proxy.workers()))

        async def is_settled() -> bool:
            [budget] = (await proxy.admin("GET", "/api/budgets"))["data"]
            return int(budget["held_nanousd"]) == 0

        await until(is_settled)

        async def all_there() -> bool:
            return set(answered) <= (await proxy.rows()).keys()

        await until(all_there)
        async with clients(4, authorization=f"Bearer {secret}") as sessions:
            assert {(await ask(one, proxy.url))[0] for one in sessions} == {200}
        _, told = await proxy.stop()
        assert "another takes its place" in told


async def test_what_a_killed_worker_held_is_charged_whole(tmp_path: Path) -> None:
    async with proxy_on(tmp_path, toml=PRICES) as proxy:
        _, secret = await make_key(proxy, budget={"usd": 1, "period": "day"}, rate_limit={"parallel": 4})
        proxy.upstream.answers = [plain(COMPLETION)]
        proxy.upstream.answers[0].hang_s = 30.0
        async with clients(4, authorization=f"Bearer {secret}") as sessions:
            calls = [asyncio.create_task(ask(session, proxy.url)) for session in sessions]
            await until(lambda: asyncio.sleep(0, len(proxy.upstream.seen) == 4))
            [budget] = (await proxy.admin("GET", "/api/budgets"))["data"]
            held = budget["held_nanousd"]
            assert held > 0
            for worker in proxy.workers():
                os.kill(worker, signal.SIGKILL)
            assert all(
                isinstance(told, aiohttp.ClientError) for told in await asyncio.gather(*calls, return_exceptions=True)
            )

        async def is_charged() -> bool:
            [budget] = (await proxy.admin("GET", "/api/budgets"))["data"]
            return (budget["held_nanousd"], budget["settled_nanousd"]) == (0, held)

        await until(is_charged)

        async def is_told() -> bool:
            return [row["error"] for row in (await proxy.rows()).values()] == ["crashed"] * 4

        await until(is_told)
        proxy.upstream.answers = []
        async with clients(4, authorization=f"Bearer {secret}") as sessions:  # their places are free again
            told = await asyncio.gather(*(ask(one, proxy.url) for one in sessions))
            assert [status for status, _, _ in told] == [200] * 4


async def test_no_row_is_lost_when_all_are_killed(tmp_path: Path) -> None:
    async with proxy_on(tmp_path) as proxy:
        async with clients(6) as sessions:
            answered = {(await ask(session, proxy.url))[1] for session in sessions for _ in range(5)}
        everything = [*proxy.workers(), proxy.process.pid]
        for pid in everything:
            os.kill(pid, signal.SIGKILL)
        await proxy.process.communicate()
        await proxy.start(workers=1)  # alone, it finds what they left as well
        assert answered <= (await proxy.rows()).keys()
        assert not [name for name in os.listdir(tmp_path) if name.startswith("worker-")]


async def test_workers_end_with_their_supervisor(tmp_path: Path) -> None:
    async with proxy_on(tmp_path) as proxy:
        workers = proxy.workers()
        proxy.process.kill()
        await proxy.process.communicate()
        await until(lambda: asyncio.sleep(0, not any(Path(f"/proc/{pid}/stat").exists() for pid in workers)))


async def test_a_reload_restarts_the_workers_and_drops_no_connection(tmp_path: Path) -> None:
    async with proxy_on(tmp_path) as proxy, clients(8) as sessions:
        before, done = proxy.workers(), asyncio.Event()
        statuses: list[int] = []
        proxy.upstream.answers = [stream(STREAM, gap_s=0.05)]

        async def go_on(session: aiohttp.ClientSession) -> None:
            while not done.is_set():
                async with session.post(proxy.url + CHAT, json={**ASK, "stream": True}) as answer:
                    assert (await answer.read()).endswith(b"data: [DONE]\n\n")
                    statuses.append(answer.status)

        loads = [asyncio.create_task(go_on(session)) for session in sessions]
        (tmp_path / "stockyard.toml").write_text('[aliases]\nnew = "echo"\n')
        proxy.process.send_signal(signal.SIGHUP)
        await until(lambda: asyncio.sleep(0, len(proxy.workers()) == 2 and not {*before} & {*proxy.workers()}))
        done.set()
        await asyncio.gather(*loads)
        assert {*statuses} == {200}
        assert {(await ask(session, proxy.url, {**ASK, "model": "new"}))[0] for session in sessions} == {200}
        assert {row["status"] for row in (await proxy.rows()).values()} == {200}


async def test_a_stop_lets_the_calls_of_all_workers_finish(tmp_path: Path) -> None:
    async with proxy_on(tmp_path) as proxy:
        proxy.upstream.answers = [plain(COMPLETION)]
        proxy.upstream.answers[0].hang_s = 1.0
        async with clients(6) as sessions:
            calls = [asyncio.create_task(ask(session, proxy.url)) for session in sessions]
            await until(lambda: asyncio.sleep(0, len(proxy.upstream.seen) == 6))
            status, told = await proxy.stop()
            assert [status for status, _, _ in await asyncio.gather(*calls)] == [200] * 6
            assert (status, told.count("Traceback")) == (0, 0), told
        await proxy.start(workers=1)
        assert [row["status"] for row in (await proxy.rows()).values()] == [200] * 6


async def test_requests_in_pieces_and_in_one_go(tmp_path: Path) -> None:
    """What is for the supervisor may come in pieces; behind a model call that is not answered yet it is refused."""
    async with proxy_on(tmp_path) as proxy:
        port = int(proxy.url.rpartition(":")[2])
        body = json.dumps(ASK).encode()
        call = b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(body)) + body
        health = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"

        async def talk(*pieces: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.05)
            told = await reader.read(1)  # a client that ends its side before it is answered has left
            writer.write_eof()
            told += await reader.read()
            writer.close()
            return told

        assert b'"status":"ok"' in await talk(health[:20], health[20:])
        assert (await talk(call[:30], call[30:90], call[90:])).startswith(b"HTTP/1.1 200")
        told = await talk(call + health)
        assert told.startswith(b"HTTP/1.1 200")
        assert b"(send this request after the answer to the one before)" in told
        proxy.upstream.answers = [plain({"id": "file-1"})]
        upload = b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\nx-stockyard-provider: openai\r\ncontent-length: 3000000\r\n\r\n"
        assert b"file-1" in await talk(upload + b"x" * 1_000_000, b"x" * 2_000_000)
        assert proxy.upstream.seen[-1].body == b"x" * 3_000_000
        assert b" 400 " in await talk(b"nonsense\r\n\r\n")


async def test_a_budget_that_clamps_shortens_what_any_worker_asks_for(tmp_path: Path) -> None:
    async with proxy_on(tmp_path, toml=PRICES) as proxy:
        _, secret = await make_key(proxy, budget={"usd": 0.004, "period": "day", "clamp": True})
        proxy.upstream.answers = [plain(COMPLETION)]
        proxy.upstream.answers[0].hang_s = 0.5
        async with clients(6, authorization=f"Bearer {secret}") as sessions:
            told = await asyncio.gather(*(ask(one, proxy.url, {**ASK, "max_tokens": 120}) for one in sessions))
        assert [status for status, _, _ in told].count(200) == 2
        assert sorted(json.loads(seen.body)["max_tokens"] == 120 for seen in proxy.upstream.seen) == [False, True]


async def test_those_who_watch_the_log_see_the_calls_of_all_workers(tmp_path: Path) -> None:
    async with proxy_on(tmp_path) as proxy, clients(4) as sessions, aiohttp.ClientSession() as watching:
        headers = {"authorization": f"Bearer {proxy.admin_key}"}
        async with asyncio.timeout(20), watching.get(f"{proxy.url}/api/events", headers=headers) as events:
            await events.content.readline()
            ids = {(await ask(session, proxy.url))[1] for session in sessions}
            while ids:
                line = (await events.content.readline()).decode()
                if line.startswith("data: "):
                    ids.discard(json.loads(line[6:])["id"])


async def test_a_start_that_no_worker_survives_says_so(tmp_path: Path) -> None:
    (tmp_path / "stockyard.toml").write_text("")
    async with fake_upstream() as upstream:
        proxy = Proxy(tmp_path, upstream)
        environment = {"PATH": os.environ["PATH"], "STOCKYARD_DATA_DIR": str(tmp_path), "STOCKYARD_PORT": "0"}
        program = (
            "import sys, stockyard; stockyard.worker_program = lambda files: 'raise SystemExit(7)';"
            "sys.exit(stockyard.main(['serve', '--workers', '2']))"
        )
        proxy.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            program,
            cwd=Path(stockyard.__file__).parent,
            env=environment,
            stdout=PIPE,
            stderr=PIPE,
        )
        _, told = await asyncio.wait_for(proxy.process.communicate(), 30)
        assert proxy.process.returncode == 2
        assert "a worker ended with status 7 and could not serve" in told.decode()


@pytest.mark.parametrize("text", ["0", "257", "many"])
def test_a_wrong_number_of_workers_is_refused(text: str) -> None:
    with pytest.raises(stockyard.SettingsError, match="workers"):
        stockyard.read_settings({"workers": text}, {})
