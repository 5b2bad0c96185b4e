"""Stores of files: a folder for each kind of storage behind the seam of `raymerge.pipeline.stores.seam`."""
