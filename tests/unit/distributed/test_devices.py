"""What is said of devices that do not suit a run, before anything is loaded."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from launcher.jobs.command import GPUS_ASKED_FOR
from launcher.workers.common import check_device
from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.ds_config_check import check_ds_config
from lorasb_ds.distributed.zero import check_own_device
from lorasb_ds.errors import ConfigError


def test_ranks_with_one_device_are_refused() -> None:
    store = dist.HashStore()
    for rank, device in enumerate(["cuda a of n1", "cuda b of n1", "cuda a of n2", "cuda b of n1"]):
        store.set(f"lorasb device of {rank}", device)
    check_own_device(store, 0, 4, "cuda a of n1")
    with pytest.raises(ConfigError, match=r"Ranks 1, 3 were given the same cuda b of n1\."):
        check_own_device(store, 3, 4, "cuda b of n1")


def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GPUS_ASKED_FOR, "2")
    if torch.version.cuda is None:
        with pytest.raises(ConfigError, match="is built without CUDA"):
            check_device()
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\n…")

    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ConfigError, match=r"too old \(found version 11040\)\.\)"):
        check_device()


def test_a_torch_without_nccl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "name", lambda: "cuda")
    backend = "communication_backend_name"
    monkeypatch.setattr(type(get_accelerator()), backend, lambda self: "nccl")
    monkeypatch.setattr(dist, "is_backend_available", lambda backend: backend != "nccl")
    assert accelerator.backend_problem() == f"torch {torch.__version__} is built without NCCL"


def test_a_device_without_bf16_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_accelerator()), "is_bf16_supported", lambda self: False)
    ds_config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    with pytest.raises(ConfigError, match="--dtype fp16, whose losses are scaled"):
        check_ds_config(ds_config, "x.json")


def test_what_the_doctor_is_told() -> None:
    told = accelerator.describe()
    assert told["name"] == accelerator.name()
    assert (told["count"] == 0) == (told["name"] == "cpu")
    assert bool(told["problem"]) == (told["name"] == "cpu")
