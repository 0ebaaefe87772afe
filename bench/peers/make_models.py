"""A GPT-2 with random weights in every candidate's own form: what bench_generate.py measures.

    python bench/peers/make_models.py FOLDER                          gpt2 in all forms (2.5 GB, a minute)
    python bench/peers/make_models.py FOLDER --size gpt2-xl --forms gguf-bf16,gguf-q8_0,packed-int8

FOLDER/<size>/ gets hf/ (Hugging Face's), ct2-float32/ and ct2-int8/ (CTranslate2's converter), f32.gguf, bf16.gguf, q8_0.gguf and
q4_0.gguf (llama.cpp), fp32.packed, bf16.packed, int8.packed and int4.packed (gptfast). What is already there stays. Speed does not
depend on what the weights are; biases and norms are random too, so that a form which loses some is noticed. A form whose package is
missing is left out with a line that says so. The tokenizer's files come from $GPTFAST_DATA/gpt2 or from --tokenizer FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
GGUF = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
FORMS = (
    "ct2-float32", "ct2-int8", *(f"gguf-{kind}" for kind in GGUF),
    *(f"packed-{dtype}" for dtype in ("fp32", "bf16", "int8", "int4")),
)  # fmt: skip


def random_model(folder: Path, size: str, tokenizer: Path) -> None:
    """Hugging Face's folder: its own initialisation from seed 0, and random values where that leaves zeros and ones."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, heads, width = SIZES[size]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=width))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if re.search(r"ln_\w\.weight", name) else 0.0, 0.05)
    model.save_pretrained(folder, max_shard_size="100GB")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(tokenizer / name, folder / name)


def weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a folder, one at a time."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (safe_open's object is no mapping)
            yield name.removeprefix("transformer."), file.get_tensor(name)


def write_ctranslate2(source: Path, target: Path, kind: str) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(source)).convert(str(target), quantization=None if kind == "float32" else kind)


def write_gguf(source: Path, target: Path, kind: str) -> None:
    """As llama.cpp's own converter writes GPT-2: matrices [out, in] in `kind`, the tied head once, the rest fp32. Unlike its
    quantizer, which keeps q4_0's head in q6_K, the head is in `kind` too: fewer bytes, so faster."""
    import gguf

    config = json.loads((source / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config["n_layer"])
    writer = gguf.GGUFWriter(str(target), gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(getattr(gguf.LlamaFileType, GGUF[kind]))
    vocabulary = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    merges = (source / "merges.txt").read_text(encoding="utf-8").splitlines()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(vocabulary))
    writer.add_token_merges([line for line in merges if line and not line.startswith("#version")])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    quantized = getattr(gguf.GGMLQuantizationType, kind.upper())
    for name, tensor in weights(source):
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        values = tensor.float()
        if re.search(r"(c_attn|c_proj|c_fc)\.weight", name):
            values = values.t().contiguous()
        label = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if values.dim() == 2 and name != "wpe.weight" and kind != "f32":
            writer.add_tensor(label, gguf.quants.quantize(values.numpy(), quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(label, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_packed(source: Path, target: Path, dtype: str) -> None:
    from gptfast import packed

    packed.write(source, dtype, target)


def target_and_writer(form: str, folder: Path) -> tuple[Path, Callable[[Path, Path, str], None], str]:
    family, kind = form.split("-", 1)
    return {
        "ct2": (folder / form, write_ctranslate2, kind), "gguf": (folder / f"{kind}.gguf", write_gguf, kind),
        "packed": (folder / f"{kind}.packed", write_packed, kind),
    }[family]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="gpt2", choices=SIZES)
    parser.add_argument("--forms", default=",".join(FORMS), help="of: %(default)s")
    parser.add_argument("--tokenizer", type=Path, default=Path(os.environ.get("GPTFAST_DATA", ""), "gpt2"))
    arguments = parser.parse_args()
    folder = arguments.folder / arguments.size
    source = folder / "hf"
    if not (source / "merges.txt").exists():
        random_model(source, arguments.size, arguments.tokenizer)
    for form in arguments.forms.split(","):
        if form not in FORMS:
            parser.error(f"--forms: {form}; forms are {', '.join(FORMS)}")
        target, write, kind = target_and_writer(form, folder)
        if target.exists():
            continue
        half = target.with_name(f"{target.name}.part")
        try:
            write(source, half, kind)
        except ImportError as missing:
            print(f"{form}: left out, {missing}", file=sys.stderr)
            continue
        half.rename(target)
        print(target, flush=True)


if __name__ == "__main__":
    main()
