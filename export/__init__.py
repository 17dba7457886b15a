"""Exports checkpoints to ONNX, verifies the graphs against PyTorch and publishes them."""
