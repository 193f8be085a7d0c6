"""The command line on a terminal: completion in a real shell, colours, and how far long work is."""

from __future__ import annotations

import asyncio
import io
import os
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Start

import stockyard


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("stockyard cos\t --by mod\t --si\t 7d", "costs --by model --since 7d"),
        ("stockyard au\tver\t", "audit verify"),
        ("stockyard keys cr\t --ro\tvi\t --data\tdir", "keys create --role viewer --data-dir dir"),
        ("stockyard --po\t1 ", "--port 1"),
        ("stockyard logs --config ./note\t --fol\t", "logs --config ./notes.toml --follow"),
        ("stockyard backup ./note\t", "backup ./notes.toml"),
        ("stockyard completion z\t", "completion zsh"),
    ],
)
def test_bash_completes_what_is_typed(tmp_path: Path, typed: str, line: str) -> None:
    """In an interactive bash on a terminal of its own; a function stands for the program and says what it got."""
    (tmp_path / "completion").write_text(stockyard.bash_completion())
    (tmp_path / "notes.toml").touch()
    master, slave = os.openpty()
    environment = {"PATH": os.environ["PATH"], "TERM": "dumb", "INPUTRC": "/dev/null"}
    command = ["bash", "--norc", "--noprofile", "-i"]
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, cwd=tmp_path, env=environment, start_new_session=True
    ) as shell:
        try:
            os.write(master, b'source completion; stockyard() { echo "<$*>" > told; }\n' + typed.encode() + b"\nexit\n")
            heard, deadline_s = b"", time.monotonic() + 30
            while shell.poll() is None and time.monotonic() < deadline_s:
                if select.select([master], [], [], 0.1)[0]:
                    heard += os.read(master, 4096)
        finally:
            shell.kill()
            os.close(slave)
            os.close(master)
    assert (tmp_path / "told").read_text() == f"<{line}>\n", heard.decode()


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_completion_knows_every_command_and_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert stockyard.main(["completion", shell]) == 0
    told = capsys.readouterr().out
    for verb in stockyard.VERBS:
        assert verb.name in told
        for name, row in verb.arguments:
            hidden = row.get("help") is stockyard.argparse.SUPPRESS
            assert not name.startswith("-") or (name.lstrip("-") in told) is not hidden, name
    assert "data-dir" in told and "admin-key" not in told  # secrets are no flags


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert stockyard.paint(200, "ok", Terminal()) == "\x1b[32m200\x1b[0m"
    assert stockyard.paint(200, "ok", io.StringIO()) == "200"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert stockyard.paint(200, "ok", Terminal()) == "200"


@pytest.mark.parametrize(
    ("out", "err", "prints", "shows"),
    [
        (io.StringIO, Terminal, True, True), (Terminal, Terminal, False, True),
        (Terminal, Terminal, True, False), (Terminal, io.StringIO, False, False),
    ],
)  # fmt: skip
def test_long_work_tells_how_far_it_is_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch,
    out: Callable[[], io.StringIO],
    err: Callable[[], io.StringIO],
    prints: bool,
    shows: bool,
) -> None:
    monkeypatch.setattr("sys.stdout", out())
    monkeypatch.setattr("sys.stderr", told := err())
    seconds = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    with stockyard.shown_progress("rows", lambda: 2000, prints) as tell:
        tell(500)
        tell(4000)
    lines = [line.removesuffix("\x1b[K") for line in told.getvalue().split("\r")]
    bars = [f"rows [{'#' * filled:24}] {share:4.0%} of 2,000" for filled, share in ((0, 0.0), (6, 0.25), (24, 1.0))]
    assert lines == (["", *bars, ""] if shows else [""])
    with stockyard.shown_progress("rows", lambda: 0) as tell:
        tell(1234)
    assert ("rows 1,234" in told.getvalue()) is (err is Terminal)


async def test_every_long_command_tells_how_far_it_is(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start() as proxy:
        for text in "abc":
            await proxy.post("/v1/chat/completions", {"model": "echo", "messages": [{"role": "user", "content": text}]})
    monkeypatch.setenv("STOCKYARD_DATA_DIR", str(tmp_path))
    for command, counted in (
        (f"backup {tmp_path / 'copy.db'}", "bytes ["), ("costs --reprice", "rows ["), ("audit verify", "rows ["),
        ("audit export", "entries ["), ("logs --limit 0 --csv", "rows 0"),
    ):  # fmt: skip
        monkeypatch.setattr("sys.stdout", out := io.StringIO())
        monkeypatch.setattr("sys.stderr", told := Terminal())
        assert await asyncio.to_thread(stockyard.main, command.split()) == 0
        assert counted in told.getvalue() and told.getvalue().endswith("\r\x1b[K"), command
        assert out.getvalue() and "\x1b" not in out.getvalue()
