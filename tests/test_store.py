"""The log: rows that a kill does not lose, a writer that waits for its disk, bounds, filters, sums, and copies."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import hashlib
import http.client
import io
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import Start
from hypothesis import given
from hypothesis import strategies as st
from upstreams import COMPLETION, STREAM, plain, stream

import stockyard
from stockyard import Call, Endpoint, Journal, LogStore, Usage

CHAT = Endpoint("chat", "/v1/chat/completions", streams=True)
NOW_MS = 1_790_000_000_000
DAY_MS = 86_400_000
Make = Callable[..., Call]


@pytest.fixture
def make() -> Make:
    """Makes calls that have ended; each a millisecond after the one before unless it is told."""
    clock = [NOW_MS]
    new_id = stockyard.IdSource(lambda: clock[0], random.Random(7).getrandbits)

    def call(ts_ms: int | None = None, **fields: Any) -> Call:
        clock[0] = clock[0] + 1 if ts_ms is None else ts_ms
        body, headers = fields.pop("body", b'{"model":"m"}'), fields.pop("headers", {})
        made = Call(new_id("req_"), clock[0], 1.0, CHAT, headers, body)
        told = {"status": 200, "model": "m", "provider": "p", "upstream_model": "u", "ended_s": 1.5, "cache": "miss",
                "usage": Usage(10, output_tokens=5), "cost_nanousd": 100, "answer": b'{"ok":true}'}  # fmt: skip
        for name, value in {**told, **fields}.items():
            setattr(made, name, value)
        return made

    return call


@contextlib.contextmanager
def opened(path: Path, **options: Any) -> Iterator[LogStore]:
    store = LogStore(path / "stockyard.db", **options)
    store.put_balances = lambda _: None
    store.turn()
    try:
        yield store
    finally:
        store.turn()
        store.close()


def committed(store: LogStore) -> None:
    asyncio.run(store.flush())


def ids(store: LogStore, limit: int = 1000, **wanted: str) -> list[str]:
    return [row["id"] for row in stockyard.find_page(store, wanted, limit, NOW_MS).rows]


def until(holds: Callable[[], Any]) -> None:
    """Wait for another thread, long enough for a busy machine."""
    deadline_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


# -- nothing is lost


def test_a_start_takes_over_what_the_last_process_only_told_its_journal(tmp_path: Path, make: Make) -> None:
    journal = Journal(tmp_path, 3, False)
    ended, open_call, refused = make(tags="team=a"), make(session="s1"), make(status=429, error="rate_limit_exceeded")
    for call in (ended, open_call):
        journal.begin(call.id, stockyard.intent_line(call))
    for call in (ended, refused):
        journal.end(call.id, stockyard.dump_json(tuple(stockyard.log_row(call))))
    os.write(journal._file, b'["req_cut')  # what a kill may leave of a line
    journal.close()
    kept = (tmp_path / "ledger-00000003.journal").read_bytes()
    with opened(tmp_path) as store:
        committed(store)
        assert ids(store) == [refused.id, open_call.id, ended.id]
        assert store.crashed_rows == 1
        [row] = stockyard.find_page(store, {"error": "crashed"}, 10, NOW_MS).rows
        shown = stockyard.public_row(row)
        assert (shown["id"], shown["status"], shown["session"], shown["cost_usd"]) == (open_call.id, 500, "s1", None)
        assert stockyard.public_row(stockyard.find_row(store, ended.id))["tags"] == "team=a"  # type: ignore[arg-type]
    assert not [*tmp_path.glob("*.journal")]
    (tmp_path / "calls-00000009.journal").write_bytes(kept)  # as if the kill had come right after the commit
    with opened(tmp_path) as store:
        committed(store)
        assert len(ids(store)) == 3
        assert sum(row["requests"] for row in stockyard.find_spend(store, "model", {}, NOW_MS)) == 3


def test_journals_turn_and_go_once_their_rows_are_committed(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Journal, "TURN_BYTES", 2000)
    with opened(tmp_path) as store:
        under_way = make()
        store.begin(under_way)
        for _ in range(50):
            store.put(make())
        committed(store)
        until(lambda: len([*tmp_path.glob("*.journal")]) == 1)
        _, intents = Journal.leftovers(tmp_path)
        assert [intent[0] for intent in intents] == [under_way.id]
        assert len(ids(store)) == 50
        store.put(under_way)


def test_a_full_disk_keeps_rows_waiting_and_is_forgotten_when_there_is_room(tmp_path: Path, make: Make) -> None:
    with opened(tmp_path) as store:
        store._connection.execute("PRAGMA max_page_count = 1")
        calls = [make(body=os.urandom(9000)) for _ in range(20)]
        for call in calls:
            store.put(call)
        until(store.trouble)
        assert "full" in store.trouble()
        store._connection.execute("PRAGMA max_page_count = 1000000")
        committed(store)
        assert (store.trouble(), sorted(ids(store)), store.lost_rows) == ("", sorted(call.id for call in calls), 0)


def test_a_foreign_lock_is_waited_for(tmp_path: Path, make: Make) -> None:
    with opened(tmp_path) as store:
        store._connection.execute("PRAGMA busy_timeout = 20")
        foreign = sqlite3.connect(tmp_path / "stockyard.db", isolation_level=None)
        foreign.execute("BEGIN EXCLUSIVE")
        store.put(call := make())
        until(store.trouble)
        with pytest.raises(stockyard.StorageUnavailable):
            asyncio.run(store.flush(0.05))
        foreign.execute("ROLLBACK")
        foreign.close()
        committed(store)
        assert ids(store) == [call.id]


def test_what_a_stop_cannot_write_stays_for_the_next_start(tmp_path: Path, make: Make) -> None:
    with opened(tmp_path) as store:
        store._connection.execute("PRAGMA max_page_count = 1")
        call = make(body=os.urandom(90_000))
        store.put(call)
        until(store.trouble)
    assert [*tmp_path.glob("*.journal")]
    with opened(tmp_path) as store:
        committed(store)
        assert ids(store) == [call.id]


def test_a_journal_without_room_refuses_no_call_and_says_so_until_there_is(tmp_path: Path, make: Make) -> None:
    with opened(tmp_path) as store:
        journal, good = store.journal, store.journal._file
        journal._file = os.open("/dev/full", os.O_WRONLY)
        store.begin(call := make())
        assert "journal" in store.trouble()
        os.close(journal._file)
        journal._file = good
        assert store.trouble() == ""
        store.put(call)
        committed(store)
        assert ids(store) == [call.id]


def test_one_row_that_cannot_be_written_takes_no_other_with_it(tmp_path: Path, make: Make) -> None:
    with opened(tmp_path) as store:
        odd = [make(model="\ud800"), make(usage=Usage(2**70)), make(cost_nanousd=object())]
        twin = make()
        twin.id = twin.id[:-8] + "zzzzzzzz"  # of another process: the same millisecond, the same count
        first = make(ts_ms=twin.ts_ms)
        first.id = twin.id[:-8] + "00000000"
        for call in [*odd, first, twin]:
            store.put(call)
        committed(store)
        assert {first.id, twin.id, odd[0].id, odd[1].id} <= set(ids(store))
        assert (store.trouble(), stockyard.find_row(store, twin.id)["id"]) == ("", twin.id)  # type: ignore[index]


def test_calls_are_refused_when_too_much_waits(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stockyard, "QUEUE_MAX_BYTES", 100_000)
    with opened(tmp_path) as store:
        store._connection.execute("PRAGMA max_page_count = 1")
        while not store.is_full:
            store.put(make(body=bytes(9000)))
        store._connection.execute("PRAGMA max_page_count = 1000000")
        committed(store)
        assert not store.is_full


def test_fsyncs_are_shared_and_their_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []

    async def run() -> None:
        journal = Journal(tmp_path, 1, True)
        monkeypatch.setattr(os, "fsync", synced.append)
        await asyncio.gather(*(journal.synced() for _ in range(50)))
        assert 1 <= len(synced) <= 2

        def fail(_: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(stockyard.StorageUnavailable):
            await journal.synced()
        journal.close()

    asyncio.run(run())


#: What happens in order, to a call whose first try its provider refuses; with a budget each try has a hold, and a line.
STEPS = {
    ("process", ""): "begin send send end",
    ("process", "1/day"): "begin send begin send end",
    ("full", ""): "begin fsync send send end fsync",
    ("full", "1/day"): "begin fsync send begin fsync send end fsync",
}


@pytest.mark.parametrize(("durability", "budget"), STEPS)
async def test_a_call_has_its_line_before_it_leaves_and_its_row_before_its_answer_ends(
    start: Start, durability: str, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start(durability=durability, budget=budget, cache="off") as proxy:
        steps: list[str] = []
        store, upstream = proxy.gateway.store, proxy.gateway.upstream
        for owner, name in ((store.journal, "begin"), (store.journal, "end"), (upstream, "send"), (os, "fsync")):
            real = getattr(owner, name)

            def note(*given: Any, _name: str = name, _real: Any = real) -> Any:
                steps.append(_name)
                return _real(*given)

            monkeypatch.setattr(owner, name, note)
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 10}
        for answer in (plain(COMPLETION), stream(STREAM)):
            proxy.upstream.answers = [plain({"error": {"message": "overloaded"}}, 503), answer]
            status, _, _ = await proxy.post("/v1/chat/completions", {**body, "stream": answer.chunked})
            assert (status, steps) == (200, STEPS[durability, budget].split())
            steps.clear()
        assert len(await proxy.rows()) == 2


def test_kill_dash_nine_under_load_loses_no_acknowledged_call(tmp_path: Path) -> None:
    acknowledged: set[str] = set()
    for round_number in range(3):
        kill_under_load(tmp_path, 0.2 + 0.15 * round_number, acknowledged)
        with opened(tmp_path) as store:
            committed(store)
            found = {row["id"] for row in store.read("SELECT id FROM calls")}
            assert acknowledged <= found
            assert store.read("PRAGMA integrity_check")[0][0] == "ok"
            rows = store.read("SELECT COUNT(*) AS n FROM calls")[0]["n"]
            assert rows == store.read("SELECT SUM(requests) AS n FROM rollups WHERE tag = '' AND span_s = 3600")[0]["n"]
    assert acknowledged


def kill_under_load(path: Path, after_s: float, acknowledged: set[str]) -> None:
    """Start a proxy, let four clients call it, kill it; note every call whose whole answer arrived."""
    environment = {"PATH": os.environ["PATH"], "STOCKYARD_DATA_DIR": str(path), "STOCKYARD_PORT": "0"}
    command = [sys.executable, stockyard.__file__, "serve"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        assert run.stdout is not None
        host = next(word for word in run.stdout.readline().split() if "://" in word).split("//")[1].rstrip(",")

        def ask(stream: bool) -> None:
            body = json.dumps({"model": "echo", "stream": stream, "messages": [{"role": "user", "content": "a b c"}]})
            connection = http.client.HTTPConnection(host, timeout=10)
            with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
                while True:
                    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
                    with connection.getresponse() as answer:
                        answer.read()
                    acknowledged.add(answer.headers["x-stockyard-request-id"])

        clients = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(4)]
        for client in clients:
            client.start()
        time.sleep(after_s)
        run.send_signal(signal.SIGKILL)
        for client in clients:
            client.join()


# -- starts


def test_what_a_dead_process_left_refuses_no_call(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as store:
        calls = [make() for _ in range(20)]
        monkeypatch.setattr(store, "_take", stockyard.Group)  # commits nothing, as one that is killed
        for call in calls:
            store.put(call)
        shutil.copytree(tmp_path, tmp_path / "left")
        monkeypatch.undo()
    monkeypatch.setattr(stockyard, "QUEUE_MAX_ROWS", 10)
    monkeypatch.setattr(stockyard.LogStore, "_run", lambda store: None)
    store = LogStore(tmp_path / "left" / "stockyard.db")
    assert (store.queued_rows, store.is_full) == (20, False)
    store.close()
    monkeypatch.undo()
    with opened(tmp_path / "left") as store:
        committed(store)
        assert (len(ids(store)), store.queued_rows) == (20, 0)


def test_an_older_database_keeps_its_rows_its_bodies_and_its_sums(tmp_path: Path, make: Make) -> None:
    call = make()
    old = sqlite3.connect(tmp_path / "stockyard.db", isolation_level=None)
    for number, script in enumerate(stockyard.MIGRATIONS[:4], 1):
        old.executescript(f"{script} PRAGMA user_version = {number};")
    old.execute("INSERT INTO blocks VALUES (1, 0, ?)", (b'{"q":1}{"a":2}',))
    row = (
        7, call.id, call.ts_ms, "key_1", "team=a", "openai", "/v1/chat/completions", "m", "p", "u", 0, 200, "", "miss", 1, 10, 5,
        0, 0, 0, 123, "price", 1.5, None, 0.5, 0, "", "stop", "127.0.0.1", "agent", "", "", "", "", 1, 0, 7, 7,
    )  # fmt: skip
    marks = ", ".join("?" * len(row))
    old.execute(f"INSERT INTO requests VALUES ({marks})", row)  # noqa: S608 - question marks only
    old.close()
    with opened(tmp_path) as store:
        found = stockyard.find_request(store, call.id)
        assert found is not None
        assert (found["request"], found["response"], found["cost_usd"]) == ({"q": 1}, {"a": 2}, 123e-9)
        [spent] = stockyard.find_spend(store, "key", {}, NOW_MS)
        assert (spent["key"], spent["requests"], spent["cost_usd"]) == ("key_1", 1, 123e-9)
        for by, name in (
            ("status", 200),
            ("endpoint", "/v1/chat/completions"),
        ):  # of which earlier schemas had no points
            assert stockyard.find_spend(store, by, {}, NOW_MS) == [
                {by: name, **{what: spent[what] for what in spent if what != "key"}}
            ]


def test_a_migration_that_may_take_long_says_so(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with opened(tmp_path, tell=told.append) as store:  # a new one has none
        for _ in range(3):
            store.put(make())
    newest = len(stockyard.MIGRATIONS)
    monkeypatch.setattr(stockyard, "MIGRATIONS", (*stockyard.MIGRATIONS, "SELECT 1;"))
    monkeypatch.setattr(stockyard, "MIGRATION_TOLD_ROWS", 4)
    with opened(tmp_path, tell=told.append):
        assert told == []
    monkeypatch.setattr(stockyard, "MIGRATIONS", (*stockyard.MIGRATIONS, "SELECT 1;"))
    monkeypatch.setattr(stockyard, "MIGRATION_TOLD_ROWS", 3)
    with opened(tmp_path, tell=told.append):
        begun, ended = told
        assert (
            begun
            == f"migrating stockyard.db from version {newest + 1} to {newest + 2}; 0.0 million rows, may take minutes"
        )
        assert ended.startswith(f"migrated stockyard.db to version {newest + 2} in ")
    with opened(tmp_path, tell=told.append):
        assert len(told) == 2


def digest_of(*scripts: str) -> str:
    return hashlib.sha256("".join(scripts).encode()).hexdigest()[:16]


def test_no_published_migration_is_edited() -> None:
    """Databases exist that ran these: a change of the schema is a further migration, and a further line here."""
    assert [*map(digest_of, stockyard.MIGRATIONS)] == [
        "c024d1e93f66ec56",
        "85d4ef7155ac8408",
        "1d63fef0173b05d4",
        "0c1f17006f7840b4",
        "831e619f5c2ec385",
        "4b3e33fd279f115d",
        "049a3970596d5582",
        "eb7ce4341f44c2af",
        "60357db7258f13fe",
        "318ffb02cb0053fb",
        "cf0aba815e1ed4d9",
        "1e6f5ba3bbdb4a8d",
        "61a2c5e737270e9c",
        "ed86cb53c30c5170",
        "d8abd66a5014a99e",
    ]


@pytest.fixture(scope="module")
def newest_schema(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    return schema_of(tmp_path_factory.mktemp("newest"))


def schema_of(path: Path) -> set[tuple[str, str]]:
    """The tables and indexes of a database after a start, white space aside."""
    with opened(path) as store:
        rows = store.read("SELECT name, COALESCE(sql, '') FROM sqlite_schema")
        assert store.read("PRAGMA user_version")[0][0] == len(stockyard.MIGRATIONS)
        return {(name, " ".join(sql.split())) for name, sql in rows}


@pytest.mark.parametrize("version", range(len(stockyard.MIGRATIONS) + 1))
def test_a_database_of_every_older_schema_ends_with_the_newest(
    tmp_path: Path, version: int, newest_schema: set[tuple[str, str]]
) -> None:
    old = sqlite3.connect(tmp_path / "stockyard.db", isolation_level=None)
    old.create_aggregate("merged_steps", 1, cast(Any, stockyard.MergedSteps))
    for number, script in enumerate(stockyard.MIGRATIONS[:version], 1):
        old.executescript(f"{script} PRAGMA user_version = {number};")
    old.close()
    assert schema_of(tmp_path) == newest_schema


def test_a_newer_schema_is_refused_by_the_proxy_and_by_readers(tmp_path: Path) -> None:
    path = tmp_path / "stockyard.db"
    sqlite3.connect(path).execute("PRAGMA user_version = 99")
    with pytest.raises(stockyard.StoreError, match="newer Stockyard"):
        LogStore(path)
    with pytest.raises(stockyard.StoreError, match="newer one"):
        stockyard.LogReader(path)


@pytest.mark.parametrize("table", ["sqlite_schema", "ledger", "keys"])
def test_a_corrupt_database_is_refused_and_left_as_it_is(tmp_path: Path, make: Make, table: str) -> None:
    path = tmp_path / "stockyard.db"
    with opened(tmp_path) as store:
        store.put(make())
        committed(store)
        page = store.read("SELECT MAX(rootpage) AS page FROM sqlite_schema WHERE name = ?", (table,))[0]["page"] or 1
    content = bytearray(path.read_bytes())
    at = (page - 1) * 4096
    content[at : at + 4096] = b"\xff" * 4096
    path.write_bytes(content)
    told = subprocess.run(
        [sys.executable, stockyard.__file__, "serve", "--port", "0", "--data-dir", str(tmp_path)],
        env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (told.returncode, path.read_bytes()) == (2, bytes(content))
    assert "stockyard.db" in told.stderr
    assert told.stderr.count("\n") == 1


@pytest.mark.parametrize("wanted", [{}, {"since": "30d", "key": "key_1"}, {"status": "error"}])
def test_sums_by_session_read_no_row_of_the_log(tmp_path: Path, make: Make, wanted: dict[str, str]) -> None:
    """An index holds them, as there may be millions of rows."""
    with opened(tmp_path) as store:
        store.put(make(session="s1"))
        committed(store)
        asked: list[tuple[str, Any]] = []

        class Spy:
            def read(self, sql: str, parameters: Any = ()) -> Any:
                asked.append((sql, parameters))
                return store.read(sql, parameters)

        stockyard.find_spend(Spy(), "session", wanted, NOW_MS)  # type: ignore[arg-type]
        [(sql, parameters)] = asked
        plan = [row["detail"] for row in store.read(f"EXPLAIN QUERY PLAN {sql}", parameters)]
    assert "SCAN calls USING COVERING INDEX calls_by_session" in plan


# -- bounds


def test_old_rows_go_and_their_sums_stay(tmp_path: Path, make: Make) -> None:
    with opened(tmp_path, keep_ms=2 * DAY_MS, now_ms=lambda: NOW_MS) as store:
        for days in (5, 3, 1, 0):
            store.put(make(ts_ms=NOW_MS - days * DAY_MS, tags="team=a,env=b"))
            store.put_write("INSERT INTO feedback VALUES (?, ?, '', 1, '', '')", str(days), NOW_MS - days * DAY_MS)
        committed(store)
        store._upkeep_at_s = 0.0
        store._wake.set()
        until(lambda: len(ids(store)) == 2)
        until(lambda: {row["request_id"] for row in store.read("SELECT request_id FROM feedback")} == {"1", "0"})
        assert [row["requests"] for row in stockyard.find_spend(store, "model", {}, NOW_MS)] == [4]
        tags = {row["tag"]: row["requests"] for row in stockyard.find_spend(store, "tag", {}, NOW_MS)}
        assert tags == {"team=a": 4, "env=b": 4}


def test_where_the_log_is_too_large_bodies_go_first_and_then_rows(tmp_path: Path, make: Make) -> None:
    with opened(tmp_path, max_bytes=600_000, now_ms=lambda: NOW_MS) as store:
        for _ in range(40):
            for _ in range(5):
                store.put(make(body=os.urandom(8000)))
            committed(store)
        store._upkeep_at_s = 0.0
        store._wake.set()
        until(lambda: store._log_bytes() < 600_000)
        assert len(ids(store)) == 200
        newest, oldest = (stockyard.find_request(store, ids(store)[at]) for at in (0, -1))
        assert newest is not None
        assert oldest is not None
        assert (oldest["request"], newest["request"] is None) == (None, False)
        store._max_bytes = 200_000
        store._upkeep_at_s = 0.0
        store._wake.set()
        until(lambda: store._log_bytes() < 200_000)
        assert sum(row["requests"] for row in stockyard.find_spend(store, "model", {}, NOW_MS)) == 200


def test_free_pages_go_back_to_the_disk(tmp_path: Path, make: Make) -> None:
    with opened(tmp_path) as store:
        for _ in range(40):
            store.put(make(body=os.urandom(900_000)))
        committed(store)
        store.put_write("DELETE FROM parts")
        committed(store)
        before = store._pages("page_count")
        store._upkeep_at_s = 0.0
        store._wake.set()
        until(lambda: store._pages("page_count") < before // 2)


def test_sums_by_hour_go_and_those_by_day_tell_the_same(tmp_path: Path, make: Make) -> None:
    with opened(tmp_path, now_ms=lambda: NOW_MS) as store:
        chance = random.Random(3)
        for _ in range(300):
            store.put(make(ts_ms=NOW_MS - chance.randrange(200 * DAY_MS), cost_nanousd=chance.choice([None, 5])))
        committed(store)
        before = [
            stockyard.find_spend(store, "model", {"since": since}, NOW_MS) for since in ("300d", "50d", "30h", "2h")
        ]
        store._forget_at_s = 0.0
        store._forget()
        [row] = store.read("SELECT MIN(start_s) AS s FROM rollups WHERE span_s = 3600")
        assert row["s"] >= NOW_MS // 1000 - 35 * 86_400
        after = [
            stockyard.find_spend(store, "model", {"since": since}, NOW_MS) for since in ("300d", "50d", "30h", "2h")
        ]
        assert after == before
        assert before[0][0]["requests"] == 300


def conversation(turns: int) -> list[bytes]:
    """Requests that each repeat the one before, with their tools last."""
    chance = random.Random(9)
    messages: list[Any] = [{"role": "system", "content": chance.randbytes(6000).hex()}]
    bodies = []
    for _ in range(turns):
        messages.append({"role": "user", "content": chance.randbytes(chance.choice([20, 900])).hex()})
        tools = [{"type": "function", "function": {"name": "look", "description": "ab" * 3000}}]
        bodies.append(json.dumps({"model": "m", "messages": messages, "tools": tools}).encode())
    return bodies


def test_a_long_conversation_is_kept_once_and_read_as_it_was(tmp_path: Path, make: Make) -> None:
    calls = [make(body=body) for body in conversation(30)]
    with opened(tmp_path, now_ms=lambda: NOW_MS) as store:
        for call in calls:
            store.put(call)
            committed(store)
        for call in calls:
            row = stockyard.find_row(store, call.id)
            assert row is not None
            assert stockyard.read_bodies(store, row) == (call.body, call.answer)
        kept = store.read("SELECT (SELECT SUM(LENGTH(body)) FROM parts) + SUM(LENGTH(bodies)) AS n FROM blocks")[0]["n"]
        assert kept < len(calls[-1].body)
        assert ids(store, q=json.loads(calls[20].body)["messages"][-1]["content"][:24]) == [
            call.id for call in reversed(calls[20:])
        ]


def test_parts_go_with_the_last_block_that_names_them_and_come_back_when_asked_again(
    tmp_path: Path, make: Make
) -> None:
    now_ms, bodies = [NOW_MS], conversation(3)
    with opened(tmp_path, keep_ms=DAY_MS, now_ms=lambda: now_ms[0]) as store:

        def upkeep() -> int:
            while store._prune():
                pass
            return int(store.read("SELECT COUNT(*) AS n FROM parts")[0]["n"])

        store.put(make(ts_ms=now_ms[0], body=bodies[0]))
        committed(store)
        store._upkeep_at_s = math.inf
        count = upkeep()
        now_ms[0] += DAY_MS // 2
        store.put(again := make(ts_ms=now_ms[0], body=bodies[0]))
        committed(store)
        now_ms[0] += DAY_MS // 2 + 120_000
        assert upkeep() == count > 1
        row = stockyard.find_row(store, again.id)
        assert row is not None
        assert stockyard.read_bodies(store, row)[0] == bodies[0]
        now_ms[0] += DAY_MS
        assert upkeep() == 0
        store.put(last := make(ts_ms=now_ms[0], body=bodies[0]))
        committed(store)
        row = stockyard.find_row(store, last.id)
        assert row is not None
        assert stockyard.read_bodies(store, row)[0] == bodies[0]


@given(st.lists(st.sampled_from([*stockyard.PART_MARKS, b"x", b"y" * 600, b"{", b"z" * 20_000]), max_size=60))
def test_the_parts_of_a_body_are_the_body(pieces: list[bytes]) -> None:
    body = b"".join(pieces)
    assert b"".join(stockyard.parts_of(body)) == body


# -- reading


@pytest.fixture
def filled(tmp_path: Path, make: Make) -> Iterator[tuple[LogStore, list[Call]]]:
    chance = random.Random(5)
    calls = [
        make(
            model=chance.choice(["a", "b"]), provider=chance.choice(["p", "q"]), key_id=chance.choice(["", "key_1"]),
            status=chance.choice([200, 429, 500]), cache=chance.choice(["hit", "miss"]), session=chance.choice(["", "s"]),
            tags=chance.choice(["", "team=x", "env=y,team=x"]), ts_ms=NOW_MS - number * 60_000,
            body=json.dumps({"text": f"needle {number} \u00e4" if number % 7 == 0 else "hay"}).encode(),
        )
        for number in range(200)
    ]  # fmt: skip
    with opened(tmp_path) as store:
        for call in calls:
            store.put(call)
        committed(store)
        yield store, calls


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        ({}, lambda c: True),
        ({"model": "a", "status": "5xx"}, lambda c: c.model == "a" and c.status == 500),
        ({"model": "u", "provider": "q"}, lambda c: c.provider == "q"),
        ({"model": "never"}, lambda c: False),
        ({"key": "key_1", "cache": "hit"}, lambda c: c.key_id and c.cache == "hit"),
        ({"session": "s", "status": "ok"}, lambda c: c.session and c.status == 200),
        ({"tag": "team=x"}, lambda c: "team=x" in c.tags),
        ({"tag": "team=x", "model": "b"}, lambda c: "team=x" in c.tags and c.model == "b"),
        ({"since": "30m"}, lambda c: c.ts_ms >= NOW_MS - 1_800_000),
        ({"until": "30m", "status": "error"}, lambda c: c.ts_ms < NOW_MS - 1_800_000 and c.status >= 400),
        ({"q": "Needle"}, lambda c: b"needle" in c.body),
        ({"q": "\u00c4", "model": "a"}, lambda c: b"needle" in c.body and c.model == "a"),
    ],
)
def test_filters_and_pages_give_what_a_look_at_every_call_gives(
    filled: tuple[LogStore, list[Call]], wanted: dict[str, str], fits: Callable[[Call], Any]
) -> None:
    store, calls = filled
    expected = [call.id for call in sorted(calls, key=lambda call: -call.ts_ms) if fits(call)]
    assert ids(store, **wanted) == expected
    paged, cursor = list[str](), ""
    while True:
        page = stockyard.find_page(store, {**wanted, **({"before": cursor} if cursor else {})}, 7, NOW_MS)
        paged += [row["id"] for row in page.rows]
        if page.cursor is None:
            break
        cursor = str(page.cursor)
    assert paged == expected
    exported = [row["id"] for rows in stockyard.export_rows(store, wanted, NOW_MS) for row in rows]
    assert exported == expected


@pytest.mark.parametrize("by", [*stockyard.SPEND_BY, *stockyard.SPEND_BY_ROWS])
@pytest.mark.parametrize("wanted", [{}, {"key": "key_1"}, {"model": "u", "provider": "p"}, {"status": "error"}])
def test_sums_equal_those_of_the_rows(filled: tuple[LogStore, list[Call]], by: str, wanted: dict[str, str]) -> None:
    store, calls = filled
    calls = [
        call for call in calls
        if call.key_id == wanted.get("key", call.key_id) and call.provider == wanted.get("provider", call.provider)
        and wanted.get("model") in (None, call.upstream_model) and ("status" not in wanted or call.status >= 400)
    ]  # fmt: skip
    keys: dict[str, Callable[[Call], list[Any]]] = {
        "model": lambda c: [c.model], "provider": lambda c: [c.provider], "key": lambda c: [c.key_id], "status": lambda c: [c.status],
        "tag": lambda c: [tag for tag in c.tags.split(",") if tag], "endpoint": lambda c: [c.endpoint.path],
        "day": lambda c: [stockyard.format_time(c.ts_ms)[:10]], "session": lambda c: [c.session] if c.session else [],
    }  # fmt: skip
    expected: dict[Any, list[int]] = {}
    for call in calls:
        for name in keys[by](call):
            sums = expected.setdefault(name, [0, 0, 0])
            for at, amount in enumerate((1, 10, call.status >= 400)):
                sums[at] += amount
    found = stockyard.find_spend(store, by, wanted, NOW_MS)
    assert {row[by]: [row["requests"], row["input_tokens"], row["errors"]] for row in found} == expected


@pytest.mark.parametrize("wanted", [{}, {"provider": "p"}, {"model": "u", "key": "key_1"}])
@pytest.mark.parametrize("bucket_ms", [0, 3_600_000, DAY_MS])
@pytest.mark.parametrize("by", stockyard.POINTS_BY)
def test_points_equal_the_sums_of_the_rows(
    filled: tuple[LogStore, list[Call]], by: str, bucket_ms: int, wanted: dict[str, str]
) -> None:
    store, calls = filled
    points = stockyard.find_points(store, by, bucket_ms, wanted, NOW_MS)
    expected: dict[Any, list[float]] = {}
    for call in calls:
        if call.provider != wanted.get("provider", call.provider) or call.key_id != wanted.get("key", call.key_id):
            continue
        at = stockyard.format_moment(call.ts_ms // bucket_ms * bucket_ms) if bucket_ms else None
        name = {"total": "", "model": call.model, "provider": call.provider, "key": call.key_id}[by]
        sums = expected.setdefault((at, name), [0, 0, 0])
        for place, amount in enumerate((1, call.status >= 400, call.cache == "hit")):
            sums[place] += amount
    assert {(p["ts"], p["name"]): [p["requests"], p["errors"], p["cache_hits"]] for p in points} == expected
    if not bucket_ms:
        assert points[0]["latency_ms"]["p95"] == pytest.approx(500, rel=0.1)
        assert points[0]["first_token_ms"] == {"p50": None, "p95": None, "p99": None}


def test_quantiles_are_off_by_a_tenth_at_most() -> None:
    times = [0.3, 1.0, 2.0, 5.0, 7.0, 11.0, 90.0, 400.0, 3000.0, 61_000.0]
    rows = [stockyard.LogRow(0, ("",) * 7 + (200,), (*[0] * 9, ms, None)) for ms in times]
    steps = [(step, 1) for row in rows for step in stockyard.steps_of(row)]
    told = stockyard.quantiles_of(steps)
    assert (told["p50"], told["p99"]) == (pytest.approx(7.0, rel=0.1), pytest.approx(61_000, rel=0.1))


def test_new_tags_without_end_share_one_sum(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stockyard, "TAGS_PER_HOUR", 3)
    with opened(tmp_path) as store:
        for number in range(10):
            store.put(make(tags=f"user={number}"))
        committed(store)
        found = {row["tag"]: row["requests"] for row in stockyard.find_spend(store, "tag", {}, NOW_MS)}
        assert (len(found), found["(others)"]) == (4, 7)


def test_followers_see_every_row_once_also_of_calls_that_began_long_ago(tmp_path: Path, make: Make) -> None:
    with opened(tmp_path) as store:
        store.put(make())
        committed(store)
        block = stockyard.last_block(store)
        late = [make(), make(ts_ms=NOW_MS - 900_000)]
        for call in late:
            store.put(call)
        committed(store)
        rows, block = stockyard.find_new_requests(store, block, {}, NOW_MS)
        assert {row["id"] for row in rows} == {call.id for call in late}
        assert stockyard.find_new_requests(store, block, {}, NOW_MS)[0] == []


async def test_exports_and_charts_over_http(start: Start) -> None:
    async with start() as proxy:
        headers = {"x-stockyard-tags": "team==1+1", "user-agent": "=cmd"}
        for _ in range(3):
            await proxy.post("/v1/chat/completions", {"model": "echo", "messages": []}, **headers)
        admin = {"authorization": f"Bearer {proxy.gateway.admin_key}"}

        async def get(path: str) -> tuple[int, bytes]:
            async with proxy.session.get(proxy.url + path, headers=admin) as answer:
                return answer.status, await answer.read()

        status, text = await get("/api/requests.csv?model=echo")
        rows = [*csv.DictReader(io.StringIO(text.decode()))]
        assert (status, len(rows), [*rows[0]]) == (200, 3, [*stockyard.LOG_FIELDS])
        assert rows[0]["user_agent"] == "'=cmd"
        status, text = await get("/api/requests.jsonl?limit=1")
        assert [json.loads(line)["model"] for line in text.splitlines()] == ["echo"] * 3
        assert (await get("/api/requests.csv?nope=1"))[0] == 400
        series = json.loads((await get("/api/timeseries?by=model"))[1])
        assert sum(row["requests"] for row in series["data"]) == 3
        assert json.loads((await get("/api/spend?by=provider&since=1h"))[1])["data"][0]["requests"] == 3
        assert (await get("/api/timeseries?bucket=second"))[0] == 400
        assert (await get("/api/requests/req_nothing"))[0] == 404


async def test_a_backup_is_whole_while_calls_go_on(start: Start, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "stockyard.db"
    copy.parent.mkdir()
    async with start() as proxy:

        async def ask() -> None:
            for _ in range(30):
                await proxy.post("/v1/chat/completions", {"model": "echo", "messages": []})

        async def save() -> None:
            headers = {"authorization": f"Bearer {proxy.gateway.admin_key}"}
            await proxy.post("/v1/chat/completions", {"model": "echo", "messages": []})
            async with proxy.session.post(proxy.url + "/api/backup", headers=headers) as answer:
                copy.write_bytes(await answer.read())

        await asyncio.gather(ask(), save())
        assert len(await proxy.rows()) == 31
    assert not (tmp_path / "stockyard.backup").exists()
    with opened(copy.parent) as store:
        assert store.read("PRAGMA integrity_check")[0][0] == "ok"
        assert 1 <= len(ids(store)) <= 31
        assert store.read("SELECT COUNT(*) AS n FROM ledger")[0]["n"] == 1


def test_commands_read_export_and_back_up_without_a_proxy(
    tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(tmp_path) as store:
        for number in range(5):
            store.put(make(ts_ms=int(time.time() * 1000) - 5 + number))
    options = ["--data-dir", str(tmp_path)]
    assert stockyard.main(["logs", "--json", "--limit", "2", *options]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["ts"] for row in shown] == sorted(row["ts"] for row in shown)
    assert stockyard.main(["logs", "--csv", "--limit", "0", *options]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert stockyard.main(["costs", "--by", "day", *options]) == 0
    assert "5 calls" in capsys.readouterr().out
    copy = tmp_path / "copy.db"
    assert stockyard.main(["backup", str(copy), *options]) == 0
    assert stockyard.main(["backup", str(copy), *options]) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert copy.stat().st_mode & 0o777 == 0o600
    assert len(stockyard.LogReader(copy).read("SELECT id FROM calls")) == 5


# -- full text


def say(make: Make, asked: str, answered: str = "yes", **fields: Any) -> Call:
    body = {"model": "m", "messages": [{"role": "user", "content": asked}]}
    answer = {"choices": [{"message": {"content": answered}}], "usage": {"total_tokens": 7}}
    return make(body=json.dumps(body).encode(), answer=json.dumps(answer).encode(), **fields)


def indexed(store: LogStore, word: str) -> list[int]:
    return stockyard.searched(store, word, 0, 2**63 - 1, -1)


def search_tables(store: LogStore) -> list[int]:
    """But for the first, which stays empty."""
    return [row["block"] for row in store.read(stockyard.SEARCH_TABLES)][1:]


def keep_up(store: LogStore) -> None:
    store._upkeep_at_s = 0.0
    store._wake.set()
    until(lambda: store._upkeep_at_s > 0.0)


def test_words_and_phrases_are_found_by_the_index(tmp_path: Path, make: Make) -> None:
    picture = "data:image/png;base64," + "iVBOR" * 200
    calls = [
        say(make, 'The fox\nsaid "Grüße" to O\'Brien', "and then nothing", model="a"),
        say(make, "a dog", "the fox ran", model="b"),
        say(make, "the ran fox " + picture, "42 C++", key_id="k", model="b"),
        say(make, "word " * 20_000 + "last", "tail"),
        make(body=b"spoken words", answer=b"ID3\0\1 hidden \xff"),
    ]
    with opened(tmp_path, search=True) as store:
        for call in calls:
            store.put(call)
        committed(store)
        keep_up(store)  # which drops none while nothing is too old
        fox, dog, picture_call, long, spoken = (call.id for call in calls)
        for text, found in (
            ("fox", [picture_call, dog, fox]), ("FOX said", [fox]), ("gruße", [fox]), ("o'brien", [fox]), ("nothin*", [fox]),
            ('"fox ran"', [dog]), ("fox ran", [picture_call, dog]), ("c++ &", [picture_call]), ("42", [picture_call]),
            ("last tail", [long]), ("user", []), ("iVBOR*", []), ("nothin", []), ("cat", []), ("spoken", [spoken]), ("hidden", []),
        ):  # fmt: skip
            assert ids(store, search=text) == found, text
        assert ids(store, search="fox", model="b") == [picture_call, dog]
        assert ids(store, search="fox", model="b", key="k", q="the ran") == [picture_call]
        page = stockyard.find_page(store, {"search": "fox"}, 2, NOW_MS)
        assert ids(store, search="fox", before=str(page.cursor)) == [fox]
        assert [row["id"] for row in stockyard.find_new_requests(store, 0, {"search": "fox"}, NOW_MS)[0]] == [
            fox, dog, picture_call,
        ]  # fmt: skip


def test_a_search_goes_on_through_many_calls_and_tables(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockyard, "PAGE_STEP_ROWS", 7)
    monkeypatch.setattr(LogStore, "_prune", lambda _: False)
    with opened(tmp_path, search=True, max_bytes=32 * 50) as store:
        calls = [say(make, "fox" if number % 2 else "hen", tags=f"n={number % 3}") for number in range(60)]
        random.Random(5).shuffle(calls)  # they end in another order than that in which they began
        for at in range(0, 60, 10):
            for call in calls[at : at + 10]:
                store.put(call)
            committed(store)
        assert len(search_tables(store)) > 2
        foxes = sorted((call.id for call in calls if b"fox" in call.body), reverse=True)
        assert ids(store, search="fox") == foxes
        assert ids(store, search="fox", tag="n=1") == [
            call_id for call_id in foxes if call_id in {call.id for call in calls if call.tags == "n=1"}
        ]


def test_words_go_with_the_first_bodies_that_retention_drops_and_never_later(tmp_path: Path, make: Make) -> None:
    now = [NOW_MS]
    with opened(tmp_path, search=True, keep_ms=4 * DAY_MS, now_ms=lambda: now[0]) as store:
        for _ in range(6):
            store.put(say(make, "fox", ts_ms=now[0]))
            committed(store)
            now[0] += DAY_MS
        keep_up(store)
        until(lambda: len(search_tables(store)) == 4)
        [oldest] = store.read("SELECT MIN(block) AS block FROM blocks")
        assert search_tables(store)[0] >= oldest["block"]
        assert ids(store, search="fox") == ids(store)
        now[0] += 9 * DAY_MS
        keep_up(store)
        until(lambda: not search_tables(store))
        assert indexed(store, "fox") == ids(store, search="fox") == []
        store.put(say(make, "fox", ts_ms=now[0]))
        committed(store)
        assert len(ids(store, search="fox")) == 1


def test_words_are_committed_with_their_rows_or_not_at_all(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = [sqlite3.OperationalError("database or disk is full")] * 2
    whole = LogStore._roll_up

    def roll_up(self: LogStore, tagged: dict[str, list[stockyard.LogRow]]) -> None:
        if faults:  # after the words, before the commit
            raise faults.pop()
        whole(self, tagged)

    monkeypatch.setattr(LogStore, "_roll_up", roll_up)
    now = [NOW_MS]
    with opened(tmp_path, search=True, keep_ms=DAY_MS, now_ms=lambda: now[0]) as store:
        now[0] += DAY_MS // 4  # so that a table is begun in the transaction that fails
        store.put(say(make, "fox"))
        committed(store)
        assert len(ids(store, search="fox")) == 1
        assert len(indexed(store, "fox")) == 1
    with opened(tmp_path, search=True, keep_ms=DAY_MS, now_ms=lambda: now[0]) as store:
        store.put(say(make, "fox"))
        committed(store)
        assert len(ids(store, search="fox")) == 2


@given(st.text(min_size=1))
@pytest.mark.parametrize(
    "around", ["{}", '"{}', "fox AND {}", "text:{}", "NEAR({} fox, 2)", "{}*", "^{} OR fox", "{}\0"]
)
def test_no_text_is_a_command_of_the_index(index: LogStore, around: str, text: str) -> None:
    with contextlib.suppress(stockyard.InvalidRequest):
        stockyard.find_page(index, {"search": around.format(text)}, 5, NOW_MS)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LogStore]:
    with opened(tmp_path_factory.mktemp("index"), search=True) as store:
        yield store


def test_a_search_needs_words_and_an_index(tmp_path: Path, make: Make) -> None:
    with opened(tmp_path, search=True) as store:
        store.put(say(make, "fox"))
        committed(store)
        assert len(ids(store, search="fox")) == 1
        for wrong in ("?!", '"', "fox " * 33):
            with pytest.raises(stockyard.InvalidRequest, match="1 to 32 words"):
                ids(store, search=wrong)
    with opened(tmp_path) as store:  # such as a command makes in a shell without the setting
        assert len(ids(store, search="fox")) == 1
        store.put(say(make, "fox"))
        committed(store)
        assert [*store.read("SELECT name FROM sqlite_master WHERE name LIKE 'search%'")] == []
        store.put(say(make, "fox"))
        committed(store)
        with pytest.raises(stockyard.InvalidRequest, match="STOCKYARD_LOG_SEARCH=on"):
            ids(store, search="fox")


def test_an_index_is_refused_without_bodies_and_without_fts5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(stockyard.SettingsError, match="STOCKYARD_LOG_SEARCH: log_search on needs bodies"):
        stockyard.read_settings({}, {"STOCKYARD_LOG_SEARCH": "on", "STOCKYARD_LOG_BODIES": "none"})

    class Plain(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            return super().execute(sql.replace("'fts5'", "'fts9'"), *parameters)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *place, **options: connect(*place, factory=Plain, **options))
    with pytest.raises(stockyard.StoreError, match="needs a SQLite with FTS5"):
        LogStore(tmp_path / "stockyard.db", search=True)


async def test_search_knows_no_hidden_text(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with start(log_search="on", log_bodies="redacted") as proxy:
        ask = {"model": "echo", "messages": [{"role": "user", "content": "write to jo.doe@example.com of foxes"}]}
        await proxy.post("/v1/chat/completions", ask)
        headers = {"authorization": f"Bearer {proxy.gateway.admin_key}"}

        async def found(text: str) -> tuple[int, Any]:
            params = {"search": text}
            async with proxy.session.get(proxy.url + "/api/requests", params=params, headers=headers) as answer:
                return answer.status, await answer.json()

        assert len((await found("foxes write"))[1]["data"]) == 1
        assert (await found("jo.doe"))[1]["data"] == []
        assert (await found("doe"))[1]["data"] == []
        assert (await found("("))[0] == 400
    assert b"doe" not in await asyncio.to_thread((tmp_path / "stockyard.db").read_bytes)
    options = ["--json", "--data-dir", str(tmp_path)]
    assert stockyard.main(["logs", "--search", "foxes", *options]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "echo"
    assert stockyard.main(["logs", "--search", "hens", *options]) == 0
    assert capsys.readouterr().out == ""
    async with start() as proxy:
        await proxy.post("/v1/chat/completions", ask)
        headers = {"authorization": f"Bearer {proxy.gateway.admin_key}"}
        async with proxy.session.get(proxy.url + "/api/requests?search=foxes", headers=headers) as answer:
            told = await answer.json()
        assert (answer.status, "STOCKYARD_LOG_SEARCH=on" in told["error"]["message"]) == (400, True)
