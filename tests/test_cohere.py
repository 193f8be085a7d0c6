"""Cohere v2 as a provider. Bodies and events are shaped after the vendor's API reference."""

import copy
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockyard import CohereChat, InvalidRequest, Translation, UpstreamError, UpstreamRefused

Attempt = Callable[..., Translation]
COHERE = CohereChat()
USER = [{"role": "user", "content": "hi"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


def encode(attempt: Attempt, model: str = "command-a-plus-05-2026", **members: Any) -> tuple[dict[str, Any], list[str]]:
    request = {"model": "m", "messages": USER, **members}
    before = copy.deepcopy(request)
    translation = attempt(model)
    body = COHERE.encode(request, translation)
    assert request == before
    return body, translation.dropped


def event(kind: str, delta: dict[str, Any] | None = None, **members: Any) -> bytes:
    body = {"type": kind, **members, **({"delta": delta} if delta is not None else {})}
    return f"event: {kind}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


def message(kind: str, index: int = 0, **members: Any) -> bytes:
    return event(kind, {"message": members}, index=index)


def end(reason: str = "COMPLETE", **members: Any) -> bytes:
    usage = {
        "billed_units": {"input_tokens": 5.0, "output_tokens": 2.0},
        "tokens": {"input_tokens": 50.0, "output_tokens": 7.0},
    }
    return (
        event("message-end", {"finish_reason": reason, "usage": {**usage, "cached_tokens": 10.0}, **members})
        + b"data: [DONE]\n\n"
    )


def call_start(index: int, call_id: str, name: str) -> bytes:
    return message(
        "tool-call-start",
        index,
        tool_calls={"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}},
    )


def call_delta(index: int, text: str) -> bytes:
    return message("tool-call-delta", index, tool_calls={"function": {"arguments": text}})


START = event("message-start", {"message": {"role": "assistant", "content": []}}, id="abc")
STREAM = b"".join(
    [
        START,
        message("content-start", 0, content={"type": "thinking", "thinking": ""}),
        message("content-delta", 0, content={"thinking": "hm é"}),
        event("content-end", index=0),
        message("content-start", 1, content={"type": "text", "text": "S"}),
        message("content-delta", 1, content={"text": "ea — 海"}),
        message(
            "citation-start",
            0,
            citations={
                "start": 0,
                "end": 3,
                "text": "Sea",
                "type": "TEXT_CONTENT",
                "content_index": 1,
                "sources": [{"type": "document", "id": "d", "document": {"url": "https://a.example/x", "title": "X"}}],
            },
        ),
        b": ping\n\n",
        event("citation-end", index=0),
        event("debug", prompt="p"),
        message("tool-plan-delta", tool_plan=" plan"),
        call_start(0, "c0", "f"),
        call_start(1, "c1", "g"),
        call_delta(1, '{"a"'),
        call_delta(0, "null"),
        call_delta(1, ":1}"),
        event("tool-call-end", index=0),
        event("tool-call-end", index=1),
        end("TOOL_CALL"),
    ]
)


def read(attempt: Attempt, pieces: list[bytes]) -> tuple[list[dict[str, Any]], bool]:
    decoder = COHERE.decoder(attempt("command-a-plus", stream=True))
    chunks = [chunk for piece in pieces for chunk in decoder.feed(piece)]
    return chunks + decoder.close(), decoder.complete


def deltas(chunks: list[dict[str, Any]], name: str) -> list[Any]:
    found = (chunk["choices"][0]["delta"].get(name) for chunk in chunks if chunk["choices"])
    return [value for value in found if value]


def test_members_travel_under_cohere_names(attempt: Attempt) -> None:
    body, dropped = encode(
        attempt,
        max_completion_tokens=9,
        temperature=0.2,
        seed=3,
        top_p=1,
        top_k=4,
        stop="END",
        frequency_penalty=0.5,
        logprobs=True,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        safety_mode="STRICT",
        n=1,
        stream_options={"include_usage": True},
        user="u",
        logit_bias={"1": 2},
        parallel_tool_calls=False,
    )
    assert body == {
        "model": "command-a-plus-05-2026",
        "messages": USER,
        "stream": False,
        "max_tokens": 9,
        "temperature": 0.2,
        "seed": 3,
        "p": 0.99,
        "k": 4,
        "stop_sequences": ["END"],
        "frequency_penalty": 0.5,
        "logprobs": True,
        "safety_mode": "STRICT",
        "response_format": {"type": "json_object", "json_schema": {"type": "object"}},
    }
    assert dropped == ["user", "logit_bias", "parallel_tool_calls"]


def test_strictness_refuses_what_would_be_dropped(attempt: Attempt) -> None:
    with pytest.raises(InvalidRequest, match="`seed2`"):
        COHERE.encode({"messages": USER, "seed2": 1}, attempt("command-a-plus", strict=True))


def test_out_of_range_penalties_and_long_stop_lists_are_named(attempt: Attempt) -> None:
    body, dropped = encode(attempt, presence_penalty=-1, stop=["a", " ", "b", "c", "d", "e", "f"])
    assert (body["presence_penalty"], body["stop_sequences"]) == (0.0, ["a", "b", "c", "d", "e"])
    assert dropped == ["stop[5:]", "presence_penalty"]


@pytest.mark.parametrize(
    ("choice", "expected", "tools"),
    [
        ("auto", None, ["f", "g"]),
        ("required", "REQUIRED", ["f", "g"]),
        ("none", "NONE", ["f", "g"]),
        ({"type": "function", "function": {"name": "g"}}, "REQUIRED", ["g"]),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]},
            },
            None,
            ["f"],
        ),
    ],
)
def test_tool_choice(attempt: Attempt, choice: Any, expected: str | None, tools: list[str]) -> None:
    other = {"type": "function", "function": {"name": "g"}}
    body, dropped = encode(attempt, tools=[TOOL, other], tool_choice=choice)
    assert body.get("tool_choice") == expected
    assert [tool["function"]["name"] for tool in body["tools"]] == tools
    assert all(tool["function"]["parameters"]["type"] == "object" for tool in body["tools"])
    assert dropped == []


