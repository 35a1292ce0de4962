"""ModelOpt's FastNAS, in its own environment: ``python -m cutting.fastnas MODEL BUDGET SEED FILE`` writes the cut model's tensors.

With its default divisor of 32 these networks have hardly anything to prune, so it is 8 here. Its search counts other
FLOPs than Shohin's MACs, so its constraint is lowered until the one counter agrees; the sensitivity map, which is what costs, is kept.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cutting.common import Found, Unreachable, Work, quick_macs, work
from cutting.originals import ORIGINALS
from records import process

DIVISOR = 8
#: samples of validation that its score is of
SCORED = 2000
#: batches that its queue holds, and samples of one of ours there
QUEUE, SMALL = 50, 16
#: how often the constraint may be lowered
TRIES = 8


def fastnas(work: Work) -> Found:
    """Runs this file in ModelOpt's environment.

    Raises:
        Unreachable: if it says that its constraint cannot be met.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cut.safetensors"
        record = process("cutting.fastnas", (work.original.name, work.budget, work.seed, path), "modelopt", "benchmark-pruning")
        if isinstance(record, str):
            raise RuntimeError(record)
        if "unreachable" in record:
            raise Unreachable(record["unreachable"])
        model = reshaped(work.model, load_file(str(path)))
    return Found(model, record["score"], record["cut"], notes={"constraint": record["constraint"]})


def reshaped(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """A copy with these tensors: sizes of convolutions, linear layers and batch normalizations follow from theirs."""
    made = copy.deepcopy(model)
    for name, module in made.named_modules():
        for key in [*module._parameters, *module._buffers]:
            tensor = state.get(f"{name}.{key}" if name else key)
            if tensor is None:
                continue
            if key in module._parameters:
                module._parameters[key] = nn.Parameter(tensor)
            else:
                module._buffers[key] = tensor
        if isinstance(module, nn.modules.conv._ConvNd):
            depthwise = module.groups > 1
            module.out_channels = module.weight.shape[0]
            module.groups = module.weight.shape[0] if depthwise else 1
            module.in_channels = module.weight.shape[1] * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.num_features = len(module.weight)
    return made.eval()


def _config(mtp: Any) -> Any:
    config = mtp.fastnas.FastNASConfig()
    for kind in ("nn.Conv1d", "nn.Conv2d"):
        config[kind]["*"]["channel_divisor"] = DIVISOR
    for kind in ("nn.Linear", "nn.BatchNorm1d", "nn.BatchNorm2d"):
        config[kind]["*"]["feature_divisor"] = DIVISOR
    return config


def filling(work: Work) -> list[tuple[Tensor, Tensor]]:
    """The samples in small batches, again and again until its queue for normalization statistics is full: else it warns and has none."""
    x, y = (torch.cat([call.batch[i] for call in work.calls]) for i in (0, 1))
    batches = list(zip(x.split(SMALL), y.split(SMALL), strict=True))  # type: ignore[no-untyped-call]
    batches = [batch for batch in batches if len(batch[1]) == SMALL] or batches
    return batches * math.ceil(QUEUE / len(batches))


def _cut(work: Work, share: float, checkpoint: Path) -> nn.Module:
    """One search with the constraint at ``share`` of its own FLOPs."""
    mtp: Any = import_module("modelopt.torch.prune")

    validation, seen = [], 0
    for call in work.data.calls("validation", SCORED):
        validation.append(call)
        seen += call.size

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(int((model(*call.args).argmax(-1) == call.target).sum()) for call in validation) / seen

    settings = {
        "data_loader": filling(work),
        "collect_func": lambda batch: batch[0],
        "score_func": score,
        "checkpoint": str(checkpoint),
        "verbose": False,
    }
    model, _ = mtp.prune(
        copy.deepcopy(work.model),
        mode=[("fastnas", _config(mtp))],
        constraints={"flops": f"{100 * share:.4f}%"},
        dummy_input=work.example[:1],
        config=settings,
    )
    found: nn.Module = model
    return found.eval()


def searched(work: Work) -> tuple[dict[str, Any], nn.Module | None]:
    """The record and the model, with a constraint that the one counter finds met."""
    allowed = work.budget * quick_macs(work.model, work.example)
    share, seconds = work.budget, []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(TRIES):
            began = time.process_time()
            try:
                model = _cut(work, share, Path(folder) / "search.pth")
            except (ValueError, AssertionError) as error:
                return {"unreachable": f"constraint {share:.3f}: {str(error)[:300]}"}, None
            seconds.append(time.process_time() - began)
            left = quick_macs(model, work.example)
            if left <= allowed:
                score = seconds[0] - (seconds[-1] if len(seconds) > 1 else 0.0)
                return {"score": round(score, 3), "cut": round(seconds[-1] if len(seconds) > 1 else 0.0, 3), "constraint": share}, model
            share *= min(allowed / left, 0.99)
    return {"unreachable": f"{TRIES} constraints, the last {share:.3f}, left too much"}, None


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, budget, seed, file = sys.argv[1:]
    random.seed(int(seed))
    with contextlib.redirect_stdout(sys.stderr):
        torch.manual_seed(int(seed))
        record, model = searched(work(ORIGINALS[name], float(budget), int(seed)))
    if model is not None:
        save_file({key: tensor.detach().clone().contiguous() for key, tensor in model.state_dict().items()}, file)
    print(json.dumps(record))
