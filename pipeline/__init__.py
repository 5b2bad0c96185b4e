"""What to do: config, index, plan, task, stitch; the CLI and the public API."""

from raymerge.pipeline.driver import merge, plan
from raymerge.pipeline.inspection import inspect
from raymerge.pipeline.listener import Listener
from raymerge.pipeline.verify import verify

__all__ = ["Listener", "inspect", "merge", "plan", "verify"]
