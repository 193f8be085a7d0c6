"""Replicate's predictions as a provider of chat."""

import copy
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockyard import (
    InvalidRequest,
    Provider,
    ReplicatePredictions,
    Translation,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
)

Attempt = Callable[..., Translation]
REPLICATE, BASE = ReplicatePredictions(), "https://api.replicate.com"
LLAMA, CLAUDE, GPT = "meta/meta-llama-3-70b-instruct", "anthropic/claude-sonnet-5", "openai/gpt-5.4"
PICTURE = {"type": "image_url", "image_url": {"url": "https://a.example/x.png"}}
HISTORY = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": [{"type": "text", "text": "see"}, PICTURE, PICTURE]},
]


def encode(attempt: Attempt, model: str, stream: bool = False, **members: Any) -> tuple[dict[str, Any], list[str]]:
    request = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **members}
    before = copy.deepcopy(request)
    translation = attempt(model, stream=stream)
    body = REPLICATE.encode(request, translation)
    assert request == before
    return body, translation.dropped


def test_paths_and_headers() -> None:
    provider = Provider(id="p", name="P", base_url="https://p.example")
    assert REPLICATE.path(provider, LLAMA, True) == "/models/meta/meta-llama-3-70b-instruct/predictions"
    assert REPLICATE.path(provider, "me/mine:5c7d", False) == "/predictions"
    assert REPLICATE.headers_for(stream=False) == {"prefer": "wait"}
    assert REPLICATE.headers_for(stream=True) == {}


def test_a_single_question_stands_as_it_is(attempt: Attempt) -> None:
    body, dropped = encode(
        attempt, LLAMA, stream=True, max_tokens=5, temperature=0.1, top_k=3, seed=1, stop=["a", "b"], presence_penalty=1
    )
    assert body == {
        "stream": True,
        "input": {
            "prompt": "hi",
            "max_tokens": 5,
            "temperature": 0.1,
            "top_k": 3,
            "seed": 1,
            "stop_sequences": "a,b",
            "presence_penalty": 1,
        },
    }
    assert dropped == []


def test_a_conversation_is_written_out(attempt: Attempt) -> None:
    body, dropped = encode(attempt, CLAUDE, messages=HISTORY, max_tokens=10, temperature=0.5, reasoning_effort="xhigh")
    assert body["input"] == {
        "system_prompt": "be kind",
        "prompt": "User: hi\n\nAssistant: yes?\n\nUser: see\n\nAssistant:",
        "image": "https://a.example/x.png",
        "max_tokens": 1024,
        "effort": "high",
    }
    assert dropped == ["content.image_url[:-1]", "temperature"]


def test_models_without_a_system_prompt_read_it_in_the_prompt(attempt: Attempt) -> None:
    body, dropped = encode(attempt, "deepseek-ai/deepseek-v3", messages=[HISTORY[0], {"role": "user", "content": "hi"}])
    assert body["input"] == {"prompt": "be kind\n\nhi"}
    assert dropped == []


def test_openai_models_take_messages(attempt: Attempt) -> None:
    body, dropped = encode(
        attempt, GPT, messages=HISTORY, max_completion_tokens=9, reasoning_effort="max", verbosity="low", top_p=0.5
    )
    assert body["input"] == {
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yes?"},
            {"role": "user", "content": "see"},
        ],
        "image_input": ["https://a.example/x.png"] * 2,
        "max_completion_tokens": 9,
        "reasoning_effort": "xhigh",
        "verbosity": "low",
    }
    assert dropped == ["top_p"]


def test_what_replicate_cannot_carry_is_named(attempt: Attempt) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}, PICTURE]},
        {"role": "assistant", "content": "look", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]
    body, dropped = encode(
        attempt,
        "me/mine",
        messages=messages,
        tools=[{"type": "function", "function": {"name": "f"}}],
        tool_choice="required",
        response_format={"type": "json_object"},
        reasoning_effort="low",
        n=2,
        extra_body={"cohere": {"k": 1}},
        stream_options={},
    )
    assert body["input"]["prompt"] == "User: hi\n\nAssistant: look\n\nAssistant:"
    assert dropped == [
        "content.image_url",
        "messages.tool_calls",
        "messages.reasoning_content",
        "messages.tool",
        "tools",
        "tool_choice",
        "response_format",
        "reasoning_effort",
        "n",
        "k",
    ]


def test_a_models_own_input_travels(attempt: Attempt) -> None:
    extras = {"replicate": {"prompt_template": "{prompt}"}}
    body, dropped = encode(attempt, "me/mine:5c7d", input={"top_a": 1}, extra_body=extras)
    assert body == {"version": "5c7d", "input": {"prompt": "hi", "top_a": 1, "prompt_template": "{prompt}"}}
    assert dropped == []


