"""The Responses dialect: requests, answers, streams, state, and model facts. No network."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import stockyard as s
from stockyard import (
    GatewayError,
    InvalidRequest,
    OpenAiChat,
    Provider,
    Translation,
    UpstreamError,
    UpstreamRefused,
    Usage,
)

DIALECT = s.OpenAiResponses()
PERPLEXITY = s.PerplexityAgent()
TOOL = {"type": "function", "name": "look", "description": "Look.", "parameters": {"type": "object"}, "strict": True}


def translation(model: str = "gpt-5.5", provider: str = "openai", **given: Any) -> Translation:
    count = iter(range(10_000))
    row = Provider(id=provider, name=provider, base_url="https://example.invalid/v1")
    given = {"stream": False, "now_s": 7, "new_id": lambda prefix: f"{prefix}{next(count)}", **given}
    return Translation(model=model, provider=row, **given)


def parse(**body: Any) -> Any:
    return DIALECT.parse({"model": "m", "input": "hi", **body}, {})


def encode(model: str = "gpt-5.5", dialect: s.OpenAiResponses = DIALECT, **request: Any) -> tuple[Any, list[str]]:
    target = translation(model)
    request.setdefault("messages", [{"role": "user", "content": "hi"}])
    return dialect.encode({"model": "alias", **request}, target), target.dropped


# ----- model facts


def test_rows_are_found_by_the_longest_prefix_that_ends_at_a_boundary() -> None:
    facts = s.openai_model_facts
    assert facts("gpt-5") is s.OPENAI_MODELS["gpt-5"] is facts("gpt-5-mini-2025-08-07")
    assert facts("gpt-5.1-mini") is s.OPENAI_MODELS["gpt-5.1"]
    assert facts("openai/GPT-5.4-pro") is s.OPENAI_MODELS["gpt-5.4-pro"]
    assert facts("ft:gpt-4.1:org::id") is s.OPENAI_MODELS["gpt-4.1"]
    assert facts("gpt-7") is s.OPENAI_MODELS["gpt"]
    assert facts("gpt-oss-120b") is facts("o") is facts("orca") is facts("") is s.UNKNOWN_MODEL


@pytest.mark.parametrize(
    ("model", "effort", "needed"),
    [
        ("gpt-4.1", None, False),
        ("gpt-5.4", None, False),
        ("gpt-5.4", "low", True),
        ("gpt-5.6-sol", "none", False),
        ("gpt-6-sol", None, True),
        ("gpt-6-sol", "none", False),
        ("gpt-6-astra", None, True),
        ("gpt-6.1-sol", "none", True),
        ("gpt-5", "high", False),
        ("gpt-5-pro", None, True),
        ("my-model", "high", False),
    ],
)
def test_which_chat_calls_need_the_responses_endpoint(model: str, effort: str | None, needed: bool) -> None:
    request = {"tools": [{"type": "function"}], "reasoning_effort": effort}
    assert s.openai_model_facts(model).needs_responses(request) is needed
    plain = s.openai_model_facts(model).needs_responses({"reasoning_effort": effort})
    assert plain is (model == "gpt-5-pro")


@pytest.mark.parametrize(
    ("model", "effort", "refused"),
    [
        ("o3", None, True),
        ("gpt-5", None, True),
        ("gpt-5.2", None, False),
        ("gpt-5.2", "low", True),
        ("gpt-5.6", None, True),
        ("gpt-5.6", "none", False),
        ("gpt-6-astra", "none", True),
        ("gpt-4o", "high", False),
        ("grok-4.5", None, False),
        ("unheard-of", "high", False),
    ],
)
def test_which_models_refuse_sampling(model: str, effort: str | None, refused: bool) -> None:
    names = s.openai_model_facts(model).refused({"temperature": 0.2, "reasoning_effort": effort})
    assert ("temperature" in names) is refused


def test_efforts_are_brought_to_what_the_model_takes() -> None:
    def effort(model: str, asked: str) -> str | None:
        return s.openai_model_facts(model).effort(asked)

    assert effort("gpt-5", "minimal") == "minimal" and effort("gpt-5.6-sol", "minimal") == "low"
    assert (
        effort("gpt-5", "none") == "minimal" and effort("o3", "none") == "low" and effort("gpt-5.2", "none") == "none"
    )
    assert effort("gpt-4o", "low") is None and effort("gpt-5.2-chat-latest", "high") is None
    assert effort("gpt-6.1-sol", "max") == "max"


# ----- parse


def test_a_string_and_instructions_become_two_messages() -> None:
    request = parse(instructions="Be brief.", max_output_tokens=50, temperature=0.5, stream=True, metadata={"a": "b"})
    assert request == {
        "model": "m",
        "temperature": 0.5,
        "stream": True,
        "max_completion_tokens": 50,
        "metadata": {"a": "b"},
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    }


def test_a_tool_turn_is_one_message_and_results_follow() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "go"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "Hm."}],
            "encrypted_content": "x",
        },
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "On it.", "annotations": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "y"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "*** Begin"},
        {"type": "function_call_output", "call_id": "c1", "output": "seen"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "done"}]},
    ]
    messages = parse(input=items)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool"]
    assert messages[1] == {
        "role": "assistant",
        "content": "On it.",
        "reasoning_content": "Hm.",
        "thinking_blocks": [
            {"type": "reasoning_item", "item": items[1]},
            {"type": "reasoning_item", "item": items[4], "calls_before": 1, "text_before": True},
        ],
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}},
            {"id": "c2", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}},
        ],
    }
    assert messages[2:] == [
        {"role": "tool", "tool_call_id": "c1", "content": "seen"},
        {"role": "tool", "tool_call_id": "c2", "content": "done"},
    ]
    body, dropped = encode(messages=messages)
    # Back to items: the same ones, less the ids that only their maker could look up.
    assert not dropped
    assert [item.get("type", item.get("role")) for item in body["input"]] == [
        "user",
        "reasoning",
        "assistant",
        "function_call",
        "reasoning",
        "custom_tool_call",
        "function_call_output",
        "custom_tool_call_output",
    ]
    assert body["input"][1] == items[1] and body["input"][4] == items[4]


def test_media_in_a_tool_result_follow_all_results_where_only_chat_is_spoken() -> None:
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "low"}
    items = [
        {"type": "function_call", "call_id": "c1", "name": "shot", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": [image]},
        {"type": "function_call_output", "call_id": "c2", "output": "seen"},
        {"role": "user", "content": "next"},
    ]
    shown = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}}
    messages = OpenAiChat().encode(parse(input=items), translation(foreign=True))["messages"]
    assert [message["role"] for message in messages] == ["assistant", "tool", "tool", "user", "user"]
    assert messages[3]["content"][1] == shown
    assert DIALECT.encode(parse(input=items), translation())["input"] == items


def test_an_aborted_turn_of_reasoning_alone_is_left_out() -> None:
    items = [{"role": "user", "content": "a"}, {"type": "reasoning", "summary": [], "encrypted_content": "x"}]
    assert parse(input=[*items, {"role": "user", "content": "b"}])["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
    ]


def test_parts_of_every_kind_go_both_ways() -> None:
    parts = [
        {"type": "input_text", "text": "see", "prompt_cache_breakpoint": {"mode": "explicit"}},
        {"type": "input_image", "image_url": "https://x/y.png"},
        {"type": "input_image", "file_id": "file-1"},
        {"type": "input_file", "file_data": "data:application/pdf;base64,AA==", "filename": "a.pdf"},
        {"type": "input_file", "file_url": "https://x/y.pdf"},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
    ]
    request = parse(input=[{"role": "user", "content": parts}])
    assert DIALECT.encode(request, translation())["input"] == [{"role": "user", "content": parts}]


def test_tools_and_choices_go_both_ways() -> None:
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
    tools = [
        {**TOOL, "defer_loading": True},
        {"type": "custom", "name": "patch", "description": "Edit.", "format": grammar},
        {"type": "web_search", "search_context_size": "low"},
    ]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]}
    request = parse(tools=tools, tool_choice=choice)
    assert request["tools"][1]["custom"]["format"] == {
        "type": "grammar",
        "grammar": {"syntax": "lark", "definition": "start: /.+/"},
    }
    assert request["tools"][2] == {"type": "native", "dialect": "responses", "tool": tools[2]}
    assert request["tool_choice"]["allowed_tools"]["tools"] == [{"type": "function", "function": {"name": "look"}}]
    assert request["extra_body"] == {"responses": {"tools.defer_loading": {"look": True}}}
    body = DIALECT.encode(request, translation())
    assert body["tools"] == tools and body["tool_choice"] == choice
    hosted = parse(tools=tools, tool_choice={"type": "web_search"})
    assert DIALECT.encode(hosted, translation())["tool_choice"] == {"type": "web_search"}


def test_everything_without_a_place_in_chat_travels_in_the_extras_and_back() -> None:
    given: Any = {
        "reasoning": {"effort": "high", "summary": "auto"},
        "truncation": "auto",
        "max_tool_calls": 3,
        "include": ["reasoning.encrypted_content", "web_search_call.action.sources", "message.output_text.logprobs"],
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}, "verbosity": "low"},
    }
    request = parse(**given, store=True, stream_options={"include_obfuscation": False}, background=False)
    assert request["extra_body"]["responses"] == {
        "reasoning.summary": "auto",
        "truncation": "auto",
        "max_tool_calls": 3,
        "include": ["web_search_call.action.sources"],
    }
    assert request["reasoning_effort"] == "high" and request["verbosity"] == "low" and request["logprobs"] is True
    assert request["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {}, "strict": True},
    }
    target = translation("gpt-5.2")
    body = DIALECT.encode({**request, "reasoning_effort": "none"}, target)
    assert body["reasoning"] == {"effort": "none", "summary": "auto"} and body["text"] == given["text"]
    assert set(body["include"]) == set(given["include"]) and body["store"] is False
    assert body["truncation"] == "auto" and body["max_tool_calls"] == 3 and target.dropped == []


def test_an_assistants_phase_is_kept_for_responses_upstreams() -> None:
    item = {
        "type": "message",
        "role": "assistant",
        "phase": "commentary",
        "content": [{"type": "output_text", "text": "x"}],
    }
    request = parse(input=[{"role": "user", "content": "a"}, item, {"role": "user", "content": "b"}])
    assert DIALECT.encode(request, translation())["input"][1]["phase"] == "commentary"


def test_item_references_are_read_from_the_gateways_mapping() -> None:
    found = {"msg_1": {"type": "message", "role": "user", "content": "earlier"}}
    body = {"input": [{"type": "item_reference", "id": "msg_1"}, {"role": "user", "content": "now"}]}
    assert s.referenced_ids(body) == ["msg_1"]
    request = parse(**body, **{s.ITEMS_KEY: found})
    assert [message["content"] for message in request["messages"]] == ["earlier", "now"] and "extra_body" not in request
    with pytest.raises(InvalidRequest, match="msg_1") as caught:
        parse(**body)
    assert caught.value.status == 404


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"model": 1}, "model"),
        ({"input": 3}, "input"),
        ({"input": []}, "input"),
        ({"input": ["x"]}, r"input\[0\]"),
        ({"input": [{"role": "robot", "content": ""}]}, r"input\[0\].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_video"}]}]}, "input_video"),
        ({"input": [{"role": "user"}]}, "content"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": {}}]}, "output"),
        ({"input": [{"type": 3}]}, "type"),
        ({"instructions": []}, "instructions"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "function"}]}, "name"),
        ({"tool_choice": 1}, "tool_choice"),
        ({"stream": "yes"}, "stream"),
        ({"max_output_tokens": True}, "max_output_tokens"),
        ({"text": []}, "text"),
        ({"reasoning": "x"}, "reasoning"),
        ({"include": "x"}, "include"),
        ({"top_logprobs": "x"}, "top_logprobs"),
        ({"input": [{"type": "reasoning", "encrypted_content": s.PACKED_PREFIX + "!"}]}, "encrypted_content"),
    ],
)
def test_bad_requests_name_the_field(body: Any, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        parse(**body)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.sampled_from(
        [
            "",
            "user",
            "assistant",
            "message",
            "function_call",
            "function_call_output",
            "reasoning",
            "item_reference",
            "custom",
            "function",
            "allowed_tools",
            "input_text",
            "x",
            s.pack_blocks([]),
            s.pack_blocks([{}]),
        ]
    )
)
NAMES = st.sampled_from(
    [
        "type",
        "role",
        "content",
        "text",
        "id",
        "call_id",
        "name",
        "output",
        "arguments",
        "input",
        "summary",
        "tools",
        "format",
        "encrypted_content",
        "effort",
        "function",
        "mode",
        "phase",
        "namespace",
        "image_url",
        "tool_calls",
        "thinking_blocks",
        "item",
        "extra_content",
        "extra_body",
        "responses",
        "custom",
        "json_schema",
        "input.phase",
        "tools.x",
        "calls_before",
    ]
)
WILD = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5), max_leaves=12
)
BODY = st.fixed_dictionaries(
    {"model": st.just("m"), "input": WILD | st.lists(st.dictionaries(NAMES, WILD, max_size=6))},
    optional=dict.fromkeys(
        ("tools", "tool_choice", "text", "reasoning", "include", "instructions", "stream", s.ITEMS_KEY, "prompt"), WILD
    ),
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(BODY)
def test_any_wrong_json_is_an_invalid_request_and_nothing_else(body: Any) -> None:
    before = json.dumps(body)
    try:
        request = DIALECT.parse(body, {})
    except InvalidRequest as error:
        assert error.message
    else:
        DIALECT.encode(request, translation())
    assert json.dumps(body) == before


CHAT = st.fixed_dictionaries(
    {"messages": WILD | st.lists(st.dictionaries(NAMES, WILD, max_size=5), max_size=3)},
    optional={
        **dict.fromkeys(
            (
                "tools",
                "tool_choice",
                "response_format",
                "reasoning_effort",
                "max_tokens",
                "extra_body",
                "logprobs",
                "web_search_options",
                "stop",
                "num_search_results",
                "stream_options",
            ),
            WILD,
        ),
        "extra_body": st.fixed_dictionaries(
            {
                "responses": st.dictionaries(
                    st.sampled_from(
                        ["input.phase", "input.namespace", "tools.x", "include", "reasoning.x", "text.y", "z"]
                    ),
                    WILD,
                )
            }
        ),
    },
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(CHAT)
@example({"model": "m", "messages": [{"role": "user", "content": "a"}], "extra_body": {"responses": {"include": [[]]}}})
def test_a_wrong_chat_body_is_an_invalid_request_too(body: Any) -> None:
    before = json.dumps(body)
    for dialect, model in ((DIALECT, "gpt-5"), (PERPLEXITY, "sonar")):
        try:
            dialect.encode(body, translation(model))
        except InvalidRequest as error:
            assert error.message
    assert json.dumps(body) == before


# ----- encode


def test_a_chat_request_becomes_a_stateless_responses_call() -> None:
    tool = {"type": "function", "function": {"name": "look"}}
    body, dropped = encode(
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        tools=[tool],
        max_tokens=100,
        reasoning_effort="low",
        response_format={"type": "json_object"},
        user="u",
        tool_choice={"type": "function", "function": {"name": "look"}},
        stream_options={"include_usage": True},
    )
    assert dropped == []
    assert body == {
        "model": "gpt-5.5",
        "instructions": "Be brief.",
        "input": [{"role": "user", "content": "hi"}],
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "max_output_tokens": 100,
        "reasoning": {"effort": "low"},
        "user": "u",
        "text": {"format": {"type": "json_object"}},
        "tool_choice": {"type": "function", "name": "look"},
        "tools": [
            {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}, "strict": False}
        ],
    }


def test_models_that_do_not_reason_are_not_asked_for_reasoning() -> None:
    body, dropped = encode("gpt-4.1", temperature=0.1, logprobs=True, top_logprobs=2)
    assert body["include"] == ["message.output_text.logprobs"] and body["top_logprobs"] == 2
    assert body["temperature"] == 0.1 and dropped == []


def test_what_cannot_be_carried_is_named() -> None:
    messages = [
        {
            "role": "user",
            "name": "Ann",
            "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "media"}],
        },
        {"role": "assistant", "content": "b", "reasoning_content": "c", "thinking_blocks": [{"type": "thinking"}]},
        {"role": "tool", "tool_call_id": "c", "content": "", "is_error": True},
    ]
    _, dropped = encode(
        messages=messages,
        n=2,
        seed=1,
        stop=["x"],
        logit_bias={"1": 2},
        presence_penalty=0.5,
        temperature=0.3,
        store=True,
        max_tokens=5,
        extra_body={"gemini": {"safetySettings": []}},
        top_k=3,
        functions=[{"name": "f"}],
        tools=[{"type": "native", "dialect": "gemini", "tool": {}}],
        parallel_tool_calls=True,
    )
    assert set(dropped) == {
        "messages.name",
        "cache_control",
        "content.media",
        "thinking_blocks",
        "reasoning_content",
        "messages.is_error",
        "n",
        "seed",
        "stop",
        "logit_bias",
        "presence_penalty",
        "temperature",
        "store",
        "max_completion_tokens",
        "safetySettings",
        "top_k",
        "functions",
        "tools.gemini",
    }
    with pytest.raises(InvalidRequest, match="seed"):
        DIALECT.encode({"messages": messages[:0], "seed": 1}, translation(strict=True))


def test_defaults_ask_for_nothing_and_are_no_loss() -> None:
    _, dropped = encode(n=1, temperature=1, presence_penalty=0, store=False, logprobs=False, stop=[], stream=True)
    assert dropped == []


def test_overlong_call_ids_fit_and_still_match() -> None:
    call = {"id": "x" * 90, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "x" * 90, "content": "r"}]
    first, second = encode(messages=messages)[0]["input"]
    assert first["call_id"] == second["call_id"] and len(first["call_id"]) <= 64


def test_reasoning_of_another_provider_stays_behind() -> None:
    block = {"type": "reasoning_item", "item": {"type": "reasoning", "encrypted_content": "x"}, "provider": "xai"}
    message = {"role": "assistant", "content": "a", "thinking_blocks": [block]}
    body, dropped = encode(messages=[message])
    assert body["input"] == [{"role": "assistant", "content": "a"}] and dropped == ["thinking_blocks"]


# ----- Perplexity


def test_perplexity_gets_its_own_names_and_nothing_it_does_not_know() -> None:
    body, dropped = encode(
        "sonar",
        PERPLEXITY,
        max_tokens=20,
        response_format={"type": "json_schema", "json_schema": {"name": "n"}},
        reasoning_effort="low",
        user="u",
        stop=["x"],
        search_domain_filter=["a.org"],
        prompt_cache_key="k",
        web_search_options={"search_context_size": "low", "search_type": "pro"},
        temperature=0.2,
    )
    assert body == {
        "model": "perplexity/sonar",
        "input": [{"role": "user", "content": "hi"}],
        "max_output_tokens": 20,
        "tools": [{"type": "web_search", "search_context_size": "low", "filters": {"search_domain_filter": ["a.org"]}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "n"}},
        "reasoning": {"effort": "low"},
        "temperature": 0.2,
    }
    assert set(dropped) == {"user", "stop", "prompt_cache_key"}


def test_perplexity_models_and_limits() -> None:
    body, _ = encode("sonar-deep-research", PERPLEXITY)
    assert body["preset"] == "medium" and "model" not in body and "tools" not in body
    assert encode("anthropic/claude-x", PERPLEXITY)[0]["max_output_tokens"] == 8192
    body, dropped = encode("perplexity/sonar", PERPLEXITY, reasoning_effort="none")
    assert "reasoning" not in body and dropped == ["reasoning_effort"]


def test_perplexity_keeps_what_it_knows_of_a_responses_client() -> None:
    body = {
        "preset": "low",
        "max_steps": 3,
        "include": ["x"],
        "reasoning": {"summary": "auto"},
        "text": {"verbosity": "low"},
    }
    target = translation("perplexity/sonar")
    encoded = PERPLEXITY.encode(parse(**body), target)
    assert encoded["preset"] == "low" and encoded["max_steps"] == 3
    assert encoded.keys() <= {"model", "input", "preset", "max_steps"}
    assert set(target.dropped) == {"include", "reasoning.summary", "verbosity"}


def test_a_custom_tool_is_a_function_where_only_functions_are_known() -> None:
    messages = [
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "patch", "input": 'a"b'}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "ok"},
    ]
    tools = [
        {
            "type": "custom",
            "custom": {
                "name": "patch",
                "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: A"}},
            },
        }
    ]
    target = translation("perplexity/sonar")
    request = {"messages": messages, "tools": tools, "tool_choice": {"type": "custom", "custom": {"name": "patch"}}}
    body = PERPLEXITY.encode(request, target)
    assert body["tools"][0]["parameters"] == s.CUSTOM_SCHEMA and "start: A" in body["tools"][0]["description"]
    assert body["tool_choice"] == {"name": "patch"}
    assert json.loads(body["input"][1]["arguments"]) == {"input": 'a"b'}
    item = {"type": "function_call", "call_id": "d", "name": "patch", "arguments": '{"input":"x\\ny"}', "id": "fc"}
    answer = {"id": "r", "status": "completed", "output": [item]}
    call = {"id": "d", "type": "custom", "custom": {"name": "patch", "input": "x\ny"}}
    assert PERPLEXITY.decode(answer, target)["choices"][0]["message"]["tool_calls"] == [call]
    events = [
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "arguments": ""}},
        {"type": "response.function_call_arguments.delta", "output_index": 0, "delta": '{"input":'},
        {"type": "response.completed", "response": answer},
    ]
    assert s.join_chunks(feed(events, PERPLEXITY, target))["choices"][0]["message"]["tool_calls"] == [call]


def test_perplexitys_sources_and_searches_are_read() -> None:
    answer = {
        "id": "r",
        "object": "response",
        "status": "completed",
        "model": "perplexity/sonar",
        "created_at": 5,
        "output": [
            {"type": "search_results", "queries": ["q"], "results": [{"url": "https://a.org", "title": "A", "id": 1}]},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Hi", "annotations": []}],
            },
        ],
        "usage": {"input_tokens": 3, "output_tokens": 4, "tool_calls_details": {"search_web": {"invocation": 2}}},
    }
    completion = PERPLEXITY.decode(answer, translation("sonar"))
    citation = {"url": "https://a.org", "title": "A", "start_index": 0, "end_index": 0}
    assert completion["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Hi",
        "annotations": [{"type": "url_citation", "url_citation": citation}],
    }
    assert completion["usage"]["num_search_queries"] == 2 and PERPLEXITY.read_usage(answer) == Usage(
        input_tokens=3, output_tokens=4, searches=2
    )


# ----- decode

RS: Any = {
    "id": "rs_1",
    "type": "reasoning",
    "summary": [{"type": "summary_text", "text": "A"}, {"type": "summary_text", "text": "B"}],
    "encrypted_content": "gA==",
}
FC1: Any = {
    "id": "fc_1",
    "type": "function_call",
    "status": "completed",
    "call_id": "c1",
    "name": "look",
    "arguments": '{"a":1}',
}
FC2 = {"id": "fc_2", "type": "function_call", "status": "completed", "call_id": "c2", "name": "find", "arguments": "{}"}
NOTE: Any = {"type": "url_citation", "url": "https://a", "title": "A", "start_index": 0, "end_index": 2}
MSG: Any = {
    "id": "msg_1",
    "type": "message",
    "status": "completed",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "Grüße ☀", "annotations": [NOTE], "logprobs": []}],
}
CTC: Any = {"id": "ctc_1", "type": "custom_tool_call", "call_id": "c3", "name": "patch", "input": "*** Begin"}
WEB: Any = {"id": "ws_1", "type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "q"}}
USAGE: Any = {
    "input_tokens": 10,
    "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 2},
    "output_tokens": 6,
    "output_tokens_details": {"reasoning_tokens": 3},
    "total_tokens": 16,
}
ANSWER: Any = {
    "id": "resp_1",
    "object": "response",
    "created_at": 5,
    "status": "completed",
    "model": "gpt-5.5-2026",
    "error": None,
    "output": [RS, WEB, MSG, FC1, FC2, CTC],
    "usage": USAGE,
    "incomplete_details": None,
}


def sse(events: list[Any], ends: str = "\n", named: bool = True) -> bytes:
    lines = []
    for at, event in enumerate(events):
        data = json.dumps({**event, "sequence_number": at}, ensure_ascii=False)
        lines.append((f"event: {event['type']}{ends}" if named else "") + f"data: {data}{ends}{ends}")
    return "".join(lines).encode()


def feed(events: list[Any], dialect: s.OpenAiResponses = DIALECT, target: Any = None) -> list[Any]:
    decoder = dialect.decoder(target or translation())
    chunks = decoder.feed(sse(events)) + decoder.close()
    assert decoder.complete
    return chunks


def stream_of(answer: Any) -> list[Any]:
    """What OpenAI would send for this answer, with the two functions' arguments interleaved."""
    shell = {**answer, "output": [], "status": "in_progress", "usage": None}
    events: list[Any] = [
        {"type": "response.created", "response": shell},
        {"type": "response.in_progress", "response": shell},
    ]

    def tell(kind: str, at: int, **members: Any) -> None:
        events.append(
            {"type": f"response.{kind}", "output_index": at, "item_id": answer["output"][at]["id"], **members}
        )

    tell("output_item.added", 0, item={**RS, "summary": [], "encrypted_content": "other"})
    for at, part in enumerate(RS["summary"]):
        tell("reasoning_summary_part.added", 0, summary_index=at, part={"type": "summary_text", "text": ""})
        tell("reasoning_summary_text.delta", 0, summary_index=at, delta=part["text"])
    tell("output_item.done", 0, item=RS)
    tell("output_item.added", 1, item={**WEB, "status": "in_progress"})
    tell("web_search_call.searching", 1)
    tell("output_item.done", 1, item=WEB)
    tell("output_item.added", 2, item={**MSG, "content": [], "status": "in_progress"})
    tell("content_part.added", 2, content_index=0, part={"type": "output_text", "text": "", "annotations": []})
    for letter in MSG["content"][0]["text"]:
        tell("output_text.delta", 2, content_index=0, delta=letter, logprobs=[], obfuscation="xyz")
    tell("output_text.annotation.added", 2, content_index=0, annotation_index=0, annotation=NOTE)
    tell("output_text.done", 2, content_index=0, text=MSG["content"][0]["text"])
    tell("output_item.done", 2, item=MSG)
    tell("output_item.added", 3, item={**FC1, "arguments": "", "status": "in_progress"})
    tell("output_item.added", 4, item={**FC2, "arguments": "", "status": "in_progress"})
    tell("function_call_arguments.delta", 3, delta='{"a"')
    tell("function_call_arguments.delta", 4, delta="{}")
    tell("function_call_arguments.delta", 3, delta=":1}")
    tell("output_item.done", 3, item=FC1)
    tell("output_item.done", 4, item=FC2)
    tell("output_item.added", 5, item={**CTC, "input": ""})
    tell("custom_tool_call_input.delta", 5, delta="*** ")
    tell("output_item.done", 5, item=CTC)
    events.append({"type": "response.completed", "response": answer})
    return events


