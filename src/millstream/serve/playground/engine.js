// Gauges and the last steps, polled: often while steps go by, seldom while nothing happens.

import { ApiError, call } from "./api.js";
import { count, number, rate, seconds } from "./words.js";
import { settings } from "./settings.js";

const find = (id) => document.getElementById(id);
const BUSY_MS = 400, IDLE_MS = 1500, AWAY_MS = 5000;
const GAP = 1, BAR = 5, LEFT = 34, TOP = 8, BOTTOM = 16;

let steps = []; // the last ones, oldest first
let last = 0;
let pointed = null; // the number of the step under the pointer
let listeners = { refused() {}, state() {} };

const svg = (tag, attributes = {}, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
};

function niceTop(value) {
  const scale = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].map((step) => step * scale).find((top) => top >= value);
}

function describe(step) {
  const parts = [];
  if (step.prefill_tokens) parts.push(`${count(step.prefill_tokens, "prompt token")} of ${count(step.prefill_rows, "request")}`);
  if (step.decode_tokens) parts.push(count(step.decode_tokens, "output token"));
  return `Step ${number(step.n)}: ${parts.join(" + ") || "no tokens"}, ${seconds(step.seconds)}, ${step.running} running, ${step.waiting} waiting.`;
}

function draw() {
  const chart = find("chart"), width = chart.clientWidth, height = chart.clientHeight;
  chart.replaceChildren();
  if (!width) return;
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const room = Math.floor((width - LEFT) / (BAR + GAP)), shown = steps.slice(-room);
  const low = height - BOTTOM, tall = low - TOP;
  const top = niceTop(Math.max(8, ...shown.map((step) => step.prefill_tokens + step.decode_tokens)));
  for (const value of [0, top / 2, top]) {
    const y = Math.round(low - value / top * tall) + 0.5;
    chart.append(svg("line", { class: "grid", x1: LEFT, x2: width, y1: y, y2: y }));
    chart.append(svg("text", { class: "axis", x: LEFT - 6, y: y + 3.5, "text-anchor": "end" }, number(value)));
  }
  if (!shown.length) {
    chart.append(svg("text", { class: "none", x: LEFT + (width - LEFT) / 2, y: TOP + tall / 2 - 8, "text-anchor": "middle" }, "No steps yet"));
    return;
  }
  const from = width - shown.length * (BAR + GAP);
  // What there is of a kind is seen, however little it is beside the other.
  const high = (tokens) => tokens ? Math.max(2, tokens / top * tall) : 0;
  shown.forEach((step, place) => {
    const x = from + place * (BAR + GAP), bar = svg("g", { class: step.n === pointed ? "bar on" : "bar" });
    const decode = high(step.decode_tokens), prefill = Math.min(high(step.prefill_tokens), tall - decode);
    bar.append(svg("rect", { class: "hover", x: x - GAP / 2, y: TOP, width: BAR + GAP, height: tall }));
    if (decode) bar.append(svg("rect", { class: "decode", x, y: low - decode, width: BAR, height: decode }));
    if (prefill) bar.append(svg("rect", { class: "prefill", x, y: low - decode - prefill, width: BAR, height: prefill }));
    chart.append(bar);
  });
  chart.append(svg("text", { class: "axis", x: from, y: height - 3, "text-anchor": from < LEFT + 40 ? "start" : "middle" }, `#${number(shown[0].n)}`));
  if (shown.length > 16) chart.append(svg("text", { class: "axis", x: width, y: height - 3, "text-anchor": "end" }, `#${number(shown.at(-1).n)}`));
  note(shown);
}

function note(shown) {
  const step = shown.find((one) => one.n === pointed);
  const mixed = shown.filter((one) => one.prefill_tokens && one.decode_tokens).length;
  find("chart-note").textContent = step ? describe(step)
    : `Each bar is one forward pass. In ${mixed} of the last ${shown.length}, prompts and answers shared it.`;
  find("chart-summary").textContent = `${describe(shown.at(-1))} In ${mixed} of the last ${shown.length} steps prompts and answers were computed together.`;
}

