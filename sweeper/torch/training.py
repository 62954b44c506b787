"""What is saved of a training, less its counters: from objects to a checkpoint's files and back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from sweeper.errors import CheckpointRefused, Misfit
from sweeper.torch.drawing import derived_seed, seed_generators
from sweeper.torch.order import OrderedLoader
from sweeper.torch.ranks import Ranks, rank_file, rank_files, unwrapped
from sweeper.torch.sharded import is_sharded, put_whole_states, whole_states
from sweeper.torch.state import check_architecture, check_groups, gradients, rng_state, set_gradients
from sweeper.trainer.main import is_another_ranks, is_out_of_memory
from sweeper.trainer.run import Run

MODEL_FILE = "model.pth"
OPTIMIZER_FILE = "optimizer.pt"
RNG_FILE = "rng_state.pt"
GRADIENTS_FILE = "gradients.pt"
DATA_FILE = "data.pt"
STATE_FILE = "state.json"


class Training:
    """Model, parts, loader and generators, on one rank.

    Attributes:
        ranks: This process among the ranks.
        loader: The user's loader with its order made repeatable.
        rng: Generators that were restored, to be put back when the first batch is asked for.
        has_changed_ranks: It was restored from another number of ranks.
    """

    def __init__(
        self, run: Run, *, model: torch.nn.Module, loader: DataLoader[Any], parts: Mapping[str, Any]
    ) -> None:
        self._run = run
        self.ranks = Ranks.here(wait_s=run.spec.ranks_s)
        self._model = unwrapped(model)
        self._parts = dict(parts)
        self._is_sharded = is_sharded(self._model)
        self.loader = OrderedLoader(loader, seed=run.seed, ranks=self.ranks)
        self.rng: dict[str, Any] | None = None
        self.has_changed_ranks = False

    # --- to files --------------------------------------------------------------------------

    def states(self, *, has_gradients: bool) -> dict[str, Any]:
        """The states of all ranks by file name, on rank 0. Collective.

        Args:
            has_gradients: Gradients have been accumulated for an update still to come.
        """
        if self._is_sharded:
            model, parts = whole_states(self._model, self._parts)
        elif self.ranks.is_first:
            model = self._model.state_dict()
            parts = {name: part.state_dict() for name, part in self._parts.items()}
        else:
            model, parts = {}, {}
        files: dict[str, Any] = {MODEL_FILE: model, OPTIMIZER_FILE: parts}
        own: dict[str, Any] = {RNG_FILE: rng_state()}
        if has_gradients:
            own[GRADIENTS_FILE] = gradients(self._modules())
        data = self.loader.state_dict()
        if data and (self.ranks.is_first or not self.loader.is_same_everywhere):
            own[DATA_FILE] = data
        everybody = self.ranks.gathered(own)
        for name in own:
            for file, rank in zip(rank_files(name, len(everybody)), everybody, strict=True):
                if name in rank:
                    files[file] = rank[name]
        return files

    def _modules(self) -> dict[str, torch.nn.Module]:
        parts = {name: part for name, part in self._parts.items() if isinstance(part, torch.nn.Module)}
        return {"model": self._model, **parts}

    # --- and back --------------------------------------------------------------------------

    def put_parts(self, parts: Mapping[str, Any]) -> None:
        """Put the parts back; sharded ones need all ranks at once. Raises CheckpointRefused."""
        if self._is_sharded:
            return
        with _refusing():
            for name, part in self._parts.items():
                part.load_state_dict(parts[name])

    def put(self, state: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
        """Put back what all ranks have agreed on: everything but the parts, or those too if sharded.

        Raises:
            CheckpointRefused: It does not fit after all.
        """
        with _refusing():
            if self._is_sharded:
                put_whole_states(self._model, self._parts, loaded[MODEL_FILE], loaded[OPTIMIZER_FILE])
            else:
                self._model.load_state_dict(loaded[MODEL_FILE])
            self._put_own(state, loaded)

    def _put_own(self, state: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
        saved_size = saved_ranks(state)
        self.has_changed_ranks = saved_size != self.ranks.world_size
        rng = self._own(RNG_FILE, loaded)
        self.rng = self._fresh_rng(state["global_step"]) if rng is None else rng
        if (saved_gradients := self._own(GRADIENTS_FILE, loaded)) is not None:
            set_gradients(self._modules(), saved_gradients)
        self.loader.load_state_dict(self._data(loaded))
        self.loader.position = state.get("position", self.loader.position_of(state["step_in_epoch"]))

    def _own(self, name: str, loaded: Mapping[str, Any]) -> Any:
        """What a file of each rank holds for this one; None if it was not there."""
        return loaded.get(rank_file(name, self.ranks.rank))

    def _data(self, loaded: Mapping[str, Any]) -> Any:
        return loaded.get(DATA_FILE) if self.loader.is_same_everywhere else self._own(DATA_FILE, loaded)

    def _fresh_rng(self, step: int) -> dict[str, Any]:
        """Generators of a rank that was not there before."""
        seed_generators(derived_seed(self._run.seed, "rank", self.ranks.rank, step))
        return rng_state()

    # --- whether they fit ------------------------------------------------------------------

    def check_fit(self, state: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
        """Raise Misfit when a sound checkpoint is of another training. Nothing is changed."""
        try:
            self._check(state, loaded[MODEL_FILE], loaded[OPTIMIZER_FILE])
            self.loader.check(self._data(loaded))
        except CheckpointRefused as error:
            raise Misfit(error.what, why=error.why) from error

    def _check(self, state: Mapping[str, Any], model: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
        if difference := _difference(state["args"], self.args):
            raise CheckpointRefused(difference)
        made_with = state["metadata"]["torch"]
        if made_with.partition(".")[0] != torch.__version__.partition(".")[0]:
            raise CheckpointRefused(f"it was made with torch {made_with}, this is torch {torch.__version__}")
        check_architecture(model, self._model)
        if set(parts) != set(self._parts):
            raise CheckpointRefused(f"it holds {sorted(parts)}, this training has {sorted(self._parts)}")
        for name, part in self._parts.items():
            if isinstance(part, torch.nn.Module):
                check_architecture(parts[name], part, name=name)
            elif isinstance(part, torch.optim.Optimizer):
                check_groups(parts[name], part, name=name)
        if saved_ranks(state) != self.ranks.world_size:
            self._check_reshardable(state)
            return
        there, here = state["metadata"]["batches_per_epoch"], self.loader.num_batches
        if None not in (there, here) and there != here:
            raise CheckpointRefused(f"it counts {there} batches an epoch, the loader has {here}")

    def _check_reshardable(self, state: Mapping[str, Any]) -> None:
        change = f"it was made by {saved_ranks(state)} ranks, these are {self.ranks.world_size}"
        if not self.loader.is_reshardable:
            raise CheckpointRefused(change, why="the position of the loader's data cannot be shared out anew")
        if "accumulated" in state:
            raise CheckpointRefused(change, why="it lies in the middle of an accumulation of gradients")

    @property
    def args(self) -> dict[str, Any]:
        """What the training was configured with, as JSON values."""
        from omegaconf import OmegaConf

        if self._run.config is None:
            return {}
        # Not resolved: what config.yaml keeps as an interpolation may be a secret's.
        plain = OmegaConf.to_container(self._run.config.trainer, resolve=False)
        return json.loads(json.dumps(plain, default=str))  # type: ignore[no-any-return]


def saved_ranks(state: Mapping[str, Any]) -> int:
    """How many ranks made a checkpoint."""
    return int(state.get("ranks", {}).get("world_size", 1))


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Whatever is raised says that the checkpoint does not fit; but not that another rank is gone."""
    try:
        yield
    except CheckpointRefused:
        raise
    except Exception as error:
        if is_another_ranks(error):
            raise
        raise unfit(error) from error


def unfit(error: BaseException) -> Misfit:
    """What an error in reading or loading a sound checkpoint says of it."""
    if is_out_of_memory(error):
        return Misfit("there was not enough memory to load it")
    return Misfit("it does not fit this training", why=f"{type(error).__name__}: {error}")


def _difference(saved: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    for name in sorted(set(saved) | set(present)):
        if saved.get(name) != present.get(name):
            return f"the checkpoint has {name} {saved.get(name)}, the configuration has {present.get(name)}"
    return ""
