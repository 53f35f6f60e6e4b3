#!/usr/bin/env bash
# MoCo's CIFAR-10 recipe with XMoCo's regularisers: ResNet-18, 200 epochs. A GPU is advisable.
#     bash recipes/cifar10.sh FOLDER     FOLDER holds train/<class>/*.png and test/<class>/*.png, whose pixels stay exact
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: bash recipes/cifar10.sh FOLDER" >&2; exit 2; }
source=$(realpath "$1")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

"$python" dataprep/convert.py "$source" data/cifar10 --format ffcv
"$python" fasttrain/train.py --data data/cifar10 --preset cifar10 --run runs/cifar10
"$python" fasttrain/evaluate.py runs/cifar10 --data data/cifar10 --knn --linear --features projection
