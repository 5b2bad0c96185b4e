"""What a worker does: one shard, block by block."""
