"""Pure image and mask functions that serving, training and export share; no I/O."""
