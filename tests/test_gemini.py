"""Gemini: requests, answers and streams of both sides, and Google's own SDK as the client."""

from __future__ import annotations

import asyncio
import base64
import copy
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from google import genai
from google.genai import errors, types
from hypothesis import given, settings
from hypothesis import strategies as st

from stockyard import (
    PACKED_PREFIX,
    SIGNATURE_DUMMY,
    BudgetExceeded,
    GeminiGenerate,
    GeminiVertex,
    GuardrailBlocked,
    InvalidRequest,
    Json,
    LimitExceeded,
    OpenAiChat,
    Provider,
    SchemaWriter,
    Translation,
    Unauthenticated,
    UnknownModel,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    gemini_family,
    read_openai_usage,
    read_openapi_schema,
)

GOOGLE = Provider(
    id="gemini",
    name="Google Gemini",
    dialect="gemini",
    base_url="https://google.test",
    paths={
        "chat": "/v1beta/models/{model}:generateContent",
        "stream": "/v1beta/models/{model}:streamGenerateContent?alt=sse",
    },
    offers=frozenset({"chat", "stream"}),
)
GEMINI, VERTEX = GeminiGenerate(), GeminiVertex()
PNG = "iVBORw0KGgo="
WEATHER: Json = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "exclusiveMinimum": 0}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Json = {"type": "function", "function": {"name": "weather", "description": "Look outside", "parameters": WEATHER}}


def translation(model: str = "gemini-3-flash", *, strict: bool = False, **names: Any) -> Translation:
    count = itertools.count(1)
    return Translation(
        model=model,
        provider=GOOGLE,
        stream=False,
        now_s=1_700_000_000,
        strict=strict,
        names=names,
        new_id=lambda prefix: f"{prefix}{next(count)}",
    )


def encode(request: Json, model: str = "gemini-3-flash", dialect: GeminiGenerate = GEMINI) -> tuple[Json, list[str]]:
    request = {"messages": [{"role": "user", "content": "Hi"}], **request}
    before = copy.deepcopy(request)
    target = translation(model)
    body = dialect.encode(request, target)
    assert request == before
    return body, target.dropped


def config_of(request: Json, model: str = "gemini-3-flash") -> Json:
    body, dropped = encode(request, model)
    assert dropped == []
    config: Json = body.get("generationConfig", {})
    return config


def contents_of(messages: list[Any], model: str = "gemini-3-flash", dialect: GeminiGenerate = GEMINI) -> list[Json]:
    contents: list[Json] = encode({"messages": messages}, model, dialect)[0]["contents"]
    return contents


def parse(body: Json, method: str = "generateContent") -> Json:
    return GEMINI.parse(body, {"model": "models/gpt-5", "method": method})


def call(key: str, name: str, arguments: str = "{}", **more: Any) -> Json:
    return {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def signed(signature: str) -> Json:
    return {"extra_content": {"google": {"thought_signature": signature}}}


# ---- requests to Google


def test_paths() -> None:
    assert GEMINI.path(GOOGLE, "models/gemini-3-flash", False) == "/v1beta/models/gemini-3-flash:generateContent"
    assert GEMINI.path(GOOGLE, "a b/c", True) == "/v1beta/models/a%20b%2Fc:streamGenerateContent?alt=sse"
    assert GEMINI.path(GOOGLE, "tunedModels/mine-1", False) == "/v1beta/tunedModels/mine-1:generateContent"


@pytest.mark.parametrize(
    ("request_", "config"),
    [
        ({"max_tokens": 5}, {"maxOutputTokens": 5}),
        ({"max_completion_tokens": 6, "temperature": 0}, {"maxOutputTokens": 6, "temperature": 0}),
        ({"top_p": 0.5, "top_k": 3, "seed": 7}, {"topP": 0.5, "topK": 3, "seed": 7}),
        ({"presence_penalty": 1, "frequency_penalty": 2}, {"presencePenalty": 1, "frequencyPenalty": 2}),
        ({"stop": "x"}, {"stopSequences": ["x"]}),
        ({"stop": ["x", "y"], "n": 1}, {"stopSequences": ["x", "y"]}),
        ({"n": 2}, {"candidateCount": 2}),
        ({"logprobs": True, "top_logprobs": 3}, {"responseLogprobs": True, "logprobs": 3}),
        ({"response_format": {"type": "json_object"}}, {"responseMimeType": "application/json"}),
        ({"response_format": {"type": "text"}, "stream": True, "stream_options": {"include_usage": True}}, {}),
        (
            {"modalities": ["text", "audio"], "audio": {"voice": "Kore", "format": "pcm16"}},
            {
                "responseModalities": ["TEXT", "AUDIO"],
                "speechConfig": {"voiceConfig": {"prebuiltVoiceConfig": {"voiceName": "Kore"}}},
            },
        ),
        ({"temperature": None, "tools": None, "reasoning_effort": None}, {}),
    ],
)
def test_generation_config(request_: Json, config: Json) -> None:
    assert config_of(request_) == config


def test_structured_output_prefers_json_schema() -> None:
    wrapper = {
        "name": "w",
        "schema": {**WEATHER, "$schema": "x", "title": "W"},
        "strict": True,
        "description": "A report",
    }
    config = config_of({"response_format": {"type": "json_schema", "json_schema": wrapper}})
    assert config["responseMimeType"] == "application/json"
    assert config["responseJsonSchema"] == {
        "description": "A report",
        "type": "object",
        "required": ["city"],
        "additionalProperties": False,
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    }
    body, _ = encode({"response_format": {"type": "json_schema", "json_schema": wrapper}}, "gemini-2.0-flash")
    assert "responseSchema" in body["generationConfig"]
    assert "additionalProperties" not in body["generationConfig"]["responseSchema"]


def test_json_beside_tools_is_for_gemini_3() -> None:
    request = {"tools": [TOOL], "response_format": {"type": "json_object"}}
    assert encode(request)[1] == []
    body, dropped = encode(request, "gemini-2.5-flash")
    assert dropped == ["response_format"]
    assert "generationConfig" not in body


@pytest.mark.parametrize(
    ("model", "effort", "thinking"),
    [
        ("gemini-3-flash-preview", "none", {"thinkingLevel": "MINIMAL"}),
        ("gemini-3-flash-preview", "minimal", {"thinkingLevel": "MINIMAL", "includeThoughts": True}),
        ("gemini-3.1-pro-preview", "minimal", {"thinkingLevel": "LOW", "includeThoughts": True}),
        ("gemini-3.8-flash", "none", {"thinkingLevel": "LOW"}),
        ("models/gemini-3.7-flash", "medium", {"thinkingLevel": "MEDIUM", "includeThoughts": True}),
        ("gemini-3-pro", "max", {"thinkingLevel": "HIGH", "includeThoughts": True}),
        ("gemini-2.5-flash", "none", {"thinkingBudget": 0}),
        ("gemini-2.5-flash", "medium", {"thinkingBudget": 8192, "includeThoughts": True}),
        ("gemini-2.5-flash-lite", "none", {"thinkingBudget": 0}),
        ("gemini-2.5-pro", "none", {"thinkingBudget": 128}),
        ("gemini-2.5-pro", "max", {"thinkingBudget": 32768, "includeThoughts": True}),
        ("gemini-9-ultra", "minimal", {"thinkingLevel": "LOW", "includeThoughts": True}),
    ],
)
def test_thinking_is_a_level_or_a_budget(model: str, effort: str, thinking: Json) -> None:
    assert config_of({"reasoning_effort": effort}, model) == {"thinkingConfig": thinking}


def test_reasoning_object() -> None:
    assert config_of({"reasoning": {"max_tokens": 2000, "exclude": True}}) == {
        "thinkingConfig": {"thinkingLevel": "MEDIUM"}
    }
    assert config_of({"include_reasoning": True}) == {"thinkingConfig": {"includeThoughts": True}}
    assert encode({"reasoning_effort": "high"}, "gemini-2.0-flash")[1] == ["reasoning_effort"]
    with pytest.raises(InvalidRequest, match="reasoning_effort"):
        encode({"reasoning_effort": "huge"})


def test_what_google_cannot_carry_is_named() -> None:
    request = {
        "logit_bias": {"1": 2},
        "parallel_tool_calls": False,
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "scale",
        "stop": list("abcdef"),
        "unheard_of": 1,
        "tools": [{"type": "web_search"}, {"type": "native", "dialect": "anthropic", "tool": {"type": "bash_2026"}}],
        "extra_body": {"anthropic": {"container": "x"}},
        "messages": [{"role": "user", "name": "Bo", "content": [{"type": "hologram"}, {"type": "text", "text": "x"}]}],
    }
    assert encode(request)[1] == [
        "messages.name",
        "content.hologram",
        "tools.web_search",
        "tools.bash_2026",
        "logit_bias",
        "parallel_tool_calls",
        "user",
        "metadata",
        "store",
        "service_tier",
        "stop[5:]",
        "unheard_of",
        "container",
    ]
    with pytest.raises(InvalidRequest, match="Google Gemini cannot carry `logit_bias`"):
        GEMINI.encode(
            {"messages": [{"role": "user", "content": "x"}], "logit_bias": {"1": 2}}, translation(strict=True)
        )


def test_extras_reach_their_place() -> None:
    extra = {
        "gemini": {"generationConfig.speechConfig": {"a": 1}, "toolConfig": {"retrievalConfig": {}}, "labels": {}},
        "google": {
            "thinking_config": {"thinking_budget": 9, "include_thoughts": True},
            "cached_content": "cachedContents/1",
        },
    }
    request = {"reasoning_effort": "low", "extra_body": extra, "safety_settings": [{"category": "X"}]}
    body, dropped = encode(
        {**request, "tools": [TOOL], "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    )
    assert body["generationConfig"] == {
        "thinkingConfig": {"thinkingBudget": 9, "includeThoughts": True},
        "speechConfig": {"a": 1},
    }
    assert body["cachedContent"] == "cachedContents/1"
    assert body["safetySettings"] == [{"category": "X"}]
    assert dropped == ["labels", "system", "tools", "tool_choice"]
    assert body.keys() == {"contents", "safetySettings", "generationConfig", "cachedContent"}


def test_system_messages() -> None:
    messages = [
        {"role": "system", "content": "one"},
        {"role": "developer", "content": [{"type": "text", "text": "two"}]},
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "late"},
        {"role": "user", "content": "Go"},
    ]
    body, _ = encode({"messages": messages})
    assert body["systemInstruction"] == {"parts": [{"text": "one"}, {"text": "two"}]}
    assert body["contents"] == [{"role": "user", "parts": [{"text": "Hi"}, {"text": "late"}, {"text": "Go"}]}]
    assert contents_of(messages[:1]) == [{"role": "user", "parts": [{"text": "one"}]}]
    assert contents_of(messages[:3], "gemma-3-27b-it")[0]["parts"] == [{"text": "one"}, {"text": "two"}, {"text": "Hi"}]


@pytest.mark.parametrize(
    ("part", "written"),
    [
        (
            {"type": "image_url", "image_url": {"url": f"data:image/jpg;base64,{PNG}"}},
            {"inlineData": {"mimeType": "image/jpeg", "data": PNG}},
        ),
        (
            {"type": "image_url", "image_url": "https://x.test/a.PNG?size=1"},
            {"fileData": {"fileUri": "https://x.test/a.PNG?size=1", "mimeType": "image/png"}},
        ),
        (
            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
            {"inlineData": {"mimeType": "audio/wav", "data": "AAAA"}},
        ),
        (
            {"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA", "filename": "a.pdf"}},
            {"inlineData": {"mimeType": "application/pdf", "data": "AAAA"}},
        ),
        (
            {"type": "file", "file_data": "AAAA", "filename": "a.csv"},
            {"inlineData": {"mimeType": "text/csv", "data": "AAAA"}},
        ),
        (
            {"type": "file", "file": {"file_id": "files/abc"}},
            {"fileData": {"fileUri": "https://generativelanguage.googleapis.com/v1beta/files/abc"}},
        ),
        (
            {"type": "media", "media": {"file_url": "https://youtu.be/x"}},
            {"fileData": {"fileUri": "https://youtu.be/x", "mimeType": "video/mp4"}},
        ),
        (
            {"type": "file", "file": {"file_data": "data:text/plain,a%20b"}},
            {"inlineData": {"mimeType": "text/plain", "data": "YSBi"}},
        ),
        (
            {"type": "text", "text": "t", "extra_content": {"google": {"video_metadata": {}}}},
            {"text": "t", "videoMetadata": {}},
        ),
    ],
)
def test_content_parts(part: Json, written: Json) -> None:
    assert contents_of([{"role": "user", "content": [part]}])[0]["parts"] == [written]


@pytest.mark.parametrize(
    ("url", "model", "dialect", "kept"),
    [
        ("https://x.test/a.png", "gemini-2.0-flash", GEMINI, False),
        ("https://x.test/a.png", "gemini-2.0-flash", VERTEX, True),
        ("https://x.test/picture", "gemini-3-flash", GEMINI, False),
        ("http://x.test/a.png", "gemini-3-flash", GEMINI, False),
        ("gs://bucket/a.png", "gemini-3-flash", GEMINI, False),
        ("gs://bucket/a.png", "gemini-3-flash", VERTEX, True),
    ],
)
def test_addresses_are_passed_on_or_named(url: str, model: str, dialect: GeminiGenerate, kept: bool) -> None:
    content = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": url}}]
    body, dropped = encode({"messages": [{"role": "user", "content": content}]}, model, dialect)
    assert len(body["contents"][0]["parts"]) == (2 if kept else 1)
    assert dropped == ([] if kept else ["content.image_url"])


def test_tools() -> None:
    nothing = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    native = {"type": "native", "dialect": "gemini", "tool": {"google_search": {}}}
    body, dropped = encode({"tools": [TOOL, nothing, native], "tool_choice": "required"})
    assert body["tools"] == [
        {
            "functionDeclarations": [
                {
                    "name": "weather",
                    "description": "Look outside",
                    "parametersJsonSchema": {
                        **WEATHER,
                        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
                    },
                },
                {"name": "now"},
            ]
        },
        {"googleSearch": {}},
    ]
    assert body["toolConfig"] == {"functionCallingConfig": {"mode": "ANY"}}
    assert dropped == []


@pytest.mark.parametrize(
    ("choice", "strict", "config"),
    [
        (None, False, None),
        ("auto", False, {"mode": "AUTO"}),
        (None, True, {"mode": "VALIDATED"}),
        ("none", True, {"mode": "NONE"}),
        (
            {"type": "function", "function": {"name": "weather"}},
            True,
            {"mode": "ANY", "allowedFunctionNames": ["weather"]},
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TOOL]}},
            False,
            {"mode": "VALIDATED", "allowedFunctionNames": ["weather"]},
        ),
    ],
)
def test_tool_choice(choice: Any, strict: bool, config: Json | None) -> None:
    tool = {"type": "function", "function": {**TOOL["function"], "strict": strict}}
    body, _ = encode({"tools": [tool], "tool_choice": choice})
    assert body.get("toolConfig") == (config and {"functionCallingConfig": config})


