"""Find adapters that would do nothing, by a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from lorasb_ds.errors import ConfigError


@contextmanager
def refuse_passed_by(model: nn.Module, adapters: Mapping[str, nn.Module]) -> Iterator[None]:
    """Refuse layers that forward passes in the ``with`` block do not call, only their parents.

    Those read the weights by themselves, or do not use them: an adapter there would do
    nothing, without a word. A layer whose parent is not called is another matter: it may be of an
    expert to which no token went.

    Raises:
        ConfigError: at the end of the block.
    """
    parents = {name: model.get_submodule(name.rpartition(".")[0]) for name in adapters}
    called: set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.add(module))
        for module in {*adapters.values(), *parents.values()}
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    names = [n for n, layer in adapters.items() if layer not in called and parents[n] in called]
    if names:
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise ConfigError(
            f"An adapter on {len(names)} layer(s) such as {names[0]} would do nothing: the model "
            f"does not call them in its forward pass, though it has their weights. Leave {kinds} "
            "out by naming the others in --target-modules."
        )
