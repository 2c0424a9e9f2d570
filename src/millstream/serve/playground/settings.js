// The system prompt and how tokens are sampled; kept in this browser.

const find = (id) => document.getElementById(id);
const DEFAULTS = { system: "", temperature: "0.7", top_p: "0.95", top_k: "0", min_p: "0", repetition_penalty: "1.1", max_tokens: "512", seed: "", stop_text: "" };
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const WHOLE = new Set(["top_k", "max_tokens", "seed"]);

function read(name) {
  const field = find(name);
  if (field.value.trim() === "" || !field.checkValidity()) return null;
  const value = Number(field.value);
  return WHOLE.has(name) ? Math.trunc(value) : value;
}

export const settings = {
  model: "",
  get system() { return find("system").value.trim(); },
  // The parameters of a request; a field that is empty or out of bounds is left to the server.
  params() {
    const out = { model: this.model };
    for (const name of NUMBERS) {
      const value = read(name);
      if (value !== null) out[name] = value;
    }
    const stop = find("stop_text").value;
    if (stop) out.stop = [stop.replaceAll("\\n", "\n")];
    return out;
  },
};

function keep() {
  const values = Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, find(name).value]));
  try { localStorage.setItem("millstream-settings", JSON.stringify(values)); } catch { /* storage is off */ }
}

function fill(values) {
  for (const name of Object.keys(DEFAULTS)) find(name).value = values[name] ?? DEFAULTS[name];
}

export function start() {
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem("millstream-settings") ?? "{}"); } catch { /* damaged or off: the defaults */ }
  fill(kept);
  for (const name of Object.keys(DEFAULTS)) find(name).addEventListener("input", keep);
  find("reset").addEventListener("click", () => { fill({}); keep(); });
}
