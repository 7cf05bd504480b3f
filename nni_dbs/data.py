"""Data sets for the shell, the examples and the tests: training, search-validation and test data.

A search trains on `Splits.train` and scores candidates on `Splits.validation`. `Splits.test` is for the final
number alone. Every split is fixed by a seed. Pass any other data set through your own evaluator instead.

Random augmentation (`cifar10`, `cifar100`, `imagefolder`, `digits` with `max_shift`) is torchvision's and
draws from torch's global generator. With `workers` the loader's seed fixes it; without, seed that generator
yourself, and save its state with a checkpoint. Nothing else here touches it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.datasets
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from nni_dbs.errors import DataError

CANVAS = 32  # side of the images of `digits` and `digits_clutter`

# Difficulty of `digits_clutter`, chosen by examples/benchmarks/clutter_difficulty.py
_CHUNK = 256  # samples that share one random generator
_DIGIT_SIDES = (14.0, 24.0)  # pixels on the canvas that an 8x8 source covers
_MAX_ANGLE = math.radians(30)
_MIN_BRIGHTNESS = 0.4  # of a colour channel; the maximum is 1
_FRAGMENT_SIDE = 3  # source pixels
_SPLIT_FRACTIONS = (0.6, 0.15, 0.25)  # of the 1797 digits: train, validation, test

_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Splits:
    """The three parts of a data set; items are (image (C, H, W) float, label int).

    Attributes:
        train: what sub-networks are trained on, with augmentation where there is any.
        validation: what a search scores candidates on, without augmentation.
        test: for the final number; a search never sees it.
        num_classes: labels run from 0 to num_classes - 1.
        input_shape: (C, H, W) of an image.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    num_classes: int
    input_shape: tuple[int, int, int]


class ImageTensors(Dataset):
    """Images held in memory as bytes and normalised when read.

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N,) int64.
        mean: subtracted from pixels in [0, 1].
        std: divides the result.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: float, std: float) -> None:
        self.images, self.labels = images, labels
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Sample `index`: image (3, H, W) float32 and its label."""
        return (self.images[index].float() / 255 - self.mean) / self.std, int(self.labels[index])


class Transformed(Dataset):
    """The chosen items of a data set, each image passed through `transform`.

    Two views of one data set can so have different transforms, as training and validation parts need.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int], transform: Callable[[Any], Tensor]) -> None:
        self.dataset, self.indices, self.transform = dataset, list(indices), transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Item `index` of the chosen ones: transformed image (C, H, W) and its label."""
        image, label = self.dataset[self.indices[index]]
        return self.transform(image), label


def loader(
    dataset: Dataset,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
) -> DataLoader:
    """Batches of a data set, in an order that depends on `seed` alone.

    Use `drop_last` in training, where a last batch of one sample would break batch normalisation.

    Raises:
        DataError: there would be no batch.
    """
    size = len(dataset)  # type: ignore[arg-type]
    if size == 0:
        raise DataError("the data set is empty; check its folder and its validation fraction")
    if drop_last and size < batch_size:
        raise DataError(f"{size} samples make no batch of {batch_size}; lower the batch size")
    return DataLoader(
        dataset,
        batch_size,
        shuffle=shuffle,
        num_workers=workers,
        drop_last=drop_last,
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=workers > 0,
    )


