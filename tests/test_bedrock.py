"""Bedrock Converse as a provider: bodies by family of models, binary frames, signatures, embeddings."""

import base64
import contextlib
import copy
import itertools
import json
import struct
import uuid
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockyard import (
    BedrockConverse,
    EventStreamReader,
    InvalidRequest,
    Provider,
    Translation,
    UpstreamError,
    UpstreamRefused,
    bedrock_family,
    read_openai_usage,
    sign_v4,
)

Attempt = Callable[..., Translation]
BEDROCK = BedrockConverse()
CLAUDE = "us.anthropic.claude-sonnet-4-5-20250929-v1:0"
CLAUDE_46 = "global.anthropic.claude-opus-4-6-v1"
CLAUDE_48 = "anthropic.claude-opus-4-8"
NOVA = "us.amazon.nova-pro-v1:0"
LLAMA = "meta.llama3-3-70b-instruct-v1:0"
USER = [{"role": "user", "content": "hi"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
PNG = "data:image/png;base64,iVBO"
PDF = {"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBE", "filename": "my_file (1).v2.pdf"}}


def encode(attempt: Attempt, model: str, **members: Any) -> tuple[dict[str, Any], list[str]]:
    request = {"model": "m", "messages": USER, **members}
    before = copy.deepcopy(request)
    translation = attempt(model)
    body = BEDROCK.encode(request, translation)
    assert request == before
    return body, translation.dropped


def called(*ids: str, content: str | None = None) -> dict[str, Any]:
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}} for i in ids]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(call_id: str, content: Any = "ok", **members: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content, **members}


# -- requests


def test_path_encodes_the_model() -> None:
    provider = Provider(id="p", name="P", base_url="https://p.example")
    assert BEDROCK.path(provider, NOVA, False) == "/model/us.amazon.nova-pro-v1%3A0/converse"
    arn = "arn:aws:bedrock:us-east-1:1:inference-profile/us.x"
    expected = "/model/arn%3Aaws%3Abedrock%3Aus-east-1%3A1%3Ainference-profile%2Fus.x/converse-stream"
    assert BEDROCK.path(provider, arn, True) == expected


def test_members_travel_under_converse_names(attempt: Attempt) -> None:
    body, dropped = encode(
        attempt,
        NOVA,
        max_tokens=9,
        temperature=1.7,
        top_p=0.5,
        top_k=4,
        stop=["END", "\n"],
        service_tier="flex",
        metadata={"team": "a"},
        guardrailConfig={"guardrailIdentifier": "g", "guardrailVersion": "1"},
        seed=1,
        n=2,
        user="u",
        stream_options={},
        extra_body={"bedrock": {"performanceConfig": {"latency": "optimized"}}, "gemini": {"x": 1}},
    )
    assert body == {
        "messages": [{"role": "user", "content": [{"text": "hi"}]}],
        "inferenceConfig": {"maxTokens": 9, "temperature": 1, "topP": 0.5, "stopSequences": ["END"]},
        "additionalModelRequestFields": {"inferenceConfig": {"topK": 4}},
        "serviceTier": {"type": "flex"},
        "requestMetadata": {"team": "a"},
        "guardrailConfig": {"guardrailIdentifier": "g", "guardrailVersion": "1"},
        "performanceConfig": {"latency": "optimized"},
    }
    assert dropped == ["seed", "n", "user", "x"]


def test_strictness_refuses_what_would_be_dropped(attempt: Attempt) -> None:
    with pytest.raises(InvalidRequest, match="`seed`"):
        BEDROCK.encode({"messages": USER, "seed": 1}, attempt(NOVA, strict=True))


