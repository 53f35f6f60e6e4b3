#!/usr/bin/env bash
# What `make gpu-day` needs on a machine that has PyTorch, torchvision, Triton, numba and psutil but no network:
# gpu-kit/ has packages for its Python, libturbojpeg and photographs, gpu-kit-cifar/ CIFAR-10; each below 60 MiB.
#     bash recipes/gpu-kit.sh [PHOTOS] [CIFAR]      sources as for convert.py; PYTHON_THERE=3.12
set -euo pipefail
photos=${1:+$(realpath "$1")} cifar=${2:+$(realpath "$2")}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} kit=gpu-kit most=60 # MiB

mkdir -p "$kit/lib"
"$python" -m pip install --quiet --no-compile --upgrade --only-binary=:all: --no-deps -c constraints.txt --target "$kit/site" \
    --python-version "${PYTHON_THERE:-3.12}" --implementation cp \
    tyro docstring-parser typeguard typing-extensions rich markdown-it-py mdurl pygments \
    pytest pytest-timeout iniconfig pluggy packaging

library=$("$python" -c "import ctypes.util as u, ctypes
ctypes.CDLL(u.find_library('turbojpeg'))
print(next(line.split()[-1] for line in open('/proc/self/maps') if 'libturbojpeg' in line))")
cp -L "$library" "$kit/lib/libturbojpeg.so.0"

[ -z "$photos" ] || "$python" dataprep/convert.py "$photos" "$kit/photos" --format ffcv --max-side 400
[ -z "$cifar" ] || "$python" dataprep/convert.py "$cifar" "$kit-cifar" --format ffcv

for folder in "$kit" "$kit-cifar"; do
    [ -d "$folder" ] || continue
    size=$(du -sm "$folder" | cut -f1)
    echo "$folder: $size MiB"
    [ "$size" -lt "$most" ] || { echo "$folder is over $most MiB: take fewer images" >&2; exit 1; }
done
