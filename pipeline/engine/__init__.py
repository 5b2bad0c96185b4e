"""The work of a worker: one shard, block by block."""
