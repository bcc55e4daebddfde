"""Drop-in layers that hold one shared weight and any number of packed persona masks."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import native
from kernels.forms import FORMS, choose_form, worth_listing
from kernels.ops.correction_linear import correction_linear, removed_lists
from kernels.ops.masked_linear import masked_linear
from kernels.ops.masked_linear.reference import gated_weight
from kernels.ops.pack_bits import pack_bits, unpack_bits


class PersonaSelector:
    """Which persona is active: off, one for all rows, or one per sequence of the batch.

    All layers of a model share one selector, so that switching touches one small static buffer a
    device. ``mode`` is "off", "uniform" or "rows".
    """

    def __init__(self) -> None:
        self.mode = "off"
        self.gamma = 0.0
        # Layers whose materialized copy a new choice makes stale. A flag on the layer and not a counter
        # here: a compiled graph would specialise on every value of the counter.
        self._holders: weakref.WeakSet[Any] = weakref.WeakSet()
        self._choice: tuple[int, ...] = (-1,)
        self._index: dict[torch.device, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy has holders of its own: they enter themselves (MaskedLinear.__setstate__).
        return self.__dict__ | {"_holders": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_holders": weakref.WeakSet()})

    def select(self, choice: int | Sequence[int] | None, gamma: float = 0.0) -> None:
        """Choose a mask by index for all rows, one per sequence (-1: none), or None for the plain weight."""
        if not 0.0 <= gamma < 1.0:
            raise ValueError(f"gamma must satisfy 0 <= gamma < 1, got {gamma}")
        single = choice is None or isinstance(choice, int)
        values = _choices(choice)
        if not values:
            raise ValueError("personas per sequence: the list is empty")
        if min(values) < -1:
            raise IndexError(f"persona {min(values)}: an index into the masks, or -1 for the plain weight")
        self.mode = "rows" if not single else "off" if values == (-1,) else "uniform"
        self.gamma = gamma
        for layer in self._holders:
            layer.fresh = False
        resized = len(values) != len(self._choice)
        self._choice = values
        if resized:
            self._index = {device: self._tensor(device) for device in self._index}
        for index in self._index.values():
            index.copy_(torch.tensor(values, dtype=torch.int32))

    def index(self, device: torch.device) -> Tensor:
        """The static index buffer on ``device``, int32 ``[1]`` or ``[B]``."""
        if device not in self._index:
            self._index[device] = self._tensor(device)
        return self._index[device]

    def rows(self, device: torch.device, count: int) -> Tensor:
        """The index of every one of ``count`` rows; a sequence (and its beams) owns a run of rows."""
        index = self.index(device)
        if self.mode != "rows":
            return index
        if count % index.shape[0]:
            raise ValueError(f"{index.shape[0]} personas were chosen for a batch whose layer has {count} rows")
        return index.repeat_interleave(count // index.shape[0])

    def _tensor(self, device: torch.device) -> Tensor:
        # An inference tensor could not be written to by a later switch outside inference mode.
        with torch.inference_mode(False):
            return torch.tensor(self._choice, dtype=torch.int32, device=device)


class MaskedLinear(nn.Module):
    """``nn.Linear`` with packed persona masks on its one weight.

    Args:
        weight: the shared parameter ``[N, K]``, or ``[K, N]`` with ``transposed`` (GPT-2's Conv1D).
        bias: ``[N]`` or None.
        bits: packed masks uint8 ``[P, N, ceil(K / 8)]``, True = kept; P may be 0.
        transposed: the weight is stored input-first.
        selector: shared among the layers of a model; an own one by default.
        form: one of ``kernels.forms.FORMS`` for every product that needs no gradient (those are always masked);
            None leaves it to ``choose_form``.

    With no persona chosen the layer computes what the layer it replaces computes, bit for bit.
    """

    bits: Tensor
    bias: nn.Parameter | None
    _effective: Tensor | None
    _columns: Tensor | None
    _offsets: Tensor | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        bits: Tensor,
        *,
        transposed: bool = False,
        selector: PersonaSelector | None = None,
        form: str | None = None,
    ) -> None:
        super().__init__()
        if form not in (None, *FORMS):
            raise ValueError(f"MaskedLinear: form must be None or one of {', '.join(FORMS)}, got {form!r}")
        shape = tuple(reversed(weight.shape)) if transposed else tuple(weight.shape)
        self.out_features, self.in_features = shape
        self.weight, self.bias, self.transposed = weight, bias, transposed
        expected = (self.out_features, (self.in_features + 7) // 8)
        if bits.dtype != torch.uint8 or bits.dim() != 3 or tuple(bits.shape[1:]) != expected:
            raise ValueError(
                f"MaskedLinear: bits [P, N, ceil(K/8)] must be uint8 [P, {expected[0]}, {expected[1]}], "
                f"got {list(bits.shape)} {bits.dtype}"
            )
        self.register_buffer("bits", bits)
        for name in ("_effective", "_columns", "_offsets"):
            self.register_buffer(name, None, persistent=False)
        self.form = form
        self.list_removed()
        self.fresh = False
        self.selector = selector or PersonaSelector()
        # Made now: a graph that is compiled later finds the buffer and does not make it.
        self.selector.index(weight.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.selector._holders.add(self)

    @classmethod
    def from_linear(cls, linear: Any, masks: Tensor | None = None, **options: Any) -> "MaskedLinear":
        """Wrap an ``nn.Linear`` (or Conv1D): the parameters are shared, not copied.

        ``masks`` is bool ``[P, N, K]`` (True = kept); None for no masks.
        """
        weight = linear.weight
        transposed = not isinstance(linear, nn.Linear)
        rows, columns = reversed(weight.shape) if transposed else weight.shape
        if masks is None:
            masks = torch.empty(0, rows, columns, dtype=torch.bool)
        bits = pack_bits(masks.to(weight.device))
        return cls(weight, linear.bias, bits, transposed=transposed, **options)

    def list_removed(self) -> None:
        """Make what the forms need besides ``bits``; to be called again by whoever writes to ``bits``."""
        # Asked now: a graph that is compiled later knows it as a constant.
        self.programs = {device: native.program(device) for device in ("cpu", "cuda")}
        kept = [int(unpack_bits(packed, self.in_features).sum()) for packed in self.bits]
        self.density = min(kept, default=1) / (self.out_features * self.in_features) if self.bits.numel() else 1.0
        weight = self.weight
        kind = weight.dtype, weight.device.type, self.programs.get(weight.device.type, "")
        wanted = worth_listing(self.in_features, self.density, len(kept), *kind)
        listed = self.form == "correction" or (self.form is None and bool(kept) and not self.transposed and wanted)
        self._columns, self._offsets = removed_lists(self.bits, self.in_features) if listed else (None, None)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.list_removed()

    @property
    def matrix(self) -> Tensor:
        """The weight as ``[N, K]`` (a view)."""
        return self.weight.T if self.transposed else self.weight

    def mask(self, persona: int) -> Tensor:
        """The mask of one persona, bool ``[N, K]``, True = kept."""
        return unpack_bits(self.bits[persona], self.in_features)

    def select(self, choice: int | Sequence[int] | None, gamma: float = 0.0) -> None:
        """Choose the persona of this layer (of every layer that shares its selector)."""
        self._check(choice)
        self.selector.select(choice, gamma)

    def materialize(self, on: bool) -> None:
        """Keep ``W * G`` of the one chosen persona as a dense copy, or drop that copy.

        The copy costs the memory of the weight and makes every product a plain dense one. It is a
        snapshot: a new choice drops it, and a change of the weight asks for a new one.
        """
        if not on or self.selector.mode != "uniform":
            self._effective, self.fresh = None, False
            return
        index = int(self.selector.index(self.weight.device))
        with torch.inference_mode(False), torch.no_grad():
            gated = gated_weight(self.matrix, self.bits[index], self.selector.gamma)
        if self._effective is None or self._effective.shape != gated.shape or self._effective.dtype != gated.dtype:
            self._effective = gated
        else:
            self._effective.copy_(gated)
        self.fresh = True
        self.selector._holders.add(self)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., K]`` -> ``[..., N]``."""
        if self.selector.mode == "off":
            return self._dense(x)
        if self._effective is not None and self.fresh:
            return F.linear(x, self._effective, self.bias)
        weight, rows = self.matrix, x.reshape(-1, self.in_features)
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            kind = torch.get_autocast_dtype(x.device.type)
            rows, weight, bias = rows.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
        if self.selector.mode == "rows" and x.dim() > 2 and x.shape[0] % self.selector.index(x.device).shape[0]:
            chosen = self.selector.index(x.device).shape[0]
            raise ValueError(f"{chosen} personas were chosen for a batch of {x.shape[0]} sequences")
        persona = self.selector.rows(x.device, rows.shape[0])
        y = self._product(rows, weight, persona, bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, personas={self.bits.shape[0]}"
        )

    def _product(self, rows: Tensor, weight: Tensor, persona: Tensor, bias: Tensor | None) -> Tensor:
        gamma = self.selector.gamma
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (rows, weight, bias))
        if self._columns is not None and self._offsets is not None and not learns:
            personas = 1 if self.selector.mode == "uniform" else len(self.selector._choice)
            sizes = rows.shape[0], self.out_features, self.in_features
            kind = rows.dtype, rows.device.type, self.programs.get(rows.device.type, "")
            form = self.form or choose_form(*sizes, self.density, personas, *kind)
            if form == "correction":
                return correction_linear(rows, weight, self._columns, self._offsets, persona, gamma, bias)
        return masked_linear(rows, weight, self.bits, persona, gamma, bias)

    def _dense(self, x: Tensor) -> Tensor:
        if not self.transposed:
            return F.linear(x, self.weight, self.bias)
        # The product that Conv1D itself computes, so that "off" is the original layer bit for bit.
        flat = x.reshape(-1, self.in_features)
        y = flat @ self.weight if self.bias is None else torch.addmm(self.bias, flat, self.weight)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _check(self, choice: int | Sequence[int] | None) -> None:
        for value in _choices(choice):
            if not -1 <= value < self.bits.shape[0]:
                raise IndexError(f"persona {value} is not among the {self.bits.shape[0]} masks of this layer")


def _choices(choice: int | Sequence[int] | None) -> tuple[int, ...]:
    if choice is None:
        return (-1,)
    return (choice,) if isinstance(choice, int) else tuple(choice)
