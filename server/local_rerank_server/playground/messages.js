// What went wrong: a panel above the results, and a mark at the field that it is about.

import { byId, element } from "./elements.js";

const FIELDS = { query: "query", instruction: "instruction", documents: "documents", model: "model", top_n: "top-n" };

/** Show an error: its message, what the server tells of it, and, if it is about a field, that field. */
export function showError({ message, type, field, status, requestId, retryAfter }) {
  const hint = retryAfter ? ` Try again in ${retryAfter} s.` : "";
  const details = [type, status && `HTTP ${status}`, field && `field ${field}`, requestId && `request ${requestId}`];
  byId("error").replaceChildren(
    element("p", {}, message + hint),
    element("p", { className: "meta" }, details.filter(Boolean).join(" · ")),
  );
  byId("error").hidden = false;
  markField(field, message);
}

/** Take back what `showError` showed. */
export function clearErrors() {
  byId("error").hidden = true;
  for (const id of Object.values(FIELDS)) {
    byId(id).removeAttribute("aria-invalid");
    byId(`${id}-error`).textContent = "";
  }
}

/** `field` is the server's name for it: documents, documents.3, top_n. */
function markField(field, message) {
  const id = FIELDS[field?.split(".")[0]];
  if (!id) return;
  byId(id).setAttribute("aria-invalid", "true");
  byId(`${id}-error`).textContent = message;
  byId(id).focus();
}
