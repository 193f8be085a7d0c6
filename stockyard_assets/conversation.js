// A logged conversation as people read it, whatever dialect its bodies have: turns of text, reasoning, tool calls and
// results. Pictures and files are named, never fetched.

import { empty, h } from "./dom.js";

const asText = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));
const CALLS = ["tool_use", "function_call", "server_tool_use", "custom_tool_call"];
const RESULTS = ["tool_result", "function_call_output", "custom_tool_call_output"];

// One part of a message, of any dialect, as {kind: text | reasoning | call | result | media, name, text}.
function part(given) {
  if (typeof given === "string") return { kind: "text", text: given };
  if (!given || typeof given !== "object") return { kind: "text", text: asText(given) };
  const { type } = given;
  if (CALLS.includes(type)) return { kind: "call", name: given.name, text: asText(given.input ?? given.arguments ?? "") };
  if (RESULTS.includes(type)) return { kind: "result", name: given.tool_use_id || given.call_id, text: parts(given.content ?? given.output).map((one) => one.text).join("\n") };
  if (given.functionCall) return { kind: "call", name: given.functionCall.name, text: asText(given.functionCall.args ?? {}) };
  if (given.functionResponse) return { kind: "result", name: given.functionResponse.name, text: asText(given.functionResponse.response ?? {}) };
  if (type === "thinking" || type === "reasoning" || given.thought) return { kind: "reasoning", text: given.thinking ?? given.text ?? parts(given.summary).map((one) => one.text).join("\n") };
  if (typeof given.text === "string") return { kind: "text", text: given.text };
  if (typeof given.refusal === "string") return { kind: "text", text: given.refusal };
  const shown = asText(given);
  return { kind: "media", name: type || Object.keys(given)[0], text: shown.length > 300 ? `${shown.slice(0, 300)}…` : shown };
}

function parts(content) {
  if (content === null || content === undefined) return [];
  return (Array.isArray(content) ? content : [content]).map(part);
}

function turn(message) {
  if (typeof message === "string") return { role: "user", parts: [part(message)] };
  if (!message || typeof message !== "object") return { role: "", parts: [] };
  if (message.type && message.type !== "message" && !message.role) return { role: RESULTS.includes(message.type) ? "tool" : "assistant", parts: [part(message)] };
  const found = parts(message.content ?? message.parts);
  if (message.reasoning_content) found.unshift({ kind: "reasoning", text: asText(message.reasoning_content) });
  if (message.refusal) found.push({ kind: "text", text: asText(message.refusal) });
  for (const one of message.tool_calls || []) {
    const tool = one.function || one.custom || {};
    found.push({ kind: "call", name: tool.name, text: asText(tool.arguments ?? tool.input ?? "") });
  }
  return { role: message.role || "assistant", name: message.name || message.tool_call_id, parts: found };
}

const list = (value) => (value === null || value === undefined ? [] : Array.isArray(value) ? value : [value]);

function turnsOf(request, response) {
  const asked = request && typeof request === "object" ? request : {}, said = response && typeof response === "object" ? response : {};
  const system = asked.system ?? asked.instructions ?? asked.systemInstruction ?? asked.system_instruction;
  const before = [...list(asked.messages), ...list(asked.input), ...list(asked.contents), ...list(asked.prompt)];
  const after = [
    ...list(said.choices).map((choice) => choice.message ?? { role: "assistant", content: choice.text }),
    ...list(said.output), ...list(said.candidates).map((one) => ({ ...one.content, role: "assistant" })),
    ...(said.type === "message" ? [said] : []), ...(said.error ? [{ role: "error", content: asText(said.error.message ?? said.error) }] : [])];
  return [...(system ? [{ role: "system", parts: parts(system.parts ?? system) }] : []), ...before.map(turn), ...after.map(turn)];
}

export function conversation(request, response) {
  const turns = turnsOf(request, response).filter((one) => one.parts.length);
  if (!turns.length) return empty(request || response ? "These bodies are no conversation; see Raw." : "Bodies were not logged, or are older than the log keeps them.");
  return h("ol", { class: "talk" }, turns.map((one) => h("li", { class: `turn ${/^\w+$/.test(one.role) ? one.role : ""}` },
    h("div", { class: "who" }, one.role, one.name && h("small", {}, ` ${one.name}`)),
    h("div", { class: "said" }, one.parts.map((piece) => piece.kind === "text" ? h("div", { class: "text" }, piece.text)
      : h("div", { class: `piece ${piece.kind}` }, h("div", { class: "label" }, [{ call: "tool call", result: "tool result", reasoning: "reasoning", media: "attachment" }[piece.kind], piece.name].filter(Boolean).join(" · ")), h("div", { class: "text" }, piece.text)))))));
}
