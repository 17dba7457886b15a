#!/bin/sh
# Removes from a virtual environment what the server never loads: 90 MB. Needs strip (binutils).
set -eu
cd "$1"/lib/python3.*/site-packages

rm -f onnxruntime/capi/libonnxruntime.so.* # for programs in C; the Python module contains its own copy
rm -rf onnxruntime/quantization onnxruntime/tools onnxruntime/transformers numpy/distutils numpy/f2py
find . -type d -name tests -prune -exec rm -rf {} +
find . -name '*.pyi' -delete
# Debug symbols of extension modules. Not of libraries in *.libs: those were patched, and strip can damage them.
find PIL httptools pycocotools uvloop -name '*.so' -exec strip --strip-unneeded {} +
