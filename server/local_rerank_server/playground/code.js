// The request in code: which client, the code itself, and its way to the clipboard.

import { CLIENTS } from "./clients.js";
import { byId, element, say } from "./elements.js";

const MAX_SHOWN = 20000;  // characters; a browser lays out megabytes slowly, and nobody reads them
const COPIED_MS = 2500;

let code = "";

/** Offer the clients; `choose` is called when another is chosen. */
export function offerClients(choose) {
  byId("clients").append(...CLIENTS.map(({ name }, index) => {
    const radio = { type: "radio", name: "client", value: String(index), checked: index === 0 };
    return element("label", { className: "chip" }, element("input", radio), name);
  }));
  byId("clients").addEventListener("change", choose);
  byId("copy").addEventListener("click", copyCode);
}

/** Show how the chosen client sends `request` to the server at `base`; `key` stands for one, "" where none is asked. */
export function showCode(request, base, key) {
  const client = CLIENTS[Number(byId("clients").querySelector(":checked").value)];
  code = client.code(request, base, key);
  const rest = code.length - MAX_SHOWN;
  byId("snippet").textContent = rest > 0
    ? `${code.slice(0, MAX_SHOWN)}\n… and ${rest} characters more, all of which are copied`
    : code;
}

async function copyCode() {
  say("copied", await copy(code) ? "Copied" : "The browser refused to copy");
  setTimeout(() => say("copied", ""), COPIED_MS);
}

/** Browsers offer the clipboard to pages on https and on this machine only; elsewhere the old way is left. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

function copyBySelection(text) {
  const field = element("textarea", { value: text, className: "hidden", readOnly: true });
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  byId("copy").focus();
  return copied;
}
