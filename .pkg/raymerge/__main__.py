"""`python -m raymerge` is the `raymerge` command."""

from raymerge.pipeline.cli import main

main()
