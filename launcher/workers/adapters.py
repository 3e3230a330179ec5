"""`lorasb export`, `merge`, `inspect` and `combine`: work with trained adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.options import CONTEXT, check_picture, reports_problems
from launcher.text import columns
from launcher.workers.common import find_home
from launcher.workers.quiet import quiet_libraries
from lorasb_ds.adapters.peft_targets import peft_warning
from lorasb_ds.config.run_layout import EXPORTED, INSPECT_PICTURE
from lorasb_ds.errors import ConfigError

if TYPE_CHECKING:
    from lorasb_ds.export.inspection import LayerUpdate
    from lorasb_ds.export.stored_adapter import StoredAdapter
    from lorasb_ds.export.to_peft import EnergyKept


POSITIVE = click.IntRange(min=1)
DTYPE = click.Choice(["fp32", "bf16", "fp16"])
OUT = click.Path(path_type=Path)


@click.group(context_settings=CONTEXT)
def main() -> None:
    """Work with trained adapters.

    RUN is a run's folder (of which the adapter is taken, or else the newest checkpoint), one of its
    checkpoints, or a PEFT LoRA folder.
    """
    find_home()
    quiet_libraries()


@main.command(context_settings=CONTEXT)
@click.argument("run")
@click.option(
    "--to",
    type=click.Choice(["peft", "vllm"]),
    default="peft",
    show_default=True,
    help="Plain LoRA. vllm: experts by themselves, by the names of the base's files.",
)
@click.option("--model", help="--to vllm: the base. [default: as the run or the adapter names it]")
@click.option("--out", type=OUT, help="[default: exported/ in the run's folder]")
@click.option("--r", type=POSITIVE, help="Cut to rank R, by an exact SVD. [default: the adapter's]")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Cut to the smallest rank that keeps this fraction of the update's squared norm.",
)
@click.option("--dtype", type=DTYPE, default="fp32", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@click.option("--json", "as_json", is_flag=True, help="The energy kept at every rank, as JSON.")
@reports_problems
def export(
    run: str,
    to: str,
    model: str | None,
    out: Path | None,
    r: int | None,
    energy: float | None,
    dtype: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write an adapter as a plain LoRA folder, which PEFT, vLLM and others load.

    A smaller rank is the best approximation: the SVD of B R A is found from the factors, and cut.
    """
    if r is not None and energy is not None:
        raise ConfigError("--r and --energy both choose the rank. Give one of them.")
    if energy is not None and math.isnan(energy):
        raise ConfigError("--energy must be above 0 and at most 1.")
    from lorasb_ds.export.adapter_reader import read_adapter
    from lorasb_ds.export.to_peft import check_folder, export_adapter, max_lora_rank, measure_energy

    adapter = read_adapter(run)
    if out is None:
        if adapter.run is None:
            raise ConfigError(f"{run} is not in a run's folder. Name a new folder by --out.")
        out = adapter.run / EXPORTED
    check_folder(out, [adapter], overwrite)
    kept = measure_energy(adapter)
    rank = kept.smallest_r(energy) if energy is not None else r or adapter.r
    if to == "vllm" and adapter.experts:
        size = _export_for_vllm(adapter, model, out, rank, dtype, overwrite)
    else:
        size = export_adapter(adapter, out, r=rank, dtype=dtype, overwrite=overwrite)
        warn_of_peft(adapter, [name for name in adapter.layers if name not in adapter.experts])
    if as_json:
        click.echo(json.dumps({"r": rank, "out": str(out), "energy_kept": asdict(kept)}))
        return
    click.echo("\n".join(energy_table(kept, rank)))
    click.echo(
        f"\nadapter of rank {rank}, {len(adapter.layers)} layers, {size / 1e6:.1f} MB: {out}"
    )
    allowed = max_lora_rank(rank)
    click.echo(
        f"vLLM: --enable-lora --max-lora-rank {allowed}"
        if allowed
        else f"vLLM has no --max-lora-rank for rank {rank}: its largest is 512"
    )


