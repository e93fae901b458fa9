#!/usr/bin/env bash
# Measure every CUDA figure of the project, on a machine with only torch, transformers and sentence-transformers.
# Uses random weights in the 0.6B and 4B shapes; nothing is installed or downloaded.
#
#   benchmarks/gpu.sh --pack                          # before: what that machine lacks, into dist/gpu-pack
#   benchmarks/gpu.sh --out first.jsonl               # 450 seconds; --limit for another number
#   benchmarks/gpu.sh --limit 190 --resume first.jsonl --out second.jsonl    # what the first call left
#   benchmarks/gpu.sh --only latency,peer             # some parts
#   benchmarks/gpu.sh --table second.jsonl            # the table of figures and bars again
#   benchmarks/gpu.sh --dry                           # a tiny model on the CPU: only checks that every part runs
#
# Each part runs in its own process with a time limit. Each figure is printed and in the file as soon as it is known.
# The last lines fit docs/log.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/server${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [[ ${1:-} == --pack ]]; then exec "${PYTHON:-.venv/bin/python}" benchmarks/gpu_pack.py; fi
site=$PWD/dist/gpu-site
rm -rf "$site"
"$python" benchmarks/gpu_pack.py --unpack "$site"
export PYTHONPATH=$PYTHONPATH:$site HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=true
export OMP_WAIT_POLICY=passive TQDM_DISABLE=1 no_proxy=127.0.0.1
if [[ " $* " == *" --dry "* ]]; then export TRITON_INTERPRET=1; fi
exec "$python" benchmarks/gpu.py "$@"
