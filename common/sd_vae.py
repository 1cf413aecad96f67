"""Stable Diffusion's autoencoder: its name and sizes, for what names no other, such as the official release's files."""

SD_VAE = "stabilityai/sd-vae-ft-ema"  # on the hub
SD_REDUCTION = 8  # pixels per latent pixel along each side
SD_CHANNELS = 4  # of a latent; files of moments hold twice as many, mean and std
SD_SCALING_FACTOR = 0.18215
