"""Where files are: a module for each kind of storage behind the seam of `raymerge.pipeline.stores.seam`."""
