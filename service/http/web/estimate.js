// How many tiles an image needs, and how long they take.

/** Canvases that the server makes of an image; the same as `count_canvases` of preprocess.py. */
export function countCanvases({ width, height }, resize) {
  if (resize.rule !== "tile") return 1;
  const [tileHeight, tileWidth] = resize.tile_hw;
  const overlap = resize.overlap_px;
  return countTiles(height, tileHeight, overlap) * countTiles(width, tileWidth, overlap);
}

function countTiles(length, tile, overlap) {
  return length <= tile ? 1 : Math.ceil((length - overlap) / (tile - overlap));
}

/** Seconds per canvas of each model, measured on the answers since the page was opened. */
export class Pace {
  #measured = new Map();

  /**
   * Keeps an answer if no earlier one had more canvases: the more canvases, the smaller the
   * share of the constant costs.
   */
  learn(modelName, canvases, seconds) {
    if (canvases < (this.#measured.get(modelName)?.canvases ?? 1)) return;
    this.#measured.set(modelName, { canvases, secondsPerCanvas: seconds / canvases });
  }

  /** Seconds that canvases take; null before the model's first answer. */
  estimate(modelName, canvases) {
    const measured = this.#measured.get(modelName);
    return measured ? measured.secondsPerCanvas * canvases : null;
  }
}

/** Estimates the remaining time of one request from its progress lines. */
export class TimeLeft {
  #first = null; // the first line with a finished canvas: decoding and waiting do not count

  /** @param estimated Seconds that the whole request was expected to take, or null. */
  constructor(estimated) {
    this.estimated = estimated;
  }

  /** Takes a progress line; returns the remaining seconds, or null if nothing is known yet. */
  update({ canvases_done: done, canvases, elapsed_s: elapsed }) {
    if (done && !this.#first) this.#first = { done, elapsed };
    const counted = this.#first ? done - this.#first.done : 0;
    const left = canvases - done;
    if (counted) return ((elapsed - this.#first.elapsed) / counted) * left;
    return this.estimated === null ? null : (this.estimated / canvases) * left;
  }
}
