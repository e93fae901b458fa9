// The server's readiness, its models, and its API key.

import { byId, element, say } from "./elements.js";
import { showError } from "./messages.js";
import { listModels, serverStatus, useKey } from "./server.js";

const RETRY_MS = 1000;  // poll interval while the model loads
const STATUS_TEXTS = { loading: "loading the model …", draining: "the server is stopping", unreachable: "no answer" };

let keyAsked = false;
let afterKey = () => {};
let changed = () => {};

/** Poll the server until it is ready, then list its models; calls `onChange` when models or key change. */
export function follow(onChange) {
  changed = onChange;
  byId("key-form").addEventListener("submit", (event) => { event.preventDefault(); takeKey(); });
  pollStatus();
}

/** Whether the server has asked for a key since the page was loaded. */
export const needsKey = () => keyAsked;

/** Ask the user for a key because of `error`; calls `retry` once it is entered. */
export function askForKey(error, retry) {
  keyAsked = true;
  afterKey = retry;
  say("key-message", error.type === "InvalidApiKey"
    ? "The API key is wrong."
    : "This server needs an API key.");
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

async function pollStatus() {
  const status = await serverStatus().catch(() => "unreachable");
  if (status === "ready") return fillModels();
  showStatus(status, STATUS_TEXTS[status]);
  setTimeout(pollStatus, RETRY_MS);
}

/** Fill the list of models; returns whether the server sent it. */
async function fillModels() {
  try {
    const models = await listModels();
    byId("model").replaceChildren(...models.map(optionOf));
    showStatus("ready", models[0].model_name);
    showBuiltIn(models[0]);
    changed();
    return true;
  } catch (error) {
    if (error.asksForKey) {
      showStatus("locked", "needs an API key");
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

/** A name that can be sent; an alias says which model it stands for. */
function optionOf({ id, model_name }) {
  return element("option", { value: id }, id === model_name ? id : `${id}, an alias of ${model_name}`);
}

/** Show the notes about the built-in model, the only one with a description. */
function showBuiltIn({ model_name, description }) {
  say("model-note", description ? `${model_name}: ${description}` : "");
  say("built-in", `${model_name} largely ignores instructions.`);
  byId("built-in").hidden = !description;
}