def test_an_answer_becomes_a_completion() -> None:
    completion = DIALECT.decode(json.loads(json.dumps(ANSWER)), translation())
    message = completion["choices"][0]["message"]
    assert completion["id"] == "resp_1" and completion["created"] == 5 and completion["model"] == "gpt-5.5-2026"
    assert completion["object"] == "chat.completion" and completion["choices"][0]["finish_reason"] == "tool_calls"
    assert message["content"] == "Grüße ☀" and message["reasoning_content"] == "A\n\nB"
    assert [block["item"] for block in message["thinking_blocks"]] == [RS, WEB]
    assert [call["id"] for call in message["tool_calls"]] == ["c1", "c2", "c3"]
    assert message["tool_calls"][2] == {"id": "c3", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}
    assert message["annotations"] == [
        {"type": "url_citation", "url_citation": {"url": "https://a", "title": "A", "start_index": 0, "end_index": 2}}
    ]
    assert completion["usage"]["prompt_tokens"] == 10 and completion["usage"]["num_search_queries"] == 1
    assert completion["usage"]["prompt_tokens_details"]["cache_write_tokens"] == 2


def test_a_stream_says_the_same_as_the_answer() -> None:
    chunks = feed(stream_of(ANSWER))
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert sum(bool(c["finish_reason"]) for chunk in chunks for c in chunk["choices"]) == 1
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]
    assert s.join_chunks(chunks) == DIALECT.decode(ANSWER, translation())