@pytest.mark.parametrize("members", [{"messages": 1}, {"messages": [{"role": "x"}]}, {"max_tokens": "a"}, {"input": 1}])
def test_wrong_requests_are_refused(attempt: Attempt, members: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        encode(attempt, LLAMA, **members)


def prediction(status: str, **members: Any) -> dict[str, Any]:
    urls = {"get": "https://api.replicate.com/v1/predictions/x", "stream": "https://stream.replicate.com/v1/files/x"}
    return {"id": "x", "status": status, "output": None, "error": None, "urls": urls, **members}


def test_where_to_look_next(attempt: Attempt) -> None:
    plain, stream = attempt(LLAMA), attempt(LLAMA, stream=True)
    assert REPLICATE.follow(prediction("succeeded", output="a"), plain, BASE) is None
    assert REPLICATE.follow(prediction("processing"), plain, BASE) == "https://api.replicate.com/v1/predictions/x"
    assert REPLICATE.follow(prediction("starting"), stream, BASE) == "https://stream.replicate.com/v1/files/x"
    with pytest.raises(UpstreamError, match="does not stream"):
        REPLICATE.follow(prediction("starting", urls={}), stream, BASE)
    with pytest.raises(UpstreamError, match="out of memory"):
        REPLICATE.follow(prediction("failed", error="out of memory"), stream, BASE)


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example/x",
        "http://api.replicate.com.evil.example/",
        "http://stream.replicate.com/x",
        "https://replicate.com@evil.example",
        5,
    ],
)
def test_the_key_goes_to_replicate_only(attempt: Attempt, url: Any) -> None:
    with pytest.raises(UpstreamError, match="not its own"):
        REPLICATE.follow(prediction("starting", urls={"stream": url}), attempt(LLAMA, stream=True), BASE)


def test_answer(attempt: Attempt) -> None:
    done = prediction(
        "succeeded",
        output=["Hel", "lo"],
        metrics={"input_token_count": 5, "output_token_count": 2, "predict_time": 0.1},
    )
    completion = REPLICATE.decode(done, attempt(LLAMA))
    assert completion["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop", "logprobs": None}
    ]
    assert (completion["id"], completion["usage"]["total_tokens"]) == ("x", 7)
    billed_by_time = prediction("succeeded", output="Hello", metrics={"predict_time": 1})
    assert "usage" not in REPLICATE.decode(billed_by_time, attempt(LLAMA))
    assert REPLICATE.read_usage(billed_by_time) is None
    assert (
        REPLICATE.decode(prediction("succeeded", output={"a": 1}), attempt(LLAMA))["choices"][0]["message"]["content"]
        == '{"a":1}'
    )


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        ("starting", UpstreamTimeout, "upstream_timeout"),
        ("canceled", UpstreamError, "upstream_prediction_canceled"),
        ("failed", UpstreamError, "upstream_prediction_failed"),
    ],
)
def test_predictions_without_success(attempt: Attempt, status: str, kind: type[UpstreamError], code: str) -> None:
    with pytest.raises(kind) as caught:
        REPLICATE.decode(prediction(status, error="E1: oh"), attempt(LLAMA))
    assert caught.value.code == code


STREAM = (
    b"event: output\nid: 1:0\ndata: Sea\n\nevent: logs\ndata: loading\n\n: hi\n\nevent: output\ndata: \n\n"
    b"event: output\ndata:  two\ndata: lines\n\nevent: output\ndata:  \xe6\xb5\xb7\n\nevent: done\ndata: {}\n\n"
)


def read(attempt: Attempt, pieces: list[bytes]) -> tuple[list[dict[str, Any]], bool]:
    decoder = REPLICATE.decoder(attempt(LLAMA, stream=True))
    chunks = [chunk for piece in pieces for chunk in decoder.feed(piece)]
    return chunks + decoder.close(), decoder.complete


def test_stream(attempt: Attempt) -> None:
    chunks, complete = read(attempt, [STREAM])
    choices = [chunk["choices"][0] for chunk in chunks]
    assert complete
    assert choices[0]["delta"] == {"role": "assistant", "content": "Sea"}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "Sea two\nlines 海"
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert read(attempt, [STREAM[: STREAM.index(b"event: done")]])[1] is False


@given(data=st.data())
def test_any_split_gives_the_same_chunks(attempt: Attempt, data: st.DataObject) -> None:
    source = STREAM.replace(b"\n", b"\r\n") if data.draw(st.booleans()) else STREAM
    cuts = data.draw(st.sets(st.integers(1, len(source) - 1), max_size=20))
    pieces = [source[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), len(source)])]
    assert read(attempt, pieces) == read(attempt, [STREAM])


@pytest.mark.parametrize(
    ("tail", "code"),
    [
        (b'event: done\ndata: {"reason":"canceled"}\n\n', "upstream_prediction_canceled"),
        (b'event: done\ndata: {"reason":"error"}\n\n', "upstream_prediction_failed"),
        (b'event: error\ndata: {"detail":"An unexpected error occurred"}\n\n', "upstream_502"),
        (b"event: error\ndata: plain words\n\n", "upstream_502"),
        (b"event: done\ndata: what\n\n", "upstream_malformed"),
    ],
)
def test_errors_inside_a_stream(attempt: Attempt, tail: bytes, code: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        read(attempt, [b"event: output\ndata: x\n\n", tail])
    assert caught.value.code == code


def test_errors() -> None:
    body = json.dumps({"title": "Insufficient credit", "detail": "Buy credit", "status": 402}).encode()
    error = REPLICATE.read_error(402, body)
    assert (type(error), error.status, error.message, error.fields) == (
        UpstreamRefused,
        402,
        "Buy credit",
        {"title": "Insufficient credit"},
    )
    assert REPLICATE.read_error(429, b'{"detail":"slow","status":429}').retryable
    assert REPLICATE.read_error(401, b'{"detail":"Unauthenticated"}').code == "upstream_authentication"
    assert REPLICATE.read_error(502, b"<html>").message == "the provider answered an HTML page"


def test_models() -> None:
    assert REPLICATE.read_models({"results": [{"owner": "meta", "name": "x"}, {"owner": 1}, 3]}) == [{"id": "meta/x"}]
    assert REPLICATE.read_models([]) == []
    assert REPLICATE.read_models({"results": 4}) == []