def test_tool_names_fit_and_come_back() -> None:
    target = translation()
    tools = [{"type": "function", "function": {"name": "1st-tool"}}, {"type": "custom", "custom": {"name": "shell"}}]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call("a", "1st-tool")]}]
    body = GEMINI.encode({"messages": messages, "tools": tools}, target)
    declared = body["tools"][0]["functionDeclarations"]
    assert [item["name"] for item in declared] == ["_1st-tool", "shell"]
    assert body["contents"][1]["parts"][0]["functionCall"]["name"] == "_1st-tool"
    parts = [{"functionCall": {"name": "_1st-tool"}}, {"functionCall": {"name": "shell", "args": {"input": "ls"}}}]
    answer = {"candidates": [{"content": {"parts": parts}, "finishReason": "STOP"}]}
    calls = GEMINI.decode(answer, target)["choices"][0]["message"]["tool_calls"]
    assert calls[0] == call("call_2", "1st-tool")
    assert calls[1] == {"id": "call_3", "type": "custom", "custom": {"name": "shell", "input": "ls"}}


def test_parallel_results_stand_in_the_order_of_their_calls() -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "Let me look", "tool_calls": [call("a", "f", '{"n":1}'), call("b", "g", "")]},
        {"role": "tool", "tool_call_id": "b", "content": '{"deg": 12345678901234567890123}'},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "seen"}, image]},
        {"role": "user", "content": "And?"},
    ]
    inline = {"inlineData": {"mimeType": "image/png", "data": PNG}}
    new = contents_of(messages)
    assert new[1]["parts"] == [
        {"text": "Let me look"},
        {"functionCall": {"name": "f", "args": {"n": 1}, "id": "a"}, "thoughtSignature": SIGNATURE_DUMMY},
        {"functionCall": {"name": "g", "args": {}, "id": "b"}},
    ]
    assert new[2]["parts"] == [
        {"functionResponse": {"name": "f", "response": {"output": "seen"}, "id": "a", "parts": [inline]}},
        {"functionResponse": {"name": "g", "response": {"deg": 12345678901234567890123}, "id": "b"}},
        {"text": "And?"},
    ]
    old = contents_of(messages, "gemini-2.5-flash")
    assert "thoughtSignature" not in old[1]["parts"][1]
    assert old[2]["parts"][0] == {"functionResponse": {"name": "f", "response": {"output": "seen"}}}
    assert old[2]["parts"][2:] == [inline, {"text": "And?"}]
    assert "id" not in contents_of(messages, dialect=VERTEX)[1]["parts"][1]["functionCall"]


@pytest.mark.parametrize(
    ("message", "response"),
    [
        ({"content": "plain"}, {"output": "plain"}),
        ({"content": None}, {"output": ""}),
        ({"content": "broken", "is_error": True}, {"error": "broken"}),
        ({"content": '{"error": 3}'}, {"output": {"error": 3}}),
        ({"content": '{"n": NaN}'}, {"output": '{"n": NaN}'}),
        ({"content": "[1]"}, {"output": "[1]"}),
        ({"content": '{"a":' * 5000}, {"output": '{"a":' * 5000}),
    ],
)
def test_a_tool_result_is_always_an_object(message: Json, response: Json) -> None:
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [call("a", "f")]},
        {"role": "tool", "tool_call_id": "a", **message},
    ]
    assert contents_of(messages)[2]["parts"][0]["functionResponse"]["response"] == response


