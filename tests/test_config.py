"""GPT2Config: what makes no model is named, and config.json is read and written."""

from __future__ import annotations

import json
import math

import pytest

from gptfast import Error, GPT2Config

TINY = {"vocab_size": 61, "n_positions": 40, "n_embd": 24, "n_layer": 3, "n_head": 3, "initializer_range": 0.3}

@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("n_embd 10 is not divisible by n_head 3", {"n_embd": 10, "n_head": 3}),
        ("n_layer is 0", {"n_layer": 0}),
        ("n_layer is 100000", {"n_layer": 100000}),
        ("vocab_size is True", {"vocab_size": True}),
        ("n_positions is '8'", {"n_positions": "8"}),
        ("resid_pdrop is 1.0; at least 0 and below 1", {"resid_pdrop": 1.0}),
        ("layer_norm_epsilon is nan", {"layer_norm_epsilon": math.nan}),
        ("activation_function is 'mish'; allowed: gelu_new", {"activation_function": "mish"}),
        ("use_cache is 1", {"use_cache": 1}),
        ("more than 2^40 numbers", {"n_embd": 2**30, "n_head": 1}),
        ("id2label has the keys [0, 2]", {"id2label": {"0": "a", "2": "b"}}),
        ("real_vocab_size 9 is larger", {"vocab_size": 8, "real_vocab_size": 9}),
        ("add_cross_attention is True", {"add_cross_attention": True}),
        ("model_type is 'llama'", {"model_type": "llama"}),
        ("quantization_config is {'bits': 4}", {"quantization_config": {"bits": 4}}),
    ],
)
def test_config_that_makes_no_model(line: str, values: dict[str, object]) -> None:
    with pytest.raises(Error) as caught:
        GPT2Config.from_dict(values)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_config_survives_json_and_ignores_what_it_does_not_know() -> None:
    config = GPT2Config(**{**TINY, "n_inner": 20, "id2label": {0: "bad", 1: "good", 2: "odd"}, "pad_token_id": 3})
    written = json.loads(json.dumps(config.to_dict()))
    assert written["n_ctx"] == 40 and written["model_type"] == "gpt2"
    unknown = {"summary_type": "cls_index", "auto_map": {"AutoModel": "evil.py"}, "n_head_typo": 7}
    read = GPT2Config.from_dict({**written, **unknown, "eos_token_id": [50256, 3]})
    assert read == config and read.num_labels == 3
