#!/usr/bin/env bash
# Make .venv with everything in it: the system packages, those that FFCV builds against among them if it is one of the
# extras, then the project and its extras.
# Used by `make`, CI and the Dockerfile alike. PYTHON chooses the interpreter, EXTRAS the extras. BASE_PACKAGES=1 uses the
# interpreter's own packages, in their versions, where it has them (the PyTorch of a vendor's image).
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
extras=${EXTRAS:-ffcv,dali,dev}

stop() { echo "install.sh: error: $*" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || stop "$python is older than Python 3.10"

missing=()
need() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q 'ok installed' || missing+=("$1"); }
if command -v dpkg-query >/dev/null; then
  for package in libturbojpeg0 g++; do need "$package"; done
  case ",$extras," in
    *,ffcv,*) for package in libopencv-dev libturbojpeg0-dev pkg-config; do need "$package"; done ;;
  esac
  if [[ ,$extras, == *,dev,* ]] && grep -qs '^ID=debian' /etc/os-release; then  # Ubuntu's browsers are snaps
    for package in chromium fonts-dejavu-core; do need "$package"; done  # tests look at reports in it
  fi
  "$python" -c 'import ensurepip' 2>/dev/null || need python3-venv
  "$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    need python3-dev
  if [ ${#missing[@]} -gt 0 ]; then
    sudo=()
    if [ "$(id -u)" -ne 0 ]; then
      command -v sudo >/dev/null || stop "these Debian packages are missing: ${missing[*]} (not root, and no sudo)"
      sudo=(sudo)
    fi
    echo "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    { "${sudo[@]}" apt-get update -qq && "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
      >/dev/null || stop "apt-get could not install: ${missing[*]}"
  fi
fi

venv=() versions=(-c constraints.txt)
[ -z "${BASE_PACKAGES:-}" ] || venv=(--system-site-packages) versions=()
[ -x .venv/bin/python ] || "$python" -m venv "${venv[@]}" .venv
.venv/bin/pip install -q --disable-pip-version-check "${versions[@]}" -e ".[$extras]"
case ",$extras," in  # a peer, whose losses ours are compared with; they need nothing of what the rest of it needs
  *,dev,*) .venv/bin/pip install -q --disable-pip-version-check --no-deps lightly==1.6.0 ;;
esac
touch .venv/ready
