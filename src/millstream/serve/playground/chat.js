// The conversation: asking, streaming, stopping, and what an answer took.

import { ApiError, call, events } from "./api.js";
import { number, seconds } from "./words.js";
import { settings } from "./settings.js";
import { showTimeline } from "./timeline.js";

const find = (id) => document.getElementById(id);
const log = find("log"), empty = find("empty"), composer = find("composer"), prompt = find("prompt");
const send = find("send"), stop = find("stop"), announce = find("announce");

let turns = []; // of role and content, as the API takes them
let running = null; // the AbortController of the answer under way
let refused = () => {};

export const busy = () => running !== null;
export const onRefused = (act) => { refused = act; };

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// Follows the end of the conversation unless the reader has scrolled away from it.
function following(act) {
  const near = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  act();
  if (near) log.scrollTop = log.scrollHeight;
}

// Code blocks, code and bold text; everything is set as text, so that an answer can never be markup.
function render(node, text) {
  node.replaceChildren();
  text.split(/^```/m).forEach((part, place) => {
    if (place % 2) {
      const pre = make("pre"), code = make("code", "", part.replace(/^[^\n]*\n?/, "").replace(/\n$/, ""));
      pre.tabIndex = 0;
      pre.append(code);
      node.append(pre);
      return;
    }
    const plain = place ? part.replace(/^\n+/, "") : part;
    for (const piece of plain.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
      if (/^`.+`$/.test(piece)) node.append(make("code", "", piece.slice(1, -1)));
      else if (/^\*\*.+\*\*$/.test(piece)) node.append(make("strong", "", piece.slice(2, -2)));
      else if (piece) node.append(piece);
    }
  });
}

function addUser(text) {
  const turn = make("div", "turn user");
  turn.append(make("span", "sr-only", "You: "), make("div", "text", text));
  log.append(turn);
}

function addAnswer() {
  const turn = make("div", "turn answer busy");
  const thinking = make("details", "thinking"), text = make("div", "text"), facts = make("div", "facts");
  thinking.append(make("summary", "", "Thinking"), make("div"));
  thinking.hidden = true;
  turn.append(make("span", "sr-only", "Answer: "), thinking, text, facts);
  log.append(turn);
  return { turn, thinking, thought: thinking.lastChild, text, facts };
}

function fact(parent, label, value, title) {
  if (value === null || value === undefined) return;
  const node = make("span", "", `${label} `);
  node.append(make("b", "", value));
  if (title) node.title = title;
  parent.append(node);
}

function showFacts(view, took) {
  const facts = view.facts;
  facts.replaceChildren();
  fact(facts, "TTFT", took.ttft === null ? null : seconds(took.ttft), "Time to the first token, as measured here");
  fact(facts, "speed", took.rate === null ? null : `${number(took.rate, 1)} tok/s`, "Tokens after the first, over the time they took");
  if (took.usage) {
    fact(facts, "output", number(took.usage.completion_tokens));
    const cached = took.usage.prompt_tokens_details?.cached_tokens;
    fact(facts, "prompt", number(took.usage.prompt_tokens) + (cached ? ` (${number(cached)} cached)` : ""));
  }
  if (took.finish && took.finish !== "stop") fact(facts, "ended by", took.finish);
  const acts = make("span", "acts");
  const button = (text, act) => {
    const node = make("button", "", text);
    node.type = "button";
    node.addEventListener("click", act);
    acts.append(node);
    return node;
  };
  if (took.content) {
    const copy = button("Copy", async () => {
      try { await navigator.clipboard.writeText(took.content); copy.textContent = "Copied"; } catch { copy.textContent = "Not allowed"; }
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
  }
  if (took.id) button("Timeline", () => showTimeline(took.id));
  if (view.turn === log.lastElementChild) button("Again", () => again());
  facts.append(acts);
}

function setRunning(controller) {
  running = controller;
  stop.hidden = controller === null;
  send.hidden = controller !== null;
  log.setAttribute("aria-busy", String(controller !== null));
}

async function answer() {
  const controller = new AbortController();
  setRunning(controller);
  const view = addAnswer();
  log.scrollTop = log.scrollHeight;
  const started = performance.now();
  const took = { id: "", ttft: null, rate: null, usage: null, finish: "", content: "" };
  let first = null, last = null, pieces = 0, fault = "", thought = "", painting = false;
  let over = false;
  const paint = () => {
    painting = false;
    if (over) return;
    following(() => {
      render(view.text, took.content);
      if (thought) { view.thinking.hidden = false; view.thought.textContent = thought; }
      if (first !== null) {
        const rate = pieces > 1 && last > first ? (pieces - 1) / (last - first) * 1000 : null;
        view.facts.replaceChildren();
        fact(view.facts, "TTFT", seconds((first - started) / 1000));
        fact(view.facts, "speed", rate === null ? null : `${number(rate, 1)} tok/s`);
      }
    });
  };
  try {
    const messages = settings.system ? [{ role: "system", content: settings.system }, ...turns] : turns;
    const reply = await call("v1/chat/completions", {
      body: { ...settings.params(), messages, stream: true, stream_options: { include_usage: true } }, signal: controller.signal,
    });
    for await (const chunk of events(reply)) {
      if (chunk.error) throw new ApiError(200, chunk.error.message ?? "The answer failed.");
      took.id ||= chunk.id ?? "";
      if (chunk.usage) took.usage = chunk.usage;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      if (choice.finish_reason) took.finish = choice.finish_reason;
      const text = choice.delta?.content ?? "", reasoning = choice.delta?.reasoning_content ?? "";
      if (text || reasoning) {
        last = performance.now();
        first ??= last;
        pieces += 1;
        took.content += text;
        thought += reasoning;
        if (!painting) { painting = true; requestAnimationFrame(paint); }
      }
    }
  } catch (error) {
    if (error.name === "AbortError") took.finish = "you";
    else if (error instanceof ApiError && error.status === 401) { fault = "This server asks for an API key."; refused(); }
    else fault = error.message;
  }
  const tokens = took.usage?.completion_tokens ?? pieces;
  if (first !== null) took.ttft = (first - started) / 1000;
  if (tokens > 1 && last > first) took.rate = (tokens - 1) / (last - first) * 1000;
  over = true; // a frame that was asked for has nothing left to paint
  following(() => {
    view.turn.classList.remove("busy");
    render(view.text, took.content);
    if (thought) { view.thinking.hidden = false; view.thought.textContent = thought; }
    if (fault) {
      const node = make("div", "fault", fault);
      node.setAttribute("role", "alert");
      view.facts.before(node);
    } else if (!took.content && !thought) render(view.text, took.finish === "you" ? "" : "(an empty answer)");
    showFacts(view, took);
  });
  if (took.content) turns.push({ role: "assistant", content: took.content });
  announce.textContent = fault ? "" : `Answer complete: ${took.content.slice(0, 2000)}`;
  setRunning(null);
}

function ask(text) {
  if (running || !text.trim()) return;
  empty.hidden = true;
  for (const node of log.querySelectorAll(".turn.answer .acts button:last-child")) if (node.textContent === "Again") node.remove();
  addUser(text);
  turns.push({ role: "user", content: text });
  prompt.value = "";
  grow();
  answer();
}

function again() {
  if (running) return;
  if (turns.at(-1)?.role === "assistant") turns.pop();
  log.lastElementChild.remove();
  answer();
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

export function start() {
  composer.addEventListener("submit", (event) => { event.preventDefault(); ask(prompt.value); });
  prompt.addEventListener("input", grow);
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(prompt.value); }
  });
  stop.addEventListener("click", () => { running?.abort(); prompt.focus(); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) { running.abort(); prompt.focus(); }
  });
  find("ideas").addEventListener("click", (event) => { if (event.target.closest("button")) ask(event.target.textContent); });
  find("new-chat").addEventListener("click", () => {
    running?.abort();
    turns = [];
    log.replaceChildren(empty);
    empty.hidden = false;
    announce.textContent = "A new conversation";
    prompt.focus();
  });
}
