"""A run says in people's words what it computes on."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlx_impl.machine.device import device_name


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("facts", "expected"), [({"device_name": "AMD EPYC"}, "CPU, AMD EPYC"), ({}, "CPU")], ids=["named", "not"]
)
def test_a_device_is_named_by_its_kind_and_its_model(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr(mx, "device_info", lambda device: facts)
    assert device_name() == expected
