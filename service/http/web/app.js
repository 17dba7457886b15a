// The demo page: takes an image, sends it to the server, shows the instances.

import {
  describeModel,
  exportFile,
  fetchSample,
  leastScore,
  listModels,
  Refused,
  segment,
  useKey,
} from "./api.js";
import { confirmSending, hideBusy, showBusy, showProgress } from "./busy.js";
import { prepareInstances } from "./draw.js";
import { Editor } from "./edit.js";
import { countCanvases, Pace, TimeLeft } from "./estimate.js";
import { checkFile, describeRest, findImages, listEntries } from "./files.js";
import { InstanceList } from "./list.js";
import { decodePicture, readPicture, turnPicture } from "./orient.js";
import { save, savePicture, saveResult } from "./save.js";
import {
  announce,
  byId,
  describeCount,
  describeEstimate,
  describeHidden,
  formatCount,
  showCard,
  showFacts,
  showNotes,
  showSamples,
  showTime,
  showTruncation,
  showWarnings,
} from "./text.js";
import { Viewer } from "./viewer.js";

const state = {
  model: null, // as GET /v2/models/{name} describes it
  file: null,
  planes: {}, // parameters that choose among the planes of the file
  images: [], // to choose from: {file, path}
  answer: null, // what `segment` of api.js returns
  instances: [], // by descending score
  shown: [], // those with at least the threshold's score
  hovered: null,
  pinned: null,
  job: null, // AbortController of the work in progress
};
const MAX_UNASKED = 100; // canvases of an image that is sent without a question

const viewer = new Viewer(byId("viewer"), { onHover: hover, onPick: togglePin });
const list = new InstanceList(byId("list"), { onHover: hover, onPick: togglePin, onMove: pin });
const threshold = byId("threshold");
const pace = new Pace();
const editor = new Editor({
  read: () => ({ ...state, size: viewer.size }),
  onChange: replaceInstances,
});

// --- models -------------------------------------------------------------------------------------

async function loadModels() {
  const models = await listModels();
  const ready = models.filter((model) => model.state === "READY");
  if (!ready.length) throw new Refused("The server has no model that is ready.");
  byId("model").replaceChildren(
    ...models.map((model) => {
      const isReady = model.state === "READY";
      const option = new Option(isReady ? model.name : `${model.name} (not available)`, model.name);
      option.disabled = !isReady;
      return option;
    }),
  );
  byId("model-field").hidden = models.length < 2;
  const requested = new URLSearchParams(location.search).get("model");
  await chooseModel(ready.find((model) => model.name === requested)?.name ?? ready[0].name);
}

async function chooseModel(name) {
  const model = await describeModel(name);
  state.model = model;
  byId("model").value = name;
  byId("model-about").textContent = `${model.name} version ${model.version} on ${model.device}`;
  showCard(model);
  showSamples(model);
  threshold.min = leastScore(model);
  threshold.max = 1;
  threshold.value = model.postprocess.score_threshold;
}

// --- one image ----------------------------------------------------------------------------------

/** Runs work that Cancel or a later call aborts; shows its error. */
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
    if (state.job === job) hideBusy();
  }
}

function open(file, planes = {}) {
  return run(async (signal) => {
    state.file = file;
    state.planes = planes;
    await show(file, signal).catch((error) => {
      throw Object.assign(error, { fileName: file.name });
    });
  }, () => open(file, planes));
}

/** Opens the first image of files and folders, and offers the others. */
function openAll(entries) {
  return run(async (signal) => {
    const types = byId("file").accept.split(",");
    const found = await findImages(entries, types, signal);
    signal.throwIfAborted();
    offer(found);
    await open(found.images[0].file);
  }, () => openAll(entries));
}

/** Fills the choice of images; it is hidden if there is none. */
function offer({ images, others = [], isCut = false }) {
  state.images = images;
  const rest = describeRest({ images, others, isCut });
  byId("choice").replaceChildren(...images.map(({ path }, index) => new Option(path, index)));
  byId("choice-count").textContent = `of ${formatCount(images.length)}`;
  byId("choice-rest").textContent = rest;
  byId("choice-field").hidden = images.length < 2 && !rest;
}

function openSample(name) {
  return run(async (signal) => {
    offer({ images: [] });
    const file = await fetchSample(name, signal);
    signal.throwIfAborted();
    state.file = file;
    state.planes = {};
    await show(file, signal);
  }, () => openSample(name));
}

