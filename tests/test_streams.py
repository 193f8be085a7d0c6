"""Server-sent events as they come: in any split, with any line ends; and what flows make of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
