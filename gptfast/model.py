"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") with its two heads, written on gptfast.ops.

Parameter names and layouts are Hugging Face's; `lm_head.weight` is `transformer.wte.weight` unless the config unties them. The
blocks are in layers.py.
"""

from __future__ import annotations

import math
import os
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptfast import hub, ops
from gptfast.config import GPT2Config
from gptfast.errors import Error
from gptfast.forward import ModelOutput, Pass, check_ids, prepare
from gptfast.layers import Block, Dropout, Embedding, LayerNorm, Linear


class GPT2Model(nn.Module):
    """Token and position embeddings, the blocks and the last layer norm."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # keep only what enters a block; the backward pass computes the rest again
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.drop = Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # residual projections are scaled by the number of residual additions
                shrink = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(weight, std=config.initializer_range / shrink)

    def forward(self, now: Pass, keep: bool = False) -> tuple[Tensor, ...]:
        """The last hidden states [B, T, C]; with `keep` those that enter each block before them."""
        if now.embeds is None:
            assert now.ids is not None
            residual = ops.embedding(now.ids, now.positions, self.wte.weight, self.wpe.weight)
        else:
            residual = now.embeds + self.wpe(now.positions)
        residual = residual.to(self.ln_f.weight.dtype)  # a training step looks up fp32 tables for blocks in bf16
        residual = self.drop(residual, now.seed(0))
        x: Tensor | None = None
        states = []
        for block in self.h:
            if keep:
                states.append(residual if x is None else residual + x)
            if self.gradient_checkpointing and torch.is_grad_enabled():  # dropout's noise is a function of `now`: no state to keep
                residual, x = checkpoint(block, residual, x, now, use_reentrant=False, preserve_rng_state=False)
            else:
                residual, x = block(residual, x, now)
        return (*states, self.ln_f.after_add(residual, x)[1])

    def draw_seeds(self) -> Tensor | None:
        """One seed for each dropout of a pass, from torch's CPU generator in one draw; None where nothing is dropped."""
        config = self.config
        if not self.training or max(config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == 0:
            return None
        return torch.randint(-(2**63), 2**63 - 1, (1 + 3 * config.n_layer,)).to(self.wte.weight.device)


class PreTrained(nn.Module):
    """What the models share: folders in and out, checked inputs, and one pass through the transformer."""

    heads: tuple[str, ...] = ()  # parameters that a folder of another head may lack
    foreign: tuple[str, ...] = ()  # parameters of other heads that a folder may hold
    transformer: GPT2Model

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.generation_config: dict[str, Any] = {}  # generation_config.json as it was read
        self.transformer = GPT2Model(config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.transformer.wte.weight.dtype

    def _tie(self) -> None:
        """Makes tied parameters one, where the model has any."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
    ) -> Self:
        """The model of a folder, a hub id or a packed file of fp32 or bf16, in evaluation mode. `dtype` None: the stored one.

        Raises gptfast.LoadError with one line for what is missing, malformed or does not fit its config.json.
        """
        file = import_module("gptfast.packed").open(path) if os.path.isfile(path) else None
        folder = hub.resolve(path, revision) if file is None else Path(path)
        config = hub.load_config(folder) if file is None else file.config
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        if file is None:
            state = hub.load_state(folder, shapes, optional=cls.heads, foreign=cls.foreign, dtype=dtype, device=device)
        else:
            state = {name: tensor.to(device, hub.dtype_of(dtype)) for name, tensor in file.state().items()}
        for name in shapes.keys() - state.keys():
            warnings.warn(f"{folder} has no {name}: this head starts with random weights", stacklevel=2)
            like = state["transformer.wte.weight"]
            state[name] = torch.empty(shapes[name], dtype=like.dtype, device=like.device).normal_(std=config.initializer_range)
        model.load_state_dict(state, strict=False, assign=True)
        model._tie()
        model.generation_config = hub.load_generation_config(folder) if file is None else file.generation_config
        return model.eval()

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Writes config.json, generation_config.json and the weights as safetensors, in shards of at most `max_shard_size`.

        Rows that only pad the vocabulary are left out. transformers loads the folder.
        """
        hub.save(folder, self.state_dict(), self.config, type(self).__name__, self.generation_config, max_shard_size)

    def _run(self, now: Pass, keep: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Last hidden states [B, T, C] in the caller's layout, and with `keep` those of every block."""
        now.seeds = self.transformer.draw_seeds()
        states = now.finish(self.transformer(now, keep))
        return states[-1], states if keep else None

    def _train_pass(self, input_ids: Tensor, document_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Last hidden states [B, T, C] for a loss; ids are those of checked data, and are not checked again."""
        length = input_ids.shape[1]
        if length > self.config.n_positions:
            raise Error(f"the sequence has {length:,} tokens, the model's context is {self.config.n_positions:,}")
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        now = Pass(input_ids, None, position_ids, document_ids, self.transformer.draw_seeds())
        states: tuple[Tensor, ...] = self.transformer(now)
        return states[-1]


class GPT2LMHeadModel(PreTrained):
    """The language model: the transformer and a linear head over the vocabulary, which is the token embedding unless untied."""

    foreign = ("score.weight",)

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if not config.tie_word_embeddings:
            nn.init.normal_(self.lm_head.weight, std=config.initializer_range)
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        document_ids: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> ModelOutput:
        """input_ids [B, T] (or inputs_embeds [B, T, C]) -> .logits [B, T, V]; with labels [B, T] also the mean next-token .loss.

        attention_mask [B, T]: 0 is padding, left or right; positions count real tokens only (as in transformers' generate, not as
        in its forward). labels are shifted here; -100 is ignored. use_cache (default: where no gradients are recorded) returns
        past_key_values to pass back in with the tokens that follow; a pass with past_key_values records no gradients.
        document_ids [B, T]: tokens attend within their document only; -1 is padding. logits_to_keep: only the last so many
        columns. Raises gptfast.Error for an id outside the vocabulary, a sequence beyond the context, shapes that do not fit.
        """
        cached = self.config.use_cache and not torch.is_grad_enabled() if use_cache is None else use_cache
        now = prepare(
            self.config, self.dtype, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, cached, document_ids
        )
        real = self.config.real_vocabulary
        with torch.set_grad_enabled(torch.is_grad_enabled() and past_key_values is None):
            last, states = self._run(now, output_hidden_states)
            logits = self.lm_head(last[:, -logits_to_keep:] if logits_to_keep else last)
        loss = None
        if labels is not None:
            if logits_to_keep or labels.shape != last.shape[:2]:
                raise Error(f"labels have shape {tuple(labels.shape)}, the logits have {tuple(logits.shape[:2])}")
            check_ids("labels", labels, real, ignore=True)
            loss = ops.cross_entropy(logits, F.pad(labels[:, 1:], (0, 1), value=-100), vocab=real)
        return ModelOutput(loss, logits[..., :real], now.cache, states)

    def loss_sum(
        self, input_ids: Tensor, targets: Tensor, document_ids: Tensor | None = None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The training entry: ids and already shifted targets [B, T] -> sum of the losses (fp32), number of targets not -100.

        No logits are kept and nothing waits for the device: ids are those of checked shards, and are not checked again.
        """
        last = self._train_pass(input_ids, document_ids, position_ids)
        loss = ops.linear_cross_entropy(last, self.lm_head.weight, targets, vocab=self.config.real_vocabulary, reduction="sum")
        return loss, (targets != -100).sum()

    def generate(self, input_ids: Tensor | None = None, **arguments: Any) -> Any:
        """Continues ids [B, T]: Hugging Face's argument names and defaults, see gptfast.generation.generate."""
        return import_module("gptfast.generation.generate").generate(self, input_ids, **arguments)


class GPT2ForSequenceClassification(PreTrained):
    """The classifier: a linear head on the last real token of each row."""

    heads = ("score.weight",)
    foreign = ("lm_head.weight",)

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.score = Linear(config.n_embd, config.num_labels, bias=False)
        nn.init.normal_(self.score.weight, std=config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> ModelOutput:
        """input_ids [B, T] -> .logits [B, num_labels] of each row's last real token, and with labels the .loss.

        Without attention_mask, runs of config.pad_token_id at both ends of a row are padding; several rows need one of the two.
        Loss by config.problem_type: cross entropy (labels [B] of class numbers), mean squared error (num_labels 1, or labels
        [B, num_labels] of numbers), or binary cross entropy (labels [B, num_labels] of 0 and 1).
        """
        if attention_mask is None and input_ids is not None and input_ids.dim() == 2 and self.config.pad_token_id is not None:
            real = (input_ids != self.config.pad_token_id).int()
            attention_mask = real.cummax(1).values & real.flip(1).cummax(1).values.flip(1)
        now = prepare(self.config, self.dtype, input_ids, inputs_embeds, attention_mask, position_ids, None, False, None)
        last, states = self._run(now, output_hidden_states)
        B, T = last.shape[:2]
        if attention_mask is None and B > 1:
            raise Error(f"classifying {B} rows needs attention_mask or config.pad_token_id, to find each row's last real token")
        steps = torch.arange(T, device=last.device)
        column = torch.full_like(steps[:1], T - 1) if attention_mask is None else (steps * (attention_mask != 0)).argmax(1)
        logits = self.score(last[torch.arange(B, device=last.device), column])
        return ModelOutput(None if labels is None else self._loss(logits, labels), logits, None, states)

    def loss_sum(
        self, input_ids: Tensor, targets: Tensor, document_ids: Tensor | None = None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The training entry: ids [B, T], and targets [B, T] that hold the number of a class at the last token of each text, else
        -100 -> sum of the cross entropies (fp32), number of texts. A row may hold several texts, told apart by document_ids."""
        last = self._train_pass(input_ids, document_ids, position_ids)
        wanted = targets != -100
        return ops.cross_entropy(self.score(last[wanted]), targets[wanted], reduction="sum"), wanted.sum()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        whole = not labels.is_floating_point()
        kind = self.config.problem_type or ("single_label_classification" if whole else "multi_label_classification")
        if self.config.problem_type is None and self.config.num_labels == 1:
            kind = "regression"
        if kind == "single_label_classification":
            check_ids("labels", labels, self.config.num_labels, ignore=True)
            return ops.cross_entropy(logits, labels.view(-1))
        if labels.numel() != logits.numel():
            raise Error(f"labels have shape {tuple(labels.shape)}, the logits have {tuple(logits.shape)}")
        labels = labels.view_as(logits).to(logits.dtype)
        return F.mse_loss(logits, labels) if kind == "regression" else F.binary_cross_entropy_with_logits(logits, labels)
