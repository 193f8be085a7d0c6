// Trying models: the playground (one model, or two side by side), and the page of snippets to start with.

import { ApiError, api, badge, button, call, copyButton, count, empty, field, h, head, input, load, ms, select, swap, usd } from "./dom.js";

// ---- Playground

// Yields the events of a stream of chat completion chunks.
async function* chunks(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (kept + value).split("\n\n");
    kept = events.pop();
    for (const event of events) {
      const text = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (text && text !== "[DONE]") yield JSON.parse(text);
    }
  }
}

function lane(number) {
  const model = input(`model-${number}`, { list: "models", placeholder: "model", value: number === 1 ? "echo" : "" });
  const log = h("div", { class: "talk", tabindex: "0", role: "log", "aria-label": `Answers of model ${number}` }, empty("Answers show here."));
  const note = h("p", { class: "muted meter" }, " ");
  let turns = [];
  const add = (role, text) => {
    const said = h("div", { class: "text" }, text);
    log.append(h("div", { class: `turn ${role}` }, h("div", { class: "who" }, role), h("div", { class: "said" }, said)));
    return said;
  };
  async function send(text, options, signal) {
    if (!turns.length) swap(log);
    turns.push({ role: "user", content: text });
    add("user", text);
    const said = add("assistant", ""), began = performance.now();
    let first = null, usage = {}, answer = "";
    try {
      const got = await call("/v1/chat/completions", { method: "POST", signal, body: {
        model: model.value, stream: true, stream_options: { include_usage: true }, ...options.body,
        messages: [...(options.system ? [{ role: "system", content: options.system }] : []), ...turns] } });
      for await (const chunk of chunks(got)) {
        if (chunk.error) throw new ApiError(chunk.error.message);
        const delta = chunk.choices?.[0]?.delta || {}, more = delta.content || delta.reasoning_content || "";
        if (more) first ??= performance.now() - began;
        answer += delta.content || "";
        said.append(more);
        for (const tool of delta.tool_calls || []) said.append(tool.function?.name ? `\n${tool.function.name}(` : "", tool.function?.arguments || "");
        usage = chunk.usage || usage;
        log.scrollTop = log.scrollHeight;
      }
      turns.push({ role: "assistant", content: answer });
      swap(note, badge("done", "ok"), ` ${usd(usage.cost)} · ${count(usage.prompt_tokens)} in · ${count(usage.completion_tokens)} out · first token ${ms(first)} · ${ms(performance.now() - began)} · `, h("a", { href: `#/requests/${encodeURIComponent(got.headers.get("x-stockyard-request-id") || "")}` }, "request"));
    } catch (error) {
      turns.pop();
      if (error.name === "AbortError") return void swap(note, badge("stopped", "warn"));
      said.append(error.message);
      said.classList.add("bad");
      swap(note, badge("failed", "bad"));
    }
  }
  const clear = () => ((turns = []), swap(log, empty("Answers show here.")), swap(note, " "));
  return { model, send, clear, box: h("section", { class: "panel lane", "aria-label": `Model ${number}` }, field(`Model ${number}`, model), log, note) };
}

export function playground(place, { query: given }, signal) {
  const lanes = [lane(1), lane(2)], known = h("datalist", { id: "models" });
  if (given.get("model")) lanes[0].model.value = given.get("model");
  const prompt = h("textarea", { name: "prompt", rows: "3", required: true, placeholder: "Ask something. Ctrl+Enter sends." });
  const system = input("system", { placeholder: "none" }), heat = input("temperature", { type: "number", min: "0", max: "2", step: "0.1", placeholder: "default" }), most = input("max", { type: "number", min: "1", placeholder: "default" });
  let running = null;
  const send = h("button", { type: "submit", class: "primary" }, "Send"), stop = button("Stop", () => running?.abort(), { hidden: true });
  const form = h("form", { class: "panel composer", onsubmit: async (event) => {
    event.preventDefault();
    const text = prompt.value;
    running = new AbortController();
    signal.addEventListener("abort", () => running.abort());
    const body = { ...(heat.value === "" ? {} : { temperature: Number(heat.value) }), ...(most.value === "" ? {} : { max_tokens: Number(most.value) }) };
    [send.disabled, stop.hidden, prompt.value] = [true, false, ""];
    await Promise.all(lanes.filter((one) => one.model.value).map((one) => one.send(text, { body, system: system.value }, running.signal)));
    [send.disabled, stop.hidden] = [false, true];
    prompt.focus();
  } }, field("Message", prompt), h("div", { class: "filters" }, field("System", system), field("Temperature", heat), field("Most tokens", most), h("div", { class: "row end" }, stop, send)));
  prompt.addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && (event.preventDefault(), form.requestSubmit()));
  swap(place, head("Playground", "Fill in the second model to compare the two.", button("Clear", () => lanes.forEach((one) => one.clear()))), known, h("div", { class: "columns two" }, lanes.map((one) => one.box)), form);
  api("models", { signal }).then(({ data }) => swap(known, data.slice(0, 1000).map((row) => h("option", { value: row.id }, row.provider))), () => {});
}

