"""Predict for images: python test.py --imgs PATH --gpu 0 --cfg FILE"""

import sys

from mit_semseg.cli import script

if __name__ == "__main__":
    sys.exit(script("predict"))