@pytest.mark.parametrize(
    "kept", [("completed",), ("created", "item.done", "completed"), ("added", "done", "completed")]
)
def test_a_stream_with_missing_events_still_says_everything(kept: tuple[str, ...]) -> None:
    chunks = feed([event for event in stream_of(ANSWER) if event["type"].endswith(kept)])
    head = {"id": "resp_1", "created": 5, "model": "gpt-5.5-2026"}
    assert {**s.join_chunks(chunks), **head} == DIALECT.decode(ANSWER, translation())


def test_a_sparse_stream_without_indexes_or_final_output_is_read() -> None:
    item = {"id": "m", "type": "message", "content": []}
    events = [
        {"type": "response.output_item.added", "item": item},
        {"type": "response.output_text.delta", "item_id": "m", "delta": "Hi"},
        {"type": "response.unheard_of", "x": 1},
        {"type": "response.completed", "response": {}},
    ]
    completion = s.join_chunks(feed(events))
    assert (
        completion["choices"][0]["message"]["content"] == "Hi" and completion["choices"][0]["finish_reason"] == "stop"
    )


def test_state_and_places_survive_a_round_trip_to_the_byte() -> None:
    later = {**RS, "id": "rs_2"}
    answer = {**ANSWER, "output": [RS, FC1, later, FC2]}
    message = DIALECT.decode(answer, translation())["choices"][0]["message"]
    items = encode(messages=[message])[0]["input"]
    assert [item["type"] for item in items] == ["reasoning", "function_call", "reasoning", "function_call"]
    assert items[0] == RS and items[2] == later and "id" not in items[1]