def test_turns_are_merged_and_results_stand_together(attempt: Attempt) -> None:
    body, dropped = encode(
        attempt,
        NOVA,
        tools=[TOOL],
        messages=[
            {"role": "system", "content": "be kind"},
            {"role": "developer", "content": "be short"},
            {"role": "user", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": " "}, {"type": "text", "text": "b"}]},
            called("c1", "call/2", content="look"),
            result("c1"),
            result("call/2", "", is_error=True),
            {"role": "user", "content": "next"},
        ],
    )
    assert body["system"] == [{"text": "be kind"}, {"text": "be short"}]
    fitted = body["messages"][1]["content"][2]["toolUse"]["toolUseId"]
    assert len(fitted) == 40
    assert fitted.isalnum()
    assert body["messages"] == [
        {"role": "user", "content": [{"text": "a"}, {"text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"text": "look"},
                {"toolUse": {"toolUseId": "c1", "name": "f", "input": {"a": 1}}},
                {"toolUse": {"toolUseId": fitted, "name": "f", "input": {"a": 1}}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"toolResult": {"toolUseId": "c1", "content": [{"text": "ok"}]}},
                {"toolResult": {"toolUseId": fitted, "content": [{"text": "(empty)"}], "status": "error"}},
                {"text": "next"},
            ],
        },
    ]
    assert dropped == []


@pytest.mark.parametrize("model", [LLAMA, "mistral.mistral-large-2407-v1:0", "writer.palmyra-x5-v1:0"])
def test_families_that_want_results_alone_get_a_filler_between(attempt: Attempt, model: str) -> None:
    image = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": PNG}}]
    history = [*USER, called("c1", "c2"), result("c1", image), result("c2"), {"role": "user", "content": "next"}]
    turns = encode(attempt, model, tools=[TOOL], messages=history)[0]["messages"]
    kinds = [(turn["role"], [next(iter(block)) for block in turn["content"]]) for turn in turns[2:]]
    results = ("user", ["toolResult", "toolResult"])
    if model == LLAMA:
        assert kinds == [results, ("assistant", ["text"]), ("user", ["text"])]
        assert "image" in turns[2]["content"][0]["toolResult"]["content"][1]
    elif model.startswith("mistral"):
        assert kinds == [results, ("assistant", ["text"]), ("user", ["image", "text"])]
    assert all(left["role"] != right["role"] for left, right in itertools.pairwise(turns))


def test_writer_refuses_the_status_of_results(attempt: Attempt) -> None:
    history = [*USER, called("c"), result("c", is_error=True)]
    body, dropped = encode(attempt, "writer.palmyra-x5-v1:0", tools=[TOOL], messages=history)
    assert "status" not in body["messages"][2]["content"][0]["toolResult"]
    assert dropped == ["messages.is_error"]


def test_claude_keeps_documents_away_from_results(attempt: Attempt) -> None:
    history = [*USER, called("c"), result("c"), {"role": "user", "content": [PDF]}]
    turns = encode(attempt, CLAUDE, tools=[TOOL], messages=history)[0]["messages"]
    assert turns[3] == {"role": "assistant", "content": [{"text": "."}]}
    assert [next(iter(block)) for block in turns[4]["content"]] == ["text", "document"]


@pytest.mark.parametrize(
    ("model", "first"), [(NOVA, "user"), (LLAMA, "user"), (CLAUDE, "assistant"), ("qwen.qwen3-32b-v1:0", "assistant")]
)
def test_who_may_begin(attempt: Attempt, model: str, first: str) -> None:
    body, _ = encode(attempt, model, messages=[{"role": "assistant", "content": "hello"}, *USER])
    assert body["messages"][0]["role"] == first
    assert encode(attempt, model, messages=[{"role": "system", "content": "s"}])[0]["messages"][0]["role"] == "user"


def test_later_instructions_are_inline_only_where_honoured(attempt: Attempt) -> None:
    history = [*USER, {"role": "system", "content": "now"}]
    assert encode(attempt, CLAUDE_48, messages=history)[0]["messages"][1] == {
        "role": "system",
        "content": [{"text": "now"}],
    }
    assert encode(attempt, NOVA, messages=history)[0]["messages"] == [
        {"role": "user", "content": [{"text": "hi"}, {"text": "<system>\nnow\n</system>"}]}
    ]


def test_media(attempt: Attempt) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": PNG}},
        {"type": "image_url", "image_url": {"url": "https://a.example/x.png"}},
        PDF,
        PDF,
        {"type": "file", "file": {"file_id": "s3://bucket/a/b.docx"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}},
        {"type": "media", "media": {"file_data": "data:video/mp4;base64,AAAA"}},
        {"type": "file", "file": {"file_id": "file-123"}},
    ]
    body, dropped = encode(attempt, NOVA, messages=[{"role": "user", "content": content}])
    document = {"format": "pdf", "source": {"bytes": "JVBE"}}
    assert body["messages"][0]["content"] == [
        {"text": "."},
        {"image": {"format": "png", "source": {"bytes": "iVBO"}}},
        {"document": {**document, "name": "my file (1) v2"}},
        {"document": {**document, "name": "my file (1) v2 2"}},
        {"document": {"format": "docx", "source": {"s3Location": {"uri": "s3://bucket/a/b.docx"}}, "name": "document"}},
        {"audio": {"format": "mp3", "source": {"bytes": "AAAA"}}},
        {"video": {"format": "mp4", "source": {"bytes": "AAAA"}}},
    ]
    assert dropped == ["content.image_url", "content.file"]


def test_cache_marks(attempt: Attempt) -> None:
    mark = {"type": "ephemeral", "ttl": "1h"}
    history = [
        {"role": "system", "content": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a", "cache_control": mark}, {"type": "text", "text": "b"}],
        },
    ]
    body, dropped = encode(attempt, CLAUDE, messages=history, tools=[{**TOOL, "cache_control": mark}])
    hour = {"cachePoint": {"type": "default", "ttl": "1h"}}
    assert body["system"] == [{"text": "s"}, {"cachePoint": {"type": "default"}}]
    assert body["messages"][0]["content"] == [{"text": "a"}, hour, {"text": "b"}]
    assert body["toolConfig"]["tools"][1] == hour
    assert dropped == []
    body, dropped = encode(attempt, NOVA, messages=history, tools=[{**TOOL, "cache_control": mark}])
    assert len(body["toolConfig"]["tools"]) == 1
    assert len(body["messages"][0]["content"]) == 3
    assert dropped == ["cache_control"]
    body, dropped = encode(attempt, LLAMA, messages=history)
    assert body["messages"][0]["content"] == [{"text": "a"}, {"text": "b"}]
    assert dropped == ["cache_control"]


def test_reasoning_goes_back_signed_and_unchanged(attempt: Attempt) -> None:
    blocks: list[dict[str, Any]] = [
        {"type": "thinking", "thinking": "t", "signature": "c2ln+/="},
        {"type": "redacted_thinking", "data": "ZGF0YQ=="},
        {
            "type": "bedrock_block",
            "block": {"toolUse": {"toolUseId": "s", "name": "n", "input": {}, "type": "server_tool_use"}},
        },
    ]
    said = {"role": "assistant", "content": "x", "reasoning_content": "t", "thinking_blocks": blocks}
    body, dropped = encode(attempt, CLAUDE, messages=[*USER, said])
    assert body["messages"][1]["content"] == [
        {"reasoningContent": {"reasoningText": {"text": "t", "signature": "c2ln+/="}}},
        {"reasoningContent": {"redactedContent": "ZGF0YQ=="}},
        blocks[2]["block"],
        {"text": "x"},
    ]
    assert dropped == []
    body, dropped = encode(attempt, NOVA, messages=[*USER, said])
    assert [next(iter(block)) for block in body["messages"][1]["content"]] == ["toolUse", "text"]
    assert dropped == ["messages.thinking_blocks", "messages.reasoning_content"]
    body, dropped = encode(
        attempt, "us.deepseek.r1-v1:0", messages=[*USER, {"role": "assistant", "content": "x", "reasoning": "t"}]
    )
    assert body["messages"][1]["content"][0] == {"reasoningContent": {"reasoningText": {"text": "t"}}}
    assert dropped == []
    assert encode(attempt, CLAUDE, messages=[*USER, {"role": "assistant", "content": "x", "reasoning": "t"}])[1] == [
        "messages.reasoning_content"
    ]


FORCED = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("model", "choice", "expected", "dropped"),
    [
        (CLAUDE, "auto", None, []),
        (CLAUDE, "required", {"any": {}}, []),
        (CLAUDE, FORCED, {"tool": {"name": "f"}}, []),
        (NOVA, FORCED, {"tool": {"name": "f"}}, []),
        (LLAMA, "required", None, ["tool_choice"]),
        ("mistral.mistral-large-2407-v1:0", FORCED, {"any": {}}, []),
        ("anthropic.claude-opus-5-5", "required", None, ["tool_choice"]),
        ("anthropic.claude-sonnet-5-5-v1", FORCED, None, ["tool_choice"]),
        ("anthropic.claude-opus-5-v1", FORCED, {"tool": {"name": "f"}}, []),
    ],
)
def test_tool_choice(attempt: Attempt, model: str, choice: Any, expected: Any, dropped: list[str]) -> None:
    other = {"type": "function", "function": {"name": "g", "description": " "}}
    body, named = encode(attempt, model, tools=[TOOL, other], tool_choice=choice)
    assert (body["toolConfig"].get("toolChoice"), named) == (expected, dropped)
    specs = [tool["toolSpec"] for tool in body["toolConfig"]["tools"]]
    assert [spec["name"] for spec in specs] == (["f"] if choice is FORCED else ["f", "g"])
    assert (
        all(spec["inputSchema"]["json"]["type"] == "object" for spec in specs) and "description" not in specs[-1]
    ) or len(specs) == 1


