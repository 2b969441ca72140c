"""The weights of a training as safetensors: kept for whoever runs it again, or put in the place of a training.

A weights file holds the learned parameters and buffers by name and nothing that could run; its name is the SHA-256 of
its bytes, so that a row which names it says exactly which weights it means.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from metabench import training
from metabench.disk import write_whole
from metabench.errors import ConfigError, StoreError
from metabench.measure import Job, Workshop, bind, build, reason_of, run_job

Emit = Callable[..., None]


def do(job: Job, shop: Workshop) -> None:
    """`run_job`, keeping the weights that it trains in the folder `job["keep"]`, or loading `job["weights"]` instead.

    Raises:
        Stopped: the parent asked for a stop.
    """
    if job["train"] and job.get("weights"):
        try:
            place(job, shop)
        except Exception as error:  # files of others: whatever is wrong with them is a failed row
            for cell in job["cells"]:
                for measure in cell["measures"]:
                    reason = f"its weights cannot be loaded: {reason_of(error)}"
                    shop.emit("result", cell=cell["id"], measure=measure, status="failed", reason=reason)
            return
        shop = replace(shop, emit=_untrained(job, shop.emit))
    elif job["train"] and job.get("keep"):
        shop = replace(shop, emit=_keeping(job, shop.emit))
    run_job(job, shop)


def _keeping(job: Job, emit: Emit) -> Emit:
    """`emit`, but the first good result of a training first keeps its weights, and every good one names them."""
    names: list[str] = []

    def emit_and_keep(kind: str, **content: Any) -> None:
        if kind == "result" and content["status"] == "ok":
            if not names:
                names.append(_keep(job, emit))
            if names[0]:
                content["facts"] = {**content["facts"], "weights": names[0]}
        emit(kind, **content)

    return emit_and_keep


def _keep(job: Job, emit: Emit) -> str:
    """Write the weights of the finished training, and return the file's name; '' where they are not all tensors."""
    state = torch.load(job["checkpoint"], map_location="cpu", weights_only=True)
    learned = state["progress"]["best_state"] or state["algorithm"]
    strange = [name for name, value in learned.items() if not isinstance(value, Tensor)]
    if strange:
        emit("log", text=f"{job['algorithm']}: weights not kept: {strange[0]!r} of its state is no tensor")
        return ""
    # tensors that share memory are one in the file format's eyes: each gets its own
    data = safetensors.torch.save({name: value.contiguous().clone() for name, value in learned.items()})
    name = f"{hashlib.sha256(data).hexdigest()}.safetensors"
    _write(Path(job["keep"]) / name, data)
    return name


def _write(file: Path, data: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, data)
    except OSError as error:
        raise StoreError(f"{file.parent}: cannot write the weights ({error.strerror or error})") from error


def place(job: Job, shop: Workshop) -> None:
    """Make the weights file the finished checkpoint of the job's training, for `run_job` to go on from.

    Raises ConfigError for a file that is damaged or not that algorithm's.
    """
    try:
        found = safetensors.torch.load_file(job["weights"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ConfigError(f"not a whole safetensors file ({error})") from error
    data = shop.dataset(job)
    algorithm = build(job, shop, bind(data, "train", job, job["train"], seed=job["seed"]).problem)
    _check(algorithm.state_dict(), found)
    algorithm.load_state_dict(found)
    steps = job["train"]["steps"] or 1
    checkpoint = Path(job["checkpoint"])
    # the training's own functions: what is measured then takes the very path of a run that was resumed at its end
    training._save(checkpoint, algorithm, algorithm.trainer(steps), training.Progress(steps=steps, step=steps))
    if training._load(checkpoint) is None:
        raise StoreError(f"{checkpoint}: the loaded weights cannot be read back")


def _check(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise ConfigError unless the file has the algorithm's tensors, each of its shape and type."""
    if missing := own.keys() - found.keys():
        raise ConfigError(f"the file lacks {sorted(missing)[0]} ({len(missing)} tensors of the algorithm in all)")
    if extra := found.keys() - own.keys():
        raise ConfigError(f"the algorithm has no {sorted(extra)[0]} ({len(extra)} tensors of the file in all)")
    for name, value in own.items():
        wanted, given = (f"{tuple(one.shape)} {one.dtype}" for one in (value, found[name]))
        if wanted != given:
            raise ConfigError(f"{name} is {given} in the file, {wanted} in the algorithm")


def _untrained(job: Job, emit: Emit) -> Emit:
    """`emit`, but it refuses what only a training could have said: weights that were handed in are never trained on."""

    def checked(kind: str, **content: Any) -> None:
        if kind == "progress" or content.get("facts", {}).get("train_seconds"):
            raise StoreError("a training began where weights should have been loaded")
        if "facts" in content:
            content["facts"] = {**content["facts"], "weights": Path(job["weights"]).name}
        emit(kind, **content)

    return checked
