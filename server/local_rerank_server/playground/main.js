// The page: builds requests from the fields, sends them, and shows rankings, code and errors.

import { offerClients, showCode } from "./code.js";
import { askForKey, follow, hasSeveral, needsKey, refresh } from "./connection.js";
import { parseText, toText } from "./documents.js";
import { byId, element, say } from "./elements.js";
import { EXAMPLES } from "./examples.js";
import { acceptFiles } from "./files.js";
import { clearErrors, showError } from "./messages.js";
import { offerCancel, showCancelled, showEnd, showRunning } from "./progress.js";
import { announce, renderRanking, soFar } from "./results.js";
import { ServerError, rank } from "./server.js";

const DEFAULT_TITLE = "The server’s default instruction";

let running = new AbortController();

function start() {
  if (/mac|iphone|ipad/i.test(navigator.platform)) say("shortcut", "⌘ ↵");
  byId("examples").append(...EXAMPLES.map(exampleButton));
  offerCancel(cancelAll);
  byId("form").addEventListener("submit", (event) => { event.preventDefault(); rankAll(); });
  byId("form").addEventListener("input", fieldsChanged);
  document.addEventListener("keydown", rankByKeys);
  acceptFiles(
    ({ documents, note }) => { clearErrors(); fill({ documents }); say("documents-note", note); },
    ({ message }) => { clearErrors(); showError({ message, field: "documents" }); },
  );
  offerClients(fieldsChanged);
  follow(fieldsChanged);
  fieldsChanged();
}

function rankByKeys(event) {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  rankAll();
}

// ---- the fields

function exampleButton(example) {
  const button = element("button", { type: "button", className: "chip", lang: example.lang }, example.name);
  button.addEventListener("click", () => {
    fill({ query: example.query, documents: example.documents, instruction: example.instruction ?? "", top_n: "" });
    byId("compare").checked = Boolean(example.second);
    byId("second-instruction").value = example.second ?? "";
    if (example.second) byId("second-model").value = byId("model").value;
    fieldsChanged();
    rankAll();
  });
  return button;
}

/** Set the fields; undefined values leave a field unchanged. */
function fill({ query, documents, instruction, top_n }) {
  const values = { query, instruction, documents: documents && toText(documents), "top-n": top_n };
  for (const [id, value] of Object.entries(values)) if (value !== undefined) byId(id).value = value;
  fieldsChanged();
}

/** Update what depends on the fields: the note on the documents, the second instruction, the examples, and the code. */
function fieldsChanged() {
  const { documents, note } = parseText(byId("documents").value);
  say("documents-note", note);
  const compares = byId("compare").checked;
  say("compared", `Compare two instructions ${hasSeveral() ? "or models " : ""}side by side`);
  byId("second").hidden = !compares;
  byId("second-model-field").hidden = !compares || !hasSeveral();
  byId("second-instruction").placeholder = comparesModels() ? "The same as the first" : byId("instruction").placeholder;
  for (const [index, button] of [...byId("examples").children].entries()) {
    button.setAttribute("aria-pressed", String(isInFields(EXAMPLES[index], documents)));
  }
  const base = new URL(".", document.baseURI).href.replace(/\/$/, "");
  const request = requestOf(documents, byId("instruction").value, byId("model").value);
  showCode(request, base, needsKey() ? "YOUR_KEY" : "");
}

const comparesModels = () => byId("compare").checked && hasSeveral()
  && byId("second-model").value !== byId("model").value;

/** Whether the fields hold this example, also if they were filled in by hand. */
function isInFields(example, documents) {
  const second = byId("compare").checked ? byId("second-instruction").value : undefined;
  return byId("query").value === example.query
    && byId("instruction").value === (example.instruction ?? "")
    && second === example.second
    && documents.length === example.documents.length
    && documents.every((text, index) => text === example.documents[index]);
}

/** The request in the fields; empty fields are omitted. */
function requestOf(documents, instruction, model) {
  return {
    query: byId("query").value,
    documents,
    instruction: instruction.trim() ? instruction : undefined,
    top_n: numberOf(byId("top-n").value.trim()),
    model,
    long_documents: byId("in-chunks").checked ? "chunk" : undefined,
    spans: byId("spans").checked || undefined,
  };
}

/** The number, or else the text itself, so that the server reports the error. */
function numberOf(text) {
  if (!text) return undefined;
  return Number.isNaN(Number(text)) ? text : Number(text);
}

// ---- ranking

/** Rank with each instruction or model; aborts a ranking that is still running. */
async function rankAll() {
  running.abort();
  const mine = running = new AbortController();
  clearErrors();
  const requests = allRequests();
  showRunning(requestsInWords(requests));
  try {
    const answers = await Promise.all(rankings(requests, mine));
    if (mine === running) finish(() => showRankings(requests, answers));
  } catch (error) {
    if (mine === running) finish(() => showFailure(error));
  }
}

/** The answers; until they are all there, the page shows what is scored, at most once per frame. */
function rankings(requests, mine) {
  const scored = requests.map(() => []);
  let frame = 0;
  const show = () => {
    frame = 0;
    const partial = scored.map((items, index) => soFar(items, requests[index].top_n));
    if (mine === running && byId("results").hasAttribute("aria-busy")) showRankings(requests, partial);
  };
  return requests.map((request, index) => rank(request, mine.signal, (items) => {
    scored[index].push(...items);
    if (items.length && !frame) frame = requestAnimationFrame(show);
  }));
}

function finish(show) {
  showEnd();
  show();
  refresh();  // the request may have loaded a model, or unloaded another
}

/** Abort the ranking; the server then removes it from its queue. */
function cancelAll() {
  running.abort();
  running = new AbortController();
  showCancelled();
}

function requestsInWords(requests) {
  const number = requests[0].documents.length;
  return `Ranking ${number} ${number === 1 ? "document" : "documents"}${requests.length > 1 ? " twice" : ""}`;
}

function allRequests() {
  const { documents } = parseText(byId("documents").value);
  const first = requestOf(documents, byId("instruction").value, byId("model").value);
  if (!byId("compare").checked) return [first];
  const second = byId("second-instruction").value;
  const model = byId(hasSeveral() ? "second-model" : "model").value;
  return [first, requestOf(documents, comparesModels() && !second.trim() ? first.instruction ?? "" : second, model)];
}

/** What tells a request from the others. */
function titleOf(request, requests) {
  const differ = (name) => requests.some((other) => other[name] !== request[name]);
  const model = differ("model") ? [request.model] : [];
  const instruction = differ("instruction") || !model.length ? [request.instruction ?? DEFAULT_TITLE] : [];
  return [...model, ...instruction].join(" · ");
}

function showRankings(requests, answers) {
  const compared = answers.length > 1, complete = answers.every((answer) => "model" in answer);
  byId("rankings").replaceChildren(...answers.map((answer, index) => renderRanking(answer, {
    title: compared ? titleOf(requests[index], requests) : "",
    before: index && complete ? answers[0] : null,
  })));
  byId("rankings").classList.toggle("compared", compared);
  byId("rankings").classList.toggle("so-far", !complete);
  if (complete) say("announcement", answers.map(announce).join(". "));
}

function showFailure(error) {
  running.abort();  // the other of two requests may still be running
  say("announcement", "");
  byId("rankings").replaceChildren();
  if (error.asksForKey) return askForKey(error, rankAll);
  showError(error instanceof ServerError ? error : { message: `This page failed: ${error.message}` });
}

start();
