#!/usr/bin/env bash
# Calibrates, compares the simulator with a live engine and the planner with a real load, on this
# machine with what is installed; leaves rows, profiles and tables in a folder.
#
#   bench/validate.sh [RESULTS]
#
# RESULTS is bench/results by default. Needs the package and what bench/ needs (pip install
# '.[bench]'). About eight minutes; the status is 1 if a part failed, the others go on. From the
# environment:
#
#   PYTHON      python3
#   MODEL       a shape of `python -m bench list`, or a GGUF file (gemma3-1b)
#   LAYOUTS     unified,streams
#   SEQUENCES   16
#   PROMPT      tokens of prompts (100-400)
#   OUTPUT      tokens of answers (64-192)
#   CALIBRATE   seconds (120)
#   LIVE        seconds of the live run of each layout (45)
#   SEGMENTS    of each (4)
#   ONLY        validate or plan: only that one
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-bench/results}
python=${PYTHON:-python3} model=${MODEL:-gemma3-1b}
mkdir -p "$results"
export PYTHONUNBUFFERED=1
failed=

say() { printf '== %s (%s s)\n' "$1" "$SECONDS"; }

part() { # NAME SECONDS ARGUMENTS
    [ -z "${ONLY:-}" ] || [ "$ONLY" = "$1" ] || return 0
    say "$1"
    timeout "$2" "$python" -m bench "$1" --model "$model" --out "$results" "${@:3}" \
        >"$results/$1.log" 2>&1 || failed="$failed $1"
    cat "$results/$1.log"
}

live=${LIVE:-45} calibrate=${CALIBRATE:-120}
part validate $((calibrate + 6 * live + 180)) --layouts "${LAYOUTS:-unified,streams}" \
    -s "${SEQUENCES:-16}" --n-ctx $((1024 * ${SEQUENCES:-16})) \
    --prompt "${PROMPT:-100-400}" --output "${OUTPUT:-64-192}" \
    --calibrate "$calibrate" --live "$live" --segments "${SEGMENTS:-4}"
part plan 240 --budget 180
say "done: rows, profiles and tables in $results"
[ -z "$failed" ] || { echo "not complete:$failed"; exit 1; }