def test_no_choice_is_kept_by_leaving_tools_out_or_named(attempt: Attempt) -> None:
    assert "toolConfig" not in encode(attempt, CLAUDE, tools=[TOOL], tool_choice="none")[0]
    history = [*USER, called("c"), result("c")]
    body, dropped = encode(attempt, CLAUDE, tools=[TOOL], tool_choice="none", messages=history)
    assert body["toolConfig"]["tools"]
    assert dropped == ["tool_choice"]


def test_a_history_of_calls_needs_declarations(attempt: Attempt) -> None:
    body, _ = encode(attempt, NOVA, messages=[*USER, called("c"), result("c")])
    assert body["toolConfig"] == {
        "tools": [{"toolSpec": {"name": "f", "inputSchema": {"json": {"type": "object", "properties": {}}}}}]
    }


def test_strict_tools_and_schemas_only_where_listed(attempt: Attempt) -> None:
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True}}
    body, dropped = encode(attempt, CLAUDE, tools=[strict], response_format=form)
    assert body["toolConfig"]["tools"][0]["toolSpec"]["strict"] is True
    assert dropped == []
    assert body["outputConfig"] == {
        "textFormat": {"type": "json_schema", "structure": {"jsonSchema": {"schema": '{"type":"object"}', "name": "x"}}}
    }
    body, dropped = encode(attempt, NOVA, tools=[strict], response_format=form)
    assert "outputConfig" not in body
    assert dropped == ["response_format", "tools.strict"]
    assert encode(attempt, CLAUDE, response_format={"type": "json_object"})[1] == ["response_format"]


