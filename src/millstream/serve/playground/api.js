// Talking to the server: the key, errors, and streams of server-sent events.

let key = "";
try { key = sessionStorage.getItem("millstream-key") ?? ""; } catch { /* storage is off: the key lives in this page */ }

export const hasKey = () => key !== "";

export function useKey(value) {
  key = value.trim();
  try { sessionStorage.setItem("millstream-key", key); } catch { /* as above */ }
}

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Addresses are relative, so that a proxy may serve all of it under a path of its own.
export async function call(path, { body, signal } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method: body === undefined ? "GET" : "POST", headers, signal, cache: "no-store",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer.");
  }
  if (!answer.ok) throw new ApiError(answer.status, await told(answer));
  return answer;
}

async function told(answer) {
  let message = `The server answered ${answer.status}.`;
  try {
    const { error } = await answer.json();
    if (error?.message) message = error.message;
  } catch { /* no JSON: the status has to do */ }
  const wait = answer.headers.get("Retry-After");
  return wait ? `${message} Try again in ${wait} s.` : message;
}

// The data of a stream of server-sent events, one parsed object at a time. It is read to its end, also after [DONE].
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const blocks = rest.split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).trimStart()).join("\n");
        if (!data) continue;
        if (data === "[DONE]") continue;
        yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
