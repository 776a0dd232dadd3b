#!/usr/bin/env bash
# bench/measure.sh for the NVIDIA GPU of this machine: under ten minutes on an H200 with 16 cores
# when WHEELS and ARCHIVE are given, half of it compiling.
#
#   ARCHITECTURE   CUDA's name of the GPU (that of this machine; 90a-real for an H200)
set -euo pipefail
architecture=${ARCHITECTURE:-native}
export CMAKE_ARGS="-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=$architecture ${CMAKE_ARGS:-}"
exec "$(dirname "$0")/measure.sh" "$@"
