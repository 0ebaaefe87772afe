"""Model folders: written and read back, in every form that is out there, and everything that can be wrong with them."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptfast import Error, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, LoadError, hub

SIZES = {"vocab_size": 37, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
IDS = torch.tensor([[1, 5, 36, 0, 7]])


def make(kind: type = GPT2LMHeadModel, **changes: Any) -> Any:
    torch.manual_seed(3)
    return kind(GPT2Config(**{**SIZES, **changes})).eval()


def same(a: Any, b: Any) -> bool:
    return torch.equal(a(IDS).logits, b(IDS).logits)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "n_inner": 20, "activation_function": "relu"}])
@pytest.mark.parametrize("shard", ["5GB", "4KB", 1])
def test_round_trip(tmp_path: Path, changes: dict[str, Any], shard: int | str) -> None:
    model = make(**changes)
    model.generation_config = {"max_new_tokens": 7, "eos_token_id": [3, 36]}
    model.save_pretrained(tmp_path / "a/b", max_shard_size=shard)
    read = GPT2LMHeadModel.from_pretrained(tmp_path / "a/b")
    assert same(read, model) and read.config == model.config and not read.training
    assert read.generation_config == model.generation_config
    assert (read.lm_head.weight is read.transformer.wte.weight) == model.config.tie_word_embeddings
    names = {path.name for path in (tmp_path / "a/b").iterdir()}
    single = {"config.json", "generation_config.json", "model.safetensors"}
    assert names == single if shard == "5GB" else "model.safetensors.index.json" in names and len(names) > 6
    assert not any(name.startswith(".") for name in names)


def test_what_is_written(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["architectures"] == ["GPT2LMHeadModel"]
    assert config["n_ctx"] == 16 and config["torch_dtype"] == "float32" and config["vocab_size"] == 37
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 50256, "eos_token_id": 50256}
    state = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in state and state["transformer.h.1.attn.c_attn.weight"].shape == (16, 48)
    header = (tmp_path / "model.safetensors").read_bytes()[8:100]
    assert b'"__metadata__":{"format":"pt"}' in header


def test_shards_respect_the_limit_and_the_index_is_complete(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = [load_file(path) for path in sorted(tmp_path.glob("model-*.safetensors"))]
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    assert max(sizes) <= 6000 and len(shards) == len(set(index["weight_map"].values()))
    assert index["metadata"]["total_size"] == sum(sizes) == sum(p.nbytes for p in model.parameters())
    for key, name in index["weight_map"].items():
        assert key in load_file(tmp_path / name)


def test_saving_over_an_older_model_leaves_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for shard in ("4KB", "5GB", "8KB", "4KB"):
        model = make(initializer_range=random.Random(shard).random())
        model.save_pretrained(tmp_path, max_shard_size=shard)
        assert same(GPT2LMHeadModel.from_pretrained(tmp_path), model)
    indexed = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert {path.name for path in tmp_path.glob("*.safetensors")} == indexed
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_loaded_model_does_not_write_into_its_file(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    expected = {name: tensor.clone().add_(1) for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    model.save_pretrained(tmp_path)  # over the file that it may be mapped from
    state = GPT2LMHeadModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_padding_of_the_vocabulary_is_not_written(tmp_path: Path) -> None:
    model = make(vocab_size=64, real_vocab_size=37)
    model.save_pretrained(tmp_path)
    read = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert read.config.vocab_size == 37 and read.transformer.wte.weight.shape == (37, 16)
    assert torch.allclose(read(IDS).logits, model(IDS).logits, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    make().to(dtype).save_pretrained(tmp_path)
    assert GPT2LMHeadModel.from_pretrained(tmp_path).dtype == dtype
    assert all(p.dtype == torch.bfloat16 for p in GPT2LMHeadModel.from_pretrained(tmp_path, dtype="bf16").parameters())
    assert GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32, device="cpu").dtype == torch.float32
    for wrong in ("int8", torch.int8):
        with pytest.raises(Error, match="dtype is"):
            GPT2LMHeadModel.from_pretrained(tmp_path, dtype=wrong)


# ------------------------------------------------------------------------------------------------------- forms that are out there


def rewrite(folder: Path, change: Any, model: Any = None) -> Any:
    """Saves a model and passes its tensors through `change`."""
    model = model or make()
    model.save_pretrained(folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return model


def old_form(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the first GPT-2 checkpoints: no prefix, and the causal masks as buffers."""
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    for layer in range(2):
        bare[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        bare[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return bare


def test_names_without_prefix_and_old_buffers(tmp_path: Path) -> None:
    model = rewrite(tmp_path, old_form)
    assert same(GPT2LMHeadModel.from_pretrained(tmp_path), model)


def test_a_tied_head_may_be_stored_twice_but_not_differ(tmp_path: Path) -> None:
    model = rewrite(tmp_path, lambda state: {**state, "lm_head.weight": state["transformer.wte.weight"].clone()})
    assert same(GPT2LMHeadModel.from_pretrained(tmp_path), model)
    rewrite(tmp_path, lambda state: {**state, "lm_head.weight": state["transformer.wte.weight"] + 1})
    with pytest.raises(LoadError, match=r"lm_head\.weight differs from wte\.weight"):
        GPT2LMHeadModel.from_pretrained(tmp_path)


def test_a_classifier_starts_from_a_language_model_and_back(tmp_path: Path) -> None:
    body = make()
    body.save_pretrained(tmp_path / "lm")
    with pytest.warns(UserWarning, match=r"has no score\.weight: this head starts with random weights"):
        classifier = GPT2ForSequenceClassification.from_pretrained(tmp_path / "lm")
    assert torch.equal(classifier.transformer.wte.weight, body.transformer.wte.weight)
    assert classifier.score.weight.shape == (2, 16) and classifier.score.weight.std() > 0.05
    classifier.config.id2label = {0: "bad", 1: "good"}
    classifier.save_pretrained(tmp_path / "c")
    read = GPT2ForSequenceClassification.from_pretrained(tmp_path / "c")
    assert same(read, classifier) and read.config.id2label == {0: "bad", 1: "good"}
    assert same(GPT2LMHeadModel.from_pretrained(tmp_path / "c"), body)


def test_pickles_are_only_opened_to_convert_them(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "old")
    state = old_form(load_file(tmp_path / "old/model.safetensors"))
    (tmp_path / "old/model.safetensors").unlink()
    torch.save(state, tmp_path / "old/pytorch_model.bin")
    (tmp_path / "old/vocab.json").write_text("{}")
    with pytest.raises(LoadError, match="gptfast convert"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "old")
    hub.convert_pickle(tmp_path / "old", tmp_path / "new")
    assert same(GPT2LMHeadModel.from_pretrained(tmp_path / "new"), model) and (tmp_path / "new/vocab.json").exists()
    del state["wte.weight"]
    torch.save(state, tmp_path / "old/pytorch_model.bin")
    with pytest.raises(LoadError, match=r"wte\.weight is missing"):
        hub.convert_pickle(tmp_path / "old", tmp_path / "other")


class Evil:
    """Runs code when it is unpickled by a loader that allows it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["evil", "list", "text"])
def test_no_pickle_runs_code(tmp_path: Path, content: str) -> None:
    make().save_pretrained(tmp_path)
    value = {"evil": {"wte.weight": Evil(tmp_path / "ran")}, "list": [1], "text": None}[content]
    path = tmp_path / "pytorch_model.bin"
    if value is None:
        path.write_bytes(b"not a pickle at all")
    elif content == "evil":
        path.write_bytes(pickle.dumps(value, protocol=2))
    else:
        torch.save(value, path)
    with pytest.raises(LoadError, match=r"pytorch_model\.bin holds"):
        hub.convert_pickle(tmp_path, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------------- what is wrong


def refuse(folder: Path, *parts: str, kind: type = GPT2LMHeadModel) -> None:
    with pytest.raises(LoadError) as caught:
        kind.from_pretrained(folder)
    line = str(caught.value)
    assert all(part in line for part in parts) and "\n" not in line, line


def test_not_a_model(tmp_path: Path) -> None:
    refuse(tmp_path, str(tmp_path), "has no config.json")
    refuse(tmp_path / "absent/deeper/still", "is no folder")
    (tmp_path / "file").write_text("x")
    refuse(tmp_path / "file", "is a file", "config.json")
    make().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refuse(tmp_path, "neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights(tmp_path: Path, keep: float) -> None:
    make().save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    refuse(tmp_path, "model.safetensors is not a whole safetensors file")


@pytest.mark.parametrize(
    ("parts", "change"),
    [
        (("transformer.h.1.ln_2.bias is missing",), lambda s: {k: v for k, v in s.items() if "1.ln_2.bias" not in k}),
        (("h.0", "is missing, and 11 more"), lambda s: {k: v for k, v in s.items() if ".h.0." not in k}),
        (("transformer.h.2.ln_1.weight belongs to no part",), lambda s: {**s, "transformer.h.2.ln_1.weight": torch.ones(16)}),
        (("transformer.adapter belongs to no part",), lambda s: {**s, "adapter": torch.ones(16)}),
        (("transformer.wpe.weight has shape (15, 16)", "(16, 16)"), lambda s: {**s, "transformer.wpe.weight": torch.ones(15, 16)}),
        (("is torch.int64",), lambda s: {**s, "transformer.ln_f.bias": torch.ones(16, dtype=torch.int64)}),
        (("transformer.ln_f.bias is stored twice",), lambda s: {**s, "ln_f.bias": torch.ones(16)}),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, parts: tuple[str, ...], change: Any) -> None:
    rewrite(tmp_path, change)
    refuse(tmp_path, str(tmp_path), *parts)


OUTSIDE = ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "model.bin", "link.safetensors"]


@pytest.mark.parametrize("place", OUTSIDE)
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "model"
    make().save_pretrained(folder, max_shard_size="4KB")
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["transformer.wte.weight"] = place
    path.write_text(json.dumps(index))
    refuse(folder, "model.safetensors.index.json names", repr(place), "own folder")


@pytest.mark.parametrize("weight_map", [{}, None, [], {"a": 3}, "x"])
def test_an_index_that_is_none(tmp_path: Path, weight_map: Any) -> None:
    make().save_pretrained(tmp_path, max_shard_size="4KB")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refuse(tmp_path, "weight_map is not an object")


def test_an_index_with_a_missing_file(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path, max_shard_size="4KB")
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    refuse(tmp_path, "model-00002-of", "which", "names")


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("n_embd 16 is not divisible by n_head 3", '{"n_embd": 16, "n_head": 3}'),
        ("'n_head' stands in it twice", '{"n_head": 3, "n_head": 4}'),
        ("is not readable JSON", '{"n_head": 3'),
        ("is not readable JSON", "[" * 200_000),
        ("holds a list", "[]"),
        ("model_type is 'bert'", '{"model_type": "bert"}'),
        ("n_layer is 1000000", '{"n_layer": 1000000}'),
        ("n_layer is nan", '{"n_layer": NaN}'),
        ("at most", " " * (1 << 26) + "{}"),
    ],
)
def test_configs_that_make_no_model(tmp_path: Path, part: str, text: str) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    refuse(tmp_path, str(tmp_path / "config.json"), part)


def test_a_config_larger_than_its_weights_allocates_nothing(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "vocab_size": 2**30, "n_embd": 1024}))
    refuse(tmp_path, "has shape", "config.json needs")


def test_random_damage_gives_load_errors_or_a_model(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path, max_shard_size="20KB")
    draw, refused = random.Random(0), 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) > 4
    for _ in range(250):
        name = draw.choice(names)
        good = (tmp_path / name).read_bytes()
        bad = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(min(len(bad), 1500))  # headers, and the first numbers
            bad[place : place + draw.choice([0, 1, 1, 8])] = bytes(draw.randrange(256) for _ in range(draw.randint(0, 2)))
        (tmp_path / name).write_bytes(bytes(bad))
        try:
            GPT2LMHeadModel.from_pretrained(tmp_path)
        except LoadError as error:
            refused += 1
            assert str(error)
        (tmp_path / name).write_bytes(good)
    assert 50 < refused < 250


@pytest.mark.parametrize("size", ["5", "-5GB", 0, "0KB", "5 XB", 1.5])
def test_shard_sizes(tmp_path: Path, size: Any) -> None:
    with pytest.raises(Error, match="max_shard_size is"):
        make().save_pretrained(tmp_path, max_shard_size=size)


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(Error, match="cannot be made"):
        make().save_pretrained(tmp_path / "file/model")


FULL = """
import resource, signal, sys
from gptfast import Error, GPT2LMHeadModel
model = GPT2LMHeadModel.from_pretrained(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
model.transformer.wte.weight.data += 1
try:
    model.save_pretrained(sys.argv[1])
except Error as error:
    print(error)
"""


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    make(n_embd=32).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "cannot be written" in run.stdout and run.stdout.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