@pytest.mark.parametrize(
    ("status", "reason", "finish"),
    [
        ("incomplete", "max_output_tokens", "length"),
        ("incomplete", "content_filter", "content_filter"),
        ("completed", None, "stop"),
        (None, None, "stop"),
    ],
)
def test_finish_reasons(status: str | None, reason: str | None, finish: str) -> None:
    answer = {**ANSWER, "output": [MSG], "status": status, "incomplete_details": {"reason": reason}}
    assert DIALECT.decode(answer, translation())["choices"][0]["finish_reason"] == finish
    events = [*stream_of({**ANSWER})[:-1], {"type": f"response.{status or 'completed'}", "response": answer}]
    assert feed(events)[-2]["choices"][0]["finish_reason"] in (finish, "tool_calls")


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_any_split_gives_the_same_chunks(seed: int, ends: str, named: bool) -> None:
    rng = random.Random(seed)
    body = b": ping" + ends.encode() * 2 + sse(stream_of(ANSWER), ends, named) + b"data: [DONE]" + ends.encode()
    decoder = DIALECT.decoder(translation())
    chunks, at = [], 0
    while at < len(body):
        end = at + rng.choice([1, 2, 7, 100, 2000])
        chunks += decoder.feed(body[at:end])
        at = end
    chunks += decoder.close()
    assert decoder.complete and chunks == feed(stream_of(ANSWER))


