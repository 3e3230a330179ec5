"""What ``--track-alignment`` does between two steps of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from lorasb_ds.alignment import Values, measure_alignment
from lorasb_ds.data.batch import Sample
from lorasb_ds.data.sampler import init_sample
from lorasb_ds.job import Job
from lorasb_ds.prepare import Prepared
from lorasb_ds.runs.plots import describe_alignment


def track_alignment(job: Job, before: Mapping[str, Values] | None) -> None:
    """Measure how well the last step has followed the full gradient; write and say it. Collective.

    Args:
        before: ``trained_factors`` before that step; None after the init.
    """
    run, step = job.run, job.progress.step
    found = measure_alignment(
        job.engine,
        job.adapters,
        probe_of(run),
        run.footprint.init.groups,
        before,
        offload=run.config.init_offload,
    )
    if job.log:
        layers = {name: asdict(layer) for name, layer in found.items()}
        job.log.write_alignment([{"step": step, "layer": n} | row for n, row in layers.items()])
        job.log.say(describe_alignment(job.log.alignment))


def probe_of(run: Prepared) -> Sample:
    """Training rows, the same every time, that the init's gradient is not of: those on which the
    init measures its losses, or as many where it has rows of its own (--init-data)."""
    if run.config.init_data is None:
        return run.sample(run.probe_rows)
    _, rows = init_sample(len(run.train.examples), run.config.init_samples, run.config.seed)
    return replace(run, init_rows=run.train).sample(rows)