def test_old_models_choose_by_themselves(attempt: Attempt) -> None:
    body, dropped = encode(attempt, "command-r", tools=[TOOL], tool_choice="required")
    assert "tool_choice" not in body
    assert dropped == ["tool_choice"]
    assert "tools" not in encode(attempt, "command-r", tools=[TOOL], tool_choice="none")[0]


def test_strict_holds_for_all_tools_or_none(attempt: Attempt) -> None:
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    body, dropped = encode(attempt, tools=[strict])
    assert body["strict_tools"] is True
    assert "strict" not in body["tools"][0]["function"]
    assert dropped == []
    body, dropped = encode(attempt, tools=[strict, TOOL])
    assert "strict_tools" not in body
    assert dropped == ["tools.strict"]


def test_json_formats_do_not_stand_beside_tools(attempt: Attempt) -> None:
    body, dropped = encode(attempt, tools=[TOOL], response_format={"type": "json_object"})
    assert "response_format" not in body
    assert dropped == ["response_format"]


@pytest.mark.parametrize(
    ("model", "effort", "thinking", "dropped"),
    [
        ("command-a-reasoning-08-2025", "none", {"type": "disabled"}, []),
        ("command-a-reasoning-08-2025", "low", {"type": "enabled", "token_budget": 2048}, []),
        ("command-a-plus-05-2026", "high", {"type": "enabled"}, []),
        ("command-a-03-2025", "high", None, ["reasoning_effort"]),
        ("command-a-03-2025", "none", None, []),
    ],
)
def test_effort(attempt: Attempt, model: str, effort: str, thinking: Any, dropped: list[str]) -> None:
    body, named = encode(attempt, model, reasoning_effort=effort)
    assert (body.get("thinking"), named) == (thinking, dropped)
    assert encode(attempt, model, reasoning={"effort": effort})[0].get("thinking") == thinking


