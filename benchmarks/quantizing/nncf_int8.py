"""NNCF's post-training int8, in an environment of its own: ``python nncf_int8.py FOLDER METHOD TRANSFORMER PATH``.

FOLDER holds "float.onnx", "learned.npz" and "asked.npz". The integer model goes to PATH (ONNX) or beside it (OpenVINO), its answers to
what is asked beside it as npy. It imports nothing of Shohin.
"""

import json
import sys
from pathlib import Path

import nncf
import numpy as np
import onnx
import openvino as ov
import torch
from archives import batches
from costs import Costs
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

ADVANCED = {"nncf: openvino, overflow fix": AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE)}
CPU = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}


def tiny() -> tuple[torch.nn.Module, list[dict[str, np.ndarray]]]:
    """What everything is imported by."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4)).eval()
    return model, [{"x": np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)}]


def quantized(model, samples: list, method: str, transformer: bool):
    """One sample at a time, as its documentation shows."""
    options = {"subset_size": len(samples), "fast_bias_correction": method != "nncf: openvino, accurate bias"}
    if method in ADVANCED:
        options["advanced_parameters"] = ADVANCED[method]
    if transformer:
        options["model_type"] = nncf.ModelType.TRANSFORMER
    return nncf.quantize(model, nncf.Dataset(samples), **options)


def main() -> None:
    """The command."""
    folder, method, transformer, out = Path(sys.argv[1]), sys.argv[2], bool(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    core = ov.Core()
    core.set_property("CPU", CPU)
    small, little = tiny()
    named = {name: t[i : i + 1] for batch in batches(folder / "learned.npz") for name, t in batch.items() for i in [0]}
    samples = [{n: t[i : i + 1] for n, t in b.items()} for b in batches(folder / "learned.npz") for i in range(len(b[next(iter(named))]))]
    if method == "nncf: onnx":
        import tempfile

        with tempfile.TemporaryDirectory() as place:
            torch.onnx.export(small, (torch.zeros(1, 3, 8, 8),), place + "/t.onnx", dynamo=False, input_names=["x"])
            quantized(onnx.load(place + "/t.onnx"), little, method, False)
        with Costs() as costs:
            made = quantized(onnx.load(str(folder / "float.onnx")), samples, method, transformer)
        onnx.save(made, str(out))
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])
        answers = [session.run(None, batch)[0] for batch in batches(folder / "asked.npz")]
        size = out.stat().st_size
    else:
        quantized(ov.convert_model(small, example_input=torch.zeros(1, 3, 8, 8)), [b["x"] for b in little], method, False)
        with Costs() as costs:
            made = quantized(core.read_model(str(folder / "float.onnx")), samples, method, transformer)
        path = out
        ov.save_model(made, str(path), compress_to_fp16=False)
        runner = core.compile_model(str(path), "CPU", CPU)
        answers = [runner(batch)[0] for batch in batches(folder / "asked.npz")]
        size = path.with_suffix(".bin").stat().st_size
    np.save(out.with_suffix(".npy"), np.concatenate(answers))
    print(json.dumps({"seconds": costs.seconds, "megabytes": costs.megabytes, "bytes": size}))


if __name__ == "__main__":
    main()
