"""``--method peft:FILE.json``: inject PEFT's own layers, save and restore them, export them.

PEFT makes its layers; this module lets it do so on weights that ZeRO-3 has sharded. It is imported
where it is needed: that takes seconds, which other methods need not wait for.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from lorasb_ds.adapters.inject import trainable_parameters
from lorasb_ds.adapters.peft_config import PREFIX
from lorasb_ds.adapters.peft_method_file import make_peft_config, refusal_message
from lorasb_ds.adapters.peft_writer import trained_value, write_adapter
from lorasb_ds.config.resolve import read_peft_file
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.distributed.collectives import broadcast
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.linear_layers import Shapes, layer_shape
from lorasb_ds.models.tokenizer_files import TokenizerFiles
from lorasb_ds.system.host_memory import release_freed_memory

ADAPTER = "default"  # PEFT's name of the one adapter


@dataclass(frozen=True)
class PeftPlan:
    """What a configuration makes of a model.

    Attributes:
        content: of the file.
        layers: names of the layers with an adapter -> (out, in).
        trained: names of the trained parameters -> shape.
        num_kept: count of the other numbers that PEFT adds, such as VeRA's frozen projections.
    """

    content: Mapping[str, Any]
    layers: Shapes
    trained: Mapping[str, tuple[int, ...]]
    num_kept: int


def plan_peft(config: RunConfig, model: Any) -> PeftPlan:
    """Find out what a run's configuration makes of the empty model. Not collective.

    Args:
        model: on the meta device; PEFT's layers are in it afterwards.
    Raises:
        ConfigError: if PEFT rejects the configuration, or it cannot be trained here.
    """
    import peft

    content = read_peft_file(config.method)
    made = make_peft_config(config.method, content)
    with _peft_errors_reported(config.method):
        peft.get_peft_model(model, made)
    layers = tuner_layers(model)
    trained = trainable_parameters(model)
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    if inside := [name for name, layer in layers.items() if layer in heads]:
        raise ConfigError(
            f"--method {config.method}: {', '.join(inside)} is an embedding or the head, which "
            "are not trained here. Leave it out of target_modules."
        )
    if not trained:
        raise ConfigError(f"--method {config.method}: it trains no parameter.")
    flat = [name for name, parameter in trained.items() if parameter.ndim != 2]
    if config.optimizer == "muon" and flat:
        raise ConfigError(
            f"--optimizer muon trains matrices only, and {flat[0]} is not one. Use adamw."
        )
    return PeftPlan(
        content=content,
        layers={name: _layer_sides(layer.get_base_layer()) for name, layer in layers.items()},
        trained={name: tuple(parameter.shape) for name, parameter in trained.items()},
        num_kept=sum(tensor.numel() for tensor in frozen_tensors(model).values()),
    )


def _layer_sides(layer: Any) -> tuple[int, int]:
    """Return (out, in) of a linear layer, or (1, number of parameters) of a norm."""
    if isinstance(layer, nn.Linear) or hasattr(layer, "nf"):
        return layer_shape(layer)
    return 1, max(1, sum(parameter.numel() for parameter in layer.parameters()))


@contextmanager
def _peft_errors_reported(path: str) -> Iterator[None]:
    """Raise PEFT's errors as ConfigErrors, and suppress its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"--method {path}: PEFT cannot inject its layers: {error}") from error


def inject_peft(model: Any, plan: PeftPlan, config: RunConfig, dtype: torch.dtype) -> None:
    """Inject PEFT's layers into a base whose weights ZeRO-3 may have sharded. Collective.

    A layer's weight is gathered while PEFT makes an adapter for it, so that inits that read it,
    such as DoRA's magnitude, see it whole. PEFT's random numbers come from the run's seed, and are
    then broadcast from rank 0.

    Raises:
        ConfigError: on every rank alike, if PEFT rejects the base, or changes its weights.
    """
    import peft

    made = make_peft_config(config.method, plan.content)
    model.requires_grad_(False)
    tuner = peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(made.peft_type)]
    kind = _on_shards(tuner, config.method)
    with _peft_errors_reported(config.method), torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(f"{config.seed_of_init} peft".encode()))
        kind(model, made, ADAPTER)
    for tensor in [*trainable_parameters(model).values(), *frozen_tensors(model).values()]:
        is_weight = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        value = tensor.data.to(accelerator.device(), dtype if is_weight else tensor.dtype)
        tensor.data = broadcast(value.contiguous(), 0, None)


