"""Packed features of an SSL encoder, computed once: training then needs neither images nor encoder.

A folder written by `dataset_tools encode-ssl`, in the form of packed latents (see `storage/packed.py`):

    dataset.json          the manifest, written last: encoder, its weights' checksum, tokens, width
    features-00000.npy    (n, T, z) patch tokens, float16 or float32; with flips (n, 2, T, z), of the mirror image too
    ...
    names.json            N image names, in the order of the shards
    checksums.npy         (N, 1) uint32 CRC-32 of each row
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from storage.official import FileLatents, pairing_name
from storage.packed import LATENTS, Layout, MappedRows, PackedFolder, PackedLatents, checked_indices

SHARED = ("count", "resolution", "dtype", "flip", "names", "checksums", "shards")  # with packed latents
FIELDS: dict[str, Callable[[Any], bool]] = {key: LATENTS.fields[key] for key in SHARED} | {
    "tokens": LATENTS.fields["count"],
    "width": LATENTS.fields["count"],
    "encoder": lambda name: isinstance(name, str),
    "weights_sha256": lambda digest: isinstance(digest, str),
}
FEATURES = Layout("deepflow-packed-features", 1, FIELDS, "encode-ssl", "features")


class PackedFeatures(PackedFolder):
    """The packed features in folder `path`; its shards are memory-mapped, never read as a whole.

    Attributes:
        manifest: the content of `dataset.json`.
        encoder: its name.
        tokens, width: T and z.
        has_flips: whether there are features of the mirror images too.

    Raises:
        UserError: as `PackedLatents` does.
    """

    layout = FEATURES

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.encoder: str = self.manifest["encoder"]
        self.tokens: int = self.manifest["tokens"]
        self.width: int = self.manifest["width"]
        row = (self.tokens, self.width)
        shards = self._open_shards("shards", (2, *row) if self.has_flips else row, np.dtype(self.manifest["dtype"]))
        self._features = MappedRows(shards, row)  # with flips, two rows per sample

    def gather(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> np.ndarray:
        """Features of samples.

        Args:
            indices: (B,) ints.
            mirrored: (B,) bool: of which samples to take the mirror image.

        Returns:
            (B, T, z) in their stored dtype.

        Raises:
            IndexError: for an index outside [0, N).
            ValueError: for mirror images that the dataset lacks.
        """
        return self._features.gather(self._views(checked_indices(indices, len(self)), mirrored))

    def check_belongs(self, data: PackedLatents | FileLatents, tokens: int) -> None:
        """Check that these features and the latents `data` are of the same images, in the same order.

        Args:
            data: the latents; images and latents are paired by name, see `pairing_name`.
            tokens: the number T of the network.

        Raises:
            UserError: if they are not.
        """
        if self.tokens != tokens:
            raise UserError(
                f"{self.path} holds {self.tokens} tokens per image, the network has {tokens}: encode with --tokens "
                f"{round(tokens**0.5)}, or change --model"
            )
        if self.manifest["resolution"] != data.manifest["resolution"]:
            raise UserError(
                f"{self.path} holds features of {self.manifest['resolution']} px images, {data.path} latents of "
                f"{data.manifest['resolution']} px: give both of the same images"
            )
        if data.has_flips and not self.has_flips:
            raise UserError(
                f"{data.path} holds latents of mirror images, {self.path} no features of them: encode with --flip"
            )
        if self.manifest["names"]["sha256"] == data.manifest.get("names", {}).get("sha256"):
            return
        pairs = zip(map(pairing_name, self.names), map(pairing_name, data.names), strict=False)
        for row, (name, other) in enumerate(pairs):
            if name != other:
                raise UserError(
                    f"sample {row} is {name} in {self.path}, but {other} in {data.path}: give features and latents of "
                    "the same images"
                )
        if len(self) != len(data):
            raise UserError(
                f"{self.path} holds features of {len(self)} images, {data.path} latents of {len(data)}: give both of "
                "the same images"
            )
