"""Evaluate a model, one process per device: python eval_multipro.py --gpus 0-3 --cfg FILE"""

import sys

from mit_semseg.cli import script

if __name__ == "__main__":
    sys.exit(script("eval"))
