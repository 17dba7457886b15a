"""CUDA kernels for post-processing: sources, compilation, launching."""
