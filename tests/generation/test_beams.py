"""Beam search on the engine's pages: what model.generate finds, on every runner, in any number of pages."""

import pytest
import torch

from gptfast import Error, GPT2Config, GPT2LMHeadModel, SamplingParams
from gptfast.generation.beam import BeamSettings
from gptfast.generation.paged_beams import PagedBeams
from gptfast.generation.scheduler import Scheduler
from gptfast.testing.generation import VOCAB, row, tiny

PLAIN = SamplingParams(temperature=0.0)


def beams(scheduler, rows, *settings):
    """[(score, tokens, reason)] of every prompt; the pages are all there again afterwards."""
    found = scheduler.beams(rows, BeamSettings(*settings))
    scheduler.check()
    assert scheduler.pool.available == scheduler.pool.pages
    return [[(h.score, h.tokens, h.finish_reason) for h in each] for each in found]


def test_beams_find_what_exhaustive_search_finds(make):
    """Three tokens and four steps: with as many beams as there are texts the best five are the most probable of all 81."""
    torch.manual_seed(5)
    model = GPT2LMHeadModel(GPT2Config(3, 8, 32, 2, 2, initializer_range=1.0, bos_token_id=0, eos_token_id=0)).eval()
    scheduler = Scheduler(make(300, model))
    (found,) = beams(scheduler, [row([0], 4, PLAIN)], 81, 0.0)
    texts = torch.cartesian_prod(*[torch.arange(3)] * 4).tolist()
    total = torch.tensor([sum(scheduler.score([0, *text[:-1]], text)) for text in texts])
    best = total.topk(5)
    assert [tokens for _, tokens, _ in found[:5]] == [texts[i] for i in best.indices]
    assert [score for score, *_ in found[:5]] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("length", [1, 62, 63, 64, 65, 130])
def test_pages_are_shared_and_copied_rightly(make, kind, length):
    """Beams that branch at and around the ends of pages, beside another prompt, in pieces and whole: what each has alone."""
    prompts = [[(7 * i) % VOCAB for i in range(length)], [5, 6, 7]]
    rows = [row(prompt, 6, PLAIN, stops=[3, 50]) for prompt in prompts]
    together = beams(Scheduler(make(40)), rows, 4, 1.0)
    for i in range(2):
        for chunk in (512, 50):
            assert beams(Scheduler(make(20), chunk=chunk), rows[i : i + 1], 4, 1.0) == together[i : i + 1]


@pytest.mark.parametrize(("penalty", "stopping"), [(1.0, False), (0.0, True), (2.0, "never"), (-1.0, False)])
def test_an_engines_beams_are_the_models(engine, model, tokenizer, penalty, stopping):
    if "fp32" not in engine.describe():
        pytest.skip("another format has other logits")
    prompts = ["The quick", "dog", "over the lazy dog"]
    params = SamplingParams(max_tokens=12, n=3, repetition_penalty=1.3)
    answers = engine.beam_search(prompts, 4, params, length_penalty=penalty, early_stopping=stopping)
    assert [(a.prompt, a.index) for a in answers] == [(p, i) for p in range(3) for i in range(3)]
    for number, prompt in enumerate(prompts):
        out = model.generate(
            tokenizer.encode(prompt, return_tensors="pt"), num_beams=4, num_return_sequences=3, max_new_tokens=12,
            repetition_penalty=1.3, length_penalty=penalty, early_stopping=stopping, return_dict_in_generate=True,
        )
        for answer, sequence, score in zip(answers[3 * number :], out.sequences, out.sequences_scores, strict=False):
            new = sequence[answer.prompt_tokens :].tolist()[: len(answer.token_ids)]
            assert answer.token_ids == new and answer.score == pytest.approx(float(score), abs=1e-4)
            assert answer.text == b"".join(tokenizer.token_bytes(t) for t in new if t != 299).decode(errors="replace")


def test_an_engine_goes_on_after_beams(engine):
    params = SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
    before = engine.generate("The quick", params)
    first, again = (engine.beam_search("The quick", 3, SamplingParams(max_tokens=8, seed=1)) for _ in range(2))
    assert len(first) == 1 and first[0].score < 0 and first[0].logprobs == [] and first == again
    assert engine.generate("The quick", params) == before and engine.beam_search([], 2) == []


def test_too_few_pages(make):
    scheduler = Scheduler(make(4))
    with pytest.raises(Error, match="beam search needs more than 4 pages of 64 tokens"):
        scheduler.beams([row([5] * 70, 6, PLAIN)], BeamSettings(8))
    scheduler.check()
    assert scheduler.pool.available == 4


def test_what_is_refused(engine):
    for arguments, message in (
        ({"num_beams": 0}, "num_beams is 0"), ({"num_beams": True}, "num_beams is True"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty is nan"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping is 'soon'; allowed: True, False, 'never'"),
        ({"num_beams": 2, "params": SamplingParams(n=3)}, "3 answers from num_beams=2"),
        ({"num_beams": 2, "params": SamplingParams(stop="x")}, "stop texts with num_beams=2"),
        ({"num_beams": 2, "params": SamplingParams(logprobs=1)}, "logprobs is 1"),
        ({"num_beams": 2, "prompts": [[5] * 64]}, "beam search needs room for one more"),
        ({"num_beams": 2, "prompts": [[5] * 65]}, "prompt has 65 tokens"),
    ):  # fmt: skip
        with pytest.raises(Error, match=message):
            engine.beam_search(**{"prompts": "dog", **arguments})


def test_nan_ends_its_prompt_alone(make, tiny_model):
    broken = tiny()
    broken.transformer.wte.weight.data[50] = float("nan")
    broken.lm_head.weight = torch.nn.Parameter(tiny_model.lm_head.weight.detach().clone())
    broken.config.tie_word_embeddings = False
    banned = SamplingParams(temperature=0.0, banned_tokens=(50,))
    rows = [row([1, 2, 3], 5, banned), row([4, 50], 5, banned), row([6], 5, banned)]
    found = beams(Scheduler(make(30, broken)), rows, 3)
    assert [each[0][2] for each in found] == ["length", "error", "length"] and len(found[1]) == 3
    for i in (0, 2):
        assert beams(Scheduler(make(30, broken)), rows[i : i + 1], 3) == found[i : i + 1]


def test_a_failure_in_a_step_gives_all_pages_back(make):
    runner = make(30)
    scheduler = Scheduler(runner)
    logits, calls = runner.logits, []

    def failing(batch):
        calls.append(None)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return logits(batch)

    runner.logits = failing
    with pytest.raises(RuntimeError):
        scheduler.beams([row([5] * 70, 6, PLAIN)], BeamSettings(4))
    assert scheduler.pool.available == 30
    source = PagedBeams(runner, scheduler.pool)
    runner.copy_pages = lambda pairs: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError):
        source.start([row([5] * 70, 6, PLAIN)], 4)
    source.close()
    assert scheduler.pool.available == 30
