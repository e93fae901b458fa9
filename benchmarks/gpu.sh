#!/usr/bin/env bash
# Measure every CUDA figure of the project in under nine minutes, on a machine with only torch, transformers and
# sentence-transformers. Uses random weights in the 0.6B shape; nothing is installed or downloaded.
#
#   benchmarks/gpu.sh --out gpu.json          # everything, on the first GPU
#   benchmarks/gpu.sh --only latency,peer     # some parts
#   benchmarks/gpu.sh --device cpu --shape tiny --out /tmp/try.json   # only checks that the script runs
#
# Each part runs in its own process with a time limit, so that a failure affects no other part. The file of results is
# saved after each part; the last line fits docs/log.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
path=$PWD:$PWD/server
"$python" -c 'import cyclopts' 2>/dev/null || path=$path:$PWD/benchmarks/bare
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=true OMP_WAIT_POLICY=passive
exec "$python" benchmarks/gpu.py "$@"
