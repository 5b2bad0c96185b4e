"""The `extract-lora` command."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import typer

from raymerge.pipeline.cli.console import put, say
from raymerge.pipeline.cli.options import MESSAGES, takes_options
from raymerge.pipeline.options import Help, StorageOption

_FACTORS = "Factors"


@dataclass(frozen=True)
class ExtractOptions:
    """The options of `extract-lora`."""

    rank: Annotated[int, Help("Largest rank of the factors of a layer.", _FACTORS, "N")] = 64
    energy: Annotated[
        float, Help("Share of a difference's squares to keep; takes fewer ranks where they have it.", _FACTORS, "SHARE")
    ] = 1.0
    embeddings: Annotated[bool, Help("Extract factors of embedding and head as well.", _FACTORS)] = False
    exclude: Annotated[
        list[str] | None, Help("Regular expression; tensors whose names match it are left out.", _FACTORS, "REGEX")
    ] = None
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Help("Dtype of the factors.", _FACTORS)] = "float32"
    storage: StorageOption = "auto"


@takes_options
def extract_lora(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The fine-tune.", show_default=False)],
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model it was made from.", show_default=False)],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Directory or URL of the adapter.", show_default=False)],
    options: ExtractOptions,
    json: Annotated[bool, Help("Print JSON.", MESSAGES)] = False,
    quiet: Annotated[bool, Help("Print no line for each tensor.", MESSAGES, short="q")] = False,
) -> None:
    """Extract a LoRA adapter from a fine-tune: what it changed in its base, as factors that peft loads."""
    from json import dumps

    from raymerge.pipeline.extraction.extract import Extracted, extract_lora
    from raymerge.pipeline.messages import counted
    from raymerge.pipeline.sizes import format_nbytes

    def show(found: Extracted) -> None:
        say(f"{found.name}: " + (f"rank {found.rank}, error {found.error:.2%}" if found.rank else "stored whole"))

    result = extract_lora(
        model,
        base,
        out,
        rank=options.rank,
        energy=options.energy,
        with_embeddings=options.embeddings,
        exclude=options.exclude or (),
        dtype=options.dtype,
        storage=options.storage,
        on_tensor=(lambda found: None) if quiet or json else show,
    )
    if json:
        put(dumps(asdict(result), indent=2))
        return
    errors = [found.error for found in result.tensors if found.rank]
    worst = f", the largest error {max(errors):.2%}" if errors else ""
    put(
        f"{result.out}: {format_nbytes(result.nbytes)}, factors for {counted(len(errors), 'tensor')}{worst};"
        f" {counted(len(result.tensors) - len(errors), 'tensor')} stored whole, {result.num_unchanged:,} unchanged"
    )
