"""The built-in provider as its users see it: texts, tools, streams, vectors, and odd requests that are refused."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from conftest import Proxy, Start

CHAT = "/v1/chat/completions"


def asking(text: Any, **more: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **more}


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER = tool(
    "weather",
    type="object",
    properties={
        "city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}, "exact": {"type": ["boolean", "null"]},
        "share": {"type": "number"}, "tags": {"type": "array"}, "place": {"properties": {"x": {"type": "number"}}}, "any": {}, "odd": 5,
    },
)  # fmt: skip
ARGUMENTS = {
    "city": "echo",
    "days": 1,
    "unit": "C",
    "exact": True,
    "share": 1.0,
    "tags": [],
    "place": {"x": 1.0},
    "any": {},
}


async def message_of(proxy: Proxy, request: dict[str, Any]) -> dict[str, Any]:
    status, _, told = await proxy.post(CHAT, request)
    assert status == 200
    message: dict[str, Any] = told["choices"][0]["message"]
    return message


async def test_it_calls_the_tool_that_is_named_forced_or_required(start: Start) -> None:
    tools = [WEATHER, tool("clock")]
    forced = {"type": "function", "function": {"name": "clock"}}
    async with start() as proxy:
        named = (await message_of(proxy, asking("the weather?", tools=tools)))["tool_calls"][0]["function"]
        assert (named["name"], json.loads(named["arguments"])) == ("weather", ARGUMENTS)
        for choice, text, name in ((forced, "the weather?", "clock"), ("required", "hello", "weather")):
            [call] = (await message_of(proxy, asking(text, tools=tools, tool_choice=choice)))["tool_calls"]
            assert call["function"]["name"] == name
        for choice, text in (("auto", "hello"), ("none", "the weather?")):
            said = await message_of(proxy, asking(text, tools=tools, tool_choice=choice))
            assert (said["content"], "tool_calls" in said) == (f"Echo: {text}", False)
        after = asking("the weather?", tools=tools)
        after["messages"] += [
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": named}]},
            {"role": "tool", "tool_call_id": "c", "content": "weather: rain"},
        ]
        assert (await message_of(proxy, after))["content"] == "Echo: weather: rain"


async def test_a_tool_call_is_streamed_in_pieces(start: Start) -> None:
    async with start() as proxy:
        _, _, raw = await proxy.post(CHAT, asking("the weather?", tools=[WEATHER], stream=True))
    events = [json.loads(line[6:]) for line in raw.decode().split("\n\n") if line.startswith("data: {")]
    calls = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", ())]
    assert [call["function"].get("name") for call in calls] == ["weather", None]
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == ARGUMENTS
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_it_keeps_the_output_cap(start: Start) -> None:
    async with start() as proxy:
        _, _, told = await proxy.post(CHAT, asking("one two three", max_tokens=2))
    assert (told["choices"][0]["message"]["content"], told["choices"][0]["finish_reason"]) == ("Echo: one", "length")
    assert told["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


async def test_embeddings_are_the_same_in_both_encodings(start: Start) -> None:
    asked = {"model": "echo", "input": ["a", "b c"], "dimensions": 4}
    async with start() as proxy:
        _, _, plain = await proxy.post("/v1/embeddings", asked)
        _, _, packed = await proxy.post("/v1/embeddings", {**asked, "encoding_format": "base64"})
    for row, other in zip(plain["data"], packed["data"], strict=True):
        assert struct.pack("<4f", *row["embedding"]) == base64.b64decode(other["embedding"])
    assert plain["data"][0]["embedding"] != plain["data"][1]["embedding"]


@pytest.mark.parametrize(
    "more",
    [
        {"delay_ms": "x"}, {"chunk_ms": [1]}, {"tools": 5}, {"tools": ["x"]}, {"tools": [tool("a", enum=[])], "tool_choice": "required"},
        {"tools": [tool("a", type="object", properties=[1])], "tool_choice": "required"}, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        {"stream_options": 5, "stream": True},
    ],
)  # fmt: skip
async def test_odd_requests_are_the_clients_fault(start: Start, more: dict[str, Any]) -> None:
    async with start() as proxy:
        status, _, told = await proxy.post(CHAT, {**asking("hello"), **more})
        assert (status, told["error"]["type"]) == (400, "invalid_request_error")
        assert proxy.gateway.internal_errors == 0
        assert [row["status"] for row in await proxy.rows()] == [400]
