// Requests to the server; its errors in plain words.

const PLAIN_WORDS = {
  unsupported_format: "The server cannot read this file as an image. Use JPEG, PNG, WebP, BMP or TIFF.",
  invalid_plane: "This file has several planes. Choose what is segmented.",
  pixel_size: "The size of a pixel that this file states is too far from that of the model.",
  corrupt_image: "This image is damaged or incomplete.",
  empty_image: "This file is empty.",
  empty_body: "This file is empty.",
  image_too_large: "This image has more pixels than the server allows.",
  too_many_canvases: "This image needs more tiles than the server allows.",
  too_many_images: "This image needs more tiles than the server accepts at once.",
  body_too_large: "This file is larger than the server allows.",
  body_timeout: "The upload took too long. Try again.",
  head_timeout: "The upload took too long. Try again.",
  head_too_large: "The browser sent more headers, such as cookies, than the server accepts.",
  overloaded: "The server is overloaded. Try again in a moment.",
  draining: "The server is shutting down. Try again in a moment.",
  engine_restarting: "The model is being restarted. Try again in a moment.",
  ambiguous_model: "The server has several models; choose one.",
  model_unavailable: "This model is not available at the moment.",
  unknown_model: "The server no longer has this model. Reload the page.",
  engine_error: "The model failed on this image.",
  internal_error: "The server failed.",
};
const BY_STATUS = {
  401: "This server requires an API key.",
  403: "The server does not allow this.",
  413: PLAIN_WORDS.body_too_large,
  429: "You have reached your limit. Try again in a moment.",
  501: "The server does not offer this.",
  503: "The server is not available. Try again in a moment.",
  504: "The server did not finish in time. Try again in a moment.",
};
const PROGRESS_LINES = "application/x-ndjson";

/** A request that failed; `message` is for the user, `detail` is the server's text. */
export class Refused extends Error {
  constructor(
    message,
    { detail = "", requestId = "", canRetry = false, needsKey = false, needsPlane = false } = {},
  ) {
    super(message);
    Object.assign(this, { detail, requestId, canRetry, needsKey, needsPlane });
  }
}

let apiKey = ""; // only in memory

/** Sets the API key of all later requests. */
export function useKey(key) {
  apiKey = key;
}

async function ask(path, { headers, ...options } = {}) {
  const key = apiKey ? { "x-api-key": apiKey } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...key } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached.", { detail: error.message, canRetry: true });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  // Below /v2 the Open Inference Protocol requires {error: text}; elsewhere it is {error: {...}}.
  const detail = body.error?.message ? body.error : { ...body, message: body.error };
  throw refuse(response, response.status, detail);
}

function refuse(response, status, { code, message }) {
  const words = PLAIN_WORDS[code] ?? BY_STATUS[status] ?? "The server refused this request.";
  return new Refused(words, {
    detail: message ?? `status ${status}`,
    requestId: response.headers.get("x-request-id") ?? "",
    canRetry: status === 429 || status >= 500,
    needsKey: status === 401,
    needsPlane: code === "invalid_plane",
  });
}

/** All models of the repository, as GET /v2/models lists them. */
export async function listModels() {
  return (await (await ask("v2/models")).json()).models;
}

/** One model: input, classes, thresholds, device. */
export async function describeModel(name) {
  return (await ask(`v2/models/${encodeURIComponent(name)}`)).json();
}

/** A bundled sample as a file. */
export async function fetchSample(name, signal) {
  const data = await (await ask(`web/samples/${name}`, { signal })).blob();
  return new File([data], name, { type: data.type });
}

/**
 * Segments one image.
 *
 * The request has the lowest score that the model keeps, so that the page can apply any higher
 * threshold without another request.
 *
 * @param planes Parameters that choose among the planes of a file: {channel, z, t}.
 * @param picture Whether the answer has the image that the server decoded, as `picture_png`.
 * @param onProgress Called with {canvases_done, canvases, elapsed_s} while the server works.
 * @param signal Aborts the request; then the server stops the work.
 * @returns {result, timing, canvases, version, roundTripMs}; result is the image's entry of
 *   `results`.
 */
export async function segment(file, model, { planes, picture, onProgress, signal }) {
  const query = new URLSearchParams({
    model: model.name,
    score_threshold: leastScore(model),
    masks: "rle",
    ...planes,
    ...(picture && { picture }),
  });
  const body = new FormData();
  body.append("images", file, file.name || "image");
  const began = performance.now();
  const headers = { accept: PROGRESS_LINES };
  const response = await ask(`segment?${query}`, { method: "POST", body, headers, signal });
  const answer = await readAnswer(response, onProgress);
  const { results, timing_ms: timing, cost, version } = answer;
  const roundTripMs = performance.now() - began;
  return { result: results[0], timing, canvases: cost.canvases, version, roundTripMs };
}

/**
 * The instances of an image as a file of another program; the server segments the image again.
 *
 * @returns {blob, name}
 */
export async function exportFile(file, model, { format, threshold, signal }) {
  const query = new URLSearchParams({ model: model.name, score_threshold: threshold, format });
  const body = new FormData();
  body.append("images", file, file.name || "image");
  const response = await ask(`segment?${query}`, { method: "POST", body, signal });
  const disposition = response.headers.get("content-disposition") ?? "";
  const name = /filename\*=UTF-8''([^;]+)/.exec(disposition)?.[1] ?? "image";
  return { blob: await response.blob(), name: decodeURIComponent(name) };
}

/** The answer: the last line of a stream of progress lines, or the whole body. */
async function readAnswer(response, onProgress) {
  const type = response.headers.get("content-type") ?? "";
  if (!type.startsWith(PROGRESS_LINES)) return response.json();
  for await (const text of readLines(response.body)) {
    const line = JSON.parse(text);
    if (line.result) return line.result;
    if (line.error) throw refuse(response, line.status, line.error);
    onProgress(line.progress);
  }
  throw lostConnection("the answer is incomplete");
}

function lostConnection(detail) {
  return new Refused("The connection to the server was lost.", { detail, canRetry: true });
}

/** The complete lines of a stream of UTF-8. */
async function* readLines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let parts = []; // of a line that is not complete; joined once, as a result may be large
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : lostConnection(error.message);
    });
    if (done) return;
    const [first, ...rest] = value.split("\n");
    parts.push(first);
    for (const start of rest) {
      yield parts.join("");
      parts = [start];
    }
  }
}

/** The lowest score of a request: the model keeps nothing below. */
export function leastScore(model) {
  const { update_threshold: least, score_threshold: usual } = model.postprocess;
  return Math.min(least, usual);
}