def test_a_cut_stream_is_not_complete() -> None:
    decoder = DIALECT.decoder(translation())
    decoder.feed(sse(stream_of(ANSWER)[:-1]))
    decoder.close()
    assert not decoder.complete


@pytest.mark.parametrize(
    ("event", "status", "retryable"),
    [
        (
            {"type": "error", "error": {"type": "too_many_requests", "code": "too_many_requests", "message": "no"}},
            429,
            True,
        ),
        ({"type": "error", "code": "server_error", "message": "no", "param": None}, 500, True),
        (
            {
                "type": "response.failed",
                "response": {"status": "failed", "error": {"code": "invalid_prompt", "message": "no"}},
            },
            400,
            False,
        ),
        (
            {"type": "response.completed", "response": {"status": "failed", "error": {"code": 503, "message": "no"}}},
            503,
            True,
        ),
        ({"type": "response.cancelled", "response": {"status": "cancelled", "error": None}}, 502, True),
        ({"error": {"message": "no", "code": 429}}, 429, True),
    ],
)
def test_failures_inside_a_stream_are_raised(event: Any, status: int, retryable: bool) -> None:
    decoder = DIALECT.decoder(translation())
    decoder.feed(sse(stream_of(ANSWER)[:3]))
    with pytest.raises(UpstreamError) as caught:
        decoder.feed(b"data: " + json.dumps(event).encode() + b"\n\n")
    assert caught.value.status == status and caught.value.retryable is retryable and not decoder.complete


def test_events_of_a_wrong_shape_are_the_providers_failure() -> None:
    for event in (
        {"type": "response.output_item.done", "item": {"type": "message", "content": 3}},
        {"type": "response.completed", "response": [1]},
        {"type": "response.created", "response": "x"},
    ):
        with pytest.raises(UpstreamError, match="unknown shape"):
            DIALECT.decoder(translation()).feed(b"data: " + json.dumps(event).encode() + b"\n\n")
    with pytest.raises(UpstreamError, match="no JSON"):
        DIALECT.decoder(translation()).feed(b"data: {broken\n\n")


def test_failed_answers_and_malformed_ones_are_raised() -> None:
    for answer in (
        {"status": "failed", "output": [], "error": {"code": "server_error", "message": "x"}},
        {},
        {"output": 3},
        {"status": "queued", "output": []},
        {"status": "cancelled", "output": []},
    ):
        with pytest.raises(UpstreamError):
            DIALECT.decode(answer, translation())
    with pytest.raises(UpstreamRefused, match="unknown field"):
        raise DIALECT.read_error(
            400, b'{"error":{"message":"unknown field","type":"invalid_request","code":400,"param":"x"}}'
        )
    assert DIALECT.read_error(401, b'{"error":{"message":"bad key"}}').status == 502


