"""What is hidden or refused, on the way in and on the way back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import Start
from upstreams import COMPLETION, plain

import stockyard as s

PATH = "/v1/chat/completions"
EMAIL = "jane.roe@example.org"
CARD = "4111 1111 1111 1111"


def chat(content: Any, **more: Any) -> dict[str, Any]:
    return {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": content}], **more}


def masked(document: Any) -> tuple[Any, s.Hidden]:
    hidden = s.Hidden("mask", b"k", "")
    s.Redactor(s.Scanner(), "mask").redact(s.Texts(document), hidden)
    return document, hidden


# ----- One walk for all dialects

ARGUMENTS = json.dumps({"to": EMAIL, "card": 4111111111111111, "note": 'say "hi"'})
REQUESTS: list[dict[str, Any]] = [
    chat(f"write to {EMAIL}"), chat([{"type": "text", "text": EMAIL}]), chat("hi", user=EMAIL), chat("hi", metadata={"a": EMAIL}),
    chat("hi", metadata={EMAIL: "a"}), {"model": "m", "messages": [{"role": "system", "content": EMAIL}]},
    {"model": "m", "messages": [{"role": "tool", "tool_call_id": "call_1", "content": json.dumps({"rows": [EMAIL]})}]},
    {"model": "m", "messages": [{"role": "assistant", "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}]}]},
    chat("hi", tools=[{"type": "function", "function": {"name": "f", "description": f"ask {EMAIL}", "parameters": {}}}]),
    chat("hi", tools=[{"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {EMAIL: {"type": "string", "enum": [EMAIL]}}, "required": [EMAIL]}}}]),
    {"model": "m", "prompt": ["one", EMAIL]}, {"model": "m", "input": ["one", EMAIL]}, {"model": "m", "input": EMAIL},
    {"model": "m", "input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": ARGUMENTS}]},
    {"model": "m", "instructions": EMAIL, "input": [{"role": "user", "content": [
        {"type": "input_text", "text": "a"}, {"type": "input_file", "filename": f"{EMAIL}.pdf", "file_id": "file_1"}]}]},
    {"model": "m", "system": [{"type": "text", "text": EMAIL}], "messages": []},
    {"model": "m", "messages": [{"role": "assistant", "content": [
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"type": EMAIL, "n": [4111111111111111]}}]}]},
    {"model": "m", "messages": [{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": EMAIL}]}]}]},
    {"model": "m", "messages": [{"role": "user", "content": [
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": f"{'a' * 40} {EMAIL}"}}]}]},
    {"contents": [{"role": "user", "parts": [{"text": EMAIL}]}], "systemInstruction": {"parts": [{"text": "x"}]}},
    {"contents": [{"role": "user", "parts": [{"functionCall": {"name": "f", "args": {"id": EMAIL}}},
                                             {"functionResponse": {"name": "f", "response": {"model": EMAIL}}}]}]},
    {"model": "m", "query": EMAIL, "documents": ["a", {"text": EMAIL}]},
]  # fmt: skip


@pytest.mark.parametrize("request_", REQUESTS)
def test_every_text_of_a_request_is_masked_and_its_json_stays_whole(request_: dict[str, Any]) -> None:
    document, hidden = masked(json.loads(json.dumps(request_)))
    told = json.dumps(document)
    assert EMAIL not in told and "4111111111111111" not in told
    assert hidden.counts["email"] >= 1 and "[EMAIL]" in told
    for message in document.get("messages") or ():
        for call in message.get("tool_calls") or ():
            assert json.loads(call["function"]["arguments"]) == {
                "to": "[EMAIL]", "card": "[CARD]", "note": 'say "hi"',
            }  # fmt: skip


def test_structure_stays_as_it_is() -> None:
    image = "data:image/png;base64," + "AKIAIOSFODNN7EXAMPLE" * 9
    document = {
        "model": f"ft:{EMAIL}", "previous_response_id": EMAIL,
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}]},
            {"role": "user", "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": image[22:]}}]},
            {"role": "tool", "tool_call_id": EMAIL, "content": "ok"},
        ],
    }  # fmt: skip
    before = json.dumps(document)
    changed, hidden = masked(document)
    assert json.dumps(changed) == before and not hidden.counts


def test_two_keys_with_one_mask_both_stay() -> None:
    document, _ = masked({"metadata": {"a@example.org": "1", "x": "y", "b@example.org": "2"}})
    assert document == {"metadata": {"[EMAIL]": "1", "x": "y", "[EMAIL]_": "2"}}


# ----- Mask, end to end

MESSAGES = {"model": "gpt-4o-mini", "max_tokens": 50, "messages": [{"role": "user", "content": f"I am {EMAIL}"}]}
GEMINI = {"contents": [{"role": "user", "parts": [{"text": f"I am {EMAIL}"}]}]}
DOORS = [
    (PATH, chat(f"I am {EMAIL}")), ("/v1/messages", MESSAGES), ("/v1beta/models/gpt-4o-mini:generateContent", GEMINI),
    ("/v1/responses", {"model": "gpt-4o-mini", "input": f"I am {EMAIL}"}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), DOORS)
async def test_what_is_masked_reaches_neither_provider_nor_log(start: Start, path: str, body: dict[str, Any]) -> None:
    async with start(redact="mask") as proxy:
        proxy.upstream.answers = [plain(COMPLETION)]
        status, _, _ = await proxy.post(path, body)
        assert status == 200
        [sent] = proxy.upstream.seen
        assert EMAIL.encode() not in sent.body and b"[EMAIL]" in sent.body
        [row] = await proxy.rows()
        assert row["redactions"] == 1
        found = s.find_request(proxy.gateway.store, row["id"])
        assert EMAIL not in json.dumps(found) and "[EMAIL]" in json.dumps(found["request"])


async def test_bytes_with_nothing_to_hide_pass_unchanged(start: Start) -> None:
    body = b'{ "model":"gpt-4o-mini",  "messages":[{"role":"user","content":"Hello, order 12345-99 of 2026-01-02"}]}'
    async with start(redact="mask") as proxy:
        proxy.upstream.answers = [plain(COMPLETION)]
        assert (await proxy.post(PATH, body))[0] == 200
        assert proxy.upstream.seen[0].body == body


@pytest.mark.parametrize("body", [b'{"broken": "jane.roe@example.org', b'{"messages": ["jane.roe@example.org"]}'])
async def test_what_was_refused_before_it_was_read_is_logged_redacted(start: Start, body: bytes) -> None:
    async with start(redact="mask") as proxy:
        assert (await proxy.post(PATH, body))[0] == 400
        [row] = await proxy.rows()
        assert EMAIL not in json.dumps(s.find_request(proxy.gateway.store, row["id"]))


async def test_bodies_are_logged_redacted_though_they_went_as_they_were(start: Start) -> None:
    async with start(log_bodies="redacted") as proxy:
        answer = json.loads(json.dumps(COMPLETION))
        answer["choices"][0]["message"]["content"] = f"you are {EMAIL}"
        proxy.upstream.answers = [plain(answer)]
        _, _, told = await proxy.post(PATH, chat(f"I am {EMAIL}"))
        assert EMAIL in json.dumps(told) and EMAIL.encode() in proxy.upstream.seen[0].body
        [row] = await proxy.rows()
        found = json.dumps(s.find_request(proxy.gateway.store, row["id"]))
        assert EMAIL not in found and found.count("[EMAIL]") == 2


async def test_uploads_and_raw_bodies_do_not_go_around(start: Start) -> None:
    async with start(redact="mask") as proxy:
        status, _, told = await proxy.post("/proxy/openai/v1/chat/completions", chat(EMAIL))
        assert (status, told["error"]["code"]) == (400, "content_filter")
        assert not proxy.upstream.seen
