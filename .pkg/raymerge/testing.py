"""Helpers to test merge methods of one's own; see `pipeline/testing.py`."""

from raymerge.pipeline.testing import SHAPES as SHAPES
from raymerge.pipeline.testing import draw_models as draw_models
from raymerge.pipeline.testing import merge_in_every_way as merge_in_every_way
from raymerge.pipeline.testing import read_model as read_model
from raymerge.pipeline.testing import write_model as write_model
