// What every view builds with: elements (text nodes only), words for numbers and times, the admin API, small charts.
// Nothing here makes markup of text: model output, names and tags come from strangers.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else if (name === "width%") node.style.width = `${Math.max(0, Math.min(100, value))}%`;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(4).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
export const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
export const swap = (node, ...children) => (node.replaceChildren(...children.flat(4).filter(Boolean)), node);

// ---- Words for numbers and times

const plain = new Intl.NumberFormat(undefined, { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat(undefined, { notation: "compact", maximumFractionDigits: 1 });
const date = new Intl.DateTimeFormat(undefined, { month: "short", day: "2-digit" });
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
const day = new Intl.DateTimeFormat(undefined, { month: "short", day: "2-digit", timeZone: "UTC" }); // a bucket is a day of UTC
const hour = new Intl.DateTimeFormat(undefined, { month: "short", day: "2-digit", hour: "2-digit", minute: "2-digit", hour12: false });

export const count = (value) => (value === null || value === undefined ? "–" : plain.format(value));
export const compact = (value) => (value === null || value === undefined ? "–" : value < 10000 ? plain.format(value) : short.format(value));
const digitsOf = (size) => (size === 0 || size >= 1 ? 2 : size >= 0.01 ? 4 : 6);
// As many digits as all amounts of a column need, so that their points stand below each other.
export const digitsFor = (amounts) => (amounts.some((one) => one >= 1) ? Math.min(4, Math.max(2, ...amounts.map(digitsOf))) : Math.max(2, ...amounts.map(digitsOf)));
export function usd(value, wanted) {
  if (value === null || value === undefined) return "–";
  const amount = Number(value), size = Math.abs(amount), digits = wanted ?? digitsOf(size);
  return `${amount < 0 ? "−" : ""}$${size.toFixed(digits)}`;
}
export function ms(value) {
  if (value === null || value === undefined) return "–";
  return value >= 1000 ? `${(value / 1000).toFixed(value >= 10000 ? 1 : 2)} s` : value >= 100 ? `${plain.format(value)} ms` : `${value.toFixed(1)} ms`;
}
export function bytes(value) {
  if (value === null || value === undefined) return "–";
  return value >= 1048576 ? `${(value / 1048576).toFixed(1)} MB` : value >= 1024 ? `${(value / 1024).toFixed(1)} kB` : `${value} B`;
}
export const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(part && part / whole < 0.1 ? 1 : 0)} %` : "–");
const inUtc = (at) => `${at.toISOString().replace("T", " ").replace(/(:00\.000)?Z$/, "")} UTC`;
export function when(text) {
  if (!text) return h("span", {}, "–");
  const at = new Date(text);
  const today = at.toDateString() === new Date().toDateString(); // then a narrow screen shows the hour alone
  return h("time", { datetime: text, title: inUtc(at) }, h("span", { class: today && "lo" }, `${date.format(at)}, `), clock.format(at));
}
const bucketWords = (at, bucket) => (bucket === "day" ? day : hour).format(at);

// ---- The admin API

export const session = { csrf: "", role: "" };

export class ApiError extends Error {
  constructor(message, status, code) {
    super(message);
    Object.assign(this, { status, code });
  }
}

export async function call(path, { method = "GET", body, signal, headers } = {}) {
  let answer;
  try {
    answer = await fetch(path, {
      method, signal, credentials: "same-origin", cache: "no-store",
      headers: { ...(body === undefined ? {} : { "content-type": "application/json" }), ...(method === "GET" ? {} : { "x-stockyard-csrf": session.csrf }), ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("Stockyard does not answer. Is it running?", 0, "unreachable");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  if (answer.status === 401 && path !== "/api/session") window.dispatchEvent(new Event("signed-out"));
  throw new ApiError(told.error?.message || `${answer.status} ${answer.statusText}`, answer.status, told.error?.code);
}

export const api = async (path, options) => (await call(`/api/${path}`, options)).json();

export function query(values) {
  const given = Object.entries(values).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return given.length ? `?${new URLSearchParams(given)}` : "";
}

// ---- Pieces of pages

export const head = (title, words, ...controls) =>
  h("header", { class: "head" }, h("div", {}, h("h1", { tabindex: "-1" }, title), words && h("p", {}, words)), h("div", { class: "row" }, controls));
export const panel = (title, ...children) => h("section", { class: "panel", "aria-label": title }, h("h2", {}, title), children);
export const empty = (words, ...more) => h("div", { class: "empty" }, h("p", {}, words), more);
export const badge = (words, kind) => h("span", { class: `badge ${kind || ""}` }, words);
export const button = (words, onclick, attributes) => h("button", { type: "button", onclick, ...attributes }, words);
export const link = (href, ...children) => h("a", { href }, children);

export function status(row) {
  if (!row.status) return badge("running", "warn");
  return badge(String(row.status), row.status < 400 ? "ok" : row.status === 429 || row.status === 499 ? "warn" : "bad");
}

export function field(label, control, hint) {
  return h("label", { class: "field" }, h("span", {}, label), control, hint && h("small", {}, hint));
}
export const input = (name, attributes) => h("input", { name, id: `in-${name}`, autocomplete: "off", spellcheck: "false", ...attributes });
export const select = (name, choices, value, attributes) =>
  h("select", { name, ...attributes }, choices.map(([id, words]) => h("option", { value: id, selected: id === value }, words)));

// columns: [{name, cell(row), kind}]; "num" aligns to the right, "lo", "lo2" and "lo3" hide on narrow screens, "name", "tags"
// and "wide" may wrap. A table with a wide column becomes a list of its rows on a telephone.
export function table(label, columns, rows, more) {
  const body = h("tbody", {}, rows.map((row) => line(columns, row, more)));
  const stacks = columns.some((column) => column.kind?.includes("wide"));
  return h("div", { class: stacks ? "scroll stacks" : "scroll", tabindex: "0", role: "group", "aria-label": label },
    h("table", {}, h("thead", {}, h("tr", {}, columns.map((column) => h("th", { scope: "col", class: column.kind }, column.name)))), body));
}
export const line = (columns, row, more) => h("tr", more ? more(row) : {}, columns.map((column) => h("td", { class: column.kind, "data-name": column.name }, column.cell(row))));

// A table of what `read(cursor)` answers, {data, next}, page by page.
export async function pages(label, columns, read, nothing, more) {
  let page = await read("");
  if (!page.data.length) return nothing;
  const shown = table(label, columns, page.data, more), rows = shown.querySelector("tbody");
  const older = button("Show older", () => attempt(async () => {
    page = await read(page.next);
    rows.append(...page.data.map((row) => line(columns, row, more)));
    foot.hidden = !page.next;
  }, older)), foot = h("div", { class: "row more", hidden: !page.next }, older);
  return [shown, foot];
}

export function toast(words, kind) {
  const place = document.getElementById("toasts");
  const note = h("div", { class: `toast ${kind || ""}` }, words);
  place?.append(note);
  setTimeout(() => note.remove(), kind === "bad" ? 8000 : 3500);
}

export function copyButton(text, words = "Copy") {
  return button(words, async (event) => {
    const pressed = event.currentTarget;
    await navigator.clipboard.writeText(text).catch(() => {});
    pressed.textContent = "Copied";
    setTimeout(() => (pressed.textContent = words), 1500);
  }, { class: "small" });
}

// Fills `place` with what `work` answers; shows that it loads, and a failure with a way to try again.
export async function load(place, work) {
  if (!place.childNodes.length) swap(place, h("div", { class: "loading", role: "status" }, "Loading…"));
  place.setAttribute("aria-busy", "true");
  try {
    const made = await work();
    if (made !== undefined) swap(place, made);
  } catch (error) {
    if (error.name === "AbortError") return;
    swap(place, h("div", { class: "fault", role: "alert" }, h("p", {}, error.message), button("Try again", () => (swap(place), load(place, work)))));
  } finally {
    place.removeAttribute("aria-busy");
  }
}

// Runs a change that a person asked for; a failure is told and not thrown on.
export async function attempt(work, pressed) {
  if (pressed) pressed.disabled = true;
  try {
    return await work();
  } catch (error) {
    toast(error.message, "bad");
  } finally {
    if (pressed) pressed.disabled = false;
  }
}

export function ask(words, action) {
  return new Promise((resolve) => {
    const box = h("dialog", { "aria-label": words, onclose: () => (box.remove(), resolve(box.returnValue === "yes")) },
      h("p", {}, words), h("div", { class: "row end" }, button("Cancel", () => box.close("no")), button(action, () => box.close("yes"), { class: "danger" })));
    document.body.append(box);
    box.showModal();
  });
}

// ---- Charts: `slots` are all buckets of the span in order, each with `at` and the point of find_points, or none.

export function slotsOf(series) {
  const width = { hour: 3600000, day: 86400000 }[series.bucket];
  const points = new Map(series.data.map((point) => [Date.parse(point.ts), point]));
  const slots = [];
  for (let at = Math.floor(Date.parse(series.since) / width) * width; at < Date.parse(series.until); at += width) slots.push({ at, point: points.get(at) });
  return slots;
}

const WIDE = 600, HIGH = 120;

function frame(title, figure, slots, bucket, words, drawn, legend) {
  const ends = slots.length ? [bucketWords(slots[0].at, bucket), bucketWords(slots[slots.length >> 1].at, bucket), bucketWords(slots[slots.length - 1].at, bucket)] : [];
  return h("figure", { class: "panel chart" }, h("figcaption", {}, h("h2", {}, title), legend, h("span", { class: "top" }, figure)),
    s("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, preserveAspectRatio: "none", role: "img", "aria-label": `${title}: ${words}` },
      [0.25, 0.5, 0.75].map((part) => s("line", { class: "grid", x1: 0, x2: WIDE, y1: HIGH * part, y2: HIGH * part })), drawn),
    h("div", { class: "axis", "aria-hidden": "true" }, ends.map((text) => h("span", {}, text))));
}

const tip = (slot, bucket, words) => s("title", {}, `${bucketWords(slot.at, bucket)}: ${words}\n${inUtc(new Date(slot.at))}`);

// parts: [{name, kind, of(point)}], stacked from the bottom.
export function bars(title, slots, bucket, parts, show) {
  const sums = slots.map(({ point }) => (point ? parts.reduce((sum, part) => sum + (part.of(point) || 0), 0) : 0));
  const top = Math.max(...sums, 0), step = WIDE / (slots.length || 1);
  const drawn = slots.map((slot, index) => {
    let y = HIGH;
    const piled = parts.map((part) => {
      const size = slot.point && top ? ((part.of(slot.point) || 0) / top) * (HIGH - 6) : 0;
      y -= size;
      return size > 0 && s("rect", { class: part.kind, x: index * step + step * 0.12, width: step * 0.76, y, height: size });
    });
    return s("g", {}, piled, s("rect", { class: "hit", x: index * step, width: step, y: 0, height: HIGH }, tip(slot, bucket, show(sums[index]))));
  });
  const legend = parts.length > 1 && h("span", { class: "legend" }, parts.map((part) => h("span", { class: part.kind }, part.name)));
  return frame(title, top ? `peak ${show(top)}` : "nothing yet", slots, bucket, `peak ${show(top)}`, drawn, legend);
}

// lines: [{name, kind, of(point)}]; a bucket without a value leaves a gap, a lone one is a dot.
export function lines(title, slots, bucket, kinds, show) {
  const top = Math.max(...slots.flatMap(({ point }) => kinds.map((kind) => (point && kind.of(point)) || 0)), 0);
  const step = WIDE / (slots.length || 1), x = (index) => (index + 0.5) * step, y = (value) => HIGH - 3 - (value / top) * (HIGH - 9);
  const drawn = top ? kinds.map((kind) => {
    const values = slots.map(({ point }) => (point ? kind.of(point) : null) ?? null), known = (index) => (values[index] ?? null) !== null;
    let path = "", dots = "";
    values.forEach((value, index) => {
      if (value === null) return;
      const place = `${x(index).toFixed(1)} ${y(value).toFixed(1)}`;
      path += (known(index - 1) ? "L" : "M") + place;
      if (!known(index - 1) && !known(index + 1)) dots += `M${place}h.01`;
    });
    return [s("path", { class: `stroke ${kind.kind}`, d: path }), s("path", { class: `stroke dot ${kind.kind}`, d: dots })];
  }) : [];
  const hits = slots.map((slot, index) => slot.point && s("rect", { class: "hit", x: index * step, width: step, y: 0, height: HIGH },
    tip(slot, bucket, kinds.map((kind) => `${kind.name} ${show(kind.of(slot.point))}`).join(", "))));
  return frame(title, top ? `peak ${show(top)}` : "nothing yet", slots, bucket, `peak ${show(top)}`, [drawn, hits],
    h("span", { class: "legend" }, kinds.map((kind) => h("span", { class: kind.kind }, kind.name))));
}
