#!/usr/bin/env bash
# The whole main job in a few minutes on two cores: data set, shards, training, evaluation, report.
# Run it again and it goes on where it stopped. The last line is JSON.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

"$python" dataprep/demo.py data/demo
"$python" dataprep/convert.py data/demo data/demo-shards --format ffcv --max-side 128 --val-fraction 0.2
"$python" fasttrain/train.py --data data/demo-shards --preset demo --run runs/demo
"$python" fasttrain/evaluate.py runs/demo --data data/demo-shards --knn --linear --untrained
"$python" fasttrain/report.py runs/demo
