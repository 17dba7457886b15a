"""CUDA C++ sources of the post-processing and the letterbox, and how they are prebuilt.

The service reads the sources as files (service/backends/nvrtc.py); it imports nothing of this.
"""
