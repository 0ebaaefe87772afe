"""SamplingParams: what is refused, in one line that names the field, the value and what is allowed."""

import dataclasses
import subprocess
import sys

import pytest

from gptfast import Error, SamplingParams

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1), ("temperature", NAN), ("temperature", INF), ("temperature", "hot"), ("temperature", 1e39),
        ("top_k", 2.5), ("top_k", True), ("top_p", 1.0001), ("top_p", -0.1), ("top_p", NAN), ("min_p", 2), ("typical_p", -1),
        ("repetition_penalty", 0), ("repetition_penalty", -1),
        ("repetition_penalty", 1e-66), ("repetition_penalty", NAN), ("frequency_penalty", INF),
        ("seed", 2**64), ("seed", -(2**63) - 1), ("seed", 1.0), ("n", 0), ("n", 5000), ("max_tokens", -1), ("min_tokens", -1),
        ("logprobs", -1), ("logprobs", 1001), ("logprobs_mode", "cooked"), ("order", "mine"), ("ignore_eos", 1), ("stop", 5),
        ("stop_token_ids", 5), ("stop_token_ids", "no"), ("allowed_tokens", 7),
    ],
)
def test_refused(field, value):
    with pytest.raises(Error) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert message.startswith(field) and repr(value) in message and "\n" not in message
    assert "allowed" in message or "needed" in message


@pytest.mark.parametrize(
    "values", [{"stop": ("a", "")}, {"logit_bias": {1: NAN}}, {"logit_bias": {"1": 1.0}}, {"banned_tokens": [1.5]}]
)
def test_refused_items(values):
    with pytest.raises(Error):
        SamplingParams(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0}, {"temperature": 1e-8}, {"temperature": 1e30}, {"top_k": -5}, {"top_k": 2**31}, {"top_p": 0},
        {"seed": -1}, {"seed": 2**64 - 1}, {"max_tokens": 0}, {"logit_bias": {3: -INF}}, {"logprobs": 0},
    ],
)
def test_accepted(values):
    assert dataclasses.asdict(SamplingParams(**values)).items() >= values.items()


def test_lists_become_tuples_and_one_stop_is_a_list():
    params = SamplingParams(stop="END", stop_token_ids=[1, 2])
    assert params.stop == ("END",) and params.stop_token_ids == (1, 2)


def test_ids_are_checked_against_the_vocabulary():
    for name in ("banned_tokens", "allowed_tokens", "stop_token_ids"):
        with pytest.raises(Error, match=f"{name} holds token id 300; allowed: 0 to 299"):
            SamplingParams(**{name: [300]}).check_vocabulary(300)
    with pytest.raises(Error, match="logit_bias holds token id -1"):
        SamplingParams(logit_bias={-1: 2.0}).check_vocabulary(300)


def test_the_flags_of_the_command_line_need_no_torch():
    code = "import sys; from gptfast.generation import SamplingParams; from gptfast.options import keys; keys(SamplingParams); "
    assert subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"]).returncode == 0
