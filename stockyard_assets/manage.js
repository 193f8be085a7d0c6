// What an operator sets and watches: keys and budgets, providers, routes, the cache, guardrails, the audit, settings.

import { api, ask, attempt, badge, button, bytes, copyButton, count, empty, field, h, head, input, link, load, ms, pages, panel, percent, query, select, swap, table, toast, usd, when } from "./dom.js";

const list = (text) => text.split(",").map((word) => word.trim()).filter(Boolean);
const number = (text) => (text === "" ? null : Number(text));

// ---- Keys and budgets

export function budgetBar(row) {
  const limit = Number(row.limit_usd), spent = Number(row.settled_usd), held = Number(row.held_usd);
  const used = limit ? (100 * spent) / limit : 100;
  return h("div", { class: "budget" },
    h("div", { class: "bar", role: "meter", "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.min(100, Math.round(used)), "aria-label": `${row.scope} ${row.value} ${row.period}: ${usd(spent)} spent, ${usd(held)} held, of ${usd(limit)}` },
      h("i", { class: used >= 90 ? "spent full" : "spent", "width%": used }), h("i", { class: "held", "width%": limit ? (100 * held) / limit : 0 })),
    h("small", {}, `${usd(spent)} spent · ${held ? `${usd(held)} held · ` : ""}of ${usd(limit).replace(/(\.\d\d)0+$/, "$1")} a ${row.period}`));
}

function secretPanel(made, again) {
  const secret = h("code", { class: "secret", tabindex: "0" }, made.key);
  return h("section", { class: "panel once", role: "status", "aria-label": "New secret" }, h("h2", {}, again ? "The key's new secret" : "The key is made"),
    h("p", {}, "Copy it now: it is kept as a digest alone and is not shown again."), h("div", { class: "row" }, secret, copyButton(made.key, "Copy the key")));
}

function keyForm(done) {
  const whole = { type: "number", min: "1", step: "1" };
  const send = h("button", { type: "submit", class: "primary" }, "Create key");
  return h("form", { class: "filters", onsubmit: async (event) => {
    event.preventDefault();
    const form = event.currentTarget, given = Object.fromEntries(new FormData(form));
    const body = { name: given.name, role: given.role };
    if (given.usd) body.budget = { usd: Number(given.usd), period: given.period };
    const limit = Object.fromEntries(["rpm", "tpm", "parallel"].filter((name) => given[name]).map((name) => [name, number(given[name])]));
    if (Object.keys(limit).length) body.rate_limit = limit;
    if (given.models) body.models = list(given.models);
    if (given.tags) body.tags = Object.fromEntries(list(given.tags).map((pair) => [pair.split("=")[0], pair.split("=").slice(1).join("=")]));
    if (given.expires_at) body.expires_at = new Date(given.expires_at).toISOString();
    const made = await attempt(() => api("keys", { method: "POST", body }), send);
    if (made) form.reset(), done(made);
  } },
  field("Name", input("name", { required: true, maxlength: 100 })), field("Role", select("role", [["client", "client"], ["viewer", "viewer"], ["admin", "admin"]], "client")),
  field("Budget, USD", input("usd", { type: "number", min: "0", step: "any" })), field("Period", select("period", [["day", "day"], ["week", "week"], ["month", "month"], ["total", "total"]], "day")),
  field("Requests a minute", input("rpm", whole)), field("Tokens a minute", input("tpm", whole)), field("At the same time", input("parallel", whole)),
  field("Models", input("models", { placeholder: "all, or gpt-*, echo" })), field("Tags", input("tags", { placeholder: "team=search" })), field("Expires", input("expires_at", { type: "datetime-local" })),
  h("div", { class: "row end" }, send));
}

export function keys(place, _, signal) {
  const secret = h("div"), content = h("div", { class: "stack" });
  const draw = () => load(content, async () => {
    const [known, budgets] = await Promise.all([api("keys", { signal }), api("budgets", { signal })]);
    const of = (key) => budgets.data.filter((row) => row.scope === "key" && row.value === key.id);
    const change = (path, method, again) => async (event) => {
      const told = await attempt(() => api(`keys/${path}`, { method, body: again ? {} : undefined }), event?.currentTarget);
      if (told && again) swap(secret, secretPanel(told, true));
      if (told) draw();
    };
    const columns = [
      { name: "Name", kind: "name", cell: (key) => [h("strong", {}, key.name || "unnamed"), h("small", { class: "code id" }, key.id)] },
      { name: "Status", cell: (key) => badge(key.status, key.status === "active" ? "ok" : "") },
      { name: "Budget", kind: "wide", cell: (key) => of(key).map(budgetBar).concat(of(key).length ? [] : key.budget ? `${usd(key.budget.usd)} a ${key.budget.period}` : "none") },
      { name: "Limits", kind: "lo", cell: (key) => key.rate_limit ? Object.entries(key.rate_limit).filter(([, most]) => most).map(([name, most]) => `${count(most)} ${name}`).join(", ") : "none" },
      { name: "Models", kind: "lo2 name", cell: (key) => key.models.join(", ") || "all" },
      { name: "Tags", kind: "lo2 tags", cell: (key) => Object.entries(key.tags).map((pair) => pair.join("=")).join(", ") || "–" },
      { name: "Expires", kind: "lo3", cell: (key) => when(key.expires_at) },
      { name: "Change", kind: "num", cell: (key) => key.status === "active" && h("div", { class: "row end" },
        button("Rotate", async (event) => await ask(`Give ${key.name || key.id} another secret? The old one ends at once.`, "Rotate") && change(`${key.id}/rotate`, "POST", true)({ currentTarget: event.target }), { class: "small", "aria-label": `Rotate ${key.name}` }),
        button("Revoke", async () => await ask(`Revoke ${key.name || key.id}? Calls with it are refused from now on.`, "Revoke") && change(key.id, "DELETE")(), { class: "small danger", "aria-label": `Revoke ${key.name}` })) },
    ];
    const others = budgets.data.filter((row) => row.scope !== "key");
    return [known.data.length ? h("section", { class: "panel flush" }, table("Keys", columns, known.data)) : h("section", { class: "panel" }, empty("No key yet. Once one exists, every client must send one.")),
      panel("Other budgets", others.length ? h("div", { class: "cards" }, others.map((row) => h("div", {}, h("strong", {}, [row.scope, row.value].filter(Boolean).join(" ")), " ", badge(row.mode), budgetBar(row))))
        : empty("None. STOCKYARD_BUDGET sets one for everything; stockyard.toml sets them by model, provider and tag."))];
  });
  const form = h("details", { class: "panel" }, h("summary", {}, h("strong", {}, "New key")), keyForm((made) => (swap(secret, secretPanel(made)), draw())));
  form.open = true;
  swap(place, head("Keys and budgets"), secret, form, content);
  draw();
}

// ---- Providers

export function providers(place, _, signal) {
  const content = h("div", { class: "stack" });
  swap(place, head("Providers", "Whom Stockyard may call, and how they do."), content);
  load(content, async () => {
    const told = await api("providers", { signal });
    const card = (row) => {
      const result = h("p", { role: "status", class: "muted" }, row.keys_resting ? `${row.keys_resting} of ${row.keys.length} keys rest` : " ");
      const check = button("Check", () => attempt(async () => {
        const found = await api(`providers/${encodeURIComponent(row.id)}/check`, { method: "POST" });
        swap(result, badge(found.ok ? "answers" : "fails", found.ok ? "ok" : "bad"), found.ok ? ` ${count(found.models)} models in ${ms(found.ms)}` : ` ${found.error}`);
      }, check), { class: "small", "aria-label": `Check ${row.name}` });
      const breakers = row.targets.filter((target) => target.breaker !== "closed").length;
      return h("section", { class: "panel", "aria-label": row.name }, h("div", { class: "row between" }, h("h2", {}, row.name), badge(breakers ? `${breakers} open` : row.keys_resting ? "resting" : "ready", breakers ? "bad" : row.keys_resting ? "warn" : "ok")),
        h("dl", { class: "pairs" }, [["Name", row.id], ["Address", row.base_url], ["Keys", row.keys.join(", ") || "none needed"], ["From", row.source], ["Dialect", row.dialect], ["Offers", row.offers.join(", ")]].map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
        row.targets.length > 0 && table(`Targets of ${row.name}`, [{ name: "Model", kind: "name", cell: (target) => target.model }, { name: "Breaker", cell: (target) => badge(target.breaker, target.breaker === "closed" ? "ok" : "bad") },
          { name: "In flight", kind: "num", cell: (target) => count(target.in_flight) }, { name: "Latency", kind: "num", cell: (target) => ms(target.latency_ms) }], row.targets),
        h("div", { class: "row between" }, result, check));
    };
    return [h("div", { class: "cards" }, told.data.map(card)),
      panel("Not configured", table("Providers that are not configured", [{ name: "Provider", cell: (row) => row.name }, { name: "Enabled by", kind: "wide", cell: (row) => h("code", {}, row.set) }], told.others.filter((row) => !row.retired)))];
  });
}

// ---- Routes

const price = (given) => given ? Object.entries(given).map(([name, value]) => `${name} $${value}`).join(", ") : "unpriced";

export function routes(place, { query: given }, signal) {
  const name = input("model", { value: given.get("model") || "", required: true, placeholder: "a model, route or alias" }), found = h("div", { class: "stack" }), content = h("div", { class: "stack" });
  const look = () => load(swap(found), async () => {
    const { targets } = await api(`route${query({ model: name.value })}`, { signal });
    return table("Targets in order", [
      { name: "Provider", cell: (row) => row.provider }, { name: "Model", kind: "name", cell: (row) => row.upstream_model },
      { name: "By", cell: (row) => [row.via, row.strategy].filter(Boolean).join(", ") }, { name: "State", cell: (row) => row.left_out ? badge(row.left_out, "warn") : row.rests_s ? badge(`rests ${Math.ceil(row.rests_s)} s`, "warn") : badge(row.breaker || "ready", row.breaker === "open" ? "bad" : "ok") },
      { name: "Role", kind: "lo", cell: (row) => (row.fallback ? "fallback" : row.weight ? `weight ${row.weight}` : "–") }, { name: "USD/M tokens", kind: "wide", cell: (row) => price(row.price) }], targets);
  });
  swap(place, head("Routes", "Where a name goes, in order, and why."),
    panel("Ask", h("form", { class: "row", onsubmit: (event) => (event.preventDefault(), look()) }, field("Name", name), h("button", { type: "submit", class: "primary" }, "Look up")), found), content);
  if (name.value) look();
  load(content, async () => {
    const [config, models] = await Promise.all([api("config", { signal }), api("models", { signal })]);
    const tables = config.data.filter((row) => ["routes", "aliases"].includes(row.name)).flatMap((row) => Object.entries(row.value || {}).map(([id, value]) => ({ id, kind: row.name, value })));
    const ask = (id) => link(`#/routes${query({ model: id })}`, id);
    return [panel("Routes and aliases", tables.length ? table("Routes and aliases", [{ name: "Name", kind: "name", cell: (row) => ask(row.id) }, { name: "Kind", cell: (row) => row.kind.replace(/(e?)s$/, (_, e) => (row.kind === "routes" ? "e" : "")) },
      { name: "Set as", kind: "wide", cell: (row) => h("code", {}, typeof row.value === "string" ? row.value : JSON.stringify(row.value)) }], tables) : empty("None. Write [routes] and [aliases] in stockyard.toml; `stockyard config example` shows how.")),
    panel("Models", table("Models", [{ name: "Model", kind: "name", cell: (row) => ask(row.id) }, { name: "Provider", cell: (row) => row.provider || "–" }, { name: "USD/M tokens", kind: "name", cell: (row) => (row.provider ? price(row.price) : "by route") }], models.data.slice(0, 500)))];
  });
}

// ---- Cache

export function cache(place, _, signal) {
  const content = h("div", { class: "stack" });
  const draw = () => load(content, async () => {
    const told = await api("cache", { signal }), asked = told.hits + told.misses + told.coalesced;
    const tile = (name, figure, words) => h("div", { class: "tile" }, h("dt", {}, name), h("dd", {}, h("strong", {}, figure), h("small", {}, words || " ")));
    return [h("dl", { class: "tiles" }, tile("Saved", usd(told.saved_usd)), tile("Hits", count(told.hits), percent(told.hits, asked)), tile("Misses", count(told.misses)), tile("Coalesced", count(told.coalesced), `${count(told.in_flight)} in flight`),
      tile("Entries", count(told.entries), `${count(told.memory_entries)} in memory`), tile("Size", bytes(told.bytes), `of ${bytes(told.max_bytes)}`), tile("Policy", told.policy, `scope ${told.scope}`), tile("Kept for", `${count(told.ttl_s)} s`, told.on_disk ? "on disk as well" : "in memory"))];
  });
  swap(place, head("Cache", "Answers that may be given again.", button("Empty the cache", async () => {
    if (!(await ask("Empty the cache? Equal calls will be paid again.", "Empty"))) return;
    const told = await attempt(() => api("cache", { method: "DELETE" }));
    if (told) toast(`${count(told.deleted)} entries deleted`), draw();
  }, { class: "danger" })), content);
  draw();
}

// ---- Guardrails

const GUARDS = [["redact", "Personal data", "off mask reversible"], ["guard_injection", "Prompt injection", "off flag block"], ["guard_secrets", "Keys and passwords", "off flag redact block"]];
const ACTIONS = { allow: ["ok", "Nothing was found."], flag: ["warn", "It would go to the provider as it is, and the log would say so."], redact: ["warn", "It would go to the provider as shown here."], block: ["bad", "It would be refused, and reach no provider."] };
const PLACEHOLDER = /(\[[A-Z][A-Z0-9_]*(?:_[0-9a-f]{16})?\])/;
const words = (value) => (Array.isArray(value) ? value.join(", ") : typeof value === "object" ? Object.entries(value).map(([name, inner]) => `${name}: ${words(inner)}`).join("; ") : String(value));
const without = (rule, ...names) => words(Object.fromEntries(Object.entries(rule).filter(([name]) => !names.includes(name))));

function judged(told, text) {
  const [kind, follows] = ACTIONS[told.action];
  const found = [...told.verdicts.map((one) => `Rule ${one.rule}: ${one.action}.`), ...Object.entries(told.redactions).map(([entity, times]) => `Hidden: ${entity}${times > 1 ? ` (${count(times)})` : ""}.`)];
  const marked = told.text.split(PLACEHOLDER).map((part) => (PLACEHOLDER.test(part) && !text.includes(part) ? h("mark", {}, part) : part));
  return [h("p", {}, badge(told.action, kind), " ", follows), found.length > 0 && h("ul", { class: "why" }, found.map((line) => h("li", {}, line))),
    told.action === "redact" && h("pre", { class: "text", tabindex: "0", role: "group", "aria-label": "The text as it would go" }, marked)];
}

function tryPanel() {
  const text = h("textarea", { name: "text", rows: "4", required: true, placeholder: "Paste a prompt. It is judged as a request's text would be; nothing is sent or logged." }), out = h("div", { class: "stack", role: "status" });
  const send = h("button", { type: "submit", class: "primary" }, "Try");
  return panel("Try a text", h("form", { class: "composer", onsubmit: async (event) => {
    event.preventDefault();
    const told = await attempt(() => api("guardrails/try", { method: "POST", body: { text: text.value } }), send);
    if (told) swap(out, judged(told, text.value));
  } }, field("Text", text), h("div", { class: "row end" }, send)), out);
}

export function guardrails(place, _, signal) {
  const content = h("div", { class: "stack" });
  const draw = () => load(content, async () => {
    const told = await api("guardrails", { signal });
    const set = (name) => async (event) => {
      if (await attempt(() => api("guardrails", { method: "PUT", body: { [name]: event.target.value } }), event.target)) toast("Set, and kept in stockyard.toml");
      draw();
    };
    const rows = (of) => Object.entries(told[of]).map(([id, rule]) => ({ id, rule }));
    const name = { name: "Name", kind: "name", cell: (row) => h("strong", {}, row.id) };
    return [panel("Built in", h("div", { class: "filters" }, GUARDS.map(([id, label, choices]) => field(label, select(id, choices.split(" ").map((one) => [one, one]), told[id], { onchange: set(id) }))))),
      panel("Rules of your own", rows("rules").length ? table("Rules of your own", [name, { name: "Looks for", kind: "wide", cell: ({ rule }) => without(rule, "action", "on", "models", "keys", "tags", "timeout_ms") },
        { name: "In", cell: ({ rule }) => words(rule.on || "input") }, { name: "Then", cell: ({ rule }) => badge(rule.action || "block", ACTIONS[rule.action || "block"][0]) },
        { name: "Where", kind: "lo name", cell: ({ rule }) => words(Object.fromEntries(["models", "keys", "tags"].filter((one) => rule[one]).map((one) => [one, rule[one]]))) || "every call" }], rows("rules")) : empty("None. Write [guardrails.NAME] in stockyard.toml; `stockyard config example` shows how.")),
      rows("recognisers").length > 0 && panel("Recognisers of your own", table("Recognisers of your own", [name, { name: "Finds", kind: "wide", cell: ({ rule }) => h("code", {}, without(rule)) }], rows("recognisers")))];
  });
  swap(place, head("Guardrails", "What is looked for in texts, and what follows."), tryPanel(), content);
  draw();
}

// ---- Audit

const DEEDS = {
  admin: (row) => [h("code", {}, `${row.method} ${row.path}`), " ", badge(row.status, row.status < 400 ? "ok" : "bad"), row.body && Object.keys(row.body).length > 0 && h("small", { class: "code" }, ` ${JSON.stringify(row.body)}`)],
  began: () => "The chain begins", calls: (row) => `${count(row.count)} call${row.count === 1 ? "" : "s"} sealed`, checkpoint: () => "Checkpoint", session: (row) => `Signed in as ${row.role}`,
};

export function audit(place, _, signal) {
  const content = h("section", { class: "panel flush", "aria-label": "Entries" }), result = h("div", { role: "status" });
  const verify = button("Verify", () => attempt(async () => {
    swap(result, h("p", {}, "Verifying…"));
    const told = await api("audit/verify", { signal }).finally(() => swap(result));
    swap(result, h("p", { class: "panel" }, badge(told.ok ? "whole" : "broken", told.ok ? "ok" : "bad"), told.ok ? ` ${count(told.entries)} entries and ${count(told.calls)} calls: nothing was changed.` : ` ${told.fault}`));
  }, verify), { class: "primary" });
  const seal = button("Checkpoint", () => attempt(async () => {
    const made = JSON.stringify(await api("audit/checkpoint", { method: "POST" }));
    swap(result, panel("A signed checkpoint", h("p", {}, "Keep this line elsewhere: held against it, a chain that was cut off or written anew shows."), h("div", { class: "raw" }, copyButton(made), h("pre", {}, made))));
    draw();
  }, seal));
  const draw = () => load(content, () => pages("Entries", [
    { name: "Entry", kind: "num", cell: (row) => row.seq }, { name: "Time", cell: (row) => when(row.ts) }, { name: "What", kind: "wide", cell: (row) => DEEDS[row.kind]?.(row) ?? row.kind },
    { name: "By", kind: "lo name", cell: (row) => row.actor || "–" }, { name: "From", kind: "lo2", cell: (row) => row.client_ip || "–" }, { name: "Digest", kind: "lo2", cell: (row) => h("code", { title: row.digest }, row.digest.slice(0, 12)) }],
    (cursor) => api(`audit${query({ cursor })}`, { signal }), empty("Nothing yet.")));
  swap(place, head("Audit", "What administrators did, and seals of the log, in a chain that shows every change.", seal, verify), result, content);
  draw();
}

// ---- Settings

export function settings(place, _, signal) {
  const content = h("section", { class: "panel flush", "aria-label": "Settings" });
  const draw = () => load(content, async () => {
    const { data } = await api("config", { signal });
    return table("Settings", [
      { name: "Name", cell: (row) => h("code", {}, row.name) },
      { name: "Value", kind: "name", cell: (row) => h("code", { class: row.source === "default" ? "muted" : "set" }, typeof row.value === "object" ? JSON.stringify(row.value) : String(row.value ?? "") || "–") },
      { name: "From", cell: (row) => badge(row.source, row.source === "default" ? "" : "ok") },
      { name: "Reloads", kind: "lo", cell: (row) => (row.live ? "yes" : "at start") },
      { name: "Meaning", kind: "wide lo", cell: (row) => row.help }], data);
  });
  swap(place, head("Settings", "The merged configuration, secrets masked. Flag, environment, stockyard.toml, default: the first that says it wins.", button("Reload", async (event) => {
    const told = await attempt(() => api("config/reload", { method: "POST" }), event.currentTarget);
    if (told) toast(told.changed.length ? `Changed: ${told.changed.join(", ")}` : "Nothing had changed"), draw();
  })), content);
  draw();
}
