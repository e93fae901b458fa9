// Renders the response of `POST /v1/local/rank`.

import { element } from "./elements.js";

const LONG = 280;  // characters of a document that are shown without expanding it

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const twoDecimals = new Intl.NumberFormat("en", {
  minimumFractionDigits: 2, maximumFractionDigits: 2, signDisplay: "exceptZero",
});
const signed = (value) => twoDecimals.format(value).replace("-", "−");

/** A ranking with a title; `before` is another ranking of the same documents to show movements against. */
export function renderRanking(answer, { title, before = null }) {
  const items = answer.results.map((item, place) => renderItem(item, movement(item, place, before)));
  return element("article", { className: "ranking" },
    ...(title ? [element("h3", { dir: "auto" }, title)] : []),
    element("div", {}, renderHead(), element("ol", {}, ...items)),
    renderFacts(answer),
  );
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
  bar.style.setProperty("--score", item.relevance_score);
  bar.setAttribute("aria-hidden", "true");
  return element("li", {},
    element("div", { className: "scores" },
      element("span", { className: "score", title: String(item.relevance_score) },
        element("span", { className: "hidden" }, "relevance "), score(item.relevance_score)),
      bar,
      element("span", { className: "log-odds", title: `log-odds ${item.log_odds}` },
        element("span", { className: "hidden" }, "log-odds "), signed(item.log_odds)),
    ),
    ...renderText(item.document),
    element("p", { className: "meta" }, ...meta(item, moved)),
  );
}

function renderText(text) {
  const paragraph = element("p", { className: "document", dir: "auto" }, text || "(empty)");
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

function meta(item, moved) {
  const parts = [`index ${item.index}`, tokens(item.num_tokens)];
  if (item.probability !== undefined) parts.unshift(`probability ${score(item.probability)}`);
  const cut = item.num_truncated_tokens;
  return [
    parts.join(" · "),
    ...(cut ? [" · ", element("strong", { className: "cut" }, `${tokens(cut)} cut off`)] : []),
    ...(moved ? [" · ", element("span", { className: "moved" }, moved)] : []),
  ];
}

function movement(item, place, before) {
  if (!before) return "";
  const former = before.results.findIndex((other) => other.index === item.index);
  if (former < 0) return "not in the first ranking";
  const change = `log-odds ${signed(item.log_odds - before.results[former].log_odds)}`;
  if (former === place) return `same place, ${change}`;
  return `${former > place ? `↑ ${former - place} higher` : `↓ ${place - former} lower`}, ${change}`;
}

function renderFacts(answer) {
  const seconds = answer.total_ms / 1000;
  const facts = [
    ["Time", milliseconds(answer.total_ms)],
    ["Speed", seconds ? `${number.format(answer.num_computed_tokens / seconds)} tokens/s` : "–"],
    ["Tokens", `${number.format(answer.total_tokens)} in all, ${number.format(answer.num_computed_tokens)} computed`],
    ["Cut", cuts(answer)],
    ["Model", answer.model],
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
