"""Trains small models on the demo images: those that ship with the demo, and an encoder for trying SSL alignment.

    python -m preprocessing.demo_models vae --data data/demo/images --dest assets/demo_vae
    python -m preprocessing.demo_models features --data data/demo/images --dest assets/demo_features.safetensors
    python -m preprocessing.demo_models vit --data data/demo/images --dest data/demo/vit.safetensors

A GPU is used if there is one; each model can be trained on a CPU of two cores.
"""

import argparse
import copy
import json
import math
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm, trange

from common.errors import OneLineParser, UserError, exits_on_user_error
from common.files import written_aside
from evaluation.features import DemoFeatures
from models import autoencoder as latent_space
from models.ssl_encoders import RANDOM, load_encoder
from storage.image_files import read_rgb

DEMO_VIT = "timm:test_vit"  # 0.3M parameters, 6 blocks of width 64


def load_images(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All images that `folder/dataset.json` lists: uint8 (N, H, W, 3) and their int64 class numbers (N,)."""
    try:
        entries = json.loads((folder / "dataset.json").read_text())["labels"]
        images = [np.asarray(read_rgb((folder / file).read_bytes())[0]) for file, _ in entries]
        labels = [int(label) for _, label in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"no readable images with a dataset.json in {folder} ({error}): make them with "
            f"python -m preprocessing.demo_data --dest {folder}"
        ) from error
    if len({image.shape for image in images}) != 1:
        raise UserError(f"the images in {folder} are none or differ in size: they must all have one size")
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def train_vae(
    data: Path,
    dest: Path,
    steps: int,
    batch_size: int,
    lr: float,
    kl_weight: float,
    max_minutes: float,
    seed: int,
) -> None:
    """Train an `AutoencoderKL` (f = 8, 4 channels, 1.7M parameters), saving it to `dest` ten times.

    Loss: L1 + 2 MSE of the reconstruction in [-1, 1], plus `kl_weight` times the KL to N(0, I) summed over an
    image's latent. The saved weights are an exponential moving average (0.999), and the scaling factor in the
    saved config is 1 / std of the latents of all images, so that scaled latents have unit variance.
    The learning rate decays along a cosine over `steps` or `max_minutes`, whichever ends first.
    """
    from diffusers import AutoencoderKL

    if min(steps, batch_size) < 1 or max_minutes <= 0:
        raise UserError(
            f"--steps {steps}, --batch-size {batch_size}, --max-minutes {max_minutes}: all must be positive"
        )
    images, _ = load_images(data)
    if images.shape[1] % 8 or images.shape[2] % 8:
        raise UserError(f"images of {images.shape[1]} x {images.shape[2]} px: sides must be multiples of 8")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=images.shape[1],
    ).to(device)
    ema = copy.deepcopy(vae).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    generator = torch.Generator().manual_seed(seed)
    images = images.to(device)

    start = time.monotonic()
    progress = tqdm(total=steps, desc="training the VAE", unit="step")
    step, saved, fraction = 0, 0, 0.0
    while fraction < 1:
        set_lr(optimizer, lr, step, 200, math.pi * fraction)
        batch = images[torch.randint(len(images), (batch_size,), generator=generator).to(device)]
        target = latent_space.pixels_to_input(batch)
        flip = (torch.rand(batch_size, 1, 1, 1, generator=generator) < 0.5).to(device)
        target = torch.where(flip, target.flip(-1), target)
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            output = vae.decode(posterior.sample()).sample
        error = output.float() - target
        loss = error.abs().mean() + 2 * error.square().mean() + kl_weight * posterior.kl().float().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1

        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(vae.parameters()), 1 - decay)
        progress.update()
        fraction = max(step / steps, (time.monotonic() - start) / (60 * max_minutes))
        if fraction * 10 >= saved + 1 or fraction >= 1:
            saved += 1
            seen = images if fraction >= 1 else images[::8]  # all take a while on a CPU
            psnr = save_vae(ema, seen, dest)
            tqdm.write(f"step {step}: loss {loss.item():.4f}, PSNR {psnr:.2f} dB over {len(seen)} images")
    progress.close()


@torch.no_grad()
def save_vae(vae: torch.nn.Module, images: torch.Tensor, dest: Path) -> float:
    """Save `vae` to the folder `dest` as float16 safetensors with its scaling factor; returns its PSNR in dB.

    PSNR and scaling factor are those of the saved, rounded weights, over all `images` (uint8, (N, H, W, 3)).
    """
    rounded = copy.deepcopy(vae).half().float()
    moments = torch.cat([latent_space.encode_moments(rounded, part) for part in images.split(64)])
    mean, std = moments.chunk(2, dim=1)
    # variance of mean + std * n over images and noise
    scale = (mean.var() + std.square().mean()).rsqrt().item()
    rounded.register_to_config(scaling_factor=round(scale, 5))
    psnr = reconstruction_psnr(rounded, images, moments)

    dest.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{dest.name}-", dir=dest if dest.is_dir() else dest.parent))
    try:
        rounded.half().save_pretrained(aside, safe_serialization=True)
        dest.mkdir(exist_ok=True)
        for file in aside.iterdir():
            file.replace(dest / file.name)
    finally:
        shutil.rmtree(aside)
    return psnr


def reconstruction_psnr(vae: torch.nn.Module, images: torch.Tensor, moments: torch.Tensor) -> float:
    """PSNR in dB over all pixels of uint8 `images` (N, H, W, 3), decoded from the mean half of `moments`."""
    squared = 0.0
    for part, part_moments in zip(images.split(64), moments.split(64), strict=True):
        mean = part_moments.chunk(2, dim=1)[0]
        decoded = latent_space.decode(vae, mean * vae.config.scaling_factor)
        squared += (decoded.double() - part.double()).square().sum().item()
    return 10 * math.log10(255**2 * images.numel() / max(squared, 1e-9))


def train_features(data: Path, dest: Path, epochs: int, batch_size: int, lr: float, seed: int) -> None:
    """Train the demo's feature network and save it to the file `dest` (safetensors, config in the metadata).

    From one 64-d feature vector it has to predict which training image it sees (shifted, blurred, noisy), the image's
    class, and the strength of blur and noise. Class prediction alone would teach it to ignore blur and noise, but a
    distance between sets of generated images has to grow with them.
    """
    images, labels = load_images(data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = DemoFeatures(image_size=images.shape[1], widths=[32, 64, 96, 128], dimension=64).to(device)
    heads = nn.ModuleDict(
        {
            "image": nn.Linear(net.dimension, len(images)),
            "label": nn.Linear(net.dimension, int(labels.max()) + 1),
            "corruption": nn.Linear(net.dimension, 2),
        }
    ).to(device)
    optimizer = torch.optim.AdamW([*net.parameters(), *heads.parameters()], lr=lr, weight_decay=0.02)
    pixels = latent_space.pixels_to_input(images)
    steps = epochs * math.ceil(len(images) / batch_size)
    progress = trange(steps, desc="training the feature network", unit="step")
    for step in progress:
        set_lr(optimizer, lr, step, 100, math.pi * step / steps)
        index = torch.randint(len(images), (batch_size,), generator=generator)
        seen, strength = corrupt(pixels[index], generator)
        features = net.embed(seen.to(device))
        losses = {
            "image": F.cross_entropy(heads["image"](features), index.to(device), label_smoothing=0.1),
            "label": F.cross_entropy(heads["label"](features), labels[index].to(device)),
            "corruption": F.mse_loss(heads["corruption"](features), strength.to(device)),
        }
        loss = losses["image"] + 0.5 * losses["label"] + 4 * losses["corruption"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 100 == 99 or step == steps - 1:
            tqdm.write(f"step {step + 1}: " + ", ".join(f"{k} {v.item():.4f}" for k, v in losses.items()))

    save_weights(net, dest, metadata={"config": json.dumps(net.config)})


def train_vit(data: Path, dest: Path, steps: int, batch_size: int, lr: float, seed: int) -> None:
    """Train the ViT `DEMO_VIT` of timm to classify the demo images, and save it to the file `dest` (safetensors).

    `train.py --enc-type timm:test_vit --enc-weights DEST` aligns with it. The class is predicted from the mean of the
    patch tokens, as alignment uses these. Training images are shifted, blurred and noisy (`corrupt`).
    """
    images, labels = load_images(data)
    if images.shape[1] != images.shape[2] or images.shape[1] % 16:
        raise UserError(f"images of {images.shape[1]} x {images.shape[2]} px: expected squares of a multiple of 16 px")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vit = load_encoder(DEMO_VIT, images.shape[1] // 16, RANDOM).vit.to(device).requires_grad_(True)
    head = nn.Linear(vit.embed_dim, int(labels.max()) + 1).to(device)
    optimizer = torch.optim.AdamW([*vit.parameters(), *head.parameters()], lr=lr, weight_decay=0.05)
    pixels = latent_space.pixels_to_input(images)  # in [-1, 1], which is what this ViT's own mean and std make of them
    for step in trange(steps, desc="training the ViT", unit="step"):
        set_lr(optimizer, lr, step, 100, math.pi * step / steps)
        index = torch.randint(len(images), (batch_size,), generator=generator)
        seen, _ = corrupt(pixels[index], generator)
        scores = head(vit.forward_features(seen.to(device))[:, vit.num_prefix_tokens :].mean(1))
        loss = F.cross_entropy(scores, labels[index].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 100 == 99 or step == steps - 1:
            right = (scores.argmax(1).cpu() == labels[index]).float().mean().item()
            tqdm.write(f"step {step + 1}: loss {loss.item():.4f}, {right:.0%} of the batch right")
    save_weights(vit, dest)


def set_lr(optimizer: torch.optim.Optimizer, lr: float, step: int, warmup: int, angle: float) -> None:
    """Set the learning rate of a step: a linear warm-up over `warmup` steps times a cosine, `angle` from 0 to pi."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(angle))


def save_weights(net: nn.Module, dest: Path, metadata: dict[str, str] | None = None) -> None:
    """Write the weights of `net` to the file `dest` (safetensors) by `written_aside`."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}
    with written_aside(dest) as aside:
        save_file(state, aside, metadata=metadata)


def corrupt(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift images by up to 4 px, blur half of them and add noise to half of them.

    images (n, 3, S, S) in [-1, 1] -> the same, and (n, 2) strengths in [0, 1]: Gaussian blur of up to 2 px, Gaussian
    noise of standard deviation up to 0.5.
    """
    n, _, side, _ = images.shape
    padded = F.pad(images, (4, 4, 4, 4), value=1.0)  # white, like the background of the images
    y, x = torch.randint(9, (2, n, 1), generator=generator) + torch.arange(side)  # (2, n, S)
    shifted = padded[torch.arange(n)[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)

    strength = torch.rand(2, n, generator=generator) * (torch.rand(2, n, generator=generator) < 0.5)
    sigma = (2 * strength[0]).clamp(min=0.05)  # 0.05 px: no blur
    taps = torch.exp(-(torch.arange(-5, 6) ** 2) / (2 * sigma[:, None] ** 2))
    taps = (taps / taps.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)  # (3n, 11), one row per channel
    planes = F.pad(shifted.reshape(1, 3 * n, side, side), (5, 5, 5, 5), mode="replicate")
    blurred = F.conv2d(planes, taps[:, None, :, None], groups=3 * n)
    blurred = F.conv2d(blurred, taps[:, None, None, :], groups=3 * n).view(n, 3, side, side)

    noise = torch.randn(blurred.shape, generator=generator) * (0.5 * strength[1])[:, None, None, None]
    return (blurred + noise).clamp(-1, 1), strength.T


@exits_on_user_error
def main() -> None:
    parser = OneLineParser(prog="preprocessing.demo_models", description="Train small models on the demo images.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(name: str, title: str, dest: str, batch_size: int, lr: float, seed: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=title, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("--data", type=Path, default=Path("data/demo/images"), help="folder of demo images")
        command.add_argument("--dest", type=Path, default=Path(dest), help="file or, for the VAE, folder to save to")
        command.add_argument("--batch-size", type=int, default=batch_size, help="images per step")
        command.add_argument("--lr", type=float, default=lr, help="peak learning rate of AdamW")
        command.add_argument("--seed", type=int, default=0, help=f"seed of {seed}")
        return command

    vae = add_command("vae", "the demo's AutoencoderKL", "assets/demo_vae", 16, 2e-3, "weights, data order and noise")
    vae.add_argument("--steps", type=int, default=10_000, help="optimizer steps")
    vae.add_argument("--kl-weight", type=float, default=1e-6, help="weight of an image's summed KL, in nats")
    vae.add_argument("--max-minutes", type=float, default=60, help="end the cosine after so many minutes")
    features = add_command(
        "features",
        "the demo's feature network",
        "assets/demo_features.safetensors",
        128,
        3e-3,
        "weights, data order and corruptions",
    )
    features.add_argument("--epochs", type=int, default=80, help="passes over the images")
    vit = add_command(
        "vit", "an encoder for SSL alignment", "data/demo/vit.safetensors", 64, 1e-3, "data order and corruptions"
    )
    vit.add_argument("--steps", type=int, default=2000, help="optimizer steps")

    args = parser.parse_args()
    options = {name: value for name, value in vars(args).items() if name != "command"}
    {"vae": train_vae, "features": train_features, "vit": train_vit}[args.command](**options)


if __name__ == "__main__":
    main()
