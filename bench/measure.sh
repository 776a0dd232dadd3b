#!/usr/bin/env bash
# Builds the package and llama.cpp's tools on it, measures, and leaves one JSONL file per bench.
#
#   bench/measure.sh [RESULTS]
#
# RESULTS is bench/results by default. Called by measure_cuda.sh and measure_mac.sh, which set
# CMAKE_ARGS; by itself it builds for the CPU. A bench that fails, or whose time is over, leaves the
# rows until then, and the others go on; the status is 1 then. From the environment:
#
#   WHEELS    a folder of wheels: nothing is downloaded. Filled on a machine with a network by
#             python3 -m pip download -d WHEELS scikit-build-core cffi pcpp pycparser numpy gguf httpx
#             (and ninja, cmake where the machine has none or one older than 3.26)
#   ARCHIVE   the source archive that vendor/llama.cpp.lock pins; not needed when vendor/llama.cpp
#             is there or the index can be reached
#   MODEL     a shape of `python -m bench list`, or a GGUF file (gemma3-1b)
#   COUNTS    sequences and clients in the order of their importance (64,8,32,1)
#   REPEATS   runs of each arm of decode (3)
#   BUDGET    seconds for step, decode, compare and serve, which share it (240)
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-bench/results}
python=${PYTHON:-python3}
model=${MODEL:-gemma3-1b} counts=${COUNTS:-64,8,32,1} repeats=${REPEATS:-3} budget=${BUDGET:-240}
work=build/measure
mkdir -p "$work" "$results"
export CMAKE_GENERATOR=Ninja PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

say() { printf '== %s (%s s)\n' "$1" "$SECONDS"; }

say "Python packages"
"$python" -m venv "$work/venv"
. "$work/venv/bin/activate"
needs=(scikit-build-core cffi pcpp pycparser numpy gguf httpx)
command -v ninja >/dev/null || needs+=(ninja)
new_enough='cmake_minimum_required(VERSION 3.26)'
echo "$new_enough" | cmake -P /dev/stdin >/dev/null 2>&1 || needs+=("cmake>=3.26")
python -m pip install -q ${WHEELS:+--no-index --find-links "$WHEELS"} "${needs[@]}"
if [ -n "${ARCHIVE:-}" ]; then
    python vendor/unpack.py --archive "$ARCHIVE"
else
    python vendor/unpack.py
fi

say "package"
python -m pip install -q --no-build-isolation --no-deps . >"$work/package.log" 2>&1 ||
    { tail -40 "$work/package.log"; exit 1; }
say "llama.cpp's tools on the package's ggml, and the model"
python -m bench tool llama-batched-bench llama-server llama-parallel >"$work/tools.log" 2>&1 &
tools=$!
trap 'kill $tools 2>/dev/null || true' EXIT
python -c 'import sys; from bench.models import resolve; resolve(sys.argv[1])' "$model"
wait "$tools" || { tail -20 "$work/tools.log"; exit 1; }
trap - EXIT

failed=
measure() {
    say "bench $*"
    python -m bench "$@" --out "$results" || failed="$failed $1"
}
cores=$(python -c 'from bench.schema import machine; print(machine()["n_cores"])')
share() { echo $((budget * $1 / 100)); }
measure sampler --repeats 3
measure sampler --repeats 3 --rows 64 --threads "1,$cores"
measure step --model "$model" --budget "$(share 10)"
measure decode --model "$model" -B "$counts" --prompt-tokens 256 --tokens 128 \
    --repeats "$repeats" --arms llama-batched-bench,stepper,engine --budget "$(share 20)"
# All arms at 2 and 4 users; beyond, processes only take turns on a GPU.
measure compare --model "$model" -N 2,4 --repeats 2 --keep-loaded --budget "$(share 15)"
measure compare --model "$model" -N 8,16,3 --arms single,contexts,shared,engine --repeats 2 \
    --keep-loaded --budget "$(share 15)"
measure serve --model "$model" --clients "$counts" --repeats 1 --answer-limit 60 \
    --budget "$(share 40)"

say "done: rows in $results"
python -m bench report --no-plots --out "$work/report" "$results"
[ -z "$failed" ] || { echo "not complete:$failed"; exit 1; }
