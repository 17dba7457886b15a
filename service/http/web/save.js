// Saves the result: COCO JSON, or the picture.

import { announce } from "./text.js";

/** A COCO data set of one image: the shown instances, with scores; masks as the server sent them. */
export function buildCoco({ file, answer, shown, model }) {
  const { width, height } = answer.result;
  return {
    info: { description: `${model.name} version ${answer.version}, served by solo-serve` },
    images: [{ id: 1, file_name: file.name || "image", width, height }],
    categories: model.classes.map(({ category_id: id, name }) => ({ id, name })),
    annotations: shown.map(({ category_id, bbox, area, score, segmentation }, index) => ({
      id: index + 1,
      image_id: 1,
      category_id,
      bbox,
      area,
      score,
      iscrowd: 0,
      segmentation,
    })),
  };
}

export function saveResult(state) {
  const text = JSON.stringify(buildCoco(state));
  save(new Blob([text], { type: "application/json" }), `${stem(state.file.name)}.coco.json`);
}

export async function savePicture(viewer, name) {
  const blob = await new Promise((resolve) => viewer.render().toBlob(resolve, "image/png"));
  if (blob) save(blob, `${stem(name)}.segmented.png`);
  else announce("This browser cannot save a picture of this size.");
}

function stem(name) {
  return name.replace(/\.[^.]*$/, "") || "image";
}

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  announce(`Saved ${name}.`);
}
