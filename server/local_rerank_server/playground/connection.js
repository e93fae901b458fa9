// Whether the server is ready, which models it serves, and the API key that it may ask for.

import { byId, element, say } from "./elements.js";
import { showError } from "./messages.js";
import { listModels, serverStatus, useKey } from "./server.js";

const RETRY_MS = 1000;  // between two looks at a server that still loads its model
const WORDS = { loading: "loading the model …", draining: "the server is stopping", unreachable: "no answer" };

let keyAsked = false;
let afterKey = () => {};
let changed = () => {};

/** Follow the server until it is ready, then list its models; `onChange` is called when models or key change. */
export function follow(onChange) {
  changed = onChange;
  byId("key-form").addEventListener("submit", (event) => { event.preventDefault(); takeKey(); });
  look();
}

/** Whether the server has asked for a key since the page was opened. */
export const wantsKey = () => keyAsked;

/** Ask for a key because of `error`, and call `retry` once one is given. */
export function askForKey(error, retry) {
  keyAsked = true;
  afterKey = retry;
  say("key-message", error.type === "InvalidApiKey"
    ? "The server does not know this API key."
    : "This server asks for an API key.");
  byId("key-form").hidden = false;
  byId("key").focus();
  changed();
}

async function takeKey() {
  useKey(byId("key").value);
  byId("key").value = "";
  byId("key-form").hidden = true;
  say("key-message", "");
  byId("query").focus();
  if (await fillModels()) afterKey();
}

async function look() {
  const status = await serverStatus().catch(() => "unreachable");
  if (status === "ready") return fillModels();
  showStatus(status, WORDS[status]);
  setTimeout(look, RETRY_MS);
}

/** Whether the server gave its list. */
async function fillModels() {
  try {
    const models = await listModels();
    byId("model").replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
    showStatus("ready", models[0].model_name);
    showBuiltIn(models[0].description ?? "");
    changed();
    return true;
  } catch (error) {
    if (error.asksForKey) {
      showStatus("locked", "asks for an API key");
      askForKey(error, afterKey);
    } else {
      showError(error);
    }
    return false;
  }
}

function showStatus(status, text) {
  byId("server-status").dataset.status = status;
  say("server-status", text);
}

/** Only the built-in model has a description. */
function showBuiltIn(description) {
  say("model-note", description);
  byId("built-in").hidden = !description;
}
