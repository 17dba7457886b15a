// The demo page: takes an image, asks the server, shows what it found.

import {
  describeModel,
  fetchSample,
  leastScore,
  listModels,
  Refused,
  segment,
  useKey,
} from "./api.js";
import { prepareInstances } from "./draw.js";
import { InstanceList } from "./list.js";
import { savePicture, saveResult } from "./save.js";
import {
  announce,
  byId,
  describeCount,
  describeWeaker,
  showFacts,
  showNotes,
  showTime,
} from "./text.js";
import { Viewer } from "./viewer.js";

const state = {
  model: null, // as GET /v2/models/{name} describes it
  file: null,
  answer: null, // {result, timing, version, roundTripMs}
  instances: [], // by descending score
  shown: [], // the first of them, down to the threshold
  hovered: null,
  pinned: null,
  job: null, // AbortController of what is under way
};

const viewer = new Viewer(byId("viewer"), { onHover: hover, onPick: togglePin });
const list = new InstanceList(byId("list"), { onHover: hover, onPick: togglePin, onMove: pin });
const threshold = byId("threshold");

// --- models -------------------------------------------------------------------------------------

async function loadModels() {
  const models = await listModels();
  const ready = models.filter((model) => model.state === "READY");
  if (!ready.length) throw new Refused("The server has no model that can be used.");
  byId("model").replaceChildren(
    ...models.map((model) => {
      const usable = model.state === "READY";
      const option = new Option(usable ? model.name : `${model.name} (not usable)`, model.name);
      option.disabled = !usable;
      return option;
    }),
  );
  byId("model-field").hidden = models.length < 2;
  const wished = new URLSearchParams(location.search).get("model");
  await chooseModel(ready.find((model) => model.name === wished)?.name ?? ready[0].name);
}

async function chooseModel(name) {
  const model = await describeModel(name);
  state.model = model;
  byId("model").value = name;
  byId("model-about").textContent = `${model.name} version ${model.version} on ${model.device}`;
  threshold.min = leastScore(model);
  threshold.max = 1;
  threshold.value = model.postprocess.score_threshold;
}

// --- one image ----------------------------------------------------------------------------------

/** Runs work that a later call, or Cancel, replaces; its refusal is shown. */
async function run(work, retry) {
  state.job?.abort();
  const job = new AbortController();
  state.job = job;
  byId("problem").hidden = true;
  try {
    await work(job.signal);
  } catch (error) {
    if (job.signal.aborted) return;
    if (document.body.dataset.state === "busy") leaveImage();
    showProblem(error, retry);
  } finally {
    if (state.job === job) setBusy(false);
  }
}

function open(file) {
  return run(async (signal) => {
    state.file = file;
    await show(file, signal);
  }, () => open(file));
}

function openSample(name) {
  return run(async (signal) => {
    const file = await fetchSample(name, signal);
    signal.throwIfAborted();
    state.file = file;
    await show(file, signal);
  }, () => openSample(name));
}

async function show(file, signal) {
  clearResult();
  setBusy(true, `Segmenting ${file.name || "the image"}`);
  if (!state.model) await loadModels();
  // The server turns an image upright by its EXIF orientation; so must the browser.
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" }).catch(() => null);
  signal.throwIfAborted();
  viewer.showPicture(bitmap);
  const { model } = state;
  const answer = await segment(file, model, signal);
  signal.throwIfAborted();
  state.answer = answer;
  state.instances = prepareInstances(answer.result.instances);
  const pictureNote = viewer.showResult(answer.result, model.task === "contour");
  list.fill(state.instances, model.task);
  threshold.value = model.postprocess.score_threshold;
  showNotes(answer, model, pictureNote);
  showFacts(file, answer, model);
  showTime(answer);
  document.body.dataset.state = "done";
  filter();
  announce(`${describeCount(state)} in ${file.name || "the image"}.`);
}

function clearResult() {
  state.answer = null;
  state.instances = [];
  state.shown = [];
  state.hovered = null;
  state.pinned = null;
  viewer.clear();
}

