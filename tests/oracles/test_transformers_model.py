"""Against transformers: logits, hidden states, loss, every gradient, greedy tokens, the classifier, and folders both ways.

The weights are spread (default initialisation repeats one token for ever), and how much is printed. Greedy tokens are compared
teacher-forced on transformers' own: another choice counts where transformers' winner leads by more than twice that config's largest
difference between two logits; at most 1 place in 10,000 may be excused, over all configs together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
transformers.logging.set_verbosity_error()

SMALL = {"vocab_size": 384, "n_positions": 128, "n_embd": 48, "n_layer": 3, "n_head": 4, "initializer_range": 0.3}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"initializer_range": 0.4},
    "relu": {"n_inner": 50, "activation_function": "relu", "n_head": 3, "layer_norm_epsilon": 1e-3},
    "inverse-layer": {"scale_attn_by_inverse_layer_idx": True, "activation_function": "silu"},
    "untied": {"scale_attn_weights": False, "activation_function": "gelu", "tie_word_embeddings": False, "initializer_range": 0.2},
    "upcast": {"reorder_and_upcast_attn": True, "activation_function": "tanh", "n_head": 1},
    "124M": {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "initializer_range": 0.06},
}
PROMPTS, NEW = 64, 64


@dataclass
class Pair:
    """One model in both libraries, and the greedy continuation of left-padded prompts by transformers."""

    name: str
    theirs: Any
    ours: GPT2LMHeadModel
    shards: int
    ids: Tensor
    mask: Tensor
    tokens: Tensor  # [PROMPTS, NEW]
    logits: Tensor  # [PROMPTS, NEW, V], before each of them


def spread(config: Any, kind: Any) -> Any:
    """A random model of transformers whose biases and gains are not 0 and 1, and whose positions count."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.transformer.wpe.weight.mul_(2)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    values = {**SMALL, **CONFIGS[request.param], "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if request.param == "124M" else 1)  # threads cost small models more than they bring
    theirs = spread(transformers.GPT2Config(**values), transformers.GPT2LMHeadModel)
    folder = tmp_path_factory.mktemp("transformers")
    theirs.save_pretrained(folder, max_shard_size="50KB" if request.param != "124M" else "200MB")
    ours = GPT2LMHeadModel.from_pretrained(folder)
    shards = len(list(folder.glob("*.safetensors")))
    for path in folder.iterdir():
        path.unlink()  # what is mapped stays readable; 500 MB do not stay on the disk
    ids = torch.randint(1, values["vocab_size"], (PROMPTS, 12))
    mask = (torch.arange(12) >= 11 - torch.arange(PROMPTS)[:, None] % 12).long()  # 1 to 12 tokens
    ids = ids * mask
    with torch.no_grad():
        made = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    yield Pair(request.param, theirs, ours, shards, ids, mask, made.sequences[:, 12:], torch.stack(made.logits, 1))
    torch.set_num_threads(threads)


