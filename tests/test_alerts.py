"""Alert webhooks: who is told of what, signed, tried again, once; and that telling harms no call."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Start, until
from upstreams import Answer, FakeUpstream, fake_upstream, plain

import stockyard

CHAT: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi canary-text"}]}
PATH = "/v1/chat/completions"
SECRET = "canary-hmac-secret"


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeUpstream]:
    monkeypatch.setattr(stockyard.Poster, "WAITS_S", (0.01, 0.01))
    async with fake_upstream() as fake:
        fake.answers = [plain({})]
        yield fake


def alerts_to(receiver: FakeUpstream, more: str = "") -> str:
    return f'[[alerts]]\nurl = "{receiver.url}/hook/canary-path"\nsecret_env = "ALERT_SECRET"\n{more}\n'


def is_signed(headers: dict[str, str], body: bytes) -> bool:
    found = re.fullmatch(r"t=(\d+),v1=([0-9a-f]{64})", headers["x-stockyard-signature"])
    assert found is not None
    return hmac.new(SECRET.encode(), f"{found[1]}.".encode() + body, hashlib.sha256).hexdigest() == found[2]


async def test_a_threshold_is_told_once_signed_and_without_secrets(start: Start, receiver: FakeUpstream) -> None:
    budget = '[[budgets]]\nscope = "global"\nusd = 0.000001\nperiod = "day"\nmode = "soft"\n'
    async with start(toml=alerts_to(receiver, 'events = ["budget"]') + budget, ALERT_SECRET=SECRET) as proxy:
        for _ in range(3):
            assert (await proxy.post(PATH, CHAT))[0] == 200
        proxy.gateway.alerts.tell("breaker_open", "not wanted here")
        await proxy.gateway.alerts.settled(20)
        assert sorted(seen.json["percent"] for seen in receiver.seen) == [50, 80, 100]
        for seen in receiver.seen:
            assert is_signed(seen.headers, seen.body) and not is_signed(seen.headers, seen.body + b" ")
            assert (seen.method, seen.path, seen.json["event"]) == ("POST", "/v1/hook/canary-path", "budget")
            assert "canary" not in seen.body.decode() + str({**seen.headers, "host": ""})


async def test_what_may_pass_is_tried_again_and_every_delivery_is_listed(start: Start, receiver: FakeUpstream) -> None:
    async with start(toml=alerts_to(receiver), ALERT_SECRET=SECRET) as proxy:
        admin = {"authorization": f"Bearer {proxy.gateway.admin_key}"}
        receiver.answers = [
            plain({}, 500),
            plain({}),
            plain({}, 404),
            plain({}, 307, location="/elsewhere"),
            plain({}, 503),
        ]
        for _ in range(4):
            status, _, told = await proxy.post("/api/alerts/test", {}, **admin)
            assert status == 200
        async with proxy.session.get(proxy.url + "/api/alerts", headers=admin) as answer:
            told = await answer.json()
        ends = [(entry["tries"], entry["state"]) for entry in told["deliveries"]]
        assert ends == [(3, "HTTP 503"), (1, "HTTP 307"), (1, "HTTP 404"), (2, "delivered")]
        assert told["data"] == [
            {"to": f"http://127.0.0.1:{receiver.port}", "events": sorted(stockyard.ALERT_EVENTS), "signed": True}
        ]
        assert len(receiver.seen) == 7 and all(is_signed(seen.headers, seen.body) for seen in receiver.seen)
        async with proxy.session.get(proxy.url + "/api/config", headers=admin) as answer:
            assert "canary" not in str(told) + await answer.text()
        assert (await proxy.post("/api/alerts/test", {}))[0] == 401


async def test_a_receiver_that_hangs_or_is_gone_harms_no_call(
    start: Start, receiver: FakeUpstream, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stockyard.Alerts, "MAX_WAITING", 2)
    monkeypatch.setattr(stockyard.Alerts, "STOP_S", 0.01)
    gone = '[[alerts]]\nurl = "http://127.0.0.1:1/canary-path"\n'
    async with start(toml=alerts_to(receiver) + gone, ALERT_SECRET=SECRET) as proxy:
        receiver.answers = [Answer(hang_s=60)]
        alerts = proxy.gateway.alerts
        for _ in range(5):
            alerts.tell("budget", "spent")
        assert alerts.dropped == 6
        assert (await proxy.post(PATH, CHAT))[0] == 200
        await until(lambda: sum(entry["state"] != "waiting" for entry in alerts.view()["deliveries"]) == 2)
    said = capsys.readouterr().err
    assert said.count("was not delivered to http://127.0.0.1:1: ClientConnectorError") == 2 and "canary" not in said


async def test_conditions_are_told_as_they_begin(
    start: Start, receiver: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start(toml=alerts_to(receiver), ALERT_SECRET=SECRET) as proxy:
        gateway = proxy.gateway
        assert gateway.conditions(100, 49) == {}
        health = gateway.router.health["openai", "m"] = stockyard.Health()
        gateway.store.crashed_rows = 2
        await until(lambda: len(receiver.seen) == 1)
        for _ in range(stockyard.Health.BREAK_AFTER):
            health.end(health.begin(0), False, 0.0, gateway.tick())
        gateway.ledger.bound_violations = 1
        monkeypatch.setattr(gateway.store, "trouble", lambda: "the disk is full")
        assert ("error_rate",) not in gateway.conditions(19, 19)
        gateway.store.metrics.ended = gateway.store.metrics.failed = 20
        await until(lambda: len(receiver.seen) >= 5)
        gateway.ledger.bound_violations = 2
        await until(lambda: len(receiver.seen) >= 6)
        told = sorted(seen.json["event"] for seen in receiver.seen)
        wanted = {*stockyard.ALERT_EVENTS} - {"budget"}
        assert told == sorted([*wanted, "bound_violation"])


async def test_a_reload_changes_the_receivers(start: Start, receiver: FakeUpstream) -> None:
    async with start() as proxy:
        admin = {"authorization": f"Bearer {proxy.gateway.admin_key}"}
        assert (await proxy.post("/api/alerts/test", {}, **admin))[0] == 400
        settings = stockyard.read_settings({}, {}, f'[[alerts]]\nurl = "{receiver.url}"\n')
        stockyard.prepare_settings(proxy.gateway, settings, {})()
        assert (await proxy.post("/api/alerts/test", {}, **admin))[0] == 200
        assert "x-stockyard-signature" not in receiver.seen[0].headers and "alerts" in stockyard.LIVE_TABLES


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[alerts]\nurl = 'http://h'", "under [[alerts]]"),
        ("[[alerts]]\nurl = 'http://h'\ncolour = 1", "'colour' is not known"),
        ("[[alerts]]\nurl = 'http://h'\nevents = ['budgets']", "some of budget, error_rate"),
        ("[[alerts]]\nurl = 'http://h'\nevents = [['budget']]", "some of budget, error_rate"),
        ("[[alerts]]\nurl = 'http://h'\nevents = []", "some of budget, error_rate"),
        ("[[alerts]]\nurl = 'file:///canary'", "http:// or https://"),
        ("[[alerts]]\nurl = 'http://canary:canary@h/'", "without a user name"),
        ("[[alerts]]\nurl = 7", "http:// or https://"),
        ("[[alerts]]\nurl = 'http://h'\nsecret_env = 'UNSET'", "a variable that is set"),
    ],
)
def test_rows_that_are_not_understood_are_refused(toml: str, said: str) -> None:
    with pytest.raises(stockyard.SettingsError, match=re.escape(said)) as caught:
        stockyard.read_alerts(stockyard.read_settings({}, {}, toml).tables["alerts"], {})
    assert "canary" not in str(caught.value)


def read_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


async def test_lines_are_json_objects_without_controls_or_values(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stockyard.ERROR_LINES, "is_json", True)
    async with start() as proxy:

        def fall(_: Any) -> None:
            raise ValueError("canary-text of a client")

        monkeypatch.setattr(proxy.gateway, "interpret", fall)
        status, headers, _ = await proxy.post(PATH, CHAT, authorization="Bearer canary-key")
    stockyard.print_error("a\nb\x1b[31m\x7f\u2028\x9b é", event="note", level="info")
    raw = capsys.readouterr().err
    assert raw.isascii() and raw.replace("\n", "").isprintable() and "canary" not in raw
    fault, note = read_lines(raw)
    assert status == 500 and fault["request_id"] == headers["x-stockyard-request-id"]
    assert (fault["level"], fault["event"]) == ("error", "internal_error")
    assert fault["message"].startswith("internal error: ValueError at fall:") and fault["ts"].endswith("Z")
    assert note.keys() == {"ts", "level", "event", "message"} and note["message"] == "a\nb\x1b[31m\x7f\u2028\x9b é"


def test_lines_of_text_stay_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stockyard.ERROR_LINES, "is_json", False)
    stockyard.print_error("all is well", event="note", level="info", request_id="req_1")
    stockyard.print_error("two\nlines")
    assert capsys.readouterr().err == "stockyard: all is well\nstockyard: two?lines\n"


def test_records_of_libraries_lose_their_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockyard.ERROR_LINES, "is_json", True)
    try:
        raise ValueError("canary-value")
    except ValueError as error:
        told = (ValueError, error, error.__traceback__)
        stockyard.ERROR_LINES.emit(
            logging.LogRecord("asyncio", logging.ERROR, "", 0, "Task failed: %s\ncanary", ("canary",), told)
        )
    (line,) = read_lines(capsys.readouterr().err)
    assert line["message"].startswith("asyncio: Task failed: ValueError at test_records") and "canary" not in str(line)
    assert (line["level"], line["event"]) == ("error", "library")


@pytest.mark.parametrize(("log_format", "is_json"), [("auto", True), ("json", True), ("text", False)])
def test_a_served_process_writes_what_the_setting_says(tmp_path: Path, log_format: str, is_json: bool) -> None:
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "STOCKYARD_DATA_DIR": str(tmp_path), "STOCKYARD_PORT": "0",
        "STOCKYARD_LOG_FORMAT": log_format, "OPENAI_API_KEY": "sk-canary", "STOCKYARD_ADMIN_KEY": "canary-admin-key-0123456789",
    }  # fmt: skip
    command = [sys.executable, stockyard.__file__, "serve"]
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        while not run.stdout.readline().startswith("  curl"):
            assert run.poll() is None
        run.send_signal(signal.SIGHUP)
        run.send_signal(signal.SIGTERM)
        _, err = run.communicate(timeout=40)
    assert run.returncode == 0 and "canary" not in err and "?token=" not in err
    if is_json:
        events = [line["event"] for line in read_lines(err) if line["event"] != "note"]
        assert events[0] == "start" and events[-1] == "stop"
    else:
        assert all(line.startswith("stockyard: ") for line in err.splitlines())