def split_in_two(dataset: Dataset, share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Two parts of a training set, every class divided alike: what is left, and `share` of it.

    For the methods that train an architecture on data of its own (TAS halves the training set, DSA takes a
    tenth). Labels are read from `labels` or `targets` of the data set, else from its items.

    Args:
        dataset: Items are (image, label).
        share: Of the second part, in (0, 1).
        seed: Fixes the parts.

    Raises:
        DataError: The share is not between 0 and 1, or a part would be empty.
    """
    if not 0 < share < 1:
        raise DataError(f"the share of the second part is {share}; it must lie between 0 and 1")
    first, second = _stratified_split(_labels(dataset), (1 - share, share), seed)
    if not first or not second:
        raise DataError(f"{len(first) + len(second)} samples cannot be split at {share:.0%}; give more data")
    return Subset(dataset, first), Subset(dataset, second)


def _labels(dataset: Any) -> list[int]:
    if isinstance(dataset, (Transformed, Subset)):
        labels = _labels(dataset.dataset)
        return [labels[i] for i in dataset.indices]
    for name in ("labels", "targets"):
        if hasattr(dataset, name):
            return torch.as_tensor(getattr(dataset, name)).tolist()
    return [int(dataset[i][1]) for i in range(len(dataset))]


def digits(seed: int = 0, max_shift: int = 0) -> Splits:
    """scikit-learn's 1797 handwritten digits, enlarged to 3x32x32: real data, with nothing to download.

    Small networks reach 98 % and more, so use it for smoke runs and `digits_clutter` to compare widths.

    Args:
        seed: fixes the split.
        max_shift: training images move by up to this many pixels each way.
    """
    parts = []
    for sources, labels in _digit_sources(seed):
        large = F.interpolate(sources, size=(CANVAS, CANVAS), mode="bilinear", align_corners=False)
        parts.append((_to_bytes(large), labels))
    train, validation, test = _normalised(parts)
    if max_shift:
        shift = transforms.RandomCrop(CANVAS, padding=max_shift, padding_mode="edge")
        train = Transformed(train, range(len(train)), shift)
    return Splits(train, validation, test, num_classes=10, input_shape=(3, CANVAS, CANVAS))


def digits_clutter(
    seed: int = 0,
    train_size: int = 8000,
    validation_size: int = 2000,
    test_size: int = 4000,
    fragments: int = 4,
    noise: float = 0.05,
) -> Splits:
    """A real digit somewhere on a 3x32x32 canvas among coloured fragments of other digits and noise.

    Hard enough that a network's width shows in its accuracy (examples/benchmarks/clutter_difficulty.py).
    Sample i of a split depends on (seed, split, i) alone, not on the sizes. The source digits are split
    before composing, those that fragments are cut from included, so that no source serves two splits. All
    samples are composed at once and kept as bytes (43 MB and a few seconds at the default sizes).

    Args:
        seed: fixes the split of the sources and every sample.
        train_size: samples; likewise validation_size and test_size.
        fragments: distractors per image; more are harder.
        noise: standard deviation of the pixel noise, where white is 1.

    Raises:
        DataError: a size is below 1, or the seed, the number of fragments or the noise is negative.
    """
    sizes = (train_size, validation_size, test_size)
    if min(sizes) < 1:
        raise DataError(f"digits-clutter needs at least one sample in each split, not {sizes}")
    if min(seed, fragments, noise) < 0:
        raise DataError("seed, fragments and noise of digits-clutter must be 0 or more")
    parts = []
    for split, (sources, labels) in enumerate(_digit_sources(seed)):
        chunks = [
            _compose(sources, labels, _generator(seed, split, chunk), fragments, noise)
            for chunk in range(math.ceil(sizes[split] / _CHUNK))
        ]
        images, targets = (torch.cat(tensors)[: sizes[split]] for tensors in zip(*chunks, strict=True))
        parts.append((images, targets))
    train, validation, test = _normalised(parts)
    return Splits(train, validation, test, num_classes=10, input_shape=(3, CANVAS, CANVAS))


def cifar10(root: str | Path, validation_fraction: float = 0.1, seed: int = 0) -> Splits:
    """CIFAR-10 from files that are already there; training images are cropped and flipped at random.

    Args:
        root: folder that holds `cifar-10-batches-py`.
        validation_fraction: share of the training set held out for the search.
        seed: fixes which images are held out.

    Raises:
        DataError: the files are missing or damaged, or the fraction is not between 0 and 1.
    """
    return _cifar(torchvision.datasets.CIFAR10, 10, Path(root), validation_fraction, seed)


def cifar100(root: str | Path, validation_fraction: float = 0.1, seed: int = 0) -> Splits:
    """CIFAR-100, as `cifar10`; `root` holds `cifar-100-python`."""
    return _cifar(torchvision.datasets.CIFAR100, 100, Path(root), validation_fraction, seed)


def imagefolder(
    root: str | Path, image_size: int = 224, validation_fraction: float = 0.1, seed: int = 0
) -> Splits:
    """Your own images, in one folder per class: `root/train/CLASS/*.png` and `root/val/CLASS/*.png`.

    The given `val` (or `test`) folder is the test set; the search's validation part is held out from `train`.

    Args:
        root: folder with `train` and `val` (or `test`; `test` wins where both are there).
        image_size: side of the square that a network sees.
        validation_fraction: share of `train` held out for the search.
        seed: fixes which images are held out.

    Raises:
        DataError: a folder is missing or has no images, the classes of the two folders differ,
            or the fraction is not between 0 and 1.
    """
    root = Path(root)
    train_root = root / "train"
    test_root = root / "test" if (root / "test").is_dir() else root / "val"
    train_images, test_images = _image_folder(train_root), _image_folder(test_root)
    if train_images.classes != test_images.classes:
        raise DataError(f"{train_root} and {test_root} have different class folders; make them the same")
    normalise = transforms.Normalize(_IMAGENET_MEAN, _IMAGENET_STD)
    augmented = transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            normalise,
        ]
    )
    plain = transforms.Compose(
        [
            transforms.Resize(round(image_size * 256 / 224)),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            normalise,
        ]
    )
    kept, held_out = _hold_out(train_images.targets, validation_fraction, seed)
    return Splits(
        Transformed(train_images, kept, augmented),
        Transformed(train_images, held_out, plain),
        Transformed(test_images, range(len(test_images)), plain),
        num_classes=len(train_images.classes),
        input_shape=(3, image_size, image_size),
    )


DATASETS: dict[str, Callable[..., Splits]] = {
    "digits": digits,
    "digits-clutter": digits_clutter,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagefolder": imagefolder,
}


def _digit_sources(seed: int) -> list[tuple[Tensor, Tensor]]:
    """The 8x8 digits of train, validation and test: images (N, 1, 8, 8) in [0, 1] and labels (N,)."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16  # (1797, 1, 8, 8)
    labels = torch.from_numpy(bunch.target).long()
    parts = _stratified_split(bunch.target.tolist(), _SPLIT_FRACTIONS, seed)
    return [(images[part], labels[part]) for part in parts]


def _compose(
    sources: Tensor, labels: Tensor, generator: torch.Generator, fragments: int, noise: float
) -> tuple[Tensor, Tensor]:
    """A chunk of clutter made of `sources` (N, 1, 8, 8) only: images (_CHUNK, 3, 32, 32) uint8, labels."""
    chosen = torch.randint(len(sources), (_CHUNK,), generator=generator)
    canvas = _scatter(sources[chosen], generator, on_canvas=True)  # (_CHUNK, 3, 32, 32)
    for _ in range(fragments):
        cut = torch.randint(len(sources), (_CHUNK,), generator=generator)
        pieces = sources[cut] * _windows(generator)
        canvas = torch.maximum(canvas, _scatter(pieces, generator, on_canvas=False))
    canvas = canvas + noise * torch.randn(canvas.shape, generator=generator)
    return _to_bytes(canvas), labels[chosen]


def _windows(generator: torch.Generator) -> Tensor:
    """Masks (_CHUNK, 1, 8, 8) of one random square window each."""
    start = torch.randint(8 - _FRAGMENT_SIDE + 1, (_CHUNK, 2, 1), generator=generator)
    position = torch.arange(8)
    inside = (position >= start) & (position < start + _FRAGMENT_SIDE)  # (_CHUNK, 2, 8)
    return (inside[:, 0, :, None] & inside[:, 1, None, :]).unsqueeze(1)


def _scatter(images: Tensor, generator: torch.Generator, on_canvas: bool) -> Tensor:
    """Each image (_CHUNK, 1, 8, 8) at a random size, angle, place and colour: (_CHUNK, 3, 32, 32).

    With `on_canvas` the places are such that little of an image is lost over the edge.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(_CHUNK, *shape, generator=generator)

    scale = uniform(_DIGIT_SIDES[0], _DIGIT_SIDES[1]) / CANVAS
    angle = uniform(-_MAX_ANGLE, _MAX_ANGLE)
    centre = uniform(-1, 1, 2, 1)
    if on_canvas:
        centre = centre * (1 - 0.75 * scale)[:, None, None]  # strokes reach about 3/4 of a source's half side
    cos, sin = angle.cos() / scale, angle.sin() / scale
    turn = torch.stack([cos, sin, -sin, cos], dim=1).view(-1, 2, 2)  # canvas -> source coordinates
    grid = F.affine_grid(
        torch.cat([turn, -turn @ centre], dim=2), [len(images), 1, CANVAS, CANVAS], align_corners=False
    )  # (_CHUNK, 32, 32, 2)
    return F.grid_sample(images, grid, align_corners=False) * uniform(_MIN_BRIGHTNESS, 1, 3, 1, 1)


def _generator(*words: int) -> torch.Generator:
    """A generator of its own for every sequence of words."""
    seed = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))


def _to_bytes(images: Tensor) -> Tensor:
    """(N, C, H, W) in [0, 1] -> (N, 3, H, W) uint8; a single channel is repeated."""
    return (images.clamp(0, 1) * 255).round().byte().expand(-1, 3, -1, -1).contiguous()


def _normalised(parts: list[tuple[Tensor, Tensor]]) -> list[Any]:
    """One data set per part, normalised by the pixels of the first part."""
    pixels = parts[0][0].float() / 255
    mean, std = pixels.mean().item(), pixels.std().item()
    return [ImageTensors(images, labels, mean, std) for images, labels in parts]


def _cifar(source: type, num_classes: int, root: Path, validation_fraction: float, seed: int) -> Splits:
    folder = root / source.base_folder  # type: ignore[attr-defined]
    try:
        train_images, test_images = (source(root, train=train, download=False) for train in (True, False))
    except RuntimeError as error:
        raise DataError(
            f"{folder} is missing or damaged; give the root that holds it, or fetch it once with "
            f"torchvision.datasets.{source.__name__}({str(root)!r}, download=True)"
        ) from error
    plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize(_CIFAR_MEAN, _CIFAR_STD)])
    crop = transforms.RandomCrop(32, padding=4)
    augmented = transforms.Compose([crop, transforms.RandomHorizontalFlip(), plain])
    kept, held_out = _hold_out(train_images.targets, validation_fraction, seed)
    return Splits(
        Transformed(train_images, kept, augmented),
        Transformed(train_images, held_out, plain),
        Transformed(test_images, range(len(test_images)), plain),
        num_classes=num_classes,
        input_shape=(3, 32, 32),
    )


def _image_folder(folder: Path) -> Any:
    try:
        return torchvision.datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise DataError(f"{folder} must hold one folder of images per class: {error}") from error


def _hold_out(labels: Sequence[int], fraction: float, seed: int) -> list[list[int]]:
    """Indices that stay in the training set and indices held out of it."""
    if not 0 < fraction < 1:
        raise DataError(f"validation_fraction is {fraction}; it must lie between 0 and 1")
    return _stratified_split(labels, (1 - fraction, fraction), seed)


def _stratified_split(labels: Sequence[int], fractions: Sequence[float], seed: int) -> list[list[int]]:
    """Ascending indices per part; `fractions` (summing to 1) divide every class, to the nearest sample."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.as_tensor(labels)
    parts: list[list[int]] = [[] for _ in fractions]
    for label in target.unique():
        members = (target == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        bounds = (np.cumsum(fractions)[:-1] * len(members)).round().astype(int).tolist()
        for part, chunk in zip(parts, members.tensor_split(bounds), strict=True):
            part += chunk.tolist()
    return [sorted(part) for part in parts]
