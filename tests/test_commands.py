"""The command line, run as users run it: what it prints, its exit status, and that it agrees with a running proxy.

Logs, costs, audit, backup and completion are tested beside what they read.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Proxy, Start
from test_process import Upstream
from upstreams import COMPLETION, FakeUpstream, plain

import stockyard

CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No provider and no file of the machine that runs the tests."""
    for name in [name for row in stockyard.PROVIDERS for name in (*row.key_env, *row.base_variables)]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


class Shell:
    """Runs commands on one data directory."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._flags, self._capsys = ["--data-dir", str(path)], capsys

    def run(self, *words: str, status: int = 0) -> str:
        """What a command prints; on stderr where it fails with 2."""
        assert stockyard.main([*words, *self._flags]) == status
        told = self._capsys.readouterr()
        return told.err if status == 2 else told.out

    def rows(self, *words: str) -> Any:
        return json.loads(self.run(*words, "--json"))

    async def beside(self, proxy: Proxy, *words: str, status: int = 0) -> str:
        """The same while a proxy serves the directory."""
        port = ["--port", proxy.url.rpartition(":")[2]]
        return await asyncio.to_thread(self.run, *words, *port, status=status)


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path / "data", capsys)


def test_keys_are_made_shown_rotated_and_revoked(shell: Shell) -> None:
    told = shell.run(
        "keys",
        "create",
        "--name",
        "team",
        "--limit-usd",
        "5/day",
        "--limit-rate",
        "9rpm,8parallel",
        "--models",
        "gpt-*,echo",
    )
    secret, key_id = told.split()[0], re.findall(r"key_\w+", told)[0]
    [row] = shell.rows("keys", "list")
    assert (row["id"], row["name"], row["status"], row["models"]) == (key_id, "team", "active", ["gpt-*", "echo"])
    assert (row["budget"]["usd"], row["budget"]["mode"], row["rate_limit"]["rpm"]) == (5, "hard", 9)
    assert secret not in json.dumps(row)
    assert re.search(rf"{key_id}  active +client +team +\$5/day", shell.run("keys", "list"))
    assert re.search(r"hard .* \$0 spent, \$0 held, \$5 left of \$5", shell.run("budgets"))
    assert shell.run("keys", "rotate", key_id).split()[0] != secret
    assert shell.run("keys", "revoke", key_id) == f"{key_id} is revoked\n"
    assert shell.rows("keys", "create", "--role", "viewer")[0]["role"] == "viewer"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["keys", "revoke"], "needs the id"),
        (["keys", "create", "--limit-usd", "much"], "20/day"),
        (["keys", "create", "--limit-rate", "9"], "600rpm"),
        (["keys", "rotate", "key_nobody"], "no key has this id"),
        (["logs"], "start Stockyard once"),
        (["version", "--json"], "build.sh"),
        (["redact", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_wrong_commands_are_one_sentence(shell: Shell, words: list[str], said: str) -> None:
    told = shell.run(*words, status=2)
    assert said in told
    assert told.startswith("stockyard: ")
    assert told.count("\n") == 1


def test_versions_of_what_is_bundled_are_listed(shell: Shell) -> None:
    assert shell.run("version") == f"stockyard {stockyard.__version__}\n"
    told = dict(line.split() for line in shell.run("version", "--deps").splitlines())
    assert {"stockyard", "aiohttp", "orjson", "multidict", "python", "sqlite", "openssl"} <= told.keys()


@pytest.mark.parametrize("as_json", [False, True])
def test_a_text_is_redacted_from_a_file_or_from_standard_input(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    (tmp_path / "text").write_text("Write to anna@example.org")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Write to anna@example.org")))
    for place in (str(tmp_path / "text"), "-"):
        told = shell.run("redact", place, *(["--json"] if as_json else []))
        assert "[EMAIL" in told
        assert "anna" not in told


def test_providers_models_and_routes_are_shown(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    with Upstream() as fake:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-openai")
        monkeypatch.setenv("OPENAI_BASE_URL", fake.url)
        assert [row["id"] for row in shell.rows("providers") if row["configured"]] == ["openai", "echo"]
        assert re.search(rf"^\* openai .* {fake.url}$", shell.run("providers"), re.MULTILINE)
        assert re.search(r"^gpt-4o-mini +openai +\$0.15 in, \$0.6 out per million$", shell.run("models"), re.MULTILINE)
        assert "echo" in {row["provider"] for row in shell.rows("models")}
        told = shell.run("route", "gpt-4o-mini", "--tags", "a=b", "--tokens", "5")
        assert told.startswith(f"gpt-4o-mini -> openai as gpt-4o-mini (by model list), {fake.url}; ")
        assert "input $0.15" in told
        assert "GROQ_API_KEY" in shell.run("route", "groq/llama", status=2)
        assert "sk-canary-openai" not in shell.run("config", "check") + told


@pytest.mark.parametrize("command", [["config", "check"], ["doctor", "--json"]])
@pytest.mark.parametrize(
    ("table", "wrong"),
    [
        ('[keys.a]\nname = "x"', "keys.a"), ('[[budgets]]\nusd = 1\nperiode = "day"', "periode"), ("[limits]\nrps = 3", "rps"),
        ('[routes.a]\ntarget = ["echo"]', "target"), ('[[alerts]]\nurl = "here"', "alerts"), ("[guardrails.a]\nword = 1", "words"),
    ],
)  # fmt: skip
def test_what_a_start_would_refuse_is_found_before_it(shell: Shell, command: list[str], table: str, wrong: str) -> None:
    Path("stockyard.toml").write_text(table)
    assert wrong in shell.run(*command, status=2 if command[0] == "config" else 1)


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        (
            '[[budgets]]\nusd = 1\nperiod = "day"\n\n[[budgets]]\nlimit = 1',
            "stockyard.toml, line 6: budget: `budgets[1]` has no",
        ),
        ('retries = 1\n[routes.a]\n"target" = ["echo"]', "stockyard.toml, line 3: [routes.a]: 'target' is not known"),
        ("providers.groq = {key = 1}", "stockyard.toml, line 1: [providers.groq]: 'key' is not known"),
        ("[keys.a]\nage = 1\n[keys.b]\nage = 2", "stockyard.toml, line 2 or 4: `keys.a` has no member `age`"),
        ("[[keys]]\nage = 1", "`keys` must be one table a key, as in [keys.NAME]"),
    ],
)
def test_an_unknown_name_inside_a_table_is_told_with_its_line(shell: Shell, toml: str, told: str) -> None:
    Path("stockyard.toml").write_text(toml)
    assert told in shell.run("config", "check", status=2)
    assert told in shell.run("serve", "--port", "0", status=2)


def healthy(fake: FakeUpstream) -> list[Any]:
    return []


def refusing(fake: FakeUpstream) -> list[Any]:
    return [plain({"error": {"message": "bad key"}}, 401)]


@pytest.mark.parametrize(
    ("answers", "status", "shown"), [(healthy, 0, "ok    openai "), (refusing, 1, "FAIL  openai ")]
)
def test_the_doctor_asks_every_provider(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, answers: Any, status: int, shown: str
) -> None:
    with Upstream() as fake:
        fake.answers = answers(fake)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-openai")
        monkeypatch.setenv("OPENAI_BASE_URL", fake.url)
        told = shell.run("doctor", status=status)
        document = json.loads(shell.run("doctor", "--json", status=status))
    assert shown in told
    assert "http parser in C" in told
    assert document["ok"] is (status == 0)
    assert "sk-canary" not in told + json.dumps(document)


def test_the_doctor_tells_of_settings_that_cannot_work(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCKYARD_CACHE_TTL", "x")
    assert re.search(r"FAIL  settings .*STOCKYARD_CACHE_TTL", shell.run("doctor", status=1))


async def test_logged_calls_are_shown_explained_and_replayed(
    start: Start, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shell = Shell(tmp_path, capsys)
    async with start(cache="off") as proxy:
        proxy.upstream.answers = [plain(COMPLETION)]
        assert (await proxy.post("/v1/chat/completions", CHAT))[0] == 200
        await proxy.post("/v1/chat/completions", {**CHAT, "model": "my-own"}, **{"x-stockyard-provider": "openai"})
        unpriced, row = sorted(await proxy.rows(), key=lambda row: row["priced"])
        shown = json.loads(await shell.beside(proxy, "show", row["id"]))
        assert (shown["id"], shown["attempt_log"][0]["provider"]) == (row["id"], "openai")
        told = await shell.beside(proxy, "explain", row["id"])
        assert "openai" in told
        assert "nano" in told or "$" in told
        assert json.loads(await shell.beside(proxy, "explain", row["id"], "--json"))["summary"]
        for words in (["show", "req_nobody"], ["explain", "req_nobody"]):
            await shell.beside(proxy, *words, status=1)
        again = await shell.beside(proxy, "replay", row["id"], "--model", "echo")
        assert re.search(r"^original +req_\w+ +200", again, re.MULTILINE)
        assert re.search(r"^replay +req_\w+ +200 +echo echo", again, re.MULTILINE)
        assert "+}" in again or "-]" in again
        assert json.loads(await shell.beside(proxy, "replay", row["id"], "--json"))["same"] is True
        assert "no price for my-own" in await shell.beside(proxy, "doctor", status=0)
        assert unpriced["priced"] is False
        elsewhere = await asyncio.to_thread(shell.run, "budgets", "--port", "1", status=2)
        assert "--port" in elsewhere


def test_the_demo_serves_one_completion_and_goes_on_until_it_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, stockyard.__file__, "demo", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        lines = []
        for line in run.stdout:
            lines.append(line)
            if line.startswith("It keeps serving"):
                break
        run.send_signal(signal.SIGINT)
        assert run.wait(30) == 0
    told = "".join(lines)
    assert "$ curl http://127.0.0.1:" in told
    assert json.loads(next(line for line in lines if line.startswith("{")))["choices"][0]["message"]["content"]
    assert re.search(r"Logged as req_\w+: 200 in ", told)
