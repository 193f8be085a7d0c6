// What was called: Overview, Live, Requests, and one request with all that is kept of it.

import { api, attempt, badge, bars, button, compact, copyButton, count, digitsFor, empty, field, h, head, input, line, lines, link, load, ms, pages, panel, percent, query, select, slotsOf, status, swap, table, toast, usd, when } from "./dom.js";
import { conversation } from "./conversation.js";

// ---- Overview

const SPANS = { "24h": ["24 hours", "hour"], "7d": ["7 days", "hour"], "30d": ["30 days", "day"], "90d": ["90 days", "day"] };
const FILTERS = ["model", "provider", "key"];

// Names of keys by id, for rows, which know the id alone.
const names = new Map();
async function learnNames(signal) {
  const { data } = await api("keys", { signal }).catch(() => ({ data: [] }));
  for (const key of data) names.set(key.id, key.name || key.id);
}

const hashOf = (view, values) => `#/${view}${query(values)}`;

function change(now, before) {
  if (!before || now === null || now === undefined) return null;
  const part = (now - before) / before;
  return Math.abs(part) < 0.005 ? "as before" : `${part > 0 ? "+" : "−"}${Math.abs(part) >= 10 ? `${Math.round(Math.abs(part))}×` : `${Math.round(100 * Math.abs(part))} %`}`;
}

function tile(name, figure, words) {
  return h("div", { class: "tile" }, h("dt", {}, name), h("dd", {}, h("strong", {}, figure), h("small", {}, words || " ")));
}

function tiles(told) {
  const now = told.total || {}, before = told.before || {};
  const note = (text, more) => [text, more].filter(Boolean).join(" · ");
  const { latency_ms: slow = {}, first_token_ms: first = {} } = now;
  return h("dl", { class: "tiles" },
    tile("Requests", compact(now.requests || 0), note(change(now.requests, before.requests), told.lost_rows && `${told.lost_rows} rows lost`)),
    tile("Spend", usd(now.requests ? now.cost_usd : 0), note(change(now.cost_usd, before.cost_usd), now.unpriced ? `${count(now.unpriced)} unpriced` : told.held_usd ? `${usd(told.held_usd)} held` : "")),
    tile("Tokens", compact((now.input_tokens || 0) + (now.output_tokens || 0)), `${compact(now.input_tokens || 0)} in · ${compact(now.output_tokens || 0)} out`),
    tile("Latency p50", ms(slow.p50), `p95 ${ms(slow.p95)} · p99 ${ms(slow.p99)}`),
    tile("First token p50", ms(first.p50), `p95 ${ms(first.p95)} · p99 ${ms(first.p99)}`),
    tile("Errors", percent(now.errors || 0, now.requests), `${count(now.errors || 0)} calls`),
    tile("Cache saved", usd(now.saved_usd || 0), `${count(now.cache_hits || 0)} hits · ${percent(now.cache_hits || 0, now.requests)}`),
    tile("Redactions", count(now.redactions || 0), change(now.redactions, before.redactions)));
}

function breakdown(by, rows, asked) {
  const top = Math.max(...rows.map((row) => row.requests), 1), digits = digitsFor(rows.map((row) => row.cost_usd || 0));
  const columns = [
    { name: { model: "Model", provider: "Provider", key: "Key" }[by], kind: "name", cell: (row) => [
      link(hashOf("overview", { ...asked, [by]: row.name }), (by === "key" && names.get(row.name)) || row.name || (by === "key" ? "no key" : "none")),
      h("div", { class: "share", "aria-hidden": "true" }, h("i", { "width%": (100 * row.requests) / top }))] },
    { name: "Requests", kind: "num", cell: (row) => count(row.requests) },
    { name: "Spend", kind: "num", cell: (row) => usd(row.cost_usd, digits) },
    { name: "Tokens", kind: "num lo", cell: (row) => compact(row.input_tokens + row.output_tokens) },
    { name: "p95", kind: "num lo", cell: (row) => ms(row.latency_ms.p95) },
    { name: "Errors", kind: "num", cell: (row) => percent(row.errors, row.requests) },
  ];
  return panel(`By ${by}`, rows.length ? table(`By ${by}`, columns, rows.slice(0, 12)) : empty("No calls in this span."));
}

