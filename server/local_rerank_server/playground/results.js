// Renders the response of `POST /v1/local/rank`.

import { element } from "./elements.js";

const LONG = 280;  // characters of a document that are shown without expanding it

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const twoDecimals = new Intl.NumberFormat("en", {
  minimumFractionDigits: 2, maximumFractionDigits: 2, signDisplay: "exceptZero",
});
const signed = (value) => twoDecimals.format(value).replace("-", "−");

/**
 * A ranking with a title, and with facts if `answer` is complete. `before` is another ranking of the same documents to
 * show movements against.
 */
export function renderRanking(answer, { title, before = null }) {
  const items = answer.results.map((item, place) => renderItem(item, movement(item, place, before, answer.model)));
  return element("article", { className: "ranking" },
    ...(title ? [element("h3", { dir: "auto" }, title)] : []),
    element("div", {}, renderHead(), element("ol", {}, ...items)),
    ...("model" in answer ? [renderFacts(answer)] : []),
  );
}

/** The documents that are scored so far as a ranking. */
export function soFar(items, top_n) {
  const sorted = [...items].sort((one, other) => other.log_odds - one.log_odds || one.index - other.index);
  return { results: sorted.slice(0, top_n) };
}

/** The text that screen readers announce. */
export function announce(answer) {
  const first = answer.results[0];
  const best = first ? `; the first is: ${first.document.slice(0, 100)}` : "";
  return `${answer.results.length} ranked in ${milliseconds(answer.total_ms)}${best}`;
}

/** Column heads, hidden from screen readers because each item labels its values. */
function renderHead() {
  const head = element("div", { className: "scores head" },
    element("span", {}, "relevance"), element("span"), element("span", { className: "log-odds" }, "log-odds"));
  head.setAttribute("aria-hidden", "true");
  return head;
}

function renderItem(item, moved) {
  const bar = element("span", { className: "bar" });
  const isLogit = item.relevance_score === item.log_odds; // as some encoders' configuration says
  bar.style.setProperty("--score", isLogit ? 1 / (1 + Math.exp(-item.log_odds)) : item.relevance_score);
  bar.setAttribute("aria-hidden", "true");
  return element("li", {},
    element("div", { className: "scores" },
      element("span", { className: "score", title: String(item.relevance_score) },
        element("span", { className: "hidden" }, "relevance "), score(item.relevance_score)),
      bar,
      element("span", { className: "log-odds", title: `log-odds ${item.log_odds}` },
        element("span", { className: "hidden" }, "log-odds "), signed(item.log_odds)),
    ),
    ...renderText(item),
    element("p", { className: "meta" }, ...meta(item, moved)),
  );
}

function renderText(item) {
  const text = item.document;
  const paragraph = element("p", { className: "document", dir: "auto" }, ...(text ? marked(item) : ["(empty)"]));
  if (text.length <= LONG && text.split("\n").length <= 4) return [paragraph];
  const more = element("button", { type: "button", className: "quiet more" }, "Show all");
  more.setAttribute("aria-expanded", "false");
  paragraph.classList.add("clamped");
  more.addEventListener("click", () => {
    const clamped = paragraph.classList.toggle("clamped");
    more.textContent = clamped ? "Show all" : "Show less";
    more.setAttribute("aria-expanded", String(!clamped));
  });
  return [paragraph, more];
}

