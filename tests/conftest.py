"""What all tests share: their tiers, the models they run on, and one process group."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches out
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# Two threads: also one for each of two workers of pytest-xdist.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

from lorasb_ds.config.paths import demo_model_dir

ROOT = Path(__file__).resolve().parent.parent

# `--hypothesis-profile all` (scripts/test.sh --all) draws what the tests' own settings say.
settings.register_profile("quick", max_examples=10, deadline=None)
settings.register_profile("all", max_examples=250, deadline=None)
settings.load_profile("quick")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark unit tests as fast, and give slow ones twice the time: they share the CPU."""
    if item.get_closest_marker("slow"):
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(800))
    elif item.path.is_relative_to(ROOT / "tests" / "unit"):
        item.add_marker(pytest.mark.fast)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests tokenize is kept in a cache of their own, beside the demo model."""
    model, cache = demo_model_dir(), tmp_path_factory.mktemp("cache")
    (cache / model.name).symlink_to(model)
    os.environ["LORASB_CACHE"] = str(cache)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct, which scripts/setup.sh fetches."""
    folder = demo_model_dir()
    assert (folder / "config.json").is_file(), f"{folder} is missing: run scripts/setup.sh"
    return folder


@pytest.fixture(scope="session")
def demo_dtype() -> str:
    """--dtype of the demo model: CPUs without bf16 take some fifteen times as long in it."""
    from lorasb_ds.distributed.accelerator import emulates_bf16

    return "fp32" if emulates_bf16() else "bf16"


@pytest.fixture(scope="session")
def tiny_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with grouped heads and the demo's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    return saved_model(LlamaForCausalLM, config, folder, demo_model)


@pytest.fixture(scope="session")
def tiny_moe(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen2-MoE: routed experts, a shared one, biases in its attention."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=49152,
        hidden_size=32,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        eos_token_id=2,
        pad_token_id=2,
    )
    folder = tmp_path_factory.mktemp("tiny") / "tiny-moe"
    return saved_model(Qwen2MoeForCausalLM, config, folder, demo_model)


@pytest.fixture(scope="session")
def tiny_family(
    demo_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A function that makes a tiny random model of an MoE family with the demo's tokenizer."""
    from transformers import AutoModelForCausalLM

    from tests.text_families import tiny_config

    folders = tmp_path_factory.mktemp("families")

    def make(family: str) -> Path:
        folder = folders / family
        if not folder.exists():
            saved_model(
                AutoModelForCausalLM.from_config,
                tiny_config(family, vocab_size=49152),
                folder,
                demo_model,
            )
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_deepseek(tiny_family: Callable[[str], Path]) -> Path:
    """A random two-layer DeepSeek-V3: a dense block, and one with experts."""
    return tiny_family("deepseek_v3")


@pytest.fixture(scope="session")
def tiny_laguna(tiny_family: Callable[[str], Path]) -> Path:
    """A random two-layer Laguna: a dense block, and one with experts, one of them shared."""
    return tiny_family("laguna")


def saved_model(kind: Any, config: Any, folder: Path, demo_model: Path) -> Path:
    """A random model with the demo's tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    for file in demo_model.glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(demo_model / "chat_template.jinja", folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(demo_model: Path):
    from lorasb_ds.models.base import Base

    return Base(str(demo_model)).tokenizer


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory):
    """A process group of this process alone."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
