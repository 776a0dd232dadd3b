"""Answers that are JSON of a given schema, whatever the model would rather say.

The schema becomes a grammar. Tokens that the grammar does not allow are never sampled.
"""

import json

from pyllamabatch import Engine, Model, SamplingParams

schema = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "size": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
    },
    "required": ["colour", "size", "tags"],
    "additionalProperties": False,
}

with Model.default() as model, Engine(model, n_seq_max=4) as engine:
    # Equal prompts with other seeds give other answers. All four run in the same steps.
    params = [SamplingParams(json_schema=schema, seed=seed, max_tokens=200) for seed in range(4)]
    for result in engine.generate(["Describe a ball: "] * 4, params):
        if result.finish_reason == "stop":  # "length" would leave the text unfinished
            print(json.loads(result.text))
