"""`python -m raymerge` is the `raymerge` command."""

from raymerge.pipeline.cli.app import main

main()
