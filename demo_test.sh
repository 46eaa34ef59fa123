#!/usr/bin/env bash
# The quick start. By default, without a network: renders street scenes, trains, evaluates, predicts
# and writes the results to demo/index.html. With --ade20k: downloads the published ADE20K model and
# a photograph, and predicts. With DOWNLOAD_ONLY=1, as published: only downloads these.
#
#   [DOWNLOAD_ONLY=1] PYTHON=path/to/python bash demo_test.sh [--ade20k]
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
record=/dev/null

# Print a command, run it, and record its time for the page.
run() {
    echo
    echo "\$ $*"
    local began=$SECONDS
    "$PYTHON" "${@:2}"
    printf '%s\t%s\n' "$((SECONDS - began))" "$*" >>"$record"
}

ade20k() {
    local name=ade20k-resnet50dilated-ppm_deepsup image
    local folder=ckpt/$name
    echo "Downloading the published $name (about 190 MB) and a photograph to $folder"
    if ! image=$("$PYTHON" - "$name" "$folder" <<'PYTHON'
import sys

from mit_semseg.weights import fetch_published

try:
    image = fetch_published(*sys.argv[1:])[-1]
except (OSError, RuntimeError, ValueError) as error:
    sys.exit(f"error: {error}")
print(image)
PYTHON
    ); then
        echo "The published files could not be downloaded and verified. Without a network, run" >&2
        echo "demo_test.sh without --ade20k, or copy the three files to $folder." >&2
        exit 1
    fi
    image=${image##*$'\n'}
    cp "$image" .
    [ -z "${DOWNLOAD_ONLY:-}" ] || return 0
    run python test.py --imgs "$image" --cfg "config/$name.yaml" \
        DIR "$folder" TEST.result "$folder/result" TEST.save "['side','legend']"
    echo "The results are in $folder/result"
}

streets() {
    record=demo/commands.tsv
    rm -rf demo/data demo/ckpt demo/evaluation demo/predictions "$record"
    run python -m mit_semseg.cli demo render --out demo/data
    run python train.py --gpus cpu --cfg config/demo.yaml
    run python eval_multipro.py --gpus cpu --workers 2 --cfg config/demo.yaml --out demo/evaluation
    run python test.py --imgs demo/data/images/validation --gpu cpu --cfg config/demo.yaml
    run python -m mit_semseg.cli demo page --commands "$record"
    echo "Total time: $SECONDS s"
}

case "${1:-}" in
"" | --ade20k) ;;
*)
    echo "usage: [DOWNLOAD_ONLY=1] demo_test.sh [--ade20k]" >&2
    exit 2
    ;;
esac
if [ -n "${1:-}${DOWNLOAD_ONLY:-}" ]; then
    ade20k
else
    mkdir -p demo
    streets
fi