# ----- render


def delta(**members: Any) -> Any:
    return {"id": "c", "model": "up", "choices": [{"index": 0, "delta": members, "finish_reason": None}]}


def end(reason: str = "stop") -> Any:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


def piece(index: int | None, call_id: str | None = None, name: str | None = None, text: str = "", **more: Any) -> Any:
    call = {"index": index, "id": call_id, "function": {"name": name, "arguments": text}, **more}
    return {name: value for name, value in call.items() if value is not None}


def render(chunks: list[Any], **request: Any) -> list[Any]:
    count = iter(range(1000))
    renderer = DIALECT.renderer({"model": "m", "input": "x", **request}, lambda prefix: f"{prefix}{next(count)}", 9)
    body = b"".join(renderer.feed(chunk) for chunk in chunks) + renderer.close()
    return events_of(body)


def events_of(body: bytes) -> list[Any]:
    events = []
    for block in body.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds(events: list[Any]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_the_order_of_events() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    chunks = [
        delta(role="assistant", content=""),
        delta(reasoning_content="Hm"),
        delta(content="He"),
        delta(content="y"),
        delta(tool_calls=[piece(0, "c1", "look", "")]),
        delta(tool_calls=[piece(0, text="{}")]),
        end("tool_calls"),
        {"choices": [], "usage": usage},
    ]
    events = render(chunks)
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    final = events[-1]["response"]
    assert [item["type"] for item in final["output"]] == ["reasoning", "message", "function_call"]
    assert final["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 7,
    }
    assert final["model"] == "up" and final["status"] == "completed" and final["created_at"] == 9
    assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"


def test_interleaved_parallel_calls_come_one_after_the_other() -> None:
    chunks = [
        delta(tool_calls=[piece(0, "c1", "a", '{"x"')]),
        delta(tool_calls=[piece(1, "c2", "b", '{"y"')]),
        delta(tool_calls=[piece(0, text=":1}"), piece(1, text=":2}")]),
        end("tool_calls"),
    ]
    events = render(chunks)
    calls = [event for event in events if event.get("output_index") is not None]
    assert [event["output_index"] for event in calls] == sorted(event["output_index"] for event in calls)
    assert [(item["call_id"], item["arguments"]) for item in events[-1]["response"]["output"]] == [
        ("c1", '{"x":1}'),
        ("c2", '{"y":2}'),
    ]


def test_sequential_calls_stream_each_as_they_come() -> None:
    renderer = DIALECT.renderer({"model": "m"}, lambda prefix: prefix, 9)
    renderer.feed(delta(tool_calls=[piece(0, "c1", "a", '{"x":1}')]))
    out = renderer.feed(delta(tool_calls=[piece(1, "c2", "b", '{"y"')]))
    assert (
        b'"call_id":"c1","name":"a","arguments":"{\\"x\\":1}"' in out
        and b"response.function_call_arguments.delta" in out
    )


def test_odd_calls() -> None:
    chunks = [
        delta(tool_calls=[piece(0, "c1", "a", "")]),
        delta(tool_calls=[piece(0, "c2", "b", "null")]),
        delta(tool_calls=[piece(None, None, "c", '{"z":1}')]),
        end("tool_calls"),
    ]
    output = render(chunks)[-1]["response"]["output"]
    assert [(item["name"], item["arguments"]) for item in output] == [("a", "{}"), ("b", "{}"), ("c", '{"z":1}')]
    assert output[2]["call_id"].startswith("call_")


def test_custom_tools_come_back_as_custom_however_they_were_sent() -> None:
    tools = [{"type": "custom", "name": "patch"}]
    wrapped = [
        delta(tool_calls=[piece(0, "c", "patch", '{"input":"a')]),
        delta(tool_calls=[piece(0, text='\\nb"}')]),
        end(),
    ]
    native = [
        delta(tool_calls=[{"index": 0, "id": "c", "type": "custom", "custom": {"name": "patch", "input": "a\n"}}]),
        delta(tool_calls=[{"index": 0, "custom": {"input": "b"}}]),
        end(),
    ]
    for chunks in (wrapped, native):
        events = render(chunks, tools=tools)
        item = events[-1]["response"]["output"][0]
        assert item["type"] == "custom_tool_call" and item["input"] == "a\nb" and item["call_id"] == "c"
        told = "".join(e["delta"] for e in events if e["type"] == "response.custom_tool_call_input.delta")
        assert told == "a\nb" and "arguments" not in item


@pytest.mark.parametrize(("reason", "why"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
def test_cut_answers_are_incomplete(reason: str, why: str) -> None:
    event = render([delta(content="Hal"), end(reason)])[-1]
    assert event["type"] == "response.incomplete" and event["response"]["incomplete_details"] == {"reason": why}
    assert event["response"]["output"][0]["status"] == "incomplete"


def test_refusals_annotations_pictures_and_logprobs() -> None:
    token = {"token": "Hi", "logprob": -0.1, "bytes": [72, 105], "top_logprobs": []}
    first = delta(content="Hi")
    first["choices"][0]["logprobs"] = {"content": [token], "refusal": None}
    note = {"type": "url_citation", "url_citation": {"url": "https://a"}}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    events = render([first, delta(annotations=[note]), delta(refusal="No."), delta(images=[picture]), end()])
    message, image = events[-1]["response"]["output"]
    assert message["content"] == [
        {
            "type": "output_text",
            "text": "Hi",
            "logprobs": [token],
            "annotations": [
                {"type": "url_citation", "url": "https://a", "title": "", "start_index": 0, "end_index": 0}
            ],
        },
        {"type": "refusal", "refusal": "No."},
    ]
    assert image["type"] == "image_generation_call" and image["result"] == "AA==" and image["status"] == "completed"


def test_opaque_state_travels_through_the_client_and_back() -> None:
    signed = {"type": "thinking", "thinking": "Hm", "signature": "sig+/="}
    google = {"google": {"thought_signature": "s1"}}
    chunks = [
        delta(reasoning_content="Hm"),
        delta(thinking_blocks=[signed]),
        delta(thinking_blocks=[{"type": "redacted_thinking", "data": "d"}]),
        delta(extra_content={"google": {"x": 1}}),
        delta(tool_calls=[piece(0, "c1", "a", "{}", extra_content=google)]),
        end("tool_calls"),
    ]
    output = render(chunks)[-1]["response"]["output"]
    result = {"type": "function_call_output", "call_id": "c1", "output": "ok"}
    message = parse(input=[{"role": "user", "content": "q"}, *output, result])["messages"][1]
    assert message["thinking_blocks"] == [signed, {"type": "redacted_thinking", "data": "d"}]
    assert message["reasoning_content"] == "Hm" and message["extra_content"] == {"google": {"x": 1}}
    assert message["tool_calls"][0]["extra_content"] == google


def test_reasoning_items_pass_unchanged_through_a_responses_client() -> None:
    completion = DIALECT.decode({**ANSWER, "output": [RS, FC1, {**RS, "id": "rs_2"}, FC2]}, translation())
    output = DIALECT.render(completion, {"model": "m"})["output"]
    assert [item["type"] for item in output] == ["reasoning", "function_call", "reasoning", "function_call"]
    assert output[0] == RS
    streamed = render(feed(stream_of(ANSWER)))[-1]["response"]["output"]
    request = parse(input=[{"role": "user", "content": "q"}, *streamed])
    items = [block["item"] for block in request["messages"][1]["thinking_blocks"]]
    assert RS in items and WEB in items


def test_a_plain_answer_equals_the_streamed_one() -> None:
    completion = {
        "id": "chatcmpl-7",
        "created": 9,
        "model": "up",
        "usage": {"prompt_tokens": 1, "completion_tokens": 1},
        "choices": [
            {
                "index": 0,
                "finish_reason": "tool_calls",
                "message": {
                    "role": "assistant",
                    "content": "Hey",
                    "reasoning_content": "Hm",
                    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
                },
            }
        ],
    }
    plain = DIALECT.render(completion, {"model": "m", "instructions": "Be.", "tools": [TOOL]})
    streamed = render(
        [
            delta(reasoning_content="Hm"),
            delta(content="Hey"),
            delta(tool_calls=[piece(0, "c1", "look", "{}")]),
            end("tool_calls"),
            {"choices": [], "usage": completion["usage"]},
        ],
        instructions="Be.",
        tools=[TOOL],
    )[-1]["response"]

    def strip(value: Any) -> Any:
        without = {name: member for name, member in value.items() if name != "id"}
        return {**without, "output": [strip({**item, "output": None}) for item in value["output"] or ()]}

    assert strip(plain) == strip(streamed)
    assert plain["id"] == "resp_7" and len({item["id"] for item in plain["output"]}) == 3


def test_a_failure_ends_the_stream_without_completion() -> None:
    renderer = DIALECT.renderer({"model": "m"}, lambda prefix: f"{prefix}1", 9)
    body = renderer.feed(delta(content="Hal")) + renderer.fail(GatewayError("broke", code="upstream_error"), "req_1")
    events = events_of(body)
    assert kinds(events)[-2:] == ["error", "failed"] and "response.completed" not in body.decode()
    assert (
        events[-2]["error"]["message"] == events[-2]["message"] == "broke"
        and events[-2]["error"]["request_id"] == "req_1"
    )
    failed = events[-1]["response"]
    assert failed["status"] == "failed" and failed["error"] == {"code": "upstream_error", "message": "broke"}
    assert failed["output"][0]["content"][0]["text"] == "Hal" and failed["output"][0]["status"] == "incomplete"
    assert kinds(events_of(DIALECT.renderer({}, str, 1).fail(GatewayError("x"), "r")))[0] == "created"


def test_errors_have_openais_shape() -> None:
    status, body = DIALECT.render_error(InvalidRequest("bad", param="input"), "req_1")
    assert status == 400 and body["error"]["param"] == "input" and body["error"]["type"] == "invalid_request_error"


PIECES = st.one_of(
    st.builds(lambda t: delta(content=t), st.text(max_size=3)),
    st.builds(lambda t: delta(reasoning_content=t), st.text(max_size=3)),
    st.builds(lambda t: delta(refusal=t), st.text(max_size=3)),
    st.builds(
        lambda at, t: delta(tool_calls=[piece(at, f"c{at}", f"f{at}", t)]),
        st.integers(0, 2),
        st.sampled_from(["", "{", "}", "a"]),
    ),
    st.just(delta(thinking_blocks=[{"type": "thinking", "thinking": "x", "signature": "y"}])),
    st.just(delta(thinking_blocks=[{"type": "reasoning_item", "item": RS}])),
    st.just(delta(annotations=[{"type": "url_citation", "url_citation": {"url": "u"}}])),
)


@settings(max_examples=200)
@given(st.lists(PIECES, max_size=12))
def test_any_order_of_deltas_gives_a_sound_stream(chunks: list[Any]) -> None:
    events = render([*chunks, end()])
    final = events[-1]["response"]
    opened = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
    closed = {event["output_index"]: event["item"] for event in events if event["type"] == "response.output_item.done"}
    assert opened == list(range(len(final["output"]))) and [closed[at] for at in opened] == final["output"]
    said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    texts = [part.get("text", "") for item in final["output"] for part in item.get("content") or ()]
    assert "".join(texts) == said
    for at in opened:
        told = "".join(
            e["delta"] for e in events if e.get("output_index") == at and e["type"].endswith("arguments.delta")
        )
        assert final["output"][at].get("arguments", told) in (told, "{}")


# ----- state


def test_a_chain_is_stored_and_resumed() -> None:
    first = {"model": "m", "input": "one", "instructions": "Be."}
    answer = DIALECT.render(
        {"id": "r1", "model": "m", "choices": [{"index": 0, "message": {"content": "eins"}, "finish_reason": "stop"}]},
        first,
    )
    items = s.stored_items(first, answer)
    assert [item["type"] for item in items] == ["message", "message"] and all(item["id"] for item in items)
    second = {"model": "m", "input": [{"role": "user", "content": "two"}], "previous_response_id": answer["id"]}
    resumed = s.resume(second, items)
    assert "previous_response_id" not in resumed and second["input"] == [{"role": "user", "content": "two"}]
    assert [m["content"] for m in DIALECT.parse(resumed, {})["messages"]] == ["one", "eins", "two"]
    assert len(s.stored_items(resumed, answer)) == 4


def test_only_conversation_that_needs_its_own_dialect_is_refused_elsewhere() -> None:
    DIALECT.refuse_elsewhere(
        parse(truncation="auto", tools=[{"type": "web_search"}], input=[{"role": "user", "content": "a"}, RS, WEB, MSG])
    )
    for body, named in (
        ({"previous_response_id": "resp_x"}, "resp_x"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"background": True}, "background"),
        ({"input": [{"type": "compaction", "encrypted_content": "x"}]}, "compaction"),
        ({"input": [{"type": "local_shell_call_output", "id": "x", "output": "y"}]}, "local_shell_call_output"),
    ):
        with pytest.raises(InvalidRequest, match=named):
            DIALECT.refuse_elsewhere(parse(**body))
    shell = {"type": "local_shell_call", "id": "x", "call_id": "y", "action": {}}
    assert DIALECT.encode(parse(input=[shell]), translation())["input"] == [shell]


def test_the_chat_dialect_reads_what_parse_gives() -> None:
    request = parse(instructions="Be.", tools=[TOOL])
    target = translation(provider="groq")
    body = OpenAiChat().encode({k: v for k, v in request.items() if k != "extra_body"}, target)
    assert body["tools"][0]["function"]["strict"] is True and body["messages"][0]["role"] == "system"


# ----- what goes through unchanged, from a Responses client to a Responses provider


def sent(*items: Any, dialect: s.OpenAiResponses = DIALECT, **body: Any) -> Any:
    request = parse(input=[*items, {"role": "user", "content": "q"}], **body)
    return dialect.encode(request, translation("gpt-4.1"))["input"][:-1]


@pytest.mark.parametrize(
    ("content", "back"),
    [
        ([{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "no"}],
         [{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "no"}]),
        ([{"type": "refusal", "refusal": "no"}], [{"type": "refusal", "refusal": "no"}]),
        ([{"type": "output_text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}}],
         [{"type": "output_text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}}]),
    ],
)  # fmt: skip
def test_what_an_assistant_said_comes_back_as_it_was(content: Any, back: Any) -> None:
    assert sent({"role": "assistant", "content": content}) == [{"role": "assistant", "content": back}]


def test_texts_of_one_turn_are_joined_and_marked_parts_stand_behind_them() -> None:
    marked = {"type": "output_text", "text": "b", "prompt_cache_breakpoint": {"mode": "explicit"}}
    turn = [{"role": "assistant", "content": part} for part in ("a", [marked], [{**marked, "text": "c"}])]
    plain = {"type": "output_text", "text": "a"}
    assert sent(*turn) == [{"role": "assistant", "content": [plain, marked, {**marked, "text": "c"}]}]


def test_the_namespace_of_a_call_and_a_result_in_parts_come_back() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "namespace": "mcp", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "blue"}]}
    assert sent(call, result) == [call, {**result, "output": "blue"}]
    parts = {
        "role": "tool",
        "tool_call_id": "c1",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    assert encode(messages=[parts])[0]["input"] == [{**result, "output": "a\nb"}]


def test_later_instructions_and_a_lone_one_stay_items() -> None:
    brief = {"role": "developer", "content": "be brief"}
    assert encode(messages=[brief])[0]["input"] == [brief]
    assert sent({"role": "user", "content": "a"}, brief)[1] == brief
    body, _ = encode(messages=[brief, {"role": "user", "content": "q"}])
    assert body["instructions"] == "be brief" and body["input"] == [{"role": "user", "content": "q"}]


def test_a_refusal_in_a_chat_history_is_a_part() -> None:
    message = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    assert encode(messages=[message])[0]["input"] == [message]


@pytest.mark.parametrize(
    ("choice", "written"),
    [
        ("required", "required"),
        ({"type": "function", "name": "look"}, {"type": "function", "name": "look"}),
        ({"type": "web_search"}, {"type": "web_search"}),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "look"}, {"type": "mcp"}],
            },
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "look"}, {"type": "mcp"}],
            },
        ),
    ],
)
def test_a_choice_of_tools_comes_back_as_it_was(choice: Any, written: Any) -> None:
    body = DIALECT.encode(parse(tools=[TOOL, {"type": "web_search"}], tool_choice=choice), translation())
    assert body["tool_choice"] == written


