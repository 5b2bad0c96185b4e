"""From a YAML to a model directory: config, checkpoints, plan, engine, output, stores, and the command line."""
