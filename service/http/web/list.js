// The list of instances: a listbox with arrow keys; the selected instance is highlighted.

import { describeInstance, formatArea } from "./text.js";

const PAGE = 10;

export class InstanceList {
  constructor(root, { onHover, onPick, onMove }) {
    this.root = root;
    this.instances = [];
    this.count = 0;
    this.onMove = onMove;
    this.pinned = null;
    root.addEventListener("pointerover", ({ target }) => onHover(this.instanceOf(target)));
    root.addEventListener("pointerleave", () => onHover(null));
    root.addEventListener("click", ({ target }) => {
      const instance = this.instanceOf(target);
      if (instance) onPick(instance);
    });
    root.addEventListener("keydown", (event) => this.move(event));
    root.addEventListener("focus", () => {
      if (root.matches(":focus-visible") && !this.pinned && this.count) this.moveTo(0);
    });
  }

  /** Builds one row per instance; all are shown. */
  fill(instances, task) {
    this.instances = instances;
    this.rows = instances.map((instance) => buildRow(instance, task === "contour"));
    this.root.replaceChildren(...this.rows);
    this.root.scrollTop = 0;
  }

  /** Shows the first `count` rows and hides the others. */
  showFirst(count) {
    this.count = count;
    this.rows.forEach((row, index) => (row.hidden = index >= count));
    this.root.hidden = count === 0;
    this.root.nextElementSibling.hidden = count > 0;
  }

  light(lit, pinned) {
    this.pinned = pinned;
    this.instances.forEach((instance, index) => {
      this.rows[index].classList.toggle("lit", instance === lit);
      this.rows[index].setAttribute("aria-selected", String(instance === pinned));
    });
    if (pinned) this.root.setAttribute("aria-activedescendant", this.rows[pinned.index].id);
    else this.root.removeAttribute("aria-activedescendant");
  }

  reveal({ index }) {
    this.rows[index].scrollIntoView({ block: "nearest" });
  }

  instanceOf(target) {
    const row = target.closest("li");
    return row ? this.instances[this.rows.indexOf(row)] : null;
  }

  move(event) {
    const at = this.pinned?.index ?? -1;
    const steps = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + PAGE, PageUp: at - PAGE };
    const to = { ...steps, Home: 0, End: this.count - 1 }[event.key];
    if (to === undefined || !this.count) return;
    event.preventDefault();
    this.moveTo(Math.max(0, Math.min(to, this.count - 1)));
  }

  moveTo(index) {
    this.onMove(this.instances[index]);
    this.reveal(this.instances[index]);
  }
}

function buildRow(instance, contour) {
  const row = document.createElement("li");
  row.id = `instance-${instance.index}`;
  row.role = "option";
  row.ariaLabel = describeInstance(instance, contour);
  const cells = {
    swatch: "",
    name: instance.category,
    score: instance.score.toFixed(2),
    area: formatArea(instance.area),
  };
  for (const [name, text] of Object.entries(cells)) {
    const cell = document.createElement("span");
    cell.className = name;
    cell.textContent = text;
    row.append(cell);
  }
  row.firstChild.style.background = instance.colour.line;
  return row;
}
