"""Datasets of images, and artifacts planted in them.

.. include:: guide.md
"""
