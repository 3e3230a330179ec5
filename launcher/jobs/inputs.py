"""What a job reads, looked at before it is started: its model and its rows. Torch-free."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lorasb_ds.config.data_options import REASONING_GYM
from lorasb_ds.config.paths import DEMO_MODEL, expand_home, read_json
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.first_rows import describe_first_rows
from lorasb_ds.data.sources import names_a_path, source_path
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.checkpoint_files import is_hub_name, model_path, stored_tensors
from lorasb_ds.system.units import GIB

# Files of which a tokenizer needs one, unless it is code of the model's own.
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt")


def describe_inputs(config: RunConfig, *, on_this_host: bool) -> list[str]:
    """Look at the model's files and at the first rows, as far as they are here.

    Args:
        on_this_host: the job runs here. Else what is missing here may be on its hosts.
    Returns:
        A sentence for each of them.
    Raises:
        ConfigError: with a paragraph for each that the run would refuse.
    """
    sources = [("--data", source) for source in config.data]
    sources += [("--eval-data", config.eval_data)] if config.eval_data is not None else []
    sources += [("--init-data", source) for source in config.init_data or ()]
    looks = [partial(_model, config, on_this_host)]
    looks += [partial(_rows, *named, config, on_this_host) for named in sources]
    found: list[str] = []
    problems: list[str] = []
    for look in looks:
        try:
            found.append(look())
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return found


def _model(config: RunConfig, on_this_host: bool) -> str:
    model = config.model
    if not on_this_host and model != DEMO_MODEL and not Path(expand_home(model)).exists():
        return f"--model {model} is not here, and not looked at: `lorasb doctor` asks the hosts"
    if is_hub_name(model):
        return f"--model {model} is a name on the hub, which is not looked at"
    folder = Path(model_path(model))
    read_json(str(folder / "config.json"), "--model")
    tensors = stored_tensors(model, folder).values()
    if not config.trust_remote_code and not any(any(folder.glob(name)) for name in TOKENIZERS):
        raise ConfigError(
            f"--model {model}: {folder} has no tokenizer. It needs tokenizer.json (or a "
            "sentencepiece tokenizer.model)."
        )
    size = sum(tensor.end - tensor.begin for tensor in tensors) / GIB
    return f"--model {model}: config.json, a tokenizer, {len(tensors)} tensors of {size:.2f} GiB"


def _rows(option: str, source: str, config: RunConfig, on_this_host: bool) -> str:
    is_here = source_path(source).exists()
    if source.startswith(REASONING_GYM):
        return f"{option} {source}: rows are generated at the start, and not looked at"
    if not is_here and not names_a_path(source):
        return f"{option} {source} is a name on the hub, which is not looked at"
    if not is_here and not on_this_host:
        return f"{option} {source} is not here, and not looked at: `lorasb doctor` asks the hosts"
    return describe_first_rows(source, config, option, held_out=option == "--eval-data")
