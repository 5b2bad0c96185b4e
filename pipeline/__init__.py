"""What to do: config, index, plan, task, stitch; the CLI and the public API."""

from raymerge.pipeline.checkpoint.inspect import inspect
from raymerge.pipeline.driver import merge, plan
from raymerge.pipeline.output.verify import verify
from raymerge.pipeline.progress.listener import Listener

__all__ = ["Listener", "inspect", "merge", "plan", "verify"]
