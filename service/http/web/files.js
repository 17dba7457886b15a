// Files of a drop, a paste or the picker: folders are searched, images are told from other files.

import { Refused } from "./api.js";
import { formatCount } from "./text.js";

const MAX_IMAGES = 500;
const MAX_FILES = 20_000; // looked at, so that the search ends
const NAMES_SHOWN = 5;

/**
 * What a drop or a paste holds: entries of the file system, or files.
 *
 * To be called while the event is handled; afterwards the browser has emptied the list.
 */
export function listEntries(transfer) {
  const items = [...transfer.items].filter(({ kind }) => kind === "file");
  return items.map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile()).filter(Boolean);
}

/**
 * The images among files and in folders; hidden files are left out.
 *
 * A single file is taken for an image whatever its name is: the server tells what it holds.
 *
 * @param entries From `listEntries`, or files.
 * @param types Media types of images.
 * @returns {images, others, isCut}: images as {file, path}, by path; paths of other files; whether
 *   there is more than is looked at.
 * @throws Refused if there is no image, or a folder cannot be read.
 */
export async function findImages(entries, types, signal) {
  const found = { images: [], others: [], isCut: false };
  const hasFolder = entries.some((entry) => entry.isDirectory);
  const isAlone = entries.length === 1 && !hasFolder;
  for await (const { file, path } of walk(entries)) {
    signal.throwIfAborted();
    const { images, others } = found;
    found.isCut = images.length >= MAX_IMAGES || images.length + others.length >= MAX_FILES;
    if (found.isCut) break;
    if (isAlone || types.includes(file.type)) images.push({ file, path });
    else others.push(path);
  }
  found.images.sort((a, b) => compare(a.path, b.path));
  found.others.sort(compare);
  if (!found.images.length) throw new Refused(describeNoImage(hasFolder, found.others));
  return found;
}

const { compare } = new Intl.Collator("en", { numeric: true });

async function* walk(entries) {
  const waiting = [...entries];
  while (waiting.length) {
    const entry = waiting.shift();
    if (entry instanceof File) yield { file: entry, path: entry.name };
    else if (entry.isDirectory) waiting.push(...(await readFolder(entry)));
    else yield { file: await readEntry(entry), path: entry.fullPath.replace(/^\//, "") };
  }
}

async function readFolder(entry) {
  const reader = entry.createReader();
  const entries = [];
  for (;;) {
    const batch = await new Promise((resolve, reject) => {
      reader.readEntries(resolve, reject);
    }).catch((error) => {
      throw unreadable(`The folder ${entry.name}`, error);
    });
    if (!batch.length) return entries;
    entries.push(...batch.filter(({ name }) => !name.startsWith(".")));
    if (entries.length > MAX_FILES) return entries;
  }
}

function readEntry(entry) {
  return new Promise((resolve, reject) => {
    entry.file(resolve, reject);
  }).catch((error) => {
    throw unreadable(`The file ${entry.name}`, error);
  });
}

function unreadable(what, error) {
  return new Refused(`${what} cannot be read.`, { detail: error.message });
}

/** Throws Refused if a file is empty, or cannot be read because it is a folder or was changed. */
export async function checkFile(file) {
  const start = await file.slice(0, 1).arrayBuffer().catch((error) => {
    throw unreadable("This file", error);
  });
  if (!start.byteLength) throw new Refused("This file is empty.");
}

function describeNoImage(hasFolder, others) {
  const where = hasFolder ? "The folder has no image." : "None of these files is an image.";
  const hint = "Use JPEG, PNG, WebP, BMP or TIFF.";
  return others.length ? `${where} ${hint} Other files: ${listNames(others)}.` : `${where} ${hint}`;
}

/** Below the choice: what is not in it. */
export function describeRest({ images, others, isCut }) {
  const parts = [];
  if (isCut) parts.push(`Only the first ${formatCount(images.length)} images are listed.`);
  if (others.length) parts.push(`Not images: ${listNames(others)}.`);
  return parts.join(" ");
}

function listNames(names) {
  const rest = names.length - NAMES_SHOWN;
  const shown = names.slice(0, NAMES_SHOWN).join(", ");
  return rest > 0 ? `${shown} and ${formatCount(rest)} more` : shown;
}
