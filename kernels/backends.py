"""Which implementation an op uses: discover, choose, force, explain.

Every op has a ``reference`` backend in plain PyTorch. Faster backends register themselves beside
it; one that could not be loaded registers the reason instead, and whoever falls back to a slower
one hears of it once. ``PERSONA_BACKEND`` forces:
``PERSONA_BACKEND=reference`` for every op, or ``PERSONA_BACKEND=mask_select=reference,masked_linear=triton`` for some.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PREFERENCE = ("cpp", "cuda", "triton", "reference")
"""The fastest first. Compiled CUDA takes half of Triton's time on the host, and less on the GPU
(docs/kernels-gpu.md)."""
ENVIRONMENT = "PERSONA_BACKEND"


class BackendError(RuntimeError):
    """A backend was forced that does not exist, is missing, or cannot run on the tensor's device."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. ``devices`` names the device types it runs on; empty means all."""

    function: Callable[..., Any]
    devices: frozenset[str] = frozenset()

    def runs_on(self, device: str) -> bool:
        return not self.devices or device in self.devices


@dataclass
class _Op:
    present: dict[str, Implementation] = field(default_factory=dict)
    missing: dict[str, tuple[str, frozenset[str]]] = field(default_factory=dict)


_OPS: dict[str, _Op] = {}
_WARNED: set[tuple[str, str]] = set()


def register(op: str, backend: str, function: Callable[..., Any], devices: tuple[str, ...] = ()) -> None:
    """Add an implementation of ``op``. ``devices`` empty: every device."""
    _check_backend_name(backend)
    entry = _OPS.setdefault(op, _Op())
    entry.present[backend] = Implementation(function, frozenset(devices))
    entry.missing.pop(backend, None)


def register_missing(op: str, backend: str, reason: str, devices: tuple[str, ...]) -> None:
    """Record why ``backend`` is absent for ``op``, and what to do, on the devices it would serve."""
    _check_backend_name(backend)
    _OPS.setdefault(op, _Op()).missing[backend] = (reason, frozenset(devices))


def forced(op: str) -> str | None:
    """The backend that the environment forces for ``op``, or None."""
    value = os.environ.get(ENVIRONMENT)
    if not value:
        return None
    chosen = None
    for part in filter(None, (p.strip() for p in value.split(","))):
        name, _, backend = (word.strip() for word in part.rpartition("="))
        if name in ("", op):
            _check_backend_name(backend)
            chosen = backend
    return chosen


def choose(op: str, device: str) -> str:
    """The name of the backend that ``op`` uses on ``device`` (a device type such as "cpu").

    Raises BackendError if a forced backend is missing or cannot serve the device.
    """
    entry = _OPS[op]
    backend = forced(op)
    if backend is not None:
        if backend not in entry.present:
            reason = entry.missing.get(backend, ("this version has no such implementation", None))[0]
            raise BackendError(f"{ENVIRONMENT} forces {backend!r} for {op!r}, which is missing: {reason}")
        if not entry.present[backend].runs_on(device):
            raise BackendError(f"{ENVIRONMENT} forces {backend!r} for {op!r}, which does not run on {device!r}")
        return backend
    best = _best(op, device, PREFERENCE)
    if best is None:
        raise BackendError(f"op {op!r} has no backend for device {device!r}")
    return best


def implementation(op: str, device: str) -> Callable[..., Any]:
    """The function that computes ``op`` on ``device``."""
    return _OPS[op].present[choose(op, device)].function


def after(op: str, backend: str, device: str) -> Callable[..., Any]:
    """The function of the best backend of ``op`` behind ``backend``, which leaves some inputs to it."""
    best = _best(op, device, PREFERENCE[PREFERENCE.index(backend) + 1 :])
    if best is None:
        raise BackendError(f"op {op!r} has no backend behind {backend!r} for device {device!r}")
    return _OPS[op].present[best].function


def _best(op: str, device: str, names: tuple[str, ...]) -> str | None:
    """The first of ``names`` that is there for ``device``; of those before it that are missing it is said once."""
    entry = _OPS[op]
    for name in names:
        if name in entry.present and entry.present[name].runs_on(device):
            return name
        if name in entry.missing and device in entry.missing[name][1]:
            _warn_once(op, name, entry.missing[name][0])
    return None


def explain() -> dict[str, dict[str, str]]:
    """For every op: each backend's state ("present..." or "missing: " and why) and the choice per device."""
    import torch

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    report = {}
    for op, entry in sorted(_OPS.items()):
        row = {b: "present" for b in PREFERENCE if b in entry.present}
        row |= {b: f"missing: {reason}" for b, (reason, _) in entry.missing.items()}
        row |= {f"chosen on {device}": _chosen(op, device) for device in devices}
        report[op] = row
    return report


def _chosen(op: str, device: str) -> str:
    try:
        return choose(op, device)
    except BackendError as error:
        return f"none: {error}"


def _check_backend_name(backend: str) -> None:
    if backend not in PREFERENCE:
        raise BackendError(f"unknown backend {backend!r}; known are {', '.join(PREFERENCE)}")


def _warn_once(op: str, backend: str, reason: str) -> None:
    if (op, backend) not in _WARNED:
        _WARNED.add((op, backend))
        warnings.warn(f"{op}: backend {backend!r} is missing, a slower one is used: {reason}", stacklevel=4)
