"""The rows of providers: that each means something, what they change in bodies, and which variables turn them on."""

import json
import re
from typing import Any

import pytest
from conftest import Start
from upstreams import plain

import stockyard

ROWS = stockyard.PROVIDERS_BY_ID
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
ANSWER = {
    "id": "x", "object": "chat.completion", "created": 1, "model": "m", "usage": {"prompt_tokens": 1, "completion_tokens": 1},
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def test_no_id_stands_twice() -> None:
    assert len(ROWS) == len(stockyard.PROVIDERS)


@pytest.mark.parametrize("row", stockyard.PROVIDERS, ids=lambda row: row.id)
def test_a_row_means_something(row: stockyard.Provider) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", row.id)
    assert row.dialect in stockyard.DIALECTS
    assert row.also_speaks <= stockyard.DIALECTS.keys()
    assert re.match(r"https://|http://localhost|builtin:|\{[A-Z_]+\}/", row.base_url)
    assert row.drops | row.foreign_drops | row.renames.keys() | row.adapts <= stockyard.OPENAI_PARAMETERS
    assert row.offers <= row.paths.keys()
    assert row.stream_usage in ("stream_options", "always")
    assert not row.pattern or not re.compile(row.pattern, re.IGNORECASE).match("")


def called(call_id: str, **members: Any) -> list[dict[str, Any]]:
    """A history with one tool call of this id and its result."""
    call = {"id": call_id, "type": "function", "function": {"name": "look", "arguments": "{}"}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call], **members}
    return [*CHAT["messages"], turn, {"role": "tool", "tool_call_id": call_id, "content": "seen"}]


async def sent(start: Start, provider: str, variable: str, asked: dict[str, Any]) -> tuple[Any, str]:
    """What an OpenAI client's chat call becomes on its way to a provider, and what its answer says was dropped."""
    async with start(**{f"{variable}_API_KEY": "k", f"{variable}_BASE_URL": "UPSTREAM"}) as proxy:
        proxy.upstream.answers = [plain(ANSWER)]
        status, headers, told = await proxy.post("/v1/chat/completions", {**CHAT, **asked, "model": f"{provider}/m"})
        assert status == 200, told
        return proxy.upstream.seen[0].json, headers.get("x-stockyard-dropped", "")


async def test_mistral_gets_ids_and_choices_it_takes(start: Start) -> None:
    foreign, own = called("call_of_another_provider"), called("Ab3dEf6h9")
    body, _ = await sent(start, "mistral", "MISTRAL", {"messages": foreign, "tools": [TOOL], "tool_choice": "required"})
    written = body["messages"][1]["tool_calls"][0]["id"]
    assert re.fullmatch(r"[A-Za-z0-9]{9}", written)
    assert body["messages"][2]["tool_call_id"] == written
    assert (body["tool_choice"], len(body["tools"])) == ("any", 1)
    body, _ = await sent(start, "mistral", "MISTRAL", {"messages": own, "tools": [TOOL], "tool_choice": "none"})
    assert body["messages"][1]["tool_calls"][0]["id"] == body["messages"][2]["tool_call_id"] == "Ab3dEf6h9"
    assert not body.keys() & {"tools", "tool_choice"}


async def test_groq_gets_one_choice_and_no_names(start: Start) -> None:
    body, dropped = await sent(
        start, "groq", "GROQ", {"n": 2, "messages": [{"role": "user", "name": "ann", "content": "hi"}], "top_p": 0.5}
    )
    assert body == {"model": "m", "messages": CHAT["messages"], "n": 1, "top_p": 0.5}
    assert dropped == "n,messages.name"


async def test_deepseek_gets_reasoning_beside_every_call(start: Start) -> None:
    body, _ = await sent(start, "deepseek", "DEEPSEEK", {"messages": called("c", reasoning="hm") + called("d")})
    told = [message.get("reasoning_content") for message in body["messages"] if message["role"] == "assistant"]
    assert told == ["hm", ""]


async def test_a_door_that_a_provider_lacks_is_named(start: Start) -> None:
    async with start(ANTHROPIC_API_KEY="k", ANTHROPIC_BASE_URL="UPSTREAM") as proxy:
        status, _, told = await proxy.post("/v1/moderations", {"model": "anthropic/claude-sonnet-4-6", "input": "x"})
    assert (status, told["error"]["code"]) == (404, "unsupported_endpoint")
    assert "Anthropic offers no moderations" in told["error"]["message"]
    with pytest.raises(stockyard.NotFound, match="Anthropic offers no image edits endpoint"):
        ROWS["anthropic"].path("image_edits", "m")


async def test_tokens_that_bedrock_counts_in_a_header_are_what_a_call_costs(start: Start) -> None:
    variables = {"AWS_BEARER_TOKEN_BEDROCK": "k", "BEDROCK_BASE_URL": "UPSTREAM"}
    counted = plain({"embeddings": {"float": [[0.5]]}}, **{"x-amzn-bedrock-input-token-count": "9"})
    nova = plain({"embeddings": [{"embedding": [0.5]}]}, **{"x-amzn-bedrock-input-token-count": "9"})
    async with start(**variables) as proxy:
        for model, texts, answers, tokens in (
            ("cohere.embed-english-v3", ["a text of more than nine words", "b"], [counted], 9),
            ("amazon.nova-2-multimodal-embeddings-v1:0", ["a", "b"], [nova, nova], 18),
        ):
            proxy.upstream.answers = answers
            status, _, told = await proxy.post("/v1/embeddings", {"model": f"bedrock/{model}", "input": texts})
            assert (status, told["usage"]["prompt_tokens"]) == (200, tokens)
        assert [row["input_tokens"] for row in await proxy.rows()] == [9, 18]


