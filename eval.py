"""Evaluate in a single process: python eval.py --gpus 0 --cfg FILE."""

import sys

from mit_semseg.cli import script

if __name__ == "__main__":
    sys.exit(script("eval", "--single-process"))
