"""What config.json says of single modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from raymerge.pipeline.checkpoint.modules import AUDIO, DECODER, ENCODER, PROJECTOR, TEXT, VISION
from raymerge.pipeline.plan.forms.module_config import find_section

QWEN = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 3, "fullatt_block_indexes": [1]}}
OMNI = {"thinker_config": {**QWEN, "audio_config": {"encoder_layers": 2, "num_hidden_layers": 2}}}
WHISPER = {"encoder_layers": 2, "decoder_layers": 3, "num_hidden_layers": 2, "decoder_ffn_dim": 8, "encoder_ffn_dim": 9}
T5 = {"num_layers": 3, "num_decoder_layers": 2, "d_model": 8}
OLD_T5 = {"num_layers": 3}
PAIR = {"encoder": {"num_hidden_layers": 2}, "decoder": {"num_hidden_layers": 3, "num_layers": 9}}


@pytest.mark.parametrize(
    ("config", "role", "depth", "expected"),
    [
        (QWEN, VISION, 3, {"vision_config": {"depth": 7, "fullatt_block_indexes": [1]}}),
        (OMNI, AUDIO, 2, {"thinker_config": {**QWEN, "audio_config": {"encoder_layers": 2, "num_hidden_layers": 7}}}),
        (WHISPER, ENCODER, 2, {"encoder_layers": 7, "num_hidden_layers": 7}),
        (WHISPER, DECODER, 3, {"decoder_layers": 7}),
        (T5, ENCODER, 3, {"num_layers": 7}),
        (T5, DECODER, 2, {"num_decoder_layers": 7}),
        (OLD_T5, ENCODER, 3, {"num_layers": 7, "num_decoder_layers": 3}),
        (OLD_T5, DECODER, 3, {"num_decoder_layers": 7}),
        (PAIR, ENCODER, 2, {"encoder": {"num_hidden_layers": 7}}),
        (PAIR, DECODER, 3, {"decoder": {"num_hidden_layers": 7, "num_layers": 9}}),
    ],
)  # fmt: skip
def test_depths_are_found_and_changed(config: dict[str, Any], role: str, depth: int, expected: dict[str, Any]) -> None:
    section = find_section(config, role)
    assert section is not None
    before = copy.deepcopy(config)
    module = section.read(config)
    assert module["num_hidden_layers"] == depth
    assert section.write(copy.deepcopy(config), dict(module)) == before, "nothing is changed where nothing changes"
    assert section.write(copy.deepcopy(config), {**module, "num_hidden_layers": 7}) == {**before, **expected}
    assert config == before


def test_fields_of_the_other_side_are_no_part_of_a_module() -> None:
    section = find_section(WHISPER, DECODER)
    assert section is not None
    assert section.read(WHISPER) == {"num_hidden_layers": 3, "decoder_ffn_dim": 8}


def test_a_language_model_has_the_whole() -> None:
    section = find_section(QWEN, TEXT)
    assert section is not None
    assert section.read(QWEN) is QWEN


@pytest.mark.parametrize(
    ("config", "role"),
    [(QWEN, PROJECTOR), (QWEN, AUDIO), (QWEN, ""), ({}, ENCODER), ({"vision_config": {"depths": [2, 2]}}, VISION)],
)
def test_where_no_layers_are_counted(config: dict[str, Any], role: str) -> None:
    assert find_section(config, role) is None
