"""Datasets: Arrow shards and their manifest, order, cache, streaming and transforms."""
