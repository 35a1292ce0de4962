"""One run: ``python -m distilling TASK STUDENT METHOD SEED``, a JSON record as the last line."""

import json
import sys

import torch

from distilling import minilm
from distilling.learning import learn
from distilling.tasks import TASKS

if __name__ == "__main__":
    torch.set_num_threads(1)
    name, student, method, seed = sys.argv[1:]
    if name == "minilm":
        torch.set_flush_denormal(True)
        found = minilm.record(method, int(seed), minilm.STUDENTS[student])
    else:
        found = learn(TASKS[name], student, method, int(seed))
    print(json.dumps(found | {"student": student}))
