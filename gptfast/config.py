"""The dataclasses that are the one source of CLI flags, YAML keys, help texts and of what a checkpoint records.

A field declared with `option(default, "help")` becomes a flag of the commands that take its class (gptfast/options.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptfast.errors import Error, shown


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field with a help text; `more` goes into the metadata (choices=(...), low=..., high=...)."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu", "tanh")


@dataclass
class GPT2Config:
    """Architecture of a GPT-2-family model, with Hugging Face's names and defaults (the defaults are GPT-2 124M).

    Raises gptfast.Error where a value makes no model.
    """

    vocab_size: int = option(50257, "number of token ids")
    n_positions: int = option(1024, "longest context in tokens")
    n_embd: int = option(768, "width of the residual stream")
    n_layer: int = option(12, "number of blocks")
    n_head: int = option(12, "attention heads; divides n_embd")
    n_inner: int | None = option(None, "width of the MLP (default: 4 n_embd)")
    activation_function: str = option("gelu_new", "MLP activation", choices=ACTIVATIONS)
    resid_pdrop: float = option(0.1, "dropout on each block's two outputs")
    embd_pdrop: float = option(0.1, "dropout on the embeddings")
    attn_pdrop: float = option(0.1, "dropout on the attention weights")
    layer_norm_epsilon: float = option(1e-5, "epsilon of every layer norm")
    initializer_range: float = option(0.02, "standard deviation of initial weights")
    scale_attn_weights: bool = option(True, "divide attention scores by sqrt(head size)")
    scale_attn_by_inverse_layer_idx: bool = option(False, "divide attention scores by the block's number, counted from 1")
    reorder_and_upcast_attn: bool = option(False, "attention scores in fp32 whatever the dtype")
    tie_word_embeddings: bool = option(True, "the head's matrix is the token embedding")
    use_cache: bool = option(True, "return past_key_values")
    bos_token_id: int | None = option(50256, "id that starts a text")
    eos_token_id: int | None = option(50256, "id that ends a text")
    pad_token_id: int | None = option(None, "id of padding")
    num_labels: int = option(2, "classes of the classification head")
    problem_type: str | None = None  # of the classification head; None: told from num_labels and the labels' dtype
    id2label: dict[int, str] | None = None  # names of the classes
    real_vocab_size: int | None = None  # ids beyond it only pad the token table to a round size; None: every id is real

    def __post_init__(self) -> None:
        if self.id2label is not None:
            self.id2label = _check_labels(self.id2label)
            self.num_labels = len(self.id2label)
        for field in dataclasses.fields(self):
            self._check(field.name, str(field.type))
        if self.n_embd % self.n_head:
            raise Error(f"config: n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if max(self.vocab_size, self.n_positions, self.mlp_width) * self.n_embd > 2**40:
            raise Error(f"config: a matrix of n_embd {self.n_embd} columns would hold more than 2^40 numbers")
        if self.real_vocabulary > self.vocab_size:
            raise Error(f"config: real_vocab_size {self.real_vocab_size} is larger than vocab_size {self.vocab_size}")

    def _check(self, name: str, kind: str) -> None:
        value = getattr(self, name)
        if value is None and "None" in kind:
            return
        if name in _CHOICES:
            if value not in _CHOICES[name]:
                raise Error(f"config: {name} is {shown(value)}; allowed: {', '.join(_CHOICES[name])}")
        elif kind.startswith("int"):
            low, high = _WHOLE.get(name, (0, 2**31 - 1))
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise Error(f"config: {name} is {shown(value)}; a whole number of {low} to {high:,} is needed")
        elif kind == "float":
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            dropout = name.endswith("pdrop")
            if not number or not (0 <= value < 1 if dropout else 0 < value < 1e3):
                needed = "at least 0 and below 1" if dropout else "a positive number"
                raise Error(f"config: {name} is {shown(value)}; {needed} is needed")
        elif kind == "bool" and not isinstance(value, bool):
            raise Error(f"config: {name} is {shown(value)}; true or false is needed")

    @property
    def mlp_width(self) -> int:
        """Width of the MLP: n_inner, or 4 n_embd."""
        return self.n_inner or 4 * self.n_embd

    @property
    def real_vocabulary(self) -> int:
        """Number of ids that can be produced: vocab_size without the rows that only pad the table."""
        return self.real_vocab_size or self.vocab_size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPT2Config:
        """The config in a Hugging Face config.json. Keys that are not fields here are ignored and decide nothing.

        Raises gptfast.Error by name for a key that would change the mathematics and is not supported.
        """
        for name, plain in _UNSUPPORTED.items():
            if values.get(name, plain) not in (plain, None):
                raise Error(f"config: {name} is {shown(values[name])}, which gptfast does not support; only {plain!r} is")
        known = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
        if isinstance(known.get("eos_token_id"), list):  # a list belongs to generation_config.json; its first id ends a text
            known["eos_token_id"] = known["eos_token_id"][0] if known["eos_token_id"] else None
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json as transformers and the converters of llama.cpp and CTranslate2 read it."""
        ours = ("real_vocab_size", "num_labels", "id2label")
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in ours}
        names = self.id2label or ({index: f"LABEL_{index}" for index in range(self.num_labels)} if self.num_labels != 2 else {})
        if names:  # two nameless classes are transformers' default
            values["id2label"] = {str(index): name for index, name in names.items()}
            values["label2id"] = {name: index for index, name in names.items()}
        return {"model_type": "gpt2", **values, "n_ctx": self.n_positions}


