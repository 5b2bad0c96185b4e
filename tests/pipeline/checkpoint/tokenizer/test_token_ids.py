"""Token ids in configs: translated to the same tokens in another vocabulary."""

from __future__ import annotations

from typing import Any

from raymerge.pipeline.checkpoint.tokenizer.token_ids import set_vocab_size, translate_ids

TOKENS = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<image>"}
VOCAB = {"</s>": 7, "<s>": 8, "<image>": 9}


def test_each_id_follows_its_token_in_every_section() -> None:
    config: dict[str, Any] = {
        "bos_token_id": 1,
        "eos_token_id": [2, 1],
        "text_config": {"image_token_index": 3, "hidden_size": 2},
        "num_token_layers": 1,
    }
    assert translate_ids(config, {}, TOKENS, VOCAB) == []
    assert config == {
        "bos_token_id": 8,
        "eos_token_id": [7, 8],
        "text_config": {"image_token_index": 9, "hidden_size": 2},
        "num_token_layers": 1,
    }


def test_ids_that_the_giver_states_are_taken_from_it() -> None:
    config: dict[str, Any] = {"eos_token_id": 2, "pad_token_id": None, "text_config": {"bos_token_id": 1}}
    assert translate_ids(config, {"eos_token_id": 70, "pad_token_id": 71}, TOKENS, VOCAB) == []
    assert config == {"eos_token_id": 70, "pad_token_id": None, "text_config": {"bos_token_id": 8}}


def test_ids_of_tokens_that_are_not_there_become_null_and_are_listed() -> None:
    config: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": [2, 0], "unk_token_id": -1}
    lost = translate_ids(config, {}, TOKENS, VOCAB)
    assert lost == ["pad_token_id (0, '<pad>')", "eos_token_id ([2, 0])", "unk_token_id (-1)"]
    assert config == {"pad_token_id": None, "eos_token_id": [7], "unk_token_id": None}


def test_the_vocabulary_s_size_is_stated_where_it_was() -> None:
    config: dict[str, Any] = {"vocab_size": 4, "text_config": {"vocab_size": 4}, "audio_config": {"vocab_size": 9}}
    set_vocab_size(config, 10)
    assert config == {"vocab_size": 10, "text_config": {"vocab_size": 10}, "audio_config": {"vocab_size": 9}}


def test_the_rows_of_embeddings_of_layers_are_stated_if_they_are_those_of_tokens() -> None:
    config: dict[str, Any] = {"vocab_size": 4, "vocab_size_per_layer_input": 4}
    set_vocab_size(config, 9, ["lm_head.weight"])
    assert config == {"vocab_size": 9, "vocab_size_per_layer_input": 4}
    set_vocab_size(config, 10, ["model.language_model.embed_tokens_per_layer.weight"])
    assert config == {"vocab_size": 10, "vocab_size_per_layer_input": 10}
