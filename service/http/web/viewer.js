// The image on the screen, scaled to fit, with its instances; and the saved picture.

import { drawInstances, drawLit, findAt, renderPicture } from "./draw.js";
import { byId, describeInstance } from "./text.js";

const MOST_UPSCALED = 8;
const SIDE_BY_SIDE = matchMedia("(min-width: 60rem)");
const SHARE_OF_SCREEN = 0.65; // of a phone's height
const DIMMED = 0.4; // opacity of the others while one is highlighted
const MAX_SAVED_PIXELS = 100_000_000; // below the limits of the browsers' canvases

export class Viewer {
  constructor(root, { onHover, onPick }) {
    this.root = root;
    this.canvas = byId("canvas");
    this.tip = byId("tip");
    this.masks = true;
    this.brighten = false;
    this.clear();
    new ResizeObserver(() => this.redraw()).observe(root);
    this.canvas.addEventListener("pointermove", (event) => {
      if (event.pointerType !== "touch") onHover(this.instanceAt(event));
    });
    this.canvas.addEventListener("pointerleave", () => onHover(null));
    this.canvas.addEventListener("click", (event) => onPick(this.instanceAt(event)));
  }

  clear() {
    this.bitmap?.close();
    this.bitmap = null;
    this.size = null; // {width, height} of the image
    this.instances = [];
    this.lit = null;
    this.contour = false;
    this.dropLayers();
    this.tip.hidden = true;
    this.canvas.setAttribute("aria-label", "No image yet");
    this.redraw();
  }

  /** Drops the layers drawn for another picture or another size. */
  dropLayers() {
    this.pictures = new Map();
    this.layers = new Map();
  }

  /** The picture alone, until its result is there; null if the browser cannot read it. */
  showPicture(bitmap) {
    if (this.bitmap !== bitmap) this.bitmap?.close();
    this.bitmap = bitmap;
    this.size = bitmap && { width: bitmap.width, height: bitmap.height };
    this.dropLayers();
    this.redraw();
  }

  /** Takes the image's size at the server; returns a note about the picture, or "". */
  showResult({ width, height }, contour) {
    let note = "";
    if (!this.bitmap) {
      note = "This browser cannot show the image: the masks are drawn on black.";
    } else if (this.bitmap.width !== width || this.bitmap.height !== height) {
      note =
        `This browser shows the image as ${this.bitmap.width} × ${this.bitmap.height} px, the ` +
        `server reads ${width} × ${height} px: the masks are drawn on black.`;
      this.bitmap.close();
      this.bitmap = null;
    }
    this.size = { width, height };
    this.contour = contour;
    this.dropLayers();
    return note;
  }

  showInstances(instances, label) {
    this.instances = instances;
    this.layers.clear();
    this.canvas.setAttribute("aria-label", label);
    this.redraw();
  }

  light(instance) {
    this.lit = instance;
    this.redraw();
  }

  setMasks(on) {
    this.masks = on;
    this.redraw();
  }

  setBrighten(on) {
    this.brighten = on;
    this.redraw();
  }

  /** The image with its masks at its own size, as a canvas; nothing is highlighted. */
  render() {
    const { width, height } = this.size;
    const scale = Math.min(1, Math.sqrt(MAX_SAVED_PIXELS / (width * height)));
    const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
    const canvas = renderPicture(this.bitmap, w, h, this.brighten);
    if (this.masks) {
      const unit = Math.max(0.5, Math.min(w, h) / 900);
      const view = { scale, unit, contour: this.contour };
      drawInstances(canvas.getContext("2d"), this.instances, view);
    }
    return canvas;
  }

  redraw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.size) this.paint();
      else this.canvas.width = this.canvas.height = 0;
    });
  }

  paint() {
    const { width, height } = this.size;
    const room = SIDE_BY_SIDE.matches ? this.root.clientHeight : innerHeight * SHARE_OF_SCREEN;
    const fit = Math.min(this.root.clientWidth / width, room / height, MOST_UPSCALED);
    if (fit <= 0) return;
    const density = devicePixelRatio;
    const [w, h] = [width, height].map((side) => Math.max(1, Math.floor(side * fit * density)));
    if (this.canvas.width !== w || this.canvas.height !== h) this.dropLayers();
    this.canvas.width = w;
    this.canvas.height = h;
    this.canvas.style.width = `${w / density}px`;
    this.canvas.style.height = `${h / density}px`;
    this.fit = w / density / width;
    const context = this.canvas.getContext("2d");
    const view = { scale: w / width, unit: density, contour: this.contour };
    context.drawImage(this.layer(w, h, view), 0, 0);
    if (this.lit) drawLit(context, this.lit, view);
    this.placeTip();
  }

  /** The picture with all masks; cached, as it does not depend on which instance is highlighted. */
  layer(width, height, view) {
    const look = `${width} ${height} ${this.brighten}`;
    const picture = keep(this.pictures, look, () =>
      renderPicture(this.bitmap, width, height, this.brighten),
    );
    if (!this.masks) return picture;
    const strength = this.lit ? DIMMED : 1;
    return keep(this.layers, `${look} ${strength}`, () => {
      const canvas = renderPicture(picture, width, height, false);
      drawInstances(canvas.getContext("2d"), this.instances, view, strength);
      return canvas;
    });
  }

  instanceAt(event) {
    if (!this.size) return null;
    const box = this.canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.size.width;
    const y = ((event.clientY - box.top) / box.height) * this.size.height;
    return findAt(this.canvas.getContext("2d"), this.instances, x, y, this.contour);
  }

  /** Places the tip above the highlighted instance, or below if there is no room above. */
  placeTip() {
    this.tip.hidden = !this.lit;
    if (!this.lit) return;
    this.tip.textContent = describeInstance(this.lit, this.contour);
    const [x, y, width, height] = this.lit.bbox.map((value) => value * this.fit);
    const room = this.canvas.clientWidth - this.tip.offsetWidth;
    const left = Math.max(Math.min(x + width / 2 - this.tip.offsetWidth / 2, room), 0);
    const above = y - this.tip.offsetHeight - 8;
    const below = Math.min(y + height + 8, this.canvas.clientHeight - this.tip.offsetHeight);
    this.tip.style.translate = `${left}px ${above >= 0 ? above : below}px`;
  }
}

function keep(map, key, build) {
  if (!map.has(key)) map.set(key, build());
  return map.get(key);
}
