// Texts of the page: counts, progress, notes, times.

import { leastScore } from "./api.js";
import { countCanvases } from "./estimate.js";

const STAGES = {
  decode: "Decode",
  queue: "Wait",
  infer: "Model",
  postprocess: "Masks",
  encode: "Encode",
};

export function byId(id) {
  return document.getElementById(id);
}

/** Announces a text to screen readers. */
export function announce(text) {
  byId("announcer").textContent = text;
}

export function formatCount(count) {
  return count.toLocaleString("en");
}

export function formatArea(pixels) {
  return `${formatCount(pixels)} px`;
}

export function describeInstance({ category, score, area }, contour) {
  const what = contour ? "outline" : "area";
  return `${category}, score ${score.toFixed(2)}, ${what} ${formatArea(area)}`;
}

export function describeCount({ shown }) {
  return `${shown.length || "No"} ${shown.length === 1 ? "instance" : "instances"}`;
}

/** Below the slider: what it hides. */
export function describeHidden({ shown, instances }) {
  const hidden = instances.length - shown.length;
  if (!hidden) return "All instances of the answer are shown.";
  return `${hidden} with a lower score ${hidden === 1 ? "is" : "are"} hidden.`;
}

/**
 * Below the count: what max_instances left out. While the slider hides instances nothing is missing
 * above its score, as the server leaves out those with the lowest scores.
 */
export function showTruncation({ answer, shown, instances, model }) {
  const { truncated, instances_found: found } = answer.result;
  const isIncomplete = truncated && shown.length === instances.length;
  const [text, about] = byId("truncation").children;
  text.textContent = isIncomplete
    ? `${formatCount(shown.length)} of ${formatCount(found)} objects shown (max_instances)`
    : "";
  about.textContent = isIncomplete
    ? `${formatCount(found)} have a score of at least ${leastScore(model).toFixed(2)}. Those below ` +
      `${instances.at(-1).score.toFixed(2)} are not in the answer.`
    : "";
}

/** "about 20 s", "about 3 minutes"; no more precise than the estimate is. */
export function describeDuration(seconds) {
  if (seconds < 9.5) return `about ${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 57.5) return `about ${Math.round(seconds / 5) * 5} s`;
  const [value, unit] = seconds < 90 * 60 ? [seconds / 60, "minute"] : [seconds / 3600, "hour"];
  const rounded = Math.max(1, Math.round(value));
  return `about ${rounded} ${unit}${rounded === 1 ? "" : "s"}`;
}

/** Before a large image is sent; seconds is null if nothing is known yet. */
export function describeEstimate(canvases, seconds) {
  const time = seconds === null ? "" : ` (${describeDuration(seconds)})`;
  return `This image needs ${formatCount(canvases)} tiles${time}`;
}

/** While an image is processed; secondsLeft is null if nothing is known yet. */
export function describeProgress(done, canvases, secondsLeft) {
  const tiles = `${formatCount(done)} of ${formatCount(canvases)} tiles`;
  if (done === canvases) return `${tiles}, preparing the answer`;
  return secondsLeft === null ? tiles : `${tiles}, ${describeDuration(secondsLeft)} left`;
}

/** Below the count: which image, how large, which model. */
export function showFacts(file, { result, version }, model) {
  const name = file.name || "pasted image";
  const size = `${result.width} × ${result.height} px`;
  byId("about").textContent = `${name}, ${size}. ${model.name} version ${version}.`;
}

/** What a model is for, from its card. */
export function showCard({ name, card }) {
  byId("model-domain").hidden = !card.domain;
  byId("model-domain").textContent = `${name}: ${card.domain}.`;
  const facts = [
    card.object_size_px && `Objects of about ${card.object_size_px} px`,
    card.um_per_px && `${card.um_per_px} µm a pixel`,
    card.training_data && `Trained on ${card.training_data}`,
    card.licence,
    card.attribution,
  ].filter(Boolean);
  byId("model-card").hidden = !facts.length;
  fillList(byId("model-card"), facts);
}

/** Shows the samples for a model, or all of them if there is none for it. */
export function showSamples({ name }) {
  const samples = [...document.querySelectorAll("[data-sample]")];
  const own = samples.filter((sample) => sample.dataset.model === name);
  for (const sample of samples) sample.hidden = own.length > 0 && !own.includes(sample);
}

/** The server's doubts about a result, which are returned. */
export function showWarnings({ warnings = [] }) {
  const texts = warnings.map(({ message }) => `${message[0].toUpperCase()}${message.slice(1)}.`);
  byId("warnings").hidden = !texts.length;
  fillList(byId("warnings"), texts);
  return texts;
}

function fillList(list, texts) {
  list.replaceChildren(
    ...texts.map((text) => Object.assign(document.createElement("li"), { textContent: text })),
  );
}

/** What the user must know to judge the result; opened if it is about the picture. */
export function showNotes({ result }, model, pictureNote) {
  const notes = pictureNote ? [pictureNote] : [];
  if (isTiled(result, model)) {
    notes.push(
      "The model processed this image in tiles. The tiles' instances are merged before the slider " +
        "filters them, so a request with this score may return slightly different instances where " +
        "tiles meet.",
    );
  }
  if (model.task === "contour") notes.push("This model finds outlines: areas are those of the lines.");
  byId("notes").hidden = !notes.length;
  byId("notes").open = Boolean(pictureNote);
  fillList(byId("notes-list"), notes);
}

function isTiled(result, model) {
  return countCanvases(result, model.input.resize) > 1;
}

/** The stages as a bar and as text. */
export function showTime({ timing, roundTripMs }) {
  const bars = [];
  const items = [];
  for (const [stage, name] of Object.entries(STAGES)) {
    const bar = document.createElement("span");
    bar.className = stage;
    bar.style.flexGrow = timing[stage];
    bars.push(bar);
    const item = document.createElement("li");
    const key = document.createElement("i");
    key.className = stage;
    item.append(key, `${name} ${formatMs(timing[stage])}`);
    items.push(item);
  }
  byId("time-bar").replaceChildren(...bars);
  byId("time-list").replaceChildren(...items);
  byId("time-total").textContent =
    `${formatMs(timing.total)} in the server, ${formatMs(roundTripMs)} in total.`;
}

function formatMs(ms) {
  return ms < 10 ? `${ms.toFixed(1)} ms` : `${Math.round(ms).toLocaleString("en")} ms`;
}
