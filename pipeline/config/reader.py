"""Reads a config: from YAML to a checked `MergeConfig`, and every mistake told at once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from raymerge.ops.own import OwnOps
from raymerge.ops.registry import Base, Op, load_ops
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.adapter import find_base_of_updates, parse_adapter
from raymerge.pipeline.config.chat_template import parse_chat_template
from raymerge.pipeline.config.document import Document, read_documents
from raymerge.pipeline.config.fields import (
    check_empty,
    parse_dtype,
    parse_integers,
    parse_layer_range,
    parse_name,
    parse_patterns,
)
from raymerge.pipeline.config.findings import TooManyError
from raymerge.pipeline.config.forms import check_lengths, find_body
from raymerge.pipeline.config.merge_config import MergeConfig, ModelEntry, OutputSlice, SliceSource
from raymerge.pipeline.config.methods import (
    Use,
    check_given,
    check_method_of_slice,
    check_models,
    check_sources,
    check_statistics,
    lacks_all_weights,
    parse_method,
    parse_settings,
    takes_first_as_base,
)
from raymerge.pipeline.config.mixture import is_mixture, read_mixture
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.config.reference import NO_MODEL, parse_model_ref, parse_revision, spelling_key
from raymerge.pipeline.config.steps import Part, join_documents
from raymerge.pipeline.config.sweep import note_sweep
from raymerge.pipeline.config.tokenizer import check_rows, parse_tokenizer
from raymerge.pipeline.config.training_run import RUN_KEYS, FindModels, parse_run
from raymerge.pipeline.config.values import Rule, Setting, Settings, overlay
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import shown

KEYS = (
    "merge_method", "models", "slices", "base_model", "dtype", "out_dtype", "parameters", "modules", "keep_float32",
    "integers", "chat_template", "name", "tokenizer", "tokenizer_source", "adapter",
)  # fmt: skip


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
    documents = read_documents(source)
    ops = {**load_ops(), **(own.ops if own else {})}
    roots = [
        Place(document.content, node=document.node, line=document.first_line if len(documents) > 1 else None)
        for document in documents
    ]
    parts = []
    for root, document in zip(roots, documents, strict=True):
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
        self._body = root
        """Where `models` or `slices` stand."""
        self._ops = ops
        self._find = find
        self._names = frozenset(parameter.name for op in ops.values() for parameter in op.parameters)
        """Of all parameters of all ops."""
        self._op: Op | None = None
        self._base: ModelRef | None = None
        self._spellings: dict[tuple[object, ...], ModelRef] = {}
        """Models by what all spellings of their names have in common."""
        self.mentions: dict[ModelRef, Place] = {}
        """Where each model is named first."""
        self._parameters: Settings = {}
        self._uses: list[Use] = []
        """Places that use per-model parameters."""
        self._statistics: dict[ModelRef, ModelRef] = {}

    def read(self, document: Document) -> MergeConfig | None:
        """Return the merge that the config describes; None where something is wrong with it."""
        root = self._root
        if note_sweep(root):
            return None
        if is_mixture(root):
            return read_mixture(root, document, self._parse_model)
        root.check_keys(KEYS, self._names)
        self._op = root.attempt(partial(parse_method, ops=self._ops))
        self._body = root.attempt(find_body) or root
        adapter = root.get("adapter").attempt(parse_adapter)
        self._base = self._read_base(root) if adapter is None else find_base_of_updates(root, self._op)
        if self._base is None and (near := root.misspelt("base_model")):
            root.note(near)
        self._parameters = self._read_parameters(root, of_model=False)
        if self._body is not root:
            self._parameters = overlay(self._read_parameters(self._body, of_model=False), self._parameters)
        models = self._read_models()
        slices = [place.attempt(self._read_slice) for place in self._body.get("slices").attempt(_list) or ()]
        if slices:
            check_empty(self._body.get("slices"), [part.sources[0].layer_range if part else None for part in slices])
        dtypes = [root.get(key).attempt(parse_dtype) for key in ("dtype", "out_dtype")]
        patterns = root.get("keep_float32").attempt(parse_patterns)
        integers = root.get("integers").attempt(parse_integers)
        name = root.get("name").attempt(parse_name)
        template = root.get("chat_template").attempt(parse_chat_template)
        vocabulary = root.attempt(partial(parse_tokenizer, parse_model=self._parse_model))
        if self._op is not None:
            if lacks_all_weights(self._op, self._uses):
                self._body.get("models" if models else "slices").warn(
                    "no weights are given, so all models get the same; to say so, add `weight: 1` to the top-level"
                    " `parameters`"
                )
                self._parameters = {**self._parameters, "weight": Setting((Rule(None, (1.0,)),))}
            else:
                check_given(self._op, self._uses, per_model=True)
            check_statistics(root, self._op, self._uses, self._statistics, self._base)
            levels = [(self._parameters,)] if not slices else [(s.parameters, self._parameters) for s in slices if s]
            check_given(self._op, [Use((root,), given) for given in levels], per_model=False)
        if self._op is None or root.findings.errors:
            return None
        config = MergeConfig(
            op=self._op,
            models=tuple(models),
            slices=tuple(part for part in slices if part is not None),
            base_model=self._base,
            dtype=dtypes[0],
            out_dtype=dtypes[1],
            keep_float32=patterns or (),
            integers=integers or "equal",
            chat_template=template,
            name=name,
            parameters=self._parameters,
            text=document.text,
            warnings=root.findings.list_warnings(document),
            notes=tuple(dict.fromkeys(root.findings.notes)),
            is_run=isinstance(self._body.get("models").value, dict),
            statistics=self._statistics,
            vocabulary=vocabulary,
            adapter=adapter,
        )
        if vocabulary is not None:
            check_rows(vocabulary, config.referenced_models, root)
        return None if root.findings.errors else config

    def _read_base(self, place: Place) -> ModelRef | None:
        base = place.get("base_model")
        return None if base.value is None else base.attempt(self._parse_model)

    def _parse_model(self, place: Place, beside: Place | None = None) -> ModelRef:
        """Return the model named at a place, by the name that the config has for it elsewhere.

        Args:
            place: where it is named.
            beside: where its revision may be, if there is such a place.
        """
        model = parse_model_ref(place)
        if beside is not None:
            model = parse_revision(beside, model)
        known = self._spellings.setdefault(spelling_key(model), model)
        self.mentions.setdefault(known, place)
        if known != model:
            place.warn(f"{model} is {known}, spelt in another way; both count as one model, and as two in mergekit")
        return known

    def _read_parameters(self, place: Place, *, of_model: bool) -> Settings:
        written = place.get("parameters")
        if self._op is None:
            return {}
        return written.attempt(partial(parse_settings, op=self._op, ops=self._ops, of_model=of_model)) or {}

    def _read_models(self) -> list[ModelEntry]:
        place = self._body.get("models")
        entries: dict[ModelRef, ModelEntry] = {}
        num_errors = len(place.findings.errors)
        if isinstance(place.value, dict) and not RUN_KEYS.isdisjoint(place.value):
            entries |= place.attempt(self._read_run) or {}
        else:
            for written in place.attempt(_list) or ():
                entry = written.attempt(partial(self._read_entry, before=entries))
                if entry is not None:
                    entries[entry.model] = entry
        if entries and self._op is not None and len(place.findings.errors) == num_errors and self._is_base_sound():
            if self._base is None and takes_first_as_base(self._op):
                self._base = self._take_first(next(iter(entries)))
            check = partial(check_models, place=place, op=self._op, models=tuple(entries), base=self._base)
            self._root.attempt(check)
        return list(entries.values())

    def _read_run(self, place: Place) -> dict[ModelRef, ModelEntry]:
        entries = {}
        for model, parameters in parse_run(place, self._op, self._parameters, self._find, self._base):
            self._check_parameters(place, model, (parameters, self._parameters), self._base)
            entries[model] = ModelEntry(model, parameters)
        return entries

    def _read_entry(self, place: Place, before: Mapping[ModelRef, ModelEntry]) -> ModelEntry | None:
        self._check_entry(place, ("model", "revision", "parameters", *self._list_statistics()))
        model, parameters = self._read_model(place), self._read_parameters(place, of_model=True)
        if model is None:
            return None
        self._read_statistics(place, model)
        if model in before:
            same = list(before).index(model)
            raise place.get("model").error(
                f"{model} is listed already, as models[{same}]; list each model once, with all of its weight"
            )
        self._check_parameters(place, model, (parameters, self._parameters), self._base)
        return ModelEntry(model, parameters)

    def _read_model(self, place: Place) -> ModelRef | None:
        written = place.get("model")
        if written.value is None:
            place.note(place.missing("model", NO_MODEL))
            return None
        return written.attempt(partial(self._parse_model, beside=place.get("revision")))

    def _take_first(self, model: ModelRef) -> ModelRef:
        """Note that the first model is the base, for want of another, and return it."""
        self._root.findings.notes.append(f"base_model is not given, so the first model, {model}, is the base (t = 0)")
        return model

    def _list_statistics(self) -> tuple[str, ...]:
        """Return the key for a model's statistics, if the method takes any."""
        return (self._op.statistics.key,) if self._op and self._op.statistics else ()

    def _read_statistics(self, place: Place, model: ModelRef) -> None:
        for key in self._list_statistics():
            written = place.get(key)
            found = None if written.value is None else written.attempt(parse_model_ref)
            if found is not None and self._statistics.setdefault(model, found) != found:
                before = self._statistics[model]
                written.note(written.error(f"{found} is given for {model}, and {before} before; give it once"))

    def _is_base_sound(self) -> bool:
        return self._base is not None or self._root.get("base_model").value is None

    def _check_parameters(
        self, place: Place, model: ModelRef, levels: tuple[Settings, ...], base: ModelRef | None, *around: Place
    ) -> None:
        """Warn about parameters of a base that takes none; note what others need."""
        op = self._op
        if op is None:
            return
        if model != base or op.base is Base.INPUT:
            self._uses.append(Use((place, *around, self._root), levels, model))
        elif levels[0]:
            place.get("parameters").warn(
                f"ignored ({', '.join(levels[0])}), because {model} is the base, and {op.name} takes none for the base"
            )

    def _read_slice(self, place: Place) -> OutputSlice | None:
        self._check_entry(place, ("sources", "base_model", "merge_method", "residual_weight", "parameters"))
        if self._op is not None:
            check_method_of_slice(place, self._op)
        if place.get("residual_weight").value is not None:
            place.get("residual_weight").warn("has no effect, in mergekit neither; remove it")
        written = place.get("sources")
        if not written:
            problem = "no sources are given; list at least one `- model: ...` with its layer_range"
            raise place.missing("sources", problem)
        own_base = self._read_base(place)
        if own_base and self._op and self._op.base is Base.INPUT:
            place.get("base_model").warn(f"has no effect, because {self._op.name} takes no base; remove it")
        base = own_base or self._base
        parameters = self._read_parameters(place, of_model=False)
        num_errors = len(place.findings.errors)
        read = partial(self._read_source, around=place, parameters=parameters, base=base)
        sources = [source.attempt(read) for source in written.elements()]
        found = tuple(source for source in sources if source is not None)
        if len(place.findings.errors) > num_errors:
            return None
        check_lengths(written, found)
        if base is None and self._op is not None and takes_first_as_base(self._op) and self._is_base_sound():
            base = own_base = self._take_first(found[0].model)
        if self._op is not None and self._is_base_sound():
            check_sources(self._root, written, self._op, [source.model for source in found], base)
        return OutputSlice(found, own_base, parameters)

    def _read_source(
        self, place: Place, around: Place, parameters: Settings, base: ModelRef | None
    ) -> SliceSource | None:
        self._check_entry(place, ("model", "revision", "layer_range", "parameters", *self._list_statistics()))
        model, own = self._read_model(place), self._read_parameters(place, of_model=True)
        if model is not None:
            self._read_statistics(place, model)
            self._check_parameters(place, model, (own, parameters, self._parameters), base, around)
        layer_range = parse_layer_range(place.get("layer_range"), place.misspelt("layer_range"))
        return None if model is None else SliceSource(model, layer_range, own)

    def _check_entry(self, place: Place, keys: tuple[str, ...]) -> None:
        """Check that an entry of a list is a mapping with these keys."""
        if isinstance(place.value, str):
            raise place.error(f"{shown(place.value)} is given, a mapping is needed; write `- {keys[0]}: {place.value}`")
        if place.value is None:
            raise place.error(f"the entry is empty; write `- {keys[0]}: ...`")
        place.check_keys(keys, self._names)


def _list(place: Place) -> list[Place]:
    return list(place.elements()) if place else []
