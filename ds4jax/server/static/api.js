// The server's API: the model, and answers as they come.

import { recall, store } from "./store.js";

let key = recall("sessionStorage", "key");

/** What went wrong, in words for the user. status: of the response; 0 if there was none. */
export class Fault extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Sets the key that the server wants; it is forgotten with the tab. */
export function setKey(given) {
  key = given;
  store("sessionStorage", "key", key);
}

/** The model that is served: `id`, `context_length` and so on. Throws `Fault`. */
export async function model() {
  const response = await request("v1/models", {});
  return (await response.json()).data[0];
}

/** The chunks of a chat completion. Throws `Fault`, and what `fetch` throws when `signal` aborts. */
export async function* chat(body, signal) {
  const wanted = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", { method: "POST", body: JSON.stringify(wanted), signal });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Fault(chunk.error.message, response.status);
    yield chunk;
  }
  throw new Fault("The connection ended before the answer did.");
}

async function request(path, options) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Fault("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Fault(body?.error?.message ?? `The server answered with status ${response.status}.`, response.status);
  }
  return response;
}

/** The data of the server-sent events in a stream of bytes; comments are left out. */
async function* events(stream, signal) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let text = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (text + decoder.decode(value, { stream: true })).split("\n");
      text = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) {
          data.push(line.slice(5).trim());
        } else if (line.trim() === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Fault("The connection to the server was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