def _export_for_vllm(
    adapter: StoredAdapter, model: str | None, out: Path, r: int, dtype: str, overwrite: bool
) -> int:
    from lorasb_ds.export.to_vllm import export_for_vllm
    from lorasb_ds.models.base import Base

    model = model or adapter.base_model
    if model is None:
        raise ConfigError("--to vllm needs the base, which the adapter does not name: --model.")
    return export_for_vllm(adapter, Base(model), out, r=r, dtype=dtype, overwrite=overwrite)


def warn_of_peft(adapter: StoredAdapter, layers: Iterable[str]) -> None:
    """Warn, on standard error, if PEFT would misread the folder that was written of an adapter."""
    if adapter.model_type is None and "target_parameters" in adapter.target_fields:
        return  # it has the form for bases with experts already, and keeps it
    if warning := peft_warning(adapter.model_type, layers, adapter.base_model):
        click.echo(f"lorasb: warning: {warning}", err=True)


def energy_table(kept: EnergyKept, rank: int) -> list[str]:
    ranks = sorted({*(1 << i for i in range(len(kept.total).bit_length())), rank, len(kept.total)})
    rows = [
        (str(k), f"{kept.total[k - 1]:.4f}", f"{kept.lowest[k - 1]:.4f}", "<-" if k == rank else "")
        for k in ranks
        if k <= len(kept.total)
    ]
    return columns(("r", "energy kept", "lowest layer", ""), rows)


@main.command(context_settings=CONTEXT)
@click.argument("run")
@click.option("--out", type=OUT, required=True, help="Folder of the merged model.")
@click.option("--model", help="The base. [default: as the run or the adapter names it]")
@click.option("--load-in-4bit", is_flag=True, help="Write linear layers in bitsandbytes' NF4.")
@click.option("--num-procs", type=POSITIVE, default=1, show_default=True, help="Files at a time.")
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@click.option("--trust-remote-code", is_flag=True, help="Run model code that comes with the base.")
@reports_problems
def merge(run: str, out: Path, model: str | None, **options: Any) -> None:
    """Write base and adapter as one model: W0 + B R A, computed in fp32 and rounded once.

    Streams over the base's files: a few rows are in memory at a time, whatever the model's size.
    The same command goes on with a merge that was killed.
    """
    from lorasb_ds.export.adapter_reader import read_adapter
    from lorasb_ds.export.merge import merge_adapter

    adapter = read_adapter(run, with_head=True)
    model = model or adapter.base_model
    if model is None:
        raise ConfigError(f"{run} does not name its base. Name it by --model.")
    trained_on = next((b for b in ("4", "8") if adapter.run_config.get(f"load_in_{b}bit")), None)
    if trained_on and not options["load_in_4bit"]:
        click.echo(
            f"lorasb: the adapter was trained on the base in {trained_on} bits, and is added to "
            "its full weights: where these differ from the quantized ones, the merged model "
            "differs from the one that was trained, by the quantization's error. Mostly it is no "
            "worse; check by `lorasb eval`."
        )
    result = merge_adapter(
        adapter, model, out, say=lambda text: click.echo(f"lorasb: {text}"), **options
    )
    click.echo(
        f"merged: {out}   {result.merged_layers} layers, {result.files} files, "
        f"{result.bytes / 1e9:.2f} GB, {result.seconds:.0f} s"
    )


