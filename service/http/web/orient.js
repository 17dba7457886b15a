// The picture as the server decodes it. Browsers differ in whether they turn a WebP by its EXIF
// data; the server does.

// setTransform's arguments for a picture of w x h pixels, by EXIF orientation.
const TURNS = {
  2: (w) => [-1, 0, 0, 1, w, 0],
  3: (w, h) => [-1, 0, 0, -1, w, h],
  4: (w, h) => [1, 0, 0, -1, 0, h],
  5: () => [0, 1, 1, 0, 0, 0],
  6: (w, h) => [0, 1, -1, 0, h, 0],
  7: (w, h) => [0, -1, -1, 0, h, w],
  8: (w) => [0, -1, 1, 0, 0, w],
};

/**
 * Decodes a file.
 *
 * @returns {bitmap, isStored}: bitmap is null if the browser cannot read the file; isStored says
 *   that it still has to be turned by the orientation in the answer.
 */
export async function decodePicture(file) {
  try {
    const stored = await dropWebpExif(file);
    const options = { imageOrientation: "from-image" };
    const bitmap = await createImageBitmap(stored ?? file, options);
    return { bitmap, isStored: Boolean(stored) };
  } catch {
    return { bitmap: null, isStored: false };
  }
}

/** The picture in an answer, base64 of a PNG, for a file that the browser cannot read. */
export async function readPicture(png) {
  const bytes = Uint8Array.from(atob(png), (letter) => letter.charCodeAt(0));
  return createImageBitmap(new Blob([bytes])).catch(() => null);
}

/** The WebP with its EXIF data renamed, so that no browser turns it; null for other formats. */
async function dropWebpExif(file) {
  const start = new Uint8Array(await file.slice(0, 12).arrayBuffer());
  if (readName(start, 0) !== "RIFF" || readName(start, 8) !== "WEBP") return null;
  const bytes = new Uint8Array(await file.arrayBuffer());
  const view = new DataView(bytes.buffer);
  for (let chunk = 12; chunk + 8 <= bytes.length; ) {
    if (readName(bytes, chunk) === "EXIF") bytes.fill("_".charCodeAt(0), chunk, chunk + 4);
    const length = view.getUint32(chunk + 4, true);
    chunk += 8 + length + (length % 2);
  }
  return new Blob([bytes]);
}

function readName(bytes, start) {
  return String.fromCharCode(...bytes.subarray(start, start + 4));
}

/** A stored picture turned by an EXIF orientation; null if it is too large for a canvas. */
export async function turnPicture(bitmap, orientation) {
  if (!(orientation in TURNS)) return bitmap;
  const { width, height } = bitmap;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = orientation > 4 ? [height, width] : [width, height];
  const context = canvas.getContext("2d");
  context.setTransform(...TURNS[orientation](width, height));
  context.drawImage(bitmap, 0, 0);
  return createImageBitmap(canvas).catch(() => null);
}