@pytest.mark.parametrize(
    ("given", "usual", "fitted"),
    [
        ("0.0.0.0:11434", "http://localhost:11434/v1", "http://127.0.0.1:11434/v1"),
        ("http://h/v1/", "https://api.openai.com/v1", "http://h/v1"),
        ("http://h/v1/v1", "https://api.openai.com/v1", "http://h/v1"),
        ("http://h", "https://api.openai.com/v1", "http://h/v1"),
        ("http://h/v1beta", "https://generativelanguage.googleapis.com", "http://h"),
        ("http://h/proxy", "https://api.anthropic.com", "http://h/proxy"),
        ("http://h/v2", "https://api.example.com/v4", "http://h/v2"),
    ],
)
def test_base_urls_are_brought_to_the_form_of_the_table(given: str, usual: str, fitted: str) -> None:
    assert stockyard.fit_base_url(given, usual) == fitted


@pytest.mark.parametrize("given", ["ftp://h", "http:///v1", "unix:///run/x"])
def test_what_is_no_base_url_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="is no http or https URL"):
        stockyard.fit_base_url(given, "https://api.openai.com/v1")


AWS = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "s"}


@pytest.mark.parametrize(
    ("provider", "variables", "told"),
    [
        ("openai", {}, None),
        ("openai", {"OPENAI_API_KEY": " a, b,"}, ("https://api.openai.com/v1", ("a", "b"), "OPENAI_API_KEY")),
        ("ollama", {"OLLAMA_HOST": "h:1"}, ("http://h:1/v1", (), "OLLAMA_HOST")),
        ("ollama", {"OLLAMA_API_KEY": "k"}, ("https://ollama.com/v1", ("k",), "OLLAMA_API_KEY")),
        ("vertex", {"VERTEX_ACCESS_TOKEN": "t"}, None),
        (
            "vertex", {"VERTEX_ACCESS_TOKEN": "t", "GOOGLE_CLOUD_PROJECT": "p"},
            ("https://aiplatform.googleapis.com", ("t",), "VERTEX_ACCESS_TOKEN"),
        ),
        ("bedrock", {"AWS_ACCESS_KEY_ID": "AKIA"}, None),
        (
            "bedrock", {**AWS, "AWS_REGION": "eu-west-1"},
            ("https://bedrock-runtime.eu-west-1.amazonaws.com", ("AKIA",), "AWS_ACCESS_KEY_ID"),
        ),
        ("github_models", {"GITHUB_MODELS_BASE_URL": "http://h"}, None),
        ("echo", {}, ("builtin:echo", (), "built in")),
    ],
)  # fmt: skip
def test_variables_turn_a_provider_on(provider: str, variables: dict[str, str], told: Any) -> None:
    found = stockyard.configure_provider(ROWS[provider], variables)
    assert (found and (found.base_url, found.keys, found.source)) == told


def test_rows_are_filled_from_variables() -> None:
    vertex = stockyard.configure_provider(ROWS["vertex"], {
        "GOOGLE_APPLICATION_CREDENTIALS": "/f.json", "GOOGLE_CLOUD_PROJECT": "p", "GOOGLE_CLOUD_LOCATION": "europe-west4",
    })  # fmt: skip
    assert vertex is not None
    assert vertex.row.key_is_file
    path = "/v1/projects/p/locations/europe-west4/publishers/google/models/gemini-3-flash:generateContent"
    assert vertex.row.path("chat", "gemini-3-flash") == path
    bedrock = stockyard.configure_provider(ROWS["bedrock"], {**AWS, "AWS_SESSION_TOKEN": "t"})
    assert bedrock is not None
    assert bedrock.credentials == stockyard.Credentials("AKIA", "s", "t", "us-east-1", "bedrock")
    openai = stockyard.configure_provider(ROWS["openai"], {"OPENAI_API_KEY": "k", "OPENAI_ORG_ID": "o"})
    assert openai is not None
    assert openai.headers == {"openai-organization": "o"}


def test_the_variables_to_set_are_named() -> None:
    named = {name: stockyard.enabling_variable(ROWS[name]) for name in ("openai", "vertex", "ollama")}
    assert named == {
        "openai": "OPENAI_API_KEY", "ollama": "OLLAMA_BASE_URL",
        "vertex": "GOOGLE_CLOUD_PROJECT and GOOGLE_APPLICATION_CREDENTIALS",
    }  # fmt: skip


async def test_the_newest_openai_models_get_the_cap_they_take(start: Start) -> None:
    asked = {**CHAT, "max_tokens": 5}
    async with start() as proxy:
        proxy.upstream.answers = [plain(ANSWER), plain(ANSWER)]
        for model in ("gpt-5", "gpt-4o"):
            assert (await proxy.post("/v1/chat/completions", {**asked, "model": model}))[0] == 200
        newest, older = (json.loads(seen.body) for seen in proxy.upstream.seen)
    assert (newest["max_completion_tokens"], "max_tokens" in newest) == (5, False)
    assert older["max_tokens"] == 5


def test_every_provider_is_on_by_the_key_of_its_own_name() -> None:
    keyed = [row for row in stockyard.PROVIDERS if row.key_env and not row.key_is_file and row.id != "vertex"]
    for row in keyed:
        variables = {f"{row.id.upper()}_API_KEY": "k", f"{row.id.upper()}_BASE_URL": "http://127.0.0.1:9/v1"}
        found = stockyard.configure_provider(row, variables)
        assert found is not None, row.id
        assert found.keys == ("k",), row.id
    assert len(keyed) > 20
