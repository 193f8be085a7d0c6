"""The audit chain: every kind of tampering is found, by name; what is honest passes, also after pruning and a restart."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Proxy, Start

import stockyard

CHAT: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"


async def ask(proxy: Proxy, method: str, path: str, body: Any = None) -> Any:
    headers = {"authorization": f"Bearer {proxy.gateway.admin_key}"}
    async with proxy.session.request(method, proxy.url + path, json=body, headers=headers) as answer:
        assert answer.status < 300, await answer.text()
        return await answer.json()


async def filled(start: Start, tmp_path: Path) -> dict[str, Any]:
    """A data directory with calls, admin actions and a checkpoint in between; the checkpoint."""
    async with start() as proxy:
        for n in range(3):
            await proxy.post(PATH, {**CHAT, "temperature": n / 10})
        await ask(proxy, "POST", "/api/keys", {"name": "team"})
        await ask(proxy, "PUT", "/api/budgets", {"budgets": []})
        key = (await ask(proxy, "POST", "/api/keys", {"name": "canary-key"}))["key"]
        await proxy.post(PATH, {**CHAT, "stream": True}, authorization=f"Bearer {key}")
        checkpoint: dict[str, Any] = await ask(proxy, "POST", "/api/audit/checkpoint")
        listed = await ask(proxy, "GET", "/api/audit")
        assert {entry["kind"] for entry in listed["data"]} == {"began", "calls", "admin", "checkpoint"}
        assert (await ask(proxy, "GET", "/api/audit/verify"))["fault"] == ""
    assert key not in json.dumps(listed)
    return checkpoint


def verify(tmp_path: Path, checkpoint: dict[str, Any] | None = None) -> stockyard.AuditReport:
    pepper = stockyard.load_pepper(stockyard.read_settings({"data_dir": str(tmp_path)}, {}))
    reader = stockyard.AuditReader(tmp_path / "stockyard.db")
    return stockyard.check_audit(reader, stockyard.audit_key(pepper), checkpoint)


def tamper(tmp_path: Path, *statements: str) -> None:
    with sqlite3.connect(tmp_path / "stockyard.db") as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount != 0, statement
    connection.close()


async def test_an_honest_log_passes_also_after_a_restart(start: Start, tmp_path: Path) -> None:
    checkpoint = await filled(start, tmp_path)
    report = verify(tmp_path, checkpoint)
    assert (report.fault, report.calls) == ("", 4)
    async with start() as proxy:
        assert (await proxy.post(PATH, CHAT))[0] in (200, 401)
    assert verify(tmp_path, checkpoint).fault == ""
    assert verify(tmp_path).calls == 5


async def test_texts_of_people_are_not_kept_for_ever(start: Start, tmp_path: Path) -> None:
    text = "canary@example.org"
    async with start() as proxy:
        await proxy.post(PATH, CHAT)
        [row] = await proxy.rows()
        await ask(proxy, "POST", "/api/guardrails/try", {"text": text})
        await ask(proxy, "POST", f"/api/requests/{row['id']}/feedback", {"comment": text})
        entries = (await ask(proxy, "GET", "/api/audit"))["data"]
    paths = [entry["path"] for entry in entries if entry["kind"] == "admin"]
    assert sorted(paths) == ["/api/guardrails/try", f"/api/requests/{row['id']}/feedback"]
    assert text not in json.dumps(entries)


LAST_CALL = "(SELECT MAX(seq) FROM calls)"
COLUMNS = ", ".join(("label", *stockyard.OWN_FIELDS, "block", "request_at", "request_bytes", "answer_bytes"))
FORGED_CALL = f"INSERT INTO calls SELECT seq + 7, {COLUMNS} FROM calls WHERE seq = {LAST_CALL}"  # noqa: S608 - our names


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        (["UPDATE calls SET cost_nanousd = 1 WHERE seq = (SELECT MIN(seq) FROM calls)"], "the row of call req_"),
        (["UPDATE labels SET model = 'other' WHERE model = 'gpt-4o-mini'"], "the row of call req_"),
        (["DELETE FROM calls WHERE seq = (SELECT MAX(seq) FROM calls)"], "was deleted"),
        (["UPDATE blocks SET compressed = 0, bodies = zeroblob(2000)"], "the bodies of call req_"),
        (["UPDATE audit SET record = replace(record, 'team', 'tram') WHERE kind = 'admin'"], "(admin) was changed"),
        (["DELETE FROM audit WHERE kind = 'admin' AND record LIKE '%budgets%'"], "is missing"),
        (["UPDATE audit SET rows = substr(rows, 1, 40) WHERE kind = 'calls' AND length(rows) > 40"], "list of calls"),
        (["UPDATE audit SET seq = -1 WHERE seq = 2", "UPDATE audit SET seq = 2 WHERE seq = 3", "UPDATE audit SET seq = 3 WHERE seq = -1"], "does not follow"),
        ([FORGED_CALL], "no entry covers"),
    ],
)  # fmt: skip
async def test_tampering_is_named(start: Start, tmp_path: Path, statements: list[str], said: str) -> None:
    await filled(start, tmp_path)
    tamper(tmp_path, *statements)
    assert said in verify(tmp_path).fault


async def test_an_exported_checkpoint_tells_a_cut_and_a_rewritten_chain(start: Start, tmp_path: Path) -> None:
    checkpoint = await filled(start, tmp_path)
    copies: list[Callable[[sqlite3.Connection], object]] = [
        lambda connection: connection.execute("DELETE FROM audit WHERE seq > 5"),
        rewrite,
    ]
    whole = (tmp_path / "stockyard.db").read_bytes()
    for change, said in zip(copies, ("are missing", "was written anew"), strict=True):
        (tmp_path / "stockyard.db").write_bytes(whole)
        with sqlite3.connect(tmp_path / "stockyard.db") as connection:
            change(connection)
        connection.close()
        assert verify(tmp_path).fault == ""  # nothing inside tells
        assert said in verify(tmp_path, checkpoint).fault
    forged = {**checkpoint, "seq": 1}
    assert "not signed" in verify(tmp_path, forged).fault


def rewrite(connection: sqlite3.Connection) -> None:
    """What somebody with the database can do: another story, and a whole new chain over it."""
    previous = stockyard.AUDIT_GENESIS
    for row in connection.execute("SELECT * FROM audit ORDER BY seq").fetchall():
        entry = stockyard.AuditEntry(*row)
        record = entry.record.replace("team", "tram")
        previous = stockyard.audit_link(previous, entry.seq, entry.ts_ms, entry.kind, record)
        connection.execute("UPDATE audit SET record = ?, digest = ? WHERE seq = ?", (record, previous, entry.seq))


async def test_what_goes_by_age_breaks_no_chain(start: Start, tmp_path: Path) -> None:
    checkpoint = await filled(start, tmp_path)
    later_s = 3600.0 * 24 * 40
    async with start() as proxy:
        store = proxy.gateway.store
        now_ms = store._now_ms
        store._now_ms = lambda: now_ms() + int(later_s * 1000)
        store._upkeep_at_s = 0.0
        for _ in range(100):
            store._upkeep_at_s = 0.0
            await store.flush()
            if not store.read("SELECT 1 FROM calls"):
                break
        await store.flush()
    report = verify(tmp_path, checkpoint)
    assert (report.fault, report.calls) == ("", 0)


def test_command_line(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(filled(start, tmp_path))
    flags = ["--data-dir", str(tmp_path), "--port", "0"]
    assert stockyard.main(["audit", "checkpoint", *flags]) == 0
    kept = tmp_path / "kept"
    kept.write_text(capsys.readouterr().out)
    assert stockyard.main(["audit", "verify", "--checkpoint", str(kept), *flags]) == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert stockyard.main(["audit", "export", *flags]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["seq"] for line in lines] == [*range(1, len(lines) + 1)]
    tamper(tmp_path, "UPDATE audit SET ts_ms = ts_ms + 1 WHERE seq = 2")
    assert stockyard.main(["audit", "verify", *flags]) == 1
    assert "entry 2" in capsys.readouterr().out
    kept.write_text("no checkpoint")
    assert stockyard.main(["audit", "verify", "--checkpoint", str(kept), *flags]) == 2


async def test_checkpoints_are_kept_in_a_file(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "kept.jsonl"
    async with start(audit_file=str(path)) as proxy:
        keeper = asyncio.create_task(stockyard.keep_checkpoints(proxy.gateway))
        await asyncio.sleep(0)
        keeper.cancel()
        await keeper
    assert verify(tmp_path, stockyard.read_checkpoint(path)).fault == ""
