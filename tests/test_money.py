"""Money under attack: a provider that keeps books of its own, bills the most it may and misbehaves, never sees more than
the limit; no hold leaks; a process that is killed charges what was under way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import NOON_S, Start, until
from test_prices import table
from upstreams import COMPLETION, DONE, Answer, chunk, plain, stream

import stockyard

INPUT_NANOUSD, OUTPUT_NANOUSD = 1_000, 10_000  # a token, as in PRICES
PRICES = '[[prices]]\nmodel = "m"\ninput = 1\noutput = 10\n'
KEY_AND_URL = {"API_KEY": "k", "BASE_URL": "UPSTREAM"}
ROUTE = '[routes.r]\ntargets = ["openai/m"]\nfallbacks = ["groq/m"]\nretries = 1\n'
WORST_NANOUSD = 2_500_000  # a little over what a call of these tests can cost
MOODS = ("honest", "silent", "error", "overloaded", "hang", "reset", "cut", "lies")


class Adversary:
    """A provider with its own ledger: it bills every byte it was sent and every token it was allowed, on arrival.

    Moods: honest; no usage; an error after the bill; overloaded (the one that bills nothing); hangs; resets the
    connection; breaks off midway; tells usage in a stream and then goes on for longer than anybody listens.
    """

    def __init__(self, seed: int, moods: tuple[str, ...] = MOODS) -> None:
        self.random, self.moods = random.Random(seed), moods
        self.billed_nanousd = self.calls = self.port = 0
        self.serving: set[asyncio.Task[Any]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.serving.add(task)
        task.add_done_callback(self.serving.discard)
        try:
            while await self.answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort() if writer.transport.is_closing() else writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        size = int(head.partition("content-length: ")[2].partition("\r\n")[0] or 0)
        body = await reader.readexactly(size)
        if not body:
            return self.write(writer, 200, b'{"object": "list", "data": []}')
        asked, mood = json.loads(body), self.random.choice(self.moods)
        self.calls += 1
        if mood == "overloaded":
            return self.write(writer, 503, b'{"error": {"message": "overloaded"}}')
        allowed = stockyard.output_allowed(asked)
        assert allowed is not None
        self.billed_nanousd += size * INPUT_NANOUSD + allowed * OUTPUT_NANOUSD
        usage = {"prompt_tokens": size, "completion_tokens": allowed, "total_tokens": size + allowed}
        return await self.play(mood, bool(asked.get("stream")), usage if mood != "silent" else None, writer)

    async def play(self, mood: str, stream: bool, usage: Any, writer: asyncio.StreamWriter) -> bool:
        if mood == "error":
            return self.write(writer, 500, b'{"error": {"message": "billed all the same"}}')
        if mood == "hang":
            await asyncio.sleep(1.5)
        if mood in ("hang", "reset"):
            writer.transport.abort()
            return False
        message = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "usage": usage}
        if not stream:
            choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
            whole = json.dumps({**message, "choices": [choice]}).encode()
            self.write(writer, 200, whole[:-9] if mood == "cut" else whole, len(whole))
            return mood != "cut"
        self.write(writer, 200, b"", None, "text/event-stream")
        for text in ("a", "b", "c"):
            delta = {"index": 0, "delta": {"content": text}, "finish_reason": None}
            self.event(writer, {**message, "object": "chat.completion.chunk", "usage": None, "choices": [delta]})
            await writer.drain()
        if mood != "cut":
            last = {"index": 0, "delta": {}, "finish_reason": "stop"}
            self.event(writer, {**message, "object": "chat.completion.chunk", "usage": None, "choices": [last]})
            if usage:
                self.event(writer, {**message, "object": "chat.completion.chunk", "choices": []})
            writer.write(b"data: [DONE]\n\n")
        return False

    @staticmethod
    def event(writer: asyncio.StreamWriter, value: Any) -> None:
        writer.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    @staticmethod
    def write(
        writer: asyncio.StreamWriter, status: int, body: bytes, length: int | None = -1, kind: str = "application/json"
    ) -> bool:
        told = "connection: close" if length is None else f"content-length: {len(body) if length < 0 else length}"
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\n{told}\r\n\r\n".encode() + body)
        return True


@contextlib.asynccontextmanager
async def adversary(seed: int, *moods: str) -> AsyncIterator[Adversary]:
    found = Adversary(seed, moods or MOODS)
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        server.close()
        for task in found.serving:
            task.cancel()
        await asyncio.gather(*found.serving, return_exceptions=True)
        await asyncio.sleep(0)


async def storm(url: str, seed: int, clients: int) -> list[int]:
    """Many clients at once: plain and streamed, direct and with a fallback, some of which hang up early."""
    randomness = random.Random(seed)

    async def ask(session: aiohttp.ClientSession, at: int) -> int:
        body = {
            "model": randomness.choice(("openai/m", "r")),
            "messages": [{"role": "user", "content": f"Hi {at}"}],
            "max_tokens": 100,
        }
        body["stream"] = randomness.random() < 0.5
        patience_s = 0.05 if randomness.random() < 0.1 else 30
        try:
            async with asyncio.timeout(patience_s), session.post(f"{url}/v1/chat/completions", json=body) as answer:
                await answer.read()
                return answer.status
        except (TimeoutError, aiohttp.ClientError):
            return 0

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        return await asyncio.gather(*(ask(session, at) for at in range(clients)))


def account(gateway: stockyard.Gateway) -> Any:
    [found] = gateway.ledger.snapshot(int(gateway.clock() * 1000))
    return found


async def settle_down(gateway: stockyard.Gateway) -> None:
    async with asyncio.timeout(20):
        while gateway.in_flight or gateway.ledger.open:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_provider_that_bills_the_most_it_may_never_bills_more_than_the_limit(start: Start, seed: int) -> None:
    limit = WORST_NANOUSD * 120
    async with adversary(seed) as first, adversary(seed + 100) as second:
        toml = PRICES + ROUTE + f'[[budgets]]\nusd = "{stockyard.format_usd(limit)}"\nperiod = "total"\n'
        given = {"OPENAI_BASE_URL": first.url, "GROQ_BASE_URL": second.url, "GROQ_API_KEY": "k"}
        async with start(toml=toml, cache="off", first_byte_timeout=0.5, retries=1, **given) as proxy:
            gateway = proxy.gateway
            statuses = await storm(proxy.url, seed, 300)
            await settle_down(gateway)
            spent, billed = account(gateway)["settled_nanousd"], first.billed_nanousd + second.billed_nanousd
            assert {200, 429} <= set(statuses)
            assert gateway.ledger.bound_violations == gateway.ledger.repeated_ends == 0
            assert 0 < billed <= spent <= limit
            assert account(gateway)["held_nanousd"] == 0
            left, now_ms = limit - spent, int(gateway.clock() * 1000)
            touched = ("", (), "m", "openai", "")
            with pytest.raises(stockyard.BudgetExceeded):
                gateway.ledger.admit(touched, left + 1, now_ms)
            gateway.ledger.release(gateway.ledger.admit(touched, left, now_ms))
            assert gateway.internal_errors == 0


async def test_200_calls_at_once_on_five_and_a_half_worst_cases_admit_exactly_five(start: Start) -> None:
    async with (
        adversary(1, "honest") as provider,
        start(toml=PRICES, cache="off", OPENAI_BASE_URL=provider.url) as proxy,
    ):
        call = proxy.gateway.begin(stockyard.HOT_ENDPOINTS["/v1/chat/completions"], {}, b"", "")
        call.body = json.dumps(
            {"model": "openai/m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100}
        ).encode()
        proxy.gateway.read(call)
        proxy.gateway.interpret(call)
        [target] = await proxy.gateway.route(call)
        worst = proxy.gateway.cost_bound(call, target)[1]
        assert worst is not None
        proxy.gateway.put_budget(stockyard.Budget("global:total", worst * 11 // 2, "total"))
        body = call.body
        provider.moods = ("hang",)  # all are under way at once
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def ask() -> int:
                headers = {"content-type": "application/json"}
                async with session.post(f"{proxy.url}/v1/chat/completions", data=body, headers=headers) as answer:
                    return answer.status

            proxy.gateway.settings = stockyard.dataclasses.replace(proxy.gateway.settings, retries=0)
            statuses = await asyncio.gather(*(ask() for _ in range(200)))
        assert (provider.calls, statuses.count(429)) == (5, 195)
        assert provider.billed_nanousd <= worst * 11 // 2


@contextlib.asynccontextmanager
async def process(directory: Path, **variables: str) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """A proxy of its own, killed at the end if it still lives."""
    environment = {"PATH": os.environ["PATH"], "STOCKYARD_DATA_DIR": str(directory), "STOCKYARD_PORT": "0", **variables}
    run = await asyncio.create_subprocess_exec(
        sys.executable, stockyard.__file__, "serve", env=environment, cwd=directory, stdout=PIPE, stderr=DEVNULL
    )
    assert run.stdout is not None
    line = (await run.stdout.readline()).decode()
    try:
        yield next(word.rstrip(",") for word in line.split() if "://" in word), run
    finally:
        with contextlib.suppress(ProcessLookupError):
            run.kill()
        await run.wait()


async def test_killed_under_load_it_charges_what_was_under_way(tmp_path: Path) -> None:
    """KILL_ROUNDS=100 in the environment makes a long run of it."""
    rounds = int(os.environ.get("KILL_ROUNDS", "3"))
    limit = WORST_NANOUSD * 25 * rounds
    (tmp_path / "stockyard.toml").write_text(
        PRICES + ROUTE + f'[[budgets]]\nusd = "{stockyard.format_usd(limit)}"\nperiod = "total"\n'
    )
    async with adversary(7) as provider:
        given = {
            "OPENAI_BASE_URL": provider.url, "GROQ_BASE_URL": provider.url, "OPENAI_API_KEY": "k", "GROQ_API_KEY": "k",
            "STOCKYARD_CACHE": "off", "STOCKYARD_FIRST_BYTE_TIMEOUT": "0.5", "STOCKYARD_ADMIN_KEY": "an-admin-key",
        }  # fmt: skip
        for number in range(rounds):
            async with process(tmp_path, **given) as (url, run):
                clients = asyncio.create_task(storm(url, number, 60))
                await asyncio.sleep(provider.random.uniform(0.05, 0.4))
                run.kill()
                await clients
        async with process(tmp_path, **given) as (url, _), aiohttp.ClientSession() as session:
            headers = {"authorization": "Bearer an-admin-key"}
            async with session.get(f"{url}/api/budgets", headers=headers) as answer:
                [told] = (await answer.json())["data"]
        assert told["held_nanousd"] == 0
        assert 0 < provider.billed_nanousd <= told["settled_nanousd"] <= limit


async def test_logged_calls_are_priced_anew_and_unpriced_models_are_named(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        adversary(1, "honest") as provider,
        start(toml=PRICES, cache="off", OPENAI_BASE_URL=provider.url) as proxy,
    ):
        for model in ("openai/m", "openai/m", "openai/nobody-knows"):
            body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 10}
            await proxy.post("/v1/chat/completions", body)
        rows = [row for row in await proxy.rows() if row["cost_usd"] is not None]
        admin = {"authorization": f"Bearer {proxy.gateway.admin_key}"}
        async with proxy.session.get(f"{proxy.url}/api/spend", headers=admin) as answer:
            assert (await answer.json())["unpriced"] == ["openai/nobody-knows"]
    assert len(rows) == 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stockyard, "REPRICED_AT_ONCE", 1)
    (tmp_path / "stockyard.toml").write_text(PRICES.replace("output = 10", "output = 20"))
    assert stockyard.main(["costs", "--reprice", "--json", "--data-dir", str(tmp_path)]) == 0
    priced, unpriced = json.loads(capsys.readouterr().out)
    assert (priced["model"], priced["requests"], priced["cost_usd"]) == ("m", 2, sum(row["cost_usd"] for row in rows))
    assert priced["now_usd"] - priced["cost_usd"] == pytest.approx(2 * 10 * 10 / 1_000_000)
    assert (unpriced["price_id"], unpriced["cost_usd"], unpriced["now_usd"]) == (None, None, None)
    assert stockyard.main(["costs", "--reprice", "--data-dir", str(tmp_path)]) == 0
    assert "openai/nobody-knows" in capsys.readouterr().out


def test_ends_of_holds_go_with_the_next_line_and_none_is_written_twice(tmp_path: Path) -> None:
    def told(generation: int = 1) -> list[str]:
        return [record["id"] for record in stockyard.Journal.movements(tmp_path, generation)]

    journal = stockyard.Journal(tmp_path, 1, full_sync=False)
    ends = [b'{"op":"settle","id":"%b"}' % name for name in (b"a", b"b", b"c")]
    journal.defer(ends[0])
    journal.defer(ends[1])
    assert told() == []
    journal.begin("req_1", b'["req_1"]', b'{"op":"hold","id":"d"}')
    journal.flush()
    assert told() == ["a", "b", "d"]
    journal.defer(ends[2])
    journal.turn()
    assert told() == ["a", "b", "d", "c"]
    journal.defer(ends[0])
    journal.close()
    journal.flush()
    assert told(2) == ["a"]
    assert stockyard.Journal.leftovers(tmp_path) == ([], [["req_1"]])


async def test_a_crash_soon_after_a_call_charges_its_cost_and_not_its_hold(start: Start, tmp_path: Path) -> None:
    async with start(toml=PRICES, budget="1/day", cache="off") as proxy, asyncio.timeout(20):
        for calls in (1, 2):
            assert (await proxy.post(PATH, ASK))[0] == 200
            while True:  # what a process would find that starts now
                left = stockyard.Ledger.replay(stockyard.Journal.movements(tmp_path, 1))
                if len(left.settled) and not left.open:
                    break
                await asyncio.sleep(0.01)
            assert [*left.settled.values()] == [account(proxy.gateway)["settled_nanousd"]] == [calls * 60_000]


async def test_the_end_of_a_hold_is_written_where_no_row_follows_it(start: Start, tmp_path: Path) -> None:
    """As where a process keeps the ledger for several workers, whose rows are not its own."""
    async with start(budget="1/day") as proxy:
        gateway, now_ms = proxy.gateway, int(proxy.gateway.clock() * 1000)

        def left() -> stockyard.Books:
            return stockyard.Ledger.replay(stockyard.Journal.movements(tmp_path, 1))

        for calls in (1, 2):
            hold = gateway.ledger.admit(("", (), "m", "openai", "m"), 70, now_ms)
            assert hold.record is not None and gateway.store.journal.keep(hold.record) and left().open
            gateway.record_end(gateway.ledger.settle(hold, 50))
            await until(lambda: not left().open)
            assert [*left().settled.values()] == [50 * calls]


async def test_what_was_settled_is_remembered_for_a_year_and_totals_for_ever(start: Start, tmp_path: Path) -> None:
    gone, kept, total = (("taken away", window) for window in ("2025-11-21", "2025-11-24", "total"))
    async with start() as proxy:
        gateway, store = proxy.gateway, proxy.gateway.store
        gateway.clock = lambda: 1_795_435_200.0  # 2026-11-23T12:00:00Z
        gateway.stored_settled = {gone: 1, kept: 2, total: 3}
        gateway.put_balances(store.journal.generation)
        await store.flush()
        assert stockyard.read_books(store, tmp_path).settled == {kept: 2, total: 3}


async def test_a_hold_that_cannot_be_written_down_lets_no_call_leave(start: Start) -> None:
    body = {"model": "openai/m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 10}
    async with (
        adversary(1, "honest") as provider,
        start(toml=PRICES, budget="1/day", cache="off", OPENAI_BASE_URL=provider.url) as proxy,
    ):
        journal = proxy.gateway.store.journal
        good, journal._file = journal._file, os.open("/dev/full", os.O_WRONLY)
        status, _, answer = await proxy.post("/v1/chat/completions", body)
        os.close(journal._file)
        journal._file = good
        assert (status, answer["error"]["code"], provider.calls) == (503, "storage_unavailable", 0)
        assert account(proxy.gateway)["held_nanousd"] == account(proxy.gateway)["settled_nanousd"] == 0
        assert journal.error
        assert (await proxy.post("/v1/chat/completions", body))[0] == 200
        assert (journal.error, provider.calls) == ("", 1)


PATH = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "openai/m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1000}


def leave(gateway: stockyard.Gateway, nanousd: int, **more: Any) -> None:
    """Set the limit of the only budget to what it has settled and so much more."""
    [settled] = [row["settled_nanousd"] for row in gateway.ledger.snapshot(0)] or [0]
    gateway.put_budget(stockyard.Budget("global:day", settled + nanousd, "day", **more))


async def test_a_budget_that_clamps_shortens_an_answer_to_what_it_has_left(start: Start) -> None:
    async with start(toml=PRICES, budget="0.000001/day", cache="off") as proxy:
        gateway, now_s = proxy.gateway, proxy.gateway.clock() + 86_400
        gateway.clock = lambda: now_s
        _, _, refused = await proxy.post(PATH, ASK)
        needed = refused["error"]["needed_nanousd"]
        without_output = needed - 1000 * OUTPUT_NANOUSD
        for tokens, spare in ((999, 0), (300, OUTPUT_NANOUSD - 1), (16, 0)):
            leave(gateway, without_output + tokens * OUTPUT_NANOUSD + spare, clamp=True)
            status, headers, _ = await proxy.post(PATH, ASK)
            assert (status, headers["x-stockyard-clamped-max-tokens"]) == (200, str(tokens))
            assert proxy.upstream.seen[-1].json["max_tokens"] == tokens
        for room in (without_output + 16 * OUTPUT_NANOUSD - 1, without_output, 1, 0):
            leave(gateway, room, clamp=True)
            assert (await proxy.post(PATH, ASK))[0] == 429
        leave(gateway, needed - 1, clamp=True)
        assert (await proxy.post(PATH, {**ASK, "n": 1 << 39, "max_tokens": 1 << 39}))[0] < 500
        leave(gateway, needed, clamp=True)
        status, headers, _ = await proxy.post(PATH, ASK)
        assert (status, "x-stockyard-clamped-max-tokens" in headers) == (200, False)
        leave(gateway, needed - 1)
        status, headers, _ = await proxy.post(PATH, ASK)
        assert (status, int(headers["retry-after"]) <= 86_400) == (429, True)
        today = stockyard.window_at("day", int(now_s * 1000)).key
        assert (account(gateway)["window"], len(proxy.upstream.seen)) == (today, 5)
        now_s += 86_400
        assert (await proxy.post(PATH, ASK))[0] == 200, "a new day"


async def test_dearer_terms_are_held_charged_and_priced_anew_as_such(start: Start) -> None:
    async with start(budget="0.000001/day", cache="off") as proxy:
        gateway, asks = proxy.gateway, {**ASK, "model": "gpt-5"}
        needed = [
            (await proxy.post(PATH, {**asks, **more}))[2]["error"]["needed_nanousd"]
            for more in ({}, {"service_tier": "priority"}, {"service_tier": "flex"}, {"service_tier": "gold"})
        ]
        assert needed[1] > 1.99 * needed[0]
        assert needed[2] >= needed[0], "flex may be answered at the standard price"
        assert needed[3] is None, "a tier without a price of its own has no bound"
        leave(gateway, needed[1])
        costs = [
            float((await proxy.post(PATH, {**asks, "service_tier": tier}))[1]["x-stockyard-cost-usd"])
            for tier in ("priority", "default")
        ]
        assert costs[0] == 2 * costs[1] > 0
        leave(gateway, needed[0])
        assert (await proxy.post(PATH, {**asks, "service_tier": "priority"}))[0] == 429
        row = (await proxy.rows())[4]
        lines = stockyard.reprice(gateway.store, gateway.prices, {}, int(gateway.clock() * 1000))
    assert ";service_tier=priority" in row["price_id"]
    assert (row["price_id"],) * 2 in [(line["price_id"], line["now_price_id"]) for line in lines]


async def test_a_resumed_conversation_is_held_with_all_its_turns(start: Start) -> None:
    async with start(toml=PRICES, cache="off", GROQ_API_KEY="k", GROQ_BASE_URL="UPSTREAM") as proxy:

        async def needed(said: Any, **more: Any) -> float:
            body = {"model": "groq/m", "input": said, "max_output_tokens": 20, "store": True, **more}
            _, _, told = await proxy.post("/v1/responses", body, **{"x-stockyard-max-cost-usd": "0"})
            return float(told["error"]["message"].partition("$")[2].partition(",")[0])

        long = [{"id": "msg_1", "type": "message", "role": "user", "content": "word " * 20_000}]
        _, _, first = await proxy.post("/v1/responses", {"model": "groq/m", "input": long, "max_output_tokens": 20})
        whole = await needed(long)
        assert whole > 0.1
        assert await needed("Hi", previous_response_id=first["id"]) > whole
        assert await needed([{"type": "item_reference", "id": "msg_1"}] * 10) > 9 * whole


@pytest.mark.parametrize(
    ("model", "is_bounded"),
    [
        ("gpt-4o", True),
        ("gpt-4o-search-preview", False),  # a fee for the search that each of its answers begins with
        ("gpt-4o-audio-preview", False),  # listed with its price of text only
        ("gpt-audio", True),
        ("perplexity/sonar", True),
        ("perplexity/sonar-deep-research", False),  # searches as often as it likes
        ("openrouter/perplexity/sonar", False),
        ("openrouter/google/gemini-2.5-flash-image", False),
    ],
)
async def test_what_a_model_bills_unasked_is_bounded_or_refused(start: Start, model: str, is_bounded: bool) -> None:
    keys = {"PERPLEXITY_API_KEY": "k", "OPENROUTER_API_KEY": "k"}
    async with start(budget="0.000000001/day", cache="off", **keys) as proxy:
        status, _, told = await proxy.post(PATH, {**ASK, "model": model})
    assert (status, told["error"]["needed_nanousd"] is not None) == (429, is_bounded)


@pytest.mark.parametrize(
    ("wishes", "most"),
    [
        (None, {"prompt": 0.15, "completion": 0.6, "request": 0}),
        ({"order": ["a"]}, {"prompt": 0.15, "completion": 0.6, "request": 0}),
        ({"max_price": {"prompt": 0.1, "completion": "5", "image": 1}}, {"prompt": 0.1, "completion": 0.6, "request": 0, "image": 1}),
        ({"max_price": {"prompt": "much"}}, {"prompt": 0.15, "completion": 0.6, "request": 0}),
        ("any", {"prompt": 0.15, "completion": 0.6, "request": 0}),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (PATH, {"max_tokens": 5, "messages": ASK["messages"]}),
        ("/v1/responses", {"max_output_tokens": 20, "input": "Hi"}),
    ],
)
async def test_a_host_dearer_than_what_is_held_is_left_out_where_the_provider_has_several(
    start: Start, path: str, body: dict[str, Any], wishes: Any, most: dict[str, float]
) -> None:
    body = {"model": "openrouter/openai/gpt-4o-mini", **body, **({"provider": wishes} if wishes else {})}
    given = {"OPENROUTER_API_KEY": "k", "OPENROUTER_BASE_URL": "UPSTREAM"}
    async with start(budget="5/day", cache="off", **given) as proxy:
        await proxy.post(path, body)
        [seen] = proxy.upstream.seen
    assert seen.json["provider"] == {**(wishes if isinstance(wishes, dict) else {}), "max_price": most}
    async with start(cache="off", **given) as proxy:
        await proxy.post(path, body)
        [seen] = proxy.upstream.seen
    assert seen.json.get("provider") == wishes


async def test_a_call_may_say_the_most_that_it_may_cost(start: Start) -> None:
    async with start(toml=PRICES, cache="off") as proxy:

        async def ask(most: str, **more: Any) -> tuple[int, Any]:
            status, _, told = await proxy.post(PATH, {**ASK, **more}, **{"x-stockyard-max-cost-usd": most})
            return status, told.get("error", {})

        _, error = await ask("0")
        assert (await proxy.post(PATH, ASK, **{"x-stockyard-max-cost-usd": "0"}))[1]["retry-after"] == "1"
        needed = int(float(error["message"].partition("$")[2].partition(",")[0]) * 10**9 + 0.5)
        assert [(await ask(stockyard.format_usd(most)))[0] for most in (needed, needed - 1)] == [200, 429]
        status, error = await ask("1", model="openai/unpriced")
        assert (status, "is not known" in error["message"]) == (429, True)
        assert (await ask("much"))[1]["param"] == "x-stockyard-max-cost-usd"
        assert (await ask("1", max_tokens=None))[0] == 200
        assert (await proxy.post(PATH, {**ASK, "max_tokens": None}))[0] == 200
    caps = [seen.json.get("max_completion_tokens") or seen.json.get("max_tokens") for seen in proxy.upstream.seen]
    assert caps == [1000, 4096, None]


async def test_what_no_provider_told_is_charged_whole_where_it_was_bounded(start: Start) -> None:
    silent = {**COMPLETION}
    del silent["usage"]
    async with start(toml=PRICES, budget="1/day", cache="off") as proxy:
        proxy.upstream.answers = [plain(silent)]
        needed = (await proxy.post(PATH, ASK, **{"x-stockyard-max-cost-usd": "0"}))[2]["error"]["message"]
        assert (await proxy.post(PATH, ASK))[0] == 200
        assert f"${account(proxy.gateway)['settled_usd']}," in needed
        leave(proxy.gateway, 1, mode="soft")
        before = account(proxy.gateway)["settled_nanousd"]
        assert (await proxy.post(PATH, {**ASK, "model": "openai/unpriced"}))[0] == 200
        assert account(proxy.gateway)["settled_nanousd"] == before
        assert (await proxy.post(PATH, {"model": "openai/m", "messages": ASK["messages"]}))[0] == 200
        assert not {"max_tokens", "max_completion_tokens"} & {*proxy.upstream.seen[-1].json}


async def test_a_cap_of_one_targets_budget_is_not_the_next_ones(start: Start) -> None:
    budget = '[[budgets]]\nscope = "provider"\nvalue = "openai"\nusd = 1\nperiod = "day"\n'
    given = {"GROQ_API_KEY": "k", "GROQ_BASE_URL": "UPSTREAM"}
    async with start(toml=PRICES + ROUTE + budget, cache="off", retries=0, **given) as proxy:
        proxy.upstream.answers = [plain({"error": {"message": "x"}}, 500), plain({"error": {}}, 500), plain(COMPLETION)]
        status, _, _ = await proxy.post(PATH, {"model": "r", "messages": ASK["messages"]})
    assert status == 200
    assert ["max_completion_tokens" in seen.json for seen in proxy.upstream.seen] == [True, True, False]


async def test_what_a_failed_try_told_of_its_usage_is_not_the_next_ones(start: Start) -> None:
    """The first answer is read, usage and all, and cannot be told to the client; the second tells no usage."""
    toml = PRICES + '[routes.r]\ntargets = ["groq/m"]\nfallbacks = ["openrouter/m"]\nretries = 0\n'
    given = {f"{name}_{what}": text for name in ("GROQ", "OPENROUTER") for what, text in KEY_AND_URL.items()}
    async with start(toml=toml, budget="1/day", cache="off", **given) as proxy:
        odd = {"message": {"role": "assistant", "content": "Hi", "annotations": 5}, "finish_reason": "stop", "index": 0}
        silent = {name: value for name, value in COMPLETION.items() if name != "usage"}
        proxy.upstream.answers = [plain({**COMPLETION, "choices": [odd]}), plain(silent)]
        status, _, told = await proxy.post("/v1/responses", {"model": "r", "input": "Hi", "max_output_tokens": 1000})
        [row] = await proxy.rows()
        explained = stockyard.find_request(proxy.gateway.store, row["id"])
    assert (status, row["attempts"], row["cost_usd"]) == (200, 2, None), told
    assert explained is not None
    lines = [line["budget"] for line in explained["attempt_log"]]
    assert [line["charged_usd"] == line["held_usd"] for line in lines] == [True, True]


async def test_embeddings_are_bounded_by_their_input_alone(start: Start) -> None:
    body = {"model": "openai/m", "input": "Hi"}
    async with start(toml=PRICES, budget="0.000001/day") as proxy:
        _, _, told = await proxy.post("/v1/embeddings", body)
    bound = len(json.dumps(body)) + stockyard.INPUT_BOUNDS["openai"].request
    assert told["error"]["needed_nanousd"] == bound * INPUT_NANOUSD


async def test_a_day_ends_for_whoever_asks_first(start: Start) -> None:
    body = {"model": "openai/m", "input": "Hi"}
    async with start(toml=PRICES, budget="0.000001/day", cache="off") as proxy:
        gateway, now_s = proxy.gateway, NOON_S
        gateway.clock = lambda: now_s
        needed = (await proxy.post("/v1/embeddings", body))[2]["error"]["needed_nanousd"]
        gateway.put_budget(stockyard.Budget("global:day", needed * 3 // 2, "day"))
        proxy.upstream.answers = [plain({"object": "list", "data": []})]
        statuses = []
        for hours in (0, 11, 2, 1):
            now_s += hours * 3600
            statuses.append((await proxy.post("/v1/embeddings", body))[0])
    assert statuses == [200, 429, 200, 429]


async def test_a_call_is_held_for_at_the_price_of_its_day(start: Start) -> None:
    terms = [{"from": "2026-01-01", "input": "1"}, {"from": "2026-11-24", "input": "7"}]
    async with start(budget="0.000001/day") as proxy:
        proxy.gateway.prices = stockyard.PriceBook.load(table({"id": "m", "prices": terms}, openai={"lists": ["rows"]}))
        needed = []
        for now_s in (1_795_435_200.0, 1_795_435_200.0 + 86_400):  # the 23rd and the 24th of November 2026
            proxy.gateway.clock = lambda now_s=now_s: now_s
            told = (await proxy.post("/v1/embeddings", {"model": "openai/m", "input": "Hi"}))[2]
            needed.append(told["error"]["needed_nanousd"])
    assert needed[1] == 7 * needed[0]


@pytest.mark.parametrize("path", [PATH, "/v1/messages"])
async def test_what_a_route_adds_to_a_call_is_held_for(start: Start, path: str) -> None:
    needed = []
    for system in ("", "Be brief. " * 50):
        toml = PRICES + f'[routes.r]\ntargets = ["openai/m"]\nsystem_prefix = "{system}"\n'
        async with start(toml=toml, budget="0.000001/day") as proxy:
            needed.append((await proxy.post(path, {**ASK, "model": "r"}))[2]["error"]["needed_nanousd"])
    assert needed[1] - needed[0] >= 500 * INPUT_NANOUSD


async def test_no_call_leaves_while_too_many_rows_wait_to_be_written(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockyard, "QUEUE_MAX_ROWS", 0)
    async with start() as proxy:
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
        status, headers, answer = await proxy.post("/v1/chat/completions", body)
    assert (status, headers["retry-after"], answer["error"]["code"]) == (503, "1", "storage_unavailable")
    assert proxy.upstream.seen == []


async def test_what_a_dead_process_held_for_a_key_of_the_file_counts_at_once_and_ever_after(
    start: Start, tmp_path: Path
) -> None:
    toml = f'[keys.k]\ndigest = "sha256:{"0" * 64}"\nbudget = {{usd = 1, period = "total"}}\n'
    budget, held = "key:key_toml_k:total", {"nanousd": 70, "held": 70, "at": 1}
    record = {"op": "hold", "id": "hold_1", "budgets": [[budget, "total"]], **held}
    (tmp_path / "ledger-00000003.journal").write_text(json.dumps(record) + "\n")
    for _ in range(3):
        async with start(toml=toml) as proxy:
            found = account(proxy.gateway)
            assert (found["id"], found["settled_nanousd"], found["held_nanousd"]) == (budget, 70, 0)
            await proxy.gateway.store.flush()
            assert len(stockyard.Journal.paths(tmp_path)) == 1
        assert not stockyard.Journal.paths(tmp_path)


def unmetered() -> Answer:
    """A stream that says nothing of its usage."""
    return stream([chunk({"role": "assistant", "content": "Hello there"}), chunk({}, "stop"), DONE])


async def test_an_answer_whose_usage_is_not_told_is_charged_at_its_whole_hold(start: Start) -> None:
    async with start(toml=PRICES, budget="1/day", cache="off") as proxy:
        proxy.upstream.answers = [unmetered()]
        assert (await proxy.post(PATH, {**ASK, "max_tokens": 100, "stream": True}))[0] == 200
        [row] = await proxy.rows()
        explained = stockyard.find_request(proxy.gateway.store, row["id"])
        assert explained is not None
        [budget] = [line["budget"] for line in explained["attempt_log"]]
        assert row["cost_usd"] < budget["charged_usd"] == budget["held_usd"]
        assert account(proxy.gateway)["settled_nanousd"] == round(budget["held_usd"] * 1e9)


async def test_a_soft_budget_is_charged_by_estimate_where_nothing_bounds_a_call(start: Start) -> None:
    soft = PRICES + '[[budgets]]\nusd = 1\nperiod = "day"\nmode = "soft"\n'
    async with start(toml=soft, cache="off") as proxy:
        proxy.upstream.answers = [unmetered()]
        asked = {**ASK, "stream": True, "web_search_options": {"search_context_size": "low"}}
        assert (await proxy.post(PATH, asked))[0] == 200
        [row] = await proxy.rows()
        assert account(proxy.gateway)["settled_nanousd"] == round(row["cost_usd"] * 1e9) > 0
