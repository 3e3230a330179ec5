"""The file of a basis, written while the init goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lorasb_ds.adapters.lora_sb import LoraSBLinear
from lorasb_ds.config.run_layout import BASIS_FILE, INIT_REPORT
from lorasb_ds.init.basis import damage
from lorasb_ds.init.basis_file import BasisWriter, basis_sizes
from lorasb_ds.init.init_report import InitReport, InitStep, LayerInit, no_gradient_report

ADAPTERS = {
    name: LoraSBLinear(torch.nn.Linear(inputs, 9, bias=False), 3, torch.bfloat16)
    for name, inputs in (("odd", 7), ("even", 8))
}
LAYER = LayerInit(1.0, (3.0, 2.0, 1.0), 0.0, 0.0, slopes=(1.0, 1.0, 1.0), batches_reached=1)


def report() -> InitReport:
    found = no_gradient_report(InitStep(0.5, 1, 2.0, 1.0, {}, 0.0))
    found.layers.update(dict.fromkeys(ADAPTERS, LAYER))
    return found


def factors(name: str) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": torch.randn(ADAPTERS[name].factor_shape(key)).to(dtype)
        for key, dtype in (
            *(("lora_A", torch.bfloat16), ("lora_B", torch.bfloat16)),
            ("lora_R", torch.float32),
        )
    }


def test_factors_of_odd_sizes_come_back(tmp_path: Path) -> None:
    """Those that would not align the numbers after them are written last."""
    given = {name: factors(name) for name in ADAPTERS}
    with BasisWriter(tmp_path, basis_sizes(ADAPTERS), {"--r": "3"}) as basis:
        for name in ADAPTERS:
            basis.add(given[name])
        assert not (tmp_path / BASIS_FILE).exists()
        basis.finish(report())
    with safe_open(tmp_path / BASIS_FILE, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert json.loads(file.metadata()["made_from"]) == {"--r": "3"}
    assert stored.keys() == {
        f"{name}.{key}"
        for name in ADAPTERS
        for key in ("lora_A", "lora_B", "lora_R", "S", "slopes")
    }
    for name in ADAPTERS:
        for key in ("lora_A", "lora_B"):
            assert torch.equal(stored[f"{name}.{key}"], given[name][f"{name}.{key}"])
        assert torch.equal(stored[f"{name}.lora_R"], torch.diag(torch.tensor([-1.5, -1.0, -0.5])))
        assert stored[f"{name}.S"].tolist() == [3.0, 2.0, 1.0]
    assert damage(tmp_path) is None


def break_off(folder: Path, error: type[BaseException]) -> None:
    with BasisWriter(folder, basis_sizes(ADAPTERS), {}) as basis:
        basis.add(factors("even"))
        raise error


def test_nothing_is_left_of_an_init_that_failed(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError):
        break_off(tmp_path, FloatingPointError)
    assert list(tmp_path.iterdir()) == []


def test_the_first_basis_stays_until_the_next_is_whole(tmp_path: Path) -> None:
    for name in (BASIS_FILE, INIT_REPORT):
        (tmp_path / name).write_text("before")
    with pytest.raises(KeyboardInterrupt):
        break_off(tmp_path, KeyboardInterrupt)
    assert (tmp_path / BASIS_FILE).read_text() == "before"