def test_signatures_come_from_the_call_the_message_or_the_memory() -> None:
    def first_part(message: Json, **names: Any) -> Json:
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", **message}]
        part: Json = GEMINI.encode({"messages": messages}, translation(**names))["contents"][1]["parts"][0]
        return part

    own = first_part({"tool_calls": [call("a", "f", **signed("Sig+/=="))]}, signatures={"a": "other"})
    assert own["thoughtSignature"] == "Sig+/=="
    assert first_part({"tool_calls": [call("a", "f")]}, signatures={"a": "kept"})["thoughtSignature"] == "kept"
    assert first_part({"tool_calls": [call("a", "f")], **signed("above")})["thoughtSignature"] == "above"
    assert first_part({"content": "t", **signed("s")}) == {"text": "t", "thoughtSignature": "s"}
    assert first_part({"content": None, **signed("s")}) == {"text": "", "thoughtSignature": "s"}


def test_reasoning_history() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}]
    assert contents_of(messages)[1]["parts"] == [{"text": "r", "thought": True}, {"text": "a"}]
    assert encode({"messages": messages}, "gemini-2.0-flash")[1] == ["messages.reasoning_content"]
    blocks = [{"role": "assistant", "content": "a", "thinking_blocks": [{"type": "thinking"}]}]
    assert encode({"messages": messages[:1] + blocks})[1] == ["messages.thinking_blocks"]


def test_vertex_differs_by_attributes() -> None:
    request = {
        "user": "bo",
        "metadata": {"team": "a-1"},
        "extra_body": {"gemini": {"toolConfig.includeServerSideToolInvocations": True}},
    }
    body, dropped = encode(request, dialect=VERTEX)
    assert body["labels"] == {"user": "bo", "team": "a-1"}
    assert dropped == ["toolConfig.includeServerSideToolInvocations"]
    assert encode({"metadata": {"Team": "A B"}}, dialect=VERTEX)[1] == ["metadata"]
    assert encode({"tools": [{"type": "native", "dialect": "gemini", "tool": {"fileSearch": {}}}]}, dialect=VERTEX)[1]


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages"),
        ([{"role": "user", "content": ""}], "messages"),
        (["x"], r"messages\[0\]"),
        ([{"role": "poet", "content": "x"}], r"messages\[0\].role"),
        ([{"role": "tool", "tool_call_id": "z", "content": "x"}], r"messages\[0\].tool_call_id"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}], "data URI"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "input_audio"),
    ],
)
def test_a_bad_message_is_named(messages: list[Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        GEMINI.encode({"messages": messages}, translation())


# ---- schemas


def rewrite(schema: Json, whole: bool = True) -> tuple[Any, list[str]]:
    dropped: list[str] = []
    return SchemaWriter(schema, whole, dropped.append).write(schema), dropped


@pytest.mark.parametrize(
    ("schema", "whole", "subset"),
    [
        ({"const": "a"}, {"enum": ["a"], "type": "string"}, None),
        ({"const": True}, {"enum": [True], "type": "boolean"}, {"type": "boolean"}),
        ({"type": ["string", "null"]}, {"type": ["string", "null"]}, {"type": "string", "nullable": True}),
        ({"type": "string", "format": "email"}, {"type": "string", "description": "(format: email)"}, None),
        (
            {"oneOf": [{"type": "string"}, {"type": "null"}]},
            {"anyOf": [{"type": "string"}, {"type": "null"}]},
            {"anyOf": [{"type": "string"}], "nullable": True},
        ),
        (
            {"allOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}, "required": ["b"]}]},
            {"properties": {"a": {}, "b": {}}, "required": ["a", "b"]},
            None,
        ),
        (
            {"$defs": {"a": {"type": "string"}}, "properties": {"x": {"$ref": "#/$defs/a"}}},
            {"$defs": {"a": {"type": "string"}}, "properties": {"x": {"$ref": "#/$defs/a"}}},
            {"properties": {"x": {"type": "string"}}},
        ),
        (
            {"$defs": {"a": {}}, "properties": {"x": {"$ref": "#/$defs/a", "description": "d"}}},
            {"$defs": {"a": {}}, "properties": {"x": {"description": "d", "anyOf": [{"$ref": "#/$defs/a"}]}}},
            {"properties": {"x": {"description": "d"}}},
        ),
        (
            {"properties": {"title": {"title": "T", "type": "string"}}},
            {"properties": {"title": {"type": "string"}}},
            None,
        ),
    ],
)
def test_schemas(schema: Json, whole: Json, subset: Json | None) -> None:
    assert rewrite(copy.deepcopy(schema)) == (whole, [])
    assert rewrite(schema, whole=False)[0] == (whole if subset is None else subset)


def test_lost_constraints_are_named() -> None:
    schema = {"type": "number", "multipleOf": 2, "exclusiveMinimum": 0, "not": {}, "title": "silent"}
    assert rewrite(schema) == ({"type": "number"}, ["multipleOf", "exclusiveMinimum", "not"])
    tree = {"$defs": {"t": {"properties": {"next": {"$ref": "#/$defs/t"}}}}, "$ref": "#/$defs/t"}
    assert rewrite(tree, whole=False) == ({"properties": {"next": {"type": "object"}}}, ["$ref"])


def test_openapi_schema_becomes_json_schema() -> None:
    schema = {
        "type": "OBJECT",
        "properties": {"a": {"type": "STRING", "nullable": True}, "b": {"type": "ARRAY", "items": {"type": "INTEGER"}}},
        "propertyOrdering": ["a"],
        "min_properties": "1",
        "anyOf": [{"type": "NULL"}],
    }
    assert read_openapi_schema(schema, "s") == {
        "type": "object",
        "minProperties": 1,
        "anyOf": [{"type": "null"}],
        "properties": {"a": {"type": ["string", "null"]}, "b": {"type": "array", "items": {"type": "integer"}}},
    }


# ---- answers from Google


def answer(parts: list[Any], finish: str | None = "STOP", **more: Any) -> Json:
    return {"candidates": [{"content": {"role": "model", "parts": parts}, "finishReason": finish}], **more}


def test_an_answer_with_everything() -> None:
    meta = {
        "promptTokenCount": 100,
        "cachedContentTokenCount": 40,
        "toolUsePromptTokenCount": 5,
        "candidatesTokenCount": 20,
        "thoughtsTokenCount": 30,
        "totalTokenCount": 155,
        "promptTokensDetails": [
            {"modality": "TEXT", "tokenCount": 60},
            {"modality": "AUDIO", "tokenCount": 30},
            {"modality": "IMAGE", "tokenCount": 10},
        ],
        "cacheTokensDetails": [{"modality": "AUDIO", "tokenCount": 10}, {"modality": "TEXT", "tokenCount": 30}],
        "candidatesTokensDetails": [{"modality": "IMAGE", "tokenCount": 8}],
    }
    code = {"executableCode": {"language": "PYTHON", "code": "1"}}
    parts = [
        {"text": "Hmm", "thought": True},
        code,
        {"text": "It "},
        {"text": "rains", "thoughtSignature": "aA_-"},
        {"functionCall": {"id": "x1", "name": "weather", "args": {"city": "Ulm"}}, "thoughtSignature": "bB+/="},
        {"inlineData": {"mimeType": "image/png", "data": PNG}},
    ]
    whole = answer(parts, usageMetadata=meta, responseId="r1", modelVersion="gemini-3-flash-001")
    completion = GEMINI.decode(whole, translation())
    assert completion["id"] == "r1"
    assert completion["model"] == "gemini-3-flash-001"
    choice = completion["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == ("It rains", "Hmm")
    assert message["tool_calls"] == [call("x1", "weather", '{"city":"Ulm"}', **signed("bB+/="))]
    assert message["extra_content"] == {"google": {"thought_signature": "aA_-", "parts": [code]}}
    assert message["images"][0]["image_url"]["url"] == f"data:image/png;base64,{PNG}"
    usage = GEMINI.read_usage(whole)
    assert usage is not None
    assert (usage.input_tokens, usage.cached_tokens, usage.cached_audio_tokens) == (35, 30, 10)
    assert (usage.input_audio_tokens, usage.input_image_tokens, usage.prompt_tokens) == (20, 10, 105)
    assert (usage.output_tokens, usage.reasoning_tokens, usage.output_image_tokens) == (42, 30, 8)
    assert completion["usage"]["total_tokens"] == 155
    back = contents_of([{"role": "user", "content": "x"}, message])[1]["parts"]
    assert {"text": "It rains", "thoughtSignature": "aA_-"} in back
    assert parts[4] in back
    assert code in back


def test_spoken_answers_thoughts_and_quoted_pages_are_kept() -> None:
    thought = {"text": "Hmm", "thought": True, "thoughtSignature": "tT"}
    spoken = [{"inlineData": {"mimeType": "audio/wav", "data": data}} for data in ("AAAA", "BBBB")]
    told = answer([thought, *spoken, {"text": "So it is."}])
    told["candidates"][0]["citationMetadata"] = {
        "citations": [{"uri": "https://a.example", "startIndex": 3, "endIndex": 5}, {"title": "a book"}]
    }
    message = GEMINI.decode(told, translation())["choices"][0]["message"]
    assert (message["audio"]["data"], message["content"]) == ("AAAABBBB", "So it is.")
    assert (message["reasoning_content"], message["extra_content"]["google"]["parts"]) == ("Hmm", [thought])
    [cited] = message["annotations"]
    assert cited["url_citation"] | {"title": ""} == {
        "url": "https://a.example", "title": "", "start_index": 3, "end_index": 5,
    }  # fmt: skip


def test_a_foreign_answer_is_written_with_its_pictures_its_voice_and_its_sources() -> None:
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}, **signed("pP")}
    named = {"type": "image_url", "image_url": {"url": "https://a.example/x"}}
    sources = [
        {"type": "url_citation", "url_citation": {"url": "https://b.example", "title": "B", "start_index": 1, "end_index": 4}},
        {"type": "url_citation", "url_citation": {"url": "https://c.example"}},
        {"type": "file_citation"},
    ]  # fmt: skip
    message = {
        "role": "assistant", "content": "text", "images": [picture, named], "annotations": sources,
        "audio": {"id": "a", "data": "AAAA", "format": "mp3"},
    }  # fmt: skip
    completion = {"id": "c", "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    [candidate] = GEMINI.render(completion, {})["candidates"]
    assert candidate["content"]["parts"] == [
        {"inlineData": {"mimeType": "image/png", "data": PNG}, "thoughtSignature": "pP"},
        {"fileData": {"fileUri": "https://a.example/x", "mimeType": "image/png"}},
        {"inlineData": {"mimeType": "audio/mp3", "data": "AAAA"}},
        {"text": "text"},
    ]
    assert candidate["groundingMetadata"] == {
        "groundingChunks": [
            {"web": {"uri": "https://b.example", "title": "B"}},
            {"web": {"uri": "https://c.example", "title": ""}},
        ],
        "groundingSupports": [{"segment": {"startIndex": 1, "endIndex": 4}, "groundingChunkIndices": [0]}],
    }


@pytest.mark.parametrize(
    ("finish", "expected"),
    [
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
        ("CONTINUATION", "length"),
        ("SAFETY", "content_filter"),
        ("IMAGE_SAFETY", "content_filter"),
        ("MODEL_ARMOR", "content_filter"),
        ("SOMETHING_NEW", "stop"),
    ],
)
def test_finish_reasons(finish: str, expected: str) -> None:
    choice = GEMINI.decode(answer([{"text": "a"}], finish), translation())["choices"][0]
    assert choice["finish_reason"] == expected


def test_failed_finishes_raise() -> None:
    with pytest.raises(UpstreamError) as malformed:
        GEMINI.decode(answer([], "MALFORMED_FUNCTION_CALL"), translation())
    assert malformed.value.code == "upstream_malformed_function_call"
    assert malformed.value.retryable
    with pytest.raises(UpstreamRefused, match="thought_signature"):
        GEMINI.decode(answer([], "MISSING_THOUGHT_SIGNATURE"), translation())


def test_a_blocked_prompt_is_an_empty_filtered_answer() -> None:
    completion = GEMINI.decode({"promptFeedback": {"blockReason": "SAFETY"}}, translation())
    (choice,) = completion["choices"]
    assert choice["message"] == {"role": "assistant", "content": ""}
    assert choice["finish_reason"] == "content_filter"
    with pytest.raises(UpstreamError, match="candidates"):
        GEMINI.decode({}, translation())
    with pytest.raises(UpstreamError, match="unknown shape"):
        GEMINI.decode({"candidates": ["x"]}, translation())


def test_an_empty_candidate_at_the_token_limit() -> None:
    choice = GEMINI.decode({"candidates": [{"finishReason": "MAX_TOKENS"}]}, translation())["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": ""}
    assert choice["finish_reason"] == "length"


def test_grounding_becomes_citations_and_searches() -> None:
    grounding = {
        "webSearchQueries": ["a", "b"],
        "groundingChunks": [{"web": {"uri": "https://x.test", "title": "X"}}],
        "groundingSupports": [
            {"segment": {"startIndex": 8, "endIndex": 12, "text": "nass"}, "groundingChunkIndices": [0, 9]}
        ],
    }
    whole = answer([{"text": "Öl ist nass"}], usageMetadata={"promptTokenCount": 1})
    whole["candidates"][0]["groundingMetadata"] = grounding
    completion = GEMINI.decode(whole, translation())
    cited = {"url": "https://x.test", "title": "X", "start_index": 7, "end_index": 11}
    assert completion["choices"][0]["message"]["annotations"] == [{"type": "url_citation", "url_citation": cited}]
    assert read_openai_usage(completion["usage"]).searches == 2
    assert GEMINI.decode(whole, translation("gemini-2.5-flash"))["usage"]["num_search_queries"] == 1
    assert GEMINI.render(completion, {})["candidates"][0]["groundingMetadata"] == grounding


def test_logprobs_both_ways() -> None:
    whole = answer([{"text": "é"}])
    token = {"token": "é", "logProbability": -0.5}
    whole["candidates"][0]["logprobsResult"] = {"chosenCandidates": [token], "topCandidates": [{"candidates": [token]}]}
    completion = GEMINI.decode(whole, translation())
    content = completion["choices"][0]["logprobs"]["content"]
    assert content[0]["bytes"] == [195, 169]
    assert content[0]["top_logprobs"][0]["logprob"] == -0.5
    written = GEMINI.render(completion, {})["candidates"][0]["logprobsResult"]
    assert written == {"chosenCandidates": [token], "topCandidates": [{"candidates": [token]}]}


@pytest.mark.parametrize(
    ("status", "error", "kind", "told", "code"),
    [
        (
            400,
            {"status": "INVALID_ARGUMENT", "message": "API key not valid.", "details": [{"reason": "API_KEY_INVALID"}]},
            UpstreamError,
            502,
            "upstream_authentication",
        ),
        (400, {"status": "INVALID_ARGUMENT", "message": "Bad"}, UpstreamRefused, 400, "INVALID_ARGUMENT"),
        (
            400,
            {"message": "The input token count (9) exceeds the maximum number of tokens allowed (8)."},
            UpstreamRefused,
            400,
            "context_length_exceeded",
        ),
        (403, {"status": "PERMISSION_DENIED", "message": "No"}, UpstreamError, 502, "upstream_authentication"),
        (404, {"status": "NOT_FOUND", "message": "No"}, UpstreamRefused, 404, "NOT_FOUND"),
        (429, {"status": "RESOURCE_EXHAUSTED", "message": "Slow"}, UpstreamError, 429, "RESOURCE_EXHAUSTED"),
        (503, {"status": "UNAVAILABLE", "message": "Busy"}, UpstreamError, 503, "UNAVAILABLE"),
    ],
)
def test_errors_of_google(status: int, error: Json, kind: type, told: int, code: str) -> None:
    for document in ({"error": error}, [{"error": error}]):
        read = GEMINI.read_error(status, json.dumps(document).encode())
        assert type(read) is kind
        assert (read.status, read.code) == (told, code)


def test_retry_delay() -> None:
    details = [{"@type": "x.QuotaFailure"}, {"@type": "x.RetryInfo", "retryDelay": "37.5s"}]
    body = json.dumps({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "m", "details": details}})
    assert GEMINI.read_error(429, body.encode()).retry_after_s == 37.5
    assert GEMINI.read_error(503, b"<html>").retry_after_s is None


# ---- streams from Google


def events(*items: Json, end: str = "\r\n\r\n") -> bytes:
    return "".join(f"data: {json.dumps(item, ensure_ascii=False)}{end}" for item in items).encode()


STREAM = events(
    {
        **answer([{"text": "Größe ", "thought": True}], None),
        "usageMetadata": {"promptTokenCount": 55},
        "responseId": "r",
    },
    answer([{"text": "日本"}], None),
    answer(
        [
            {"functionCall": {"name": "f", "args": {"q": "ü"}}, "thoughtSignature": "s1"},
            {"functionCall": {"name": "g"}},
        ],
        None,
    ),
    {
        **answer([{"text": "", "thoughtSignature": "s2"}]),
        "modelVersion": "m",
        "usageMetadata": {"promptTokenCount": 257, "candidatesTokenCount": 3, "thoughtsTokenCount": 4},
    },
)


def decode_stream(data: bytes, cuts: list[int] | None = None, model: str = "gemini-3-flash") -> tuple[list[Json], bool]:
    decoder = GEMINI.decoder(translation(model))
    chunks = []
    marks = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts or ())})
    for start, end in itertools.pairwise(marks):
        chunks += decoder.feed(data[start:end])
    return chunks + decoder.close(), decoder.complete


