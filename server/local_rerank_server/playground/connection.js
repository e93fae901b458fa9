// The server's readiness, its models, and its API key.

import { byId, element, say } from "./elements.js";
import { clearErrors, showError } from "./messages.js";
import { listModels, loadModel, serverStatus, useKey } from "./server.js";

const RETRY_MS = 1000;  // poll interval while the model loads
const STATUS_TEXTS = { loading: "loading the model …", draining: "the server is stopping", unreachable: "no answer" };

let models = [];
let keyAsked = false;
let afterKey = () => {};
let changed = () => {};

/** Poll the server until it is ready, then list its models; calls `onChange` when models or key change. */
export function follow(onChange) {
  changed = onChange;
  byId("key-form").addEventListener("submit", (event) => { event.preventDefault(); takeKey(); });
  byId("model").addEventListener("input", showState);
  byId("load").addEventListener("click", load);
  pollStatus();
}

/** Whether the server has asked for a key since the page was loaded. */
export const needsKey = () => keyAsked;

/** Whether the server has several models. */
export const hasSeveral = () => ownNames().length > 1;

/** Show the states that the models have now, if there are several. */
export const refresh = () => hasSeveral() && fillModels();

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
    const isFirst = !models.length;
    models = await listModels();
    for (const [place, id] of ["model", "second-model"].entries()) {
      const chosen = isFirst ? ownNames()[place] ?? ownNames()[0] : byId(id).value;
      byId(id).replaceChildren(...models.map(optionOf));
      byId(id).value = chosen;
    }
    showState();
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

/** A name that can be sent; an alias says which model it stands for, and one of several models its state. */
function optionOf({ id, alias_of, state }) {
  const name = alias_of ? `${id}, an alias of ${alias_of}` : id;
  return element("option", { value: id }, hasSeveral() ? `${name} (${state})` : name);
}

const ownNames = () => models.filter((model) => !model.alias_of).map((model) => model.id);

/** Show the state of the chosen one of several models, with a button if it can be loaded. */
function showState() {
  const model = models.find(({ id }) => id === byId("model").value);
  byId("model-state").hidden = !hasSeveral() || !model;
  if (byId("model-state").hidden) return;
  const size = `${(model.size_bytes / 1e9).toFixed(2)} GB`;
  say("state", model.reason ? `${model.state}: ${model.reason}` : `${model.state}, ${size}`);
  byId("load").hidden = model.state === "loaded";
}

async function load() {
  clearErrors();
  say("state", "loading …");
  byId("load").hidden = true;
  const error = await loadModel(byId("model").value).catch((reason) => reason);
  if (error.asksForKey) return askForKey(error, load);
  await fillModels();
  if (error instanceof Error) showError(error);
}

/** Show the notes about the built-in model, the only one with a description. */
function showBuiltIn({ model_name, description }) {
  say("model-note", description ? `${model_name}: ${description}` : "");
  say("built-in", `${model_name} largely ignores instructions.`);
  byId("built-in").hidden = !description;
}
