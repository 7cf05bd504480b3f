"""Splits are fixed, stratified and disjoint; clutter is deterministic and leaks no source; errors help."""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from torch import Tensor

from nni_dbs import data
from nni_dbs.data import (
    DATASETS,
    DataError,
    Splits,
    digits,
    digits_clutter,
    imagefolder,
    loader,
    split_in_two,
)

SMALL = {"train_size": 200, "validation_size": 40, "test_size": 50}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Many small tensors: threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images_of(dataset: data.ImageTensors) -> set[bytes]:
    return {image.numpy().tobytes() for image in dataset.images}


def labels_of(dataset: torch.utils.data.Dataset) -> list[int]:
    return [dataset[i][1] for i in range(len(dataset))]


# digits


def test_digits_shapes_and_normalisation() -> None:
    splits = digits()
    image, label = splits.train[0]
    assert image.shape == splits.input_shape == (3, 32, 32)
    assert image.dtype == torch.float32 and isinstance(label, int)
    batch = torch.stack([splits.train[i][0] for i in range(len(splits.train))])
    assert abs(batch.mean()) < 1e-3 and abs(batch.std() - 1) < 1e-3
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 1797


def test_digits_splits_are_disjoint_fixed_and_stratified() -> None:
    first, again, other = digits(seed=3), digits(seed=3), digits(seed=4)
    parts = [images_of(part) for part in (first.train, first.validation, first.test)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert torch.equal(first.train.images, again.train.images)
    assert images_of(first.test) != images_of(other.test)
    for part, fraction in ((first.train, 0.6), (first.validation, 0.15), (first.test, 0.25)):
        counts = Counter(labels_of(part))
        assert len(counts) == 10
        assert all(abs(count - 179.7 * fraction) < 5 for count in counts.values())


def test_digits_shift_moves_training_images_only() -> None:
    plain, shifted = digits(), digits(max_shift=2)
    torch.manual_seed(0)
    same = [torch.equal(plain.train[i][0], shifted.train[i][0]) for i in range(20)]
    assert not all(same)
    assert shifted.train[0][0].shape == (3, 32, 32)
    assert torch.equal(plain.test[0][0], shifted.test[0][0])


# digits-clutter


def test_clutter_sizes_and_labels() -> None:
    splits = digits_clutter(**SMALL)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (200, 40, 50)
    assert splits.train[0][0].shape == splits.input_shape == (3, 32, 32)
    assert set(labels_of(splits.train)) == set(range(10)) and splits.num_classes == 10


def test_clutter_sample_depends_on_seed_split_and_index_alone() -> None:
    splits, again = digits_clutter(**SMALL), digits_clutter(**SMALL)
    larger, other = digits_clutter(**{**SMALL, "train_size": 300}), digits_clutter(seed=1, **SMALL)
    assert torch.equal(splits.train.images, again.train.images)
    assert torch.equal(splits.train.images, larger.train.images[:200])
    assert torch.equal(splits.train.labels, larger.train.labels[:200])
    assert torch.equal(splits.test.images, larger.test.images)
    assert not torch.equal(splits.train.images, other.train.images)
    assert not images_of(splits.train) & (images_of(splits.validation) | images_of(splits.test))


def test_clutter_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    digits_clutter(**SMALL)
    assert torch.equal(before, torch.get_rng_state())


def test_clutter_sources_are_disjoint() -> None:
    parts = [{image.numpy().tobytes() for image in images} for images, _ in data._digit_sources(0)]
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 1797


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_clutter_split_uses_its_own_sources_only(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank the sources of the other splits: this split stays as it was, the others lose all strokes."""

    def images(splits: Splits) -> list[Tensor]:
        return [part.images for part in (splits.train, splits.validation, splits.test)]

    sources = data._digit_sources(0)
    whole = images(digits_clutter(**SMALL, noise=0))
    blanked = [
        (pixels if split == kept else torch.zeros_like(pixels), labels)
        for split, (pixels, labels) in enumerate(sources)
    ]
    monkeypatch.setattr(data, "_digit_sources", lambda seed: blanked)
    for split, part in enumerate(images(digits_clutter(**SMALL, noise=0))):
        assert torch.equal(part, whole[split]) if split == kept else not part.any()


@pytest.mark.parametrize("option", [{"test_size": 0}, {"train_size": -1}, {"noise": -0.1}, {"seed": -1}])
def test_clutter_refuses_impossible_options(option: dict) -> None:
    with pytest.raises(DataError, match="digits-clutter"):
        digits_clutter(**option)


# loader


def test_loader_order_depends_on_its_seed_and_not_on_workers() -> None:
    train = digits_clutter(**SMALL).train

    def order(seed: int, workers: int = 0) -> Tensor:
        return torch.cat(
            [images for images, _ in loader(train, 64, shuffle=True, seed=seed, workers=workers)]
        )

    assert torch.equal(order(1), order(1))
    assert torch.equal(order(1), order(1, workers=2))
    assert not torch.equal(order(1), order(2))


def test_loader_refuses_what_has_no_batch() -> None:
    train = digits().train
    with pytest.raises(DataError, match="check its folder"):
        loader(torch.utils.data.Subset(train, []), 8)
    with pytest.raises(DataError, match="lower the batch size"):
        loader(train, 5000, drop_last=True)
    assert len(loader(train, 5000)) == 1


# CIFAR

CIFAR = {
    "cifar10": (torchvision.datasets.CIFAR10, "labels", 10),
    "cifar100": (torchvision.datasets.CIFAR100, "fine_labels", 100),
}


@pytest.fixture(params=CIFAR)
def tiny_cifar(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Writes CIFAR's own files with few images below tmp_path and returns the data set's name."""
    source, key, classes = CIFAR[request.param]
    folder = tmp_path / source.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for part in ("train_list", "test_list"):
        sums = []
        for name, _ in getattr(source, part):
            labels = [label for label in range(classes) for _ in range(10)]
            pixels = generator.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
            sums.append([name, write(name, {"data": pixels, key: labels})])
        monkeypatch.setattr(source, part, sums)
    names = {source.meta["key"]: [str(label) for label in range(classes)]}
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": write(source.meta["filename"], names)})
    return request.param


def test_cifar(tiny_cifar: str, tmp_path: Path) -> None:
    splits = DATASETS[tiny_cifar](root=tmp_path, validation_fraction=0.2)
    classes = CIFAR[tiny_cifar][2]
    total = 500 if tiny_cifar == "cifar10" else 1000
    assert (len(splits.train), len(splits.validation)) == (0.8 * total, 0.2 * total)
    assert splits.num_classes == classes and splits.train[0][0].shape == splits.input_shape == (3, 32, 32)
    assert set(Counter(labels_of(splits.validation)).values()) == {total // classes // 5}
    assert not set(splits.train.indices) & set(splits.validation.indices)
    again = DATASETS[tiny_cifar](root=str(tmp_path), validation_fraction=0.2)
    other = DATASETS[tiny_cifar](root=tmp_path, validation_fraction=0.2, seed=1)
    assert splits.validation.indices == again.validation.indices != other.validation.indices


def test_cifar_augments_training_images_only(tiny_cifar: str, tmp_path: Path) -> None:
    splits = DATASETS[tiny_cifar](root=tmp_path)
    torch.manual_seed(0)
    assert len({splits.train[0][0].numpy().tobytes() for _ in range(8)}) > 1
    for part in (splits.validation, splits.test):
        assert len({part[0][0].numpy().tobytes() for _ in range(8)}) == 1


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_missing_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cifar-10.* is missing or damaged.*download=True"):
        DATASETS[name](root=tmp_path)


@pytest.mark.parametrize("fraction", [0, 1, -0.5])
def test_cifar_refuses_fraction(tiny_cifar: str, tmp_path: Path, fraction: float) -> None:
    with pytest.raises(DataError, match="validation_fraction"):
        DATASETS[tiny_cifar](root=tmp_path, validation_fraction=fraction)


# two parts


class Plain(torch.utils.data.Dataset):
    """Items alone, without a list of labels."""

    def __init__(self, labels: list[int]) -> None:
        self.pairs = [(torch.full((1,), float(i)), label) for i, label in enumerate(labels)]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pairs[index]


LABELS = [0] * 20 + [1] * 40 + [2] * 10


def with_list(name: str, labels: object) -> Plain:
    dataset = Plain([9] * len(LABELS))  # what the items say is not asked
    setattr(dataset, name, labels)
    return dataset


@pytest.mark.parametrize("share", [0.5, 0.1])
@pytest.mark.parametrize(
    "dataset",
    [
        Plain(LABELS),
        with_list("targets", LABELS),
        with_list("labels", torch.tensor(LABELS)),
        with_list("targets", np.array(LABELS)),
        torch.utils.data.Subset(Plain([7, 7, *LABELS]), range(2, 72)),
        data.Transformed(with_list("targets", [7, *LABELS]), range(1, 71), lambda image: image),
    ],
)
def test_two_parts_divide_every_class_alike(dataset: torch.utils.data.Dataset, share: float) -> None:
    left, second = split_in_two(dataset, share)
    assert isinstance(left, torch.utils.data.Subset) and isinstance(second, torch.utils.data.Subset)
    assert sorted([*left.indices, *second.indices]) == list(range(70))
    counts = Counter(LABELS[i] for i in second.indices)
    assert counts == {0: 20 * share, 1: 40 * share, 2: 10 * share}
    assert second[0] is not None and len(left) == 70 * (1 - share)


def test_two_parts_depend_on_the_seed_alone() -> None:
    def second(seed: int) -> list[int]:
        return list(split_in_two(Plain(LABELS), 0.5, seed)[1].indices)  # type: ignore[attr-defined]

    torch.manual_seed(1)
    first = second(3)
    torch.manual_seed(2)
    assert second(3) == first != second(4)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_shares_that_leave_nothing_are_refused(share: float) -> None:
    with pytest.raises(DataError, match="must lie between 0 and 1"):
        split_in_two(Plain(LABELS), share)


def test_too_few_samples_for_two_parts() -> None:
    with pytest.raises(DataError, match="2 samples cannot be split at 10%; give more data"):
        split_in_two(Plain([0, 1]), 0.1)


# imagefolder


def write_images(folder: Path, per_class: int, classes: tuple[str, ...] = ("cat", "dog")) -> None:
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


@pytest.mark.parametrize("test_folder", ["val", "test"])
def test_imagefolder(tmp_path: Path, test_folder: str) -> None:
    write_images(tmp_path / "train", 20)
    write_images(tmp_path / test_folder, 3)
    splits = imagefolder(tmp_path, image_size=16)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (36, 4, 6)
    assert Counter(labels_of(splits.validation)) == {0: 2, 1: 2} and splits.num_classes == 2
    assert not set(splits.train.indices) & set(splits.validation.indices)
    assert splits.validation.indices == imagefolder(tmp_path, image_size=16).validation.indices
    for part in (splits.train, splits.validation, splits.test):
        assert part[0][0].shape == splits.input_shape == (3, 16, 16)
    assert torch.equal(splits.test[0][0], splits.test[0][0])


def test_imagefolder_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold one folder of images per class"):
        imagefolder(tmp_path)
    write_images(tmp_path / "train", 2)
    with pytest.raises(DataError, match="val must hold"):
        imagefolder(tmp_path)
    write_images(tmp_path / "val", 2, ("cat", "cow"))
    with pytest.raises(DataError, match="different class folders"):
        imagefolder(tmp_path)
