"""Merge LLM checkpoints block by block, in bounded memory."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raymerge.cluster.errors import ClusterConnectError as ClusterConnectError
    from raymerge.cluster.errors import HeadLostError as HeadLostError
    from raymerge.cluster.errors import NoHomeError as NoHomeError
    from raymerge.cluster.errors import ResourceError as ResourceError
    from raymerge.cluster.errors import TaskFailedError as TaskFailedError
    from raymerge.cluster.errors import WorkerLostError as WorkerLostError
    from raymerge.ops.errors import OpParameterError as OpParameterError
    from raymerge.ops.errors import UnknownOpError as UnknownOpError
    from raymerge.pipeline.checkpoint.inspection.inspect import inspect as inspect
    from raymerge.pipeline.checkpoint.inspection.results import Inspection as Inspection
    from raymerge.pipeline.curve.curve import curve as curve
    from raymerge.pipeline.curve.results import Curve as Curve
    from raymerge.pipeline.driver import merge as merge
    from raymerge.pipeline.driver import plan as plan
    from raymerge.pipeline.errors import CheckpointError as CheckpointError
    from raymerge.pipeline.errors import ConfigError as ConfigError
    from raymerge.pipeline.errors import FetchError as FetchError
    from raymerge.pipeline.errors import HeldError as HeldError
    from raymerge.pipeline.errors import MemoryLimitError as MemoryLimitError
    from raymerge.pipeline.errors import OutputError as OutputError
    from raymerge.pipeline.errors import TensorMismatchError as TensorMismatchError
    from raymerge.pipeline.evaluation.evaluate import evaluate as evaluate
    from raymerge.pipeline.evaluation.options import EvaluateOptions as EvaluateOptions
    from raymerge.pipeline.evaluation.results import Evaluation as Evaluation
    from raymerge.pipeline.options import MergeOptions as MergeOptions
    from raymerge.pipeline.output.verify import VerifyReport as VerifyReport
    from raymerge.pipeline.output.verify import verify as verify
    from raymerge.pipeline.plan.results import MergeReport as MergeReport
    from raymerge.pipeline.plan.results import ShardResult as ShardResult
    from raymerge.pipeline.plan.types import MergePlan as MergePlan
    from raymerge.pipeline.progress.events import Event as Event
    from raymerge.pipeline.progress.events import Held as Held
    from raymerge.pipeline.progress.events import OnEvent as OnEvent
    from raymerge.pipeline.progress.events import Planned as Planned
    from raymerge.pipeline.progress.events import Progressed as Progressed
    from raymerge.pipeline.progress.events import Resumed as Resumed
    from raymerge.pipeline.progress.events import Retried as Retried
    from raymerge.pipeline.progress.events import SweepDone as SweepDone
    from raymerge.pipeline.progress.events import SweepPlanned as SweepPlanned
    from raymerge.pipeline.progress.events import Warned as Warned
    from raymerge.pipeline.search.options import SearchOptions as SearchOptions
    from raymerge.pipeline.search.results import SearchReport as SearchReport
    from raymerge.pipeline.search.search import search as search
    from raymerge.pipeline.spectrum.sweep import SweepReport as SweepReport
    from raymerge.pipeline.spectrum.sweep import sweep as sweep

__version__ = "0.1.0"


class RaymergeError(Exception):
    """Something the user can put right; the CLI prints it in one block and exits with 2."""


_HOMES = {
    "cluster.errors": (
        "ClusterConnectError",
        "HeadLostError",
        "NoHomeError",
        "ResourceError",
        "TaskFailedError",
        "WorkerLostError",
    ),
    "ops.errors": ("OpParameterError", "UnknownOpError"),
    "pipeline.checkpoint.inspection.inspect": ("inspect",),
    "pipeline.checkpoint.inspection.results": ("Inspection",),
    "pipeline.curve.curve": ("curve",),
    "pipeline.curve.results": ("Curve",),
    "pipeline.driver": ("merge", "plan"),
    "pipeline.errors": (
        "CheckpointError",
        "ConfigError",
        "FetchError",
        "HeldError",
        "MemoryLimitError",
        "OutputError",
        "TensorMismatchError",
    ),
    "pipeline.evaluation.evaluate": ("evaluate",),
    "pipeline.evaluation.options": ("EvaluateOptions",),
    "pipeline.evaluation.results": ("Evaluation",),
    "pipeline.options": ("MergeOptions",),
    "pipeline.output.verify": ("VerifyReport", "verify"),
    "pipeline.plan.results": ("MergeReport", "ShardResult"),
    "pipeline.plan.types": ("MergePlan",),
    "pipeline.search.options": ("SearchOptions",),
    "pipeline.search.results": ("SearchReport",),
    "pipeline.search.search": ("search",),
    "pipeline.spectrum.sweep": ("SweepReport", "sweep"),
    "pipeline.progress.events": (
        "Event",
        "Held",
        "OnEvent",
        "Planned",
        "Progressed",
        "Resumed",
        "Retried",
        "SweepDone",
        "SweepPlanned",
        "Warned",
    ),
}
"""Modules of the public names. Each is imported when it is first asked for, so that `import raymerge` is quick."""

_MODULES = {name: f"raymerge.{module}" for module, names in _HOMES.items() for name in names}

if not TYPE_CHECKING:  # type checkers would take every name for one of ours

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """Return every public name, imported yet or not."""
    return sorted({*_MODULES, "RaymergeError", "__version__"})
