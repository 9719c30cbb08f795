"""Datasets of images, and artifacts planted in them."""
