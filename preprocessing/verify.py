"""What a packed dataset is, and whether it is still what was written."""

import hashlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset import PackedLatents
from errors import UserError


def info(path: str | Path) -> str:
    """Say in a few lines what the packed dataset in folder `path` is."""
    data = PackedLatents(path)
    manifest, counts = data.manifest, np.bincount(data.labels, minlength=data.num_classes)
    size = sum(file.stat().st_size for file in data.path.iterdir())
    return "\n".join(
        [
            f"samples         {len(data)}",
            f"classes         {data.num_classes}, of {counts.min()} to {counts.max()} samples each",
            f"resolution      {manifest['resolution']} px",
            f"moments         {data.latent_shape} {manifest['dtype']}, mean and std stacked",
            f"vae             {manifest['vae']}, weights sha256 {manifest['vae_sha256'][:12]}...",
            f"scaling factor  {data.scaling_factor}",
            f"on disk         {size / 2**20:.1f} MiB in {len(manifest['shards'])} shard(s)",
        ]
    )


def verify(path: str | Path) -> None:
    """Read the whole packed dataset in `path` again; `UserError` names the first file that is damaged."""
    data = PackedLatents(path)
    files = [data.manifest["labels"], data.manifest["names"], *data.manifest["shards"]]
    for entry in tqdm(files, desc="verify", unit="file"):
        place, sha256 = data.path / Path(entry["file"]).name, hashlib.sha256()
        if not place.is_file():
            raise UserError(f"{place} is missing: copy it again or encode again")
        with place.open("rb") as file:
            while chunk := file.read(2**22):
                sha256.update(chunk)
        if sha256.hexdigest() != entry["sha256"]:
            raise UserError(f"{place} is damaged: copy it again or encode again")
    print(f"{path}: {len(data)} samples in {len(files)} files, all as written")
