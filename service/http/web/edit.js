// Corrects a result: deletes an instance, draws its outline anew, or adds one.

import { encodePieces } from "./rle.js";
import { announce, byId } from "./text.js";

const CLOSE_PX = 10; // a click so near the first corner closes the outline
const DRAWN_SCORE = 1; // of what a person has drawn

/**
 * The buttons, and the layer on which an outline is drawn.
 *
 * @param read Returns {instances, pinned, model, size}: what is shown now.
 * @param onChange Called with the new list of instances, by descending score.
 */
export class Editor {
  constructor({ read, onChange }) {
    this.read = read;
    this.onChange = onChange;
    this.layer = byId("edit-layer");
    this.points = [];
    this.replaced = null;
    byId("edit-delete").addEventListener("click", () => this.remove());
    byId("edit-redraw").addEventListener("click", () => this.start(this.read().pinned));
    byId("edit-add").addEventListener("click", () => this.start(null));
    this.layer.addEventListener("click", (event) => this.place(event));
    document.addEventListener("keydown", (event) => this.press(event), { capture: true });
  }

  /** Shows what can be done; called whenever the choice of an instance changes. */
  update() {
    const { pinned, model } = this.read();
    byId("edit-delete").disabled = byId("edit-redraw").disabled = !pinned;
    const select = byId("edit-class");
    if (select.dataset.model !== model.name) {
      select.dataset.model = model.name;
      const options = model.classes.map((spec) => new Option(spec.name, spec.category_id));
      select.replaceChildren(...options);
      select.hidden = options.length < 2;
    }
  }

  get isDrawing() {
    return !this.layer.hidden;
  }

  remove() {
    const { instances, pinned } = this.read();
    if (!pinned) return;
    this.onChange(instances.filter((instance) => instance !== pinned));
    announce(`Deleted ${pinned.category}.`);
  }

  start(replaced) {
    this.replaced = replaced;
    this.points = [];
    this.layer.hidden = false;
    byId("edit-hint").textContent =
      "Click the corners of the outline; Enter or a click on the first corner closes it, " +
      "Backspace takes the last one back, Escape cancels.";
    this.paint();
    this.layer.focus();
  }

  stop() {
    this.layer.hidden = true;
    this.replaced = null;
    byId("edit-hint").textContent = "";
  }

  press(event) {
    if (event.target.closest?.("input, select")) return;
    if (!this.isDrawing) {
      if (event.key === "Delete" && this.read().pinned) this.remove();
      return;
    }
    if (event.target.closest?.("button") && event.key === "Enter") return;
    const actions = {
      Enter: () => this.finish(),
      Escape: () => this.stop(),
      Backspace: () => this.points.pop(),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    actions[event.key]();
    this.paint();
  }

  place(event) {
    const box = this.layer.getBoundingClientRect();
    const { size } = this.read();
    const point = [
      ((event.clientX - box.left) / box.width) * size.width,
      ((event.clientY - box.top) / box.height) * size.height,
    ];
    const scale = box.width / size.width;
    const [first] = this.points;
    const isClosed =
      this.points.length > 2 &&
      Math.hypot(point[0] - first[0], point[1] - first[1]) * scale < CLOSE_PX;
    if (isClosed) {
      this.finish();
      return;
    }
    this.points.push(point);
    this.paint();
  }

  finish() {
    const { instances, model, size } = this.read();
    const shape = fillPolygon(this.points, size);
    if (!shape) {
      announce("An outline needs three corners around at least one pixel.");
      return;
    }
    const chosen = Number(byId("edit-class").value);
    const { category_id, name } = model.classes.find((spec) => spec.category_id === chosen);
    const kept = this.replaced
      ? { category_id: this.replaced.category_id, category: this.replaced.category }
      : { category_id, category: name };
    const drawn = { ...kept, score: DRAWN_SCORE, ...shape };
    const others = instances.filter((instance) => instance !== this.replaced);
    this.stop();
    this.onChange([drawn, ...others]);
    announce(`Drew ${drawn.category}.`);
  }

  /** The corners so far. */
  paint() {
    const canvas = byId("canvas");
    const { size } = this.read();
    Object.assign(this.layer, { width: canvas.width, height: canvas.height });
    this.layer.style.width = canvas.style.width;
    this.layer.style.height = canvas.style.height;
    const context = this.layer.getContext("2d");
    const scale = canvas.width / size.width;
    const corners = this.points.map(([x, y]) => [x * scale, y * scale]);
    const path = new Path2D();
    corners.forEach(([x, y], index) => (index ? path.lineTo(x, y) : path.moveTo(x, y)));
    for (const [colour, width] of [["#000", 5], ["#fff", 2]]) {
      context.strokeStyle = context.fillStyle = colour;
      context.lineWidth = width * devicePixelRatio;
      context.stroke(path);
      const side = (width + 2) * devicePixelRatio;
      for (const [x, y] of corners) context.fillRect(x - side / 2, y - side / 2, side, side);
    }
  }
}

/**
 * The pixels whose centres lie inside a polygon (even-odd rule).
 *
 * @param points Corners [x, y] in pixels.
 * @returns {segmentation, bbox, area} as in the server's answer; null without pixels.
 */
export function fillPolygon(points, { width, height }) {
  const pieces = []; // [start, end] in the order of columns
  let area = 0;
  let [left, top, right, bottom] = [width, height, 0, 0];
  for (let x = 0; x < width; x++) {
    const crossings = crossColumn(points, x + 0.5);
    for (let i = 0; i + 1 < crossings.length; i += 2) {
      const [from, to] = [crossings[i], crossings[i + 1]].map((y) =>
        Math.min(height, Math.max(0, Math.ceil(y - 0.5))),
      );
      if (from >= to) continue;
      pieces.push([x * height + from, x * height + to]);
      area += to - from;
      [left, top] = [Math.min(left, x), Math.min(top, from)];
      [right, bottom] = [Math.max(right, x + 1), Math.max(bottom, to)];
    }
  }
  if (!area) return null;
  const segmentation = { size: [height, width], counts: encodePieces(pieces, height * width) };
  return { segmentation, bbox: [left, top, right - left, bottom - top], area };
}

/** Where the outline crosses the middle of a column, ascending. */
function crossColumn(points, x) {
  const found = [];
  points.forEach(([x1, y1], index) => {
    const [x2, y2] = points[(index + 1) % points.length];
    if (x1 <= x !== x2 <= x) found.push(y1 + ((x - x1) * (y2 - y1)) / (x2 - x1));
  });
  return found.sort((a, b) => a - b);
}
