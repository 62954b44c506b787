"""Models that FSDP2 has sharded: whole tensors for a checkpoint, and shared out again from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP2 (or another user of DTensor) holds only a part of the weights here."""
    return any(_is_dtensor(parameter) for parameter in model.parameters())


def _is_dtensor(tensor: torch.Tensor) -> bool:
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole_states(model: torch.nn.Module, parts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """State dicts of a sharded model and its parts with whole tensors, on rank 0. Collective.

    They are what the same training would have on one rank, optimizers included.

    Source: torch.distributed.checkpoint.state_dict, `full_state_dict` and `cpu_offload`.
    """
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp.get_model_state_dict(model, options=options)
    states: dict[str, Any] = {}
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            whole: Any = dcp.get_optimizer_state_dict(model, part, options=options)
            states[name] = _renamed(whole, range(len(_parameters(whole)))) if whole else {}
        elif isinstance(part, torch.nn.Module) and is_sharded(part):
            states[name] = dcp.get_model_state_dict(part, options=options)
        else:
            states[name] = part.state_dict()
    return weights, states


def put_whole_states(
    model: torch.nn.Module, parts: Mapping[str, Any], weights: dict[str, Any], states: Mapping[str, Any]
) -> None:
    """Share whole tensors out among the ranks again, however many they are now. Collective."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(full_state_dict=True)
    # Not strict: a parameter that never had a gradient has no state; what is made up for it here goes again.
    for_optimizers = dcp.StateDictOptions(full_state_dict=True, strict=False)
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            tuples = [
                [key for key, value in group.items() if type(value) is tuple] for group in part.param_groups
            ]
            present: Any = dcp.get_optimizer_state_dict(model, part)
            saved = _renamed(states[name], _parameters(present))
            dcp.set_optimizer_state_dict(model, part, saved, options=for_optimizers)
            objects = (each for group in part.param_groups for each in group["params"])
            for parameter, its_name in zip(objects, _parameters(present), strict=True):
                if its_name not in saved["state"]:
                    part.state.pop(parameter, None)
            for group, keys in zip(part.param_groups, tuples, strict=True):  # it makes lists of them
                group.update({key: tuple(group[key]) for key in keys})
        elif isinstance(part, torch.nn.Module) and is_sharded(part):
            dcp.set_model_state_dict(part, states[name], options=options)
        else:
            part.load_state_dict(states[name])
    dcp.set_model_state_dict(model, weights, options=options)


def _parameters(state: Mapping[str, Any]) -> list[Any]:
    """What a state calls its parameters, in the order of its groups."""
    return [name for group in state["param_groups"] for name in group["params"]]


def _renamed(state: Mapping[str, Any], names: Sequence[Any]) -> dict[str, Any]:
    """An optimizer's state with other names for its parameters, in the order of its groups.

    torch.distributed.checkpoint calls them by the model's names, an optimizer itself by number. Files
    have numbers; those of an earlier version may have names.
    """
    to = dict(zip(_parameters(state), names, strict=True))
    return {
        "state": {to[name]: value for name, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [to[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }
