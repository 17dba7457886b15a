// What the page says: counts, notes, times.

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

/** For screen readers: said once, politely. */
export function announce(text) {
  byId("announcer").textContent = text;
}

export function formatArea(pixels) {
  return `${pixels.toLocaleString("en")} px`;
}

export function describeInstance({ category, score, area }, contour) {
  const what = contour ? "outline" : "area";
  return `${category}, score ${score.toFixed(2)}, ${what} ${formatArea(area)}`;
}

export function describeCount({ shown }) {
  return `${shown.length || "No"} ${shown.length === 1 ? "instance" : "instances"}`;
}

/** Below the slider: what it hides. */
export function describeWeaker({ shown, instances }) {
  const hidden = instances.length - shown.length;
  if (!hidden) return "All that the server answered is shown.";
  return `${hidden} weaker ${hidden === 1 ? "one is" : "ones are"} hidden.`;
}

/** Below the count: which image, how large, which model. */
export function showFacts(file, { result, version }, model) {
  const name = file.name || "pasted image";
  const size = `${result.width} × ${result.height} px`;
  byId("about").textContent = `${name}, ${size}. ${model.name} version ${version}.`;
}

/** What a person must know to trust what is shown; opened where it is about the picture. */
export function showNotes({ result }, model, pictureNote) {
  const notes = pictureNote ? [pictureNote] : [];
  const most = model.postprocess.max_instances;
  if (result.instances.length >= most) {
    const last = result.instances.at(-1).score.toFixed(2);
    notes.push(`The server answers the best ${most} instances: below score ${last} some are missing.`);
  }
  if (isTiled(result, model)) {
    notes.push(
      "The model saw this image in tiles. The tiles' instances are merged before the slider filters " +
        "them, so a request with this score may answer a few more or less where tiles meet.",
    );
  }
  if (model.task === "contour") notes.push("This model finds outlines: areas are those of the lines.");
  byId("notes").hidden = !notes.length;
  byId("notes").open = Boolean(pictureNote);
  byId("notes-list").replaceChildren(
    ...notes.map((note) => Object.assign(document.createElement("li"), { textContent: note })),
  );
}

function isTiled({ width, height }, model) {
  const { rule, tile_hw: tile } = model.input.resize;
  return rule === "tile" && (height > tile[0] || width > tile[1]);
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
    `${formatMs(timing.total)} in the server, ${formatMs(roundTripMs)} as seen from here.`;
}

function formatMs(ms) {
  return ms < 10 ? `${ms.toFixed(1)} ms` : `${Math.round(ms).toLocaleString("en")} ms`;
}
