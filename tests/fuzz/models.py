"""Mutated config.json, indexes and tokenizer files beside sound weights."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from raymerge.pipeline import driver
from raymerge.pipeline.checkpoint.inspection.inspect import inspect
from raymerge.pipeline.cli.formats import format_inspection, inspection_json
from raymerge.pipeline.plan.out_files import Copied
from raymerge.pipeline.plan.report import format_plan, plan_json
from raymerge.pipeline.plan.types import MergePlan
from tests.checkpoints import INDEX, llama_config, write_llama
from tests.fuzz.campaign import Campaign, write
from tests.fuzz.mutation import NUMBERS, VALUES, dump, mutate, parse_pairs, spoil

_MORE: tuple[dict[str, Any], ...] = (
    {},
    {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8, "use_sliding_window": True},
    {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "rope_scaling": None, "mlp_only_layers": [0]},
    {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}, "tie_word_embeddings": True},
    {"text_config": llama_config(), "vision_config": {"num_hidden_layers": 2, "hidden_size": 16}},
    {"auto_map": {"AutoModel": "modeling_x.X"}, "transformers_weights": INDEX, "use_auth_token": "hf_abcdefgh1"},
    {"num_experts": 2, "num_experts_per_tok": 1, "first_k_dense_replace": 1, "full_attention_interval": 2},
    {"id2label": {"0": "a"}, "block_configs": [{"a": 1}], "num_nextn_predict_layers": 1, "dtype": "float32"},
)
_SHARD = "model-00001-of-00002.safetensors"
_VALUES = (*VALUES, *NUMBERS, '"bfloat16"', f'"{_SHARD}"', f'"/x/{_SHARD}"', '"model.safetensors"', '"config.json"',
           '"model-00003-of-00002.safetensors"', "[[0]]", "2", "4", "16")  # fmt: skip
_TOKENIZER_FILES = {
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]},
        "added_tokens_decoder": {"0": {"content": "<s>", "special": True}}, "bos_token": "<s>", "max_length": 1e30,
        "chat_template": [{"name": "default", "template": "{{ token }}"}], "hf_token": "hf_abcdefgh12345678",
    },
    "special_tokens_map.json": {"bos_token": {"content": "<s>", "lstrip": False}, "unk_token": "<unk>"},
    "added_tokens.json": {"<s>": 0, "<pad>": 9},
    "vocab.json": {"a": 0, "b": 1},
    "generation_config.json": {"eos_token_id": [0, 1], "temperature": 0.5},
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                     {"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"}],
}  # fmt: skip


class ModelCase(NamedTuple):
    """A file of a model, in place of the sound one."""

    name: str
    content: bytes
    config: dict[str, Any]
    """The merge."""


class ModelFiles(Campaign[ModelCase]):
    """config.json and model.safetensors.index.json."""

    def __init__(self, directory: Path) -> None:
        self.model = write_llama(directory / "m0", 0, num_shards=2)
        other = write_llama(directory / "m1", 1, num_shards=1)
        self._sound = {name: (self.model / name).read_bytes() for name in ("config.json", INDEX)}
        both = [{"model": str(self.model)}, {"model": str(other)}]
        ranges = [[0, 2], [1, 2]]
        self._configs: list[dict[str, Any]] = [
            {"merge_method": "linear", "models": both, "parameters": {"weight": 1}},
            {"merge_method": "slerp", "models": both, "base_model": str(other), "parameters": {"t": 0.5}},
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": each["model"], "layer_range": part}]}
                                                       for each, part in zip(both, ranges, strict=True)]},
        ]  # fmt: skip

    def make(self, random: Random) -> ModelCase:
        name = random.choice([*self._sound])
        text = json.dumps({**json.loads(self._sound[name]), **(random.choice(_MORE) if name != INDEX else {})})
        tree = mutate(parse_pairs(text), random, _VALUES)
        return ModelCase(name, spoil(dump(tree), random, 0.1), random.choice(self._configs))

    def attempt(self, case: ModelCase) -> None:
        for name, content in self._sound.items():
            write(self.model / name, case.content if name == case.name else content)
        found = inspect(self.model)
        format_inspection(found, with_tensors=True)
        json.loads(inspection_json(found), parse_constant=_refuse)
        self.plan(case.config)

    def plan(self, config: dict[str, Any]) -> MergePlan:
        """Return a plan, after it was printed in each way."""
        plan = driver.plan(config)
        format_plan(plan, verbose=True)
        json.loads(plan_json(plan), parse_constant=_refuse)
        return plan

    def explain_refusal(self, case: ModelCase) -> str:
        try:
            value = json.loads(case.content.decode())
            if not isinstance(value, dict):
                return "not an object"
            is_sound = case.name != INDEX or value["weight_map"] == json.loads(self._sound[INDEX])["weight_map"]
            return "" if is_sound else "the index is not that of the files"
        except (ValueError, LookupError) as error:
            return f"{error!r}"


class TokenizerFiles(ModelFiles):
    """Tokenizers that `tokenizers` loads, and what lies beside them; they are copied as they are but for secrets."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        vocab = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4}
        kinds = (models.WordLevel(vocab, unk_token="<unk>"), models.BPE(vocab, [("a", "b")]),
                 models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0), models.WordPiece(vocab))  # fmt: skip
        self._seeds = [(name, json.dumps(value)) for name, value in _TOKENIZER_FILES.items()]
        for kind in kinds:
            tokenizer = tokenizers.Tokenizer(kind)
            tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel()
            tokenizer.add_special_tokens(["<s>", "hf_abcdefgh12345678"])
            self._seeds += [("tokenizer.json", tokenizer.to_str())] * 3
        self._plan: MergePlan | None = None

    def make(self, random: Random) -> ModelCase:
        name, text = random.choice(self._seeds)
        tree = mutate(parse_pairs(text), random, _VALUES) if random.random() < 0.95 else parse_pairs(text)
        return ModelCase(name, spoil(dump(tree), random, 0.1), random.choice(self._configs))

    def attempt(self, case: ModelCase) -> None:
        path = self.model / case.name
        try:
            super().attempt(case._replace(name=""))
            write(path, case.content)
            self._plan = self.plan(case.config)
        finally:
            path.unlink(missing_ok=True)

    def explain_refusal(self, case: ModelCase) -> str:
        assert self._plan is not None
        if str(self._plan.donor) != str(self.model):
            return ""
        (file,) = [each for each in self._plan.outputs[0].side_files if each.name == case.name]
        if isinstance(file, Copied):
            return ""
        if case.name == "tokenizer.json" and _loads(case.content) and not _loads(file.text.encode()):
            return "masked, the tokenizer no longer loads"
        return "" if _is_json(case.content) <= _is_json(file.text.encode()) else "masked, it is no longer JSON"


def _loads(content: bytes) -> bool:
    try:
        tokenizers.Tokenizer.from_buffer(content)
    except Exception:  # what tokenizers raises
        return False
    return True


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content.decode())
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