@pytest.mark.parametrize(
    ("model", "effort", "fields", "dropped"),
    [
        (CLAUDE, "low", {"thinking": {"type": "enabled", "budget_tokens": 2048}}, []),
        (CLAUDE, "none", {"thinking": {"type": "disabled"}}, []),
        (CLAUDE_46, "xhigh", {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, []),
        (CLAUDE_46, "minimal", {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, []),
        (CLAUDE_48, "xhigh", {"thinking": {"type": "adaptive"}, "output_config": {"effort": "xhigh"}}, []),
        (
            "anthropic.claude-opus-5-5",
            "none",
            {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
            [],
        ),
        ("anthropic.claude-sonnet-5-5", "none", {"thinking": {"type": "between_tools"}}, []),
        ("anthropic.claude-3-5-sonnet-20241022-v2:0", "low", None, ["reasoning_effort"]),
        ("openai.gpt-oss-120b-1:0", "medium", {"reasoning_effort": "medium"}, []),
        ("openai.gpt-oss-120b-1:0", "none", None, ["reasoning_effort"]),
        ("qwen.qwen3-32b-v1:0", "medium", {"reasoning_config": "high"}, []),
        (NOVA, "low", None, ["reasoning_effort"]),
    ],
)
def test_effort(attempt: Attempt, model: str, effort: str, fields: Any, dropped: list[str]) -> None:
    body, named = encode(attempt, model, reasoning_effort=effort)
    assert (body.get("additionalModelRequestFields"), named) == (fields, dropped)


def test_claude_makes_room_for_thinking_and_drops_sampling_then(attempt: Attempt) -> None:
    members = {
        "reasoning_effort": "medium",
        "max_tokens": 100,
        "temperature": 0.5,
        "top_p": 0.97,
        "top_k": 5,
        "tools": [TOOL],
    }
    body, dropped = encode(attempt, CLAUDE, **members, tool_choice="required")
    assert body["inferenceConfig"] == {"maxTokens": 8292, "topP": 0.97}
    assert body["additionalModelRequestFields"] == {"thinking": {"type": "enabled", "budget_tokens": 8192}}
    assert dropped == ["temperature", "top_k", "tool_choice"]
    body, dropped = encode(attempt, CLAUDE, temperature=0.5, top_k=5)
    assert body["inferenceConfig"] == {"temperature": 0.5}
    assert body["additionalModelRequestFields"] == {"top_k": 5}
    assert not dropped
    body, dropped = encode(attempt, CLAUDE_48, temperature=1, top_p=1)
    assert "inferenceConfig" not in body
    assert dropped == ["temperature", "top_p"]


def test_claude_reads_anthropics_own_members(attempt: Attempt) -> None:
    extras = {"anthropic": {"thinking": {"type": "enabled", "budget_tokens": 1024}, "container": "c"}}
    body, dropped = encode(attempt, CLAUDE, extra_body=extras, temperature=1)
    assert body["additionalModelRequestFields"] == {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    assert body["inferenceConfig"] == {"temperature": 1}
    assert dropped == ["container"]
    assert encode(attempt, NOVA, extra_body=extras)[1] == ["thinking", "container"]


def test_tools_of_bedrock_travel_and_odd_names_come_back(attempt: Attempt) -> None:
    translation = attempt(NOVA)
    tools = [
        {"type": "function", "function": {"name": "a.b"}},
        {"type": "function", "function": {"name": "a b"}},
        {"type": "custom", "custom": {"name": "sh", "format": {"type": "grammar"}}},
        {"type": "native", "dialect": "bedrock", "tool": {"systemTool": {"name": "nova_code_interpreter"}}},
        {"type": "native", "dialect": "openai", "tool": {"type": "web_search"}},
    ]
    body = BEDROCK.encode({"messages": USER, "tools": tools}, translation)
    names = [tool["toolSpec"]["name"] for tool in body["toolConfig"]["tools"][:3]]
    assert names == ["a_b", "a_b_", "sh"]
    assert body["toolConfig"]["tools"][3] == {"systemTool": {"name": "nova_code_interpreter"}}
    assert translation.dropped == ["tools.web_search"]
    uses = [
        {"toolUse": {"toolUseId": "1", "name": "a_b_", "input": {}}},
        {"toolUse": {"toolUseId": "2", "name": "sh", "input": {"input": "ls"}}},
    ]
    calls = BEDROCK.decode(answer(uses, "tool_use"), translation)["choices"][0]["message"]["tool_calls"]
    assert calls[0]["function"] == {"name": "a b", "arguments": "{}"}
    assert calls[1]["custom"] == {
        "name": "sh",
        "input": "ls",
    }


def test_families() -> None:
    assert bedrock_family("arn:aws:bedrock:us-east-1:1:inference-profile/us.amazon.nova-lite-v1:0") is bedrock_family(
        NOVA
    )
    assert bedrock_family("us-gov.anthropic.claude-3-7-sonnet-20250219-v1:0").claude is not None
    assert bedrock_family("someone.else-v1").choices == frozenset()


@pytest.mark.parametrize(
    "members",
    [
        {"messages": 5},
        {"messages": [{"role": "user", "content": [5]}]},
        {"messages": [{"role": "x", "content": ""}]},
        {"tools": {"a": 1}},
        {"tools": [{"type": "function", "function": {"name": 3}}]},
        {"max_tokens": "9"},
        {"inferenceConfig": 5},
        {"reasoning_effort": 3},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:nothing"}}]}]},
    ],
)
def test_wrong_requests_are_refused_with_the_name(attempt: Attempt, members: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode(attempt, NOVA, **members)
    assert caught.value.param


# -- answers


def answer(content: list[dict[str, Any]], stop: str = "end_turn", **usage: Any) -> dict[str, Any]:
    counts = {"inputTokens": 10, "outputTokens": 5, "totalTokens": 15, **usage}
    return {
        "output": {"message": {"role": "assistant", "content": content}},
        "stopReason": stop,
        "usage": counts,
        "metrics": {},
    }


def test_answer(attempt: Attempt) -> None:
    server = {"toolUseId": "s", "name": "nova_code_interpreter", "input": {"x": 1}, "type": "server_tool_use"}
    cited = {"location": {"web": {"url": "https://x.example"}}, "title": "X"}
    paged = {"location": {"documentPage": {"documentIndex": 0}}, "title": "D"}
    body = answer(
        [
            {"reasoningContent": {"reasoningText": {"text": "hm", "signature": "sig=="}}},
            {"reasoningContent": {"redactedContent": "AA=="}},
            {"toolUse": server},
            {"text": "one "},
            {"citationsContent": {"content": [{"text": "two"}], "citations": [cited, paged]}},
            {"image": {"format": "png", "source": {"bytes": "iVBO"}}},
            {"toolUse": {"toolUseId": "c", "name": "f", "input": {"a": 1}}},
            {"futureBlock": {}},
        ],
        "tool_use",
        cacheReadInputTokens=7,
        cacheWriteInputTokens=6,
        cacheDetails=[{"ttl": "1h", "inputTokens": 4}, {"ttl": "5m", "inputTokens": 2}],
    )
    body.update(trace={"guardrail": {}}, serviceTier={"type": "flex"})
    completion = BEDROCK.decode(body, attempt(CLAUDE))
    assert completion["choices"][0] == {
        "index": 0,
        "finish_reason": "tool_calls",
        "logprobs": None,
        "message": {
            "role": "assistant",
            "content": "one two",
            "reasoning_content": "hm",
            "thinking_blocks": [
                {"type": "thinking", "thinking": "hm", "signature": "sig=="},
                {"type": "redacted_thinking", "data": "AA=="},
                {"type": "bedrock_block", "block": {"toolUse": server}},
            ],
            "annotations": [
                {
                    "type": "url_citation",
                    "url_citation": {"url": "https://x.example", "title": "X", "start_index": 4, "end_index": 7},
                },
                {"type": "bedrock_citation", "start_index": 4, "end_index": 7, "bedrock_citation": paged},
            ],
            "images": [{"type": "image_url", "image_url": {"url": PNG}}],
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}],
        },
    }
    usage = read_openai_usage(completion["usage"])
    assert usage == BEDROCK.read_usage(body)
    assert (usage.input_tokens, usage.cached_tokens, usage.cache_write_5m_tokens, usage.cache_write_1h_tokens) == (
        10,
        7,
        2,
        4,
    )
    assert completion["usage"]["prompt_tokens"] == 23
    assert completion["service_tier"] == "flex"
    assert completion["extra_content"] == {"bedrock": {"trace": {"guardrail": {}}}}


@pytest.mark.parametrize(
    ("stop", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("guardrail_intervened", "content_filter"),
        ("content_filtered", "content_filter"),
        ("tool_use", "stop"),
        ("new", "stop"),
    ],
)
def test_finish_reasons(attempt: Attempt, stop: str, finish: str) -> None:
    assert BEDROCK.decode(answer([{"text": "x"}], stop), attempt(NOVA))["choices"][0]["finish_reason"] == finish


def test_failed_answers(attempt: Attempt) -> None:
    with pytest.raises(UpstreamError, match="malformed_tool_use") as caught:
        BEDROCK.decode(answer([], "malformed_tool_use"), attempt(NOVA))
    assert caught.value.code == "upstream_malformed_tool_use"
    for broken in ({}, {"output": None}, answer([1]), {**answer([]), "usage": {"cacheDetails": 4}}):  # type: ignore[list-item]
        with pytest.raises(UpstreamError, match="unknown shape"):
            BEDROCK.decode(broken, attempt(NOVA))


@pytest.mark.parametrize(
    ("status", "kind", "type_", "shown", "code"),
    [
        (400, "ValidationException:http://internal.amazon.com/", UpstreamRefused, 400, "ValidationException"),
        (400, "", UpstreamRefused, 400, "upstream_refused"),
        (403, "", UpstreamError, 502, "upstream_authentication"),
        (429, "ThrottlingException", UpstreamError, 429, "ThrottlingException"),
        (424, "", UpstreamError, 502, "upstream_502"),
        (408, "ModelTimeoutException", UpstreamError, 408, "ModelTimeoutException"),
        (503, "", UpstreamError, 503, "upstream_503"),
        (404, "ResourceNotFoundException", UpstreamRefused, 404, "ResourceNotFoundException"),
    ],
)
def test_errors(status: int, kind: str, type_: type[UpstreamError], shown: int, code: str) -> None:
    for body in (b'{"message":"no"}', b'{"Message":"no"}'):
        error = BEDROCK.read_error(status, body, kind)
        assert (type(error), error.status, error.code) == (type_, shown, code)
        assert error.message.endswith("no")


# -- frames


def header(name: str, kind: int, value: bytes) -> bytes:
    return bytes([len(name)]) + name.encode() + bytes([kind]) + value


def text_header(name: str, value: str) -> bytes:
    return header(name, 7, struct.pack(">H", len(value.encode())) + value.encode())


def frame(headers: bytes, payload: bytes = b"") -> bytes:
    prelude = struct.pack(">II", 16 + len(headers) + len(payload), len(headers))
    body = prelude + struct.pack(">I", zlib.crc32(prelude)) + headers + payload
    return body + struct.pack(">I", zlib.crc32(body))


def event(kind: str, payload: dict[str, Any]) -> bytes:
    headers = (
        text_header(":event-type", kind)
        + text_header(":content-type", "application/json")
        + text_header(":message-type", "event")
    )
    return frame(headers, json.dumps({"p": "abcdef", **payload}, ensure_ascii=False).encode())


def delta(index: int, **kinds: Any) -> bytes:
    return event("contentBlockDelta", {"contentBlockIndex": index, "delta": kinds})


def start(index: int, **kinds: Any) -> bytes:
    return event("contentBlockStart", {"contentBlockIndex": index, "start": kinds})


def stop(index: int) -> bytes:
    return event("contentBlockStop", {"contentBlockIndex": index})


BEGIN = event("messageStart", {"role": "assistant"})
STREAM = b"".join(
    [
        BEGIN,
        delta(0, reasoningContent={"text": "hm"}),
        delta(0, reasoningContent={"text": " é"}),
        delta(0, reasoningContent={"signature": "si"}),
        delta(0, reasoningContent={"signature": "g="}),
        stop(0),
        delta(1, reasoningContent={"redactedContent": "YQ=="}),
        delta(1, reasoningContent={"redactedContent": "Yg=="}),
        stop(1),
        delta(2, text="Sea"),
        delta(2, text=""),
        delta(2, text=" 海"),
        delta(2, citation={"location": {"web": {"url": "https://x.example"}}}),
        stop(2),
        start(3, toolUse={"toolUseId": "s", "name": "py", "type": "server_tool_use"}),
        delta(3, toolUse={"input": '{"x":'}),
        delta(3, toolUse={"input": "1}"}),
        stop(3),
        start(4, toolResult={"toolUseId": "s", "status": "success"}),
        delta(4, toolResult=[{"text": "2"}]),
        stop(4),
        start(5, toolUse={"toolUseId": "a", "name": "f"}),
        start(6, toolUse={"toolUseId": "b", "name": "g"}),
        delta(6, toolUse={"input": '{"q"'}),
        delta(5, toolUse={"input": ""}),
        delta(6, toolUse={"input": ":1}"}),
        stop(5),
        stop(6),
        start(7, image={"format": "png"}),
        delta(7, image={"source": {"bytes": "iVBO"}}),
        stop(7),
        event("somethingNew", {"x": 1}),
        event("messageStop", {"stopReason": "tool_use"}),
        event(
            "metadata",
            {"usage": {"inputTokens": 10, "outputTokens": 5, "cacheReadInputTokens": 2}, "metrics": {"latencyMs": 5}},
        ),
    ]
)


def read(attempt: Attempt, pieces: list[bytes]) -> tuple[list[dict[str, Any]], bool]:
    decoder = BEDROCK.decoder(attempt(CLAUDE, stream=True))
    chunks = [chunk for piece in pieces for chunk in decoder.feed(piece)]
    return chunks + decoder.close(), decoder.complete


def deltas(chunks: list[dict[str, Any]], name: str) -> list[Any]:
    found = (chunk["choices"][0]["delta"].get(name) for chunk in chunks if chunk["choices"])
    return [value for value in found if value]


def test_stream(attempt: Attempt) -> None:
    chunks, complete = read(attempt, [STREAM])
    assert complete
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(deltas(chunks, "reasoning_content")) == "hm é"
    assert "".join(deltas(chunks, "content")) == "Sea 海"
    assert [block for blocks in deltas(chunks, "thinking_blocks") for block in blocks] == [
        {"type": "thinking", "thinking": "hm é", "signature": "sig="},
        {"type": "redacted_thinking", "data": base64.b64encode(b"ab").decode()},
        {
            "type": "bedrock_block",
            "block": {"toolUse": {"toolUseId": "s", "name": "py", "type": "server_tool_use", "input": {"x": 1}}},
        },
        {
            "type": "bedrock_block",
            "block": {"toolResult": {"toolUseId": "s", "status": "success", "content": [{"text": "2"}]}},
        },
    ]
    assert deltas(chunks, "tool_calls") == [
        [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}],
        [{"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": ""}}],
        [{"index": 1, "function": {"arguments": '{"q"'}}],
        [{"index": 1, "function": {"arguments": ":1}"}}],
        [{"index": 0, "function": {"arguments": "{}"}}],
    ]
    assert deltas(chunks, "annotations")[0][0]["url_citation"]["end_index"] == 5
    assert deltas(chunks, "images") == [[{"type": "image_url", "image_url": {"url": PNG}}]]
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"] and c["choices"][0]["finish_reason"]] == [
        "tool_calls"
    ]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens"] == 12


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=40))
def test_any_split_gives_the_same_chunks(attempt: Attempt, cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in itertools.pairwise(places)]
    assert read(attempt, pieces) == read(attempt, [STREAM])


