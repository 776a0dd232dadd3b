#!/usr/bin/env bash
# Builds the package and llama.cpp's tools on it, measures, and leaves one JSONL file for each bench.
#
#   bench/measure.sh cpu|cuda|metal [RESULTS]
#
# RESULTS is bench/results by default. A bench that fails, or whose time is over, leaves the records
# until then, and the others go on; the status is 1 then. From the environment:
#
#   ARCHITECTURE  CUDA's name of the GPU (native; 90a-real for an H200)
#   WHEELS        a folder of wheels, filled by `pip download -d WHEELS` and the packages below:
#                 nothing is downloaded
#   ARCHIVE       the source archive that vendor/llama.cpp.lock pins; not needed when
#                 vendor/llama.cpp is there or the index can be reached
#   MODEL         a shape of `python -m bench list`, or a GGUF file (gemma3-1b)
#   COUNTS        sequences and clients in the order of their importance (64,8,32,1)
#   REPEATS       runs of each arm of decode (3)
#   BUDGET        seconds for step, decode, compare and serve, which share it (240)
set -euo pipefail
packages=(scikit-build-core cffi pcpp pycparser numpy gguf httpx rich psutil nvidia-ml-py cmake ninja)
case ${1:-} in
cpu) build= ;;
cuda) build="-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=${ARCHITECTURE:-native}" ;;
metal) build="-DGGML_METAL=ON -DGGML_METAL_EMBED_LIBRARY=ON" ;;
*) echo "bench/measure.sh cpu|cuda|metal [RESULTS]"; exit 2 ;;
esac
cd "$(dirname "$0")/.."
results=${2:-bench/results} work=build/measure
model=${MODEL:-gemma3-1b} counts=${COUNTS:-64,8,32,1} repeats=${REPEATS:-3} budget=${BUDGET:-240}
mkdir -p "$work" "$results"
export CMAKE_ARGS="$build ${CMAKE_ARGS:-}" CMAKE_GENERATOR=Ninja
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

say() { printf '== %s (%s s)\n' "$1" "$SECONDS"; }

say "package"
"${PYTHON:-python3}" -m venv "$work/venv"
. "$work/venv/bin/activate"
python -m pip install -q ${WHEELS:+--no-index --find-links "$WHEELS"} "${packages[@]}"
python vendor/unpack.py ${ARCHIVE:+--archive "$ARCHIVE"}
python -m pip install -q --no-build-isolation --no-deps -e . >"$work/package.log" 2>&1 ||
    { tail -40 "$work/package.log"; exit 1; }
say "llama.cpp's tools on the package's ggml, and the model"
python -m bench tool llama-batched-bench llama-server >"$work/tools.log" 2>&1 &
tools=$!
trap 'kill $tools 2>/dev/null || true' EXIT
python -c 'import sys; from bench.models import resolve; resolve(sys.argv[1])' "$model"
wait "$tools" || { tail -20 "$work/tools.log"; exit 1; }
trap - EXIT

failed=
measure() { # BENCH SHARE-OF-THE-BUDGET ARGUMENTS
    say "bench $1"
    python -m bench "$1" --budget $((budget * $2 / 100)) --out "$results" "${@:3}" ||
        failed="$failed $1"
}
measure sampler 100 --repeats 3
measure sampler 100 --repeats 3 --rows 64
measure step 10 --model "$model"
measure decode 20 --model "$model" -B "$counts" --prompt-tokens 256 --tokens 128 \
    --repeats "$repeats" --arms llama-batched-bench,stepper,engine
# All arms at 2 and 4 users; beyond, processes only take turns on a GPU.
measure compare 15 --model "$model" -N 2,4 --repeats 2 --keep-loaded
measure compare 15 --model "$model" -N 8,16,3 --arms single,contexts,shared,engine --repeats 2 \
    --keep-loaded
measure serve 40 --model "$model" --clients "$counts" --repeats 1 --answer-limit 60

say "done: records in $results"
python -m bench report --no-plots --out "$work/report" "$results"
[ -z "$failed" ] || { echo "not complete:$failed"; exit 1; }