def test_a_stream() -> None:
    chunks, complete = decode_stream(STREAM)
    assert complete
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[1:3] == [{"reasoning_content": "Größe "}, {"content": "日本"}]
    calls = deltas[3]["tool_calls"]
    assert [(item["index"], item["function"]["name"]) for item in calls] == [(0, "f"), (1, "g")]
    assert calls[0]["extra_content"] == {"google": {"thought_signature": "s1"}}
    assert deltas[4] == signed("s2")
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]]
    assert reasons == [None] * 5 + ["tool_calls"]
    assert chunks[-1]["choices"] == []
    assert (chunks[-1]["usage"]["prompt_tokens"], chunks[-1]["usage"]["completion_tokens"]) == (257, 7)
    assert {chunk["id"] for chunk in chunks} == {"r"}


@settings(max_examples=60)
@given(st.lists(st.integers(0, 10_000), max_size=30))
def test_any_split_reads_the_same(cuts: list[int]) -> None:
    noisy = b"\xef\xbb\xbf: ping\r\n\r\n" + STREAM.replace(b"\r\n\r\n", b"\r\n: x\r\n\r\n\r\n")
    assert decode_stream(noisy, cuts) == decode_stream(STREAM)


def test_line_ends_and_a_lost_last_one() -> None:
    assert decode_stream(STREAM.replace(b"\r\n", b"\n")) == decode_stream(STREAM)
    assert decode_stream(STREAM.rstrip()) == decode_stream(STREAM)