def test_byte_by_byte(attempt: Attempt) -> None:
    assert read(attempt, [STREAM[at : at + 1] for at in range(len(STREAM))]) == read(attempt, [STREAM])


def test_a_cut_stream_is_not_complete(attempt: Attempt) -> None:
    assert read(attempt, [STREAM[: STREAM.rindex(b"messageStop")]])[1] is False


def test_signatures_survive_a_round_trip(attempt: Attempt) -> None:
    chunks, _ = read(attempt, [STREAM])
    blocks = [block for found in deltas(chunks, "thinking_blocks") for block in found]
    body, _ = encode(
        attempt, CLAUDE, messages=[*USER, {"role": "assistant", "content": "x", "thinking_blocks": blocks}]
    )
    assert body["messages"][1]["content"][0] == {
        "reasoningContent": {"reasoningText": {"text": "hm é", "signature": "sig="}}
    }
    assert body["messages"][1]["content"][2]["toolUse"]["type"] == "server_tool_use"


@pytest.mark.parametrize(
    ("kind", "type_", "status", "retryable"),
    [
        ("throttlingException", UpstreamError, 429, True),
        ("modelStreamErrorException", UpstreamError, 502, True),
        ("internalServerException", UpstreamError, 500, True),
        ("serviceUnavailableException", UpstreamError, 503, True),
        ("validationException", UpstreamRefused, 400, False),
        ("somethingNew", UpstreamError, 502, True),
    ],
)
def test_exceptions_inside_a_stream(
    attempt: Attempt, kind: str, type_: type[UpstreamError], status: int, retryable: bool
) -> None:
    headers = text_header(":message-type", "exception") + text_header(":exception-type", kind)
    with pytest.raises(UpstreamError, match="slow down") as caught:
        read(attempt, [BEGIN, frame(headers, b'{"message":"slow down"}')])
    assert (type(caught.value), caught.value.status, caught.value.retryable) == (type_, status, retryable)


