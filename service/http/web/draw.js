// Instances on their image: paths from run lengths, colours, drawing, and the instance at a point.

import { measureRing, traceRings } from "./rle.js";

const GOLDEN_RATIO = 0.618033988749895;

/** A bright colour; neighbouring indices get distant hues. */
export function colourOf(index) {
  const hue = Math.round(((index * GOLDEN_RATIO + 0.45) % 1) * 360);
  return { line: `hsl(${hue} 90% 68%)`, fill: `hsl(${hue} 85% 58%)` };
}

/** The server's instances with their rank, colour and outline. */
export function prepareInstances(instances) {
  return instances.map((instance, index) => {
    const path = new Path2D();
    const enclosed = new Path2D(); // without holes: the inside of a contour counts as hit
    for (const ring of traceRings(instance.segmentation)) {
      addRing(path, ring);
      if (measureRing(ring) > 0) addRing(enclosed, ring);
    }
    const colour = instance.colour ?? colourOf(index);
    return { ...instance, index, colour, path, enclosed };
  });
}

function addRing(path, ring) {
  path.moveTo(ring[0], ring[1]);
  for (let i = 2; i < ring.length; i += 2) path.lineTo(ring[i], ring[i + 1]);
  path.closePath();
}

/**
 * Draws instances over the context's image, those with the highest score last.
 *
 * @param context Of a canvas that shows the whole image.
 * @param view {scale, unit, contour}: canvas pixels per image pixel; canvas pixels of one thin
 *   line's width; whether masks are outlines, drawn as lines in full colour.
 * @param strength Opacity, 0..1; less than 1 while another instance is highlighted.
 */
export function drawInstances(context, instances, view, strength = 1) {
  inImage(context, view, (one) => {
    for (const instance of instances.toReversed()) {
      if (view.contour) drawLine(context, instance, one, strength);
      else drawArea(context, instance, one, strength);
    }
  });
}

/** Draws the highlighted instance. */
export function drawLit(context, { path, enclosed, colour }, view) {
  inImage(context, view, (one) => {
    context.globalAlpha = view.contour ? 0.25 : 0.5;
    context.fillStyle = colour.fill;
    if (view.contour) context.fill(enclosed);
    else context.fill(path, "evenodd");
    stroke(context, path, "#000", 5 * one, 0.6);
    stroke(context, path, "#fff", 2.5 * one, 1);
    if (!view.contour) return;
    context.fillStyle = colour.line;
    context.fill(path, "evenodd");
  });
}

function inImage(context, { scale, unit }, draw) {
  context.save();
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.lineJoin = "round";
  draw(unit / scale);
  context.restore();
}

function drawArea(context, { path, colour }, one, strength) {
  context.globalAlpha = 0.3 * strength;
  context.fillStyle = colour.fill;
  context.fill(path, "evenodd");
  stroke(context, path, "#000", 3.5 * one, 0.5 * strength);
  stroke(context, path, colour.line, 1.5 * one, strength);
}

function drawLine(context, { path, colour }, one, strength) {
  context.globalAlpha = strength;
  context.fillStyle = colour.line;
  context.fill(path, "evenodd");
  stroke(context, path, colour.line, 0.75 * one, strength); // visible also where the image is shown small
}

function stroke(context, path, colour, width, alpha) {
  context.globalAlpha = alpha;
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.stroke(path);
}

/** The instance at a point of the image, or null; the smallest of several. */
export function findAt(context, instances, x, y, contour) {
  let found = null;
  for (const instance of instances) {
    const [left, top, width, height] = instance.bbox;
    if (x < left || y < top || x > left + width || y > top + height) continue;
    const path = contour ? instance.enclosed : instance.path;
    if (!context.isPointInPath(path, x, y, contour ? "nonzero" : "evenodd")) continue;
    const size = contour ? width * height : instance.area;
    if (!found || size < found.size) found = { instance, size };
  }
  return found?.instance ?? null;
}

/** The picture drawn to a canvas of a size; `brighten` stretches the contrast of dark pictures. */
export function renderPicture(bitmap, width, height, brighten) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: brighten });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#000"; // the server draws transparency on black
  context.fillRect(0, 0, width, height);
  if (bitmap) context.drawImage(bitmap, 0, 0, width, height);
  if (bitmap && brighten) stretch(context, width, height);
  return canvas;
}

const DARKEST = 0.005;
const BRIGHTEST = 0.998;

/** Maps the range between two percentiles of the grey levels to 0..255. */
function stretch(context, width, height) {
  const image = context.getImageData(0, 0, width, height);
  const pixels = image.data;
  const histogram = new Uint32Array(256);
  for (let i = 0; i < pixels.length; i += 4) {
    histogram[Math.round((pixels[i] + pixels[i + 1] + pixels[i + 2]) / 3)]++;
  }
  const low = percentile(histogram, DARKEST);
  const high = Math.max(percentile(histogram, BRIGHTEST), low + 16);
  const levels = Uint8ClampedArray.from({ length: 256 }, (_, v) => ((v - low) * 255) / (high - low));
  for (let i = 0; i < pixels.length; i++) if (i % 4 < 3) pixels[i] = levels[pixels[i]];
  context.putImageData(image, 0, 0);
}

function percentile(histogram, share) {
  const wanted = share * histogram.reduce((a, b) => a + b);
  let count = 0;
  return histogram.findIndex((n) => (count += n) >= wanted);
}
