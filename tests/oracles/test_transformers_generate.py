"""generate, beam search, the filters of order="hf" and score against transformers."""

import pytest
import torch

from gptfast import GPT2Config, GPT2LMHeadModel
from gptfast.generation.score import token_logprobs, windows
from gptfast.ops.sample import filtered, pack_bits, penalised

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the `test` extra)")
process = pytest.importorskip("transformers.generation.logits_process")


@pytest.fixture(scope="module")
def pair():
    """The same random weights in both libraries, spread so that greedy text does not repeat one token."""
    torch.manual_seed(0)
    config = GPT2Config(300, 64, 32, 2, 4, initializer_range=0.3, bos_token_id=299, eos_token_id=299)
    ours = GPT2LMHeadModel(config).eval()
    known = {k: v for k, v in config.to_dict().items() if k not in ("id2label", "label2id", "model_type")}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**known)).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return ours, theirs


IDS = torch.randint(0, 299, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "more",
    [{}, {"repetition_penalty": 1.5}, {"min_new_tokens": 9}, {"bad_words_ids": [[42], [7, 8]]}, {"suppress_tokens": [3, 42]}],
)
def test_greedy(pair, more):
    ours, theirs = pair
    plain = ours.generate(IDS, max_new_tokens=30)
    for end in (299, int(plain[0, 9])):
        settings = {"max_new_tokens": 30, "eos_token_id": end, "pad_token_id": 1, **more}
        expected = theirs.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=False, **settings)
        assert torch.equal(ours.generate(IDS, **settings), expected)


def test_greedy_left_padded(pair):
    ours, theirs = pair
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :4], mask[0, :4] = 1, 0
    ids[2, :1], mask[2, :1] = 1, 0
    expected = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=1)
    assert torch.equal(ours.generate(ids, attention_mask=mask, max_new_tokens=20, pad_token_id=1), expected)


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("stopping", [False, True, "never"])
def test_beam_search(pair, penalty, stopping):
    ours, theirs = pair
    frequent = int(ours.generate(IDS, max_new_tokens=12)[:, 7:].flatten().mode().values)
    penalised_beams = {"repetition_penalty": 1.7}
    cases = ((2, 1, 299, {}), (4, 4, frequent, {}), (3, 2, frequent, penalised_beams), (5, 3, [frequent, 3], {}))
    for beams, returned, end, more in cases:
        settings = {
            "max_new_tokens": 14, "num_beams": beams, "num_return_sequences": returned, "eos_token_id": end, "pad_token_id": 1,
            "length_penalty": penalty, "early_stopping": stopping, "return_dict_in_generate": True, "output_scores": True, **more,
        }
        mine = ours.generate(IDS, **settings)
        expected = theirs.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=False, **settings)
        assert torch.equal(mine.sequences, expected.sequences)
        assert torch.allclose(mine.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_filters_of_order_hf(seed):
    """The processed scores, as log-probabilities, and the kept sets; transformers cuts ties by its sort, so values are distinct."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, 200, generator=g) * 3
    ids = torch.randint(0, 200, (4, 12), generator=g)
    temperature, k, p = 0.5 + seed / 8, 5 + 15 * seed, 0.5 + seed / 25
    least, typical, penalty = 0.001 * seed, 0.4 + seed / 20, 1.0 + seed / 9
    steps = [
        process.RepetitionPenaltyLogitsProcessor(penalty), process.TemperatureLogitsWarper(temperature),
        process.TopKLogitsWarper(k), process.TopPLogitsWarper(p), process.MinPLogitsWarper(least),
        process.TypicalLogitsWarper(typical),
    ]
    expected = scores
    for step in steps:
        expected = step(ids, expected)
    seen = torch.zeros(4, 200, dtype=torch.bool).scatter_(1, ids, True)

    def rows(value, dtype=torch.float32):
        return torch.full((4,), value, dtype=dtype)

    x = penalised(scores, rows(penalty), None, None, None, None, pack_bits(seen), None)
    y, columns = filtered(x, rows(temperature), rows(k, torch.int64), rows(p), rows(least), rows(typical), "hf")
    full = y if columns is None else torch.full_like(x, -float("inf")).scatter_(1, columns, y)
    assert torch.equal(full > -float("inf"), expected > -float("inf"))
    assert torch.allclose(full.log_softmax(1), expected.log_softmax(1), atol=1e-5)


@pytest.mark.parametrize("count, stride", [(30, 32), (200, 32), (150, 10)])
def test_score(pair, count, stride):
    ours, theirs = pair
    ids = torch.randint(0, 299, (count,), generator=torch.Generator().manual_seed(2))
    expected = []
    with torch.no_grad():
        for begin, end, scored in windows(count, 64, stride):
            logprobs = theirs(ids[None, begin:end]).logits[0].log_softmax(-1)
            expected.append(logprobs[-scored:].gather(1, ids[end - scored + 1 : end + 1, None])[:, 0])
    values = torch.cat(expected)
    assert float(((token_logprobs(ours, ids, stride) - values).abs() / values.abs().clamp(min=1)).max()) < 1e-5
