"""Anthropic's Messages, both sides, where the other tests of dialects do not look."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

import stockyard as s

MESSAGES = s.DIALECTS["anthropic"]
CHAT = s.DIALECTS["openai"]
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


# ----- what a Messages client asks, as a provider of OpenAI's chat gets it


def asked(*content: Any, role: str = "user", provider: str = "openai", **body: Any) -> tuple[dict[str, Any], list[str]]:
    """The body that goes upstream for one turn of these blocks, and what is named as dropped."""
    turns = [{"role": role, "content": list(content) or "q"}]
    canonical = MESSAGES.parse({"model": "m", "max_tokens": 9, "messages": turns, **body}, {})
    row = s.PROVIDERS_BY_ID[provider]
    translation = s.Translation("gpt-4.1", row, False, 0, lambda prefix: f"{prefix}1", foreign=True)
    return CHAT.encode(canonical, translation), translation.dropped


def part_of(block: dict[str, Any]) -> Any:
    [message] = asked(block, {"type": "text", "text": "q"})[0]["messages"]
    return message["content"][0]


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("block", "part"),
    [
        ({"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "a"}),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QQ=="}},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,QQ=="}},
        ),
        (
            {"type": "image", "source": {"type": "url", "url": "https://u/a.png"}},
            {"type": "image_url", "image_url": {"url": "https://u/a.png"}},
        ),
        (
            {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "QQ=="}},
            {"type": "file", "file": {"filename": "document.pdf", "file_data": "data:application/pdf;base64,QQ=="}},
        ),
        (
            {"type": "document", "title": "n.txt", "source": {"type": "text", "media_type": "text/plain", "data": "é"}},
            {"type": "file", "file": {"filename": "n.txt", "file_data": f"data:text/plain;base64,{b64('é')}"}},
        ),
        (
            {"type": "document", "source": {"type": "file", "file_id": "file_1"}},
            {"type": "file", "file": {"file_id": "file_1"}},
        ),
        (
            {
                "type": "document",
                "source": {"type": "content", "content": [{"type": "text", "text": "a"}, {"text": "b"}]},
            },
            {"type": "text", "text": "a\nb"},
        ),
        ({"type": "document", "source": {"type": "content", "content": "a"}}, {"type": "text", "text": "a"}),
        (
            {
                "type": "search_result",
                "title": "T",
                "source": "https://u",
                "content": [{"type": "text", "text": "found"}],
            },
            {"type": "text", "text": "T (https://u)\nfound"},
        ),
    ],
)
def test_every_kind_of_block_has_a_part(block: dict[str, Any], part: dict[str, Any]) -> None:
    assert part_of(block) == part


def test_a_document_by_address_is_named_where_chat_has_no_place_for_it() -> None:
    block = {"type": "document", "source": {"type": "url", "url": "https://u/a.pdf"}}
    body, dropped = asked(block, {"type": "text", "text": "q"})
    assert body["messages"] == [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
    assert dropped == ["content.file"]


def test_results_of_tools_stand_before_the_rest_of_their_turn() -> None:
    image = {"type": "image", "source": {"type": "url", "url": "https://u"}}
    body, _ = asked(
        {"type": "text", "text": "and now?"},
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]},
        {"type": "tool_result", "tool_use_id": "b", "content": "no such file", "is_error": True},
        {"type": "tool_result", "tool_use_id": "c", "content": [image], "is_error": True},
        {"type": "tool_result", "tool_use_id": "d", "content": [{"type": "text", "text": "see"}, image]},
        {"type": "tool_result", "tool_use_id": "e"},
    )  # fmt: skip
    shown = {"type": "image_url", "image_url": {"url": "https://u"}}
    assert body["messages"] == [
        {"role": "tool", "tool_call_id": "a", "content": "1\n2"},
        {"role": "tool", "tool_call_id": "b", "content": "Error: no such file"},
        {"role": "tool", "tool_call_id": "c", "content": "Error: The result is attached to the next message."},
        {"role": "tool", "tool_call_id": "d", "content": "see"},
        {"role": "tool", "tool_call_id": "e", "content": ""},
        # OpenAI takes nothing but text in the result of a tool
        {"role": "user", "content": [{"type": "text", "text": "Attached to the result of c:"}, shown,
                                     {"type": "text", "text": "Attached to the result of d:"}, shown]},
        {"role": "user", "content": "and now?"},
    ]  # fmt: skip
    last, _ = asked({"type": "tool_result", "tool_use_id": "c", "content": [image]})
    assert [message["role"] for message in last["messages"]] == ["tool", "user"]


SPOKEN = [
    {"type": "thinking", "thinking": "hm", "signature": "s"},
    {"type": "redacted_thinking", "data": "x"},
    {"type": "server_tool_use", "id": "w", "name": "web_search", "input": {}},
    {"type": "text", "text": "Let me look."},
    {"type": "tool_use", "id": "a", "name": "look", "input": {"at": "sky"}},
]


def test_an_assistants_turn_is_one_message_and_its_opaque_blocks_are_named() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": '{"at":"sky"}'}}
    body, dropped = asked(*SPOKEN, role="assistant")
    assert body["messages"] == [{"role": "assistant", "content": "Let me look.", "tool_calls": [call]}]
    assert dropped == ["thinking_blocks", "native_blocks", "reasoning_content"]
    [message] = asked(*SPOKEN, role="assistant", provider="deepseek")[0]["messages"]
    assert message["reasoning_content"] == "hm"


def test_its_own_turn_goes_back_to_anthropic_as_it_came(attempt: Attempt) -> None:
    turns = [USER, {"role": "assistant", "content": SPOKEN}]
    canonical = MESSAGES.parse({"model": "m", "max_tokens": 9, "messages": turns}, {})
    body = MESSAGES.encode(canonical, attempt("claude-sonnet-4-6"))
    assert body["messages"] == [{"role": "user", "content": [{"type": "text", "text": "q"}]}, turns[1]]


TOOL = {"name": "look", "description": "d", "input_schema": {"type": "object"}}


@pytest.mark.parametrize(
    ("said", "sent"),
    [
        ({"system": "be brief"}, {}),
        ({"temperature": 0.5, "stop_sequences": ["END"]}, {"temperature": 0.5, "stop": ["END"]}),
        ({"metadata": {"user_id": "u"}, "service_tier": "standard_only"}, {"user": "u", "service_tier": "default"}),
        ({"tool_choice": {"type": "auto"}}, {"tool_choice": "auto"}),
        ({"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
         {"tool_choice": "required", "parallel_tool_calls": False}),
        ({"tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
        ({"tool_choice": {"type": "tool", "name": "look"}},
         {"tool_choice": {"type": "function", "function": {"name": "look"}}}),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"reasoning_effort": "low"}),
        ({"thinking": {"type": "enabled", "budget_tokens": 5000}}, {"reasoning_effort": "medium"}),
        ({"thinking": {"type": "enabled", "budget_tokens": 32_000}}, {"reasoning_effort": "high"}),
        ({"thinking": {"type": "adaptive"}}, {"reasoning_effort": "medium"}),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, {"reasoning_effort": "max"}),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "max"}}, {"reasoning_effort": "none"}),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
         {"response_format": {"type": "json_schema", "json_schema": {"name": "response", "schema": {"type": "object"}}}}),
    ],
)  # fmt: skip
def test_the_members_of_a_messages_body_in_chats_words(said: dict[str, Any], sent: dict[str, Any]) -> None:
    body, dropped = asked(tools=[TOOL], **said)
    function = {"name": "look", "parameters": {"type": "object"}, "description": "d"}
    system = [{"role": "system", "content": said["system"]}] if "system" in said else []
    assert dropped == [] and body == {
        "model": "gpt-4.1", "messages": [*system, USER], "max_completion_tokens": 9,
        "tools": [{"type": "function", "function": function}], **sent,
    }  # fmt: skip


def test_what_only_anthropic_has_is_named_elsewhere_and_kept_for_anthropic(attempt: Attempt) -> None:
    search = {"type": "web_search_20260318", "name": "web_search"}
    said: dict[str, Any] = {"tools": [search], "container": "c", "output_config": {"task_budget": {"total": 9}}}
    body, dropped = asked(**said)
    assert "tools" not in body and dropped == ["output_config", "container", "tools.web_search_20260318"]
    turns = {"model": "m", "max_tokens": 9, "messages": [USER]}
    sent = MESSAGES.encode(MESSAGES.parse({**turns, **said}, {}), attempt("claude-opus-5"))
    assert {name: sent[name] for name in said} == said


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "odd"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]},
         "messages[0].content.source"),
        ({"system": [{"type": "text"}]}, "system.text"),
        ({"messages": [{"role": "user", "content": [{"type": "search_result", "content": [5]}]}]},
         "messages[0].content[0]"),
        ({"tool_choice": {"type": "some"}}, "tool_choice"),
        ({"tool_choice": {"type": ["auto"]}}, "tool_choice"),
        ({"tools": [{"input_schema": {}}]}, "tools.name"),
        ({"max_tokens": "9"}, "max_tokens"),
    ],
)  # fmt: skip
def test_a_bad_messages_body_is_refused_with_the_place(body: dict[str, Any], param: str) -> None:
    with pytest.raises(s.InvalidRequest) as caught:
        MESSAGES.parse({"model": "m", "max_tokens": 9, "messages": [USER], **body}, {})
    assert caught.value.param == param


def test_counting_tokens_takes_a_picture_for_what_it_costs_not_for_its_bytes() -> None:
    def count(length: int) -> int:
        url = f"data:image/png;base64,{'A' * length}"
        canonical = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
        tokens: int = MESSAGES.count_tokens(canonical, {})["input_tokens"]
        return tokens

    assert count(300) == count(300_000) > 1500 > count(20)


def test_the_list_of_models_says_where_it_begins_and_ends() -> None:
    row = {"type": "model", "id": "a", "display_name": "a", "created_at": "1970-01-01T00:00:00Z"}
    page = {"data": [row, {**row, "id": "b", "display_name": "B"}], "has_more": False, "first_id": "a", "last_id": "b"}
    assert MESSAGES.render_models([{"id": "a"}, {"id": "b", "display_name": "B"}]) == page
    assert MESSAGES.render_models([]) == {"data": [], "has_more": False, "first_id": None, "last_id": None}


# ----- what any client asks, as Anthropic gets it


def sent(model: str = "claude-sonnet-4-6", **request: Any) -> tuple[dict[str, Any], list[str]]:
    row = s.PROVIDERS_BY_ID["anthropic"]
    translation = s.Translation(model, row, bool(request.get("stream")), 0, lambda prefix: f"{prefix}1", foreign=True)
    return MESSAGES.encode({"messages": [USER], **request}, translation), translation.dropped


def said(model: str, *messages: dict[str, Any]) -> Any:
    return sent(model, messages=list(messages))[0]["messages"]


@pytest.mark.parametrize(
    ("part", "block"),
    [
        (
            {"type": "text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}},
            {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        ),
        (
            {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        ),
        (
            {"type": "file", "file": {"file_data": f"data:text/markdown;base64,{b64('é')}", "filename": "n.md"}},
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "é"}, "title": "n.md"},
        ),
        (
            {"type": "file", "file": {"file_id": "file_1"}},
            {"type": "document", "source": {"type": "file", "file_id": "file_1"}},
        ),
        (
            {"type": "file", "file": {"file_url": "https://u/a.pdf"}},
            {"type": "document", "source": {"type": "url", "url": "https://u/a.pdf"}},
        ),
        (
            {"type": "image_url", "image_url": "https://u/a.png"},
            {"type": "image", "source": {"type": "url", "url": "https://u/a.png"}},
        ),
    ],
)
def test_every_kind_of_part_has_a_block(part: dict[str, Any], block: dict[str, Any]) -> None:
    [turn] = said("claude-sonnet-4-6", {"role": "user", "content": [part, {"type": "text", "text": " "}]})
    assert turn["content"] == [block]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
        {"type": "image_url", "image_url": {"url": "data:image/tiff;base64,QQ=="}},
        {"type": "image_url", "image_url": {"url": "data:image/png"}},
        {"type": "file", "file": {"file_data": "data:text/plain;base64,A"}},
    ],
)
def test_a_part_that_claude_cannot_read_is_refused(part: dict[str, Any]) -> None:
    with pytest.raises(s.InvalidRequest):
        sent(messages=[{"role": "user", "content": [part]}])


def test_later_instructions_stand_inline_where_the_model_honours_that_and_else_as_marked_text() -> None:
    later = (USER, {"role": "assistant", "content": "a"}, {"role": "developer", "content": "be brief"}, USER)
    inline = {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    question = {"type": "text", "text": "q"}
    assert said("claude-opus-5", *later)[2:] == [inline, {"role": "user", "content": [question]}]
    marked = {"type": "text", "text": "<system>\nbe brief\n</system>"}
    assert said("claude-sonnet-4-6", *later)[2:] == [{"role": "user", "content": [marked, question]}]


def test_pictures_among_instructions_are_named() -> None:
    image = {"type": "image_url", "image_url": {"url": "https://u"}}
    body, dropped = sent(messages=[{"role": "system", "content": [{"type": "text", "text": "a"}, image]}, USER])
    assert body["system"] == "a" and dropped == ["content.image"]


def test_foreign_calls_get_ids_that_claude_takes_the_same_in_call_and_result() -> None:
    call = {"id": "call|1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "call|1", "content": [{"type": "text", "text": "blue"}], "is_error": True}
    history = said("claude-sonnet-4-6", USER, {"role": "assistant", "content": None, "tool_calls": [call]}, result)
    [used], [told] = history[1]["content"], history[2]["content"]
    assert used["id"] == told["tool_use_id"] and used["id"].startswith("toolu_") and used["input"] == {}
    assert told["content"] == [{"type": "text", "text": "blue"}] and told["is_error"] is True


def test_reasoning_nobody_signed_stays_behind() -> None:
    unsigned = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    foreign = {"role": "assistant", "content": "b", "thinking_blocks": [{"type": "reasoning_item", "item": {}}]}
    body, dropped = sent(messages=[USER, unsigned, foreign, {"role": "assistant", "content": ""}])
    assert body["messages"][1]["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert len(body["messages"]) == 2 and dropped == ["reasoning_content", "thinking_blocks"]


@pytest.mark.parametrize(
    ("model", "asked", "sent_as", "dropped"),
    [
        ("claude-opus-5-5", {"reasoning_effort": "none"}, {"output_config": {"effort": "low"}}, []),
        ("claude-opus-5", {"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}, []),
        ("claude-sonnet-5-5", {"reasoning_effort": "none"}, {"thinking": {"type": "between_tools"}}, []),
        ("claude-opus-4-7", {"reasoning_effort": "none"}, {}, []),
        ("claude-sonnet-4-6", {"reasoning_effort": "xhigh"},
         {"thinking": {"type": "adaptive", "display": "summarized"}, "output_config": {"effort": "max"}}, []),
        ("claude-opus-5", {"reasoning_effort": "minimal"},
         {"thinking": {"type": "adaptive", "display": "summarized"}, "output_config": {"effort": "low"}}, []),
        ("claude-3-5-haiku-latest", {"reasoning_effort": "low", "temperature": 0.5, "top_p": 0.5},
         {"thinking": {"type": "enabled", "budget_tokens": 2048}}, ["top_p", "temperature"]),
        ("claude-opus-5", {"temperature": 0.5}, {}, ["temperature"]),
        ("claude-sonnet-4-6", {"temperature": 1.7, "top_k": 5}, {"temperature": 1, "top_k": 5}, []),
        ("claude-sonnet-4-6", {"temperature": 0.7, "top_p": 0.5}, {"temperature": 0.7}, ["top_p"]),
        ("claude-sonnet-4-6", {"stop": ["END", " "], "stream": True}, {"stop_sequences": ["END"], "stream": True}, []),
        ("claude-sonnet-4-6", {"safety_identifier": "u"}, {"metadata": {"user_id": "u"}}, []),
        ("claude-sonnet-4-6", {"service_tier": "default"}, {"service_tier": "standard_only"}, []),
        ("claude-sonnet-4-6", {"service_tier": "auto"}, {"service_tier": "auto"}, []),
        ("claude-sonnet-4-6", {"service_tier": "flex"}, {}, ["service_tier"]),
        ("claude-sonnet-4-6", {"response_format": {"type": "json_object"}},
         {"system": "Answer with one JSON object and nothing else."}, []),
        ("claude-opus-5", {"reasoning": {"effort": "high"}},
         {"thinking": {"type": "adaptive", "display": "summarized"}, "output_config": {"effort": "high"}}, []),
        ("claude-sonnet-4-6", {"response_format": {"type": "grammar"}}, {}, ["response_format"]),
        ("claude-sonnet-4-6", {"seed": 7, "extra_body": {"gemini": {"safetySettings": []}}}, {},
         ["seed", "safetySettings"]),
    ],
)  # fmt: skip
def test_the_members_of_a_chat_request_in_claudes_words(
    model: str, asked: dict[str, Any], sent_as: dict[str, Any], dropped: list[str]
) -> None:
    body, lost = sent(model, **asked)
    assert {name: body[name] for name in body.keys() - {"model", "messages", "max_tokens"}} == sent_as
    assert lost == dropped


@pytest.mark.parametrize(
    ("model", "choice", "written", "dropped"),
    [
        ("claude-sonnet-4-6", "required", {"type": "any"}, []),
        ("claude-sonnet-4-6", "none", {"type": "none"}, []),
        ("claude-opus-5-5", "required", {"type": "auto"}, ["tool_choice"]),
        ("claude-opus-4-5", "required", {"type": "any"}, ["reasoning_effort"]),
        (
            "claude-sonnet-4-6",
            {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "a"}]},
            {"type": "auto"},
            [],
        ),
    ],
)
def test_the_choice_of_tools_in_claudes_words(model: str, choice: Any, written: Any, dropped: list[str]) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]
    body, lost = sent(model, tools=tools, tool_choice=choice, reasoning_effort="low")
    assert body["tool_choice"] == written and lost == dropped
    assert [tool["name"] for tool in body["tools"]] == (["a"] if isinstance(choice, dict) else ["a", "b"])


def test_names_of_tools_that_claude_refuses_are_made_fit_and_put_back(attempt: Attempt) -> None:
    translation = attempt("claude-sonnet-4-6")
    chosen = {"type": "function", "function": {"name": "files.read"}}
    call = {"id": "c1", **chosen, "function": {"name": "files.read", "arguments": "{}"}}
    history = [
        USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "a"},
    ]
    body = MESSAGES.encode({"messages": history, "tools": [chosen], "tool_choice": chosen}, translation)
    fit = body["tools"][0]["name"]
    assert fit == "files_read" == body["tool_choice"]["name"] == body["messages"][1]["content"][0]["name"]
    used = {"type": "tool_use", "id": "c2", "name": fit, "input": {}}
    message = MESSAGES.decode({"content": [used], "stop_reason": "tool_use"}, translation)["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "files.read"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "critic", "content": "a"}, "messages[0].role"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "file", "file": "a"}]}, "messages[0].content.file"),
        ({"role": "tool", "tool_call_id": 5, "content": "a"}, "messages[0].tool_call_id"),
    ],
)
def test_a_message_that_cannot_be_read_is_refused_with_its_place(message: dict[str, Any], param: str) -> None:
    with pytest.raises(s.InvalidRequest) as caught:
        sent(messages=[message])
    assert caught.value.param == param


def test_what_claude_has_no_place_for_in_a_message_is_named() -> None:
    spoken = {"role": "assistant", "content": "a", "native_blocks": [{"dialect": "gemini", "block": {}}]}
    body, dropped = sent(messages=[{**USER, "name": "ann"}, {**spoken, "audio": {"id": "x"}}])
    assert [turn["content"] for turn in body["messages"]] == [
        [{"type": "text", "text": "q"}],
        [{"type": "text", "text": "a"}],
    ]
    assert dropped == ["messages.name", "messages.audio", "native_blocks"]


def test_a_strict_schema_says_in_words_what_claudes_subset_cannot() -> None:
    odd = {"type": "string", "format": "binary", "minLength": 2, "description": "d"}
    schema = {
        "type": "object", "$schema": "s", "additionalProperties": True,
        "properties": {"a": odd, "b": {"oneOf": [{"type": "array", "minItems": 3, "items": True}, {"format": "uri"}]},
                       "c": True},
    }  # fmt: skip
    body, _ = sent(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
    told = {"type": "string", "description": "d; minLength: 2; format: binary"}
    many = {"type": "array", "items": True, "description": "minItems: 3"}
    properties = {"a": told, "b": {"anyOf": [many, {"format": "uri"}]}, "c": True}
    wanted = {"type": "object", "properties": properties, "additionalProperties": False}
    assert body["output_config"]["format"] == {"type": "json_schema", "schema": wanted}


# ----- what Anthropic answers


def read(attempt: Attempt, *stream: dict[str, Any]) -> dict[str, Any]:
    """A stream of these events as one completion."""
    decoder = MESSAGES.decoder(attempt("claude-sonnet-4-6", stream=True))
    opening: dict[str, Any] = {"type": "message_start", "message": {"id": "msg_1", "usage": {"input_tokens": 3}}}
    ending = {"type": "message_stop"}
    data = b"".join(b"data: " + s.dump_json(event) + b"\n\n" for event in (opening, *stream, ending))
    completion = s.join_chunks([*decoder.feed(data), *decoder.close()])
    assert decoder.complete
    return completion


def block_events(at: int, block: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    told = [{"type": "content_block_delta", "index": at, "delta": delta} for delta in deltas]
    start = {"type": "content_block_start", "index": at, "content_block": block}
    return [start, *told, {"type": "content_block_stop", "index": at}]


def test_a_stream_keeps_opaque_blocks_citations_and_calls(attempt: Attempt) -> None:
    cited = {"type": "char_location", "cited_text": "x"}
    query = {"type": "server_tool_use", "id": "w", "name": "web_search", "input": {}}
    completion = read(
        attempt,
        *block_events(0, {"type": "thinking", "thinking": ""}, {"type": "thinking_delta", "thinking": "h"},
                      {"type": "thinking_delta", "thinking": "m"}, {"type": "signature_delta", "signature": "s"}),
        *block_events(1, {"type": "redacted_thinking", "data": "x"}),
        *block_events(2, query, {"type": "input_json_delta", "partial_json": '{"q":1}'}),
        *block_events(3, {"type": "text", "text": ""}, {"type": "text_delta", "text": "a"},
                      {"type": "citations_delta", "citation": cited}),
        *block_events(4, {"type": "tool_use", "id": "t", "name": "f"}, {"type": "input_json_delta", "partial_json": '{"a"'},
                      {"type": "input_json_delta", "partial_json": ":1}"}),
        {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 1}},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 5}},
    )  # fmt: skip
    [choice] = completion["choices"]
    message = choice["message"]
    signed = {"type": "thinking", "thinking": "hm", "signature": "s"}
    assert message["thinking_blocks"] == [signed, {"type": "redacted_thinking", "data": "x"}]
    assert message["native_blocks"] == [{"dialect": "anthropic", "block": {**query, "input": {"q": 1}}}]
    assert (message["content"], message["reasoning_content"]) == ("a", "hm")
    assert message["annotations"] == [{"type": "citation", "anthropic": cited}]
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a":1}'}
    assert choice["finish_reason"] == "tool_calls" and completion["usage"]["completion_tokens"] == 5


def test_a_refusal_says_why(attempt: Attempt) -> None:
    ended = {"stop_reason": "refusal", "stop_details": {"explanation": "policy"}}
    [choice] = read(attempt, {"type": "message_delta", "delta": ended})["choices"]
    assert choice["finish_reason"] == "content_filter" and choice["message"]["refusal"] == "policy"


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        ({"type": "message"}, 502, "upstream_malformed"),
        ({"content": [5]}, 502, "upstream_malformed"),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "m"}}, 503, "overloaded_error"),
        ({"type": "error", "error": {"type": "authentication_error", "message": "m"}}, 502, "upstream_authentication"),
        ({"error": "odd"}, 502, "upstream_502"),
    ],
)
def test_an_answer_that_is_none_is_the_providers_failure(
    attempt: Attempt, answer: dict[str, Any], status: int, code: str
) -> None:
    with pytest.raises(s.UpstreamError) as caught:
        MESSAGES.decode(answer, attempt("claude-sonnet-4-6"))
    assert (caught.value.status, caught.value.code) == (status, code)


def test_a_spent_limit_is_not_tried_again() -> None:
    details = {"error_code": "workspace_monthly_spend_limit_reached"}
    body = s.dump_json({"type": "error", "error": {"type": "rate_limit_error", "message": "m", "details": details}})
    error = MESSAGES.read_error(429, body)
    assert isinstance(error, s.UpstreamRefused) and error.code == "insufficient_quota"


# ----- what a Messages client is answered


def test_reasoning_and_opaque_blocks_are_told_as_blocks_of_their_own() -> None:
    query = {"type": "server_tool_use", "id": "w", "name": "web_search", "input": {}}
    signed = {"type": "thinking", "thinking": "hm", "signature": "s"}
    told = events(
        {"reasoning_content": "h"}, {"reasoning_content": "m"}, {"thinking_blocks": [signed]},
        {"thinking_blocks": [{"type": "redacted_thinking", "data": "x"}, {"type": "reasoning_item", "item": {}}]},
        {"native_blocks": [{"dialect": "anthropic", "block": query}, {"dialect": "gemini", "block": {}}]},
        {"content": "a"}, {"refusal": "b"},
    )  # fmt: skip
    assert opened(told) == ["thinking", "redacted_thinking", "server_tool_use", "text"]
    deltas = [event["delta"] for event in told if event["type"] == "content_block_delta"]
    assert deltas[:3] == [
        {"type": "thinking_delta", "thinking": "h"},
        {"type": "thinking_delta", "thinking": "m"},
        {"type": "signature_delta", "signature": "s"},
    ]
    assert [delta["text"] for delta in deltas[3:]] == ["a", "b"]


def test_reasoning_nobody_signed_has_an_empty_signature_in_a_plain_answer() -> None:
    message = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    answer = MESSAGES.render({"id": "chatcmpl-1", "choices": [{"message": message, "finish_reason": "length"}]}, {})
    assert answer["content"][0] == {"type": "thinking", "thinking": "hm", "signature": ""}
    assert (answer["id"], answer["stop_reason"]) == ("msg_1", "max_tokens")


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (s.UpstreamError("m", status=503), 529, "overloaded_error"),
        (s.UpstreamError("m", status=502), 502, "api_error"),
        (s.LimitExceeded("m"), 429, "rate_limit_error"),
        (s.InvalidRequest("m", status=422), 422, "invalid_request_error"),
    ],
)
def test_an_error_has_anthropics_status_and_words(error: s.GatewayError, status: int, kind: str) -> None:
    body = {"type": kind, "message": "m", "details": {"error_code": error.code}}
    told = {"type": "error", "error": body, "request_id": "req_1"}
    assert MESSAGES.render_error(error, "req_1") == (status, told)
    written = MESSAGES.renderer({}, lambda prefix: prefix, 7).fail(error, "req_1")
    assert written == b"event: error\ndata: " + s.dump_json(told) + b"\n\n"


def test_a_models_older_efforts_are_met() -> None:
    assert MESSAGES.with_output_cap({"model": "m"}, 5) == {"model": "m", "max_tokens": 5}
    body, dropped = sent("claude-opus-4-5", reasoning_effort="max")
    assert body["output_config"] == {"effort": "high"} and body["thinking"]["budget_tokens"] == 24_000
    assert dropped == []
