"""One run: ``python -m cutting MODEL BUDGET METHOD SEED [untrained]``, a JSON record as the last line."""

import json
import sys

import torch

from cutting.originals import ORIGINALS
from cutting.trial import trial

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    name, budget, method, seed, *rest = sys.argv[1:]
    print(json.dumps(trial(ORIGINALS[name], budget, method, int(seed), training=rest != ["untrained"])))
