// Shows that a ranking is running: the elapsed time, and a button that cancels it.

import { byId, say } from "./elements.js";

const DELAY_MS = 300;  // shorter rankings show nothing, because it would only flicker
const TICK_MS = 100;
const ANNOUNCED_S = 10;  // interval at which screen readers announce the elapsed time

let timer = 0;
let started = 0;

/** Call `cancel` when the button is pressed. */
export function offerCancel(cancel) {
  byId("cancel").addEventListener("click", cancel);
}

/** Show `what` and the elapsed time until `showEnd` or `showCancelled`. */
export function showRunning(what) {
  stop();
  started = performance.now();
  byId("results").setAttribute("aria-busy", "true");
  say("announcement", `${what} …`);
  say("progress-text", what);
  say("elapsed", "");
  timer = setInterval(() => tick(what), TICK_MS);
}

/** Remove what `showRunning` showed. */
export function showEnd() {
  const focused = document.activeElement === byId("cancel");
  stop();
  if (focused) byId("results").focus();
}

/** Say that the ranking was cancelled. */
export function showCancelled() {
  const text = `Cancelled after ${seconds(performance.now() - started)}.`;
  stop();
  say("progress-text", text);
  say("elapsed", "");
  byId("cancel").hidden = true;
  byId("progress").hidden = false;
  say("announcement", text);
  byId("rank").focus();
}

function tick(what) {
  const elapsed = performance.now() - started;
  if (elapsed < DELAY_MS) return;
  say("elapsed", seconds(elapsed));
  byId("cancel").hidden = false;
  byId("progress").hidden = false;
  const announced = Math.floor(elapsed / 1000 / ANNOUNCED_S) * ANNOUNCED_S;
  if (announced) say("announcement", `${what}: ${announced} s`);
}

function stop() {
  clearInterval(timer);
  byId("progress").hidden = true;
  byId("results").removeAttribute("aria-busy");
}

const seconds = (ms) => `${(ms / 1000).toFixed(ms < 10000 ? 1 : 0)} s`;