_CHOICES = {
    "activation_function": ACTIVATIONS,
    "problem_type": ("regression", "single_label_classification", "multi_label_classification"),
}
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_head", "n_inner", "num_labels", "real_vocab_size")
_WHOLE = {"n_layer": (1, 1024), **dict.fromkeys(_SIZES, (1, 2**31 - 1))}
# keys that change what a GPT-2 computes, and the value under which it is computed here
_UNSUPPORTED: dict[str, Any] = {
    "model_type": "gpt2",
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
}


def _check_labels(names: Any) -> dict[int, str]:
    """id2label with whole-number keys 0..n-1; JSON turns them into strings."""
    try:
        result = {int(index): str(name) for index, name in names.items()}
    except (AttributeError, TypeError, ValueError):
        raise Error(f"config: id2label is {shown(names)}; an object of class number and name is needed") from None
    if sorted(result) != list(range(len(result))) or not result:
        raise Error(f"config: id2label has the keys {sorted(result)}; 0 to {max(len(result) - 1, 0)} are needed")
    return result


@dataclass
class TrainConfig:
    """How a model is trained; `gptfast train`, Trainer and every checkpoint use these names.

    Raises gptfast.Error where a value cannot run.
    """

    data: str = option("", "folder of token shards that `gptfast prepare` wrote")
    out: str = option("", "folder of the run: log, checkpoints, and at the end the model as a Hugging Face folder")
    init: str | None = option(None, "model to start from, a folder or a hub id (default: random weights)")
    steps: int = option(1000, "optimizer steps", low=1)
    batch: int = option(16, "sequences in one optimizer step", low=1)
    microbatch: int | None = option(None, "sequences computed at once; gradients accumulate over them (default: the batch)", low=1)
    context: int | None = option(None, "tokens in a sequence (default: the model's n_positions)", low=1)
    document_mask: bool = option(False, "attention and positions do not cross documents")
    lr: float = option(1e-3, "learning rate after the warm-up", low=0.0)
    min_lr: float = option(0.1, "learning rate at the end, as a fraction of --lr", low=0.0, high=1.0)
    warmup: int = option(100, "steps in which the learning rate rises from 0 in a line", low=0)
    schedule: str = option("cosine", "learning rate after the warm-up", choices=("cosine", "wsd", "constant"))
    decay: float = option(0.2, "wsd: part of the steps, at the end, in which the learning rate falls", low=0.0, high=1.0)
    optimizer: str = option("adamw", "AdamW, or Muon on the blocks' matrices with AdamW on the rest", choices=("adamw", "muon"))
    momentum: float = option(0.95, "Muon's decay of the gradient", low=0.0, high=1.0)
    weight_decay: float = option(0.1, "decoupled weight decay, on matrices only", low=0.0)
    beta1: float = option(0.9, "AdamW's decay of the mean gradient", low=0.0, high=1.0)
    beta2: float = option(0.95, "AdamW's decay of the mean squared gradient", low=0.0, high=1.0)
    eps: float = option(1e-8, "AdamW's epsilon", low=0.0)
    clip: float = option(1.0, "largest norm of the gradient; longer ones are scaled down to it (0: off)", low=0.0)
    dtype: str = option(
        "fp32", "dtype of the computation; parameters, gradients and optimizer are fp32", choices=("fp32", "bf16", "fp16")
    )
    activation_checkpointing: bool = option(False, "keep a block's input only and compute the rest again: less memory, slower")
    compile: bool = option(False, "run forward and backward through torch.compile")
    device: str = option("auto", "where it runs; auto is cuda where there is a GPU", choices=("auto", "cpu", "cuda"))
    threads: int | None = option(None, "CPU threads (default: PyTorch's choice)", low=1)
    parallel: str = option(
        "ddp", "under torchrun: ddp keeps the model on every process, fsdp splits parameters and optimizer", choices=("ddp", "fsdp")
    )
    seed: int = option(0, "seed of the initial weights, the order of the data and dropout", low=0, high=2**63 - 1)
    log_every: int = option(10, "steps between two lines of log.jsonl", low=1)
    eval_every: int = option(250, "steps between two evaluations (0: none)", low=0)
    eval_sequences: int = option(256, "sequences of held-out text in an evaluation", low=1)
    patience: int = option(0, "stop after so many evaluations in a row without a better result (0: never)", low=0)
    keep_best: bool = option(False, "the model at the end is that of the best evaluation, not the last one")
    save_every: int = option(250, "steps between two checkpoints (0: none)", low=0)
    keep: int = option(2, "checkpoints kept", low=2)
    log_samples: bool = option(False, "log which samples every step computed")
    tensorboard: bool = option(False, "also write events for TensorBoard, into OUT/tensorboard")
    wandb: bool = option(False, "also log to Weights & Biases")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_range(field, getattr(self, field.name))
        for name in ("beta1", "beta2", "momentum"):
            if getattr(self, name) >= 1:
                raise Error(f"training: {name} is {getattr(self, name)}; a number below 1 is needed")


def _check_range(field: dataclasses.Field[Any], value: Any) -> None:
    """The type, choices, low and high that a field of TrainConfig declares, for values that come from Python."""
    kind = str(field.type)
    if value is None and "None" in kind:
        return
    types: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "bool": bool}
    word = kind.split(" ")[0]
    if not isinstance(value, types[word]) or (isinstance(value, bool) and word != "bool"):
        raise Error(f"training: {field.name} is {shown(value)}; {word} is needed")
    choices, low, high = (field.metadata.get(name) for name in ("choices", "low", "high"))
    if choices is not None and value not in choices:
        raise Error(f"training: {field.name} is {shown(value)}; allowed: {', '.join(choices)}")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        allowed = f"at least {low}" if high is None else f"{low} to {high}"
        raise Error(f"training: {field.name} is {value}; allowed: {allowed}")
