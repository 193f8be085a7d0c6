"""What several test files share."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import hypothesis
import pytest
from upstreams import FakeUpstream, fake_upstream

import stockyard
from stockyard import Provider, Translation

# The same examples every time, and no clock: a busy machine must not make a test fail.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session")
def attempt() -> Callable[..., Translation]:
    """Makes the Translation of one attempt; ids count up from 0 in each."""

    def make(model: str, stream: bool = False, strict: bool = False) -> Translation:
        ids = itertools.count()
        provider = Provider(id="p", name="P", base_url="https://api.replicate.com/v1")
        return Translation(
            model=model,
            provider=provider,
            stream=stream,
            now_s=1_790_000_000,
            new_id=lambda prefix: f"{prefix}{next(ids)}",
            strict=strict,
        )

    return make


class Proxy:
    """A gateway with its server in this process, its fake upstream, and its log."""

    def __init__(
        self, gateway: stockyard.Gateway, url: str, upstream: FakeUpstream, session: aiohttp.ClientSession
    ) -> None:
        self.gateway, self.url, self.upstream, self.session = gateway, url, upstream, session

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
        """Status, headers, and the body: JSON where it is, else bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(
            self.url + path, data=data, headers={"content-type": "application/json", **headers}
        ) as answer:
            raw = await answer.read()
            told = json.loads(raw) if answer.content_type == "application/json" else raw
            return answer.status, answer.headers, told

    async def rows(self) -> list[dict[str, Any]]:
        """All log rows, the oldest first."""
        await self.gateway.store.flush()
        return [
            stockyard.public_row(row) for row in reversed(stockyard.find_page(self.gateway.store, {}, 1000, 0).rows)
        ]


Start = Callable[..., AbstractAsyncContextManager[Proxy]]


async def until(holds: Callable[[], Any]) -> None:
    """Wait for what other tasks do, long enough for a busy machine."""
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts a proxy with settings given as keywords (`toml`: a file's text) and provider variables in upper case."""

    @asynccontextmanager
    async def run(**given: Any) -> AsyncIterator[Proxy]:
        async with fake_upstream() as upstream:
            flags = {
                "port": "0",
                "data_dir": str(tmp_path),
                **{name: str(value) for name, value in given.items() if name.islower() and name != "toml"},
            }
            environment = {"OPENAI_API_KEY": "sk-canary-openai", "OPENAI_BASE_URL": upstream.url}
            environment |= {
                name: value.replace("UPSTREAM", upstream.url) for name, value in given.items() if name.isupper()
            }
            settings = stockyard.read_settings(flags, {}, given.get("toml", ""))
            listener = stockyard.bind(settings)
            port = listener.getsockname()[1]
            async with (
                stockyard.open_gateway(settings, environment) as gateway,
                stockyard.open_server(gateway, listener),
            ):
                async with aiohttp.ClientSession() as session:
                    yield Proxy(gateway, f"http://127.0.0.1:{port}", upstream, session)
                await until(lambda: not gateway.in_flight)  # whatever a test does, no call stays under way for ever

    return run


#: 2100-11-23T12:00:00Z: a ledger's clock never goes back, so that a day which the real one has reached would not do.
NOON_S = 4_130_654_400.0


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[stockyard.Gateway]:
    """A gateway without a server, whose clocks stand still; the model `m` costs $1 and $10 a million tokens."""
    prices = '[[prices]]\nmodel = "m"\ninput = 1\noutput = 10\n'
    settings = stockyard.read_settings({"data_dir": str(tmp_path)}, {}, prices)
    async with stockyard.open_gateway(settings, {"OPENAI_API_KEY": "k"}) as found:
        found.clock = lambda: NOON_S
        found.tick = lambda: 10.0
        yield found
