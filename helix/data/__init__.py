"""Recordings, shards, clips and batches: from files on a disk to tensors. Knows nothing of models."""
