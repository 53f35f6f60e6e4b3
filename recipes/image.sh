#!/usr/bin/env bash
# Build the CPU image and try it: a small data set, shards and a few steps, as a user without a name or a home.
#     bash recipes/image.sh     with docker, podman or buildah; PIP_EXTRA_INDEX_URL: see Dockerfile
set -euo pipefail
cd "$(dirname "$0")/.."
image=fasttrain:cpu user=12345:12345

# shellcheck disable=SC2016 # the container's own variables
try='set -e; cd "$(mktemp -d)"; [ "$(id -u)" = 12345 ]; here=/opt/fasttrain
python $here/dataprep/demo.py images --images 100
python $here/dataprep/convert.py images shards --max-side 64 --val-fraction 0.2
bash $here/recipes/torchrun.sh --data shards --run run --arch small --size 32 --batch-size 16 --max-steps 5
python $here/fasttrain/evaluate.py run --knn'

engine=
for engine in docker podman buildah none; do
  if "$engine" info >/dev/null 2>&1; then break; fi
done
[ "$engine" != none ] || { echo "image.sh: error: no engine here builds images: docker, podman or buildah" >&2; exit 1; }

"$engine" build --target cpu --build-arg "PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL:-}" -t "$image" .
if [ "$engine" = buildah ]; then
  container=$(buildah from "$image")
  trap 'buildah rm "$container" >/dev/null' EXIT
  buildah run --user "$user" "$container" -- bash -c "$try"
else
  "$engine" run --rm --user "$user" --read-only --tmpfs /tmp --cap-drop ALL "$image" bash -c "$try"
fi
echo "$image can be used"
