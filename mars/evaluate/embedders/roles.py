"""The networks that an evaluation uses, found among the user's files and those that come with mars."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import torch

from mars.errors import CheckpointError, ConfigError
from mars.evaluate.embedders import classifier, crepe, vggish
from mars.evaluate.embedders.classifier import WEIGHTS_DIR, Task
from mars.evaluate.embedders.features import Embedder

Role = Literal["pitch", "instrument", "vggish", "crepe"]
ROLES: tuple[Role, ...] = ("pitch", "instrument", "vggish", "crepe")
# A network for each role, or the reason why there is none.
Embedders = Mapping[Role, Embedder | str]


def load(
    preset: str,
    *,
    roles: Collection[Role] = ROLES,
    pitch: Path | None = None,
    instrument: Path | None = None,
    vggish_weights: Path | None = None,
    framing: vggish.Framing = "google",
    crepe_size: crepe.Size = "tiny",
    device: str | torch.device = "cpu",
    force: bool = False,
) -> Embedders:
    """Load a network for each role, or give the reason why there is none.

    Args:
        preset: of the classifiers, which are sought in $MARS_WEIGHTS_DIR, else in classifiers/.
        roles: those to look for, so that nothing is read, or found to be damaged, that nobody asked for.
        pitch, instrument: directories of classifiers, instead.
        vggish_weights: None: `vggish-10086976.pth` or `vggish.safetensors` in $MARS_WEIGHTS_DIR, if it is there.
        framing: of VGGish.
        force: take classifiers that their gates refuse.

    Raises:
        CheckpointError: what was named is not there, or what is there is damaged or refused by its gate.
        ConfigError: a classifier of the other task was named.
    """
    embedders: dict[Role, Embedder | str] = dict.fromkeys(ROLES, "nobody asked for it")
    named: dict[Task, Path | None] = {"pitch": pitch, "instrument": instrument}
    for task, path in named.items():
        if task not in roles:
            continue
        try:
            place = classifier.locate(task, preset, path)
        except CheckpointError as error:
            if path is not None:
                raise
            embedders[task] = str(error)
            continue
        network = classifier.load(place, device, force=force)
        if network.task != task:
            raise ConfigError(f"{place} is a classifier of {network.task}s; want one of {task}s (`{task}`)")
        embedders[task] = network
    if "vggish" in roles:
        embedders["vggish"] = _vggish(vggish_weights, framing, device)
    if "crepe" in roles:
        try:
            weights = crepe.installed(crepe_size)
        except CheckpointError as error:
            embedders["crepe"] = str(error)
        else:
            embedders["crepe"] = crepe.load(crepe_size, weights, device)
    return embedders


def _vggish(path: Path | None, framing: vggish.Framing, device: str | torch.device) -> Embedder | str:
    if path is None:
        folder = classifier.weights_dir()
        places = [Path(folder, name) for name in (vggish.PUBLISHED, "vggish.safetensors")] if folder else []
        path = next((place for place in places if place.is_file()), None)
    if path is None:
        return (
            f"no VGGish weights, which mars cannot ship: put {vggish.PUBLISHED} of torchvggish (276 MiB) into the "
            f"folder that {WEIGHTS_DIR} names, or give it with `vggish_weights`"
        )
    return vggish.load(path, framing).to(device)