@main.command(context_settings=CONTEXT)
@click.argument("run")
@click.option("--model", help="The base. [default: as the run or the adapter names it]")
@click.option("--no-base", is_flag=True, help="Do not read the base: no norms of W0.")
@click.option("--trust-remote-code", is_flag=True, help="Run model code that comes with the base.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Picture: blocks of the model by modules. [default: inspect.png in the run's folder, or "
    "DIR-inspect.png beside a folder DIR that is in no run's]",
)
@click.option(
    "--json", "as_json", is_flag=True, help="All numbers, with all singular values, as JSON."
)
@reports_problems
def inspect(
    run: str,
    model: str | None,
    no_base: bool,
    trust_remote_code: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Show what an adapter has learned, layer by layer: rank, size, and what training added."""
    if output is not None:
        check_picture(output)
    from lorasb_ds.export.adapter_reader import read_adapter
    from lorasb_ds.export.inspection import draw_updates, inspect_adapter

    adapter = read_adapter(run)
    if output is None:
        output = picture_of(adapter)
        check_picture(output)
    model = model or adapter.base_model
    base = None
    if not no_base:
        if model is None:
            raise ConfigError(f"{run} does not name its base. Give --model or --no-base.")
        from lorasb_ds.export.merge_plan import weights_of

        base = weights_of(adapter, model, trust_remote_code)
    layers = inspect_adapter(adapter, base)
    draw_updates(output, layers)
    if as_json:
        click.echo(json.dumps({name: asdict(layer) for name, layer in layers.items()}))
        return
    click.echo("\n".join(layer_table(layers)))
    click.echo(f"\nheat map: {output}")


def picture_of(adapter: StoredAdapter) -> Path:
    """Return where an adapter's picture goes: a PEFT folder itself may be sent to the hub."""
    if adapter.run is not None:
        return adapter.run / INSPECT_PICTURE
    folder = adapter.path.resolve()
    return folder.with_name(f"{folder.name}-{INSPECT_PICTURE}")


def layer_table(layers: dict[str, LayerUpdate]) -> list[str]:
    header = ("layer", "r", "σ₁", "σᵣ", "effective rank", "‖ΔW‖", "‖ΔW‖/‖W0‖", "trained", "|QᵀQ-I|")
    rows = [
        (
            name,
            str(layer.r),
            f"{layer.singular_values[0]:.3g}",
            f"{layer.singular_values[-1]:.2g}",
            f"{layer.effective_rank:.1f}",
            f"{layer.norm:.3g}",
            "-" if layer.relative_norm is None else f"{layer.relative_norm:.2%}",
            "-" if layer.trained_share is None else f"{layer.trained_share:.1%}",
            f"{layer.orthonormality_error:.0e}",
        )
        for name, layer in layers.items()
    ]
    return columns(header, rows)


@main.command(context_settings=CONTEXT)
@click.argument("runs", metavar="RUN RUN [RUN...]", nargs=-1, required=True)
@click.option("--weights", required=True, help="One for each adapter, separated by commas: 0.5,0.5")
@click.option("--out", type=OUT, required=True, help="Folder of the new adapter.")
@click.option("--r", type=POSITIVE, help="Cut to rank R, by an exact SVD. [default: the sum's]")
@click.option("--dtype", type=DTYPE, default="fp32", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@reports_problems
def combine(
    runs: Sequence[str], weights: str, out: Path, r: int | None, dtype: str, overwrite: bool
) -> None:
    """Write the weighted sum of adapters as one adapter: add, average, interpolate, subtract.

    Adapters of one basis (`train --init-from` the same init) are summed at their own rank; of
    others the ranks add up, unless --r cuts the sum to the best update of that rank.
    """
    try:
        numbers = [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {weights} must be numbers, separated by commas.") from None
    from lorasb_ds.export.adapter_reader import read_adapter
    from lorasb_ds.export.combine import combine_adapters

    adapters = [read_adapter(run) for run in runs]
    bases = dict.fromkeys(str(adapter.base_path) for adapter in adapters)
    if len(bases) > 1:
        click.echo(f"lorasb: warning: the adapters name different bases: {', '.join(bases)}")
    found = combine_adapters(adapters, numbers, out, r=r, dtype=dtype, overwrite=overwrite)
    names = dict.fromkeys(name for adapter in adapters for name in adapter.layers)
    warn_of_peft(adapters[0], names)
    how = "one basis, summed in it" if found.one_basis else "different bases, stacked"
    click.echo(f"adapter of rank {found.r} ({how}; energy kept {found.energy_kept:.4f}): {out}")


if __name__ == "__main__":
    main(prog_name="lorasb")
