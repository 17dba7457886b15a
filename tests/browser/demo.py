"""The demo page as a person uses it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Locator, Page

Colour = tuple[int, int, int]

_READ_PIXELS = """
async (points) => {
  for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame);
  const canvas = document.getElementById("canvas");
  const context = canvas.getContext("2d");
  return points.map(([x, y]) => Array.from(
    context.getImageData(Math.floor(x * canvas.width), Math.floor(y * canvas.height), 1, 1).data
  ).slice(0, 3));
}
"""
_TRANSFER = """
([kind, file]) => {
  const data = new DataTransfer();
  if (file) {
    const bytes = Uint8Array.from(atob(file.base64), (c) => c.charCodeAt(0));
    data.items.add(new File([bytes], file.name, { type: "image/png" }));
  } else {
    data.setData("text/plain", "words");
  }
  const options = { bubbles: true, cancelable: true };
  document.body.dispatchEvent(kind === "paste"
    ? new ClipboardEvent("paste", { ...options, clipboardData: data })
    : new DragEvent("drop", { ...options, dataTransfer: data }));
}
"""


class Demo:
    """One open page.

    Attributes:
        page: Playwright's.
        requests: Every URL that the page has asked for.
        failures: What scripts failed with, and what the security policy refused.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.requests: list[str] = []
        self.failures: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.failures.append(str(error)))
        page.on("console", self._hear)

    def _hear(self, message: ConsoleMessage) -> None:
        # A refused request is part of some tests; a script that is refused never is.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.failures.append(message.text)

    def by_id(self, name: str) -> Locator:
        """An element."""
        return self.page.locator(f"#{name}")

    def choose(self, data: bytes, name: str = "picture.png") -> None:
        """Chooses a file with the picker."""
        media_type = "image/jpeg" if name.endswith(".jpg") else "image/png"
        file: Any = {"name": name, "mimeType": media_type, "buffer": data}
        self.by_id("file").set_input_files(files=[file])

    def hand_over(self, kind: str, file: dict[str, str] | None) -> None:
        """Pastes or drops a file {name, base64}, or words."""
        self.page.evaluate(_TRANSFER, [kind, file])

    def drop(self, *paths: Path) -> None:
        """Drops files and folders, as a file manager does."""
        session = self.page.context.new_cdp_session(self.page)
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            event = {"type": kind, "x": 400, "y": 400, "data": data}
            session.send("Input.dispatchDragEvent", event)
        session.detach()

    def await_result(self) -> None:
        """Waits until the result is shown."""
        self.page.wait_for_selector("body[data-state=done] #busy[hidden]", state="attached")

    def segment(self, data: bytes, name: str = "picture.png") -> None:
        """Chooses a file and waits for its result."""
        self.choose(data, name)
        self.await_result()

    def read_pixels(self, *points: tuple[float, float]) -> list[Colour]:
        """Colours of the canvas; points as shares of its width and height."""
        colours: list[Colour] = [
            tuple(pixel) for pixel in self.page.evaluate(_READ_PIXELS, [list(p) for p in points])
        ]
        return colours

    def move_to(self, x: float, y: float) -> None:
        """Moves the mouse to a point of the canvas, given as shares of its width and height."""
        box = self.by_id("canvas").bounding_box()
        assert box is not None
        self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])

    def shown_rows(self) -> list[str]:
        """What a screen reader says of each row of the list."""
        rows = self.page.locator("#list li:not([hidden])")
        return [row.get_attribute("aria-label") or "" for row in rows.all()]

    def save(self, button: str, folder: Path) -> Path:
        """Presses a button that saves a file."""
        with self.page.expect_download() as saving:
            self.page.get_by_role("button", name=button).click()
        path = folder / saving.value.suggested_filename
        saving.value.save_as(path)
        return path
