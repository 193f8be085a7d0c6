-- Posts what run.py leaves in the environment, and reports in one line: requests, failures, µs, p50 µs, p99 µs.
wrk.method, wrk.body = "POST", os.getenv("BENCH_BODY")
wrk.headers["Content-Type"], wrk.headers["Authorization"] = "application/json", "Bearer sk-bench"

local pause_ms, body, asked = tonumber(os.getenv("BENCH_PAUSE_MS")), wrk.body, 0
if pause_ms > 0 then
  function delay() return math.random(0, 2 * math.floor(pause_ms)) end
end
if body:find("~") then  -- every question is another one
  function request()
    asked = asked + 1
    return wrk.format(nil, nil, nil, (body:gsub("~", asked)))
  end
end

function done(summary, latency)
  local e = summary.errors
  local failures = e.connect + e.read + e.write + e.status + e.timeout
  io.write("RESULT ", string.format("%d %d %d %d %d", summary.requests, failures, summary.duration,
    latency:percentile(50), latency:percentile(99)), "\n")
end
