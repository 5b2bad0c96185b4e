"""The schema of the output's vocabulary."""

from __future__ import annotations

from raymerge.pipeline.config.schema.parts import NAME, Schema, make_object, refer

GIVER = "Whose tokenizer the output gets: `union` of all, `base`, or a model's."
_ROW: Schema = {
    "anyOf": [
        {"type": "null"},
        refer("model"),
        make_object({"kind": {"const": "zero"}}, "kind"),
        {
            **make_object(
                {
                    "kind": {"const": "model_token"},
                    "model": refer("model"),
                    "token": NAME,
                    "token_id": {"type": "integer", "minimum": 0},
                },
                "kind",
                "model",
            ),
            "oneOf": [{"required": ["token"]}, {"required": ["token_id"]}],
        },
    ]
}
TOKENIZER: Schema = {
    **make_object(
        {
            "source": {"description": GIVER, "anyOf": [{"type": "null"}, refer("model")]},
            "tokens": {
                "description": "Rows of tokens in models that lack them; those that are missing are added.",
                "type": ["object", "null"],
                "propertyNames": {"minLength": 1},
                "additionalProperties": {
                    **make_object({"source": _ROW, "force": {"type": ["boolean", "null"]}}),
                    "type": ["object", "null"],
                },
            },
            "pad_to_multiple_of": {"type": ["integer", "null"], "minimum": 1, "maximum": 2**20},
        }
    ),
    "type": ["object", "null"],
    "description": "The output's vocabulary.",
}
