"""Server-sent events as they come: in any split, with any line ends; and what flows make of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from conftest import Start
from hypothesis import given
from hypothesis import strategies as st
from upstreams import COMPLETION, GOLDENS, plain, stream

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
    assert [stockyard.shape_of_stream(start) for start in (b"data: [DONE]\n\n", b"", b"x" * 65_536)] == ["", None, ""]


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
