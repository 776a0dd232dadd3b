#!/usr/bin/env bash
# bench/measure.sh for a Mac with Apple silicon: Metal, with the library in the binary.
set -euo pipefail
[ "$(uname -s)" = Darwin ] || { echo "this is not a Mac"; exit 1; }
export CMAKE_ARGS="-DGGML_METAL=ON -DGGML_METAL_EMBED_LIBRARY=ON ${CMAKE_ARGS:-}"
exec "$(dirname "$0")/measure.sh" "$@"
