"""The C++ engine behind the runner protocol: equal bits whatever surrounds a sequence, and eager's logits; edge cases."""

import os
import signal
import threading
import time
from dataclasses import replace
from functools import cache

import pytest
import torch

import gptfast.backend as backend
from gptfast import Error, GPT2Config, GPT2LMHeadModel, packed, packing, testing
from gptfast.cache import PAGE
from gptfast.generation.cpp import CppRunner
from gptfast.generation.parameters import SamplingParams
from gptfast.generation.rows import Row, Sampler
from gptfast.generation.runner import Batch

ISAS = ("plain", "avx2", "avx512")
FORMATS = ("fp32", "bf16", "int8", "int4")
CONFIGS = {
    "heads-of-32": {"n_embd": 64, "n_head": 2, "n_layer": 2, "vocab_size": 1031},
    "odd": {"n_embd": 60, "n_head": 3, "n_layer": 3, "n_inner": 100, "vocab_size": 337, "activation_function": "gelu"},
    "untied": {
        "n_embd": 96, "n_head": 4, "n_inner": 70, "vocab_size": 513, "tie_word_embeddings": False, "activation_function": "relu",
    },
    "scaled": {"n_embd": 40, "n_head": 5, "vocab_size": 97, "scale_attn_by_inverse_layer_idx": True, "activation_function": "silu"},
    "unscaled": {"n_embd": 36, "n_head": 1, "vocab_size": 1, "scale_attn_weights": False, "activation_function": "tanh"},
    "one-head": {"n_embd": 64, "n_head": 1, "n_layer": 1, "vocab_size": 600, "activation_function": "gelu_pytorch_tanh"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def extension():
    testing.requires("cpp", backend.EXTENSIONS["_C"])


@cache
def model_of(name, context=200):
    """Random weights of a size at which every part matters; sharp enough that draws differ."""
    config = GPT2Config(**{"n_positions": context, "n_layer": 2, **CONFIGS[name]})
    generator = torch.Generator().manual_seed(len(name))
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = 0.15 if parameter.dim() == 2 else 0.2
            one = float("ln" in key and key.endswith("weight"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + one)
    return model


@cache
def packed_of(name, format):
    return packed.pack(model_of(name), format)


def runner_of(name, format="fp32", threads=1, pages=200):
    return CppRunner(packed_of(name, format), threads, pages)


def row_of(prompt, i=0, **params):
    filters = {"temperature": (0.0, 0.9, 1.0)[i % 3], "top_k": (0, 20)[i % 2], "top_p": (1.0, 0.9, 0.5)[i % 3]}
    chosen = {**filters, "logprobs": 3, **params}
    return Row(prompt=prompt, params=SamplingParams(**chosen), seed=i, limit=150, stop_ids=frozenset(), start=len(prompt))


def prompts_of(vocab, lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


class Driver:
    """Drives rows through a runner as a scheduler would; each has `width` pages."""

    def __init__(self, runner, prompts, width=3, first=0, **params):
        self.runner = runner
        self.rows = [row_of(prompt, first + i, **params) for i, prompt in enumerate(prompts)]
        self.tables = [list(range((first + i) * width, (first + i + 1) * width))[::-1] for i in range(len(prompts))]
        self.done = [0] * len(prompts)

    def ids(self, i):
        return [*self.rows[i].prompt, *self.rows[i].tokens]

    def give(self, index, drawn):
        for n, i in enumerate(index):
            drawn.give(n, self.rows[i])

    def prefill(self, chunk=None, together=True):
        """Prompts in pieces of at most `chunk` tokens, and each one's first draw."""
        for group in [list(range(len(self.rows)))] if together else [[i] for i in range(len(self.rows))]:
            while group:
                batch, drawing = Batch(), []
                for i in group:
                    start, ids = self.done[i], self.rows[i].prompt
                    piece = ids[start : start + (chunk or len(ids))]
                    self.done[i] += len(piece)
                    last = self.done[i] == len(ids)
                    batch.add(list(piece), start, self.tables[i], int(last), self.rows[i] if last else None)
                    drawing += [i] if last else []
                self.give(drawing, self.runner.step(batch))
                group = [i for i in group if i not in drawing]
        return self

    def batch(self, index):
        batch = Batch()
        for i in index:
            batch.add(self.ids(i)[self.done[i] :], self.done[i], self.tables[i], 1, self.rows[i])
        return batch

    def decode(self, count, streamed=True, together=True):
        """`count` more tokens a row, in single steps or in one call."""
        for group in [list(range(len(self.rows)))] if together else [[i] for i in range(len(self.rows))]:
            left = count
            while left:
                batch = self.batch(group)
                results = [self.runner.step(batch)] if streamed else self.runner.decode(batch, left)
                for drawn in results:
                    self.give(group, drawn)
                for i in group:
                    self.done[i] += len(results)
                left -= len(results)
        return self

    def made(self):
        return [(row.tokens, row.logprobs, row.top_logprobs) for row in self.rows]


LENGTHS = [1, 2, 64, 65, 7, 70, 128, 3, 63, 5, 1, 90, 33, 16, 17, 4, 9, 2, 31, 66, 12, 1, 8, 3, 20, 6, 2, 40, 15, 1, 11, 5]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_a_sequence_has_the_same_bits_whatever_surrounds_it(isa, format):
    """Alone and among 32, with 1 to 3 threads, with its prompt in pieces, in single steps and in one call."""
    with testing.forced_isa(isa):
        for name in ("heads-of-32", "odd"):
            prompts = prompts_of(model_of(name).config.vocab_size, LENGTHS)
            right = Driver(runner_of(name, format), prompts).prefill(together=False).decode(5, together=False).made()
            assert len({tuple(tokens) for tokens, *_ in right}) > 16
            for threads, chunk, streamed, rows in ((1, 13, False, 32), (2, None, True, 32), (3, 50, False, 32), (2, 1, False, 5)):
                found = Driver(runner_of(name, format, threads), prompts[:rows]).prefill(chunk).decode(5, streamed)
                assert found.made() == right[:rows], (name, threads, chunk, streamed)


@pytest.mark.parametrize("format", FORMATS)
def test_draws_of_several_tokens_are_those_of_single_steps(format):
    """Verification: behind a prompt, tokens that are already known are each followed by a draw."""
    for name in ("heads-of-32", "untied"):
        runner = runner_of(name, format, 2)
        single = Driver(runner, prompts_of(model_of(name).config.vocab_size, [70, 5])).prefill().decode(6)
        rows = [replace(row, tokens=row.tokens[:1], logprobs=[], top_logprobs=[]) for row in single.rows]
        batch = Batch()
        for i, row in enumerate(rows):
            batch.add(single.rows[i].tokens[:6], row.start, single.tables[i], 6, row)
        drawn = runner.step(batch)
        assert drawn.tokens == [token for row in single.rows for token in row.tokens[1:]]
        assert drawn.logprobs == [value for row in single.rows for value in row.logprobs[1:]]


def test_a_step_of_more_rows_than_a_pass_takes():
    """Prompts of 1,100 tokens in one step, in which passes cut sequences."""
    model = model_of("heads-of-32", 600)
    runner = CppRunner(packed.pack(model, "fp32"), 2, 40)
    prompts = prompts_of(1031, [590, 3, 510])
    whole = Driver(runner, prompts, width=10).prefill().decode(3, False)
    assert whole.made() == Driver(runner, prompts, width=10).prefill(100, together=False).decode(3).made()
    scores = Batch()
    scores.add(prompts[0], 0, whole.tables[0], 590, None)
    scores.targets = [prompts[0]]
    with torch.no_grad():
        right = model(torch.tensor([prompts[0]])).logits[0].log_softmax(1)
    found = torch.tensor(runner.step(scores).logprobs)
    torch.testing.assert_close(found, right.gather(1, torch.tensor(prompts[0])[:, None])[:, 0], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------------- the definition


def logits_of(runner, ids, pages, chunk=None):
    """Logits [len(ids), V] of a teacher-forced pass."""
    parts = []
    for start in range(0, len(ids), chunk or len(ids)):
        piece = ids[start : start + (chunk or len(ids))]
        batch, logits = Batch(), torch.full((len(piece), runner.vocab), float("nan"))
        batch.add(piece, start, pages, len(piece), None)
        runner._step(batch, {"logits": logits}, 0)
        parts.append(logits)
    return torch.cat(parts)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_logits_are_eagers(name, isa):
    """Teacher-forced; the largest difference is at most 1e-5 of the largest logit."""
    model = model_of(name)
    ids = prompts_of(model.config.vocab_size, [150])[0]
    with torch.no_grad(), backend("eager"):
        right = model(torch.tensor([ids])).logits[0]
    with testing.forced_isa(isa):
        for chunk in (None, 1, 40):
            found = logits_of(runner_of(name, threads=2), ids, [7, 0, 3], chunk)
            assert (found - right).abs().max() <= 1e-5 * right.abs().max()


def quantised_logits(model, weights, ids):
    """The definition: products of gptfast.packing with fp32 activations, keys and values rounded to bf16."""
    config, tensors = model.config, weights.tensors
    plain = dict(model.named_parameters())

    def product(x, name):
        entry = weights.entries[name]
        bias = plain.get(name.replace("weight", "bias")) if name.startswith("transformer.h") else None
        return packing.product(x, packing.PackedWeight(tensors[name], entry.format, *entry.shape), bias)

    def norm(x, name):
        weight, bias = plain[name + ".weight"], plain[name + ".bias"]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, config.layer_norm_epsilon)

    entry = weights.entries["transformer.wte.weight"]
    table = packing.PackedWeight(tensors["transformer.wte.weight"], entry.format, *entry.shape).dequantise()
    x = table[ids] + plain["transformer.wpe.weight"][: len(ids)]
    for layer in range(config.n_layer):
        prefix = f"transformer.h.{layer}."
        qkv = product(norm(x, prefix + "ln_1"), prefix + "attn.c_attn.weight").view(len(ids), 3, config.n_head, -1)
        q, k, v = qkv.permute(1, 2, 0, 3)
        k, v, scale = k.bfloat16().float(), v.bfloat16().float(), model.transformer.h[layer].attn.scale
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        x = x + product(o.transpose(0, 1).reshape(len(ids), -1), prefix + "attn.c_proj.weight")
        h = torch.nn.functional.gelu(product(norm(x, prefix + "ln_2"), prefix + "mlp.c_fc.weight"), approximate="tanh")
        x = x + product(h, prefix + "mlp.c_proj.weight")
    return product(norm(x, "transformer.ln_f"), "transformer.wte.weight")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ("bf16", "int8", "int4"))
def test_logits_of_other_formats_are_the_definitions(format, isa):
    """Where a sum is rounded differently, a code or a bf16 may be its neighbour: 2 % of the logits' standard deviation."""
    model, weights = model_of("heads-of-32"), packed_of("heads-of-32", format)
    ids = prompts_of(1031, [100])[0]
    with torch.no_grad():
        right = quantised_logits(model, weights, ids)
    with testing.forced_isa(isa):
        found = logits_of(CppRunner(weights, 2, 8), ids, [5, 2])
    assert (found - right).std() <= 0.02 * right.std()
    with torch.no_grad():
        assert (model(torch.tensor([ids])).logits[0] - right).std() > 1.2 * (found - right).std()  # the format itself costs more


def test_draws_are_those_of_sample_on_the_same_logits():
    """Also with everything that edits logits, whose counts go on from step to step, in step() and in decode()."""
    every = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2}
    every |= {"logit_bias": {5: 2.0}, "banned_tokens": (7,)}
    for params in ({}, every, {**every, "temperature": 1.0, "top_k": 0, "top_p": 1.0}, {"min_p": 0.05, "typical_p": 0.9}):
        prompts = prompts_of(1031, [20, 3, 65])
        runner = runner_of("heads-of-32", "fp32", 2)
        for streamed in (True, False):
            driver = Driver(runner, prompts, **params).prefill().decode(12, streamed)
            for i, row in enumerate(driver.rows):
                logits = logits_of(runner, driver.ids(i)[:-1], driver.tables[i])[row.start - 1 :]
                again = replace(row, tokens=[], logprobs=[], top_logprobs=[])
                for one in logits:
                    Sampler([again], runner.vocab, torch.device("cpu")).draw(one[None]).give(0, again)
                assert (again.tokens, again.logprobs, again.top_logprobs) == driver.made()[i], (params, streamed)


@pytest.mark.parametrize(
    "params", [{"order": "vllm", "min_p": 0.1}, {"order": "llama.cpp"}, {"logprobs_mode": "processed"}], ids=str
)
def test_what_kernels_do_not_do_is_done_in_torch(params):
    """Also for rows of several kinds in one batch."""
    runner = runner_of("heads-of-32", "fp32", 2)
    mixed = Driver(runner, prompts_of(1031, [20, 20]), **params)
    mixed.rows[0] = row_of(mixed.rows[0].prompt, 0)
    mixed.prefill().decode(4, False)
    prompts = prompts_of(1031, [20, 20])
    assert mixed.made()[0] == Driver(runner, prompts[:1]).prefill().decode(4).made()[0]
    assert mixed.made()[1] == Driver(runner, prompts[1:], first=1, **params).prefill().decode(4).made()[0]


# ---------------------------------------------------------------------------------------------------------------------- edge cases


def test_nan_fails_its_row_alone():
    """NaN at a position: sequences that reach it fail there, the others keep their bits; the pages can be used again."""
    weights, name = packed_of("heads-of-32", "fp32"), "transformer.wpe.weight"
    broken = replace(weights, tensors={**weights.tensors, name: weights.tensors[name].clone()})
    broken.tensors[name][10] = float("nan")
    prompts = prompts_of(1031, [11, 4, 8])
    whole = Driver(runner_of("heads-of-32"), prompts).prefill().decode(4).made()
    runner = CppRunner(broken, 2, 20)
    driver = Driver(runner, prompts).prefill()
    assert [row.finish_reason for row in driver.rows] == ["error", None, None]
    assert "NaN" in driver.rows[0].error and driver.rows[0].tokens == []
    results = runner.decode(driver.batch([1, 2]), 10)
    assert [drawn.status for drawn in results] == [[0, 0], [0, 0], [0, 1]]  # the second of them reaches position 10
    for drawn in results:
        driver.give([1, 2], drawn)
    assert driver.made()[1] == tuple(part[:4] for part in whole[1]) and driver.made()[2] == tuple(part[:3] for part in whole[2])
    scores = Batch(tokens=[prompts[0]], starts=[0], tables=[[0]], draws=[11], rows=[None], targets=[prompts[0]])
    assert runner.step(scores).status == [0] * 10 + [1]
    again = Driver(runner, prompts[1:2], first=1)
    again.tables = [[0, 1, 2]]  # which hold NaN
    assert again.prefill().decode(3).made()[0] == tuple(part[:4] for part in whole[1])


def test_choices_share_a_prompt_and_copied_pages():
    """A sequence without new tokens draws from the one before it; its pages are copies."""
    prompt = prompts_of(1031, [70])[0]
    runner = runner_of("heads-of-32", "fp32", 2)
    rows = [replace(row_of(prompt, 1, temperature=1.0), choice=choice) for choice in range(3)]
    batch = Batch()
    for choice, row in enumerate(rows):
        batch.add(prompt if choice == 0 else [], 0 if choice == 0 else 70, [0, 1], 1, row)
    drawn = runner.step(batch)
    runner.copy_pages([(1, 5), (1, 6)])
    for i, row in enumerate(rows):
        drawn.give(i, row)
    after = Batch()
    for row, table in zip(rows, ([0, 1], [0, 5], [0, 6]), strict=True):
        after.add(row.tokens, 70, table, 1, row)
    for step in runner.decode(after, 5):
        for i, row in enumerate(rows):
            step.give(i, row)
    for choice, row in enumerate(rows):
        single = Driver(runner, [prompt])
        single.rows = [replace(row_of(prompt, 1, temperature=1.0), choice=choice)]
        assert single.prefill().decode(5).made()[0] == (row.tokens, row.logprobs, row.top_logprobs)
    assert len({tuple(row.tokens) for row in rows}) == 3


def test_decode_ends_with_the_step_in_which_a_sequence_ends():
    runner = runner_of("heads-of-32", "fp32", 2)
    whole = Driver(runner, prompts_of(1031, [9, 30])).prefill().decode(8)
    stop = whole.rows[1].tokens[4]
    first = min(1 + row.tokens[1:].index(stop) for row in whole.rows if stop in row.tokens[1:])
    driver = Driver(runner, prompts_of(1031, [9, 30])).prefill()
    for row in driver.rows:
        row.stop_ids = frozenset({stop, 10**9})
    results = runner.decode(driver.batch([0, 1]), 8)
    assert len(results) == first
    for drawn in results:
        driver.give([0, 1], drawn)
    assert [row.tokens for row in driver.rows] == [row.tokens[: first + 1] for row in whole.rows]


def long_decode():
    """A runner and a batch whose decode takes a while: 20,000 tokens do not end by themselves."""
    model = model_of("one-head", 30_000)
    runner = CppRunner(packed.pack(model, "fp32"), 1, 500)
    driver = Driver(runner, prompts_of(600, [4]), width=500).prefill()
    return runner, driver


def test_interrupt_from_another_thread():
    """It ends within a token, what was drawn is there, and the next call is not concerned; the GIL is free meanwhile."""
    runner, driver = long_decode()
    right = Driver(runner, prompts_of(600, [4]), width=500).prefill().decode(30).rows[0].tokens
    timer = threading.Timer(0.2, runner.interrupt)
    timer.start()
    start = time.perf_counter()
    results = runner.decode(driver.batch([0]), 20_000)
    taken = time.perf_counter() - start
    timer.join()
    assert 30 < len(results) < 20_000 and taken < 10
    assert [driver.rows[0].tokens[0], *(drawn.tokens[0] for drawn in results[:30])] == right
    assert len(runner.decode(driver.batch([0]), 3)) == 3


def test_ctrl_c_ends_a_call_on_the_main_thread():
    """The handler that was there runs after the call, and gets what was drawn; it is put back."""
    runner, driver = long_decode()
    noted, before = [], signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        results = runner.decode(driver.batch([0]), 20_000)
        timer.join()
        assert noted == [signal.SIGINT] and 1 <= len(results) < 20_000
        os.kill(os.getpid(), signal.SIGINT)
        assert noted == [signal.SIGINT] * 2
    finally:
        signal.signal(signal.SIGINT, before)


def test_memory_does_not_grow_with_tokens():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    runner, driver = long_decode()
    driver.decode(40, streamed=False)
    before = resident()
    runner.decode(driver.batch([0]), 100)  # within the same pages of 64 tokens, but for two
    assert resident() - before < 1 << 20


def test_the_largest_context_and_a_closed_engine():
    runner = runner_of("odd", "int8", 2)
    prompt = prompts_of(337, [199])[0]
    driver = Driver(runner, [prompt], width=4).prefill()
    assert len(driver.rows[0].tokens) == 1 and len(runner.decode(driver.batch([0]), 1)) == 1
    with pytest.raises(Error, match="sequence 0: its length is 201; allowed: 0 to 200"):
        runner.decode(driver.batch([0]), 2)
    runner.close()
    runner.close()
    runner.interrupt()
    with pytest.raises(Error, match="the engine is closed"):
        runner.step(driver.batch([0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [[97]]}, "a token id is 97; allowed: 0 to 96"), ({"tokens": [[-1]]}, "a token id is -1"),
        ({"tables": [[8]]}, "a page is 8; allowed: 0 to 7"), ({"tables": [[-1]]}, "a page is -1"),
        ({"starts": [64]}, "its length is 65; allowed: 0 to 64"), ({"starts": [-1]}, "tokens in the cache is -1"),
        ({"draws": [2]}, "draws is 2; allowed: 0 to 1"), ({"tokens": [[]], "draws": [0]}, "new tokens is 0"),
    ],
)  # fmt: skip
def test_bad_batches(change, message):
    runner = runner_of("scaled", pages=8)
    batch = Batch(tokens=[[3]], starts=[0], tables=[[0]], draws=[1], rows=[row_of([3])])
    with pytest.raises(Error, match=message):
        runner.step(replace(batch, **change))


def test_bad_weights_and_numbers():
    weights = packed_of("scaled", "int8")
    name, norm = "transformer.h.1.mlp.c_fc.weight", "transformer.ln_f.bias"
    codes = weights.tensors[name]
    for tensors, message in (
        ({name: codes[:-1]}, f"{name} has .* bytes, needs"),
        ({name: torch.cat((codes, codes))[1 : len(codes) + 1]}, "multiple of 64 bytes"),
        ({name: weights.tensors[norm]}, f"{name} is Float"), ({norm: torch.zeros(39)}, f"{norm} has shape"),
    ):  # fmt: skip
        with pytest.raises(Error, match=message):
            CppRunner(replace(weights, tensors={**weights.tensors, **tensors}), 1, 4)
    with pytest.raises(Error, match=f"the weights lack {name}"):
        CppRunner(replace(weights, tensors={key: value for key, value in weights.tensors.items() if key != name}), 1, 4)
    for threads, pages in ((0, 4), (True, 4), (1, 0), (1, 1.5)):
        with pytest.raises(Error, match="allowed: a whole number of at least 1"):
            CppRunner(weights, threads, pages)
    assert PAGE == 64