/** The text; the best of several chunks and its scored sentences, best first in `spans`, are marked. */
function marked({ document: text, best_chunk: chunk, num_chunks: count, spans = [] }) {
  if (!chunk) return [text];
  const sentences = [...spans].sort((a, b) => a.start - b.start);
  const places = [chunk.start, ...sentences.flatMap(({ start, end }) => [start, end]), chunk.end];
  const [start, ...units] = unitsOf(text, places);
  const parts = [];
  let last = count === 1 ? 0 : start;
  for (const [index, sentence] of sentences.entries()) {
    const [from, to] = units.slice(2 * index);
    parts.push(text.slice(last, from));
    if (sentence === spans[0]) parts.splice(0, parts.length, ...before(...parts));
    parts.push(renderSentence(text.slice(from, to), sentence.score));
    last = to;
  }
  parts.push(text.slice(last, units.at(-1)));
  if (count === 1) return [...parts, text.slice(units.at(-1))];
  const title = `characters ${chunk.start} to ${chunk.end}, relevance ${chunk.score}`;
  return [
    ...before(text.slice(0, start)),
    element("mark", { className: "chunk", title }, ...parts),
    text.slice(units.at(-1)),
  ];
}

/** What is hidden until all of the text is shown. */
const before = (...parts) => (parts.join("") ? [element("span", { className: "before" }, ...parts)] : []);

function renderSentence(text, value) {
  const mark = element("mark", { className: "sentence", title: `relevance ${value}` }, text);
  mark.style.setProperty("--score", value);
  mark.dataset.score = score(value);
  return mark;
}

/** Positions in a string, whose units are those of UTF-16, of ascending positions in code points. */
function unitsOf(text, positions) {
  let point = 0;
  let unit = 0;
  return positions.map((position) => {
    for (; point < position; point++) unit += text.codePointAt(unit) > 0xffff ? 2 : 1;
    return unit;
  });
}

function meta(item, moved) {
  const parts = [`index ${item.index}`, tokens(item.num_tokens)];
  if (item.probability !== undefined) parts.unshift(`probability ${score(item.probability)}`);
  if (item.num_chunks > 1) parts.push(`best of ${number.format(item.num_chunks)} chunks`);
  const cut = item.num_truncated_tokens;
  return [
    parts.join(" · "),
    ...(cut ? [" · ", element("strong", { className: "cut" }, `${tokens(cut)} cut off`)] : []),
    ...(moved ? [" · ", element("span", { className: "moved" }, moved)] : []),
  ];
}

/** The log-odds of two models have no common scale, so that their difference says nothing. */
function movement(item, place, before, model) {
  if (!before) return "";
  const former = before.results.findIndex((other) => other.index === item.index);
  if (former < 0) return "not in the first ranking";
  const difference = signed(item.log_odds - before.results[former].log_odds);
  const change = model === before.model ? `, log-odds ${difference}` : "";
  if (former === place) return `same place${change}`;
  return `${former > place ? `↑ ${former - place} higher` : `↓ ${place - former} lower`}${change}`;
}

function renderFacts(answer) {
  const seconds = answer.total_ms / 1000;
  const facts = [
    ["Time", milliseconds(answer.total_ms)],
    ["Speed", seconds ? `${number.format(answer.num_computed_tokens / seconds)} tokens/s` : "–"],
    ["Tokens", `${number.format(answer.total_tokens)} in all, ${number.format(answer.num_computed_tokens)} computed`],
    ["Cut", cuts(answer)],
    ["Model", answer.model],
    ...(answer.is_constant ? [["Note", "all scores are the same: this order is that of the request"]] : []),
  ];
  return element("dl", { className: "facts" },
    ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

function cuts(answer) {
  const parts = [];
  if (answer.num_query_truncated_tokens) parts.push(`${tokens(answer.num_query_truncated_tokens)} of the query`);
  const documents = answer.num_truncated_documents;
  if (documents) parts.push(`${documents} ${documents === 1 ? "document" : "documents"}`);
  return parts.join(", ") || "nothing";
}

const tokens = (count) => `${number.format(count)} ${count === 1 ? "token" : "tokens"}`;

const milliseconds = (ms) => (ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(2)} s`);

/** Four decimals, without rounding to 0.0000 or 1.0000. */
function score(value) {
  if (value > 0 && value < 0.00005) return "<0.0001";
  if (value < 1 && value >= 0.99995) return ">0.9999";
  return value.toFixed(4);
}
