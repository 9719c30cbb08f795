"""Files of attributions: written in shards that are whole or not there, put together, read row by row."""

from spray.store.reading import Attributions, open_attributions

__all__ = ["Attributions", "open_attributions"]
