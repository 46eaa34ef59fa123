#!/usr/bin/env bash
# Fetches ADE20K into data/, under its published name: mit-semseg data download ade20k [--to DIR].
#
#   PYTHON=path/to/python bash download_ADE20K.sh
set -euo pipefail
cd "$(dirname "$0")"
exec "${PYTHON:-python}" -m mit_semseg.cli data download ade20k "$@"