export function overview(place, { query: given }, signal) {
  const span = SPANS[given.get("span")] ? given.get("span") : "24h";
  const [words, bucket] = SPANS[span];
  const asked = Object.fromEntries(FILTERS.filter((name) => given.has(name)).map((name) => [name, given.get(name)]));
  const wanted = { since: span, ...asked };
  const content = h("div", { class: "stack" });
  const chips = Object.entries(asked).map(([name, value]) => {
    const rest = { span, ...asked };
    delete rest[name];
    return h("a", { class: "chip", href: hashOf("overview", rest), "aria-label": `Remove the filter ${name} ${value}` }, `${name}: ${value || "none"}`, h("span", { "aria-hidden": "true" }, " ×"));
  });
  swap(place, head("Overview", null, chips, h("div", { class: "tabs", role: "group", "aria-label": "Span" }, Object.entries(SPANS).map(([id, [name]]) =>
    h("a", { href: hashOf("overview", { span: id, ...asked }), "aria-current": id === span && "true" }, name)))), content);
  const draw = () => load(content, async () => {
    const [told, series] = await Promise.all([api(`overview${query(wanted)}`, { signal }), api(`timeseries${query({ ...wanted, bucket })}`, { signal }), learnNames(signal)]);
    const slots = slotsOf(series);
    return [tiles(told),
      !told.total && empty(`No calls in the last ${words}.`, link("#/start", "Send the first one")),
      h("div", { class: "charts" },
        bars("Requests", slots, bucket, [{ name: "answered", kind: "a", of: (point) => point.requests - point.errors }, { name: "errors", kind: "e", of: (point) => point.errors }], count),
        bars("Spend", slots, bucket, [{ name: "USD", kind: "b", of: (point) => point.cost_usd }], usd),
        lines("Latency", slots, bucket, [{ name: "p50", kind: "a", of: (point) => point.latency_ms.p50 }, { name: "p95", kind: "b", of: (point) => point.latency_ms.p95 }, { name: "p99", kind: "c", of: (point) => point.latency_ms.p99 }], ms),
        bars("Tokens", slots, bucket, [{ name: "in", kind: "a", of: (point) => point.input_tokens }, { name: "out", kind: "b", of: (point) => point.output_tokens }], compact)),
      h("div", { class: "flow" }, ["model", "provider", "key"].map((by) => breakdown(by, told[by], { span, ...asked })))];
  });
  draw();
  const timer = setInterval(() => document.hidden || content.contains(document.activeElement) || draw(), 10000);
  signal.addEventListener("abort", () => clearInterval(timer));
}

// ---- Rows of the log

const COLUMNS = [
  { name: "Time", kind: "time", cell: (row) => link(`#/requests/${encodeURIComponent(row.id)}`, when(row.ts)) },
  { name: "Status", cell: (row) => [status(row), row.error && h("small", { class: "code lo" }, ` ${row.error}`)] },
  { name: "Model", kind: "name", cell: (row) => row.model || "–" },
  { name: "Provider", kind: "lo", cell: (row) => row.provider || "–" },
  { name: "Key", kind: "lo2 name", cell: (row) => row.key_id ? h("span", { title: row.key_id }, names.get(row.key_id) || row.key_id) : "–" },
  { name: "In", kind: "num lo", cell: (row) => count(row.input_tokens) },
  { name: "Out", kind: "num lo", cell: (row) => count(row.output_tokens) },
  { name: "Cost", kind: "num", cell: (row) => (row.priced ? usd(row.cost_usd, 6) : row.status && row.status < 400 ? "unpriced" : "–") },
  { name: "First token", kind: "num lo3", cell: (row) => ms(row.first_token_ms) },
  { name: "Latency", kind: "num lo", cell: (row) => ms(row.latency_ms) },
  { name: "Cache", kind: "lo2", cell: (row) => row.cache || "–" },
  { name: "Tags", kind: "lo2 tags", cell: (row) => row.tags.replaceAll(",", ", ") || "–" },
];
const open = (row) => ({ class: "open", id: row.id, onclick: (event) => event.target.closest("a") || (location.hash = `#/requests/${encodeURIComponent(row.id)}`) });

// ---- Live

const LIVE_ROWS = 200;