def test_folder_was_sharded_and_weights_are_spread(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    different = sum(len(set(row)) for row in pair.tokens.tolist()) / PROMPTS
    with capsys.disabled():
        print(f"\n{pair.name}: {different:.1f} different ids in {NEW} greedy tokens, {pair.shards} shards")
    assert different >= 20 and pair.shards > 1


def test_logits_and_hidden_states(pair: Pair) -> None:
    ids = pair.tokens[:4, :32]
    with torch.no_grad():
        theirs, ours = (model(ids, output_hidden_states=True) for model in (pair.theirs, pair.ours))
    assert (theirs.logits - ours.logits).abs().max() <= 1e-4
    assert len(theirs.hidden_states) == len(ours.hidden_states)
    for a, b in zip(theirs.hidden_states, ours.hidden_states, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_inputs_embeds(pair: Pair) -> None:
    vectors = pair.theirs.transformer.wte(pair.tokens[:2, :9]).detach()
    with torch.no_grad():
        assert (pair.theirs(inputs_embeds=vectors).logits - pair.ours(inputs_embeds=vectors).logits).abs().max() <= 1e-4


def gradients(model: Any, ids: Tensor, labels: Tensor) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(ids, labels=labels).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return loss.item(), found


def test_loss_and_every_gradient(pair: Pair) -> None:
    ids = pair.tokens[:3, :40]
    labels = ids.clone()
    labels[0, :20] = -100
    pair.theirs.set_attn_implementation("sdpa")
    _, fused = gradients(pair.theirs, ids, labels)
    pair.theirs.set_attn_implementation("eager")
    loss, theirs = gradients(pair.theirs, ids, labels)
    ours_loss, ours = gradients(pair.ours, ids, labels)
    pair.theirs.set_attn_implementation("sdpa")
    assert abs(ours_loss - loss) <= 1e-5 * loss
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        norm = gradient.norm().item()
        apart = (fused[name] - gradient).norm().item() / norm
        assert (ours[name] - gradient).norm().item() / norm <= max(1e-5, 3 * apart), name


excused: dict[str, tuple[int, int]] = {}  # config -> places excused, places compared


def compare(name: str, logits: Tensor, theirs: Tensor, tokens: Tensor) -> None:
    """logits and theirs [B, T, V] before `tokens` [B, T], which are greedy under `theirs`."""
    largest = (logits - theirs).abs().max().item()
    assert largest <= 1e-4
    chosen = logits.argmax(-1)
    lead = (theirs.gather(-1, tokens[..., None]) - theirs.gather(-1, chosen[..., None])).squeeze(-1)
    other = chosen != tokens
    assert not (other & (lead > 2 * largest)).any(), f"{name}: another token where the winner leads by {lead.max().item()}"
    excused[name] = int(other.sum()), tokens.numel()


def test_greedy_tokens(pair: Pair) -> None:
    """All prompts at once, left-padded to 12 tokens, in one pass over transformers' tokens."""
    whole = torch.cat([pair.ids, pair.tokens[:, :-1]], 1)
    mask = torch.cat([pair.mask, torch.ones(PROMPTS, NEW - 1, dtype=torch.int64)], 1)
    with torch.no_grad():
        parts = [
            pair.ours(whole[rows], attention_mask=mask[rows], use_cache=False, logits_to_keep=NEW).logits
            for rows in torch.arange(PROMPTS).split(16)
        ]
    compare(f"{pair.name}, one pass", torch.cat(parts), pair.logits, pair.tokens)


def test_greedy_tokens_step_by_step_with_a_cache(pair: Pair) -> None:
    """Left-padded prompts, then transformers' tokens one at a time."""
    rows, steps = slice(0, PROMPTS, 4 if pair.name == "124M" else 1), []
    with torch.no_grad():
        outputs = pair.ours(pair.ids[rows], attention_mask=pair.mask[rows], use_cache=True, logits_to_keep=1)
        for place in range(NEW):
            steps.append(outputs.logits[:, -1])
            outputs = pair.ours(pair.tokens[rows, place : place + 1], past_key_values=outputs.past_key_values)
    compare(f"{pair.name}, cache", torch.stack(steps, 1), pair.logits[rows], pair.tokens[rows])


def test_single_prompts_equal_the_left_padded_batch(pair: Pair) -> None:
    rows = range(0, PROMPTS, 16 if pair.name == "124M" else 1)
    singles = []
    with torch.no_grad():
        for row in rows:
            whole = torch.cat([pair.ids[row, pair.mask[row] == 1], pair.tokens[row, :-1]])[None]
            singles.append(pair.ours(whole, use_cache=False, logits_to_keep=NEW).logits[0])
    compare(f"{pair.name}, single prompts", torch.stack(singles), pair.logits[list(rows)], pair.tokens[list(rows)])


def test_generate(pair: Pair) -> None:
    """The same through model.generate, whose rows may part from transformers' only where a place is excused."""
    rows = slice(None) if pair.name != "124M" else slice(0, PROMPTS, 16)
    made = pair.ours.generate(pair.ids[rows], attention_mask=pair.mask[rows], max_new_tokens=NEW)
    assert made.shape == (len(pair.ids[rows]), 12 + NEW) and torch.equal(made[:, :12], pair.ids[rows])
    for row, tokens, logits in zip(made[:, 12:], pair.tokens[rows], pair.logits[rows], strict=True):
        if not torch.equal(row, tokens):
            first = int((row != tokens).nonzero()[0])
            assert logits[first, tokens[first]] - logits[first, row[first]] <= 2e-4


def test_at_most_one_place_in_ten_thousand_was_excused(capsys: pytest.CaptureFixture[str]) -> None:
    if not excused:
        pytest.skip("no greedy tokens were compared in this run")
    count, places = (sum(column) for column in zip(*excused.values(), strict=True))
    with capsys.disabled():
        print(f"\ngreedy tokens: {count} of {places:,} places excused")
    assert count <= places / 10_000


@pytest.mark.parametrize("name", ["plain", "untied", "relu"])
@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_transformers_loads_what_is_saved_here(name: str, shard: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    ours = GPT2LMHeadModel(GPT2Config(**{**SMALL, **CONFIGS[name], "eos_token_id": 383})).eval()
    ours.save_pretrained(tmp_path, max_shard_size=shard)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is transformers.GPT2LMHeadModel
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = theirs.state_dict()
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())
    assert (theirs.lm_head.weight is theirs.transformer.wte.weight) == ours.config.tie_word_embeddings
    for field in ("n_inner", "activation_function", "layer_norm_epsilon", "scale_attn_weights", "eos_token_id", "n_positions"):
        assert getattr(theirs.config, field) == getattr(ours.config, field)
    assert theirs.generation_config.eos_token_id == 383
    ids = torch.randint(384, (2, 20))
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids).logits).abs().max() <= 1e-4
    theirs.save_pretrained(tmp_path / "again")
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "again").config == ours.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_survive_both_ways(dtype: torch.dtype, tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(**SMALL)).to(dtype).save_pretrained(tmp_path / "a")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert theirs.dtype == dtype
    theirs.save_pretrained(tmp_path / "b")
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "b").dtype == dtype