def test_error_frames_inside_a_stream(attempt: Attempt) -> None:
    headers = (
        text_header(":message-type", "error")
        + text_header(":error-code", "InternalFailure")
        + text_header(":error-message", "oh")
    )
    with pytest.raises(UpstreamError, match="oh") as caught:
        read(attempt, [BEGIN, frame(headers)])
    assert (caught.value.status, caught.value.code) == (500, "InternalFailure")


def test_headers_of_every_type_are_passed_over_but_for_text() -> None:
    values = {
        0: b"", 1: b"", 2: b"\xff", 3: b"\xff\xfe", 4: b"\0\0\0\x07", 5: b"\0" * 7 + b"\x08", 6: b"\0\x02\x00\xff",
        8: struct.pack(">q", 1_790_000_000_000), 9: uuid.UUID(int=7).bytes,
    }  # fmt: skip
    others = b"".join(header(f"h{kind}", kind, value) for kind, value in values.items())
    headers = text_header("first", "a") + others + text_header("text", "é")
    assert EventStreamReader().feed(frame(headers, b"x")) == [({"first": "a", "text": "é"}, b"x")]


def corrupt(at: int) -> bytes:
    data = bytearray(BEGIN)
    data[at] ^= 1
    return bytes(data)


def lengths(total: int, headers: int) -> bytes:
    prelude = struct.pack(">II", total, headers)
    return prelude + struct.pack(">I", zlib.crc32(prelude)) + b"\0" * 64


