#!/usr/bin/env bash
# Others' load on our server: guidellm asks `pyllamabatch serve` and prints what it measured.
#
#   pip install '.[server]' guidellm
#   bench/guidellm.sh [MODEL [STREAMS [SECONDS]]]      # smollm2-135m 8 60
#
# The prompts are bench/texts/chats.jsonl, 48 tokens are asked for. Status 1 where a request failed, or
# none was answered.
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-smollm2-135m} streams=${2:-8} seconds=${3:-60} port=${PORT:-8089}
work=$(mktemp -d)
pyllamabatch serve -m "$model" -np "$streams" --port "$port" >"$work/serve.log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null && wait "$server" || true; rm -rf "$work"' EXIT
until curl -sf "http://127.0.0.1:$port/health" >"$work/health"; do
    kill -0 "$server" && [ $SECONDS -lt 60 ] || { cat "$work/serve.log"; exit 1; }
    sleep 0.5
done
for _ in $(seq 50); do sed 's/}$/, "output_tokens_count": 48}/' bench/texts/chats.jsonl; done \
    >"$work/prompts.jsonl"
guidellm run --disable-console-interactive \
    --backend "kind=openai_http,target=http://127.0.0.1:$port" \
    --profile "kind=concurrent,streams=$streams" \
    --constraint "kind=max_duration,seconds=$seconds" \
    --data "kind=json_file,path=$work/prompts.jsonl" \
    --output kind=console --output "kind=json,path=$work/report.json"
python3 - "$work/report.json" <<'EOF'
import json, sys
totals = json.load(open(sys.argv[1]))["benchmarks"][0]["metrics"]["request_totals"]
sys.exit(totals["errored"] > 0 or totals["successful"] == 0)
EOF