def test_a_cut_stream_is_not_complete() -> None:
    chunks, complete = decode_stream(events(answer([{"text": "half"}], None)))
    assert not complete
    assert all(choice["finish_reason"] is None for chunk in chunks for choice in chunk["choices"])


def test_a_repeated_finish_is_told_once_and_late_calls_count() -> None:
    chunks, _ = decode_stream(events(answer([{"text": "a"}]), answer([{"functionCall": {"name": "f"}}])))
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert [reason for reason in reasons if reason] == ["tool_calls"]


def test_candidates_keep_their_index() -> None:
    two = {
        "candidates": [
            {"index": at, "content": {"parts": [{"text": str(at)}]}, "finishReason": "STOP"} for at in (0, 1)
        ]
    }
    first, complete = decode_stream(
        events({"candidates": [two["candidates"][0]]}, {"candidates": [{**two["candidates"][1], "finishReason": None}]})
    )
    assert not complete
    chunks, complete = decode_stream(events(two))
    assert complete
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 0, 1, 1, 0, 1]
    assert first


def test_a_blocked_prompt_in_a_stream() -> None:
    chunks, complete = decode_stream(
        events({"promptFeedback": {"blockReason": "OTHER"}, "usageMetadata": {"promptTokenCount": 4}})
    )
    assert complete
    assert chunks[-2]["choices"][0]["finish_reason"] == "content_filter"
    assert chunks[-1]["usage"]["prompt_tokens"] == 4


ERROR = {"error": {"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}}


@pytest.mark.parametrize(
    "tail",
    [
        events(ERROR),
        json.dumps(ERROR, indent=1).encode(),
        json.dumps([ERROR], indent=1).encode() + b"\r\n\r\n",
        b'[{"error":{"code":503,"message":"overloaded"}}]',
    ],
)
@pytest.mark.parametrize("head", [b"", events(answer([{"text": "a"}], None))])
def test_errors_inside_a_stream(head: bytes, tail: bytes) -> None:
    with pytest.raises(UpstreamError, match="overloaded") as raised:
        decode_stream(head + tail, [len(head) + 3])
    assert raised.value.status == 503


@pytest.mark.parametrize(
    "data", [b"data: {broken\n\n", b"data: 7\n\n", b'data: {"candidates": [7]}\n\n', b"data: [[]]\n\n"]
)
def test_a_broken_event_is_an_error(data: bytes) -> None:
    with pytest.raises(UpstreamError) as raised:
        decode_stream(data)
    assert raised.value.code == "upstream_malformed"


def test_a_plain_array_instead_of_events() -> None:
    whole = json.dumps([answer([{"text": "a"}], None), answer([{"text": "b"}])], indent=2)
    chunks, complete = decode_stream(whole.encode(), [5, 50])
    assert complete
    assert "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]) == "ab"


# ---- requests of Gemini clients


def test_parse_a_request_with_everything() -> None:
    body = {
        "$alt": "sse",
        "systemInstruction": {"parts": {"text": "Be brief"}},
        "labels": {"a": "b"},
        "service_tier": "flex",
        "contents": [
            {"parts": [{"text": "Look"}, {"inline_data": {"mime_type": "image/png", "data": "-_8"}}]},
            {
                "role": "model",
                "parts": [
                    {"text": "thinking", "thought": True},
                    {"text": "On it"},
                    {"functionCall": {"name": "f", "args": {"a": 1}}, "thoughtSignature": "s+/="},
                    {"functionCall": {"name": "f", "id": "mine"}},
                ],
            },
            {
                "role": "user",
                "parts": [
                    {"functionResponse": {"name": "f", "response": {"output": "one"}}},
                    {"functionResponse": {"name": "f", "id": "mine", "response": {"error": "bad"}}},
                    {"text": "Well?"},
                ],
            },
        ],
        "tools": [
            {
                "function_declarations": [
                    {"name": "f", "behavior": "BLOCKING", "parameters": {"type": "OBJECT"}},
                    {"name": "g", "parameters_json_schema": {"type": "object"}},
                ]
            },
            {"googleSearch": {}},
        ],
        "toolConfig": {"function_calling_config": {"mode": "any", "allowed_function_names": ["f"]}},
        "generationConfig": {
            "max_output_tokens": 9,
            "temperature": 1,
            "topK": 40.0,
            "stopSequences": ["x"],
            "candidateCount": 2,
            "seed": None,
            "responseMimeType": "application/json",
            "responseSchema": {"type": "STRING"},
            "mediaResolution": "LOW",
            "thinkingConfig": {"thinkingLevel": "LOW", "includeThoughts": True},
        },
    }
    request = parse(body, "streamGenerateContent")
    schema = {"name": "response", "schema": {"type": "string"}}
    assert request == {
        "model": "gpt-5",
        "stream": True,
        "service_tier": "flex",
        "max_completion_tokens": 9,
        "temperature": 1,
        "top_k": 40,
        "stop": ["x"],
        "n": 2,
        "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": schema},
        "messages": [
            {"role": "system", "content": "Be brief"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Look"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,+/8="}},
                ],
            },
            {
                "role": "assistant",
                "content": "On it",
                "reasoning_content": "thinking",
                "tool_calls": [
                    call("call_1_0", "f", '{"a":1}', **signed("s+/=")),
                    call("mine", "f"),
                ],
            },
            {"role": "tool", "tool_call_id": "call_1_0", "content": "one"},
            {"role": "tool", "tool_call_id": "mine", "content": "bad", "is_error": True},
            {"role": "user", "content": "Well?"},
        ],
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
            {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}},
            {"type": "native", "dialect": "gemini", "tool": {"googleSearch": {}}},
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "extra_body": {
            "gemini": {
                "labels": {"a": "b"},
                "functionDeclarations": {"f": {"behavior": "BLOCKING"}},
                "generationConfig.mediaResolution": "LOW",
                "generationConfig.thinkingConfig.includeThoughts": True,
            }
        },
    }
    back, dropped = encode(request)
    assert dropped == ["labels"]
    assert back["generationConfig"] == {
        "maxOutputTokens": 9,
        "temperature": 1,
        "topK": 40,
        "stopSequences": ["x"],
        "candidateCount": 2,
        "responseMimeType": "application/json",
        "responseJsonSchema": {"type": "string"},
        "mediaResolution": "LOW",
        "thinkingConfig": {"thinkingLevel": "LOW", "includeThoughts": True},
    }
    assert back["tools"][0]["functionDeclarations"][0] == {"name": "f", "behavior": "BLOCKING"}
    assert back["contents"][1]["parts"][2]["thoughtSignature"] == "s+/="


@pytest.mark.parametrize(
    ("thinking", "effort"),
    [
        ({"thinkingBudget": 0}, "none"),
        ({"thinkingBudget": -1}, None),
        ({"thinking_budget": 1000}, "low"),
        ({"thinkingBudget": 8000}, "medium"),
        ({"thinkingBudget": 99999}, "high"),
        ({"thinkingLevel": "MINIMAL"}, "minimal"),
    ],
)
def test_parse_thinking(thinking: Json, effort: str | None) -> None:
    request = parse({"contents": [{"parts": [{"text": "x"}]}], "generationConfig": {"thinkingConfig": thinking}})
    assert request.get("reasoning_effort") == effort
    back = config_of(request, "gemini-2.5-flash")["thinkingConfig"]
    if "thinkingBudget" in thinking:
        assert back["thinkingBudget"] == thinking["thinkingBudget"]
        assert "thinkingLevel" not in back


@pytest.mark.parametrize(
    ("config", "choice"),
    [
        ({"mode": "AUTO"}, "auto"),
        ({"mode": "NONE"}, "none"),
        ({"mode": "ANY"}, "required"),
        ({}, "auto"),
        ({"mode": "VALIDATED"}, "auto"),
    ],
)
def test_parse_tool_choice(config: Json, choice: str) -> None:
    tools = [{"functionDeclarations": [{"name": "f"}]}]
    body = {"contents": [{"parts": [{"text": "x"}]}], "tools": tools, "toolConfig": {"functionCallingConfig": config}}
    assert parse(body)["tool_choice"] == choice
    back = encode(parse(body))[0]["toolConfig"]["functionCallingConfig"]["mode"]
    assert back == config.get("mode", "AUTO")


@pytest.mark.parametrize(
    ("part", "read"),
    [
        (
            {"inlineData": {"mimeType": "audio/mpeg", "data": "AAAA"}},
            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}},
        ),
        (
            {"inlineData": {"mimeType": "application/pdf", "data": "AAAA", "displayName": "a.pdf"}},
            {"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA", "filename": "a.pdf"}},
        ),
        (
            {"fileData": {"fileUri": "https://x.test/a.png", "mimeType": "image/png"}},
            {"type": "image_url", "image_url": {"url": "https://x.test/a.png"}},
        ),
        (
            {"fileData": {"fileUri": "gs://b/v.mp4", "mimeType": "video/mp4"}, "videoMetadata": {"fps": 1}},
            {
                "type": "media",
                "media": {"file_url": "gs://b/v.mp4", "mime_type": "video/mp4"},
                "extra_content": {"google": {"videoMetadata": {"fps": 1}}},
            },
        ),
    ],
)
def test_parse_parts(part: Json, read: Json) -> None:
    request = parse({"contents": [{"parts": [part]}]})
    assert request["messages"][0]["content"] == [read]
    expected = {name: value for name, value in part.get("inlineData", {}).items() if name != "displayName"}
    back = encode(request, dialect=VERTEX)[0]["contents"][0]["parts"][0]
    if expected:
        assert back["inlineData"]["data"] == expected["data"]
    else:
        assert back == part