@pytest.mark.parametrize(("labels", "count"), [("single", 3), ("multi", 4), ("regression", 1)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_classifier(labels: str, count: int, side: str, tmp_path: Path) -> None:
    config = transformers.GPT2Config(**SMALL, num_labels=count, pad_token_id=0)
    theirs = spread(config, transformers.GPT2ForSequenceClassification)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT2ForSequenceClassification.from_pretrained(tmp_path / "theirs")
    ids = torch.randint(1, 384, (4, 11))
    mask = torch.ones_like(ids)
    for row, length in enumerate((11, 7, 3, 1)):
        mask[row, slice(0, 11 - length) if side == "left" else slice(length, 11)] = 0
    ids = ids * mask
    target = {"single": torch.tensor([2, 0, 1, 1]), "multi": torch.rand(4, 4).round(), "regression": torch.randn(4)}[labels]
    # transformers' forward counts positions from the left edge; its generate, like gptfast, from the first real token
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    a = theirs(ids, attention_mask=mask, position_ids=positions, labels=target)
    b = ours(ids, attention_mask=mask, labels=target)
    assert torch.allclose(a.logits, b.logits, atol=1e-4) and abs(a.loss.item() - b.loss.item()) <= 1e-4 * max(1, a.loss.item())
    a.loss.backward()
    b.loss.backward()
    for name, parameter in ours.named_parameters():
        reference = theirs.get_parameter(name).grad
        assert (parameter.grad - reference).norm() <= 1e-4 * reference.norm() + 1e-9, name
    ours.save_pretrained(tmp_path / "ours")
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert type(back) is transformers.GPT2ForSequenceClassification and back.config.num_labels == count
    assert torch.equal(back.score.weight, ours.score.weight)


def test_config_json_holds_what_converters_read(tmp_path: Path) -> None:
    ours = GPT2Config(**SMALL)
    GPT2LMHeadModel(ours).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == "gpt2" and values["n_ctx"] == values["n_positions"] == theirs.max_position_embeddings
