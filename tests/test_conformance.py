"""What each provider dialect carries of what clients can say. `./build.sh docs` writes the table into README from here."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

import stockyard

README = Path(stockyard.__file__).parent / "README.md"
IMAGE = "data:image/png;base64,iVBORw0KGgo="
PDF = "data:application/pdf;base64,JVBERi0xLjQK"
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "d",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
USER = {"role": "user", "content": "Hi"}
CALLS = [
    {"id": f"call_{n}", "type": "function", "function": {"name": "look", "arguments": '{"at":"sky"}'}} for n in (1, 2)
]
RESULTS = [{"role": "tool", "tool_call_id": f"call_{n}", "content": "blue"} for n in (1, 2)]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
SIGNED = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}

# Each feature: what a canonical request says, and a piece of text that must be in the provider's body to count as carried.
FEATURES: dict[str, tuple[dict[str, Any], str]] = {
    "system text": ({"messages": [{"role": "system", "content": "be brief"}, USER]}, "be brief"),
    "several turns": ({"messages": [USER, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "why"}]}, "Yes?"),
    "image, inline": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": IMAGE}}]}]}, "iVBORw0KGgo="),
    "image by URL": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "https://x.example/a.png"}}]}]}, "x.example/a.png"),
    "PDF, inline": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}}]}]}, "JVBERi0xLjQK"),
    "audio": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}]}]}, "UklGRg=="),
    "tools": ({"tools": [TOOL]}, "look"),
    "tool choice: required": ({"tools": [TOOL], "tool_choice": "required"}, ""),
    "tool choice: by name": ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}}, ""),
    "tool choice: none": ({"tools": [TOOL], "tool_choice": "none"}, ""),
    "one call at a time": ({"tools": [TOOL], "parallel_tool_calls": False}, ""),
    "parallel calls and results": ({"tools": [TOOL], "messages": [USER, {"role": "assistant", "content": None, "tool_calls": CALLS}, *RESULTS]}, "blue"),
    "custom tools": ({"tools": [{"type": "custom", "custom": {"name": "patch", "description": "d"}}]}, "patch"),
    "JSON by schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}, "properties"),
    "JSON, any": ({"response_format": {"type": "json_object"}}, ""),
    "reasoning effort": ({"reasoning_effort": "high"}, ""),
    "signed reasoning, given back": ({"messages": [USER, {"role": "assistant", "content": "Yes", "thinking_blocks": [SIGNED]}, USER]}, "c2ln"),
    "cache marks": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}]}, "ache"),
    "output cap": ({"max_completion_tokens": 123}, "123"),
    "temperature": ({"temperature": 0.25}, "0.25"),
    "top_k": ({"top_k": 7}, "7"),
    "stop sequences": ({"stop": ["END"]}, "END"),
    "seed": ({"seed": 77}, "77"),
    "penalties": ({"presence_penalty": 0.5}, "0.5"),
    "logprobs": ({"logprobs": True, "top_logprobs": 2}, ""),
    "several choices (n)": ({"n": 2}, ""),
    "user id": ({"user": "u-42"}, "u-42"),
}  # fmt: skip
#: Provider dialects as the columns of the table: a provider of each, and a model.
TARGETS = {
    "OpenAI chat": ("openai_compatible", "m"), "Responses": ("openai", "gpt-4.1"), "Anthropic": ("anthropic", "claude-sonnet-4-6"),
    "Gemini": ("gemini", "gemini-3.5-flash"), "Cohere": ("cohere", "command-a-03-2025"), "Bedrock": ("bedrock", "us.anthropic.claude-sonnet-4-6"),
    "Replicate": ("replicate", "meta/meta-llama-3-70b-instruct"),
}  # fmt: skip
DIALECT = {"Responses": "responses"}
#: Carried by other means than the provider's own switch for it.
EMULATED = {
    ("custom tools", "Anthropic"), ("custom tools", "Gemini"), ("custom tools", "Cohere"), ("custom tools", "Bedrock"), ("JSON, any", "Anthropic"),
    ("tool choice: by name", "Cohere"), ("tool choice: none", "Bedrock"), ("system text", "Replicate"), ("several turns", "Replicate"),
}  # fmt: skip


def judge(feature: str, target: str) -> str:
    """carried, emulated, named (dropped, and said so), or refused; AssertionError where it is lost in silence."""
    asked, mark = FEATURES[feature]
    provider_id, model = TARGETS[target]
    provider = stockyard.PROVIDERS_BY_ID[provider_id]
    dialect = stockyard.DIALECTS[DIALECT.get(target, provider.dialect)]

    def encode(strict: bool) -> tuple[str, list[str]]:
        ids = itertools.count()
        translation = stockyard.Translation(
            model, provider, False, 0, lambda prefix: f"{prefix}{next(ids)}", strict, foreign=True
        )
        body = dialect.encode({"model": model, "messages": [USER], **asked}, translation)
        return stockyard.dump_json(body).decode(), translation.dropped

    try:
        text, dropped = encode(strict=False)
    except stockyard.InvalidRequest as error:
        assert error.message
        return "refused"
    if dropped:
        with pytest.raises(stockyard.InvalidRequest):
            encode(strict=True)
        return "named"
    assert mark in text, f"{feature} is lost on the way to {target}: {text}"
    return "emulated" if (feature, target) in EMULATED else "carried"


def matrix() -> str:
    lines = [f"| | {' | '.join(TARGETS)} |", "|---|" + "---|" * len(TARGETS)]
    lines += [f"| {feature} | {' | '.join(judge(feature, target) for target in TARGETS)} |" for feature in FEATURES]
    return "\n".join(lines)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("feature", FEATURES)
def test_nothing_is_lost_in_silence(feature: str, target: str) -> None:
    assert judge(feature, target) in ("carried", "emulated", "named", "refused")


def test_the_table_in_readme_is_what_these_tests_found() -> None:
    assert f"<!-- conformance -->\n{matrix()}\n" in README.read_text(encoding="utf-8")


def said(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, *parts]}]}


REFUSED: dict[str, Any] = {"messages": [USER, {"role": "assistant", "content": None, "refusal": "no"}, USER]}
MARKED = {"tools": [{**TOOL, "cache_control": {"type": "ephemeral"}}]}
STRICT = {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": SCHEMA}}]}


@pytest.mark.parametrize(
    ("provider", "model", "asked", "dropped", "carried"),
    [
        ("gemini", "gemini-3-flash", MARKED, ["cache_control"], "look"),
        ("gemini", "gemini-2.0-flash", STRICT, ["tools.strict"], '"f"'),
        ("gemini", "gemini-3-flash", {"audio": {"voice": "Kore", "format": "mp3"}}, ["audio.format"], "Kore"),
        ("gemini", "gemini-3-flash", REFUSED, [], '"no"'),
        ("cohere", "command-a-03-2025", MARKED, ["cache_control"], "look"),
        ("bedrock", "amazon.nova-lite-v1:0", said({"type": "hologram"}), ["content.hologram"], "Hi"),
        ("bedrock", "amazon.nova-lite-v1:0", REFUSED, [], '"no"'),
        ("bedrock", "meta.llama3-1-70b-instruct-v1:0", {"top_k": 5}, ["top_k"], ""),
        ("bedrock", "amazon.nova-lite-v1:0", {"service_tier": "scale"}, ["service_tier"], ""),
        ("bedrock", "amazon.nova-lite-v1:0", {"metadata": {"a": "\u0001"}}, ["metadata"], ""),
        ("bedrock", "amazon.nova-lite-v1:0", said({"type": "native", "dialect": "bedrock", "part": {"video": {}}}), [], "video"),
        ("replicate", "openai/gpt-5.4", {"stop": ["a"]}, ["stop"], ""),
    ],
)  # fmt: skip
def test_what_only_some_take_is_named_for_the_others(
    provider: str, model: str, asked: dict[str, Any], dropped: list[str], carried: str
) -> None:
    row = stockyard.PROVIDERS_BY_ID[provider]
    translation = stockyard.Translation(model, row, False, 0, str, foreign=True)
    body = stockyard.DIALECTS[row.dialect].encode({"model": model, "messages": [USER], **asked}, translation)
    assert translation.dropped == dropped
    assert carried in json.dumps(body)


@pytest.mark.parametrize(("cap", "budget"), [(500, None), (2000, 1500), (50_000, 16_384)])
def test_thinking_never_raises_the_output_cap(cap: int, budget: int | None) -> None:
    """Money is held by the cap, so an encoder that raised it would let a call cost more than was held."""
    translation = stockyard.Translation("claude-sonnet-4-5", stockyard.PROVIDERS_BY_ID["anthropic"], False, 0, str)
    asked = {"messages": [USER], "max_completion_tokens": cap, "reasoning_effort": "high"}
    body = stockyard.DIALECTS["anthropic"].encode(asked, translation)
    assert body["max_tokens"] == cap
    assert body.get("thinking", {}).get("budget_tokens") == budget
    assert translation.dropped == ([] if budget else ["reasoning_effort"])


def write_readme() -> None:
    told = README.read_text(encoding="utf-8")
    README.write_text(
        re.sub(r"(<!-- conformance -->\n)(\|.*\n)*", lambda found: f"{found[1]}{matrix()}\n", told), encoding="utf-8"
    )


if __name__ == "__main__":
    write_readme()