function setBusy(busy, text = "") {
  byId("busy").hidden = !busy;
  byId("panel").setAttribute("aria-busy", String(busy));
  if (!busy) return;
  byId("busy-text").textContent = text;
  document.body.dataset.state = "busy";
  announce(`${text}.`);
}

/** Back to the page as it was opened. */
function leaveImage() {
  clearResult();
  document.body.dataset.state = "empty";
}

function showProblem(error, retry) {
  const known = error instanceof Refused;
  byId("problem").hidden = false;
  byId("problem-text").textContent = known ? error.message : "This page failed.";
  const id = error.requestId ? ` (request ${error.requestId})` : "";
  byId("problem-detail").textContent = `${known ? error.detail : error.message}${id}`;
  byId("retry").hidden = !error.canRetry;
  byId("retry").onclick = retry;
  byId("key-form").hidden = !error.needsKey;
  byId("key-form").onsubmit = (event) => {
    event.preventDefault();
    useKey(byId("key").value.trim());
    retry();
  };
}

function cancel() {
  state.job.abort();
  leaveImage();
  setBusy(false);
  announce("Cancelled.");
  byId("file").focus();
}

// --- what is shown ------------------------------------------------------------------------------

function filter() {
  const least = Number(threshold.value);
  const below = state.instances.findIndex((instance) => instance.score < least);
  state.shown = below < 0 ? state.instances : state.instances.slice(0, below);
  if (!state.shown.includes(state.pinned)) state.pinned = null;
  if (!state.shown.includes(state.hovered)) state.hovered = null;
  const text = describeCount(state);
  byId("count").textContent = text;
  byId("threshold-value").textContent = least.toFixed(2);
  byId("weaker").textContent = describeWeaker(state);
  threshold.setAttribute("aria-valuetext", `${least.toFixed(2)}, ${text}`);
  list.showFirst(state.shown.length);
  viewer.showInstances(state.shown, `${text} in the image`);
  light();
}

function hover(instance) {
  if (state.hovered === instance) return;
  state.hovered = instance;
  light();
}

function pin(instance) {
  state.pinned = instance;
  light();
}

function togglePin(instance) {
  pin(instance === state.pinned ? null : instance);
  if (state.pinned) list.reveal(state.pinned);
}

function light() {
  const lit = state.hovered ?? state.pinned;
  viewer.light(lit);
  list.light(lit, state.pinned);
}

// --- wiring -------------------------------------------------------------------------------------

/** Takes the first file of a drop, a paste or the picker. */
function take(files, wanted) {
  if (files.length) open(files[0]);
  else showProblem(new Refused(wanted));
}

function wireSources() {
  byId("file").addEventListener("change", ({ target }) => {
    if (target.files.length) open(target.files[0]);
    target.value = ""; // the same file can be chosen again
  });
  for (const button of document.querySelectorAll("[data-sample]")) {
    button.addEventListener("click", () => openSample(button.dataset.sample));
  }
  document.addEventListener("paste", (event) => {
    if (event.target.closest("input")) return;
    event.preventDefault();
    take(event.clipboardData.files, "The clipboard holds no image.");
  });
  const hint = byId("drop-hint");
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    hint.hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) hint.hidden = true;
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    hint.hidden = true;
    take(event.dataTransfer.files, "That was no file. Save the image first, then drop the file.");
  });
}

function wireResult() {
  threshold.addEventListener("input", filter);
  byId("cancel").addEventListener("click", cancel);
  byId("show-masks").addEventListener("change", ({ target }) => viewer.setMasks(target.checked));
  byId("brighten").addEventListener("change", ({ target }) => viewer.setBrighten(target.checked));
  byId("save-json").addEventListener("click", () => saveResult(state));
  byId("save-png").addEventListener("click", () => savePicture(viewer, state.file.name));
  byId("model").addEventListener("change", ({ target }) => {
    const again = document.body.dataset.state !== "empty";
    const change = async (signal) => {
      await chooseModel(target.value);
      if (again) await show(state.file, signal);
    };
    run(change, () => run(change));
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (!byId("busy").hidden) cancel();
    else pin(null);
  });
}

wireSources();
wireResult();
byId("shell").textContent = `curl -F images=@image.jpg ${new URL("segment", location)}`;
run(loadModels, () => run(loadModels));
