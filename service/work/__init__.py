"""Work on images: admission, scheduling, from bytes to the answer."""
