"""NNCF's weight compression of an exported PyTorch program in OpenVINO, in an environment of its own: ``python nncf_weights.py FILE WAY BATCHES TEXTS OUT``.

BATCHES: an npz of calibration batches ("0:input_ids", ...). TEXTS: an npz of batches to answer. OUT: an npz of the answers in OpenVINO, computed in float32, with the bytes of the compressed weights file. It imports nothing of Shohin.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
import torch
from archives import batches

#: as its documentation offers them; the last is all of them together
WAYS = {
    "plain": {},
    "awq": {"awq": True},
    "scale estimation": {"scale_estimation": True},
    "gptq": {"gptq": True},
    "awq, scale estimation, gptq": {"awq": True, "scale_estimation": True, "gptq": True},
}


def main() -> None:
    """The command."""
    file, way, learned, asked, out = sys.argv[1:]
    core = ov.Core()
    model = ov.convert_model(torch.export.load(file))
    options = dict(WAYS[way])
    if options:
        options["dataset"] = nncf.Dataset(batches(learned))
    began = time.process_time()
    compressed = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=32,
        ratio=1.0,
        ignored_scope=nncf.IgnoredScope(types=["Gather"], validate=False),
        all_layers=True,
        **options,
    )
    seconds = time.process_time() - began
    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(compressed, str(Path(folder) / "m.xml"), compress_to_fp16=False)
        size = (Path(folder) / "m.bin").stat().st_size
    runner = core.compile_model(
        compressed, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    )
    vectors = [runner(batch)[0] for batch in batches(asked)]
    types = sorted(
        {str(c.get_element_type()) for c in compressed.get_ops() if c.get_type_name() == "Constant" and c.get_data().size > 10000}
    )
    np.savez(out, **{f"v{i}": v for i, v in enumerate(vectors)})
    print(json.dumps({"bytes": size, "seconds": round(seconds, 1), "types": types}))


if __name__ == "__main__":
    main()
