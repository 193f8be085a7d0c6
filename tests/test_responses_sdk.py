"""The official SDK as the client of a tiny server that answers from scripted chat completions."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from aiohttp import web
from pydantic import BaseModel

import stockyard as s
from stockyard import (
    GatewayError,
    InvalidRequest,
    OpenAiChat,
    Provider,
    Translation,
    UpstreamError,
)

CHAT, DIALECT = OpenAiChat(), s.OpenAiResponses()
ROW = Provider(id="up", name="Upstream", base_url="https://example.invalid/v1")
Script = Callable[[Any], list[Any]]


def say(**delta: Any) -> Any:
    return {
        "id": "chatcmpl-9",
        "object": "chat.completion.chunk",
        "created": 5,
        "model": "up-1",
        "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
    }


def end(reason: str = "stop") -> list[Any]:
    usage = {
        "prompt_tokens": 11,
        "completion_tokens": 7,
        "total_tokens": 18,
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    last = {**say(), "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
    return [last, {**say(), "choices": [], "usage": usage}]


def call(index: int, call_id: str | None = None, name: str | None = None, text: str = "", **more: Any) -> Any:
    head = {"id": call_id, "type": "function"} if call_id else {}
    inner = {"arguments": text, **({"name": name} if name else {})}
    return say(tool_calls=[{"index": index, **head, "function": inner, **more}])


class Door:
    """Serves /responses over a scripted chat upstream, translating as the gateway does; remembers what it was asked."""

    def __init__(self) -> None:
        self.script: Script = lambda request: []
        self.requests: list[Any] = []
        self.cut = False
        self.stored: dict[str, list[Any]] = {}
        self._ids = itertools.count(1)

    def new_id(self, prefix: str) -> str:
        return f"{prefix}{next(self._ids):04d}"

    def _chunks(self, request: Any) -> list[Any]:
        """What the chat decoder makes of the bytes that an upstream would send for this script."""
        target = Translation(model="up-1", provider=ROW, stream=True, now_s=5, new_id=self.new_id)
        decoder = CHAT.decoder(target)
        wire = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in self.script(request))
        return decoder.feed(wire + b"data: [DONE]\n\n") + decoder.close()

    async def handle(self, incoming: web.Request) -> web.StreamResponse:
        body = await incoming.json()
        try:
            earlier = self.stored.get(body.get("previous_response_id") or "")
            body = s.resume(body, earlier) if earlier else body
            request = DIALECT.parse(body, {})
            DIALECT.refuse_elsewhere(request)
            self.requests.append(request)
            chunks = self._chunks(request)
        except GatewayError as error:
            status, told = DIALECT.render_error(error, "req_1")
            return web.json_response(told, status=status)
        if body.get("stream"):
            return await self._stream(incoming, body, chunks)
        response = DIALECT.render({**s.join_chunks(chunks), "id": self.new_id("chatcmpl-")}, body)
        self.stored[response["id"]] = s.stored_items(body, response)
        return web.json_response(response)

    async def _stream(self, incoming: web.Request, body: Any, chunks: list[Any]) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": DIALECT.stream_type})
        await answer.prepare(incoming)
        renderer = s.ResponsesRenderer(body, self.new_id, 5)
        for chunk in chunks:
            await answer.write(DIALECT.heartbeat + renderer.feed(chunk))
        error = UpstreamError("the provider broke off", code="upstream_truncated")
        await answer.write(renderer.fail(error, "req_1") if self.cut else renderer.close())
        self.stored[renderer.response["id"]] = s.stored_items(body, renderer.response)
        return answer


@pytest.fixture
def door() -> Iterator[Door]:
    served, loop, ready = Door(), asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/v1/responses", served.handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        served.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"  # type: ignore[attr-defined]
        return runner

    def run() -> None:
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(5)
    yield served
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)


@pytest.fixture
def client(door: Door) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="k", base_url=door.url, max_retries=0) as client:  # type: ignore[attr-defined]
        yield client


TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "Weather.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def test_create(door: Door, client: openai.OpenAI) -> None:
    door.script = lambda request: [say(role="assistant", reasoning_content="Hm"), say(content="Hello"), *end()]
    response = client.responses.create(
        model="m", input="hi", instructions="Be.", temperature=0.5, tools=[TOOL], metadata={"a": "b"}
    )
    assert response.output_text == "Hello" and response.status == "completed" and response.id.startswith("resp_")
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert (
        response.usage
        and response.usage.total_tokens == 18
        and response.usage.output_tokens_details.reasoning_tokens == 2
    )
    assert response.instructions == "Be." and response.metadata == {"a": "b"} and response.temperature == 0.5
    assert type(response).model_validate(response.model_dump()).model_dump() == response.model_dump()
    assert door.requests[0]["messages"][0] == {"role": "system", "content": "Be."}


def test_create_stream_events_are_all_typed(door: Door, client: openai.OpenAI) -> None:
    door.script = lambda request: [
        say(role="assistant", reasoning_content="Hm"),
        say(content="Hel"),
        say(content="lo"),
        say(annotations=[{"type": "url_citation", "url_citation": {"url": "https://a", "title": "A"}}]),
        say(refusal="no"),
        call(0, "c1", "weather", '{"city":'),
        call(1, "c2", "weather", "{}"),
        call(0, text='"B"}'),
        *end("tool_calls"),
    ]
    events = list(client.responses.create(model="m", input="hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in events:
        assert type(event).model_validate(event.model_dump()).type == event.type
        assert type(event).__name__ != "BaseModel"
    final = events[-1]
    assert final.type == "response.completed" and final.response.output_text == "Hello"
    assert [item.arguments for item in final.response.output if item.type == "function_call"] == ['{"city":"B"}', "{}"]


def test_stream_helper_accumulates(door: Door, client: openai.OpenAI) -> None:
    door.script = lambda request: [
        say(content="Hel"),
        say(content="lo"),
        call(0, "c1", "weather", '{"city":"B"}'),
        *end("tool_calls"),
    ]
    with client.responses.stream(model="m", input="hi", tools=[TOOL]) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        response = stream.get_final_response()
    assert snapshots == ["Hel", "Hello"] and response.output_text == "Hello"
    assert response.output[1].parsed_arguments == {"city": "B"}  # type: ignore[union-attr]


class Event(BaseModel):
    name: str
    day: int


def test_structured_output(door: Door, client: openai.OpenAI) -> None:
    door.script = lambda request: [say(content='{"name":"fair",'), say(content='"day":3}'), *end()]
    response = client.responses.parse(model="m", input="when?", text_format=Event)
    assert response.output_parsed == Event(name="fair", day=3)
    form = door.requests[0]["response_format"]
    assert (
        form["type"] == "json_schema"
        and form["json_schema"]["name"] == "Event"
        and form["json_schema"]["strict"] is True
    )
    with client.responses.stream(model="m", input="when?", text_format=Event) as stream:
        stream.until_done()
        assert stream.get_final_response().output_parsed == Event(name="fair", day=3)


def weather(request: Any) -> list[Any]:
    """Two calls at once, then the answer from their results."""
    results = [message["content"] for message in request["messages"] if message["role"] == "tool"]
    if results:
        return [say(content=" and ".join(results)), *end()]
    return [
        say(role="assistant", reasoning_content="Two cities."),
        call(0, "c1", "weather", '{"city":"B"}'),
        call(1, "c2", "weather", '{"city":"P"}'),
        *end("tool_calls"),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stateless_tool_loop(door: Door, client: openai.OpenAI, stream: bool) -> None:
    door.script = weather
    history: list[Any] = [{"role": "user", "content": "Weather in B and P?"}]
    for _ in range(2):
        given: Any = {
            "model": "m",
            "input": history,
            "tools": [TOOL],
            "store": False,
            "include": ["reasoning.encrypted_content"],
        }
        if stream:
            response = list(client.responses.create(**given, stream=True))[-1].response
        else:
            response = client.responses.create(**given)
        history += [item.model_dump(exclude_none=True) for item in response.output]
        for item in response.output:
            if item.type == "function_call":
                city = json.loads(item.arguments)["city"]
                history.append({"type": "function_call_output", "call_id": item.call_id, "output": f"{city} is dry"})
    assert response.output_text == "B is dry and P is dry"
    turn = door.requests[1]["messages"][1]
    assert turn["reasoning_content"] == "Two cities." and [made["id"] for made in turn["tool_calls"]] == ["c1", "c2"]
    assert [message["role"] for message in door.requests[1]["messages"]] == ["user", "assistant", "tool", "tool"]


def test_a_tool_loop_by_previous_response_id(door: Door, client: openai.OpenAI) -> None:
    door.script = weather
    first = client.responses.create(model="m", input="Weather in B and P?", tools=[TOOL])
    calls = [item for item in first.output if item.type == "function_call"]
    results: Any = [{"type": "function_call_output", "call_id": item.call_id, "output": item.call_id} for item in calls]
    second = client.responses.create(model="m", input=results, previous_response_id=first.id, tools=[TOOL])
    assert second.output_text == "c1 and c2"
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="m", input=results, previous_response_id="resp_unknown")
    assert caught.value.code == "previous_response_not_found"


def test_a_coding_agents_loop_with_a_custom_tool_and_signed_reasoning(door: Door, client: openai.OpenAI) -> None:
    signed = {"type": "thinking", "thinking": "Edit.", "signature": "s+/="}
    patch = '*** Begin Patch\n*** Add File: a\n+"x"\n*** End Patch'

    def script(request: Any) -> list[Any]:
        if request["messages"][-1]["role"] == "tool":
            return [say(content=request["messages"][-1]["content"]), *end()]
        text = json.dumps({"input": patch})
        return [
            say(reasoning_content="Edit."),
            say(thinking_blocks=[signed]),
            call(0, "c1", "apply_patch", text[:9], extra_content={"google": {"thought_signature": "g"}}),
            call(0, text=text[9:]),
            *end("tool_calls"),
        ]

    door.script = script
    tools: Any = [
        {
            "type": "custom",
            "name": "apply_patch",
            "description": "Edit.",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
        },
        {"type": "web_search"},
        {"type": "local_shell"},
    ]
    history: list[Any] = [{"role": "developer", "content": "Code."}, {"role": "user", "content": "Add a."}]
    given: Any = {
        "model": "m",
        "tools": tools,
        "store": False,
        "reasoning": {"effort": "high", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
    }
    response = list(client.responses.create(**given, input=history, stream=True))[-1].response
    made = response.output[-1]
    assert made.type == "custom_tool_call" and made.input == patch and made.call_id == "c1"
    history += [item.model_dump(exclude_none=True, by_alias=True) for item in response.output]
    history.append({"type": "custom_tool_call_output", "call_id": "c1", "output": "Done!"})
    assert client.responses.create(**given, input=history).output_text == "Done!"
    turn = door.requests[1]["messages"][2]
    assert turn["thinking_blocks"] == [signed] and turn["tool_calls"][0]["custom"] == {
        "name": "apply_patch",
        "input": patch,
    }
    assert turn["tool_calls"][0]["extra_content"] == {"google": {"thought_signature": "g"}}
    assert [tool["type"] for tool in door.requests[1]["tools"]] == ["custom", "native", "native"]


def test_a_broken_stream_raises_in_the_sdk(door: Door, client: openai.OpenAI) -> None:
    door.script, door.cut = (lambda request: [say(content="Hel")]), True
    seen = []
    with pytest.raises(openai.APIError, match="broke off") as caught:
        for event in client.responses.create(model="m", input="hi", stream=True):
            seen.append(event.type)
    assert caught.value.code == "upstream_truncated" and "response.completed" not in seen
    with pytest.raises(openai.APIError, match="broke off"), client.responses.stream(model="m", input="hi") as stream:
        stream.until_done()


def test_errors_are_raised_by_class(door: Door, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="m", input=[{"type": "function_call_output", "output": "x"}])
    assert caught.value.param == "input[0].call_id" and caught.value.type == "invalid_request_error"

    def refuse(request: Any) -> list[Any]:
        raise InvalidRequest("too long", code="context_length_exceeded")

    door.script = refuse
    with pytest.raises(openai.BadRequestError) as caught:
        list(client.responses.create(model="m", input="x", stream=True))
    assert caught.value.code == "context_length_exceeded"


async def test_the_async_client(door: Door) -> None:
    door.script = lambda request: [say(content="Hel"), say(content="lo"), *end("length")]
    async with openai.AsyncOpenAI(api_key="k", base_url=door.url, max_retries=0) as client:  # type: ignore[attr-defined]
        response = await client.responses.create(model="m", input="hi")
        assert response.status == "incomplete" and response.incomplete_details
        assert response.incomplete_details.reason == "max_output_tokens" and response.output_text == "Hello"
        async with client.responses.stream(model="m", input="hi") as stream:
            kinds = [event.type async for event in stream]
        assert kinds[-1] == "response.incomplete"
