"""The class of each image to sample."""

from collections.abc import Sequence

import numpy as np

from common.errors import UserError, print_once


def choose_labels(
    classes: str, count: int, num_classes: int, class_counts: Sequence[int] | None, seed: int
) -> np.ndarray:
    """Class ids, (count,), each a function of the seed and the image number.

    Args:
        classes: `random` (uniform), `data` (as frequent as in the training data), `balanced` (each class in turn), or
            a list of ids to cycle through. All but a list leave out classes without training images.
        count: number of images.
        num_classes: class ids are 0 to num_classes - 1.
        class_counts: training images per class, if known.
        seed: of the random choices.

    Raises:
        UserError: for a list with anything but class ids, and for `data` without known counts.
    """
    counts = np.ones(num_classes) if class_counts is None else np.asarray(class_counts, dtype=np.float64)
    present = np.flatnonzero(counts)
    if classes == "balanced":
        return np.resize(present, count)
    if classes in ("random", "data"):
        if classes == "data" and class_counts is None:
            raise UserError("--classes data: the checkpoint does not say how frequent its classes are; give random")
        weights = (counts > 0).astype(np.float64) if classes == "random" else counts
        edges = np.cumsum(weights) / weights.sum()
        # Not the stream of the image's noise, which never reaches the top word of the counter.
        keys = (np.array([seed, i], dtype=np.uint64) for i in range(count))  # from 2^63 on a list becomes floats
        streams = (np.random.Philox(key=key, counter=[0, 0, 0, 1]) for key in keys)
        uniforms = np.array([np.random.Generator(stream).random() for stream in streams])
        return np.searchsorted(edges, uniforms, side="right").clip(max=present[-1])
    words = classes.replace(",", " ").split()
    if not words or any(not word.isdecimal() or int(word) >= num_classes for word in words):
        ids = f"class ids in 0..{num_classes - 1} such as 0,{num_classes - 1}"
        raise UserError(f"--classes {classes!r}: give random, data, balanced, or {ids}")
    ids = [int(word) for word in words]
    if empty := sorted(set(ids) - set(present.tolist())):
        print_once(f"warning: --classes names {', '.join(map(str, empty))}, of which the training data had no image")
    return np.resize(ids, count)


def empty_classes(class_counts: Sequence[int] | None) -> list[int]:
    """Classes without training images; none if the counts are not known."""
    return [label for label, count in enumerate(class_counts or []) if not count]