def test_a_format_of_the_answer_is_chats() -> None:
    assert parse(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}
    assert "response_format" not in parse(text={"format": {"type": "text"}})


def test_the_effort_of_openrouters_clients_is_understood() -> None:
    body, dropped = encode(reasoning={"effort": "low"})
    assert body["reasoning"] == {"effort": "low"} and dropped == []


def test_a_reference_to_a_reference_is_refused() -> None:
    known = {"a": {"type": "item_reference", "id": "b"}}
    with pytest.raises(InvalidRequest, match="another reference"):
        parse(input=[{"type": "item_reference", "id": "a"}], **{s.ITEMS_KEY: known})


def test_a_stored_reference_is_the_item_it_names() -> None:
    item = {"type": "message", "id": "msg_1", "role": "user", "content": "a"}
    request = {"input": [{"type": "item_reference", "id": "msg_1"}], s.ITEMS_KEY: {"msg_1": item}}
    assert s.stored_items(request, {"id": "resp_1", "output": []}) == [item]


# ----- what a stream may hold besides text and calls


def test_the_first_kind_of_reasoning_to_come_is_told() -> None:
    def thought(kind: str, text: str) -> Any:
        return {
            "type": f"response.{kind}.delta",
            "output_index": 0,
            "summary_index": 0,
            "content_index": 0,
            "delta": text,
        }

    raw = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "raw"}], "summary": []}
    message = {
        "type": "message",
        "content": ["odd", {"type": "output_text", "text": "a", "annotations": [{"type": "file_citation"}]}],
    }
    final = {"id": "r", "status": "completed", "output": [raw, message]}
    events = [
        thought("reasoning_text", "raw"), thought("reasoning_summary_text", "short"), thought("reasoning_text", ""),
        {"type": "response.completed", "response": final},
    ]  # fmt: skip
    told = s.join_chunks(feed(events))["choices"][0]["message"]
    assert (told["reasoning_content"], told["content"]) == ("raw", "a")
    assert told["annotations"] == [{"type": "file_citation"}]
    assert [event["annotation"] for event in render([delta(content="a", annotations=told["annotations"])])
            if event["type"] == "response.output_text.annotation.added"] == [{"type": "file_citation"}]  # fmt: skip


