// Shows the request as code for a chosen client, with a copy button.

import { CLIENTS, codeOf } from "./clients.js";
import { byId, element, say } from "./elements.js";

const MAX_SHOWN = 20000;  // characters, because laying out megabytes of code is slow
const COPIED_MS = 2500;

let code = "";

/** Add the radio buttons of the clients; calls `choose` when the choice changes. */
export function offerClients(choose) {
  byId("clients").append(...CLIENTS.map(({ name }, index) => {
    const radio = { type: "radio", name: "client", value: String(index), checked: index === 0 };
    return element("label", { className: "chip" }, element("input", radio), name);
  }));
  byId("clients").addEventListener("change", choose);
  byId("copy").addEventListener("click", copyCode);
}

/** Show the chosen client's code for `request`; `key` is a placeholder, or "" if the server needs no key. */
export function showCode(request, base, key) {
  const client = CLIENTS[Number(byId("clients").querySelector(":checked").value)];
  code = codeOf(client, request, base, key);
  const rest = code.length - MAX_SHOWN;
  byId("snippet").textContent = rest > 0
    ? `${code.slice(0, MAX_SHOWN)}\n… and ${rest} more characters; Copy copies all of them`
    : code;
}

async function copyCode() {
  say("copied", await copy(code) ? "Copied" : "The browser refused to copy");
  setTimeout(() => say("copied", ""), COPIED_MS);
}

/** The clipboard API needs https or localhost; elsewhere execCommand still works. */
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