def test_what_a_model_said_comes_back_with_its_signatures() -> None:
    thought = {"text": "Hmm", "thought": True, "thoughtSignature": "tT"}
    said = [thought, {"text": "See", "thoughtSignature": "sS"}, {"inlineData": {"mimeType": "image/png", "data": PNG}}]
    request = parse({"contents": [{"role": "user", "parts": [{"text": "x"}]}, {"role": "model", "parts": said}]})
    message = request["messages"][1]
    assert (message["content"], message["reasoning_content"]) == ("See", "Hmm")
    assert message["extra_content"]["google"] == {"parts": [thought], "thought_signature": "sS"}
    assert message["images"][0]["image_url"]["url"] == f"data:image/png;base64,{PNG}"


@pytest.mark.parametrize(
    ("config", "read", "kept"),
    [
        ({"responseMimeType": "application/json"}, {"type": "json_object"}, {}),
        ({"responseMimeType": "text/x.enum", "responseSchema": {"type": "STRING", "enum": ["a"]}}, None,
         {"responseMimeType": "text/x.enum", "responseSchema": {"type": "STRING", "enum": ["a"]}}),
    ],
)  # fmt: skip
def test_parse_formats(config: Json, read: Json | None, kept: Json) -> None:
    request = parse({"contents": [{"parts": [{"text": "x"}]}], "generationConfig": config})
    assert request.get("response_format") == read
    written = encode(request)[0]["generationConfig"]
    assert {name: written.get(name) for name in kept} == kept


def test_server_side_parts_survive_untouched() -> None:
    parts = [
        {"toolCall": {"id": "1", "toolType": "FILE_SEARCH"}, "thoughtSignature": "x_-"},
        {"toolResponse": {"id": "1"}},
    ]
    body = {"contents": [{"parts": [{"text": "q"}]}, {"role": "model", "parts": [*parts, {"text": "a"}]}]}
    assert encode(parse(body))[0]["contents"][1]["parts"] == [*parts, {"text": "a"}]


def test_foreign_blocks_travel_in_a_signature() -> None:
    blocks = [{"type": "thinking", "thinking": "hm", "signature": "ÿ+/"}, {"type": "redacted_thinking", "data": "=="}]
    for message in ({"content": "hi"}, {"content": None, "tool_calls": [call("a", "f"), call("b", "g")]}):
        completion = {
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "thinking_blocks": blocks, **message},
                    "finish_reason": "stop",
                }
            ]
        }
        content = GEMINI.render(copy.deepcopy(completion), {})["candidates"][0]["content"]
        assert content["parts"][0]["thoughtSignature"].startswith(PACKED_PREFIX)
        through_sdk = types.Content.model_validate(content).model_dump(mode="json", by_alias=True, exclude_none=True)
        read = parse({"contents": [{"parts": [{"text": "q"}]}, through_sdk]})["messages"][1]
        assert read["thinking_blocks"] == blocks
        assert "extra_content" not in read
    with pytest.raises(InvalidRequest, match="damaged"):
        parse({"contents": [{"role": "model", "parts": [{"text": "", "thoughtSignature": PACKED_PREFIX + "x"}]}]})


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "contents"),
        ({"contents": []}, "contents"),
        ({"contents": 7}, "contents"),
        ({"contents": [{"role": "system", "parts": [{"text": "x"}]}]}, r"contents\[0\].role"),
        ({"contents": [{"parts": [{"text": 7}]}]}, r"contents\[0\].parts\[0\].text"),
        ({"contents": [{"parts": [{}]}]}, r"contents\[0\].parts\[0\]"),
        ({"contents": [{"parts": [{"functionResponse": {"name": "f"}}]}]}, "answers no functionCall"),
        ({"contents": ["x"], "generationConfig": {"temperature": "hot"}}, "generationConfig.temperature"),
        ({"contents": ["x"], "generationConfig": {"topK": 1.5}}, "generationConfig.topK"),
        ({"contents": ["x"], "tools": [{"functionDeclarations": [{}]}]}, r"tools\[0\].functionDeclarations\[0\].name"),
        ({"contents": ["x"], "generationConfig": {"thinkingConfig": {"thinkingLevel": "HUGE"}}}, "thinkingLevel"),
    ],
)
def test_parse_names_what_is_wrong(body: Json, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        parse(body)


ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["type", "text", "name", "parts"]), inner, max_size=2)
    ),
    max_leaves=4,
)
FULL_NATIVE: Json = {
    "contents": [
        {
            "role": "user",
            "parts": [
                {"text": "a"},
                {"inlineData": {"mimeType": "image/png", "data": "AA"}},
                {"fileData": {"fileUri": "https://a", "mimeType": "x"}},
            ],
        },
        {
            "role": "model",
            "parts": [
                {"functionCall": {"name": "f", "args": {}, "id": "1"}, "thoughtSignature": "s"},
                {"text": "t", "thought": True},
            ],
        },
        {
            "role": "user",
            "parts": [
                {
                    "functionResponse": {
                        "id": "1",
                        "name": "f",
                        "response": {"output": "x"},
                        "parts": [{"inlineData": {"mimeType": "image/png", "data": "A"}}],
                    }
                }
            ],
        },
    ],
    "systemInstruction": {"parts": [{"text": "s"}]},
    "tools": [
        {
            "functionDeclarations": [
                {
                    "name": "f",
                    "description": "d",
                    "parameters": {"type": "OBJECT", "properties": {"a": {"type": "STRING"}}},
                }
            ]
        }
    ],
    "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["f"]}},
    "generationConfig": {
        "temperature": 1,
        "topK": 2,
        "stopSequences": ["x"],
        "responseMimeType": "application/json",
        "responseSchema": {"type": "STRING"},
        "thinkingConfig": {"thinkingBudget": 3},
        "responseModalities": ["TEXT"],
    },
    "serviceTier": "flex",
}
FULL_CANONICAL: Json = {
    "messages": [
        {"role": "system", "content": "s"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}},
                {"type": "input_audio", "input_audio": {"data": "A", "format": "wav"}},
                {"type": "file", "file": {"file_data": "data:a/b,c", "filename": "f"}},
            ],
        },
        {
            "role": "assistant",
            "content": "x",
            "reasoning_content": "r",
            "tool_calls": [call("1", "f", "{}", **signed("s"))],
            "extra_content": {"google": {"thought_signature": "s", "parts": [{"text": "x"}]}},
            "images": [{"image_url": {"url": "data:image/png;base64,AA"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "x"}], "is_error": True},
    ],
    "tools": [
        TOOL,
        {"type": "custom", "custom": {"name": "c", "format": {"type": "text"}}},
        {"type": "native", "dialect": "gemini", "tool": {"googleSearch": {}}},
    ],
    "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TOOL]}},
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {"type": "object", "allOf": [{"required": ["a"]}]}},
    },
    "stop": ["x"],
    "reasoning_effort": "low",
    "reasoning": {"effort": "low", "max_tokens": 3},
    "modalities": ["text"],
    "audio": {"voice": "v"},
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "extra_body": {"gemini": {"generationConfig": {"x": 1}, "functionDeclarations": {"weather": {"a": 1}}}},
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))][0 if path else 1 :]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    value = copy.deepcopy(value)
    holder = value
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = new
    return value


@settings(max_examples=400)
@given(st.sampled_from(places(FULL_NATIVE)), ANY_JSON)
def test_wrong_json_from_a_client_is_only_an_invalid_request(path: tuple[Any, ...], new: Any) -> None:
    try:
        encode(parse(replaced(FULL_NATIVE, path, new)))
    except InvalidRequest as error:
        assert error.message


@settings(max_examples=400)
@given(st.sampled_from(places(FULL_CANONICAL)), ANY_JSON, st.sampled_from(["gemini-3-flash", "gemini-2.0-flash"]))
def test_wrong_canonical_json_is_only_an_invalid_request(path: tuple[Any, ...], new: Any, model: str) -> None:
    try:
        encode(replaced(FULL_CANONICAL, path, new), model)
    except InvalidRequest as error:
        assert error.message


# ---- answers and streams to Gemini clients

CHUNK = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-5"}


def chunk(delta: Json | None = None, finish: str | None = None, **more: Any) -> Json:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {**CHUNK, "choices": choices, **more}


def piece(index: int, **function: Any) -> Json:
    key = {"id": f"call_{index}", "type": "function"} if "name" in function else {}
    return chunk({"tool_calls": [{"index": index, **key, "function": function}]})


OPENAI_STREAM = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"reasoning_content": "Let me see"}),
    chunk({"content": "Sun"}),
    chunk({"content": "ny"}),
    piece(0, name="weather", arguments=""),
    piece(1, name="time", arguments=""),
    piece(1, arguments='{"zone"'),
    piece(0, arguments='{"city":'),
    piece(1, arguments=':"CET"}'),
    piece(0, arguments='"Ulm"}'),
    chunk({}, "tool_calls"),
    chunk(
        usage={
            "prompt_tokens": 11,
            "completion_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 5},
        }
    ),
]


