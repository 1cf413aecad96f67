"""A checksum that identifies a source of many files without reading all of them."""

import hashlib
import json

from tqdm import tqdm

from preprocessing.convert import REPORT
from storage.file_store import LABELS, FileStore

SAMPLED = 64  # files read in full, as sizes alone tell little: uncompressed images, and latents, all have one size


def source_sha256(*sources: tuple[FileStore, list[str]]) -> str:
    """SHA-256, hexadecimal, that identifies the files of sources, each a store and the names in use.

    It covers all names and sizes, the content of up to 64 files evenly spaced, and each store's `dataset.json` and
    `report.json`. A zip and the folder it was made of have the same.

    Raises:
        UserError: for files that cannot be read.
    """
    digest = hashlib.sha256()
    for store, names in sources:
        names = sorted(names)
        extras = [name for name in (LABELS, REPORT) if name not in names]
        sizes = {name: store.size(name) for name in tqdm(names + extras, desc="look at files", unit="file", delay=1)}
        digest.update(json.dumps(sizes).encode())
        step = max(1, -(-len(names) // SAMPLED))
        for name in names[::step] + [name for name in extras if sizes[name] is not None]:
            digest.update(hashlib.sha256(store.read(name)).digest())
    return digest.hexdigest()
