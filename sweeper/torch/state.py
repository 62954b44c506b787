"""Everything that makes a step, as values that `torch.load(weights_only=True)` reads back."""

from __future__ import annotations

import copy
import io
import random
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sweeper.checkpoints import Content
from sweeper.errors import CheckpointRefused, ConfigError, Misfit
from sweeper.trainer.main import is_out_of_memory

_CAUSE = "WeightsUnpickler error:"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def rng_state() -> dict[str, Any]:
    """State of the generators of Python, NumPy, torch and every CUDA device in use."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "bit_generator": numpy_state["bit_generator"],
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if _uses_cuda() else [],
    }


def _uses_cuda() -> bool:
    # Asking for more would initialise CUDA in a process that trains on the CPU.
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put every generator back to what `rng_state` saw."""
    python, numpy_state = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(
        {
            "bit_generator": numpy_state["bit_generator"],
            "state": {"key": numpy_state["key"].numpy().astype(np.uint32), "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def load(name: str, content: Content) -> Any:
    """Unpickle verified bytes; only tensors and plain values, with no way around.

    Raises:
        Misfit: They hold something else; their digest is good, so it was a training that put it there.
    """
    # Large files are mapped, not copied: from the very inode that was just verified.
    source: Any = io.BytesIO(content.data) if content.fd is None else f"/proc/self/fd/{content.fd}"
    try:
        return torch.load(source, weights_only=True, map_location="cpu", mmap=content.fd is not None)
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        raise Misfit(f"{name} does not hold plain tensors", why=_what_torch_says(error)) from error


def _what_torch_says(error: Exception) -> str:
    """The one line of torch's advice that names the cause."""
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
    _, _, cause = next((line for line in lines if _CAUSE in line), "").partition(_CAUSE)
    why = cause.strip() or (lines[0] if lines else type(error).__name__)
    return why[:300].rstrip(". ")


def kinds(state: Any) -> set[type]:
    """The types of all that a state holds: they decide whether it can be read back."""
    found: set[type] = set()
    left = [state]
    while left:
        value = left.pop()
        found.add(type(value))
        if isinstance(value, dict):
            left.extend(value.keys())
            left.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            left.extend(value)
    return found


def check_restorable(states: Mapping[str, Any]) -> None:
    """Read what is about to be saved back, less the tensors' numbers.

    Raises:
        ConfigError: A state holds what `torch.load(weights_only=True)` will never return.
    """
    for name, state in states.items():
        try:
            buffer = io.BytesIO()
            torch.save(_emptied(state), buffer)
            load(name, Content(buffer.getvalue()))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            found = _culprit(state)
            what = f"{name} holds {found}" if found else f"{name}: {type(error).__name__}: {error}"
            raise ConfigError(
                "what was passed to resumable() could never be restored",
                why=what,
                do="A state_dict may hold tensors, numbers, texts, lists and dicts; convert NumPy values with .item() or torch.from_numpy.",
            ) from error


def _culprit(value: Any, path: str = "") -> str:
    """The innermost thing that cannot be read back, with its path; empty if there is none."""
    try:
        buffer = io.BytesIO()
        torch.save(_emptied(value), buffer)
        load("", Content(buffer.getvalue()))
    except Exception:  # noqa: BLE001 - whatever it is
        items = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list | tuple)
            else ()
        )
        inner = (_culprit(item, f"{path}.{key}" if path else str(key)) for key, item in items)
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return next((found for found in inner if found), f"{path or 'a state'}, a {kind}")
    return ""


def _emptied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty(0, dtype=value.dtype)
    if isinstance(value, dict):
        made = copy.copy(value)  # of its own kind: that is what is tried
        made.update({key: _emptied(item) for key, item in value.items()})
        return made
    if type(value) in (list, tuple):
        return type(value)(_emptied(item) for item in value)
    return value


def gradients(modules: Mapping[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The gradients that were accumulated for an update still to come."""
    return {
        f"{name}.{parameter}": value.grad
        for name, module in modules.items()
        for parameter, value in module.named_parameters()
        if value.grad is not None
    }


def set_gradients(modules: Mapping[str, torch.nn.Module], saved: Mapping[str, torch.Tensor]) -> None:
    """Put gradients back. Raises CheckpointRefused when one has no parameter."""
    left = dict(saved)
    for name, module in modules.items():
        for parameter, value in module.named_parameters():
            gradient = left.pop(f"{name}.{parameter}", None)
            value.grad = None if gradient is None else gradient.to(value.device).clone()
    if left:
        raise CheckpointRefused(f"it holds a gradient of {next(iter(left))}, the model has no such parameter")


def check_architecture(saved: Mapping[str, Any], model: torch.nn.Module, *, name: str = "model") -> None:
    """Refuse weights of another model before anything is changed.

    Args:
        name: What this training calls it.

    Raises:
        CheckpointRefused: Naming the first parameter that differs, with both shapes or types.
    """
    present = model.state_dict()
    for key, tensor in present.items():
        if key not in saved:
            raise CheckpointRefused(f"the {name} has a parameter {key}, the checkpoint has not")
        if _shape(saved[key]) != _shape(tensor):
            raise CheckpointRefused(
                f"parameter {key} has shape {_shape(saved[key])} in the checkpoint, {_shape(tensor)} in the {name}"
            )
        if _dtype(saved[key]) != _dtype(tensor):  # load_state_dict would convert without a word
            raise CheckpointRefused(
                f"parameter {key} is {_dtype(saved[key])} in the checkpoint, {_dtype(tensor)} in the {name}"
            )
    if extra := [key for key in saved if key not in present]:
        raise CheckpointRefused(f"the checkpoint has a parameter {extra[0]}, the {name} has not")


def check_groups(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, *, name: str) -> None:
    """Refuse the state of an optimizer with other groups of parameters. Raises CheckpointRefused."""
    there = [len(group["params"]) for group in saved["param_groups"]]
    here = [len(group["params"]) for group in optimizer.param_groups]
    if there != here:
        raise CheckpointRefused(
            f"the {name} in the checkpoint has groups of {there} parameters, this one of {here}"
        )


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if hasattr(value, "shape") else ()


def _dtype(value: Any) -> str:
    return str(getattr(value, "dtype", type(value).__name__))