MOST, MOST_HEADERS = 24 * 1024 * 1024 + 128 * 1024 + 16, 128 * 1024


@pytest.mark.parametrize(
    ("total", "headers", "passes"),
    [
        (MOST, 0, True), (MOST + 1, 0, False), (MOST, MOST_HEADERS, True), (MOST, MOST_HEADERS + 1, False),
        (1000, 984, True), (1000, 985, False), (17, 2, False), (15, 0, False),
    ],
)  # fmt: skip
def test_lengths_are_judged_before_the_frame_is_whole(total: int, headers: int, passes: bool) -> None:
    reader, prelude = EventStreamReader(), lengths(total, headers)[:12]
    assert reader.feed(prelude[:11]) == []
    with contextlib.nullcontext() if passes else pytest.raises(UpstreamError, match="impossible"):
        assert reader.feed(prelude[11:]) == []


def test_frames_are_the_same_in_any_split() -> None:
    frames = [
        frame(b""),
        frame(text_header("a", "b"), b"x"),
        frame(text_header("c", "d" * 300), b"y" * 300),
        frame(b"", b"z"),
    ]
    told = [({}, b""), ({"a": "b"}, b"x"), ({"c": "d" * 300}, b"y" * 300), ({}, b"z")]
    data = b"".join(frames)
    assert EventStreamReader().feed(data) == told
    for size in (1, 5, 12, 13, 100, len(frames[0]) + len(frames[1])):
        reader = EventStreamReader()
        pieces = [reader.feed(data[at : at + size]) for at in range(0, len(data), size)]
        assert [one for piece in pieces for one in piece] == told
        ends = [-(-sum(map(len, frames[: at + 1])) // size) for at in range(4)]
        assert [at + 1 for at, piece in enumerate(pieces) for _ in piece] == ends, "each as soon as it is whole"


@pytest.mark.parametrize(
    "data",
    [
        corrupt(3),
        corrupt(5),
        corrupt(9),
        corrupt(20),
        corrupt(len(BEGIN) - 30),
        corrupt(len(BEGIN) - 1),
        lengths(12, 0),
        lengths(64, 60),
        lengths(2**31, 0),
        frame(header("x", 12, b"")),
        frame(b"\x09ab"),
        frame(header("x", 7, b"\xff\xff")),
        frame(header("x", 7, b"\0\x01\xff")),
        frame(header("x", 6, b"\0\x05abc"), b"payload"),
        b'{"message":"not a frame at all"}',
    ],
)
def test_broken_frames_are_never_passed_on(data: bytes) -> None:
    with pytest.raises(UpstreamError, match="broken frame") as caught:
        EventStreamReader().feed(data)
    assert caught.value.code == "upstream_malformed"


# -- signatures

KEYS = ("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
HOST = "https://example.amazonaws.com"
MOMENT_S = 1_440_938_160  # 2015-08-30 12:36:00 UTC, the moment of AWS's examples
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.mark.parametrize(
    ("method", "url", "headers", "body", "names", "signature"),
    [
        ("GET", "/", {}, b"", "host;x-amz-date", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        (
            "GET",
            "/?Param2=value2&Param1=value1",
            {},
            b"",
            "host;x-amz-date",
            "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
        ),
        (
            "GET",
            "/?Param1=value2&Param1=Value1",
            {},
            b"",
            "host;x-amz-date",
            "eedbc4e291e521cf13422ffca22be7d2eb8146eecf653089df300a15b2382bd1",
        ),
        (
            "POST",
            "/",
            {"My-Header1": "value1"},
            b"",
            "host;my-header1;x-amz-date",
            "c5410059b04c1ee005303aed430f6e6645f61f4dc9e1461ec8f8916fdf18852c",
        ),
        (
            "POST",
            "/",
            {"My-Header1": "VALUE1"},
            b"",
            "host;my-header1;x-amz-date",
            "cdbc9802e29d2942e5e10b5bccfdd67c5f22c7c4e8ae67b53629efa58b974b7d",
        ),
        (
            "GET",
            "/",
            {"My-Header1": "  value1", "My-Header2": ' "a   b   c"', "User-Agent": "x"},
            b"",
            "host;my-header1;my-header2;x-amz-date",
            "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736",
        ),
        (
            "POST",
            "/",
            FORM,
            b"Param1=value1",
            "content-type;host;x-amz-date",
            "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a",
        ),
    ],
)
def test_published_signatures(
    method: str, url: str, headers: dict[str, str], body: bytes, names: str, signature: str
) -> None:
    signed = sign_v4(method, HOST + url, headers, body, *KEYS, None, "us-east-1", "service", MOMENT_S)
    assert signed.pop("authorization") == (
        "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, "
        f"SignedHeaders={names}, Signature={signature}"
    )
    assert signed == {**headers, "x-amz-date": "20150830T123600Z"}


def test_an_encoded_path_is_signed_encoded_once_more() -> None:
    url = "https://bedrock-runtime.us-east-1.amazonaws.com/model/us.amazon.nova-micro-v1%3A0/converse"
    stale = {"content-type": "application/json", "Authorization": "old", "X-Amz-Date": "old"}
    signed = sign_v4("POST", url, stale, b'{"messages":[]}', *KEYS, "TOKEN", "us-east-1", "bedrock", MOMENT_S)
    assert signed == {
        "content-type": "application/json",
        "x-amz-date": "20150830T123600Z",
        "x-amz-security-token": "TOKEN",
        "authorization": "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/bedrock/aws4_request, "
        "SignedHeaders=content-type;host;x-amz-date;x-amz-security-token, "
        "Signature=3564d584e9fbfbd4e6ecf8948d90bfa72b52d3fd4978848240d2b9d43e67996f",
    }


def test_dots_and_ports() -> None:
    def signature(url: str) -> str:
        return sign_v4("GET", url, {}, b"", *KEYS, None, "us-east-1", "service", MOMENT_S)["authorization"]

    assert signature(f"{HOST}/a/./b/../c//d/") == signature(f"{HOST}:443/a/c/d/")
    assert signature("http://localhost:4566/x") != signature("http://localhost/x")
    assert signature("http://localhost:80/x") == signature("http://localhost/x")


# -- embeddings


@pytest.mark.parametrize(
    ("model", "request_", "body", "answer_", "dropped"),
    [
        (
            "amazon.titan-embed-text-v2:0",
            {"input": "a", "dimensions": 256, "normalize": True, "user": "u"},
            {"inputText": "a", "dimensions": 256, "normalize": True},
            {"embedding": [0.5], "inputTextTokenCount": 3},
            ["user"],
        ),
        (
            "amazon.titan-embed-text-v1",
            {"input": ["a"], "dimensions": 256},
            {"inputText": "a"},
            {"embedding": [0.5], "inputTextTokenCount": 3},
            ["dimensions"],
        ),
        (
            "amazon.titan-embed-image-v1",
            {"input": "a", "dimensions": 384},
            {"inputText": "a", "embeddingConfig": {"outputEmbeddingLength": 384}},
            {"embedding": [0.5], "inputTextTokenCount": 3},
            [],
        ),
        (
            "us.amazon.nova-2-multimodal-embeddings-v1:0",
            {"input": "a", "dimensions": 384, "input_type": "search_query"},
            {
                "taskType": "SINGLE_EMBEDDING",
                "singleEmbeddingParams": {
                    "embeddingPurpose": "GENERIC_RETRIEVAL",
                    "embeddingDimension": 384,
                    "text": {"truncationMode": "NONE", "value": "a"},
                },
            },
            {"embeddings": [{"embeddingType": "TEXT", "embedding": [0.5]}]},
            [],
        ),
        (
            "cohere.embed-english-v3",
            {"input": ["a"], "dimensions": 384},
            {"texts": ["a"], "input_type": "search_document", "embedding_types": ["float"]},
            {"embeddings": [[0.5]]},
            ["dimensions"],
        ),
        (
            "us.cohere.embed-v4:0",
            {"input": ["a"], "dimensions": 384, "truncate": "END", "input_type": "clustering"},
            {
                "texts": ["a"],
                "input_type": "clustering",
                "truncate": "END",
                "output_dimension": 384,
                "embedding_types": ["float"],
            },
            {"embeddings": {"float": [[0.5]]}},
            [],
        ),
    ],
)
def test_embeddings(attempt: Attempt, model: str, request_: Any, body: Any, answer_: Any, dropped: list[str]) -> None:
    translation = attempt(model)
    assert BEDROCK.encode_embeddings({"model": "m", "encoding_format": "base64", **request_}, translation) == body
    assert translation.dropped == dropped
    decoded = BEDROCK.decode_embeddings(answer_, translation)
    assert decoded["data"] == [{"object": "embedding", "index": 0, "embedding": [0.5]}]
    assert decoded["usage"]["prompt_tokens"] == (3 if "inputTextTokenCount" in answer_ else 1)
    with pytest.raises(UpstreamError):
        BEDROCK.decode_embeddings({}, translation)


def test_who_embeds_several_texts(attempt: Attempt) -> None:
    assert BEDROCK.texts_at_once("cohere.embed-english-v3") == 96
    assert BEDROCK.texts_at_once("amazon.titan-embed-text-v2:0") == 1
    with pytest.raises(InvalidRequest, match="no embedding model"):
        BEDROCK.encode_embeddings({"input": "a"}, attempt(NOVA))
