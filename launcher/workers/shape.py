"""The worker of `lorasb plan` for models that only transformers can make: their sizes as JSON."""

from __future__ import annotations

import json

import click

from launcher.options import CONTEXT
from launcher.workers.common import find_home
from launcher.workers.quiet import quiet_libraries
from lorasb_ds.errors import ConfigError


@click.command(context_settings=CONTEXT)
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--trust-remote-code", is_flag=True)
def main(folder: str, trust_remote_code: bool) -> None:
    """Print a line: the shape of the model of FOLDER's config.json, or {"error": what is wrong}.

    No weights are read or made. Libraries may print other lines before it.
    """
    find_home()
    quiet_libraries()
    import torch

    from lorasb_ds.models.base import Base
    from lorasb_ds.models.empty_model import empty_model
    from lorasb_ds.models.shape import shape_of
    from lorasb_ds.planner.model_shape import shape_as_json

    try:
        hf_config = Base(folder, trust_remote_code).hf_config
        model = empty_model(hf_config, torch.bfloat16, trust_remote_code, buffers=False)
        click.echo(shape_as_json(shape_of(folder, model)))
    except ConfigError as error:
        click.echo(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    main(prog_name="shape")
