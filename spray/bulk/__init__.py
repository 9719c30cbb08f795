"""Explaining many samples: reading ahead, batches that fit, samples that fail, what is kept of each heatmap.

.. include:: guide.md
"""
