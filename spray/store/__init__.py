"""Files of attributions: written in shards that are whole or not there, put together, read row by row."""