export function live(place, _, signal) {
  const state = badge("connecting", "warn"), told = h("span", { class: "muted" }, "0 calls seen");
  const body = table("Live calls", COLUMNS, [], open), rows = body.querySelector("tbody");
  const waiting = empty("Waiting for calls. Each shows here as it ends.", link("#/playground", "Make one in the playground"));
  let paused = false, seen = 0;
  const pause = button("Pause", () => {
    paused = !paused;
    pause.textContent = paused ? "Go on" : "Pause";
    pause.setAttribute("aria-pressed", String(paused));
  }, { "aria-pressed": "false" });
  swap(place, head("Live", "Calls as they end, the newest first.", told, state, pause), h("section", { class: "panel flush" }, body, waiting));
  learnNames(signal);
  const source = new EventSource("/api/events");
  source.onopen = () => ((state.textContent = "connected"), (state.className = "badge ok"));
  source.onerror = () => ((state.textContent = "connecting again"), (state.className = "badge warn"));
  source.addEventListener("request", (event) => {
    told.textContent = `${count(++seen)} calls seen`;
    if (paused) return;
    waiting.remove();
    const row = JSON.parse(event.data);
    document.getElementById(row.id)?.remove();
    rows.prepend(line(COLUMNS, row, open));
    while (rows.children.length > LIVE_ROWS) rows.lastChild.remove();
  });
  source.addEventListener("lost", (event) => toast(`${JSON.parse(event.data).lost} calls were too quick to be shown; they are in Requests.`));
  signal.addEventListener("abort", () => source.close());
}

// ---- Requests

const STATUSES = [["", "any status"], ["ok", "answered"], ["error", "errors"], ["4xx", "4xx"], ["429", "429"], ["5xx", "5xx"]];
const CACHES = [["", "any cache"], ["hit", "hit"], ["miss", "miss"], ["coalesced", "coalesced"], ["bypass", "bypass"]];
const SINCE = [["", "all time"], ["1h", "last hour"], ["24h", "last day"], ["7d", "last 7 days"], ["30d", "last 30 days"]];
const ASKED = ["q", "search", "model", "provider", "key", "tag", "session", "status", "cache", "since"];

export function requests(place, { query: given }, signal) {
  const wanted = Object.fromEntries(ASKED.map((name) => [name, given.get(name) || ""]));
  const text = (name, label) => field(label, input(name, { value: wanted[name], type: "search" }));
  const go = (event) => {
    event.preventDefault();
    location.hash = hashOf("requests", Object.fromEntries(new FormData(form)));
  };
  const choice = (name, label, choices) => field(label, select(name, choices, wanted[name], { onchange: (event) => go(event) }));
  const form = h("form", { class: "panel filters", role: "search", onsubmit: go },
    text("q", "Search in texts"), text("search", "Indexed words"), text("model", "Model"), text("provider", "Provider"), text("key", "Key id"), text("tag", "Tag"), text("session", "Session"),
    choice("status", "Status", STATUSES), choice("cache", "Cache", CACHES), choice("since", "Since", SINCE),
    h("div", { class: "row end" }, h("button", { type: "submit", class: "primary" }, "Apply"), link("#/requests", "Clear")));
  const list = h("section", { class: "panel flush", "aria-label": "Requests" });
  const file = (form) => h("a", { class: "button", href: `/api/requests.${form}${query(wanted)}`, download: `requests.${form}` }, form.toUpperCase());
  swap(place, head("Requests", null, file("csv"), file("jsonl")), form, list);
  const read = (cursor) => api(`requests${query({ ...wanted, limit: 50, cursor })}`, { signal });
  load(list, async () => {
    await learnNames(signal);
    return pages("Requests", COLUMNS, read, empty("No request matches.", link("#/requests", "Show all")), open);
  });
}

// ---- One request

function waterfall(row) {
  const whole = Math.max(row.latency_ms || 0, ...row.spans.map((span) => span.end_ms), 0.001);
  const tries = (row.attempt_log || []).length;
  return panel("Where the time went", h("ol", { class: "waterfall" }, row.spans.map((span) => {
    const left = (100 * span.start_ms) / whole, size = Math.max(0.4, (100 * (span.end_ms - span.start_ms)) / whole);
    const bar = h("i", { "width%": size });
    bar.style.marginLeft = `${Math.min(left, 99.5)}%`;
    return h("li", {}, h("span", {}, span.name), h("span", { class: "track", "aria-hidden": "true" }, bar), h("span", { class: "num" }, ms(span.end_ms - span.start_ms)));
  })), tries > 0 && table("Attempts", [
    { name: "Provider", cell: (line) => line.provider }, { name: "Model", kind: "name", cell: (line) => line.model },
    { name: "Status", cell: (line) => [badge(line.status || "none", line.status && line.status < 400 ? "ok" : "bad"), line.error && ` ${line.error}`] },
    { name: "Began", kind: "num lo", cell: (line) => ms(line.started_ms) }, { name: "Ended", kind: "num", cell: (line) => ms(line.ended_ms) },
    { name: "Billed", cell: (line) => line.billed || "–" }], row.attempt_log));
}

