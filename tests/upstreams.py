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


def named(value: dict[str, Any]) -> bytes:
    """An event as Anthropic and the Responses API write it: its type is its name."""
    return b"event: " + value["type"].encode() + b"\n" + event(value)


@dataclass(frozen=True)
class Golden:
    """One whole answer of one dialect, plain and streamed: 10 tokens in, 5 out, `Hello there`.

    `terminal` stands in the event which alone proves that the stream is whole; `model` is what to ask for.
    """

    path: str
    request: dict[str, Any]
    plain: dict[str, Any]
    pieces: list[bytes]
    terminal: bytes


_ANTHROPIC_HEAD: dict[str, Any] = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-4-5",
                                   "stop_sequence": None}  # fmt: skip
_RESPONSE: dict[str, Any] = {"id": "resp_1", "object": "response", "created_at": 1, "model": "gpt-4o-mini", "error": None,
                             "incomplete_details": None, "instructions": None, "metadata": {}, "parallel_tool_calls": True,
                             "temperature": 1.0, "tool_choice": "auto", "tools": [], "top_p": 1.0}  # fmt: skip
_TEXT: dict[str, Any] = {"type": "output_text", "text": "Hello there", "annotations": []}
_ITEM: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "status": "completed",
    "role": "assistant",
    "content": [_TEXT],
}
_WHOLE: dict[str, Any] = {**_RESPONSE, "status": "completed", "output": [_ITEM],
                          "usage": {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15,
                                    "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}}  # fmt: skip
_PLACE: dict[str, Any] = {"item_id": "msg_1", "output_index": 0, "content_index": 0}


def _gemini(text: str, **more: Any) -> dict[str, Any]:
    candidate = {"content": {"parts": [{"text": text}], "role": "model"}, "index": 0, **more}
    usage = {"promptTokenCount": 10, "candidatesTokenCount": 5, "totalTokenCount": 15}
    return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "gemini-2.5-flash", "responseId": "r1"}


_ASK: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
GOLDENS = {
    "openai": Golden("/v1/chat/completions", {"model": "gpt-4o-mini", "messages": _ASK}, COMPLETION, STREAM, b"[DONE]"),
    "anthropic": Golden(
        "/v1/messages", {"model": "claude-sonnet-4-5", "max_tokens": 50, "messages": _ASK},
        {**_ANTHROPIC_HEAD, "content": [{"type": "text", "text": "Hello there"}], "stop_reason": "end_turn",
         "usage": {"input_tokens": 10, "output_tokens": 5}},
        [named(value) for value in (
            {"type": "message_start", "message": {**_ANTHROPIC_HEAD, "content": [], "stop_reason": None,
                                                  "usage": {"input_tokens": 10, "output_tokens": 1}}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "ping"},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": " there"}},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": {"output_tokens": 5}},
            {"type": "message_stop"},
        )],
        b"event: message_stop",
    ),
    "responses": Golden(
        "/v1/responses", {"model": "gpt-4o-mini", "input": "Hi"}, _WHOLE,
        [named({**value, "sequence_number": at}) for at, value in enumerate((
            {"type": "response.created", "response": {**_RESPONSE, "status": "in_progress", "output": [], "usage": None}},
            {"type": "response.output_item.added", "output_index": 0, "item": {**_ITEM, "status": "in_progress", "content": []}},
            {"type": "response.content_part.added", **_PLACE, "part": {**_TEXT, "text": ""}},
            {"type": "response.output_text.delta", **_PLACE, "delta": "Hello", "logprobs": []},
            {"type": "response.output_text.delta", **_PLACE, "delta": " there", "logprobs": []},
            {"type": "response.output_text.done", **_PLACE, "text": "Hello there", "logprobs": []},
            {"type": "response.content_part.done", **_PLACE, "part": _TEXT},
            {"type": "response.output_item.done", "output_index": 0, "item": _ITEM},
            {"type": "response.completed", "response": _WHOLE},
        ))],
        b"event: response.completed",
    ),
    "gemini": Golden(
        "/v1beta/models/gemini-2.5-flash:", {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]},
        _gemini("Hello there", finishReason="STOP"),
        [event(_gemini("Hello")), event(_gemini(" there")), event(_gemini("", finishReason="STOP"))],
        b'"finishReason"',
    ),
}  # fmt: skip


@dataclass
class Answer:
    """One scripted answer. `pieces` are body bytes; `cut` closes without the proper end; `hang_s` waits before it.

    All of it waits for `begin`, and the last piece for `go`, where something else has to happen first.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)
    chunked: bool = True
    cut: bool = False
    hang_s: float = 0.0
    gap_s: float = 0.0
    begin: asyncio.Event | None = None
    go: asyncio.Event | None = None
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
        if answer.begin is not None:
            await answer.begin.wait()
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
            if answer.go is not None and piece is answer.pieces[-1]:
                await answer.go.wait()
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
                    with contextlib.suppress(ConnectionError):  # a reset is a hang-up as well
                        if await reader.read(1):
                            return
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
