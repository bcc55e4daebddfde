"""A model's parts from its safetensors shards: one decoder block in memory, the rest on the meta device.

transformers itself maps what is on disk to parameters (renamed keys, prefixes, experts that are stacked on loading);
here it is only told which part of it to load.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline.errors import UserError
from pipeline.loading import check_supported, load_config, resolve
from pipeline.sites import decoder_blocks

REST = ""
"""The part that is no block: embedding, norms, whatever stands before and behind the blocks. Not the output head."""


class Shards:
    """The causal language model behind ``--model``, without weights, and its parts to be loaded and released.

    ``model`` is in eval mode, its parameters frozen and on the meta device; buffers that no file holds have their
    values. ``blocks`` are its decoder blocks by name, in order. With ``head``, the output head belongs to ``REST``.
    Raises UserError, that begins with ``option``, if the model has no safetensors weights, has no list of blocks, or
    shares a weight between blocks.
    """

    def __init__(
        self, model: str, dtype: torch.dtype, device: torch.device, *, head: bool = False, option: str = "--stream"
    ) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self.name, self.option = model, option
        config = load_config(model)
        check_supported(model, config)
        with _parameters_on_meta():
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        # As Lightning's half precision does it: buffers too.
        self.model.to(dtype).eval().requires_grad_(False)
        for path, module in self.model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set:
                    raise UserError(f"{option}: {path}.{name} has no value before the weights are loaded")
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        self.blocks = decoder_blocks(self.model)
        self._check_unshared()
        files = _files(model, option)
        self._mapping: list[Any] = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        names = self.model.state_dict()
        self._keys: dict[str, list[tuple[Path, str]]] = {part: [] for part in (REST, *self.blocks)}
        left = self._left_out(head)
        for file, key in _entries(files):
            target, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, names)
            if target not in names:
                target = key if key in names else target
            if target not in left:
                self._keys[self.part_of(target)].append((file, key))
        self._needed: dict[str, list[str]] = {part: [] for part in self._keys}
        for name, tensor in names.items():
            if tensor.is_meta and name not in left:
                self._needed[self.part_of(name)].append(name)

    def load(self, part: str, dtype: torch.dtype, device: torch.device) -> None:
        """Read the weights of a block, or of ``REST``, from disk. Those of a loaded part are read again.

        Raises UserError if the files lack one, or hold one of another shape.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        # The empty parameter's type is what transformers loads as.
        self.release(part, dtype)
        with ExitStack() as stack, _no_progress():
            slices = {}
            opened: dict[Path, Any] = {}
            for file, key in self._keys[part]:
                if file not in opened:
                    # pread, not mmap: what is mapped counts as resident memory of this process.
                    opened[file] = stack.enter_context(safe_open(str(file), "pt", device="cpu", backend="pread"))
                slices[key] = _OnDisk(opened[file], key)
            options = LoadStateDictConfig(dtype=dtype, device_map={"": device}, weight_mapping=self._mapping)
            info, _ = convert_and_load_state_dict_in_model(self.model, slices, options)
        problems = [
            f"{name}: {list(found)} on disk, {list(wanted)} here" for name, found, wanted in info.mismatched_keys
        ]
        problems += [f"{key}: {text}" for key, text in info.conversion_errors.items()]
        problems += [f"{name}: not in the files" for name in self._needed[part] if self._tensor(name).is_meta]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(f"--model {self.name}: {'; '.join(problems[:3])}{more}")
        if part == REST and self._tied:
            self.model.get_output_embeddings().weight = self.model.get_input_embeddings().weight
        for parameter in self._module(part).parameters():
            parameter.requires_grad_(False)

    def release(self, part: str, dtype: torch.dtype | None = None) -> None:
        """Give the memory of a part's weights back."""
        for name in self._needed[part]:
            path, _, own = name.rpartition(".")
            release(self.model.get_submodule(path), own, dtype)

    def _left_out(self, head: bool) -> set[str]:
        """The names of tensors that are not read: the head's, or of a head that shares the embedding's weight, that."""
        module = self.model.get_output_embeddings()
        self._tied = head and module is not None and module.weight is self.model.get_input_embeddings().weight
        path = next((name for name, one in self.model.named_modules() if one is module), "")
        return {f"{path}.weight"} if self._tied else set() if head else {f"{path}.{n}" for n in ("weight", "bias")}

    def part_of(self, name: str) -> str:
        """The part that a tensor or layer belongs to."""
        return next((block for block in self.blocks if name.startswith(f"{block}.")), REST)

    def _module(self, part: str) -> nn.Module:
        return self.model.get_submodule(part)

    def _tensor(self, name: str) -> torch.Tensor:
        path, _, own = name.rpartition(".")
        return getattr(self.model.get_submodule(path), own)

    def _check_unshared(self) -> None:
        owner: dict[int, str] = {}
        for name, block in self.blocks.items():
            for parameter in block.parameters():
                if owner.setdefault(id(parameter), name) != name:
                    raise UserError(f"{self.option}: blocks {owner[id(parameter)]} and {name} share weights")


def release(module: nn.Module, own: str = "weight", dtype: torch.dtype | None = None) -> None:
    """Give the memory of one tensor of a module back."""
    holder: Any = module._parameters if own in module._parameters else module._buffers
    empty = torch.empty_like(holder[own], device="meta", dtype=dtype)
    holder[own] = nn.Parameter(empty, requires_grad=False) if holder is module._parameters else empty


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that modules register inside hold no memory; buffers keep their values."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


class _EmptyOnMeta(TorchFunctionMode):
    """``torch.empty``, which is what large parameters are made from, reserves nothing even for a moment."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if function is torch.empty and options.get("device") is None:
            options = {**options, "device": "meta"}
        return function(*arguments, **options)


class _OnDisk:
    """One tensor of an open file, read when it is indexed with ``...``, which is how transformers asks for it.

    The library's own slices would hold it twice for a moment.
    """

    def __init__(self, file: Any, key: str) -> None:
        self.file, self.key = file, key

    def __getitem__(self, place: Any) -> torch.Tensor:
        return self.file.get_tensor(self.key)[place]


@contextmanager
def _no_progress() -> Iterator[None]:
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _files(model: str, option: str) -> list[Path]:
    """The safetensors files of a local folder or hub id. Raises UserError if there are none."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    source = str(Path(resolve(model)).expanduser()) if Path(resolve(model)).expanduser().exists() else resolve(model)
    try:
        if single := cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False):
            return [Path(single)]
        if index := cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False):
            return [Path(file) for file in get_checkpoint_shard_files(source, index)[0]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {model}: {str(error).strip().splitlines()[0]}") from error
    raise UserError(f"--model {model}: no safetensors weights; {option} reads nothing else")


def _entries(files: list[Path]) -> Iterator[tuple[Path, str]]:
    for file in files:
        try:
            with safe_open(str(file), "pt", backend="pread") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a dictionary
                    yield file, key
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: not a safetensors file ({error})") from error
