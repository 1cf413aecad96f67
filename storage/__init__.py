"""Data on disk, reading: packed latents and features, folders and zips, the official layouts."""
