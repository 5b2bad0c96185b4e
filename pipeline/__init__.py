"""What to do: config, index, plan, task, stitch; the CLI and the public API."""
