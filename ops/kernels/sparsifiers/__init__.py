"""Rules that choose which elements of a delta to keep: by size, by rank, or by random bits."""