function show(state) {
  find("running").value = number(state.running);
  find("waiting").value = number(state.waiting);
  find("output-rate").value = rate(state.output_tokens_per_s);
  find("prompt-rate").value = rate(state.prompt_tokens_per_s);
  const { total, used, prefix } = state.kv, share = (count) => `${total ? (100 * count / total).toFixed(2) : 0}%`;
  find("kv-text").value = `${number(used)} used, ${number(prefix)} kept, of ${number(total)}`;
  find("kv-bar").querySelector(".used").style.width = share(used);
  find("kv-bar").querySelector(".prefix").style.width = share(prefix);
  find("kv-bar").setAttribute("aria-label", `KV blocks: ${used} used, ${prefix} kept for prefixes, of ${total}`);
  const { query_tokens: asked, hit_tokens: hit } = state.prefix;
  const hits = asked ? hit / asked : 0;
  find("prefix-text").value = asked ? `${number(100 * hits)} % of ${number(asked)} tokens` : "none asked yet";
  find("prefix-bar").querySelector(".hits").style.width = `${(100 * hits).toFixed(2)}%`;
  find("prefix-bar").setAttribute("aria-label", `Prefix hits: ${number(100 * hits)} percent`);
  if (state.last_step < last) steps = []; // the server was started anew
  last = state.last_step;
  if (state.steps.length) steps = [...steps, ...state.steps].slice(-256);
  draw();
}

async function poll() {
  let wait = IDLE_MS;
  try {
    const state = await (await call(`playground/state?since=${last}`)).json();
    show(state);
    listeners.state(state);
    if (state.steps.length || state.running || state.waiting) wait = BUSY_MS;
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) listeners.refused();
    else listeners.state(null);
  }
  setTimeout(poll, document.hidden ? AWAY_MS : wait);
}

// Twelve prompts of different lengths, four at a time: long ones are computed in chunks beside the answers of others. Four to
// a request, because a browser opens only six connections to a server, and the gauges need one of them. Numbered by chance, so that those of the
// next burst are not found in the cache.
async function burst() {
  const button = find("burst"), hint = find("burst-hint"), words = "the wheel turns and the water runs over stone ";
  button.disabled = true;
  const first = Math.floor(Math.random() * 9e5) + 1e5;
  let done = 0, failed = 0;
  const ask = async (wave) => {
    await new Promise((go) => setTimeout(go, wave * 900));
    const prompt = [6, 2, 40, 70].map((times, place) => `Story ${first + 4 * wave + place}. ${words.repeat(times)}\nOnce upon a time`);
    try {
      await (await call("v1/completions", { body: { model: settings.model, prompt, max_tokens: 48 + 16 * wave, temperature: 0.8 } })).json();
    } catch { failed += prompt.length; }
    done += prompt.length;
    hint.textContent = `${done} of 12 answered${failed ? `, ${failed} refused` : ""}.`;
  };
  await Promise.all([0, 1, 2].map(ask));
  button.disabled = false;
}

export function start(given) {
  listeners = given;
  const chart = find("chart");
  const point = (n) => {
    if (n === pointed) return;
    pointed = n;
    draw();
  };
  // By where the pointer is and not by what lies under it: short bars are hard to hit, and all are drawn anew all the time.
  const follow = (event) => {
    const box = chart.getBoundingClientRect(), back = Math.floor((box.right - event.clientX) / (BAR + GAP));
    point(event.clientX - box.left < LEFT ? null : steps.at(-1 - back)?.n ?? null);
  };
  chart.addEventListener("pointermove", follow);
  chart.addEventListener("pointerdown", follow);
  chart.addEventListener("pointerleave", () => point(null));
  new ResizeObserver(draw).observe(chart);
  find("burst").addEventListener("click", burst);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) draw(); });
  poll();
}