const raw = (title, value) => {
  const text = typeof value === "string" ? value : JSON.stringify(value, null, 2);
  return h("details", {}, h("summary", {}, title), h("div", { class: "raw" }, copyButton(text), h("pre", { tabindex: "0", role: "group", "aria-label": title }, text)));
};

function facts(row) {
  const pairs = [
    ["Time", when(row.ts)], ["Status", [status(row), row.error && ` ${row.error}`]], ["Model", row.model], ["Went to", row.provider && `${row.provider} / ${row.upstream_model}`],
    ["Cost", row.priced ? usd(row.cost_usd) : "unpriced"], ["Tokens", `${count(row.input_tokens)} in · ${count(row.output_tokens)} out`],
    ["Cached, reasoning", `${count(row.cached_tokens)} · ${count(row.reasoning_tokens)}`], ["Latency", ms(row.latency_ms)], ["First token", ms(row.first_token_ms)],
    ["Overhead", ms(row.overhead_ms)], ["Cache", row.cache], ["Finish", row.finish_reason], ["Endpoint", row.endpoint], ["Stream", row.stream ? "yes" : "no"],
    ["Key", names.get(row.key_id) || row.key_id], ["Tags", row.tags], ["Session", row.session && link(hashOf("requests", { session: row.session }), row.session)], ["Client", row.client_ip], ["User agent", row.user_agent], ["Verdicts", row.verdicts], ["Redactions", row.redactions || ""], ["Price", row.price_id]];
  return h("dl", { class: "facts panel" }, pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function sides(told) {
  const side = (name, one, which) => h("div", {}, h("h3", {}, name), h("p", { class: "muted" }, `${one.provider} / ${one.upstream_model} · ${usd(one.cost_usd)} · ${ms(one.latency_ms)} · ${count(one.output_tokens)} out`),
    h("pre", { class: "text", tabindex: "0", role: "group", "aria-label": name }, told.diff.map((step) => step[which] && (step.op === "equal" ? step[which] : h(which === "before" ? "del" : "ins", {}, step[which])))));
  return [h("p", { role: "status" }, told.same ? badge("the same answer", "ok") : badge("answers differ", "warn"), ` cost ${usd(told.cost_usd)}, time ${told.latency_ms > 0 ? "+" : ""}${Math.round(told.latency_ms)} ms. `, link(`#/requests/${told.replay.id}`, "The new request")),
    h("div", { class: "columns two" }, side("Logged", told.original, "before"), side("Replay", told.replay, "after"))];
}

function replayPanel(row) {
  const model = input("model", { placeholder: row.upstream_model || row.model, list: "models" }), out = h("div", { class: "stack" });
  const send = h("button", { type: "submit", class: "primary" }, "Replay");
  return panel("Replay and compare", h("form", { class: "row", onsubmit: async (event) => {
    event.preventDefault();
    const told = await attempt(() => api(`requests/${encodeURIComponent(row.id)}/replay`, { method: "POST", body: model.value ? { model: model.value } : {} }), send);
    if (told) swap(out, sides(told));
  } }, field("On the model (empty: where it went)", model), send), out);
}

function feedbackPanel(row) {
  const comment = input("comment", { maxlength: 4000 }), given = h("ul", { class: "plain" });
  const add = (one) => given.append(h("li", {}, when(one.ts), ` ${one.score ?? ""} ${one.label} ${one.comment}`));
  row.feedback.forEach(add);
  const send = (score) => async (event) => {
    const one = await attempt(() => api(`requests/${encodeURIComponent(row.id)}/feedback`, { method: "POST", body: { score, comment: comment.value } }), event.currentTarget);
    if (one) add(one);
  };
  return panel("Feedback", h("div", { class: "row" }, field("Comment", comment), button("Good", send(1)), button("Bad", send(-1))), given);
}

export function request(place, { id }, signal) {
  const content = h("div", { class: "stack" });
  swap(place, head("Request", h("code", {}, id), copyButton(id, "Copy id"), link("#/requests", "All requests")), content);
  load(content, async () => {
    const at = `requests/${encodeURIComponent(id)}`;
    const [row, why] = await Promise.all([api(at, { signal }), api(`${at}/explain`, { signal })]);
    return [facts(row),
      panel("What happened", h("ol", { class: "why" }, why.summary.map((words) => h("li", {}, words)))),
      panel("Conversation", conversation(row.request, row.response)),
      waterfall(row), replayPanel(row), feedbackPanel(row),
      panel("Raw", raw("Request body", row.request), raw("Response body", row.response), raw("Row", { ...row, request: undefined, response: undefined }), raw("Explanation", why))];
  });
}