def render_stream(chunks: list[Json], request: Json) -> bytes:
    renderer = GEMINI.renderer(request, lambda prefix: prefix, 1)
    return b"".join([*(renderer.feed(copy.deepcopy(item)) for item in chunks), renderer.close()])


def test_renderer_writes_whole_calls_and_usage_last() -> None:
    written = render_stream(OPENAI_STREAM, {"$alt": "sse"})
    assert written.count(b"\r\n\r\n") == 3
    read = [json.loads(line.removeprefix(b"data: ")) for line in written.split(b"\r\n\r\n") if line]
    assert [item["candidates"][0]["content"]["parts"] for item in read[:2]] == [[{"text": "Sun"}], [{"text": "ny"}]]
    last = read[2]["candidates"][0]
    assert last["finishReason"] == "STOP"
    assert last["content"]["parts"] == [
        {"functionCall": {"name": "weather", "args": {"city": "Ulm"}, "id": "call_0"}},
        {"functionCall": {"name": "time", "args": {"zone": "CET"}, "id": "call_1"}},
    ]
    assert read[2]["usageMetadata"] == {
        "promptTokenCount": 11,
        "candidatesTokenCount": 4,
        "totalTokenCount": 20,
        "thoughtsTokenCount": 5,
        "cachedContentTokenCount": 4,
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 11}],
    }
    assert decode_stream(written)[1]


def test_renderer_shows_thoughts_only_where_asked() -> None:
    asked = {"$alt": "sse", "generationConfig": {"thinking_config": {"include_thoughts": True}}}
    assert b'"text":"Let me see","thought":true' in render_stream(OPENAI_STREAM, asked)
    assert b"Let me see" not in render_stream(OPENAI_STREAM, {"$alt": "sse"})


def test_renderer_without_sse_is_one_array() -> None:
    read = json.loads(render_stream(OPENAI_STREAM, {}))
    assert len(read) == 3
    assert GEMINI.stream_type_of({}).startswith("application/json")
    assert GEMINI.stream_type_of({"$alt": "sse"}).startswith("text/event-stream")
    renderer = GEMINI.renderer({}, lambda prefix: prefix, 1)
    broken = renderer.feed(OPENAI_STREAM[2]) + renderer.fail(UpstreamTimeout("late"), "req_1")
    assert json.loads(broken)[1]["error"]["status"] == "DEADLINE_EXCEEDED"
    assert json.loads(GEMINI.renderer({}, lambda prefix: prefix, 1).fail(UpstreamTimeout("late"), "req_1"))


def test_calls_without_an_index_begin_at_their_id() -> None:
    pieces: list[Json] = [
        {"id": "a", "function": {"name": "f"}},
        {"function": {"arguments": '{"x":1}'}},
        {"id": "b", "function": {"name": "g"}},
    ]
    written = json.loads(render_stream([chunk({"tool_calls": [item]}) for item in pieces], {}))
    calls = [part["functionCall"] for part in written[0]["candidates"][0]["content"]["parts"]]
    assert calls == [{"name": "f", "args": {"x": 1}, "id": "a"}, {"name": "g", "args": {}, "id": "b"}]


def test_a_google_stream_survives_the_way_through() -> None:
    whole = render_stream(decode_stream(STREAM)[0], {"$alt": "sse"})
    last = json.loads(whole.split(b"\r\n\r\n")[-2].removeprefix(b"data: "))["candidates"][0]["content"]["parts"]
    assert last == [
        {"text": "", "thoughtSignature": "s2"},
        {"functionCall": {"name": "f", "args": {"q": "ü"}, "id": "call_1"}, "thoughtSignature": "s1"},
        {"functionCall": {"name": "g", "args": {}, "id": "call_2"}},
    ]


@pytest.mark.parametrize(
    ("finish", "written"),
    [("stop", "STOP"), ("tool_calls", "STOP"), ("length", "MAX_TOKENS"), ("content_filter", "SAFETY")],
)
def test_render_finish(finish: str, written: str) -> None:
    completion = {
        "id": "i",
        "model": "m",
        "choices": [{"index": 0, "message": {"content": "a"}, "finish_reason": finish}],
    }
    assert GEMINI.render(completion, {})["candidates"][0]["finishReason"] == written


@pytest.mark.parametrize(
    ("error", "status", "name"),
    [
        (InvalidRequest("m", param="contents"), 400, "INVALID_ARGUMENT"),
        (Unauthenticated("m"), 401, "UNAUTHENTICATED"),
        (UnknownModel("m"), 404, "NOT_FOUND"),
        (BudgetExceeded("m", fields={"spent_usd": "1"}, retry_after_s=30), 429, "RESOURCE_EXHAUSTED"),
        (GuardrailBlocked("m"), 400, "INVALID_ARGUMENT"),
        (UpstreamError("m"), 502, "UNAVAILABLE"),
        (UpstreamTimeout("m"), 504, "DEADLINE_EXCEEDED"),
    ],
)
def test_render_error(error: Any, status: int, name: str) -> None:
    told, body = GEMINI.render_error(error, "req_9")
    assert told == status
    assert (body["error"]["code"], body["error"]["status"], body["error"]["message"]) == (status, name, "m")
    assert body["error"]["details"][0]["metadata"]["request_id"] == "req_9"


def test_render_error_keeps_delay_and_fields() -> None:
    details = GEMINI.render_error(BudgetExceeded("m", fields={"spent_usd": "1"}, retry_after_s=30), "r")[1]["error"][
        "details"
    ]
    assert details[0]["metadata"] == {"spent_usd": "1", "request_id": "r"}
    assert details[1]["retryDelay"] == "30s"


def test_models_and_counting() -> None:
    rows: list[Json] = [{"id": "gpt-5", "max_output_tokens": 8, "context_window": 99}, {"id": "text-embedding-3-small"}]
    models = GEMINI.render_models(rows)["models"]
    assert models[0]["name"] == "models/gpt-5"
    assert (models[0]["inputTokenLimit"], models[0]["outputTokenLimit"]) == (99, 8)
    assert "embedContent" in models[1]["supportedGenerationMethods"]


def test_counting_takes_a_request_in_either_form_and_a_picture_for_one_picture() -> None:
    def count(body: Json) -> int:
        total: int = GEMINI.count_tokens(GEMINI.parse(body, {"model": "m", "method": "countTokens"}), body)[
            "totalTokens"
        ]
        return total

    picture = {"inlineData": {"mimeType": "image/png", "data": "A" * 99_999}}
    asked = {"contents": [{"role": "user", "parts": [{"text": "word " * 400}]}]}
    seen = {"contents": [{"role": "user", "parts": [{"text": "word " * 400}, picture]}]}
    assert count(asked) == count({"generateContentRequest": {**asked, "model": "models/m"}})
    assert 500 < count(asked) < 530
    assert 258 < count(seen) - count(asked) < 300
    with pytest.raises(InvalidRequest, match="contents"):
        count({"generateContentRequest": {}})


def test_families() -> None:
    assert gemini_family("gemini-2.5-pro-preview-05-06").budget_tokens == (128, 32768)
    assert gemini_family("publishers/google/models/gemini-2.5-flash-lite").budget_tokens == (512, 24576)
    assert gemini_family("gemini-3-flash-preview").levels[0] == "MINIMAL"
    assert gemini_family("gemini-3.1-pro").levels[0] == "LOW"
    assert not gemini_family("gemini-1.5-pro").thinks


# ---- embeddings


