-- Posts what run.py leaves in the environment, and reports in one line: requests, failures, µs, p50 µs, p99 µs.
wrk.method, wrk.body = "POST", os.getenv("BENCH_BODY")
wrk.headers["Content-Type"], wrk.headers["Authorization"] = "application/json", "Bearer sk-bench"

function done(summary, latency)
  local e = summary.errors
  local failures = e.connect + e.read + e.write + e.status + e.timeout
  io.write("RESULT ", string.format("%d %d %d %d %d", summary.requests, failures, summary.duration,
    latency:percentile(50), latency:percentile(99)), "\n")
end
