#!/bin/sh
# Removes from a virtual environment what the server never loads: 190 MB. Needs as, ld, nm, readelf and strip (binutils).
set -eu
cd "$1"/lib/python3.*/site-packages

rm -f onnxruntime/capi/libonnxruntime.so.* # for programs in C; the Python module contains its own copy
rm -rf onnxruntime/quantization onnxruntime/tools onnxruntime/transformers numpy/distutils numpy/f2py
# Pillow: AVIF, which is not read, and fonts.
rm -f PIL/_avif.*.so PIL/_imagingft.*.so pillow.libs/libavif-* pillow.libs/libbrotli* \
    pillow.libs/libfreetype-* pillow.libs/libharfbuzz-*
find . -type d -name tests -prune -exec rm -rf {} +
find . -name '*.py[ix]' -delete -o -name '*.pxd' -delete -o -name '*.[ach]' -delete
# Debug symbols of extension modules. Not of libraries in *.libs: those were patched, and strip can damage them.
find PIL httptools pybase64 pycocotools uvloop -name '*.so' -exec strip --strip-unneeded {} +

# OpenCV is linked to libraries for video, AV1 and linear algebra, which the functions that pipeline/ and service/ use
# never call (OPENCV in tests/deploy/test_dockerfiles.py lists them). Each library is replaced by an empty one of the
# same name, version and symbols; to call one of these ends the process. What only such a library needs is removed.
work=$(mktemp -d)
as -o "$work/empty.o" /dev/null
nm --dynamic --undefined-only cv2/cv2.abi3.so opencv_python_headless.libs/libavif-* \
    | sed 's/.* //; s/@.*//' | sort -u >"$work/needed"
for library in opencv_python_headless.libs/*; do
    case $library in */libavif-* | */libpng*) continue ;; esac
    nm --dynamic --defined-only "$library" | sed 's/.* //; s/@.*//' | sort -u | comm -12 - "$work/needed" >"$work/names"
    version=$(readelf --wide --version-info "$library" | sed -n 's/.*Flags: none .*Name: \(LIB[A-Z]*_[0-9]*\)$/\1/p')
    {
        echo "$version { global:"
        sed 's/$/;/' "$work/names"
        echo '};'
    } >"$work/map"
    rm "$library"
    # shellcheck disable=SC2046 # one option for each name
    [ ! -s "$work/names" ] || ld -shared -soname "${library##*/}" --version-script "$work/map" -o "$library" \
        $(sed 's/.*/--defsym &=0/' "$work/names") "$work/empty.o"
done
rm -r "$work"
