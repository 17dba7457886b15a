"""From image bytes to canvases, and from candidates to instances: pure functions, no I/O."""
