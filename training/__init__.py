"""Training of SOLO: network, targets, losses, data, trainer and evaluation."""
