// The page: builds requests from the fields, sends them, and shows rankings, code and errors.

import { offerClients, showCode } from "./code.js";
import { askForKey, follow, needsKey } from "./connection.js";
import { parseText, toText } from "./documents.js";
import { byId, element, say } from "./elements.js";
import { EXAMPLES } from "./examples.js";
import { acceptFiles } from "./files.js";
import { clearErrors, showError } from "./messages.js";
import { announce, renderRanking } from "./results.js";
import { ServerError, rank } from "./server.js";

const DEFAULT_TITLE = "The server’s default instruction";

let running = new AbortController();

function start() {
  if (/mac|iphone|ipad/i.test(navigator.platform)) say("shortcut", "⌘ ↵");
  byId("examples").append(...EXAMPLES.map(exampleButton));
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

/** Update what depends on the fields: the note on the documents, the second instruction, and the code. */
function fieldsChanged() {
  const { documents, note } = parseText(byId("documents").value);
  say("documents-note", note);
  byId("second").hidden = !byId("compare").checked;
  const base = new URL(".", document.baseURI).href.replace(/\/$/, "");
  const request = requestOf(documents, byId("instruction").value);
  showCode({ ...request, model: request.model ?? "qwen3-rerank" }, base, needsKey() ? "YOUR_KEY" : "");
}

/** The request in the fields; empty fields are omitted. */
function requestOf(documents, instruction) {
  return {
    query: byId("query").value,
    documents,
    instruction: instruction.trim() ? instruction : undefined,
    top_n: numberOf(byId("top-n").value.trim()),
    model: byId("model").value || undefined,
  };
}

/** The number, or else the text itself, so that the server reports the error. */
function numberOf(text) {
  if (!text) return undefined;
  return Number.isNaN(Number(text)) ? text : Number(text);
}

// ---- ranking

/** Rank with each instruction; aborts a ranking that is still running. */
async function rankAll() {
  running.abort();
  const mine = running = new AbortController();
  clearErrors();
  byId("results").setAttribute("aria-busy", "true");
  say("announcement", "Ranking …");
  try {
    const requests = allRequests();
    const answers = await Promise.all(requests.map((request) => rank(request, mine.signal)));
    if (mine === running) showRankings(requests, answers);
  } catch (error) {
    if (mine === running) showFailure(error);
  } finally {
    if (mine === running) byId("results").removeAttribute("aria-busy");
  }
}

function allRequests() {
  const { documents } = parseText(byId("documents").value);
  const ids = byId("compare").checked ? ["instruction", "second-instruction"] : ["instruction"];
  return ids.map((id) => requestOf(documents, byId(id).value));
}

function showRankings(requests, answers) {
  const compared = answers.length > 1;
  byId("rankings").replaceChildren(...answers.map((answer, index) => renderRanking(answer, {
    title: compared ? requests[index].instruction ?? DEFAULT_TITLE : "",
    before: index ? answers[0] : null,
  })));
  byId("rankings").classList.toggle("compared", compared);
  say("announcement", answers.map(announce).join(". "));
}

function showFailure(error) {
  running.abort();  // the other of two requests may still be running
  say("announcement", "");
  byId("rankings").replaceChildren();
  if (error.asksForKey) return askForKey(error, rankAll);
  showError(error instanceof ServerError ? error : { message: `This page failed: ${error.message}` });
}

start();
