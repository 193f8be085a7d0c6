"""Measure whether a call through Stockyard costs the same whatever surrounds it, in one run.

    python tests/bench/scale.py [--stockyard PATH] [--log stockyard.db] [--save]

Plain chat completions over 32 busy connections, as in run.py, beside: idle connections, virtual keys that are never
used, rows in the log from before (and those of a larger one, which --log names). Then bodies of growing size, one call at a time. CPU is the user and system time of
the whole process, its log writer included, without the upstream. Each figure is the median of three, the cases taking
turns; what matters is that a column stays flat, for times differ between machines. --save writes SCALE.md.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import http.server
import json
import os
import platform
import resource
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import run

sys.path.insert(0, str(run.ROOT))
import stockyard

IDLE, KEYS, ROWS = (0, 1_000, 10_000), (1, 1_000, 10_000), (0, 30_000)
BODIES_BYTES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
ROUNDS, SECONDS = 2, 1


def start(program: str, folder: Path, upstream_port: int, toml: str = "", warm: bool = True) -> run.Target:
    """Stockyard in a folder that may hold a log from before."""
    command = [sys.executable, program] if program.endswith(".py") else [program]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stockyard.toml").write_text(toml)
    with closing(run.socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith("STOCKYARD_")} | {
        "STOCKYARD_DATA_DIR": str(folder / "data"), "STOCKYARD_PORT": str(port), "STOCKYARD_CACHE": "off",
        "STOCKYARD_LOG_MB": "100000", "STOCKYARD_LOG_RETENTION": "3650",
        "STOCKYARD_CONFIG": str(folder / "stockyard.toml"), "OPENAI_API_KEY": "sk-bench",
        "OPENAI_BASE_URL": f"http://127.0.0.1:{upstream_port}/v1",
    }  # fmt: skip
    with (folder / "output.log").open("wb") as log:
        process = subprocess.Popen([*command, "serve"], cwd=folder, env=env, stdout=log, stderr=log)
    target = run.Target("Stockyard", port, process, folder)
    run.wait_until_ready(target, "/health")
    if warm:
        run.wrk(target, run.CHAT_CONNECTIONS, 1)
    return target


def cpu_of_chat(target: run.Target) -> float:
    """CPU µs a plain completion."""
    before_us = run.settled_cpu_us(target)
    requests, *_ = run.wrk(target, run.CHAT_CONNECTIONS, SECONDS)
    return (run.settled_cpu_us(target) - before_us) / requests


def cpu_of_body(target: run.Target, size_bytes: int) -> float:
    """CPU µs a completion whose request is so long."""
    message = {"role": "user", "content": "All work and no play makes Jack a dull boy. " * (size_bytes // 44)}
    body, calls = json.dumps({"model": "gpt-4o-mini", "messages": [message]}), max(10, min(300, 10**7 // size_bytes))
    before_us = run.settled_cpu_us(target)
    with closing(http.client.HTTPConnection("127.0.0.1", target.port, timeout=30)) as connection:
        for _ in range(calls):
            connection.request("POST", run.CHAT_PATH, body, run.HEADERS)
            answer = connection.getresponse()
            if (answer.status, bool(answer.read())) != (200, True):
                sys.exit(f"a request of {size_bytes} bytes was answered with {answer.status}")
    return (run.settled_cpu_us(target) - before_us) / calls


class LongUpstream(http.server.BaseHTTPRequestHandler):
    """Takes a body of any length, which upstream.c does not."""

    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # head and body in one segment, at once
    ANSWER = json.dumps({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-4o-mini",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
    }).encode()  # fmt: skip

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self.ANSWER)))
        self.end_headers()
        self.wfile.write(self.ANSWER)

    def log_message(self, format: str, *args: object) -> None:
        pass


def keys_toml(count: int) -> str:
    """So many virtual keys; the one that the benchmark sends is among them."""
    secrets = ["sk-bench", *(f"sk-idle-{number}" for number in range(1, count))]
    digests = [hashlib.sha256(secret.encode()).hexdigest() for secret in secrets]
    return "".join(f'[keys.k{number}]\ndigest = "sha256:{digest}"\n' for number, digest in enumerate(digests))


def fill_log(folder: Path, count: int) -> None:
    """A log with so many rows of the last 30 days, written as the server writes them."""
    data = folder / "data"
    data.mkdir(parents=True, mode=0o700)
    store, now_ms = stockyard.LogStore(data / "stockyard.db"), int(time.time() * 1000)
    endpoint = stockyard.Endpoint("chat", run.CHAT_PATH, streams=True)
    for number in range(count):
        call_id, ts_ms = (
            f"req_{number:09x}{number & 0x1FFFFFF:07x}bench000",
            now_ms - (count - number) * 2_592_000_000 // count,
        )
        call = stockyard.Call(call_id, ts_ms, 0.0, endpoint, {}, b'{"model":"gpt-4o-mini"}')
        call.model = call.upstream_model = f"model-{number % 20}"
        call.provider, call.status, call.ended_s = "openai", 200, 0.5
        store.put(call)
        while store.queued_rows > 15_000:
            time.sleep(0.01)
    store.close()


def copy_log(log: Path, folder: Path) -> int:
    """Bring a log of another run among the folders; how many rows it has."""
    with closing(sqlite3.connect(log)) as connection:
        [[count]] = connection.execute("SELECT COUNT(*) FROM calls")
        data = folder / f"rows{count}/data"
        data.mkdir(parents=True, mode=0o700)
        connection.execute("VACUUM INTO ?", (str(data / "stockyard.db"),))
    return int(count)


@contextmanager
def idle_connections(target: run.Target, count: int) -> Iterator[None]:
    with run.connections_to(target, count):
        yield


def measure(program: str, folder: Path, upstream_port: int, log: Path | None) -> Mapping[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}

    def turns(what: str, targets: Mapping[int, run.Target]) -> None:
        seen: dict[int, list[float]] = {size: [] for size in targets}
        for number in range(ROUNDS):
            print(f"{what}, round {number + 1}", file=sys.stderr, flush=True)
            for size, target in targets.items():
                with idle_connections(target, size if what == "idle connections" else 0):
                    seen[size].append(cpu_of_body(target, size) if what == "bytes of body" else cpu_of_chat(target))
        found[what] = [(size, median(values)) for size, values in seen.items()]

    plain = start(program, folder / "plain", upstream_port)
    targets = [plain]
    try:
        turns("idle connections", dict.fromkeys(IDLE, plain))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), LongUpstream) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            targets.append(start(program, folder / "bodies", server.server_port, warm=False))
            turns("bytes of body", dict.fromkeys(BODIES_BYTES, targets[-1]))
            server.shutdown()
        with_keys = {count: start(program, folder / f"keys{count}", upstream_port, keys_toml(count)) for count in KEYS}
        targets += with_keys.values()
        turns("virtual keys", with_keys)
        for count in ROWS:
            fill_log(folder / f"rows{count}", count)
        rows = ROWS if log is None else (*ROWS, copy_log(log, folder))
        with_rows = {count: start(program, folder / f"rows{count}", upstream_port) for count in rows}
        targets += with_rows.values()
        turns("rows in the log", with_rows)
    finally:
        for target in targets:
            run.stop(target.process)
    return found


def report(found: Mapping[str, list[tuple[int, float]]]) -> str:
    lines = [
        f"# Scale\n\n{datetime.now(UTC):%Y-%m-%d %H:%M} UTC. {os.cpu_count()} cores, {platform.machine()}, "
        f"Python {run.version('python3', '--version')}.\n",
        "| beside, or with | how many | CPU µs a call | against the first |", "| --- | --: | --: | --: |",
    ]  # fmt: skip
    for what, values in found.items():
        lines += [f"| {what} | {size:,} | {us:,.0f} | {us / values[0][1]:.2f} |" for size, us in values]
    (small, small_us), (large, large_us) = found["bytes of body"][0], found["bytes of body"][-1]
    return "\n".join(lines) + f"\n\nA byte of request costs {1000 * (large_us - small_us) / (large - small):.1f} ns.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stockyard", type=os.path.abspath, default=str(run.ROOT / "dist/stockyard"))
    parser.add_argument("--log", type=Path, help="stockyard.db of another run, to be measured beside as well")
    parser.add_argument("--save", action="store_true", help="write SCALE.md beside this file")
    options = parser.parse_args()
    files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    with tempfile.TemporaryDirectory(prefix="stockyard-scale-") as folder:
        subprocess.run(
            [run.shutil.which("cc") or "gcc", "-O2", "-o", f"{folder}/upstream", run.HERE / "upstream.c"], check=True
        )
        with closing(run.socket.create_server(("127.0.0.1", 0))) as free:
            port = free.getsockname()[1]
        upstream = subprocess.Popen([f"{folder}/upstream", str(port), "0", "64", "0"], start_new_session=True)
        try:
            text = report(measure(options.stockyard, Path(folder), port, options.log))
        finally:
            run.stop(upstream)
    print(text, end="")
    if options.save:
        (run.HERE / "SCALE.md").write_text(text)


if __name__ == "__main__":
    main()
