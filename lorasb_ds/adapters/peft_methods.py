"""``--method peft:FILE.json``: what PEFT trains, put into the run's one model and engine.

PEFT makes its layers; here they are made right on sharded weights, kept, put back and exported.
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
from peft import PeftType, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn

from lorasb_ds.adapters.inject import trained_in
from lorasb_ds.adapters.peft_config import PREFIX
from lorasb_ds.adapters.peft_file import peft_config, refusal
from lorasb_ds.adapters.peft_writer import trained_value, write_adapter
from lorasb_ds.config.resolve import read_peft_file
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.distributed.collectives import broadcast
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.linear_layers import Shapes, layer_shape
from lorasb_ds.system.host_memory import release_freed_memory

ADAPTER = "default"  # PEFT's name of the one adapter


@dataclass(frozen=True)
class PeftPlan:
    """What a configuration comes to in a model.

    Attributes:
        content: of the file.
        layers: layers with an adapter -> (out, in).
        trained: parameter -> its shape.
        num_kept: numbers beside them and the base, such as VeRA's projections.
    """

    content: Mapping[str, Any]
    layers: Shapes
    trained: Mapping[str, tuple[int, ...]]
    num_kept: int


def plan_peft(config: RunConfig, model: Any) -> PeftPlan:
    """What a run's configuration comes to, found on the empty model. Not collective.

    Args:
        model: on the meta device; PEFT's layers are in it afterwards.
    Raises:
        ConfigError: what PEFT says against it, or what cannot be trained here.
    """
    content = read_peft_file(config.method)
    made = peft_config(config.method, content)
    with _peft_said(config.method):
        get_peft_model(model, made)
    layers = tuner_layers(model)
    trained = trained_in(model)
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    if inside := [name for name, layer in layers.items() if layer in heads]:
        raise ConfigError(
            f"--method {config.method}: {', '.join(inside)} is an embedding or the head, which "
            "stay as they are here. Leave it out of target_modules."
        )
    if not trained:
        raise ConfigError(f"--method {config.method}: nothing in it is trained.")
    flat = [name for name, parameter in trained.items() if parameter.ndim != 2]
    if config.optimizer == "muon" and flat:
        raise ConfigError(f"--optimizer muon is for matrices, and {flat[0]} is none. Try adamw.")
    return PeftPlan(
        content=content,
        layers={name: _sides(layer.get_base_layer()) for name, layer in layers.items()},
        trained={name: tuple(parameter.shape) for name, parameter in trained.items()},
        num_kept=sum(tensor.numel() for tensor in kept_in(model).values()),
    )


def _sides(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer; of a norm (1, its numbers)."""
    if isinstance(layer, nn.Linear) or hasattr(layer, "nf"):
        return layer_shape(layer)
    return 1, max(1, sum(parameter.numel() for parameter in layer.parameters()))


@contextmanager
def _peft_said(path: str) -> Iterator[None]:
    """PEFT's complaints as ours, without its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"--method {path}: PEFT cannot put it into the base: {error}") from error


def inject_peft(model: Any, plan: PeftPlan, config: RunConfig, dtype: torch.dtype) -> None:
    """Put PEFT's layers into a base, whose weights may be sharded by ZeRO-3. Collective.

    A layer's weight is gathered while PEFT makes an adapter for it: inits that look at it, such as
    DoRA's magnitude, see the whole. What PEFT draws at random goes by the run's seed; afterwards
    all ranks have rank 0's numbers.

    Raises:
        ConfigError: on every rank alike, if PEFT does not take it, or changes the base.
    """
    made = peft_config(config.method, plan.content)
    model.requires_grad_(False)
    kind = _on_shards(PEFT_TYPE_TO_TUNER_MAPPING[PeftType(made.peft_type)], config.method)
    with _peft_said(config.method), torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(f"{config.seed_of_init} peft".encode()))
        kind(model, made, ADAPTER)
    for tensor in [*trained_in(model).values(), *kept_in(model).values()]:
        is_weight = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        value = tensor.data.to(accelerator.device(), dtype if is_weight else tensor.dtype)
        tensor.data = broadcast(value.contiguous(), 0, None)


def _on_shards(kind: Any, path: str) -> Any:
    """A class of PEFT's that puts layers into a model, for weights that are sharded."""

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
                why = "its init changes the base's weights, which stay as they are"
                raise ConfigError(refusal(path, "this configuration", why))

    return OnShards


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers by the name of the layer that each one wraps."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def kept_in(model: nn.Module) -> dict[str, torch.Tensor]:
    """What PEFT's layers have beside what is trained and the base: buffers, frozen parameters."""
    seen = {id(parameter) for parameter in trained_in(model).values()}
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
def peft_off(model: nn.Module) -> Iterator[None]:
    """The model is its base."""
    layers = tuner_layers(model).values()
    trained = trained_in(model).values()
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
    """Let ZeRO-3 gather all of a layer at once. PEFT's layers read weights outside the forward of
    the modules that own them. Not collective.
    """
    for layer in tuner_layers(model).values():
        zero.gather_together(layer, layer.parameters())


def collect_peft(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that PEFT has put into a model, by name, on rank 0's CPU; {} elsewhere. Collective.

    What is trained is taken from the optimizer's fp32 master.

    Raises:
        FloatingPointError: on every rank, if what was trained is not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in trained_in(model).items():
        value = trained_value(name, parameter)
        if zero.rank() == 0:
            tensors[name] = value.cpu().clone().contiguous()
    for name, tensor in kept_in(model).items():
        with zero.gathered([p for p in [tensor] if isinstance(p, nn.Parameter)]):
            if zero.rank() == 0:
                tensors[name] = tensor.data.cpu().clone().contiguous()
    return tensors


def fill_peft(model: nn.Module, file: Path) -> None:
    """Put back what ``collect_peft`` gave, from a file that rank 0 reads. Collective."""
    trained, stored = trained_in(model), {}
    if zero.rank() == 0:
        with safe_open(file, "pt") as opened:
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for name, parameter in trained.items():
        zero.fill_trainable_from(parameter, stored.get(name))
    for name, tensor in kept_in(model).items():
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
) -> None:
    """The folder that PEFT's own ``save_pretrained`` would write. Rank 0's.

    Args:
        empty_model: the base on the meta device, for PEFT's names.
        tensors: of ``collect_peft``.
    """
    with _peft_said("peft:"):
        tuned: Any = get_peft_model(empty_model, peft_config("peft:", plan.content))
    # What layers share has a name in each of them, and one beside the base. Buffers that PEFT makes
    # again when it loads an adapter have none.
    named = tuned.state_dict(keep_vars=True)
    values = {
        id(named[f"{PREFIX}{name}"]): value
        for name, value in tensors.items()
        if f"{PREFIX}{name}" in named
    }
    state = {name: values[id(tensor)] for name, tensor in named.items() if id(tensor) in values}
    found = get_peft_model_state_dict(tuned, state_dict=state, save_embedding_layers=False)
    made = tuned.peft_config[ADAPTER]
    made.inference_mode, made.base_model_name_or_path = True, base_model
    content = {k: sorted(v) if isinstance(v, set) else v for k, v in made.to_dict().items()}
    # A copy each: a file holds no two names of one tensor.
    write_adapter(folder, {k: v.clone().contiguous() for k, v in found.items()}, content)