def test_history(attempt: Attempt) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "null"}}
    body, dropped = encode(
        attempt,
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "see"},
                    {"type": "image_url", "image_url": {"url": "https://a/b.png"}},
                ],
            },
            {"role": "assistant", "content": "I look", "reasoning_content": "hm", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "1"}], "is_error": True},
            {"role": "assistant", "content": "done", "reasoning": "so"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "x"}, {"type": "input_audio", "input_audio": {}}],
                "name": "ann",
            },
        ],
    )
    assert body["messages"] == [
        {"role": "system", "content": "be kind"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "see"},
                {"type": "image_url", "image_url": {"url": "https://a/b.png"}},
            ],
        },
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm"}],
            "tool_plan": "I look",
            "tool_calls": [{**call, "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "1"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "done"}]},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
    ]
    assert dropped == ["messages.is_error", "messages.name", "content.input_audio"]


def test_extras_of_cohere_are_merged_and_of_others_named(attempt: Attempt) -> None:
    extras = {"cohere": {"documents": ["d"]}, "gemini": {"safetySettings": []}}
    native = {"type": "native", "dialect": "anthropic", "tool": {"type": "bash_20250124"}}
    body, dropped = encode(attempt, extra_body=extras, tools=[native])
    assert body["documents"] == ["d"]
    assert "tools" not in body
    assert dropped == ["tools.bash_20250124", "safetySettings"]


def test_custom_and_legacy_tools_become_functions_and_custom_calls_come_back(attempt: Attempt) -> None:
    translation = attempt("command-a-plus")
    custom = {"type": "custom", "custom": {"name": "sh", "description": "run"}}
    body = COHERE.encode({"messages": USER, "tools": [custom], "functions": [{"name": "old"}]}, translation)
    assert [tool["function"]["name"] for tool in body["tools"]] == ["sh", "old"]
    call = {"id": "c", "type": "function", "function": {"name": "sh", "arguments": '{"input":"ls"}'}}
    answer = {"id": "i", "finish_reason": "TOOL_CALL", "message": {"tool_calls": [call]}}
    decoded = COHERE.decode(answer, translation)["choices"][0]["message"]
    assert decoded == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "sh", "input": "ls"}}],
    }
    decoder = COHERE.decoder(translation)
    chunks = [
        c
        for part in (
            START,
            call_start(0, "c", "sh"),
            call_delta(0, '{"input"'),
            call_delta(0, ':"ls"}'),
            end("TOOL_CALL"),
        )
        for c in decoder.feed(part)
    ]
    assert deltas(chunks, "tool_calls") == [
        [{"index": 0, "id": "c", "type": "custom", "custom": {"name": "sh", "input": ""}}],
        [{"index": 0, "type": "custom", "custom": {"input": "ls"}}],
    ]


def test_answer(attempt: Attempt) -> None:
    citation = {
        "start": 0,
        "end": 1,
        "text": "a",
        "content_index": 2,
        "sources": [{"type": "tool", "id": "t", "tool_output": {"x": 1}}],
    }
    answer = {
        "id": "i",
        "finish_reason": "MAX_TOKENS",
        "message": {
            "role": "assistant",
            "tool_plan": "P",
            "content": [
                {"type": "thinking", "thinking": "t"},
                {"type": "text", "text": "one"},
                {"type": "text", "text": "a b"},
            ],
            "citations": [
                {
                    "start": 2,
                    "end": 3,
                    "text": "b",
                    "type": "TEXT_CONTENT",
                    "content_index": 2,
                    "sources": [
                        {"type": "document", "id": "d", "document": {"url": "https://x.example", "title": "X"}}
                    ],
                },
                citation,
            ],
        },
        "usage": {
            "tokens": {"input_tokens": 50.0, "output_tokens": 7.0, "reasoning_tokens": 2},
            "cached_tokens": 10.0,
            "billed_units": {"input_tokens": 5.0},
        },
        "logprobs": [{"text": "a b", "token_ids": [1, 2], "logprobs": [-0.5, -0.25]}],
    }
    completion = COHERE.decode(answer, attempt("command-a-plus"))
    choice = completion["choices"][0]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Ponea b",
        "reasoning_content": "t",
        "annotations": [
            {
                "type": "url_citation",
                "url_citation": {"url": "https://x.example", "title": "X", "start_index": 6, "end_index": 7},
            },
            {"type": "cohere_citation", "cohere_citation": citation},
        ],
    }
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["content"][0]["logprob"] == -0.75
    assert completion["id"] == "i"
    usage = completion["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (
        50,
        7,
        10,
    )
    assert usage["billed_units"] == {"input_tokens": 5.0}
    read_back = COHERE.read_usage(answer)
    assert read_back is not None
    assert (read_back.input_tokens, read_back.cached_tokens, read_back.reasoning_tokens) == (
        40,
        10,
        2,
    )


