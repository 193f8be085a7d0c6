"""Anthropic's Messages, both sides, where the other tests of dialects do not look."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import stockyard as s

MESSAGES = s.DIALECTS["anthropic"]
USER = {"role": "user", "content": "q"}
PATCH = {"type": "custom", "custom": {"name": "patch", "format": {"type": "grammar", "grammar": {"definition": "S"}}}}
Attempt = Callable[..., s.Translation]


def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"id": "c", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def events(*deltas: dict[str, Any], finish: str = "stop") -> list[Any]:
    """What a Messages client gets for these deltas, without the first event and the last two."""
    renderer = MESSAGES.renderer({}, lambda prefix: f"{prefix}1", 5)
    written = b"".join(renderer.feed(chunk(delta)) for delta in deltas) + renderer.feed(chunk({}, finish))
    blocks = (written + renderer.close()).split(b"\n\n")[1:-3]
    return [json.loads(block.partition(b"data: ")[2]) for block in blocks]


def opened(told: list[Any]) -> list[str]:
    return [event["content_block"]["type"] for event in told if event["type"] == "content_block_start"]


def test_a_citation_that_comes_after_its_text_is_not_lost() -> None:
    cited = {"type": "char_location", "cited_text": "x"}
    call = {"index": 0, "id": "t", "function": {"name": "w", "arguments": "{}"}}
    told = events({"content": "a"}, {"tool_calls": [call]}, {"annotations": [{"type": "c", "anthropic": cited}]})
    assert opened(told) == ["text", "tool_use", "text"]
    assert told[-2]["delta"] == {"type": "citations_delta", "citation": cited}


def test_calls_that_come_interleaved_are_told_one_after_the_other() -> None:
    def piece(at: int, text: str, **named: str) -> dict[str, Any]:
        call = {"index": at, "function": {"arguments": text, **named}}
        return {"tool_calls": [{**call, "id": f"t{at}"} if named else call]}

    told = events(piece(0, '{"a"', name="x"), piece(1, "{}", name="y"), piece(0, ":1}"), finish="tool_calls")
    said = "".join(event["delta"]["partial_json"] for event in told if "delta" in event)
    assert opened(told) == ["tool_use", "tool_use"] and said == '{"a":1}{}'


def test_custom_tools_go_as_functions_and_come_back_as_they_were(attempt: Attempt) -> None:
    translation = attempt("claude-sonnet-4-6")
    call = {"id": "c1", "type": "custom", "custom": {"name": "patch", "input": "old"}}
    history = [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": ""}]
    body = MESSAGES.encode({"messages": history, "tools": [PATCH]}, translation)
    assert body["messages"][1]["content"] == [
        {"type": "tool_use", "id": "c1", "name": "patch", "input": {"input": "old"}}
    ]
    assert body["tools"][0]["description"].endswith("grammar:\nS")
    used = {"type": "tool_use", "id": "c2", "name": "patch", "input": {"input": "new"}}
    message = MESSAGES.decode({"content": [used], "stop_reason": "tool_use"}, translation)["choices"][0]["message"]
    assert message["tool_calls"] == [{"id": "c2", "type": "custom", "custom": {"name": "patch", "input": "new"}}]


def test_functions_of_the_first_chat_api_are_tools(attempt: Attempt) -> None:
    asked = {"messages": [USER], "functions": [{"name": "f"}], "function_call": {"name": "f"}}
    body = MESSAGES.encode(asked, attempt("claude-sonnet-4-6"))
    assert body["tools"][0]["name"] == "f" and body["tool_choice"] == {"type": "tool", "name": "f"}


def test_a_plain_answer_says_what_its_stream_would(attempt: Attempt) -> None:
    cited = {"type": "web_search_result_location", "url": "https://u", "title": "t"}
    content = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "server_tool_use", "id": "w", "name": "web_search", "input": {"query": "q"}},
        {"type": "text", "text": "one", "citations": [cited]},
        {"type": "text", "text": " two"},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {}},
    ]
    usage = {"input_tokens": 3, "output_tokens": 4, "server_tool_use": {"web_search_requests": 2}}
    answer = {"id": "msg_1", "content": content, "stop_reason": "tool_use", "usage": usage}
    completion = MESSAGES.decode(answer, attempt("claude-sonnet-4-6"))
    [choice] = completion["choices"]
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == ("one two", "hm")
    assert message["thinking_blocks"] == content[:1] and message["native_blocks"][0]["block"] == content[1]
    assert message["annotations"][0]["url_citation"]["url"] == "https://u"
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert choice["finish_reason"] == "tool_calls" and completion["usage"]["num_search_queries"] == 2
    assert MESSAGES.render(completion, {})["content"][0] == content[0]


def test_an_error_in_a_stream_has_the_status_of_its_type(attempt: Attempt) -> None:
    decoder = MESSAGES.decoder(attempt("claude-sonnet-4-6", stream=True))
    with pytest.raises(s.UpstreamError) as caught:
        decoder.feed(b'data: {"type":"error","error":{"type":"rate_limit_error","message":"slow"}}\n\n')
    assert caught.value.status == 429


def test_calls_of_hosts_that_send_no_ids_get_some(attempt: Attempt) -> None:
    call = {"id": "", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {"choices": [{"message": {"role": "assistant", "tool_calls": [call, dict(call)]}}]}
    message = s.OpenAiChat().decode(answer, attempt("m"))["choices"][0]["message"]
    assert [call["id"] for call in message["tool_calls"]] == ["call_0", "call_1"]


def test_joined_chunks_keep_the_signature_of_a_call() -> None:
    signed = {"google": {"thought_signature": "S"}}
    call = {"index": 0, "id": "t", "function": {"name": "w", "arguments": "{"}}
    chunks = [chunk({"tool_calls": [{**call, "extra_content": signed}]}), chunk({"tool_calls": [call]}, "tool_calls")]
    assert s.join_chunks(chunks)["choices"][0]["message"]["tool_calls"][0]["extra_content"] == signed