// ---- Get started

function snippets(url, model, key) {
  return {
    curl: `curl ${url}/v1/chat/completions \\\n  -H 'content-type: application/json' -H 'authorization: Bearer ${key}' \\\n  -d '{"model": "${model}", "messages": [{"role": "user", "content": "Hello, Stockyard!"}]}'`,
    "OpenAI Python": `from openai import OpenAI\n\nclient = OpenAI(base_url="${url}/v1", api_key="${key}")\nanswer = client.chat.completions.create(\n    model="${model}", messages=[{"role": "user", "content": "Hello, Stockyard!"}]\n)\nprint(answer.choices[0].message.content)`,
    "OpenAI JS": `import OpenAI from "openai";\n\nconst client = new OpenAI({ baseURL: "${url}/v1", apiKey: "${key}" });\nconst answer = await client.chat.completions.create({\n  model: "${model}", messages: [{ role: "user", content: "Hello, Stockyard!" }],\n});\nconsole.log(answer.choices[0].message.content);`,
    Anthropic: `from anthropic import Anthropic\n\nclient = Anthropic(base_url="${url}", api_key="${key}")\nanswer = client.messages.create(\n    model="${model}", max_tokens=200, messages=[{"role": "user", "content": "Hello, Stockyard!"}]\n)\nprint(answer.content[0].text)`,
    LangChain: `from langchain_openai import ChatOpenAI\n\nmodel = ChatOpenAI(model="${model}", base_url="${url}/v1", api_key="${key}")\nprint(model.invoke("Hello, Stockyard!").content)`,
    "Vercel AI SDK": `import { createOpenAICompatible } from "@ai-sdk/openai-compatible";\nimport { generateText } from "ai";\n\nconst stockyard = createOpenAICompatible({ name: "stockyard", baseURL: "${url}/v1", apiKey: "${key}" });\nconst { text } = await generateText({ model: stockyard("${model}"), prompt: "Hello, Stockyard!" });\nconsole.log(text);`,
    "Claude Code": `export ANTHROPIC_BASE_URL=${url}\nexport ANTHROPIC_AUTH_TOKEN=${key}\nclaude`,
    Codex: `# ~/.codex/config.toml\nmodel = "${model}"\nmodel_provider = "stockyard"\n\n[model_providers.stockyard]\nname = "Stockyard"\nbase_url = "${url}/v1"\nenv_key = "STOCKYARD_KEY"\nwire_api = "responses"\n\n# then: STOCKYARD_KEY=${key} codex`,
  };
}

export function start(place, _, signal) {
  const shown = h("div"), pick = (name, all) => {
    for (const tab of tabs.children) tab.setAttribute("aria-pressed", String(tab.textContent === name));
    swap(shown, h("div", { class: "raw" }, copyButton(all[name]), h("pre", { tabindex: "0", role: "group", "aria-label": `Snippet for ${name}` }, all[name])));
  };
  const tabs = h("div", { class: "tabs", role: "group", "aria-label": "Client" }), model = select("model", [["echo", "echo"]], "echo"), content = h("div", { class: "stack" });
  swap(place, head("Get started", "Change one address: every call then goes through Stockyard, and shows here."), content);
  load(content, async () => {
    const [models, known] = await Promise.all([api("models", { signal }), api("keys", { signal }).catch(() => ({ data: [] }))]);
    const names = [...new Set(models.data.map((row) => row.id))].slice(0, 300);
    const key = known.data.some((one) => one.status === "active") ? "sy-YOUR-KEY" : "unused";
    let chosen = "curl";
    const draw = () => pick(chosen, snippets(location.origin, model.value, key));
    swap(model, names.map((name) => h("option", { value: name }, name)));
    model.addEventListener("change", draw);
    swap(tabs, Object.keys(snippets("", "", "")).map((name) => button(name, () => ((chosen = name), draw()))));
    draw();
    return [h("section", { class: "panel", "aria-label": "Snippets" }, h("div", { class: "row between" }, tabs, field("Model", model)), shown,
      h("p", { class: "muted" }, key === "unused" ? "No key is needed as long as none exists and Stockyard listens on this machine alone." : "Put the secret of one of your keys in place of sy-YOUR-KEY.", " ", h("a", { href: "#/keys" }, "Make a key"))),
    h("section", { class: "panel", "aria-label": "Providers" }, h("h2", {}, "Providers"), h("p", {}, "Set OPENAI_API_KEY, ANTHROPIC_API_KEY or another variable and start again; the model echo answers without any. ", h("a", { href: "#/providers" }, "All variables")))];
  });
}
