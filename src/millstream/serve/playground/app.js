// Wires the page together: the theme, the key, models, views and the state of the server.

import { ApiError, call, hasKey, useKey } from "./api.js";
import * as chat from "./chat.js";
import * as engine from "./engine.js";
import * as settingsView from "./settings.js";
import * as timeline from "./timeline.js";

const { settings } = settingsView;
const find = (id) => document.getElementById(id);
const root = document.documentElement, model = find("model");

const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

function tellTheme() {
  find("theme").setAttribute("aria-pressed", String(dark()));
}

function setStatus(state, text) {
  const status = find("status");
  if (status.dataset.state === state && find("status-text").textContent === text) return;
  status.dataset.state = state;
  find("status-text").textContent = text;
}

function askForKey() {
  const form = find("key-form");
  setStatus("locked", "Key needed");
  if (!form.hidden) return;
  form.hidden = false;
  if (hasKey()) {
    find("key-hint").textContent = "The server does not accept this key.";
    find("key-hint").classList.add("wrong");
  }
  find("key").focus();
}

async function loadModels() {
  try {
    const { data } = await (await call("v1/models")).json();
    model.replaceChildren(...data.map(({ id }) => new Option(id, id)));
    settings.model = model.value;
    model.disabled = data.length < 2;
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) askForKey();
    else setTimeout(loadModels, 2000);
  }
}

find("theme").addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  try { localStorage.setItem("millstream-theme", root.dataset.theme); } catch { /* storage is off: until the page is left */ }
  tellTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", tellTheme);
tellTheme();

model.addEventListener("change", () => { settings.model = model.value; });

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(find("key").value);
  find("key").value = "";
  find("key-form").hidden = true;
  setStatus("connecting", "Connecting");
  loadModels();
  find("prompt").focus();
});

for (const button of document.querySelectorAll(".views button")) {
  button.addEventListener("click", () => {
    document.body.dataset.view = button.dataset.show;
    for (const one of document.querySelectorAll(".views button")) one.toggleAttribute("aria-current", false);
    button.setAttribute("aria-current", "true");
  });
}

settingsView.start();
timeline.start();
chat.onRefused(askForKey);
chat.start();
engine.start({
  refused: askForKey,
  state(state) {
    if (state === null) setStatus("down", "Not answering");
    else if (!state.ready) setStatus("busy", "Not ready");
    else {
      find("key-form").hidden = true;
      setStatus("ready", "Ready");
    }
    if (state !== null && !model.options.length) loadModels();
  },
});
loadModels();
find("prompt").focus({ preventScroll: true });
