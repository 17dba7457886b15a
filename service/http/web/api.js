// What the page asks the server, and the server's refusals in plain words.

const PLAIN_WORDS = {
  unsupported_format: "The server cannot read this file as an image. JPEG, PNG, WebP and BMP work.",
  corrupt_image: "This image is damaged or cut off.",
  empty_image: "This file is empty.",
  empty_body: "This file is empty.",
  image_too_large: "This image has more pixels than the server takes.",
  body_too_large: "This file is larger than the server takes.",
  body_timeout: "The file did not arrive in time. Try again.",
  overloaded: "The server has too much to do right now. Try again in a moment.",
  draining: "The server is shutting down. Try again in a moment.",
  engine_restarting: "The model is being started again. Try again in a moment.",
  model_unavailable: "This model cannot be used right now.",
  unknown_model: "The server does not have this model any more. Reload the page.",
  engine_error: "The model failed on this image.",
  internal_error: "Something failed inside the server.",
};
const BY_STATUS = {
  401: "This server asks for an API key.",
  403: "The server does not allow this.",
  413: PLAIN_WORDS.body_too_large,
  429: "That was too much for one user. Try again in a moment.",
  503: "The server is not available right now. Try again in a moment.",
  504: "The server took too long. Try again in a moment.",
};

/** A request that was not answered as hoped; `message` is for people, `detail` the server's. */
export class Refused extends Error {
  constructor(message, { detail = "", requestId = "", canRetry = false, needsKey = false } = {}) {
    super(message);
    Object.assign(this, { detail, requestId, canRetry, needsKey });
  }
}

let apiKey = ""; // in memory alone

/** Sends an API key from now on. */
export function useKey(key) {
  apiKey = key;
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: apiKey ? { "x-api-key": apiKey } : {} });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached.", { detail: error.message, canRetry: true });
  }
  if (response.ok) return response;
  const { status } = response;
  const body = await response.json().catch(() => ({}));
  // Below /v2 the Open Inference Protocol wants {error: text}; elsewhere it is {error: {...}}.
  const { code, message } = body.error?.message ? body.error : { ...body, message: body.error };
  const words = PLAIN_WORDS[code] ?? BY_STATUS[status] ?? "The server refused this request.";
  throw new Refused(words, {
    detail: message ?? `status ${status}`,
    requestId: response.headers.get("x-request-id") ?? "",
    canRetry: status === 429 || status >= 500,
    needsKey: status === 401,
  });
}

/** Every model of the repository, as GET /v2/models lists them. */
export async function listModels() {
  return (await (await ask("v2/models")).json()).models;
}

/** One model: classes, thresholds, what it runs on. */
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
 * The least score that the model ever keeps is asked for, so that any threshold above it can be
 * applied here, without another request.
 *
 * @returns {result, timing, version, roundTripMs}; result is the image's entry of `results`.
 */
export async function segment(file, model, signal) {
  const query = new URLSearchParams({
    model: model.name,
    score_threshold: leastScore(model),
    masks: "rle",
  });
  const body = new FormData();
  body.append("images", file, file.name || "image");
  const began = performance.now();
  const answer = await ask(`segment?${query}`, { method: "POST", body, signal });
  const { results, timing_ms: timing, version } = await answer.json();
  return { result: results[0], timing, version, roundTripMs: performance.now() - began };
}

/** The least score that is asked for: below it the model keeps nothing. */
export function leastScore(model) {
  const { update_threshold: least, score_threshold: usual } = model.postprocess;
  return Math.min(least, usual);
}
