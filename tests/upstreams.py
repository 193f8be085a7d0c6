"""A provider that misbehaves on request: a real socket server that plays a script and remembers what it was sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

COMPLETION: dict[str, Any] = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-4o-mini-2024-07-18",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello there"}, "logprobs": None, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 4}},
}  # fmt: skip


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-mini-2024-07-18"}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return event({**head, "choices": [choice], "usage": None, **more})


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


USAGE_EVENT = event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-mini-2024-07-18",
                     "choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}})  # fmt: skip
DONE = b"data: [DONE]\n\n"
STREAM = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "Hello"}),
    chunk({"content": ' "there" \u00e9\u4e2d'}),
    chunk({}, "stop"),
    USAGE_EVENT,
    DONE,
]


@dataclass
class Answer:
    """One scripted answer. `pieces` are body bytes; `cut` closes without the proper end; `hang_s` waits before it."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)
    chunked: bool = True
    cut: bool = False
    hang_s: float = 0.0
    gap_s: float = 0.0
    #: Sent as it is instead of all the rest; then the connection is closed, or reset.
    raw: bytes | None = None
    reset: bool = False
    stays_s: float = 0.0


def plain(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, {"content-type": "application/json", **headers}, [json.dumps(value).encode()], chunked=False)


def stream(pieces: list[bytes], **more: Any) -> Answer:
    return Answer(headers={"content-type": "text/event-stream"}, pieces=pieces, **more)


@dataclass
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class FakeUpstream:
    """Plays `answers` in turn, the last one for ever; without a script it answers as OpenAI would."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.seen: list[Seen] = []
        self.hung_up = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.seen.append(Seen(method, path, headers, body))
        answer = self._answer(path, body)
        await self._wait(reader, answer.hang_s)
        if answer.raw is not None:
            writer.write(answer.raw)
            await writer.drain()
            await self._wait(reader, answer.stays_s)
            if answer.reset:
                writer.transport.abort()
            return False
        lines = [f"HTTP/1.1 {answer.status} X", *(f"{name}: {value}" for name, value in answer.headers.items())]
        lines.append(
            "transfer-encoding: chunked" if answer.chunked else f"content-length: {sum(map(len, answer.pieces))}"
        )
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        for piece in answer.pieces:
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if answer.chunked else piece)
            await writer.drain()
            await self._wait(reader, answer.gap_s)
        if answer.cut:
            return False
        if answer.chunked:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _wait(self, reader: asyncio.StreamReader, seconds: float) -> None:
        """Pause, but notice a client that hangs up."""
        if seconds:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    if not await reader.read(1):
                        self.hung_up += 1
                        raise ConnectionError

    def _answer(self, path: str, body: bytes) -> Answer:
        if self.answers:
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if path.endswith("/models"):
            return plain(
                {
                    "object": "list",
                    "data": [{"id": "gpt-4o-mini", "object": "model", "created": 1, "owned_by": "openai"}],
                }
            )
        if path.endswith("/embeddings"):
            return plain({"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}], "model": "e",
                          "usage": {"prompt_tokens": 2, "total_tokens": 2}})  # fmt: skip
        return stream(STREAM) if json.loads(body).get("stream") else plain(COMPLETION)


@contextlib.asynccontextmanager
async def fake_upstream() -> AsyncIterator[FakeUpstream]:
    upstream = FakeUpstream()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    upstream.port = server.sockets[0].getsockname()[1]
    try:
        yield upstream
    finally:
        server.close()
