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

/** The names that can be sent as `model`, with the states of their models. */
export async function listModels() {
  return (await json("v1/models", {})).data;
}

/** Load a model by its name; returns when it is loaded. */
export const loadModel = (model) => json("v1/models/load", {
  method: "POST",
  headers: { "content-type": "application/json" },
  body: JSON.stringify({ model }),
});

/** The response of `POST /v1/local/rank`. `onScored` gets the documents as soon as their scores are known. */
export async function rank(request, signal, onScored) {
  const answer = await send("v1/local/rank", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...request, stream: true }),
    signal,
  });
  if (!answer.ok || !answer.body) return bodyOf(answer, await answer.text());
  let last = "", rest = "";
  for await (const text of textsOf(answer.body, signal)) {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    last = lines.at(-1) ?? last;
    onScored(lines.map(parsed).filter((value) => value?.index !== undefined));
  }
  const body = bodyOf(answer, rest || last);
  if (body.results) return body;
  throw new ServerError("The response ended before the ranking was complete.");
}

/** The texts of a body as they arrive; Safari's streams cannot be iterated. */
async function* textsOf(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ServerError("The connection to the server was lost while it ranked.");
  }
}

async function json(path, options) {
  const answer = await send(path, options);
  return bodyOf(answer, await answer.text());
}

/** The body of a response; throws ServerError for that of an error. */
function bodyOf(answer, text) {
  const body = parsed(text);
  if (answer.ok && body && !body.error) return body;
  throw new ServerError(body?.error?.message ?? `The response is not JSON: ${text.slice(0, 200) || "it is empty"}`, {
    type: body?.error?.type,
    field: body?.error?.param,
    status: body?.error?.code ?? answer.status,  // in a stream the status came before the error
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
