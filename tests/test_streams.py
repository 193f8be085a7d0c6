"""Server-sent events as they come: in any split, with any line ends; and what flows make of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from conftest import Start
from hypothesis import given
from hypothesis import strategies as st
from test_faults import WAYS
from upstreams import COMPLETION, DONE, GOLDENS, USAGE_EVENT, chunk, event, plain, stream

import stockyard

EVENTS = [b"data: a", b"data: b\ndata: c", b": note", b'event: x\ndata: {"y":1}', b"data", b"id: 5\ndata:d"]
TOLD = [("", b"a"), ("", b"b\nc"), None, ("x", b'{"y":1}'), ("", b""), ("", b"d")]


@given(
    st.lists(st.tuples(st.sampled_from(range(len(EVENTS))), st.sampled_from([b"\n", b"\r", b"\r\n"])), max_size=6),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 80), max_size=8),
)
def test_events_are_the_same_in_any_split_with_any_line_ends(
    events: list[tuple[int, bytes]], has_mark: bool, is_cut: bool, cuts: list[int]
) -> None:
    told = [TOLD[at] for at, _ in events if TOLD[at] is not None]
    data = b"".join(EVENTS[at].replace(b"\n", end) + end * 2 for at, end in events)
    if is_cut and events:
        data = data.removesuffix(events[-1][1])  # the last blank line is missing
    data = b"\xef\xbb\xbf" * has_mark + data
    places = sorted({0, *(min(cut, len(data)) for cut in cuts), len(data)})
    reader, runs = stockyard.SseReader(), stockyard.WholeEvents()
    pieces = [data[at:end] for at, end in itertools.pairwise(places)]
    assert [event for piece in pieces for event in reader.feed(piece)] + reader.close() == told
    whole = [runs.feed(piece) for piece in pieces] + [runs.close()]
    assert all(run.endswith(b"\n\n") for run in whole if run)
    assert b"".join(whole) == b"".join(EVENTS[at] + b"\n\n" for at, _ in events)


def test_an_event_without_end_is_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stockyard, "SSE_MAX_EVENT_BYTES", 10)
    runs = stockyard.WholeEvents()
    assert [runs.feed(piece) for piece in (b"data: a\n\ndata: ", b"\nabc")] == [b"data: a\n\n", b""]
    with pytest.raises(stockyard.MalformedStream):
        runs.feed(b"d")


@pytest.mark.parametrize(
    ("block", "told"),
    [
        (b"data: a", ("", b"a")),
        (b"data:a: b", ("", b"a: b")),
        (b"data:  a", ("", b" a")),
        (b"data: a\ndata:\ndata: b", ("", b"a\n\nb")),
        (b"event: x\ndata: a", ("x", b"a")),
        (b"data: a\nevent:x", ("x", b"a")),
        (b"event: x\nevent: y\nid: 5\nretry: 6\ndata", ("y", b"")),
        (b"event: \xff\ndata: a", ("\ufffd", b"a")),
        (b"event: x", None),
        (b": data: a", None),
        (b"datas: a", None),
    ],
)
def test_the_lines_of_an_event(block: bytes, told: tuple[str, bytes] | None) -> None:
    assert stockyard.parse_sse_block(block) == told


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("pieces", "runs"),
    [
        ([BOM + b"data: a\n\n", BOM + b"\n\n"], [b"data: a\n\n", BOM + b"\n\n"]),
        ([BOM[:1], BOM[1:2], BOM[2:] + b"data: a\n", b"\n"], [b"", b"", b"", b"data: a\n\n"]),
        ([BOM, b"data: a\n\n"], [b"", b"data: a\n\n"]),
        ([b"a\r", b"\n\r", b"\nb\r\r", b"\nc", b"\n\n"], [b"", b"a\n\n", b"b\n\n", b"", b"c\n\n"]),
        ([b"a\n\nb\n\nc", b"", b"\n\nd\n\n"], [b"a\n\nb\n\n", b"", b"c\n\nd\n\n"]),
    ],
)
def test_runs_of_whole_events_and_the_mark_at_their_start(pieces: list[bytes], runs: list[bytes]) -> None:
    events = stockyard.WholeEvents()
    assert [events.feed(piece) for piece in pieces] == runs
    assert events.close() == b""


def ask(dialect: str) -> tuple[str, dict[str, Any]]:
    golden = GOLDENS[dialect]
    if dialect == "gemini":
        return f"{golden.path}streamGenerateContent?alt=sse", golden.request
    return golden.path, {**golden.request, "stream": True}


def test_answers_and_events_show_in_whose_words_they_are() -> None:
    for dialect, golden in GOLDENS.items():
        assert stockyard.shape_of(golden.plain) == dialect
        assert stockyard.shape_of_stream(b": hello\n\n" + golden.pieces[0]) == dialect
        assert stockyard.shape_of_stream(golden.pieces[0][:-1]) is None
    for unclear in ([], None, "x", {}, {"object": "list"}, {"object": 5, "type": None}, {"type": "ping"}):
        assert stockyard.shape_of(unclear) == ""
    for told, shape in (
        ({"object": "chat.completion.chunk", "type": "message"}, "openai"),
        ({"object": "response"}, "responses"),
        ({"type": "response.created"}, "responses"),
        ({"type": "message_start", "candidates": []}, "anthropic"),
        ({"candidates": []}, "gemini"),
    ):
        assert stockyard.shape_of(told) == shape
    starts = b"data: [DONE]\n\n", b"", b"x" * 65_535, b"x" * 65_536
    assert [stockyard.shape_of_stream(start) for start in starts] == ["", None, None, ""]


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"delta": {"role": "assistant", "content": ""}}, False),
        ({"delta": {"role": "assistant", "refusal": None}}, False),
        ({"delta": {"content": "x"}}, True),
        ({"delta": {"role": "assistant", "tool_calls": [{}]}}, True),
        ({"delta": {}, "text": "x"}, False),
        ({"text": "x"}, True),
        ({"text": "", "delta": None}, False),
    ],
)
def test_what_is_content(choice: dict[str, Any], says: bool) -> None:
    assert stockyard.has_content(choice) is says


#: By the dialect that a provider speaks, the event that brings the first content, the one that ends it, the very last.
PROGRESS = {"openai": (1, 3, 4), "anthropic": (3, 7, 7), "responses": (3, 8, 8), "gemini": (0, 2, 3)}


def flow_of(way: tuple[str, str, str], translation: stockyard.Translation, asked: bool = True) -> stockyard.Flow:
    """A flow with a tape, whose every usage costs $0.007; `asked` is whether an OpenAI client asked for usage."""
    (client, spoken, _), transcript = way, stockyard.Transcript()
    answers: Any = stockyard.DIALECTS[spoken]
    flow: stockyard.Flow
    if client == spoken == "openai":
        flow = stockyard.OpenAiFlow(answers, translation.provider, asked, transcript, lambda usage: 7_000_000)
    elif client == spoken:
        flow = stockyard.NativeFlow(answers.decoder(translation), transcript, lambda usage: 7_000_000)
    else:
        request = {**GOLDENS[client].request, "stream": True, "stream_options": {"include_usage": asked}}
        renderer = stockyard.DIALECTS[client].renderer(request, translation.new_id, translation.now_s)
        decoder = answers.decoder(translation)
        flow = stockyard.TranslatingFlow(decoder, renderer, transcript, lambda usage: 7_000_000)
    flow.tape = stockyard.Tape(1 << 20)
    return flow


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0]} over {way[1]}")
def test_a_flow_learns_its_answer_as_it_comes(way: tuple[str, str, str], at_once: bool, attempt: Any) -> None:
    client, spoken, _ = way
    pieces = [b"".join(GOLDENS[spoken].pieces)] if at_once else GOLDENS[spoken].pieces
    flow = flow_of(way, attempt("m", stream=True))
    content, complete, ended = PROGRESS[spoken]
    for at, piece in enumerate(pieces):
        flow.feed(piece)
        at = len(GOLDENS[spoken].pieces) - 1 if at_once else at
        last = ended + (client == spoken == "openai")  # there, only [DONE] is the last word
        assert (flow.content_seen, flow.complete, flow.has_ended) == (at >= content, at >= complete, at >= last)
    flow.close()
    assert (flow.content_seen, flow.complete, flow.has_ended) == (True, True, True)
    assert (flow.finish_reason, flow.finishes, flow.usage) == ("stop", {"stop"}, stockyard.Usage(10, output_tokens=5))
    assert flow.answer_id == (NAMES.get(spoken, "") if client == spoken else "")
    [choice] = flow.transcript.completion()["choices"]
    said = 'Hello "there" é中' if spoken == "openai" else "Hello there"
    assert (choice["message"]["content"], choice["finish_reason"]) == (said, "stop")


NAMES = {"anthropic": "msg_1", "responses": "resp_1", "gemini": "r1"}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0]} over {way[1]}")
def test_a_tape_holds_what_was_told_free_of_charge_and_the_usage_for_who_asks(
    way: tuple[str, str, str], attempt: Any
) -> None:
    client, spoken, _ = way
    tapes = []
    for asked in (True, False):
        flow = flow_of(way, attempt("m", stream=True), asked)
        told = b"".join([flow.feed(piece) for piece in GOLDENS[spoken].pieces]) + flow.close()
        assert flow.tape is not None and flow.tape.whole
        first, usage, last = flow.tape.parts()
        tapes.append(first + usage + last)
        assert (b'"usage":{"prompt_tokens":10' in usage) == (client == "openai")
        free = told.replace(b'"cost":0.007', b'"cost":0')
        assert (free != told) == (asked if client == "openai" else client == "anthropic" != spoken)
        assert free == (first + usage + last if asked or client != "openai" else first + last)
    assert tapes[0] == tapes[1]


def begun(attempt: Any, asked: bool = True) -> stockyard.Flow:
    flow = flow_of(WAYS[0], attempt("m", stream=True), asked)
    assert flow.feed(chunk({"content": "Hello"})) == chunk({"content": "Hello"})
    return flow


@pytest.mark.parametrize("alone", [True, False])
def test_nothing_that_tells_something_passes_unread_behind_the_first_content(attempt: Any, alone: bool) -> None:
    text = b"" if alone else chunk({"content": " there"})
    for error in (event({"error": {"message": "oh", "code": 503}}), event({"x_groq": {"error": {"message": "oh"}}})):
        with pytest.raises(stockyard.UpstreamError):
            begun(attempt).feed(text + error)
    flow = begun(attempt)
    assert flow.feed(text + chunk({}, "stop")) == text + chunk({}, "stop")
    assert (flow.finish_reason, flow.complete, flow.has_ended) == ("stop", True, False)
    assert flow.feed(text + DONE + text) == text + DONE + text
    assert flow.has_ended and flow.close() == b""
    flow = begun(attempt)
    assert flow.feed(text + chunk({}, "end_turn")) == text + chunk({}, "stop")
    assert flow.feed(text + b": ping\n\n") == text + b": ping\n\n"
    assert flow.close() == DONE
    flow = begun(attempt)
    assert (flow.close(), flow.complete) == (b"", False)
    for asked in (True, False):
        flow = begun(attempt, asked)
        alongside = chunk({"content": "!"}, usage={"prompt_tokens": 1, "completion_tokens": 2})
        shown = flow.feed(text + alongside)
        assert shown == (text + alongside.replace(b":2}", b':2,"cost":0.007}') if asked else text + alongside)
        assert flow.usage == stockyard.Usage(1, output_tokens=2)
        assert flow.feed(text + USAGE_EVENT) == text + (
            USAGE_EVENT.replace(b"15}", b'15,"cost":0.007}') if asked else b""
        )
        groq = event({"x_groq": {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}, "choices": []})
        assert flow.feed(text + groq) == text + (groq if asked else b"")
        assert flow.usage == stockyard.Usage(3, output_tokens=4)
    said = flow.transcript.completion()["choices"][0]["message"]["content"]
    assert said == ("Hello!" if alone else "Hello there! there there")


def test_thought_signatures_are_gathered_by_call(attempt: Any) -> None:
    flow = begun(attempt)
    signed = {"extra_content": {"google": {"thought_signature": "s1"}}}
    calls = [{"id": "c1", **signed}, {"id": "c2"}, {"id": "c3", "extra_content": {"google": None}}, signed]
    flow.observe({"choices": [{"delta": {"tool_calls": calls}}]})
    flow.observe({"choices": [{"delta": {"tool_calls": [{"id": "c4", **signed}]}}, {"delta": None}]})
    assert flow.signatures == {"c1": "s1", "c4": "s1"}


@pytest.mark.parametrize("dialect", GOLDENS)
async def test_a_stream_that_passes_unchanged_is_counted_all_the_same(start: Start, dialect: str) -> None:
    given = {f"{name}_BASE_URL": "UPSTREAM" for name in ("ANTHROPIC", "GEMINI")}
    async with start(**given, ANTHROPIC_API_KEY="k", GOOGLE_API_KEY="k") as proxy:
        proxy.upstream.answers = [stream(GOLDENS[dialect].pieces)]
        assert (await proxy.post(*ask(dialect)))[0] == 200
        [row] = await proxy.rows()
    told = row["input_tokens"] + row["cached_tokens"], row["output_tokens"], row["finish_reason"], row["priced"]
    assert told == (10, 5, "stop", True)


async def test_a_streamed_response_is_its_makers_to_fetch(start: Start) -> None:
    async with start() as proxy:
        proxy.upstream.answers = [stream(GOLDENS["responses"].pieces), plain(GOLDENS["responses"].plain)]
        await proxy.post(*ask("responses"))
        path = f"/v1/responses/{GOLDENS['responses'].plain['id']}"
        async with proxy.session.get(proxy.url + path) as answer:
            assert (answer.status, proxy.upstream.seen[-1].path) == (200, path)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("model", ["echo", "gpt-4o-mini"])
@pytest.mark.parametrize(("asked", "kept"), [({}, True), ({"store": True}, True), ({"store": False}, False)])
async def test_an_answer_that_is_not_to_be_stored_is_not(
    start: Start, asked: dict[str, Any], kept: bool, model: str, streamed: bool
) -> None:
    async with start() as proxy:
        golden = GOLDENS["responses"]
        proxy.upstream.answers = [stream(golden.pieces) if streamed else plain(golden.plain)]
        body = {"model": model, "input": "a secret", "stream": streamed, **asked}
        assert (await proxy.post("/v1/responses", body))[0] == 200
        await proxy.gateway.store.flush()
        assert len(proxy.gateway.store.read("SELECT id FROM responses")) == kept


@pytest.mark.parametrize("wrong", ["", 5, None])
async def test_an_answer_without_a_name_is_kept_under_none(start: Start, wrong: Any) -> None:
    async with start() as proxy:
        golden = GOLDENS["responses"]
        proxy.upstream.answers = [plain({**golden.plain, "id": wrong})]
        assert (await proxy.post(golden.path, golden.request))[0] == 200
        await proxy.gateway.store.flush()
        assert proxy.gateway.store.read("SELECT id FROM responses") == []


async def test_what_stockyard_keeps_of_a_conversation_goes_to_any_provider_in_full(start: Start) -> None:
    async with start() as proxy:
        _, _, first = await proxy.post("/v1/responses", {"model": "echo", "input": "one"})
        reference = {"type": "item_reference", "id": first["output"][-1]["id"]}
        for body in ({"input": "two", "previous_response_id": first["id"]}, {"input": [reference]}):
            proxy.upstream.answers = [plain(COMPLETION)]
            status, _, told = await proxy.post("/v1/responses", {"model": "gpt-4o-mini", **body})
            sent = proxy.upstream.seen[-1].body.decode()
            assert (status, told["status"]) == (200, "completed")
            assert "Echo: one" in sent and first["id"] not in sent and reference["id"] not in sent
