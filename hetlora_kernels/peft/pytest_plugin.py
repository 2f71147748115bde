"""Run PEFT's own test suite with fused layers: `pytest -p hetlora_kernels.peft.pytest_plugin ...` in a PEFT checkout (docs/peft.md has the whole command).

Every LoRA layer that PEFT makes or extends is fused. At the end the number of calls of fused ops is printed. A run without any fails: it tested nothing.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import pytest
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from hetlora_kernels.peft import fused
from hetlora_kernels.peft.swap import fuse

_calls = 0


def _count(name: str) -> None:
    original = getattr(fused, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        global _calls
        _calls += 1
        return original(*args, **kwargs)

    setattr(fused, name, counting)


def pytest_configure(config: pytest.Config) -> None:
    inject = BaseTuner.inject_adapter

    def inject_and_fuse(self: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tests that count warnings count PEFT's
                fuse(model)
        return result

    cast(Any, BaseTuner).inject_adapter = inject_and_fuse
    warnings.filterwarnings("ignore", message="hetlora_kernels.peft: ")
    _count("lora_linear")
    _count("lora_add")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"hetlora_kernels: {_calls} calls of lora_linear and lora_add by LoRA layers")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == 0 and not _calls and not session.config.option.collectonly:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
