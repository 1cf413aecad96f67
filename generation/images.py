"""The one iterator of images: blocks of a network's samples, decoded.

Image i is a function of the seed and i alone, to the byte, on one kind of device with one version of torch. Matrix
products round differently at other batch shapes, and an adaptive solver's step size is shared by what it solves
together; so images are always made in aligned blocks of one size, which only the architecture and the type of device
decide, for any batch size, number of processes and choice of images.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import samplers
from common.errors import UserError
from common.flags import PRECISIONS
from common.processes import allow_tf32
from generation.options import Settings
from models import DeepFlow
from models.precision import cast_products

BLOCK_TOKENS = {"cuda": 8192, "cpu": 256}  # of a network call without guidance; with it, twice as many


class GeneratedImages(NamedTuple):
    """A batch of finished images."""

    indices: list[int]  # global image numbers
    conditions: Tensor  # (N, ...), of each: class ids (N,), for example
    images: Tensor  # (N, H, W, 3) uint8, on the CPU


def images_per_block(config: dict[str, Any], device_type: str) -> int:
    """How many images are made together, as one block: block b is images [b C, (b + 1) C)."""
    tokens = (config["input_size"] // config["patch_size"]) ** 2
    return max(1, BLOCK_TOKENS[device_type] // tokens)


def generate_images(
    model: DeepFlow,
    decode_latents: Callable[[Tensor], Tensor],
    conditions: Tensor | np.ndarray,
    settings: Settings,
    indices: Sequence[int],
    batch_size: int,
    guide: DeepFlow | None = None,
) -> Iterator[GeneratedImages]:
    """The images with the given global numbers, in ascending order, batch by batch.

    A block is made whole even where only some of its images are wanted: see `images_per_block`. On the CPU, blocks of
    a batch are made side by side, each by one thread: the number of threads changes the rounding too.

    Args:
        model: the network, in evaluation mode, on the device to sample on.
        decode_latents: latents (N, C, h, w) -> uint8 images (N, H, W, 3), N being that of a block.
        conditions: of every global image number, (total, ...), on the CPU: class ids (total,), for example. If the
            total ends inside a block, its remaining images, which are not returned, get the first conditions again.
        settings: sampler, guidance, precision and seed.
        indices: which of the images to make, in any order.
        batch_size: images made and returned together, rounded up to whole blocks; no influence on the images.
        guide: the weaker network of autoguidance, on the same device; None for classifier-free guidance.

    Raises:
        UserError: if samples are not finite, or conditions that the network does not know.
        IndexError: for an image number without a condition.
    """
    wanted, conditions = sorted({int(i) for i in indices}), torch.as_tensor(conditions)
    if wanted and not 0 <= wanted[0] <= wanted[-1] < len(conditions):
        raise IndexError(f"images {wanted[0]} to {wanted[-1]} are wanted, but there are {len(conditions)} conditions")
    model.check_condition(conditions)
    device = next(model.parameters()).device
    size = images_per_block(model.config, device.type)
    conditions = conditions[torch.arange(math.ceil(len(conditions) / size) * size) % len(conditions)]
    blocks = sorted({i // size for i in wanted})
    at_once = math.ceil(batch_size / size)

    def make(block: int) -> Tensor:
        return make_block(model, decode_latents, conditions, settings, range(block * size, (block + 1) * size), guide)

    for first in range(0, len(blocks), at_once):
        group = blocks[first : first + at_once]
        images = torch.cat(single_threaded(make, group) if device.type == "cpu" else [make(block) for block in group])
        numbers = [i for block in group for i in range(block * size, (block + 1) * size)]
        rows = np.flatnonzero(np.isin(numbers, wanted))
        batch = [numbers[row] for row in rows]
        yield GeneratedImages(batch, conditions[batch], images[rows])


def make_block(
    model: DeepFlow,
    decode_latents: Callable[[Tensor], Tensor],
    conditions: Tensor,
    settings: Settings,
    numbers: range,
    guide: DeepFlow | None,
) -> Tensor:
    """The images of one block, (N, H, W, 3) uint8, on the CPU; see `generate_images`."""
    device = next(model.parameters()).device
    shape = (model.config["in_channels"], model.config["input_size"], model.config["input_size"])
    condition = conditions[numbers.start : numbers.stop].to(device)
    noise = samplers.ImageNoise(settings.seed, numbers, shape)
    interval = (settings.cfg_scale, settings.guidance_low, settings.guidance_high)
    if guide is None:
        null = model.null_condition(len(numbers))
        velocity = samplers.classifier_free_guidance(velocity_of(model), condition, null, *interval)
    else:
        velocity = samplers.autoguidance(velocity_of(model), velocity_of(guide), condition, *interval)

    def draw(_: int = 0) -> Tensor:
        drawn = noise.draw()  # from pinned memory the copy does not make the host wait for the device
        return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn

    with torch.inference_mode():
        dtype = PRECISIONS[settings.precision]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            latents = samplers.sample(
                velocity,
                draw(),
                method=settings.method,
                num_steps=settings.num_steps,
                path_type=settings.path_type,
                step_noise=draw,
                diffusion_form=settings.diffusion_form,
                diffusion_norm=settings.diffusion_norm,
                time_shift=settings.time_shift,
            )
        if not latents.isfinite().all():
            raise UserError("the network's samples are not finite: the checkpoint is of a run that diverged")
        return decode_latents(latents.float()).cpu()


def velocity_of(model: DeepFlow) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`model.velocity(x, t, condition)` for times (N,) on the CPU that are all equal, as samplers hand them over."""

    def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        # Filled on the device: a copy to it would make the host wait for the device at every call.
        return model.velocity(x, torch.full_like(t, t[0].item(), device=x.device), condition)

    return velocity


def single_threaded(make: Callable[[int], Tensor], blocks: Sequence[int]) -> list[Tensor]:
    """`make` of each block, each within one thread, as many at once as torch had threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, len(blocks)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(make, blocks))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def arithmetic(tf32: bool) -> Iterator[None]:
    """TF32 matrix products or not, and convolutions that repeat; afterwards as before, for whoever evaluates next."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with allow_tf32(tf32):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def prepare_network(model: DeepFlow, compiled: bool, precision: str) -> DeepFlow:
    """A network as it is to sample: weights in the precision of its products, blocks and heads compiled on request."""
    if precision != "no":
        cast_products(model, PRECISIONS[precision])
    if compiled:
        model.compile_parts(dynamic=False)
    return model
