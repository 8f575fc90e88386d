// Calls of the server that this page came from, and its streams.

const KEY = "coterie-api-key";
export const base = new URL("v1/", document.baseURI);

export class Trouble extends Error {
  constructor(message, status = 0, wait = null) {
    super(wait ? `${message}. Try again in ${wait} s.` : message);
    Object.assign(this, { told: message, status, wait }); // wait: seconds until it may be asked again
  }
}

// The key lives as long as the tab: in memory, and in sessionStorage where that is allowed.
let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {}

export const heldKey = () => key;

export function holdKey(given) {
  key = given.trim();
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {}
}

async function call(path, body, signal) {
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(new URL(path, base), { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble(error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message);
  }
  if (response.ok) return response;
  const told = await response.json().then((body) => body.error?.message, () => null);
  throw new Trouble(told ?? `The server refuses with status ${response.status}`, response.status, response.headers.get("Retry-After"));
}

export const models = async () => (await (await call("models")).json()).data;

// The weights of the experts for a prompt, without an answer.
export const route = async (body, signal) => (await (await call("route", body, signal)).json()).data[0].weights;

// Yield the chunks of a streamed answer.
export async function* chat(body, signal) {
  const response = await call("chat/completions", body, signal);
  for await (const data of frames(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Trouble(chunk.error.message);
    yield chunk;
  }
  throw new Trouble("The connection broke off before the answer ended.");
}

async function* frames(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new Trouble("The connection broke off before the answer ended.");
      });
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