@pytest.mark.parametrize("arguments", ["null", "", None, {}])
def test_calls_without_arguments_are_empty_objects(attempt: Attempt, arguments: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    completion = COHERE.decode(
        {"finish_reason": "TOOL_CALL", "message": {"tool_calls": [call]}}, attempt("command-a-plus")
    )
    assert completion["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == "{}"


def test_stream(attempt: Attempt) -> None:
    chunks, complete = read(attempt, [STREAM])
    assert complete
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert {chunk["id"] for chunk in chunks} == {"abc"}
    assert "".join(deltas(chunks, "reasoning_content")) == "hm é"
    assert "".join(deltas(chunks, "content")) == "Sea — 海 plan"
    assert deltas(chunks, "annotations")[0][0]["url_citation"]["end_index"] == 3
    assert deltas(chunks, "tool_calls") == [
        [{"index": 0, "id": "c0", "type": "function", "function": {"name": "f", "arguments": ""}}],
        [{"index": 1, "id": "c1", "type": "function", "function": {"name": "g", "arguments": ""}}],
        [{"index": 1, "function": {"arguments": '{"a"'}}],
        [{"index": 1, "function": {"arguments": ":1}"}}],
        [{"index": 0, "function": {"arguments": "{}"}}],
    ]
    finishes = [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]]
    assert [reason for reason in finishes if reason] == ["tool_calls"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens"] == 50


def test_calls_without_an_index_stay_apart(attempt: Attempt) -> None:
    starts = [
        event("tool-call-start", {"message": {"tool_calls": {"id": f"c{n}", "function": {"name": "f"}}}})
        for n in range(3)
    ]
    chunks, _ = read(attempt, [START, *starts, end("TOOL_CALL")])
    calls = [call[0] for call in deltas(chunks, "tool_calls")]
    assert [(call["index"], call.get("id") or call["function"]["arguments"]) for call in calls] == [
        (0, "c0"),
        (0, "{}"),
        (1, "c1"),
        (1, "{}"),
        (2, "c2"),
        (2, "{}"),
    ]


@given(data=st.data())
def test_any_split_gives_the_same_chunks(attempt: Attempt, data: st.DataObject) -> None:
    source = STREAM.replace(b"\n", b"\r\n") if data.draw(st.booleans()) else STREAM
    cuts = data.draw(st.sets(st.integers(1, len(source) - 1), max_size=30))
    pieces = [source[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), len(source)])]
    assert read(attempt, pieces) == read(attempt, [STREAM])


def test_a_cut_stream_is_not_complete(attempt: Attempt) -> None:
    chunks, complete = read(attempt, [STREAM[: STREAM.index(b"event: message-end")]])
    assert chunks
    assert not complete


@pytest.mark.parametrize(
    ("tail", "text", "status"),
    [
        (end("ERROR", error="it broke"), "it broke", 502),
        (end("TIMEOUT"), "TIMEOUT", 502),
        (b'data: {"message":"too many","status_code":429}\n\n', "too many", 429),
        (event("stream-error", message="bad"), "bad", 502),
        (b"data: {not json}\n\n", "no JSON", 502),
        (b'data: {"type":"content-delta","delta":{"message":{"content":5}}}\n\n', "shape", 502),
    ],
)
def test_errors_inside_a_stream(attempt: Attempt, tail: bytes, text: str, status: int) -> None:
    with pytest.raises(UpstreamError, match=text) as caught:
        read(attempt, [START, tail])
    assert caught.value.status == status
    assert caught.value.retryable


