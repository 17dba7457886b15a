// While an image is processed: the question before a large image, the progress, and Cancel.

import { announce, byId, describeProgress } from "./text.js";

const ANNOUNCEMENTS = 4; // of the progress of one request, for screen readers

let announced = 0;

/** Shows that work is in progress. */
export function showBusy(text) {
  byId("busy").hidden = false;
  byId("busy-text").textContent = text;
  byId("progress").hidden = byId("progress-text").hidden = true;
  byId("panel").setAttribute("aria-busy", "true");
  document.body.dataset.state = "busy";
  announced = 0;
  announce(`${text}.`);
}

export function hideBusy() {
  byId("busy").hidden = true;
  byId("panel").setAttribute("aria-busy", "false");
}

/** Shows a progress line of the server; nothing for an image that is processed as a whole. */
export function showProgress({ canvases_done: done, canvases }, secondsLeft) {
  if (canvases < 2) return;
  const text = describeProgress(done, canvases, secondsLeft);
  const bar = byId("progress");
  bar.max = canvases;
  bar.value = done;
  byId("progress-text").textContent = text;
  bar.hidden = byId("progress-text").hidden = false;
  const step = Math.floor((done / canvases) * ANNOUNCEMENTS);
  if (step > announced) announce(text);
  announced = Math.max(announced, step);
}

/**
 * Asks whether a large image is to be sent.
 *
 * @param text What the image needs.
 * @param signal Closes the question; then the promise is rejected with the signal's reason.
 * @returns A promise of true for Send, of false for Cancel or Escape.
 */
export function confirmSending(text, signal) {
  const dialog = byId("estimate");
  const listeners = new AbortController();
  const options = { signal: listeners.signal };
  byId("busy").hidden = true;
  byId("estimate-text").textContent = text;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve, reject) => {
    byId("estimate-send").addEventListener("click", () => dialog.close("send"), options);
    byId("estimate-cancel").addEventListener("click", () => dialog.close(), options);
    dialog.addEventListener(
      "close",
      () => {
        if (dialog.open) return; // the event of an earlier question arrives late
        listeners.abort();
        byId("busy").hidden = false;
        resolve(dialog.returnValue === "send");
      },
      options,
    );
    const withdraw = () => {
      listeners.abort();
      dialog.close();
      reject(signal.reason);
    };
    signal.addEventListener("abort", withdraw, options);
  });
}
