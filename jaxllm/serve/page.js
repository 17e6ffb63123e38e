// SPDX-License-Identifier: Apache-2.0
"use strict";

const at = (id) => document.getElementById(id);
const log = at("log"), form = at("form"), input = at("text"), send = at("send"), status = at("status");
let messages = []; // {role, content} of the conversation
let running = null; // AbortController of the answer that is being written
let hasTemplate = true; // false: the model continues the text of all messages

// ---- requests

function headers() {
  const key = at("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

/** The response of a path of the API. Throws an Error with the server's message. */
async function ask(path, options) {
  const response = await fetch(path, { headers: headers(), ...options });
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  if (response.status === 401) {
    at("with_key").hidden = false;
    settings(true);
    at("key").focus();
    throw new Error("This server needs a key. Enter it in the settings.");
  }
  throw new Error(said?.error?.message ?? `The server answered with status ${response.status}.`);
}

/** The values of a response of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function number(id) {
  const value = at(id).valueAsNumber;
  return Number.isNaN(value) ? {} : { [id]: value };
}

function body() {
  const common = {
    ...(at("model").value && { model: at("model").value }), stream: true,
    stream_options: { include_usage: true },
    ...number("temperature"), ...number("top_p"), ...number("max_tokens"), ...number("seed"),
  };
  if (!hasTemplate) return { ...common, prompt: messages.map((m) => m.content).join("") };
  const system = at("system").value.trim();
  const first = system ? [{ role: "system", content: system }] : [];
  return { ...common, messages: [...first, ...messages] };
}

// ---- the conversation

/** Adds a message to the log; returns its elements. */
function shown(role, content) {
  const article = document.createElement("article"), title = document.createElement("h2");
  const text = document.createElement("div"), foot = document.createElement("p");
  article.className = role;
  title.textContent = role === "user" ? "You" : "Model";
  text.className = "body";
  text.textContent = content;
  foot.className = "foot";
  article.append(title, text, foot);
  at("hint").hidden = true;
  log.append(article);
  log.scrollTop = log.scrollHeight;
  return { article, text, foot };
}

function copyButton(content) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.hidden = !navigator.clipboard; // browsers have none on a page of another machine without TLS
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(content);
    button.textContent = "Copied";
  });
  return button;
}

/** Whether the end of the log is in view, so that it should stay there. */
const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;

async function answer() {
  const place = shown("assistant", ""), began = performance.now(), conversation = messages;
  let content = "", finish = null, usage = null, first = null;
  running = new AbortController();
  place.article.classList.add("waiting");
  log.scrollTop = log.scrollHeight;
  log.setAttribute("aria-busy", "true"); // a screen reader reads the answer once, when it is whole
  send.textContent = "Stop";
  status.textContent = "";
  try {
    const path = hasTemplate ? "v1/chat/completions" : "v1/completions";
    const request = { method: "POST", body: JSON.stringify(body()), signal: running.signal };
    for await (const event of events(await ask(path, request))) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        const stay = atEnd();
        first ??= performance.now();
        content += hasTemplate ? (choice.delta.content ?? "") : choice.text;
        finish = choice.finish_reason ?? finish;
        place.text.textContent = content;
        if (stay) log.scrollTop = log.scrollHeight;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      const lost = error instanceof TypeError ? "The server cannot be reached." : error.message;
      status.textContent = lost;
    }
  }
  running = null;
  place.article.classList.remove("waiting");
  log.setAttribute("aria-busy", "false");
  send.textContent = "Send";
  if (messages !== conversation) return; // a new chat has begun
  if (!finish && !content) { // nothing was answered: the message can be sent again
    place.article.previousElementSibling?.remove();
    place.article.remove();
    const { content: unanswered } = messages.pop();
    input.value ||= unanswered;
    at("hint").hidden = messages.length > 0;
    return;
  }
  messages.push({ role: "assistant", content });
  const stay = atEnd();
  const why = finish === "length" ? "cut at max tokens" : finish ? "" : "stopped";
  if (!content) place.text.textContent = "(an empty answer)";
  place.foot.textContent = [rate(usage, first, began), why].filter(Boolean).join(" · ");
  place.foot.append(copyButton(content));
  if (stay) log.scrollTop = log.scrollHeight;
}

function rate(usage, first, began) {
  if (!usage) return "";
  const seconds = (performance.now() - first) / 1000, count = usage.completion_tokens;
  const wait = `first after ${((first - began) / 1000).toFixed(1)} s`;
  const pace = count > 1 && seconds > 0 ? `, then ${((count - 1) / seconds).toFixed(0)} per second` : "";
  return `${count} tokens, ${wait}${pace}`;
}

// ---- controls

function settings(open) {
  at("settings").hidden = !open;
  at("open").setAttribute("aria-expanded", String(open));
}

function fit() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const content = input.value;
  if (!content.trim()) return input.focus();
  messages.push({ role: "user", content });
  shown("user", content);
  input.value = "";
  fit();
  input.focus();
  answer().finally(fit);
});

input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) form.requestSubmit();
  }
});
input.addEventListener("input", fit);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

at("open").addEventListener("click", () => settings(at("settings").hidden));
at("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  for (const article of log.querySelectorAll("article")) article.remove();
  at("hint").hidden = false;
  status.textContent = "";
  input.focus();
});
at("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  settings(false);
  input.focus();
});
at("key").addEventListener("change", start);

async function start() {
  try {
    const { data } = await (await ask("v1/models")).json();
    at("model").replaceChildren(...data.map((one) => new Option(one.id, one.id)));
    hasTemplate = data[0].chat;
    at("system").closest("label").hidden = !hasTemplate;
    at("hint").textContent = hasTemplate
      ? "Enter sends a message, Shift+Enter begins a new line, Escape stops an answer."
      : "This model has no chat template. It continues the text that you write.";
    document.title = `${data[0].id} · jaxllm chat`;
    status.textContent = "";
  } catch (error) {
    status.textContent = error instanceof TypeError ? "The server cannot be reached." : error.message;
  }
}
start();
