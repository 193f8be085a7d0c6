"""A real process from the packed file, with the official SDKs as its clients: what a user does in the first minutes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from google import genai
from upstreams import DONE, STREAM, FakeUpstream, chunk, fake_upstream, plain, stream

import stockyard

PACKED = Path(stockyard.__file__).parent / "dist" / "stockyard"
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]


class Upstream:
    """The fake provider on a thread of its own, so that blocking SDKs can be used."""

    def __init__(self) -> None:
        self.fake: FakeUpstream | None = None
        self._ready, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        async with fake_upstream() as self.fake:
            self._ready.set()
            while not self._stop.is_set():
                await asyncio.sleep(0.05)

    def __enter__(self) -> FakeUpstream:
        self._thread.start()
        self._ready.wait(10)
        assert self.fake is not None
        return self.fake

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class Process:
    """A started proxy; `url` once it answers."""

    def __init__(self, data_dir: Path, **variables: str) -> None:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(data_dir),
            "STOCKYARD_DATA_DIR": str(data_dir),
            "STOCKYARD_PORT": "0",
        }
        command = [sys.executable, str(PACKED if PACKED.exists() else stockyard.__file__)]
        self.run = subprocess.Popen(
            [*command, "serve"], env=environment | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.run.stdout is not None
        line = self.run.stdout.readline()
        self.url = next((word.rstrip(",") for word in line.split() if word.startswith("http://")), "")

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.run.send_signal(number)
        self.run.communicate(timeout=40)
        return self.run.returncode


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with Upstream() as fake:
        yield fake


@pytest.fixture(scope="module")
def process(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    running = Process(
        tmp_path_factory.mktemp("data"), OPENAI_API_KEY="sk-x", OPENAI_BASE_URL=upstream.url, STOCKYARD_RETRIES="0"
    )
    yield running
    assert running.stop() == 0


@pytest.fixture
def script(upstream: FakeUpstream) -> Iterator[FakeUpstream]:
    upstream.seen.clear()
    yield upstream
    upstream.answers = []


@pytest.fixture
def client(process: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="any", max_retries=0) as sdk:
        yield sdk


def test_chat_plain_streamed_and_async(client: openai.OpenAI, process: Process, script: FakeUpstream) -> None:
    told = client.chat.completions.with_raw_response.create(model="gpt-4o-mini", messages=MESSAGES)
    assert told.parse().choices[0].message.content == "Hello there"
    assert told.headers["x-stockyard-cost-usd"] == "0.0000042"
    pieces = [*client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES, stream=True)]
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == 'Hello "there" \u00e9\u4e2d'
    assert [p.usage for p in pieces] == [None] * 4
    options: Any = {"include_usage": True}
    pieces = [
        *client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES, stream=True, stream_options=options)
    ]
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.total_tokens == 15

    async def ask() -> str | None:
        async with openai.AsyncOpenAI(base_url=f"{process.url}/v1", api_key="any") as sdk:
            return (
                (await sdk.chat.completions.create(model="openai/gpt-4o-mini", messages=MESSAGES))
                .choices[0]
                .message.content
            )

    assert asyncio.run(ask()) == "Hello there"
    assert script.seen[-1].json["model"] == "gpt-4o-mini"


def test_tools_images_and_json_mode_travel_untouched(client: openai.OpenAI, script: FakeUpstream) -> None:
    image: Any = [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
    ]
    tool: Any = {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
    }
    calls = [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": ""}}]
    more = [{"index": 0, "function": {"arguments": '{"at":"sky"}'}}]
    script.answers = [
        stream(
            [
                chunk({"role": "assistant", "content": None, "tool_calls": calls}),
                chunk({"tool_calls": more}),
                chunk({}, "tool_calls"),
                DONE,
            ]
        )
    ]
    asked: Any = {
        "messages": [{"role": "user", "content": image}],
        "tools": [tool],
        "response_format": {"type": "json_object"},
    }
    with client.chat.completions.stream(model="gpt-4o-mini", **asked) as events:
        for _ in events:
            pass
        message = events.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.arguments == '{"at":"sky"}'
    sent = script.seen[0].json
    assert {name: sent[name] for name in asked} == asked


def test_embeddings_models_and_legacy_completions(client: openai.OpenAI, script: FakeUpstream) -> None:
    assert client.embeddings.create(model="text-embedding-3-small", input="x").data[0].embedding == [0.5, -0.25]
    rows = client.models.list().data
    assert {row.id for row in rows} >= {"gpt-4o-mini", "echo"}
    assert client.models.retrieve("gpt-4o-mini").owned_by == "openai"
    assert client.embeddings.create(model="echo", input=["a", "b"], dimensions=3).data[1].embedding[2] != 0
    assert client.completions.create(model="echo", prompt="say this").choices[0].text == "Echo: say this"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (plain({"error": {"message": "m", "code": "c"}}, 400), openai.BadRequestError),
        (plain({"error": {"message": "m"}}, 401), openai.InternalServerError),
        (plain({"error": {"message": "m", "code": "model_not_found"}}, 404), openai.NotFoundError),
        (plain({"error": {"message": "m"}}, 429, **{"retry-after": "7"}), openai.RateLimitError),
        (plain({"error": {"message": "m"}}, 500), openai.InternalServerError),
    ],
)
def test_errors_are_the_sdks_own_classes(
    client: openai.OpenAI, script: FakeUpstream, answer: Any, error: type[openai.APIStatusError]
) -> None:
    script.answers = [answer]
    with pytest.raises(error) as caught:
        client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES)
    assert caught.value.response.headers["x-stockyard-request-id"]
    if error is openai.RateLimitError:
        assert caught.value.response.headers["retry-after"] == "7"


def test_an_unknown_model_says_what_to_set(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="ANTHROPIC_API_KEY"):
        client.chat.completions.create(model="claude-sonnet-4-5", messages=MESSAGES)


def test_responses_keep_a_conversation(client: openai.OpenAI) -> None:
    first = client.responses.create(model="echo", input="one")
    second = client.responses.create(model="echo", input="two", previous_response_id=first.id)
    assert (second.output_text, second.usage and second.usage.input_tokens) == ("Echo: two", 4)
    assert client.responses.retrieve(second.id).output_text == "Echo: two"
    with client.responses.stream(model="echo", input="three") as events:
        assert [event.type for event in events][-1] == "response.completed"


def test_anthropic_sdk_plain_stream_tools_and_errors(process: Process, script: FakeUpstream) -> None:
    for key in ({"api_key": "x"}, {"auth_token": "x"}):
        with anthropic.Anthropic(base_url=process.url, max_retries=0, **key) as sdk:  # type: ignore[arg-type]
            told = sdk.messages.create(model="gpt-4o-mini", max_tokens=50, messages=MESSAGES)
            assert (told.content[0].text, told.stop_reason, told.usage.cache_read_input_tokens) == (
                "Hello there",
                "end_turn",
                4,
            )  # type: ignore[union-attr]
    sdk = anthropic.Anthropic(base_url=process.url, api_key="x", max_retries=0)
    two = [
        {"index": n, "id": f"call_{n}", "type": "function", "function": {"name": f"t{n}", "arguments": ""}}
        for n in (0, 1)
    ]
    mixed = [
        chunk({"role": "assistant", "content": "Let me see"}), chunk({"tool_calls": [two[0]]}), chunk({"tool_calls": [two[1]]}),
        chunk({"tool_calls": [{"index": 1, "function": {"arguments": '{"b":'}}]}), chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a":1}'}}]}),
        chunk({"tool_calls": [{"index": 1, "function": {"arguments": "2}"}}]}), chunk({}, "tool_calls"), DONE,
    ]  # fmt: skip
    script.answers = [stream(mixed)]
    tools: Any = [{"name": f"t{n}", "input_schema": {"type": "object", "properties": {}}} for n in (0, 1)]
    with sdk.messages.stream(model="gpt-4o-mini", max_tokens=50, messages=MESSAGES, tools=tools) as events:
        final = events.get_final_message()
    assert [(block.type, getattr(block, "input", None)) for block in final.content] == [
        ("text", None),
        ("tool_use", {"a": 1}),
        ("tool_use", {"b": 2}),
    ]
    assert final.stop_reason == "tool_use"
    assert sdk.messages.count_tokens(model="gpt-4o-mini", messages=MESSAGES).input_tokens > 0
    with pytest.raises(anthropic.NotFoundError, match=r"GEMINI|GOOGLE"):
        sdk.messages.create(model="gemini-2.5-flash", max_tokens=5, messages=MESSAGES)
    sdk.close()


def test_google_sdk(process: Process, script: FakeUpstream) -> None:
    sdk = genai.Client(api_key="x", http_options={"base_url": process.url})
    assert sdk.models.generate_content(model="gpt-4o-mini", contents="Hi").text == "Hello there"
    pieces = [*sdk.models.generate_content_stream(model="gpt-4o-mini", contents="Hi")]
    assert "".join(piece.text or "" for piece in pieces) == 'Hello "there" \u00e9\u4e2d'
    sdk.close()


def test_kill_dash_nine_loses_no_answered_call_and_starts_again(upstream: FakeUpstream, tmp_path: Path) -> None:
    variables = {"OPENAI_API_KEY": "sk-x", "OPENAI_BASE_URL": upstream.url}
    running = Process(tmp_path, **variables)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any") as sdk:
        ids = [
            sdk.chat.completions.with_raw_response.create(model="gpt-4o-mini", messages=MESSAGES).headers[
                "x-stockyard-request-id"
            ]
            for _ in range(5)
        ]
    running.stop(signal.SIGKILL)
    again = Process(tmp_path, **variables)
    second = Process(tmp_path, **variables)
    _, err = second.run.communicate(timeout=20)
    assert second.run.returncode == 2
    assert f"process {again.run.pid}" in err
    assert again.stop() == 0
    store = stockyard.LogStore(tmp_path / "stockyard.db")
    assert all(stockyard.find_request(store, request_id) for request_id in ids)
    assert store.read("PRAGMA integrity_check")[0][0] == "ok"
    store.close()


def test_a_stop_lets_streams_end(tmp_path: Path) -> None:
    running = Process(tmp_path)
    body = b'{"model":"echo","stream":true,"chunk_ms":150,"messages":[{"role":"user","content":"a b c d e f g"}]}'
    with urllib.request.urlopen(f"{running.url}/v1/chat/completions", body, timeout=20) as answer:
        assert answer.readline()
        running.run.send_signal(signal.SIGTERM)
        assert answer.read().endswith(DONE)
    running.run.communicate(timeout=20)
    assert running.run.returncode == 0


@pytest.mark.parametrize(
    ("variables", "arguments", "said"),
    [
        ({"STOCKYARD_NOPE": "1"}, [], "STOCKYARD_NOPE"),
        ({"STOCKYARD_CACHE_TTL": "x"}, [], "STOCKYARD_CACHE_TTL"),
        ({}, ["--host", "0.0.0.0"], "keys create"),
        ({"STOCKYARD_REQUIRE_KEY": "never"}, ["--host", "0.0.0.0"], "refused"),
        ({"OPENAI_BASE_URL": "ftp://x", "OPENAI_API_KEY": "k"}, [], "OPENAI_BASE_URL"),
        ({"STOCKYARD_DATA_DIR": "/proc/nothing"}, [], "STOCKYARD_DATA_DIR"),
    ],
)
def test_wrong_starts_are_one_sentence(
    tmp_path: Path, variables: dict[str, str], arguments: list[str], said: str
) -> None:
    environment = {"PATH": os.environ["PATH"], "STOCKYARD_DATA_DIR": str(tmp_path), **variables}
    told = subprocess.run(
        [sys.executable, stockyard.__file__, "serve", "--port", "0", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert told.returncode == 2
    assert said in told.stderr
    assert told.stderr.count("\n") <= 2


def test_streams_end_with_done(client: openai.OpenAI, script: FakeUpstream) -> None:
    script.answers = [stream(STREAM[:-1])]
    with client.chat.completions.with_streaming_response.create(
        model="gpt-4o-mini", messages=MESSAGES, stream=True
    ) as told:
        assert told.read().endswith(DONE)


def test_a_coding_agents_loop_over_anthropic_messages(process: Process, script: FakeUpstream) -> None:
    """The shape of Claude Code: cached system blocks, many tools, thinking asked for, streamed turns with results."""
    tools: Any = [
        {
            "name": "Read",
            "description": "Reads a file",
            "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
        },
        {
            "name": "Bash",
            "description": "Runs",
            "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}},
            "cache_control": {"type": "ephemeral"},
        },
    ]
    system: Any = [{"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}}]
    call = [
        {"index": 0, "id": "call_9", "type": "function", "function": {"name": "Read", "arguments": '{"path":"a.py"}'}}
    ]
    script.answers = [
        stream(
            [
                chunk({"role": "assistant", "content": "", "reasoning_content": "I look."}),
                chunk({"tool_calls": call}),
                chunk({}, "tool_calls"),
                DONE,
            ]
        ),
        stream(STREAM),
    ]
    sdk = anthropic.Anthropic(
        base_url=process.url, api_key="x", max_retries=0, default_headers={"anthropic-beta": "claude-code-20250219"}
    )
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "Fix a.py"}]}]
    asked: Any = {
        "model": "gpt-4o-mini",
        "max_tokens": 4000,
        "system": system,
        "tools": tools,
        "thinking": {"type": "enabled", "budget_tokens": 2000},
    }
    with sdk.messages.stream(messages=messages, **asked) as events:
        first = events.get_final_message()
    assert [block.type for block in first.content] == ["thinking", "tool_use"]
    result = {
        "type": "tool_result",
        "tool_use_id": "call_9",
        "content": [{"type": "text", "text": "print(1)"}],
        "cache_control": {"type": "ephemeral"},
    }
    messages += [
        {"role": "assistant", "content": [block.model_dump() for block in first.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "Go on"}]},
    ]
    with sdk.messages.stream(messages=messages, **asked) as events:
        assert events.get_final_message().stop_reason == "end_turn"
    sdk.close()
    sent = list(script.seen[1].json["messages"])
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "tool", "user"]
    assert sent[2]["tool_calls"][0] == {
        "id": "call_9",
        "type": "function",
        "function": {"name": "Read", "arguments": '{"path":"a.py"}'},
    }
    assert (sent[3]["tool_call_id"], sent[3]["content"], sent[4]["content"]) == ("call_9", "print(1)", "Go on")
    assert [tool["function"]["name"] for tool in script.seen[1].json["tools"]] == ["Read", "Bash"]


def test_rerank_goes_to_whom_the_model_belongs(process: Process, upstream: FakeUpstream, tmp_path: Path) -> None:
    answer = {
        "id": "r",
        "results": [{"index": 1, "relevance_score": 0.9}],
        "meta": {"billed_units": {"search_units": 1}},
    }
    running = Process(tmp_path, CO_API_KEY="k", COHERE_BASE_URL=upstream.url)
    upstream.answers = [plain(answer)]
    body = b'{"model":"rerank-v3.5","query":"q","documents":["a","b"],"return_documents":true}'
    with urllib.request.urlopen(f"{running.url}/v1/rerank", body, timeout=20) as told:
        result = stockyard.orjson.loads(told.read())["results"][0]
    upstream.answers = []
    assert (result["index"], result["document"], upstream.seen[-1].path) == (1, {"text": "b"}, "/v2/rerank")
    assert running.stop() == 0


def test_bench_measures_whole_answers_direct_and_through_a_proxy(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = [sys.executable, str(PACKED), "bench", "--seconds", "0.3", "--clients", "4", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=90, check=True)
    told = json.loads(done.stdout)
    assert [load["clients"] for load in told["loads"]] == [1, 4, 4]
    for load in told["loads"]:
        for where in ("direct", "proxy"):
            assert load[where]["broken"] == 0
            assert load[where]["calls"] > 0
            assert 0 < load[where]["p50_ms"] <= load[where]["p99_ms"]
    assert not list(tmp_path.glob("stockyard-bench-*"))


@pytest.mark.parametrize("variables", [{}, {"STOCKYARD_REQUIRE_KEY": "always"},
                                       {"STOCKYARD_REQUIRE_KEY": "always", "STOCKYARD_ADMIN_KEY": "sy-admin-" + "a" * 30}])  # fmt: skip
def test_the_curl_line_of_the_first_screen_works_as_printed(tmp_path: Path, variables: dict[str, str]) -> None:
    running = Process(tmp_path, **variables)
    try:
        assert running.run.stdout is not None
        line = next(line for line in running.run.stdout if line.startswith("  curl "))
        environment = {"PATH": os.environ["PATH"], **variables}
        shell = ["sh", "-c", f"""curl() {{ printf '%s\\0' "$@"; }}; {line}"""]
        words = subprocess.run(shell, env=environment, capture_output=True, text=True, timeout=30, check=True).stdout
        url, *rest = words.split("\0")[:-1]
        headers = dict(
            word.split(": ", 1) for option, word in zip(rest[::2], rest[1::2], strict=True) if option == "-H"
        )
        with urllib.request.urlopen(urllib.request.Request(url, rest[-1].encode(), headers), timeout=30) as answer:
            told = json.loads(answer.read())
        assert "sy-admin" not in line
        assert told["choices"][0]["message"]["content"] == "Echo: Hello, Stockyard!"
    finally:
        assert running.stop() == 0
