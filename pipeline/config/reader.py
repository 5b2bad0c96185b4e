"""Reads a config: from YAML to a checked `MergeConfig`, and every mistake told at once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from raymerge.ops.own import OwnOps
from raymerge.ops.registry import Op, load_ops
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.bodies import Body, BodyReader
from raymerge.pipeline.config.document import Document, read_documents
from raymerge.pipeline.config.fields import parse_dtype, parse_integers, parse_name, parse_patterns
from raymerge.pipeline.config.findings import Finding, TooManyError
from raymerge.pipeline.config.forms import WHOLE, find_bodies
from raymerge.pipeline.config.merge_config import MergeConfig, ModulePart, OutputSlice
from raymerge.pipeline.config.methods import Use, check_given, check_statistics, lacks_all_weights, parse_method
from raymerge.pipeline.config.mixture import is_mixture, read_mixture
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.config.sections.adapter import find_base_of_updates, parse_adapter
from raymerge.pipeline.config.sections.chat_template import parse_chat_template
from raymerge.pipeline.config.sections.search import note_search
from raymerge.pipeline.config.sections.sweep import note_sweep
from raymerge.pipeline.config.sections.tokenizer import check_rows, parse_tokenizer
from raymerge.pipeline.config.sections.training_run import FindModels
from raymerge.pipeline.config.steps import Part, join_documents
from raymerge.pipeline.config.values import Rule, Setting, Settings
from raymerge.pipeline.errors import ConfigError

KEYS = (
    "merge_method", "models", "slices", "base_model", "dtype", "out_dtype", "parameters", "modules", "keep_float32",
    "integers", "chat_template", "name", "tokenizer", "tokenizer_source", "adapter", "copy_rest_from",
)  # fmt: skip
_OPTIONS = {"random_seed": "--seed", "seed": "--seed", "out_shard_size": "--shard-size"}
"""Options of the command by the keys that people write for them."""


def load_config(
    source: Path | str | Mapping[str, object],
    *,
    strict: bool = False,
    own: OwnOps | None = None,
    find: FindModels | None = None,
) -> MergeConfig:
    """Return the merge that a mergekit config describes.

    Args:
        source: a YAML file, or its name; YAML text; or an already parsed config.
        strict: refuse what otherwise gives a warning, such as an unknown key.
        own: ops besides those that are installed.
        find: finds models by a pattern; None where there are no stores to look them up in.

    Raises:
        ConfigError: the config cannot be read or cannot be meant; the message names every mistake that was found, with
            its line and YAML path.
    """
    documents = read_documents(source, last_counts=True)
    ops = {**load_ops(), **(own.ops if own else {})}
    roots = [
        Place(document.content, node=document.node, line=document.first_line if len(documents) > 1 else None)
        for document in documents
    ]
    parts = []
    for root, document in zip(roots, documents, strict=True):
        root.findings.warnings.extend(Finding(*each) for each in document.repeated)
        reader = _Reader(root, ops, find)
        with suppress(TooManyError):
            if (config := reader.read(document)) is not None:
                parts.append(Part(config, root, reader.mentions))
    told = [root.findings.explain(document) for root, document in zip(roots, documents, strict=True)]
    if len(parts) < len(documents):
        raise ConfigError("\n".join(filter(None, told)))
    config = parts[0].config if len(parts) == 1 else join_documents(parts, documents[0])
    if own is not None and any(each.method in own.ops for each in (config, *config.steps)):
        config = replace(config, own=own)
    if strict and config.warnings:
        raise ConfigError("\n".join(["refused because of strict:", *filter(None, told)]))
    return config


class _Reader:
    """Reads a config, and goes on after a mistake, which is noted, as far as the rest makes sense without it."""

    def __init__(self, root: Place, ops: Mapping[str, Op], find: FindModels | None) -> None:
        self._root = root
        self._ops = ops
        self._bodies = BodyReader(root, ops, find)

    @property
    def mentions(self) -> Mapping[ModelRef, Place]:
        """First node that names each model."""
        return self._bodies.mentions

    def read(self, document: Document) -> MergeConfig | None:
        """Return the merge that the config describes; None where something is wrong with it."""
        root, reader = self._root, self._bodies
        if note_sweep(root) or note_search(root):
            return None
        if is_mixture(root):
            return read_mixture(root, document, reader.parse_model)
        root.check_keys(KEYS, reader.names, _OPTIONS)
        reader.op = root.attempt(partial(parse_method, ops=self._ops))
        places = root.attempt(find_bodies) or {WHOLE: root}
        adapter = root.get("adapter").attempt(parse_adapter)
        reader.base = reader.read_base(root) if adapter is None else find_base_of_updates(root, reader.op)
        if reader.base is None and (near := root.misspelt("base_model")):
            root.note(near)
        rest = root.get("copy_rest_from")
        parent = None if rest.value is None else rest.attempt(reader.parse_model)
        parameters = reader.read_parameters(root, of_model=False)
        bodies = {name: reader.read_body(place, name, parameters) for name, place in places.items()}
        dtypes = [root.get(key).attempt(parse_dtype) for key in ("dtype", "out_dtype")]
        patterns = root.get("keep_float32").attempt(parse_patterns)
        integers = root.get("integers").attempt(parse_integers)
        name = root.get("name").attempt(parse_name)
        template = root.get("chat_template").attempt(parse_chat_template)

        def where(place: Place) -> str:
            return document.where(place.line, is_short=True) + place.path

        vocabulary = root.attempt(partial(parse_tokenizer, parse_model=reader.parse_model, where=where))
        if reader.op is not None:
            bodies = self._check_parameters(reader.op, bodies)
        if reader.op is None or root.findings.errors:
            return None
        whole = bodies.get(WHOLE)
        config = MergeConfig(
            op=reader.op,
            models=whole.models if whole else (),
            slices=_list_slices(whole) if whole else (),
            modules=() if whole else tuple(_make_part(name, body, document) for name, body in bodies.items()),
            base_model=reader.base,
            copy_rest_from=parent,
            dtype=dtypes[0],
            out_dtype=dtypes[1],
            keep_float32=patterns or (),
            integers=integers or "equal",
            chat_template=template,
            name=name,
            parameters=whole.parameters if whole else parameters,
            text=document.text,
            warnings=root.findings.list_warnings(document),
            notes=tuple(dict.fromkeys(root.findings.notes)),
            is_run=whole is not None and isinstance(whole.place.get("models").value, dict),
            statistics=reader.statistics,
            statistics_lines={ref: where(place) for ref, place in reader.statistics_places.items()},
            vocabulary=vocabulary,
            adapter=adapter,
        )
        if vocabulary is not None:
            check_rows(vocabulary, config.referenced_models, root)
        return None if root.findings.errors else config

    def _check_parameters(self, op: Op, bodies: Mapping[str, Body]) -> dict[str, Body]:
        """Note which parameters the method needs and nothing gives; return the bodies, with equal weights for none."""
        root, uses = self._root, self._bodies.uses
        bodies = dict(bodies)
        if lacks_all_weights(op, uses):
            for name, body in bodies.items():
                body.place.get("models" if body.models else "slices").warn(
                    "no weights are given, so all models get the same; to say so, add `weight: 1` to the top-level"
                    " `parameters`"
                )
                weights = {**body.parameters, "weight": Setting((Rule(None, (1.0,)),))}
                bodies[name] = replace(body, parameters=weights)
        else:
            check_given(op, uses, per_model=True)
        check_statistics(root, op, uses, self._bodies.statistics, self._bodies.base)
        levels: list[tuple[Settings, ...]] = []
        for body in bodies.values():
            of_slices = [(part.parameters, body.parameters) for part in _list_slices(body)]
            levels += of_slices or ([] if body.is_copied else [(body.parameters,)])
        check_given(op, [Use((root,), given) for given in levels], per_model=False)
        if not levels:
            place = root.get("modules")
            place.note(
                place.error(f"each module has one model, and {op.name} merges more; write `merge_method: passthrough`")
            )
        return bodies


def _list_slices(body: Body) -> tuple[OutputSlice, ...]:
    return tuple(part for part in body.slices if part is not None)


def _make_part(name: str, body: Body, document: Document) -> ModulePart:
    place = document.where(body.place.line, is_short=True) + body.place.path
    return ModulePart(name, body.models, _list_slices(body), body.parameters, body.is_copied, place)
