"""Pictures of how far a run has come: a grid of samples from the average, and its distance to reference images."""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from common.errors import UserError, warn_if_not_drawn
from dataset import LatentData
from evaluation import evaluate, extract, load_extractor, open_images
from evaluation.extraction import check_images
from evaluation.metrics import METRICS
from generation.conditions import choose_labels
from generation.images import generate_images, images_per_block
from generation.options import Settings
from generation.pictures import save_grid
from models import DeepFlow
from models.autoencoder import check_channels, decode, load_recorded_vae, load_vae
from training.parallel import whole_copy


class Previews:
    """What `--preview-every` needs, loaded once: the VAE, on all processes, and on the first the reference's features.

    Raises `UserError` if the VAE cannot be loaded, or the reference cannot be compared with the previews.
    """

    def __init__(self, options: argparse.Namespace, data: LatentData, device: torch.device, rank: int, world: int):
        self.options, self.data, self.rank, self.world = options, data, rank, world
        if options.preview_vae:
            self.vae = load_vae(options.preview_vae, device)
        else:
            vae, sha256 = data.manifest["vae"], data.manifest["vae_sha256"]
            self.vae = load_recorded_vae(vae, sha256, device, "--preview-vae")
        check_channels(self.vae, data.latent_shape[0] // 2, f"the data {data.path}")
        if not np.isclose(self.vae.config.scaling_factor, data.scaling_factor):
            raise UserError(
                f"the VAE {options.preview_vae} scales latents by {self.vae.config.scaling_factor:.5g}, the data's by "
                f"{data.scaling_factor:.5g}: give the data's own with --preview-vae"
            )
        self.reference = self.extractor = None
        if options.preview_reference and rank == 0:
            self.extractor = load_extractor(options.preview_features, options.preview_feature_weights, device)
            archive = open_images(options.preview_reference)
            side = options.resolution
            check_images(archive, np.zeros((options.preview_samples, side, side, 3), np.uint8), self.extractor)
            self.reference = extract(archive, self.extractor, label="reference of the previews")

    def __call__(self, average: DeepFlow, run: Path, step: int) -> dict[str, float]:
        """Write `previews/step-*.png`; with a reference, the Frechet distance to it. Every process has to call it.

        The images share seed and labels from step to step, and nothing random of the training is used.
        """
        options, data = self.options, self.data
        total = options.preview_samples
        labels = choose_labels("balanced", total, options.num_classes, data.class_counts, 0)
        settings = Settings("heun", 20, options.preview_cfg_scale, path_type=options.path_type)
        block = images_per_block(average.config, self.vae.device.type)
        mine = [i for i in range(total) if i // block % self.world == self.rank]
        batches = generate_images(whole_copy(average), self._decode, labels, settings, mine, block)
        parts = gather_object([(batch.indices, batch.images.numpy()) for batch in batches])
        if self.rank != 0:
            return {}
        images = np.empty((total, *parts[0][1].shape[1:]), np.uint8)
        for indices, part in parts:
            images[indices] = part
        png = run / "previews" / f"step-{step:07d}.png"
        with warn_if_not_drawn(str(png)):
            png.parent.mkdir(exist_ok=True)
            save_grid(images.__getitem__, labels, data.class_names, png)
        if self.reference is None:
            return {}
        scores = evaluate(self.reference, images, self.extractor, progress=False)
        return {f"preview_{name}": value for name, value in scores.items() if METRICS[name].is_distance}

    def _decode(self, latents: Tensor) -> Tensor:
        return decode(self.vae, latents)
