#!/usr/bin/env bash
# Every CUDA figure of the project in one call of under nine minutes, on a machine with nothing but torch, transformers
# and sentence-transformers: random weights in the 0.6B shape are made on the spot, nothing is installed or downloaded.
#
#   benchmarks/gpu.sh --out gpu.json          # everything, on the first GPU
#   benchmarks/gpu.sh --only latency,peer     # some parts
#   benchmarks/gpu.sh --device cpu --shape tiny --out /tmp/try.json   # does the script run?
#
# Each part is a process of its own with a limit, so that one that fails takes nothing else with it. The file of results
# is written anew after each part; the last line fits docs/log.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
path=$PWD:$PWD/server
"$python" -c 'import cyclopts' 2>/dev/null || path=$path:$PWD/benchmarks/bare
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=true OMP_WAIT_POLICY=passive
exec "$python" benchmarks/gpu.py "$@"
