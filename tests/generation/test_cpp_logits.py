"""The C++ engine's logits: eager's in fp32, the definition's with packed weights, and a row of each packed table."""

import os

import pytest
import torch

import gptfast.backend as backend
from gptfast import Error, packed, testing
from gptfast.config import GPT2Config
from gptfast.generation.cpp import CppRunner
from gptfast.model import GPT2LMHeadModel
from gptfast.testing.engine import CONFIGS, FORMATS, ISAS, defined_logits, logits_of, model_of, packed_of, prompts_of, runner_of


@pytest.fixture(autouse=True)
def extension(request):
    if "backend_choice" in request.fixturenames:
        request.getfixturevalue("backend_choice")
    testing.requires("cpp", backend.EXTENSIONS["_C"])
    if os.environ.get("GPTFAST_BACKEND") == "eager":
        pytest.skip("the engine calls no ops: once is enough")


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


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS[1:])
def test_logits_of_other_formats_are_the_definitions(format, isa):
    """Whole models, teacher-forced: activations quantised as the definition says. Where a sum is rounded differently a code
    may be its neighbour: 2 % of the logits' standard deviation, over all logits."""
    for name in CONFIGS:
        model, weights = model_of(name), packed_of(name, format)
        if model.config.vocab_size == 1:
            continue
        ids = prompts_of(model.config.vocab_size, [100])[0]
        right = defined_logits(model, weights, ids)
        with testing.forced_isa(isa):
            found = logits_of(CppRunner(weights, 2, 8), ids, [5, 2])
        assert (found - right).pow(2).mean().sqrt() <= 0.02 * right.std(), name
        with torch.no_grad():
            cost = (model(torch.tensor([ids])).logits[0] - right).std()
        assert cost > 1.2 * (found - right).std(), "the format itself costs more"


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "unscaled"])
def test_bf16_is_as_near_to_float64_as_eager_in_bf16(name):
    """The house's tolerance, the whole model as one op: eager rounds all values to bf16, the engine products' operands."""
    model = model_of(name)
    ids = torch.tensor(prompts_of(model.config.vocab_size, [100]))
    rounded = GPT2LMHeadModel(model.config).eval()
    rounded.load_state_dict(model.state_dict())
    rounded.bfloat16()
    with torch.no_grad(), backend("eager"):
        own = rounded(ids).logits[0]
        exact = rounded.double()(ids).logits[0]
    found = logits_of(runner_of(name, "bf16", 2), ids[0].tolist(), [7, 0])
    testing.assert_close_to_reference(found.bfloat16(), own, exact)
    testing.assert_rejected("another text's", found.bfloat16().roll(1, 0), own, exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_of_a_table_is_what_its_codes_stand_for(format, isa):
    """unpack_row, which embeds a token: every output of several panels and every input, for widths with and without a rest."""
    for width, vocab in ((64, 70), (63, 33), (129, 31), (8, 64), (1, 5)):
        config = GPT2Config(vocab, 3, width, 1, 1, n_inner=4)
        model = GPT2LMHeadModel(config)
        model.transformer.wte.weight.data.normal_()
        model.transformer.wpe.weight.data[1] = 0
        model.transformer.wpe.weight.data[2] = torch.arange(width)
        weights = packed.pack(model, format)
        expected = weights.weight("transformer.wte.weight").dequantise()
        with testing.forced_isa(isa):
            runner = CppRunner(weights, 1, 1)
            for position, more in ((1, 0), (2, torch.arange(width))):
                found = torch.stack([runner.embedding(token, position) for token in range(vocab)])
                assert torch.equal(found, expected + more), (width, vocab, position)
        assert len(expected.unique()) > expected.numel() // 8


def test_an_embedding_of_nothing_is_refused():
    runner = runner_of("odd", "int8")
    for token, position in ((337, 0), (-1, 0), (0, 200), (0, -1)):
        with pytest.raises(Error, match="allowed: 0 to"):
            runner.embedding(token, position)
