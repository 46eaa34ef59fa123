"""Train a model: python train.py --gpus 0-3 --cfg FILE [KEY value ...]"""

import sys

from mit_semseg.cli import script

if __name__ == "__main__":
    sys.exit(script("train"))
