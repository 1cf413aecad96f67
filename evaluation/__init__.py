"""Scores of generated images: extract features, compute their statistics, compare two sets."""

from evaluation.archives import ImageArchive, open_images
from evaluation.extraction import extract
from evaluation.features import load_extractor
from evaluation.metrics import compare, evaluate
from evaluation.statistics import frechet_distance

__all__ = ["ImageArchive", "compare", "evaluate", "extract", "frechet_distance", "load_extractor", "open_images"]
