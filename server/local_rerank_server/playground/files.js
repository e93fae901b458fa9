// Files of documents, chosen with the button or dropped on the field.

import { readFile } from "./documents.js";
import { byId } from "./elements.js";

/** Call `take({documents, note})` for each file, or `fail(error)` if it cannot be read. */
export function acceptFiles(take, fail) {
  const drop = byId("drop");
  const accept = (file) => file && readFile(file).then(take, fail);
  byId("file").addEventListener("change", ({ target }) => {
    accept(target.files[0]);
    target.value = "";  // so that the same file can be chosen again
  });
  for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, (event) => mark(event, true));
  for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, (event) => mark(event, false));
  drop.addEventListener("drop", (event) => accept(event.dataTransfer.files[0]));
  for (const kind of ["dragover", "drop"]) window.addEventListener(kind, keepPage);
}

function mark(event, over) {
  if (hasFile(event)) byId("drop").classList.toggle("over", over);
}

/** Prevent the browser from replacing the page with a dropped file. */
function keepPage(event) {
  if (hasFile(event)) event.preventDefault();
}

const hasFile = (event) => event.dataTransfer.types.includes("Files");