def test_embeddings_to_google() -> None:
    target = translation("models/gemini-embedding-001")
    request = {"model": "e", "input": ["abcd", "äöü"], "dimensions": 2, "user": "u", "encoding_format": "base64"}
    body = GEMINI.encode_embeddings({**request, "extra_body": {"gemini": {"task_type": "CLUSTERING"}}}, target)
    options = {"outputDimensionality": 2, "taskType": "CLUSTERING"}
    assert body["requests"][1] == {
        "model": "models/gemini-embedding-001",
        "content": {"parts": [{"text": "äöü"}]},
        **options,
    }
    assert target.dropped == ["user"]
    read = GEMINI.decode_embeddings({"embeddings": [{"values": [1.0, 2.0]}, {"values": [3.0]}]}, target)
    assert read["data"][1] == {"object": "embedding", "index": 1, "embedding": [3.0]}
    assert read["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    with pytest.raises(InvalidRequest, match="token ids"):
        GEMINI.encode_embeddings({"input": [1, 2]}, target)
    with pytest.raises(UpstreamError, match="unknown shape"):
        GEMINI.decode_embeddings({}, target)


def test_embeddings_to_vertex() -> None:
    target = translation("text-embedding-005")
    request = {
        "input": "a",
        "dimensions": 2,
        "extra_body": {"gemini": {"taskType": "CLUSTERING", "autoTruncate": False}},
    }
    assert VERTEX.encode_embeddings(request, target) == {
        "instances": [{"content": "a", "task_type": "CLUSTERING"}],
        "parameters": {"outputDimensionality": 2, "autoTruncate": False},
    }
    answer_ = {"predictions": [{"embeddings": {"values": [1.0], "statistics": {"token_count": 4}}}]}
    read = VERTEX.decode_embeddings(answer_, target)
    assert (read["data"][0]["embedding"], read["usage"]["prompt_tokens"]) == ([1.0], 4)


@pytest.mark.parametrize(
    "items",
    [[{"content": {"parts": [{"text": "a"}]}}, {"content": {"parts": [{"text": "b"}]}, "title": "t"}], [], ["x"], [{}]],
)
def test_bad_embeddings_of_a_client(items: list[Any]) -> None:
    with pytest.raises(InvalidRequest):
        GEMINI.parse_embeddings({"requests": items}, {"model": "m", "method": "batchEmbedContents"})


def test_media_embeddings_keep_their_content() -> None:
    content = {"parts": [{"text": "a"}, {"inlineData": {"mimeType": "image/png", "data": PNG}}]}
    request = GEMINI.parse_embeddings({"content": content, "taskType": "X"}, {"model": "m", "method": "embedContent"})
    assert request["input"] == ["a"]
    assert GEMINI.encode_embeddings(request, translation("m"))["requests"][0]["content"] == content


# ---- Google's SDK against our rendering

COMPLETION = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-5",
    "choices": [
        {
            "index": 0,
            "finish_reason": "tool_calls",
            "message": {
                "role": "assistant",
                "content": "Sunny",
                "reasoning_content": "hm",
                "tool_calls": [call("call_0", "weather", '{"city":"Ulm"}', **signed("c2ln"))],
            },
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
}


class Proxy:
    """A stand-in for the gateway: parses as a client's door would, answers from canonical values."""

    def __init__(self) -> None:
        self.requests: list[Json] = []
        self.fails: Exception | None = None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        model, _, method = request.match_info["target"].rpartition(":")
        path = {"model": model, "method": method}
        body = await request.json()
        if method.endswith("EmbedContents") or method == "embedContent":
            self.requests.append(GEMINI.parse_embeddings(body, path))
            rows = [{"index": at, "embedding": [float(at), 1.0]} for at in range(len(self.requests[-1]["input"]))]
            return web.json_response(GEMINI.render_embeddings({"data": rows, "usage": {"prompt_tokens": 2}}, {}, path))
        if method == "countTokens":
            return web.json_response(GEMINI.count_tokens(GEMINI.parse(body, {"model": "m", "method": method}), body))
        self.requests.append(GEMINI.parse(body, path))
        if isinstance(self.fails, LimitExceeded):
            status, document = GEMINI.render_error(self.fails, "req_1")
            return web.json_response(document, status=status)
        if method == "generateContent":
            return web.json_response(GEMINI.render(copy.deepcopy(COMPLETION), body))
        return await self.stream(request, {**body, "$alt": request.query.get("alt", "json")})

    async def stream(self, request: web.Request, body: Json) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": GEMINI.stream_type_of(body)})
        await response.prepare(request)
        renderer = GEMINI.renderer(body, lambda prefix: prefix, 1)
        for item in OPENAI_STREAM:
            await response.write(GEMINI.heartbeat)
            if written := renderer.feed(copy.deepcopy(item)):
                await response.write(written)
            if isinstance(self.fails, UpstreamError) and item["choices"] and item["choices"][0]["delta"].get("content"):
                await response.write(renderer.fail(self.fails, "req_1"))
                return response
        await response.write(renderer.close())
        return response

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response(GEMINI.render_models([{"id": "gpt-5", "context_window": 7}]))


def with_sdk(act: Callable[[genai.Client, Proxy], Any], asynchronous: bool = False) -> Any:
    async def run() -> Any:
        proxy, app = Proxy(), web.Application()
        for version in ("v1", "v1beta"):
            app.router.add_post(f"/{version}/models/{{target:.+}}", proxy.answer)
            app.router.add_get(f"/{version}/models", proxy.models)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        client = genai.Client(
            api_key="sk-test", vertexai=False, http_options=types.HttpOptions(base_url=f"http://127.0.0.1:{port}")
        )
        try:
            return await act(client, proxy) if asynchronous else await asyncio.to_thread(act, client, proxy)
        finally:
            await client.aio.aclose()
            await asyncio.to_thread(client.close)
            await runner.cleanup()

    return asyncio.run(run())


SDK_CONFIG = types.GenerateContentConfig(
    system_instruction="Be brief",
    max_output_tokens=9,
    temperature=0.5,
    tools=[
        types.Tool(function_declarations=[types.FunctionDeclaration(name="weather", parameters_json_schema=WEATHER)])
    ],
    thinking_config=types.ThinkingConfig(include_thoughts=True),
)


def test_sdk_reads_answers_and_sends_them_back() -> None:
    def act(client: genai.Client, proxy: Proxy) -> None:
        first = client.models.generate_content(model="gpt-5", contents="How is Ulm?", config=SDK_CONFIG)
        assert first.candidates is not None and first.candidates[0].content is not None
        assert first.function_calls is not None
        assert first.function_calls[0].args == {"city": "Ulm"}
        assert [part.thought for part in first.candidates[0].content.parts or ()] == [True, None, None]
        assert first.usage_metadata is not None and first.usage_metadata.total_token_count == 5
        reply = types.Part(function_response=types.FunctionResponse(id="call_0", name="weather", response={"deg": 20}))
        picture = types.Part.from_bytes(data=b"\xfb\xff", mime_type="image/png")
        history: Any = [
            types.UserContent("How is Ulm?"),
            first.candidates[0].content,
            types.UserContent([reply, picture]),
        ]
        client.models.generate_content(model="gpt-5", contents=history, config=SDK_CONFIG)
        request = proxy.requests[1]
        assert request["tools"][0]["function"]["parameters"] == WEATHER
        _, _, model_turn, result, user = request["messages"]
        assert model_turn["tool_calls"] == [call("call_0", "weather", '{"city":"Ulm"}', **signed("c2ln"))]
        assert model_turn["reasoning_content"] == "hm"
        assert result == {"role": "tool", "tool_call_id": "call_0", "content": '{"deg":20}'}
        assert user["content"][0]["image_url"]["url"] == "data:image/png;base64,+/8="

    with_sdk(act)


@pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning")  # the SDK's own
def test_sdk_streams() -> None:
    def check(parts: list[types.GenerateContentResponse]) -> None:
        assert "".join(part.text or "" for part in parts if not part.function_calls) == "Sunny"
        calls = parts[-1].function_calls or []
        assert [(item.name, item.args) for item in calls] == [("weather", {"city": "Ulm"}), ("time", {"zone": "CET"})]
        assert parts[-1].usage_metadata is not None and parts[-1].usage_metadata.prompt_token_count == 11
        assert parts[-1].candidates is not None and parts[-1].candidates[0].finish_reason == types.FinishReason.STOP

    def act(client: genai.Client, proxy: Proxy) -> None:
        check(list(client.models.generate_content_stream(model="gpt-5", contents="Hi")))
        assert proxy.requests[0]["stream"] is True

    async def act_async(client: genai.Client, proxy: Proxy) -> None:
        stream = await client.aio.models.generate_content_stream(model="openai/gpt-5", contents="Hi")
        check([part async for part in stream])
        assert proxy.requests[0]["model"] == "openai/gpt-5"

    with_sdk(act)
    with_sdk(act_async, asynchronous=True)


def test_sdk_raises_our_errors() -> None:
    def act(client: genai.Client, proxy: Proxy) -> None:
        proxy.fails = BudgetExceeded("The budget is spent")
        with pytest.raises(errors.ClientError) as refused:
            client.models.generate_content(model="gpt-5", contents="Hi")
        assert (refused.value.code, refused.value.status) == (429, "RESOURCE_EXHAUSTED")
        assert refused.value.message == "The budget is spent"
        proxy.fails = UpstreamError("The provider went away", status=503)
        seen = []
        with pytest.raises(errors.ServerError, match="went away"):
            for part in client.models.generate_content_stream(model="gpt-5", contents="Hi"):
                seen.append(part.text)
        assert seen == ["Sun"]

    with_sdk(act)


def test_sdk_embeds_counts_and_lists() -> None:
    def act(client: genai.Client, proxy: Proxy) -> None:
        config = types.EmbedContentConfig(output_dimensionality=2, task_type="CLUSTERING")
        embedded = client.models.embed_content(model="text-embedding-3-small", contents=["a", "b"], config=config)
        assert [item.values for item in embedded.embeddings or ()] == [[0.0, 1.0], [1.0, 1.0]]
        assert proxy.requests[0] == {
            "model": "text-embedding-3-small",
            "input": ["a", "b"],
            "dimensions": 2,
            "extra_body": {"gemini": {"taskType": "CLUSTERING"}},
        }
        assert client.models.count_tokens(model="gpt-5", contents="12345678").total_tokens < 20
        assert [model.name for model in client.models.list()] == ["models/gpt-5"]

    with_sdk(act)


def test_openai_streams_reach_a_gemini_client() -> None:
    wire = b"".join(b"data: " + json.dumps(item).encode() + b"\n\n" for item in OPENAI_STREAM) + b"data: [DONE]\n\n"
    decoder = OpenAiChat().decoder(translation("gpt-5"))
    chunks = decoder.feed(wire) + decoder.close()
    assert decoder.complete
    written = render_stream(chunks, {"$alt": "sse"})
    for line in written.split(b"\r\n\r\n")[:-1]:
        types.GenerateContentResponse.model_validate_json(line.removeprefix(b"data: "))


def test_signature_dummy_is_what_the_sdk_can_send() -> None:
    part = types.Part.model_validate({"functionCall": {"name": "f"}, "thoughtSignature": SIGNATURE_DUMMY})
    assert part.thought_signature == base64.urlsafe_b64decode(SIGNATURE_DUMMY)
