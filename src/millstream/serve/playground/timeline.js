// Why an answer took as long as it did: its queue, chunks, preemptions and decoding, as the server kept them.

import { call } from "./api.js";
import { count, number, seconds } from "./words.js";

const find = (id) => document.getElementById(id);

const told = {
  queued: (entry) => count(entry.prompt_tokens, "prompt token"),
  admitted: (entry) => entry.cached_tokens ? `${count(entry.cached_tokens, "token")} found in the cache` : "nothing found in the cache",
  prefill: (entry) => `${count(entry.tokens, "token")} from position ${number(entry.start)}`,
  decode: (entry) => `${count(entry.tokens, "token")} until ${seconds(entry.until_s)}, longest gap ${seconds(entry.longest_gap_s)}`,
  preempted: (entry) => `lost its place, to ${entry.how}`,
  finished: (entry) => entry.reason,
};

function row(entry) {
  const line = document.createElement("tr");
  const name = entry.what.replaceAll("_", " ") + (entry.index ? ` (output ${entry.index + 1})` : "");
  for (const text of [entry.at_s === null ? "" : seconds(entry.at_s), name, told[entry.what]?.(entry) ?? ""]) {
    line.append(Object.assign(document.createElement("td"), { textContent: text }));
  }
  return line;
}

// One bar over time: waiting, computing the prompt, decoding, and marks where the place was lost.
function draw(entries) {
  const chart = find("timeline-chart"), width = chart.clientWidth, mine = entries.filter((entry) => !entry.index && entry.at_s !== null);
  chart.replaceChildren();
  const end = Math.max(1e-6, ...mine.map((entry) => entry.until_s ?? entry.at_s));
  chart.setAttribute("viewBox", `0 0 ${width} 58`);
  const x = (at) => at / end * width;
  const add = (tag, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    chart.append(node);
  };
  let from = 0, phase = "queue";
  const close = (at) => { if (at > from) add("rect", { class: phase, x: x(from), y: 4, width: Math.max(1, x(at) - x(from)), height: 24, rx: 2 }); from = at; };
  for (const entry of mine) {
    if (entry.what === "admitted") { close(entry.at_s); phase = "prefill"; }
    else if (entry.what === "decode") { close(entry.at_s); phase = "decode"; close(entry.until_s); }
    else if (entry.what === "preempted") { close(entry.at_s); phase = "queue"; add("rect", { class: "preempted", x: x(entry.at_s) - 1, y: 0, width: 2, height: 32 }); }
    else if (entry.what === "prefill") { if (phase === "queue") { close(entry.at_s); phase = "prefill"; } else close(entry.at_s); }
    else if (entry.what === "finished") close(entry.at_s);
  }
  for (const [share, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]]) {
    add("text", { x: share * width, y: 48, "text-anchor": anchor }, seconds(share * end));
  }
}

export async function showTimeline(id) {
  const dialog = find("timeline"), rows = find("timeline-rows");
  rows.replaceChildren();
  find("timeline-chart").replaceChildren();
  find("timeline-id").textContent = `${id} …`;
  dialog.showModal();
  try {
    const timeline = await (await call(`v1/requests/${encodeURIComponent(id)}/timeline`)).json();
    draw(timeline.entries);
    rows.append(...timeline.entries.map(row));
    find("timeline-id").textContent = id;
    if (timeline.dropped_entries) find("timeline-id").textContent = `${id} (${number(timeline.dropped_entries)} entries were not kept)`;
  } catch (error) {
    find("timeline-id").textContent = `${id}: ${error.message}`;
  }
}

export function start() {
  const dialog = find("timeline");
  find("timeline-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
}
