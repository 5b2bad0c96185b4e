"""What to do: config, index, plan, task, stitch; the command line; the calls behind the public API."""
