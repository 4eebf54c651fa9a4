"""A base model in the engine: its decoder, and the trainer and the sampler that share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tuft.engine.base import BaseModelSource, EngineSettings
from tuft.engine.device import choose_device, choose_precision
from tuft.engine.memory import check_weights, fitted, is_packed, memory_plan
from tuft.engine.sampler import Sampler
from tuft.engine.trainer import Trainer
from tuft.models.accelerated import AcceleratedOps
from tuft.models.decoder import EAGER, Decoder
from tuft.models.load import load_weights
from tuft.models.tokenizer import load_tokenizer, write_tokenizer_files
from tuft.types import BaseModelInfo, MemoryShares


@dataclass(frozen=True, slots=True)
class LoadedModel:
    info: BaseModelInfo
    decoder: Decoder
    trainer: Trainer
    sampler: Sampler


def load_models(sources: Sequence[BaseModelSource], settings: EngineSettings) -> list[LoadedModel]:
    """Load every base model and write its tokenizer files. Raises ModelError, or ConfigError if they do not fit."""
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    device = choose_device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs and streams are the current device's
    decoders: list[Decoder] = []
    for source in sources:
        decoders.append(_load_decoder(source, settings, device, decoders))
    settings, shares = fitted(settings, decoders)
    return [
        _model(source, decoder, settings, memory)
        for source, decoder, memory in zip(sources, decoders, shares, strict=True)
    ]


def _load_decoder(
    source: BaseModelSource, settings: EngineSettings, device: torch.device, before: Sequence[Decoder]
) -> Decoder:
    write_tokenizer_files(source.path, Path(source.tokenizer_dir))
    weights = load_weights(source.path, source.max_context_tokens)
    precision = choose_precision(source.precision, device)
    check_weights(weights.config, settings, precision, device, before)
    return Decoder(weights, precision, device, EAGER if device.type == "cpu" else AcceleratedOps())


def _model(
    source: BaseModelSource, decoder: Decoder, settings: EngineSettings, memory: MemoryShares | None
) -> LoadedModel:
    config = decoder.config
    info = BaseModelInfo(
        name=source.name,
        aliases=source.aliases,
        architecture=config.architecture,
        vocab_size=config.vocab_size,
        max_context_tokens=config.max_context_tokens,
        num_parameters=config.num_parameters,
        precision=decoder.precision,
        eos_token_ids=config.eos_token_ids,
        tokenizer_dir=source.tokenizer_dir,
        linear_shapes=config.linear_shapes(),
        memory_plan=memory_plan(config, settings, decoder.dtype.itemsize, is_packed(decoder, settings)),
        memory=memory,
    )
    trainer = Trainer(decoder, settings.micro_batch_tokens, memory=memory)
    return LoadedModel(info, decoder, trainer, Sampler(decoder, load_tokenizer(Path(source.tokenizer_dir)), settings))
