// COCO run-length encoding: counts -> runs -> the pixels' outline, without building the mask.
//
// Coordinates are pixel corners: pixel (x, y) is the square from (x, y) to (x + 1, y + 1).

/** Run lengths of compressed counts: zeros, ones, zeros, ... in column-major order. */
export function decodeCounts(counts) {
  const runs = [];
  let at = 0;
  while (at < counts.length) {
    let value = 0;
    let unit = 1; // a power of 32: shifts would overflow at 32 bits
    let group;
    do {
      if (at >= counts.length) throw new Error("the RLE ends inside a number");
      group = counts.charCodeAt(at++) - 48;
      if (group < 0 || group > 63) throw new Error(`the RLE has the character ${counts[at - 1]}`);
      value += (group & 31) * unit;
      unit *= 32;
    } while (group & 32);
    if (group & 16) value -= unit;
    // From the fourth run on, the difference to the run two before is stored.
    if (runs.length > 2) value += runs[runs.length - 2];
    runs.push(value);
  }
  return runs;
}

/** Compressed counts of a mask; `pieces` are its [start, end] in column-major order. */
export function encodePieces(pieces, pixels) {
  const runs = [0];
  let at = 0;
  for (const [start, end] of pieces) {
    if (start > at || runs.length === 1) runs[runs.length - 1] += start - at;
    else runs.pop(); // it continues the run before
    if (runs.length % 2) runs.push(end - start);
    else runs[runs.length - 1] += end - start;
    runs.push(0);
    at = end;
  }
  runs[runs.length - 1] += pixels - at;
  if (runs.length > 1 && !runs.at(-1)) runs.pop();
  return runs.map((run, index) => encodeNumber(index > 2 ? run - runs[index - 2] : run)).join("");
}

/** A number as characters of 5 bits, the lowest first. */
function encodeNumber(value) {
  let text = "";
  for (let rest = value, more = true; more; ) {
    const group = ((rest % 32) + 32) % 32;
    rest = Math.floor(rest / 32);
    more = group & 16 ? rest !== -1 : rest !== 0;
    text += String.fromCharCode(group + (more ? 32 : 0) + 48);
  }
  return text;
}

/** The mask's pieces of columns, [{x, top, bottom}], by x, then by top; bottom is exclusive. */
export function listColumns({ size: [height, width], counts }) {
  const columns = [];
  let start = 0;
  decodeCounts(counts).forEach((length, index) => {
    const end = start + length;
    if (length < 0 || end > height * width) throw new Error("the RLE does not fit its size");
    if (index % 2) pushColumns(columns, start, end, height);
    start = end;
  });
  return columns;
}

function pushColumns(columns, start, end, height) {
  for (let from = start; from < end; ) {
    const x = Math.floor(from / height);
    const to = Math.min(end, (x + 1) * height);
    const last = columns.at(-1);
    if (last?.x === x && last.bottom === from - x * height) {
      last.bottom = to - x * height; // the run of zeros between them is empty
    } else {
      columns.push({ x, top: from - x * height, bottom: to - x * height });
    }
    from = to;
  }
}

const RIGHT = 0;
const DOWN = 1;
const LEFT = 2;
const UP = 3;

/**
 * The mask's outline as closed rings of corners, [x0, y0, x1, y1, ...].
 *
 * Rings around pixels run clockwise on the screen, rings around holes the other way. Pixels that
 * touch at a corner belong together, so that a thin diagonal curve is one ring.
 */
export function traceRings(rle) {
  const stride = rle.size[1] + 1;
  const edges = collectEdges(listColumns(rle), stride);
  const rings = [];
  for (const first of edges.keys()) rings.push(followRing(edges, first, stride));
  return rings;
}

/** Directed edges with the mask on their right: corner * 4 + direction -> the corner at the end. */
function collectEdges(columns, stride) {
  const edges = new Map();
  const add = (x0, y0, direction, x1, y1) =>
    edges.set((y0 * stride + x0) * 4 + direction, y1 * stride + x1);
  const addSides = (x, left, right) => {
    for (const [top, bottom] of subtract(right, left)) add(x, bottom, UP, x, top);
    for (const [top, bottom] of subtract(left, right)) add(x, top, DOWN, x, bottom);
  };
  let before = [];
  for (let i = 0; i < columns.length; ) {
    const x = columns[i].x;
    const here = [];
    for (; columns[i]?.x === x; i++) {
      const { top, bottom } = columns[i];
      here.push([top, bottom]);
      add(x, top, RIGHT, x + 1, top);
      add(x + 1, bottom, LEFT, x, bottom);
    }
    addSides(x, before, here);
    before = here;
    if (columns[i]?.x !== x + 1) {
      addSides(x + 1, here, []);
      before = [];
    }
  }
  return edges;
}

/** The parts of the intervals `from` outside all of `minus`; both ascending and disjoint. */
function subtract(from, minus) {
  const rest = [];
  let next = 0;
  for (const [start, end] of from) {
    let at = start;
    while (next < minus.length && minus[next][1] <= at) next++;
    for (let i = next; i < minus.length && minus[i][0] < end; i++) {
      if (minus[i][0] > at) rest.push([at, minus[i][0]]);
      at = Math.max(at, minus[i][1]);
    }
    if (at < end) rest.push([at, end]);
  }
  return rest;
}

function followRing(edges, first, stride) {
  const ring = [];
  let edge = first;
  let before = -1;
  do {
    const direction = edge % 4;
    const corner = (edge - direction) / 4;
    if (direction !== before) ring.push(corner % stride, Math.floor(corner / stride));
    const end = edges.get(edge);
    edges.delete(edge);
    before = direction;
    // Turning left first keeps pixels that touch at a corner in one ring.
    const turns = [(direction + 3) % 4, direction, (direction + 1) % 4];
    edge = turns.map((turn) => end * 4 + turn).find((key) => key === first || edges.has(key));
  } while (edge !== first);
  return ring;
}

/** Twice the area inside a ring; negative for a hole. */
export function measureRing(ring) {
  let sum = 0;
  for (let i = 0; i < ring.length; i += 2) {
    const j = (i + 2) % ring.length;
    sum += ring[i] * ring[j + 1] - ring[j] * ring[i + 1];
  }
  return sum;
}
