"""The decoder: one frozen base model, computed for rows of many adapters at once. Trainer and sampler share it.

Shape letters: ``T`` packed rows, ``D`` residual channels, ``H`` query heads, ``G`` key-value heads, ``d`` channels of a
head, ``C`` positions of the context, ``N`` few rows, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tuft.models.architecture import DecoderConfig
from tuft.models.decoding import DecodedRows, DecodeStep, LayerWeights, StepWeights
from tuft.models.functions import (
    MAX_PACKED_ROWS,
    add_rms_norm,
    base_product,
    head_rms_norm,
    packed_product,
    packed_weight,
    rotary_heads,
    swiglu,
)
from tuft.models.load import LoadedWeights
from tuft.models.lora import LM_HEAD, Segment, group_key
from tuft.models.lora_linear import LoraLinear, LoraProducts
from tuft.models.ops import EagerOps, Ops

Precision = Literal["bf16", "float32"]

EAGER = EagerOps()


class Attention(Protocol):
    """What a layer's queries see: packed sequences when training, a cache when sampling."""

    def attend(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """Queries and keys are rotated already. Returns the contexts ``[T, H, d]``."""
        ...


@dataclass(slots=True)
class _Linear:
    weight_NK: Tensor
    bias_N: Tensor | None = None
    packed_NK: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Layer:
    """One block's frozen weights; projections that share their input are one matrix."""

    qkv: _Linear
    o: _Linear
    gate_up: _Linear
    down: _Linear
    attention_norm_D: Tensor
    mlp_norm_D: Tensor
    head_norm_qd: Tensor | None

    @property
    def linears(self) -> tuple[_Linear, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class _Pass:
    """What all layers of one pass read."""

    cos_T1d: Tensor
    sin_T1h: Tensor
    attention: Attention
    lora: LoraProducts
    decoded: DecodedRows | None


class Decoder:
    """Frozen base weights on ``device``. ``bf16``: base and LoRA products in bf16; residual stream, norm statistics,
    softmax and every accumulation in float32. ``float32``: everything. ``ops`` may be replaced between two passes.
    ``step``: whole steps of decoding in one call, where ``pack`` has found a way."""

    def __init__(self, weights: LoadedWeights, precision: Precision, device: torch.device, ops: Ops = EAGER) -> None:
        self.ops = ops
        self.config: DecoderConfig = weights.config
        self.precision: Precision = precision
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.device = device
        tensors = weights.tensors
        self.embed_VD = tensors["model.embed_tokens.weight"].to(device, self.dtype)
        head = tensors.get("lm_head.weight")
        self.head_VD = self.embed_VD if head is None else head.to(device, self.dtype)
        self._packed_for: Ops | None = None
        self.step: DecodeStep | None = None
        self._head = _Linear(self.head_VD)
        self._head.packed_NK = packed_weight(self.head_VD)
        self.final_norm_D = tensors["model.norm.weight"].to(device, torch.float32)
        self._layers = [self._layer(tensors, layer) for layer in range(self.config.num_layers)]
        self._cos_Cd, self._sin_Ch = self._rope_tables()

    def _layer(self, tensors: Mapping[str, Tensor], layer: int) -> _Layer:
        prefix = f"model.layers.{layer}."

        def linear(*names: str) -> _Linear:
            biases = [tensors[f"{prefix}{n}.bias"] for n in names if f"{prefix}{n}.bias" in tensors]
            weight_NK = torch.cat([tensors[f"{prefix}{n}.weight"].to(self.device, self.dtype) for n in names])
            return _Linear(weight_NK, torch.cat(biases).to(self.device, self.dtype) if biases else None)

        def norm(name: str) -> Tensor:
            return tensors[f"{prefix}{name}.weight"].to(self.device, torch.float32)

        head_norm_qd = None
        if self.config.qk_norm:
            q_norm_Hd = norm("self_attn.q_norm").expand(self.config.num_heads, -1)
            k_norm_Gd = norm("self_attn.k_norm").expand(self.config.num_kv_heads, -1)
            head_norm_qd = torch.cat([q_norm_Hd, k_norm_Gd])
        return _Layer(
            qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            o=linear("self_attn.o_proj"),
            gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
            down=linear("mlp.down_proj"),
            attention_norm_D=norm("input_layernorm"),
            mlp_norm_D=norm("post_attention_layernorm"),
            head_norm_qd=head_norm_qd,
        )

    def _rope_tables(self) -> tuple[Tensor, Tensor]:
        """cos ``[C, d]`` (its halves are equal) and sin ``[C, d / 2]`` of every position, float32."""
        inv_freq_h = torch.from_numpy(self.config.rope_inv_freq())
        angles_Ch = torch.arange(self.config.max_context_tokens, dtype=torch.float32)[:, None] * inv_freq_h
        scaling = self.config.rope_scaling
        factor = 1.0 if scaling is None else scaling.attention_factor
        cos_Ch, sin_Ch = angles_Ch.cos() * factor, angles_Ch.sin() * factor
        return torch.cat([cos_Ch, cos_Ch], dim=1).to(self.device), sin_Ch.to(self.device)

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attention: Attention,
        segments: Sequence[Segment],
        decoded: DecodedRows | None = None,
        keep_activations: bool = True,
    ) -> Tensor:
        """``x_TD`` after the final norm, in the compute dtype. Differentiable if gradients are enabled: its
        ``backward`` adds to the gradient buffers of the segments. Without ``keep_activations`` each layer is computed
        again in the backward, which costs about a third more time and needs about a seventh of the memory."""
        cos_T1d, sin_T1h = self._cos_Cd[positions_T].unsqueeze(1), self._sin_Ch[positions_T].unsqueeze(1)
        lora = LoraProducts(segments, self.dtype, self.ops.lora)
        in_pass = _Pass(cos_T1d, sin_T1h, attention, lora, decoded)
        x_TD: Tensor = F.embedding(tokens_T, self.embed_VD)
        if torch.is_grad_enabled():
            x_TD.requires_grad_()  # nothing else does: the weights are frozen, LoRA gradients go their own way
        norm_D, eps = self._layers[0].attention_norm_D, self.config.rms_norm_eps
        residual_TD, x_TD = add_rms_norm(self.ops, None, x_TD, norm_D, eps)
        for index in range(self.config.num_layers):
            if torch.is_grad_enabled() and not keep_activations:
                residual_TD, x_TD = checkpoint(
                    self._layer_output, index, in_pass, residual_TD, x_TD, use_reentrant=False, preserve_rng_state=False
                )
            else:
                residual_TD, x_TD = self._layer_output(index, in_pass, residual_TD, x_TD)
        return x_TD

    def _layer_output(self, index: int, in_pass: _Pass, residual_TD: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream, and its norm for the next layer (or the head)."""
        config, ops, layer = self.config, self.ops, self._layers[index]
        x_TD = self._linear(x_TD, layer.qkv, group_key(index, "qkv"), in_pass.lora, in_pass.decoded)
        if layer.head_norm_qd is not None:
            x_TD = head_rms_norm(ops, x_TD, layer.head_norm_qd, config.rms_norm_eps)
        q_THd, k_TGd, v_TGd = rotary_heads(
            ops, x_TD, in_pass.cos_T1d, in_pass.sin_T1h, config.num_heads, config.num_kv_heads
        )
        x_TD = in_pass.attention.attend(index, q_THd, k_TGd, v_TGd).flatten(1)
        x_TD = self._linear(x_TD, layer.o, group_key(index, "o"), in_pass.lora, in_pass.decoded)
        residual_TD, x_TD = add_rms_norm(ops, residual_TD, x_TD, layer.mlp_norm_D, config.rms_norm_eps)
        x_TN = self._linear(x_TD, layer.gate_up, group_key(index, "gate_up"), in_pass.lora, in_pass.decoded)
        x_TI = swiglu(ops, x_TN)
        x_TD = self._linear(x_TI, layer.down, group_key(index, "down"), in_pass.lora, in_pass.decoded)
        is_last = index + 1 == config.num_layers
        norm_D = self.final_norm_D if is_last else self._layers[index + 1].attention_norm_D
        residual_TD, x_TD = add_rms_norm(ops, residual_TD, x_TD, norm_D, config.rms_norm_eps)
        return residual_TD, x_TD

    def _linear(
        self, x_TK: Tensor, linear: _Linear, key: str, lora: LoraProducts, decoded: DecodedRows | None
    ) -> Tensor:
        if torch.is_grad_enabled():
            y_TN: Tensor = LoraLinear.apply(lora, x_TK, linear.weight_NK, linear.bias_N, key)
            return y_TN
        if linear.packed_NK is not None and len(x_TK) <= MAX_PACKED_ROWS:
            y_TN = packed_product(x_TK, linear.packed_NK, linear.bias_N)
        else:
            y_TN = base_product(x_TK, linear.weight_NK, linear.bias_N)
        lora.add(y_TN, x_TK, key)
        if decoded is not None:
            decoded.add(y_TN, x_TK, key)
        return y_TN

    def pack(self) -> None:
        """Keep every linear's weight a second time as decoding reads it fastest, where there is such a way. To be
        called again once ``ops`` has been replaced."""
        if self._packed_for is self.ops:
            return
        self._packed_for = self.ops
        self.step = None if self.ops.decode is None else self.ops.decode.step(self.config, self._step_weights())
        for layer in self._layers:
            for linear in layer.linears:
                linear.packed_NK = packed_weight(linear.weight_NK) if self.step is None else None

    def _step_weights(self) -> StepWeights:
        layers = [
            LayerWeights(
                [(linear.weight_NK, linear.bias_N) for linear in layer.linears],
                layer.attention_norm_D,
                layer.mlp_norm_D,
                layer.head_norm_qd,
            )
            for layer in self._layers
        ]
        return StepWeights(self.embed_VD, layers, self.final_norm_D, self._cos_Cd, self._sin_Ch)

    def logits(self, x_ND: Tensor, segments: Sequence[Segment], decoded: DecodedRows | None = None) -> Tensor:
        """Logits ``[N, V]`` in the compute dtype, unembedding LoRA included; no gradients."""
        with torch.no_grad():
            # a vocabulary's width is enough to fill torch's products
            return self._linear(x_ND, self._head, LM_HEAD, LoraProducts(segments, self.dtype, None), decoded)