async function show(file, signal) {
  clearResult();
  const name = file.name || "the image";
  showBusy(`Segmenting ${name}`);
  await checkFile(file);
  if (!state.model) await loadModels();
  const { bitmap, isStored } = await decodePicture(file);
  signal.throwIfAborted();
  viewer.showPicture(bitmap);
  const { model } = state;
  const expected = bitmap && (await confirmCost(bitmap, model, signal));
  const left = new TimeLeft(expected);
  const onProgress = (line) => showProgress(line, left.update(line));
  const request = { planes: state.planes, picture: !bitmap, onProgress, signal };
  const answer = await segment(file, model, request).catch(async (error) => {
    signal.throwIfAborted();
    await checkFile(file); // it may have been changed while it was sent
    throw error;
  });
  signal.throwIfAborted();
  const { picture_png: png } = answer.result;
  if (png) viewer.showPicture(await readPicture(png));
  if (isStored) viewer.showPicture(await turnPicture(bitmap, answer.result.orientation));
  signal.throwIfAborted();
  pace.learn(model.name, answer.canvases, answer.timing.total / 1000);
  state.answer = answer;
  state.instances = prepareInstances(answer.result.instances);
  const pictureNote = viewer.showResult(answer.result, model.task === "contour");
  list.fill(state.instances, model.task);
  threshold.value = model.postprocess.score_threshold;
  showNotes(answer, model, pictureNote);
  const warnings = showWarnings(answer.result);
  showFacts(file, answer, model);
  showTime(answer);
  document.body.dataset.state = "done";
  filter();
  const truncation = byId("truncation").firstElementChild.textContent;
  announce([`${describeCount(state)} in ${name}.`, truncation, ...warnings].join(" ").trimEnd());
}

/** Asks before a large image is sent; returns the expected seconds, null if not known. */
async function confirmCost(size, model, signal) {
  const canvases = countCanvases(size, model.input.resize);
  const seconds = pace.estimate(model.name, canvases);
  if (canvases <= MAX_UNASKED) return seconds;
  const send = await confirmSending(describeEstimate(canvases, seconds), signal);
  if (!send) cancel();
  signal.throwIfAborted();
  return seconds;
}

/** Saves what is shown in another format, which the server writes. */
function saveInFormat(format) {
  return run(async (signal) => {
    announce("The server writes the file.");
    const asked = { format, threshold: threshold.value, signal };
    const { blob, name } = await exportFile(state.file, state.model, asked);
    save(blob, name);
  }, () => saveInFormat(format));
}

/** Shows what the editor made of the instances. */
function replaceInstances(instances) {
  state.instances = prepareInstances(instances);
  state.pinned = state.hovered = null;
  list.fill(state.instances, state.model.task);
  byId("export").disabled = true;
  byId("export").title = "A result that was corrected is saved as COCO.";
  filter();
}

function clearResult() {
  editor.stop();
  byId("export").disabled = false;
  byId("export").title = "";
  state.answer = null;
  state.instances = [];
  state.shown = [];
  state.hovered = null;
  state.pinned = null;
  viewer.clear();
}

/** Shows the page as it was when it was opened. */
function leaveImage() {
  clearResult();
  document.body.dataset.state = "empty";
}

function showProblem(error, retry) {
  const known = error instanceof Refused;
  byId("problem").hidden = false;
  const text = known ? error.message : "An error occurred in this page.";
  byId("problem-text").textContent = error.fileName ? `${error.fileName}: ${text}` : text;
  const id = error.requestId ? ` (request ${error.requestId})` : "";
  byId("problem-detail").textContent = `${known ? error.detail : error.message}${id}`;
  byId("retry").hidden = !error.canRetry;
  byId("retry").onclick = retry;
  byId("plane-form").hidden = !error.needsPlane;
  byId("plane-form").onsubmit = (event) => {
    event.preventDefault();
    const given = [...new FormData(event.target)].filter(([, value]) => value.trim());
    open(state.file, Object.fromEntries(given));
  };
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
  hideBusy();
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
  byId("filtered").textContent = describeHidden(state);
  showTruncation(state);
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
  if (state.answer) editor.update();
}

// --- wiring -------------------------------------------------------------------------------------

/** Takes the files of a drop or a paste. */
function take(transfer, wanted) {
  const entries = listEntries(transfer);
  if (entries.length) openAll(entries);
  else showProblem(new Refused(wanted));
}

function wireSources() {
  byId("file").addEventListener("change", ({ target }) => {
    if (target.files.length) openAll([...target.files]);
    target.value = ""; // the same file can be chosen again
  });
  byId("choice").addEventListener("change", ({ target }) => open(state.images[target.value].file));
  for (const button of document.querySelectorAll("[data-sample]")) {
    button.addEventListener("click", () => openSample(button.dataset.sample));
  }
  document.addEventListener("paste", (event) => {
    if (event.target.closest("input")) return;
    event.preventDefault();
    take(event.clipboardData, "The clipboard has no image.");
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
    take(event.dataTransfer, "This is not a file. Save the image first, then drop the file.");
  });
}

function wireResult() {
  threshold.addEventListener("input", filter);
  byId("cancel").addEventListener("click", cancel);
  byId("show-masks").addEventListener("change", ({ target }) => viewer.setMasks(target.checked));
  byId("brighten").addEventListener("change", ({ target }) => viewer.setBrighten(target.checked));
  byId("save-json").addEventListener("click", () => saveResult(state));
  byId("save-png").addEventListener("click", () => savePicture(viewer, state.file.name));
  byId("export").addEventListener("click", () => saveInFormat(byId("export-format").value));
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