def _on_shards(kind: Any, path: str) -> Any:
    """Return a subclass of one of PEFT's tuners that works on sharded weights.

    Args:
        kind: PEFT's tuner class, which injects layers into a model.
        path: ``peft:FILE.json``, for messages.
    """

    class OnShards(kind):
        def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
            target = args[2]  # of (configuration, adapter's name, target, …)
            weights = list(target.parameters())
            with zero.gathered(weights):
                before = [weight.detach().clone() for weight in weights]
                super()._create_and_replace(*args, **kwargs)
                same = all(map(torch.equal, before, weights))
            del before
            release_freed_memory()
            if not same:
                why = "its init changes the base's weights, which must not change"
                raise ConfigError(refusal_message(path, "this configuration", why))

    return OnShards


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's layers by the names of the layers that they wrap."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def frozen_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what PEFT's layers hold besides trainable parameters and the base, by name.

    That is, frozen parameters and buffers.
    """
    seen = {id(parameter) for parameter in trainable_parameters(model).values()}
    kept: dict[str, torch.Tensor] = {}
    for name, layer in tuner_layers(model).items():
        seen |= {id(tensor) for tensor in layer.get_base_layer().parameters()}
        seen |= {id(tensor) for tensor in layer.get_base_layer().buffers()}
        for key, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                kept[f"{name}.{key}"] = tensor
    return kept


@contextmanager
def disable_peft(model: nn.Module) -> Iterator[None]:
    """Make the model exactly its base inside the ``with`` block."""
    layers = tuner_layers(model).values()
    trained = trainable_parameters(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for layer in layers:
            layer.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def gather_peft_together(model: nn.Module) -> None:
    """Have ZeRO-3 gather all parameters of each of PEFT's layers at once. Not collective.

    PEFT's layers read weights outside the forward of the modules that own them.
    """
    for layer in tuner_layers(model).values():
        zero.gather_together(layer, layer.parameters())


def collect_peft(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all tensors that PEFT has added, by name, on rank 0's CPU; {} elsewhere. Collective.

    Trainable parameters are read from their fp32 masters.

    Raises:
        FloatingPointError: on every rank, if a trainable parameter is not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in trainable_parameters(model).items():
        value = trained_value(name, parameter)
        if zero.rank() == 0:
            tensors[name] = value.cpu().clone().contiguous()
    for name, tensor in frozen_tensors(model).items():
        with zero.gathered([p for p in [tensor] if isinstance(p, nn.Parameter)]):
            if zero.rank() == 0:
                tensors[name] = tensor.data.cpu().clone().contiguous()
    return tensors


def fill_peft(model: nn.Module, file: Path) -> None:
    """Restore what ``collect_peft`` returned, from a file that rank 0 reads. Collective."""
    trained, stored = trainable_parameters(model), {}
    if zero.rank() == 0:
        with safe_open(file, "pt") as opened:
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for name, parameter in trained.items():
        zero.fill_trainable_from(parameter, stored.get(name))
    for name, tensor in frozen_tensors(model).items():
        if isinstance(tensor, nn.Parameter):
            zero.fill(tensor, stored.get(name))
        else:
            if stored:
                tensor.copy_(stored[name])
            broadcast(tensor, 0, None)


def save_peft_method(
    folder: Path,
    plan: PeftPlan,
    empty_model: Any,
    tensors: Mapping[str, torch.Tensor],
    base_model: str | None,
    tokenizer: TokenizerFiles | None = None,
) -> None:
    """Write the folder that PEFT's own ``save_pretrained`` would write. Called on rank 0 only.

    Args:
        empty_model: the base on the meta device, for PEFT's names.
        tensors: from ``collect_peft``.
        base_model: name of the base in adapter_config.json.
        tokenizer: to put beside it.
    """
    import peft

    with _peft_errors_reported("peft:"):
        tuned: Any = peft.get_peft_model(empty_model, make_peft_config("peft:", plan.content))
    # A tensor that layers share has a name in each of them. Buffers that PEFT computes anew when it
    # loads an adapter are not in the state dict.
    named = tuned.state_dict(keep_vars=True)
    values = {
        id(named[f"{PREFIX}{name}"]): value
        for name, value in tensors.items()
        if f"{PREFIX}{name}" in named
    }
    state = {name: values[id(tensor)] for name, tensor in named.items() if id(tensor) in values}
    found = peft.get_peft_model_state_dict(tuned, state_dict=state, save_embedding_layers=False)
    made = tuned.peft_config[ADAPTER]
    made.inference_mode, made.base_model_name_or_path = True, base_model
    content = {k: sorted(v) if isinstance(v, set) else v for k, v in made.to_dict().items()}
    # A copy each: a file holds no two names of one tensor.
    found = {k: v.clone().contiguous() for k, v in found.items()}
    write_adapter(folder, found, content, tokenizer)
