// Making and finding elements. Text only ever becomes a text node: no function here takes HTML.

/** The element of the page with that id. */
export const byId = (id) => document.getElementById(id);

/** A new element; a child is an element or a string, and a string is text, whatever it holds. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Set an element's text where it is another, so that a screen reader hears of changes alone. */
export function say(id, text) {
  if (byId(id).textContent !== text) byId(id).textContent = text;
}