@pytest.mark.parametrize(
    ("status", "kind", "shown", "code"),
    [
        (401, UpstreamError, 502, "upstream_authentication"),
        (498, UpstreamError, 502, "upstream_authentication"),
        (422, UpstreamRefused, 422, "upstream_refused"),
        (429, UpstreamError, 429, "upstream_429"),
        (499, UpstreamError, 502, "upstream_502"),
        (503, UpstreamError, 503, "upstream_503"),
    ],
)
def test_errors(attempt: Attempt, status: int, kind: type[UpstreamError], shown: int, code: str) -> None:
    error = COHERE.read_error(status, b'{"id":"x","message":"no"}')
    assert (type(error), error.status, error.code) == (kind, shown, code)
    assert error.message.endswith("no")
    assert error.fields == {"id": "x"}


def test_answers_of_another_shape_are_the_providers_failure(attempt: Attempt) -> None:
    for answer in ({}, {"message": None}, {"message": {"content": [1]}}, {"message": {}, "usage": 3}):
        with pytest.raises(UpstreamError):
            COHERE.decode(answer, attempt("command-a-plus"))


@pytest.mark.parametrize(
    "members",
    [
        {"messages": None},
        {"messages": [1]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"tools": 5},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "sometimes"},
        {"stop": [1]},
        {"top_p": "x"},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"extra_body": {"cohere": 1}},
    ],
)
def test_wrong_requests_are_refused_with_the_name(attempt: Attempt, members: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode(attempt, **members)
    assert caught.value.param


def test_embeddings(attempt: Attempt) -> None:
    translation = attempt("embed-v4.0")
    request = {"model": "m", "input": ["a", "b"], "dimensions": 256, "encoding_format": "base64", "user": "u"}
    assert COHERE.encode_embeddings(request, translation) == {
        "model": "embed-v4.0",
        "embedding_types": ["float"],
        "texts": ["a", "b"],
        "input_type": "search_document",
        "output_dimension": 256,
    }
    assert translation.dropped == ["user"]
    answer = {"id": "i", "embeddings": {"float": [[0.5], [1]]}, "meta": {"billed_units": {"input_tokens": 2.0}}}
    assert COHERE.decode_embeddings(answer, translation) == {
        "object": "list",
        "model": "embed-v4.0",
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.5]},
            {"object": "embedding", "index": 1, "embedding": [1]},
        ],
    }
    usage = COHERE.read_usage(answer)
    assert usage is not None
    assert usage.input_tokens == 2
    older = attempt("embed-english-v3.0")
    body = COHERE.encode_embeddings({"input": "q", "input_type": "search_query", "dimensions": 3}, older)
    assert body["input_type"] == "search_query"
    assert older.dropped == ["dimensions"]
    with pytest.raises(InvalidRequest, match="token ids"):
        COHERE.encode_embeddings({"input": [1, 2]}, translation)
    with pytest.raises(UpstreamError):
        COHERE.decode_embeddings({"embeddings": {"int8": []}}, translation)


def test_rerank(attempt: Attempt) -> None:
    translation = attempt("rerank-v4.0-pro")
    documents = ["one", {"text": "two", "id": 2}, {"title": "three"}]
    request = {
        "model": "m",
        "query": "q",
        "documents": documents,
        "top_n": 2,
        "return_documents": True,
        "rank_fields": ["x"],
    }
    assert COHERE.encode_rerank(request, translation) == {
        "model": "rerank-v4.0-pro",
        "query": "q",
        "documents": ["one", "two", '{"title":"three"}'],
        "top_n": 2,
    }
    assert translation.dropped == ["rank_fields"]
    answer = {
        "id": "i",
        "results": [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0.1}],
        "meta": {"billed_units": {"search_units": 1}},
    }
    assert COHERE.decode_rerank(answer, translation) == {
        "id": "i",
        "model": "rerank-v4.0-pro",
        "usage": {"prompt_tokens": 0, "total_tokens": 0, "search_units": 1},
        "results": [
            {"index": 1, "relevance_score": 0.9, "document": {"text": "two", "id": 2}},
            {"index": 0, "relevance_score": 0.1, "document": {"text": "one"}},
        ],
    }
    usage = COHERE.read_usage(answer)
    assert usage is not None
    assert usage.searches == 1
    with pytest.raises(UpstreamError):
        COHERE.decode_rerank({"results": [{"index": 9}]}, translation)
    with pytest.raises(InvalidRequest):
        COHERE.encode_rerank({"query": "q", "documents": [1]}, translation)
