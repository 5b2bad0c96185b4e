"""Ways to look at a checkpoint: as stored, tied, dequantised, in another vocabulary."""
