"""Export: a checkpoint becomes an ONNX graph, is compared with PyTorch and enters model_repo."""
