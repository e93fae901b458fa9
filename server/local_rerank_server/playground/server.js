// Calls the server. The API key is kept only in this module's memory.

let apiKey = "";

/** Send `key` from now on; "" sends none. */
export const useKey = (key) => { apiKey = key.trim(); };

/** An error response, or no response: the server's message, and the field in question. */
export class ServerError extends Error {
  constructor(message, { type = "", field = null, status = 0, requestId = "", retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { type, field, status, requestId, retryAfter });
  }

  get asksForKey() { return this.status === 401; }
}

/** loading, ready or draining. */
export async function serverStatus() {
  const answer = await send("ready", {});
  return (await answer.json()).status;
}

/** The names that can be sent as `model`, with descriptions if they have one. */
export async function listModels() {
  return (await json("v1/models", {})).data;
}

/** The response of `POST /v1/local/rank`. */
export async function rank(request, signal) {
  return json("v1/local/rank", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
}

async function json(path, options) {
  const answer = await send(path, options);
  const text = await answer.text();
  const body = parsed(text);
  if (answer.ok && body) return body;
  throw new ServerError(body?.error?.message ?? `The response is not JSON: ${text.slice(0, 200) || "it is empty"}`, {
    type: body?.error?.type,
    field: body?.error?.param,
    status: answer.status,
    requestId: answer.headers.get("x-request-id") ?? "",
    retryAfter: answer.headers.get("retry-after"),
  });
}

async function send(path, options) {
  const headers = { ...options.headers };
  if (apiKey) headers.authorization = `Bearer ${asHeader(apiKey)}`;
  try {
    return await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not respond. Is it still running?");
  }
}

/** The text's UTF-8 bytes as characters, because a header value holds bytes. */
const asHeader = (text) => String.fromCharCode(...new TextEncoder().encode(text));

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
