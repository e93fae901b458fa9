// Creates and finds elements. Strings always become text nodes, never HTML.

/** The element with that id. */
export const byId = (id) => document.getElementById(id);

/** Create an element; children are elements or strings, which become text nodes. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Set an element's text if it differs, so that screen readers announce only changes. */
export function say(id, text) {
  if (byId(id).textContent !== text) byId(id).textContent = text;
}
