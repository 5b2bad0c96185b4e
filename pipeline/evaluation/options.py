"""The options of an evaluation: one dataclass that the API takes, and that the command line's options are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import flag
from raymerge.pipeline.options import CLUSTER, SPEED, Help, StorageOption
from raymerge.pipeline.stores.settings import Library

MODELS = "Models"
SAMPLING = "Sampling"
RESULTS = "Results"

Backend = Literal["transformers", "vllm"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of an evaluation: what is sampled, with which library, where, and where the results go.

    Raises:
        ConfigError: a value is out of range.
    """

    samples: Annotated[int | None, Help("Answers to each item.", SAMPLING, "K", default="as the task says")] = None
    limit: Annotated[int | None, Help("Only the first items of each task.", SAMPLING, "N", default="all")] = None
    temperature: Annotated[
        float | None, Help("0 for the most probable token each time.", SAMPLING, "T", default="as the task says")
    ] = None
    max_new_tokens: Annotated[
        int | None, Help("Cut answers off after so many.", SAMPLING, "N", default="as the task says")
    ] = None
    seed: Annotated[int | None, Help("Seed of the sampling.", SAMPLING, "N", default="as the task says")] = None
    backend: Annotated[Backend, Help("Library that generates.", SPEED)] = "transformers"
    batch_size: Annotated[int, Help("Answers generated at once.", SPEED, "N")] = 16
    dtype: Annotated[Dtype, Help("Dtype of the weights; auto: as stored on a GPU, float32 on a CPU.", SPEED)] = "auto"
    include_path: Annotated[
        str | None, Help("Directory with lm-eval tasks of your own.", SAMPLING, "DIR", default="none")
    ] = None
    window: Annotated[int, Help("Tokens of held-out text that a model sees at once.", SAMPLING, "N")] = 1024
    timeout: Annotated[
        float, Help("Give up a command, or a model that answers nothing, after so many seconds.", SPEED, "SECONDS")
    ] = 43200.0
    workers: Annotated[
        int | None,
        Help("Models evaluated at once on a machine.", SPEED, "N", default="1, or what --gpus-per-model has room for"),
    ] = None
    gpus_per_model: Annotated[
        float | None,
        Help(
            "GPUs of each model, or a share of one such as 0.5; 0 for the CPU.",
            SPEED,
            "N",
            default="all, shared by --workers; on a cluster with GPUs, 1",
        ),
    ] = None
    base: Annotated[
        str | None,
        Help("Model that LoRA adapters go with.", MODELS, "MODEL", default="as each of them says"),
    ] = None
    ops: Annotated[
        str | None, Help("Merge methods of your own, for points yet to be merged.", MODELS, "FILE", default="none")
    ] = None
    storage: StorageOption = "auto"
    out: Annotated[
        str | None,
        Help(
            "Directory or URL of the results.",
            RESULTS,
            "DIR",
            default="evaluations, in the spectrum if it is one",
            former="evaluations",
        ),
    ] = None
    eval_results: Annotated[
        bool, Help("Write .eval_results/*.yaml beside each model, for the Hub's leaderboards.", RESULTS)
    ] = False
    ray: Annotated[bool, Help("Start Ray on this machine, and evaluate on it.", CLUSTER)] = False
    address: Annotated[
        str | None,
        Help("Evaluate on the Ray cluster whose head is there; `auto`: that of this machine.", CLUSTER, "HOST:PORT"),
    ] = None
    shared_filesystem: Annotated[bool, Help("Paths mean the same files on all machines of the cluster.", CLUSTER)] = (
        False
    )

    def __post_init__(self) -> None:
        for name in ("samples", "limit", "max_new_tokens", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{flag(name)} is {value}; it must be 1 or more")
        if self.window < 2:
            raise ConfigError(f"--window is {self.window}; it must be 2 or more: a token is predicted from another")
        if (gpus := self.gpus_per_model) is not None and not (0 <= gpus <= 1 or (1 < gpus < 1e6 and gpus == int(gpus))):
            raise ConfigError(f"--gpus-per-model is {gpus:g}; it must be whole, or a share of one GPU such as 0.5")
        if self.backend == "vllm" and gpus is not None and gpus != int(gpus):
            raise ConfigError(f"--gpus-per-model is {gpus:g}; vLLM takes whole GPUs")
        if self.ray and self.address is not None:
            raise ConfigError(
                "both --ray, which starts Ray here, and --address, of a running cluster, are given; leave one"
            )
        if self.shared_filesystem and self.address is None:
            raise ConfigError("--shared-filesystem is about the machines of a cluster; give its --address too")
        if not self.timeout > 0:
            raise ConfigError(f"--timeout is {self.timeout:g}; it must be above 0")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed is {self.seed}; it must be 0 or more, and below 2^63")
        if self.temperature is not None and not 0 <= self.temperature <= 100:
            raise ConfigError(f"--temperature is {self.temperature:g}; it must be from 0 to 100")


class EvaluateKeywords(TypedDict, total=False):
    """The fields of `EvaluateOptions` as keywords."""

    samples: int | None
    limit: int | None
    temperature: float | None
    max_new_tokens: int | None
    seed: int | None
    backend: Backend
    batch_size: int
    dtype: Dtype
    include_path: str | None
    window: int
    timeout: float
    workers: int | None
    gpus_per_model: float | None
    base: str | None
    ops: str | None
    storage: Library
    out: str | None
    eval_results: bool
    ray: bool
    address: str | None
    shared_filesystem: bool