def test_perplexitys_reasoning_is_text_alone() -> None:
    answer = {"id": "r", "status": "completed", "output": [RS, MSG]}
    message = PERPLEXITY.decode(answer, translation("sonar"))["choices"][0]["message"]
    assert message["reasoning_content"] == "A\n\nB" and "thinking_blocks" not in message


def test_perplexitys_search_takes_the_options_of_the_retired_chat_api() -> None:
    asked: dict[str, Any] = {"num_search_results": 3, "search_domain_filter": ["a.org"], "language_preference": "de"}
    asked["web_search_options"] = {"search_context_size": "low"}
    body, dropped = encode("openai/gpt-5.5", PERPLEXITY, **asked)
    search = {"search_context_size": "low", "max_results": 3, "filters": {"search_domain_filter": ["a.org"]}}
    assert body["tools"] == [{"type": "web_search", **search}] and body["language_preference"] == "de"
    assert dropped == []


def test_a_picture_is_a_data_uri() -> None:
    picture = {"type": "image_generation_call", "result": "QQ==", "output_format": "webp"}
    failed = {"type": "image_generation_call", "result": None}
    completion = DIALECT.decode({"id": "r", "status": "completed", "output": [picture, failed]}, translation())
    [image] = completion["choices"][0]["message"]["images"]
    assert image["image_url"] == {"url": "data:image/webp;base64,QQ=="}


def test_caps_on_the_output() -> None:
    assert DIALECT.with_output_cap({"a": 1}, 5) == {"a": 1, "max_output_tokens": 5}
    body, dropped = encode(max_tokens=5)
    assert body["max_output_tokens"] == DIALECT.least_output_tokens({}, "gpt-5.5") == 16
    assert dropped == ["max_completion_tokens"]
