// Shows errors: a panel above the results, and a mark at the field in question.

import { byId, element } from "./elements.js";

const FIELDS = { query: "query", instruction: "instruction", documents: "documents", model: "model", top_n: "top-n" };

/** Show an error's message and details, and mark its field if it has one. */
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

/** Remove what `showError` showed. */
export function clearErrors() {
  byId("error").hidden = true;
  for (const id of Object.values(FIELDS)) {
    byId(id).removeAttribute("aria-invalid");
    byId(`${id}-error`).textContent = "";
  }
}

/** `field` is the server's name, such as documents.3 or top_n. */
function markField(field, message) {
  const id = FIELDS[field?.split(".")[0]];
  if (!id) return;
  byId(id).setAttribute("aria-invalid", "true");
  byId(`${id}-error`).textContent = message;
  byId(id).focus();
}
