"""Load a base with an adapter for inference, whole, sharded or quantized."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from transformers import GenerationConfig

from lorasb_ds.adapters.experts import LoraSBExperts
from lorasb_ds.adapters.inject import inject, lora_sb_layer
from lorasb_ds.adapters.lora_sb import LoraSBLinear
from lorasb_ds.adapters.low_rank import LoraPair, product_svd
from lorasb_ds.config.ds_config import resolve_ds_config
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.distributed.ds_config_check import check_ds_config
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.adapter_reader import read_adapter
from lorasb_ds.export.chat_format import use_template_of
from lorasb_ds.export.expert_layers import join
from lorasb_ds.export.stored_adapter import StoredAdapter
from lorasb_ds.models.base import Base, open_base
from lorasb_ds.models.generation import stop_tokens, stored_end_tokens
from lorasb_ds.models.loading import DTYPES, load_base
from lorasb_ds.models.loss import add_loss_head, check_loss_head
from lorasb_ds.models.tables import Tables, tables_of


@dataclass(frozen=True)
class PreparedModel:
    """A base and an adapter that one process has checked; nothing is loaded yet."""

    config: RunConfig
    ds_config: dict[str, Any]
    base: Base
    adapter: StoredAdapter | None
    stop: list[int]  # tokens that end an answer

    @cached_property
    def tables(self) -> Tables:
        return tables_of(self.base.model)

    @property
    def is_sharded(self) -> bool:
        return bool(self.ds_config["zero_optimization"]["stage"] == 3)


def prepare_model(
    config: RunConfig, adapter: str | None, world_size: int = 1, local_size: int | None = None
) -> PreparedModel:
    """Check options and files. Not collective.

    Args:
        config: its fields about the base, the ds_config and the dtype are read.
        adapter: a run's folder, a checkpoint of it, or a PEFT LoRA folder; None: the base alone.
    Raises:
        ConfigError: says what is wrong and what to do about it.
    """
    base, config = open_base(config)
    ds_config, config = resolve_ds_config(config, world_size, local_size)
    check_ds_config(ds_config, config.ds_config)
    stored_adapter = None
    if adapter is not None:
        stored_adapter = read_adapter(adapter, with_head=config.classifies)
    if config.classifies:
        base = _with_classes(base, stored_adapter)
    if stored_adapter is not None:
        _check_base(stored_adapter, base)
    stop: list[int] = []
    if not config.classifies:
        if stored_adapter is not None:
            use_template_of(stored_adapter, base.tokenizer)
        stop = stop_tokens(base.tokenizer, stored_end_tokens(base.name, base.folder))
    return PreparedModel(
        config=config, ds_config=ds_config, base=base, adapter=stored_adapter, stop=stop
    )


def _with_classes(base: Base, adapter: StoredAdapter | None) -> Base:
    """Return the base of a classifier with the classes that its run was trained on.

    Raises:
        ConfigError: if there is no trained head, it is another model's, or its run is gone.
    """
    option = "--task-type sequence-classification"
    if adapter is None or not adapter.head:
        raise ConfigError(
            f"{option} needs the --adapter of a classifier: a base has no trained head."
        )
    if adapter.classes is None:
        raise ConfigError(
            f"{option}: {adapter.path} does not say what its classes are; run.json of its run "
            "does. Name the run's folder."
        )
    base = base.with_classes(adapter.classes)
    stored = {name: tuple(adapter.stored[key].shape) for name, key in adapter.head.items()}
    of_base = {name: tuple(base.model.get_parameter(name).shape) for name in base.head}
    if stored != of_base:
        raise ConfigError(
            f"--adapter {adapter.path} does not fit --model {base.name}: its head has {stored}, "
            f"where the model has {of_base}. Name the base that it was trained on."
        )
    return base


def start_model(run: PreparedModel) -> Any:
    """Load base and adapter onto their devices, in eval mode. Collective.

    PEFT's layers do not work on our quantized or sharded bases: our own layers take the adapter's
    A and B, with R = I.

    Raises:
        ConfigError: if the base is to be sharded and no job is running, or a factor exceeds the
            range of ``--dtype``.
    """
    config = run.config
    if run.is_sharded and not dist.is_initialized():
        raise ConfigError(
            f"--ds-config {config.ds_config} shards the base over the processes of a job, and this "
            "is one process. Give --num-procs or --num-gpus, or leave it out."
        )
    model = load_base(run.base, config, run.ds_config)
    # The base's own may ask for beams or penalize repetitions; answers are greedy.
    model.generation_config = GenerationConfig()
    adapters = _inject(model, run.adapter, DTYPES[config.dtype])
    model.requires_grad_(False)
    if not config.classifies:
        add_loss_head(model)
    if run.is_sharded:
        model = zero.make_inference_engine(model, run.ds_config).module
    for name, layer in adapters.items():
        assert run.adapter is not None
        A, B = _factors(run.adapter, name, layer)
        if not all(factor.to(DTYPES[config.dtype]).isfinite().all() for factor in (A, B)):
            raise ConfigError(f"--dtype {config.dtype}: the factors of {name} exceed its range.")
        zero.fill(layer.lora_A, A)
        zero.fill(layer.lora_B, B)
        zero.fill(layer.lora_R, torch.eye(layer.r).expand(layer.factor_shape("lora_R")))
    model.eval()
    if config.classifies:
        assert run.adapter is not None, "prepare_model has refused a base alone"
        for name, key in run.adapter.head.items():
            value = run.adapter.read(key)
            if not value.to(DTYPES[config.dtype]).isfinite().all():
                raise ConfigError(f"--dtype {config.dtype}: {name} of the head exceeds its range.")
            zero.fill(model.get_parameter(name), value)
        return model
    check_loss_head(model, torch.arange(8, device=accelerator.device())[None])
    return model


def _inject(
    model: Any, adapter: StoredAdapter | None, dtype: torch.dtype
) -> dict[str, LoraSBLinear]:
    """Put empty layers of our own in the place of an adapter's layers and projections of experts.

    An r larger than a layer's shorter side is cut to it without loss; the experts of a projection
    have the highest rank of one of them.
    """
    if adapter is None:
        return {}
    ranks: dict[str, int] = {}
    for layer, shape in adapter.shapes.items():
        expert = adapter.experts.get(layer)
        name = layer if expert is None else expert.projection
        ranks[name] = max(ranks.get(name, 0), min(adapter.rank_of(layer), *shape))
    by_rank: dict[int, list[str]] = {}
    for name, r in ranks.items():
        by_rank.setdefault(r, []).append(name)
    adapters: dict[str, LoraSBLinear] = {}
    for r, names in by_rank.items():
        adapters |= inject(model, names, r, dtype, lora_sb_layer)
    return adapters


def _factors(adapter: StoredAdapter, name: str, layer: LoraSBLinear) -> LoraPair:
    """Read the A and B of a layer, or of all experts of a projection, at the layer's rank."""

    def cut(of: str) -> LoraPair:
        pair = adapter.pair(of)
        return product_svd(pair).pair(layer.r) if layer.r < len(pair.A) else pair

    if not isinstance(layer, LoraSBExperts):
        return cut(name)
    experts = {of: e for of, e in adapter.experts.items() if e.projection == name}
    (A, B), *_ = join({of: cut(of) for of in experts}, experts).values()
    return LoraPair(A, B)


def _check_base(adapter: StoredAdapter, base: Base) -> None:
    """Refuse an adapter of another base."""
    for layer, shape in adapter.shapes.items():
        expert = adapter.experts.get(layer)
        sides = base.shape.layers.get(layer) if expert is None else expert.sides_in(base.experts)
        if sides != shape:
            has = "no such linear layer" if sides is None else f"one of {sides}"
            raise ConfigError(
                f"--adapter {adapter.path} does not fit --model {base.name}: it has {layer} of "
                f"shape {shape}, where the model has {has}. Name the base that it was trained on. "
                "(Heads and shared layers cannot have an adapter here: evaluate the merged model.)"
            )
