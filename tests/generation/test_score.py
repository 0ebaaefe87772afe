"""score: the chain rule, windows, and what is counted."""

import itertools
import math

import pytest
import torch

from gptfast import Error, GPT2Config, GPT2LMHeadModel
from gptfast.generation.score import score_ids, token_logprobs, windows


def test_all_continuations_of_a_three_token_vocabulary_sum_to_one():
    torch.manual_seed(3)
    tiny = GPT2LMHeadModel(GPT2Config(3, 8, 16, 2, 2, initializer_range=0.5, bos_token_id=0, eos_token_id=0)).eval()
    total = sum(math.exp(score_ids(tiny, ids, 4, bos=0).total) for ids in itertools.product(range(3), repeat=4))
    assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "count, context, stride", [(2, 8, 4), (9, 8, 4), (10, 8, 4), (40, 8, 4), (41, 8, 3), (30, 8, 8), (30, 8, 1), (1, 8, 4)]
)
def test_windows_score_every_token_once_with_context(count, context, stride):
    seen = []
    for begin, end, scored in windows(count, context, stride):
        assert 0 < end - begin <= context and end < count
        for target in range(end - scored + 1, end + 1):
            seen.append(target)
            assert target - begin >= min(target, context - stride + 1)  # tokens before it
    assert seen == list(range(1, count))


def test_a_short_text_is_one_log_softmax(model):
    ids = torch.randint(0, 290, (20,)).tolist()
    start = model.config.bos_token_id
    with torch.no_grad():
        expected = model(torch.tensor([[start, *ids]])).logits[0, :-1].log_softmax(1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    result = score_ids(model, ids, 33, start)
    assert torch.allclose(torch.tensor(result.logprobs), expected, atol=1e-5)
    assert result.total == pytest.approx(float(expected.sum()), abs=1e-4)
    assert result.bits_per_byte == pytest.approx(-result.total / math.log(2) / 33)
    assert result.perplexity == pytest.approx(math.exp(-result.total / 20))


def test_a_long_text_is_scored_in_windows(model):
    ids = torch.randint(0, 290, (200,))
    values = token_logprobs(model, ids, 16)
    assert values.shape == (199,)
    with torch.no_grad():
        for target in (1, 64, 65, 80, 81, 150, 199):
            begin = 0 if target <= 64 else math.ceil((target - 64) / 16) * 16  # the first window that predicts it
            logits = model(ids[None, begin:target]).logits[0, -1]
            assert float(values[target - 1]) == pytest.approx(float(logits.log_softmax(0)[ids[target]]), abs=1e-4)
    assert not torch.allclose(values, token_logprobs(model, ids, 64), atol=1e-3)  # another stride is another context


def test_without_bos_the_first_token_has_no_score(engine):
    whole, without = engine.score("The dog jumps."), engine.score("The dog jumps.", bos=False)
    assert len(whole.logprobs) == len(whole.token_ids) == len(without.logprobs)
    assert without.logprobs[0] is None and None not in whole.logprobs and without.bytes == 14
    assert without.total == pytest.approx(sum(without.logprobs[1:]), abs=1e-4)


def test_empty_and_bad(engine, model):
    assert engine.score("").total == 0 and engine.score("").bits_per_byte == 0 and engine.score("", bos=False).logprobs == []
    for stride in (0, 65, 1.5, True):
        with pytest.raises(Error, match="stride"):
            engine.score("x", stride=stride)
    with pytest.raises(Error, match="300"):
        token_logprobs(model, [1, 300])
