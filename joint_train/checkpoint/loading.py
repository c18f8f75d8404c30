"""One checkpoint into live objects, on all ranks together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from joint_train.checkpoint import compat, layout, state
from joint_train.checkpoint.contents import model_config, shorten_list
from joint_train.checkpoint.reader import Reader, Unreadable, stored_tensors
from joint_train.checkpoint.search import verify_contents
from joint_train.distributed.ranks import Ranks
from joint_train.errors import CheckpointError
from joint_train.pair.model import JointModel


class Loading:
    """A load of one checkpoint. Every method is collective.

    Args:
        path: the checkpoint's folder.
        manifest: its manifest; sizes are verified.
        ranks: all that load.
        warn: takes what a user should know.
    """

    def __init__(self, path: Path, manifest: layout.Manifest, ranks: Ranks, warn: Callable[[str], None]):
        self.path, self.manifest, self._ranks, self._warn = path, manifest, ranks, warn

    def run(
        self, model: JointModel, optimizer: torch.optim.Optimizer | None, config: dict[str, Any], checksums: bool
    ) -> tuple[dict, dict]:
        """Load everything, in place; (the ``state`` of the save, this rank's random state).

        Raises:
            DamagedCheckpoint: with ``checksums``, on all ranks, naming the files whose contents aren't those that were
                written; before it returns, but after what was read is in the model.
            CheckpointError: if the models' sizes or vocabulary aren't the checkpoint's, naming the keys.
        """
        path, files = self.path, list(self.manifest.files)
        if absent := [name for name in layout.REQUIRED if name not in files]:
            raise layout.damage_error(path, [f"its manifest doesn't name {name}" for name in absent])
        tensor_files = [name for name in files if name.endswith(".distcp")]
        if checksums:  # of the small files before anything is made of them
            verify_contents(path, self.manifest, [n for n in files if n not in tensor_files], self._ranks)
        documents = self._ranks.first(
            f"reading {path}",
            lambda: {n: self._document(n) for n in (*layout.DOCUMENTS, compat.FROZEN_BASE) if n in files},
        )
        # One rank reads the description of all ranks' shards, 160 MB of it at 512 ranks, for everyone.
        tensors = state.pair_tensors(model)
        average = tensors.get(layout.AVERAGE, {})
        if average and f"{layout.AVERAGE}/.metadata" not in files:
            del tensors[layout.AVERAGE]
            self._warn(f"{path.name} has no average of the drafter (optim.drafter_ema): it starts with its weights")
        parts = [*tensors, "optimizer"]
        read = self._ranks.first(f"reading {path}", lambda: {p: Reader(path / p).read_metadata() for p in parts})
        readers = {part: Reader(path / part, metadata, checksums) for part, metadata in read.items()}
        self._settle_base(model, tensors, readers["base/model"], documents)
        changed = compat.changed_settings(documents["config.json"], config)
        for key, (before, now) in changed.items():
            self._warn(f"the configuration changed since {path.name}: {key} was {before} and is now {now}")
        self._check_fit(model, tensors, readers, documents, config, changed)
        self._say_rounded(tensors, readers)
        try:
            for part, of_part in tensors.items():
                state.load_tensors(readers[part], of_part, self._ranks)
            for name, tensor in average.items() if layout.AVERAGE not in tensors else ():
                tensor.detach().copy_(tensors["drafter/model"][name].detach())
            if optimizer is not None:
                step = self.manifest.step
                frozen = documents["state.json"].get("joint_steps", step) < step
                self._load_optimizer(model, optimizer, readers["optimizer"], frozen)
        except Unreadable:
            if checksums:  # changed bytes explain it better
                verify_contents(path, self.manifest, tensor_files, self._ranks)
            raise
        if checksums:
            self._compare(readers, tensor_files)
        return documents["state.json"], self._load_random(config)

    def _settle_base(self, model: JointModel, tensors: dict, reader: Reader, documents: dict) -> None:
        """Whether the base's weights come from the checkpoint, or stay those of the folder that it was read from."""
        stored, name = reader.tensors(), self.path.name
        if not tensors["base/model"] and stored:
            if (kept := (model.frozen_base or {}).get("quantization", "none")) != "none":
                raise CheckpointError(
                    f"{self.path} contains a trained base, but with model.quantization={kept} the base's weights are "
                    "always those of its folder: set model.quantization=none, or train in another output_dir"
                )
            model.base_stays = False
            tensors["base/model"] = state.base_tensors(model)
            self._warn(f"{name} contains the whole base: it is read from there, and new checkpoints contain it, too")
        elif not stored and tensors["base/model"] and compat.FROZEN_BASE in documents:
            tensors["base/model"] = {}  # it was frozen; whether it still is what it was, its hash says
            if model.read_base is not None:
                model.read_base()  # this process may have trained it, or read another checkpoint's
            self._warn(f"{name} doesn't contain the base, which was frozen: it is read from its own folder")

    def _document(self, name: str) -> dict:
        """A JSON file of the checkpoint.

        Raises:
            DamagedCheckpoint: if it can't be read.
        """
        try:
            return json.loads((self.path / name).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise layout.damage_error(self.path, [f"{name} can't be read: {error}"]) from None

    def _compare(self, readers: dict[str, Reader], names: list[str]) -> None:
        """Checksums taken while loading against the manifest's; files that no rank has read whole are read again."""
        mine: dict[str, str] = {}
        for part, reader in readers.items():
            sizes = {n.removeprefix(f"{part}/"): self.manifest.files[n][0] for n in names if n.startswith(f"{part}/")}
            mine |= {f"{part}/{name}": checksum for name, checksum in reader.whole_files(sizes).items()}
        problems, seen = [], set()
        for rank, found in enumerate(self._ranks.each(f"verifying {self.path}", lambda: mine)):
            for name, checksum in found.items():
                size, written = self.manifest.files[name]
                seen.add(name)
                if checksum != written:
                    problems.append(f"{name} has checksum {checksum} instead of {written} ({size} bytes, rank {rank})")
        if problems:
            raise layout.damage_error(self.path, sorted(problems))
        verify_contents(self.path, self.manifest, [name for name in names if name not in seen], self._ranks)

    def _check_fit(self, model, tensors, readers, documents, config, changed) -> None:
        """The model has to be the checkpoint's: same architecture, same tensors, adapters that count as much."""
        problems = compat.adapter_differences(documents["config.json"], config)
        for part in ("base", "drafter"):
            now = model_config(getattr(model, part))
            problems += compat.fixed_differences(part, documents[f"{part}/config.json"], now)
        for part in tensors:
            stored = readers[part].read_metadata().state_dict_metadata
            problems += compat.tensor_differences(part.partition("/")[0], stored, tensors[part])
        if problems:
            keys = [key for key in changed if key.startswith(("model.", "lora.")) and key != "lora.dropout"]
            keys = [key for key in keys if not key.startswith("model.export.")]
            keys = keys or ["model.base", "model.drafter"]
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise CheckpointError(
                f"{self.path} was saved from other models than {' and '.join(keys)} give now: "
                f"{'; '.join(problems[:3])}{more}. Set {', '.join(keys)} as they were, or another output_dir"
            )
        frozen = getattr(model, "frozen_base", None)
        if frozen is not None and compat.FROZEN_BASE in documents:
            compat.check_frozen_base(self.path, documents[compat.FROZEN_BASE], frozen)

    def _say_rounded(self, tensors: dict[str, dict[str, torch.Tensor]], readers: dict[str, Reader]) -> None:
        """Weights that are frozen now, and kept in the dtype of compute, may have been trained in a finer one."""
        for part, of_part in tensors.items():
            stored = readers[part].tensors()
            rounded: dict[str, list[str]] = {}
            for name, tensor in of_part.items():
                before = stored[name].properties.dtype
                if before.is_floating_point and before.itemsize > tensor.dtype.itemsize:
                    both = " and now ".join(str(dtype).removeprefix("torch.") for dtype in (before, tensor.dtype))
                    rounded.setdefault(both, []).append(name)
            for both, names in rounded.items():
                self._warn(
                    f"weights of the {part.partition('/')[0]} were {both}, so they are rounded: {shorten_list(names)}"
                )

    def _load_optimizer(
        self, model: JointModel, optimizer: torch.optim.Optimizer, reader: Reader, base_frozen: bool
    ) -> None:
        """The optimizer's state of what is trained.

        Args:
            base_frozen: the base was, by ``freeze.base_after``; whether it still is, the run says.
        """
        path, stored = self.path, reader.tensors()
        loaded = state.new_optimizer_state(model, optimizer, stored)
        names = state.parameter_names(model)
        optimizer.state.clear()
        optimizer.state.update(loaded)
        state.load_tensors(reader, state.optimizer_tensors(model, optimizer), self._ranks)
        trained = {names[p] for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        had = {key.rpartition("/")[0] for key in stored}
        fresh = sorted(name for name in trained - had if not (base_frozen and name.startswith("base.")))
        if fresh:
            self._warn(
                f"{path.name} has no optimizer state for {shorten_list(fresh)}: they start with new optimizer state"
            )
        if dropped := sorted(had - trained):
            self._warn(
                f"the optimizer state of {shorten_list(dropped)} in {path.name} is dropped: they are not trained now"
            )

    def _load_random(self, config: dict) -> dict:
        path, rank = self.path, self._ranks.rank
        if self.manifest.world_size == self._ranks.size:
            return self._ranks.all(f"reading {path / 'random.pt'}", self._random_states)[rank]
        self._warn(f"{path.name} is of {self.manifest.world_size} ranks, now {self._ranks.size}: new random states")
        state.derive_random_state(config.get("seed", 0), self.manifest.step, rank)
        return state.random_state()

    def _random_states(self) -> list[dict]:
        """Raises DamagedCheckpoint if the file doesn't hold a state for each rank of the save."""
        try:
            states = torch.load(self.path / "random.pt", weights_only=True)
            if len(states) == self.manifest.world_size:
                return states
            problem = f"it holds {len(states)} states"
        except Exception as error:  # of a file that isn't what was written
            problem = f"{type(error).__name__}: {error}"
        raise layout.damage_error(self.path, [f"random.pt can't be read: {problem}"])


def load_model(
    path: str | Path, module: nn.Module, part: str, ranks: Ranks | None = None, frozen: dict[str, str] | None = None
) -> None:
    """The weights of ``part`` (``base`` or ``drafter``) of a checkpoint into a module, in place; on one process,
    or with ``ranks`` on all of them. Tied parameters are stored once: tie the module's before.

    Args:
        frozen: the ``frozen_base`` of the base's pair: a checkpoint's adapters belong to its base, and of a base that
            was frozen there is nothing else in it.

    Raises CheckpointError if the module's tensors aren't the checkpoint's.
    """
    checkpoint = layout.locate(Path(path))
    folder, document = checkpoint / part / "model", checkpoint / compat.FROZEN_BASE
    if frozen is not None and document.exists():
        compat.check_frozen_base(checkpoint, json.loads(document.read_bytes()), frozen)
    tensors, stored = state.named_tensors(module), stored_tensors(folder)
    if part == "base" and not stored and frozen is not None:
        return
    if problems := compat.tensor_differences(part, stored, tensors):
        raise CheckpointError(f"{folder} doesn't fit: {'; '.join(problems[:8])}")
    state.load_tensors(Reader(folder), tensors, ranks)
