"""OpenAI's chat, the canonical shape: what its clients get, and what providers that speak it nearly get and give."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest

import stockyard as s

CHAT = s.DIALECTS["openai"]
USER = {"role": "user", "content": "q"}
Attempt = Callable[..., s.Translation]


def attempt_at(provider: str, model: str = "m", stream: bool = False, foreign: bool = False) -> s.Translation:
    row = s.PROVIDERS_BY_ID[provider]
    return s.Translation(model, row, stream, 7, lambda prefix: f"{prefix}1", foreign=foreign)


def answer(message: dict[str, Any], finish: str = "stop", **members: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion", "choices": [choice], **members}


def chunk(delta: dict[str, Any], finish: str | None = None, **members: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **members}


def streamed(provider: str, *events: dict[str, Any]) -> list[dict[str, Any]]:
    """The canonical chunks of a stream of these events."""
    decoder = CHAT.decoder(attempt_at(provider, stream=True))
    return decoder.feed(b"".join(b"data: " + s.dump_json(event) + b"\n\n" for event in events)) + decoder.close()


# ----- answers of compatible providers, in the canonical spelling

HABITS = [
    # Mistral's content lists, with thinking as parts or as text
    ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "h"}]}, {"type": "thinking", "thinking": "m"},
                  {"type": "text", "text": "a"}, "b", {"type": "reference"}]},
     {"content": "ab", "reasoning_content": "hm"}),
    ({"content": [{"type": "text", "text": "a"}]}, {"content": "a"}),
    # OpenRouter and Groq say `reasoning`
    ({"content": "a", "reasoning": "hm"}, {"content": "a", "reasoning": "hm", "reasoning_content": "hm"}),
    # some hosts give arguments as an object
    ({"content": None, "tool_calls": [{"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]},
     {"content": None, "tool_calls": [{"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}]}),
]  # fmt: skip


@pytest.mark.parametrize(("told", "read"), HABITS)
def test_messages_and_deltas_of_compatible_providers_are_spelt_one_way(told: Any, read: Any) -> None:
    copies = [json.loads(json.dumps(told)) for _ in range(2)]
    [choice] = CHAT.decode(answer(copies[0]), attempt_at("mistral"))["choices"]
    assert choice["message"] == {"role": "assistant", **read}
    [piece] = streamed("mistral", chunk(copies[1]))
    assert piece["choices"][0]["delta"] == read


@pytest.mark.parametrize(
    ("said", "told"), [("eos", "stop"), ("model_length", "length"), ("sensitive", "content_filter")]
)
def test_finish_reasons_are_openais_words(said: str, told: str) -> None:
    assert CHAT.decode(answer({}, said), attempt_at("together"))["choices"][0]["finish_reason"] == told
    assert streamed("together", chunk({}, said))[0]["choices"][0]["finish_reason"] == told


def test_a_stream_that_ends_as_a_failure_is_one() -> None:
    with pytest.raises(s.UpstreamError) as caught:
        streamed("zai", chunk({"content": "a"}), chunk({}, "network_error"))
    assert caught.value.code == "upstream_network_error"


def test_reasoning_counted_apart_is_added_to_the_output() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 7}}
    told = CHAT.decode(answer({"content": "a"}, usage=dict(usage)), attempt_at("xai"))["usage"]
    assert (told["completion_tokens"], told["total_tokens"]) == (12, 15)
    [piece] = streamed("groq", chunk({}, "stop", x_groq={"usage": usage}))
    assert piece["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("read", [CHAT.decode, CHAT.decode_embeddings])
def test_an_answer_without_its_list_is_the_providers_failure(read: Callable[..., Any]) -> None:
    with pytest.raises(s.UpstreamError) as caught:
        read({"id": "c"}, attempt_at("openai"))
    assert (caught.value.status, caught.value.code) == (502, "upstream_malformed")
    with pytest.raises(s.UpstreamError, match="slow down"):
        read({"error": {"message": "slow down", "code": 429}}, attempt_at("openai"))


# ----- what OpenAI's clients get


def told(*chunks: dict[str, Any], **request: Any) -> list[Any]:
    renderer = CHAT.renderer(request, lambda prefix: prefix, 7)
    written = b"".join(map(renderer.feed, chunks)) + renderer.close()
    blocks = [block.removeprefix(b"data: ") for block in written.split(b"\n\n") if block]
    assert blocks.pop() == b"[DONE]"
    return [json.loads(block) for block in blocks]


def test_usage_is_streamed_only_to_who_asked_for_it() -> None:
    def chunks() -> list[dict[str, Any]]:
        return [
            chunk({"content": "a"}),
            chunk({}, "stop", usage={"prompt_tokens": 1}),
            {"choices": [], "usage": {"a": 1}},
        ]

    assert [event.get("usage") for event in told(*chunks())] == [None, None]
    asked = told(*chunks(), stream_options={"include_usage": True})
    assert [event.get("usage") for event in asked] == [None, {"prompt_tokens": 1}, {"a": 1}]


def test_reasoning_goes_under_both_names() -> None:
    [event] = told(chunk({"reasoning_content": "hm"}))
    assert event["choices"][0]["delta"] == {"reasoning_content": "hm", "reasoning": "hm"}
    message = CHAT.render(answer({"content": "a", "reasoning_content": "hm"}), {})["choices"][0]["message"]
    assert message["reasoning"] == "hm"


def test_vectors_are_packed_for_clients_that_ask_for_base64() -> None:
    packed = base64.b64encode(struct.pack("<2f", 0.5, -1)).decode()
    rows = {"data": [{"index": 0, "embedding": [0.5, -1]}, {"index": 1, "embedding": packed}]}
    got = CHAT.render_embeddings(rows, {"encoding_format": "base64"}, {})["data"]
    assert got == [{"index": 0, "embedding": packed}, {"index": 1, "embedding": packed}]
    assert CHAT.render_embeddings(rows, {}, {}) is rows


def test_an_error_in_the_middle_of_a_stream_is_an_event() -> None:
    written = CHAT.renderer({}, lambda prefix: prefix, 7).fail(s.UpstreamError("broke", code="x"), "req_1")
    error = {"message": "broke", "type": "upstream_error", "param": None, "code": "x", "request_id": "req_1"}
    assert json.loads(written.removeprefix(b"data: ")) == {"error": error}


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "messages"), ({"messages": []}, "messages"), ({"messages": [{"content": "a"}]}, "messages[0]"),
     ({"messages": [USER, "a"]}, "messages[1]")],
)  # fmt: skip
def test_a_request_without_messages_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(s.InvalidRequest) as caught:
        CHAT.parse(body, {})
    assert caught.value.param == param
    with pytest.raises(s.InvalidRequest, match="`input`"):
        CHAT.parse_embeddings({"input": ""}, {})
    with pytest.raises(s.InvalidRequest, match="`stream`"):
        CHAT.wants_stream({"stream": "yes"}, {})


# ----- what providers of this dialect get


def test_a_providers_row_is_applied_to_an_openai_clients_own_request() -> None:
    target = attempt_at("groq", stream=True)
    body = CHAT.encode({"model": "alias", "messages": [USER], "logit_bias": {"1": 2}, "x": 1, "stream": True}, target)
    assert body == {
        "model": "m", "messages": [USER], "x": 1, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert target.dropped == ["logit_bias"]


def test_what_openai_has_no_place_for_in_another_clients_request_is_named() -> None:
    parts = [
        {"type": "media", "media": {"file_url": "https://u/a.mp4"}},
        {"type": "file", "file": {"file_url": "https://u/a.pdf"}},
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "user", "content": parts[:1]}]
    native = [{"type": "native", "dialect": "gemini", "tool": {"googleSearch": {}}}, {"type": "native"}]
    body = {"model": "alias", "messages": messages, "tools": native, "tool_choice": "auto", "top_k": 3}
    target = attempt_at("openai", foreign=True)
    assert CHAT.encode(body, target) == {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "user", "content": ""}],
    }
    assert target.dropped == [
        "content.media",
        "content.file",
        "cache_control",
        "tools.googleSearch",
        "tools.native",
        "top_k",
    ]


def test_signatures_of_calls_stay_with_their_provider() -> None:
    call = {"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    signed = {**call, "extra_content": {"google": {"thought_signature": "S"}}}
    history = [USER, {"role": "assistant", "content": None, "tool_calls": [signed]}]
    assert CHAT.encode({"messages": history}, attempt_at("openai", foreign=True))["messages"][1]["tool_calls"] == [call]


def test_embeddings_of_other_clients_come_as_floats() -> None:
    asked = {"model": "alias", "input": "a"}
    assert CHAT.encode_embeddings(asked, attempt_at("openai")) == {"model": "m", "input": "a"}
    foreign = CHAT.encode_embeddings(asked, attempt_at("openai", foreign=True))
    assert foreign == {"model": "m", "input": "a", "encoding_format": "float"}


def test_a_cap_on_the_output_goes_under_the_one_name_that_binds() -> None:
    assert CHAT.with_output_cap({"a": 1}, 5) == {"a": 1, "max_completion_tokens": 5}
    assert CHAT.with_output_cap({"max_tokens": 9, "max_output_tokens": 8}, 5) == {"max_tokens": 5}


# ----- errors of any provider


@pytest.mark.parametrize(
    ("status", "body", "kind", "seen"),
    [
        (400, b'{"error":{"message":"bad","type":"t","code":"c","param":"p","more":1}}', s.UpstreamRefused,
         (400, "t", "c", "p", {"more": 1}, "bad")),
        (400, b'{"error":"bad","code":7}', s.UpstreamRefused, (400, "invalid_request_error", "7", None, {}, "bad")),
        (422, b'{"detail":[{"loc":["body","n"],"msg":"too low"},"odd"]}', s.UpstreamRefused,
         (422, "invalid_request_error", "upstream_refused", None, {"detail": [{"loc": ["body", "n"], "msg": "too low"}, "odd"]},
          "body.n: too low; odd")),
        (400, b'[{"error":{"message":"bad"}}]', s.UpstreamRefused,
         (400, "invalid_request_error", "upstream_refused", None, {}, "bad")),
        (404, b"7", s.UpstreamRefused, (404, "invalid_request_error", "upstream_refused", None, {}, "7")),
        (400, b'{"error":{"message":"Incorrect API key provided"}}', s.UpstreamError,
         (502, "upstream_error", "upstream_authentication", None, {},
          "the provider refused Stockyard's key or account: Incorrect API key provided")),
        (429, b'{"error":{"message":"slow","code":"slow_down"}}', s.UpstreamError,
         (429, "rate_limit_error", "slow_down", None, {}, "slow")),
        (429, b'{"error":{"message":"pay","code":"insufficient_quota"}}', s.UpstreamRefused,
         (429, "invalid_request_error", "insufficient_quota", None, {}, "pay")),
        (529, b"<html>", s.UpstreamError,
         (503, "upstream_error", "upstream_529", None, {}, "the provider answered an HTML page")),
        (501, b"", s.UpstreamError, (502, "upstream_error", "upstream_501", None, {}, "the provider answered 501")),
    ],
)  # fmt: skip
def test_an_error_is_sorted_by_what_the_client_may_learn(status: int, body: bytes, kind: type, seen: Any) -> None:
    error = CHAT.read_error(status, body)
    assert type(error) is kind
    assert (error.status, error.type, error.code, error.param, error.fields, error.message) == seen


# ----- what every translation has in common


def test_the_calls_of_the_first_chat_api_and_their_results_are_calls_and_results(attempt: Attempt) -> None:
    history = [
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a":1}'}},
        {"role": "function", "name": "f", "content": "blue"},
    ]
    turns = s.DIALECTS["anthropic"].encode({"messages": history}, attempt("claude-sonnet-4-6"))["messages"]
    assert turns[1]["content"] == [{"type": "tool_use", "id": "call_f", "name": "f", "input": {"a": 1}}]
    assert turns[2]["content"] == [{"type": "tool_result", "tool_use_id": "call_f", "content": "blue"}]


def test_one_choice_of_several_is_joined() -> None:
    def piece(at: int, text: str) -> dict[str, Any]:
        return {"id": "c", "choices": [{"index": at, "delta": {"content": text}}]}

    chunks = [piece(0, "a"), piece(1, "b"), piece(0, "c")]
    assert [s.join_chunks(chunks, at)["choices"][0]["message"]["content"] for at in (0, 1)] == ["ac", "b"]


def test_vectors_that_are_none_are_the_providers_failure(attempt: Attempt) -> None:
    with pytest.raises(s.UpstreamError, match="no embeddings"):
        s.DIALECTS["gemini"].decode_embeddings({"embeddings": [{"values": "odd"}]}, attempt("gemini-embedding-001"))


def test_a_dialect_without_embeddings_says_so() -> None:
    with pytest.raises(s.NotFound) as caught:
        s.DIALECTS["anthropic"].encode_embeddings({"input": "a"}, attempt_at("anthropic"))
    assert caught.value.code == "unsupported_endpoint"


@pytest.mark.parametrize("dialect", ["anthropic", "responses"])
def test_calls_of_hosts_that_number_nothing_are_told_apart_by_their_ids(dialect: str) -> None:
    def piece(text: str, **named: Any) -> dict[str, Any]:
        return chunk({"tool_calls": [{**named, "function": {"arguments": text, **({"name": "f"} if named else {})}}]})

    renderer = s.DIALECTS[dialect].renderer({}, lambda prefix: f"{prefix}1", 7)
    pieces = [piece('{"a"', id="t1"), piece(":1}"), piece("{}", id="t2"), piece(" ", id="t1")]
    written = b"".join(map(renderer.feed, pieces)) + renderer.close()
    told = [json.loads(line[6:]) for line in written.splitlines() if line.startswith(b"data: ")]
    kinds = ("content_block_delta", "response.function_call_arguments.delta")
    deltas = [event["delta"] for event in told if event["type"] in kinds]
    assert deltas == (['{"a"', ":1}", "{}"] if dialect == "responses" else [
        {"type": "input_json_delta", "partial_json": text} for text in ('{"a"', ":1}", "{}")
    ])  # fmt: skip
    assert b'"t1"' in written and b'"t2"' in written


def test_a_completion_split_into_chunks_and_joined_is_the_same() -> None:
    call = {"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    signed = {"type": "thinking", "thinking": "hm", "signature": "s"}
    message = {
        "content": "a", "refusal": "b", "reasoning_content": "hm", "thinking_blocks": [signed], "tool_calls": [call],
        "native_blocks": [{"dialect": "anthropic", "block": {"type": "server_tool_use"}}], "annotations": [{"type": "x"}],
        "audio": {"id": "au", "data": "QQ=="},
    }  # fmt: skip
    whole = answer(message, "tool_calls", usage={"prompt_tokens": 1, "completion_tokens": 2})
    joined = s.join_chunks(s.chunks_of(whole))
    assert joined["choices"][0]["message"] == whole["choices"][0]["message"]
    assert joined["choices"][0]["finish_reason"] == "tool_calls" and joined["usage"]["completion_tokens"] == 2
