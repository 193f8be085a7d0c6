// The frame: signing in, the list of views, and which one is shown (the address after #). A view is a function of
// (place, address, signal): it fills the place; the signal fires when the person leaves, and ends its timers and reads.

import { ApiError, api, attempt, button, call, field, h, input, select, session, swap } from "./dom.js";
import { live, overview, request, requests } from "./traffic.js";
import { audit, cache, guardrails, keys, providers, routes, settings } from "./manage.js";
import { playground, start } from "./playground.js";

const VIEWS = [
  ["overview", "Overview", overview],
  ["live", "Live", live],
  ["requests", "Requests", requests],
  ["playground", "Playground", playground],
  ["keys", "Keys and budgets", keys],
  ["providers", "Providers", providers],
  ["routes", "Routes", routes],
  ["cache", "Cache", cache],
  ["guardrails", "Guardrails", guardrails],
  ["audit", "Audit", audit],
  ["settings", "Settings", settings],
  ["start", "Get started", start],
];

let leaving = new AbortController();

function theme() {
  const choices = [["auto", "Theme: system"], ["light", "Theme: light"], ["dark", "Theme: dark"]];
  return select("theme", choices, document.documentElement.dataset.theme, {
    "aria-label": "Theme",
    onchange: (event) => {
      localStorage.setItem("theme", event.target.value);
      document.documentElement.dataset.theme = event.target.value;
    },
  });
}

const brand = () => h("a", { class: "brand", href: "#/overview" }, h("img", { src: "/ui/icon.svg", alt: "", width: 24, height: 24 }), "Stockyard");

function frame() {
  const nav = h("nav", { "aria-label": "Views" }, VIEWS.map(([id, name]) => h("a", { href: `#/${id}`, id: `nav-${id}` }, name)));
  swap(document.body,
    h("a", { class: "skip", href: "#main", onclick: (event) => (event.preventDefault(), document.getElementById("main").focus()) }, "Skip to content"),
    h("aside", {}, brand(), nav, h("div", { class: "foot" }, theme(), button("Sign out", signOut, { class: "quiet" }))),
    h("main", { id: "main", tabindex: "-1" }),
    h("div", { id: "toasts", role: "status", "aria-live": "polite" }));
}

async function signOut() {
  await attempt(() => call("/api/session", { method: "DELETE" }));
  signIn();
}

function signIn(words) {
  leaving.abort();
  document.title = "Sign in · Stockyard";
  const told = h("p", { class: "bad", role: "alert" }, words || "");
  const key = input("key", { type: "password", required: true, autocomplete: "current-password" });
  const form = h("form", {
    class: "panel sign-in",
    onsubmit: async (event) => {
      event.preventDefault();
      try {
        await enter({ key: key.value.trim() });
      } catch (error) {
        told.textContent = error.message;
        key.focus();
      }
    },
  }, brand(), h("h1", {}, "Sign in"), field("Admin key", key, "It lies in admin.key in the data directory; the link printed at start signs in as well."),
  told, h("button", { type: "submit", class: "primary" }, "Sign in"));
  swap(document.body, h("main", { id: "main", class: "alone" }, form));
  key.focus();
}

async function enter(given) {
  Object.assign(session, await api("session", { method: "POST", body: given }));
  await open();
}

async function open() {
  frame();
  if (!location.hash) {
    const { total } = await api("overview").catch(() => ({}));
    if (!location.hash) history.replaceState(null, "", total ? "#/overview" : "#/start");
  }
  show();
}

function show() {
  leaving.abort();
  leaving = new AbortController();
  const [path, search] = location.hash.slice(2).split("?");
  const [id, ...rest] = path.split("/");
  const view = VIEWS.find(([name]) => name === id) || VIEWS[0];
  const main = document.getElementById("main");
  for (const other of document.querySelectorAll("nav a")) other.removeAttribute("aria-current");
  const chosen = document.getElementById(`nav-${view[0]}`);
  chosen?.setAttribute("aria-current", "page");
  chosen?.scrollIntoView({ block: "nearest", inline: "nearest" });
  document.title = `${view[1]} · Stockyard`;
  swap(main);
  const part = id === "requests" && rest[0] ? request : view[2];
  part(main, { id: rest[0] ? decodeURIComponent(rest[0]) : "", query: new URLSearchParams(search || "") }, leaving.signal);
  window.scrollTo(0, 0);
}

window.addEventListener("hashchange", () => {
  if (!document.querySelector("nav")) return;
  show();
  document.querySelector("h1")?.focus({ preventScroll: true });
});
window.addEventListener("signed-out", () => signIn("The session has ended. Sign in again."));

async function begin() {
  const token = new URLSearchParams(location.search).get("token");
  if (token) history.replaceState(null, "", location.pathname + location.hash);
  try {
    if (token) return await enter({ token });
    Object.assign(session, await api("session"));
    await open();
  } catch (error) {
    signIn(token || !(error instanceof ApiError && error.status === 401) ? error.message : "");
  }
}

begin();
