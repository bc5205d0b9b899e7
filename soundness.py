"""What a run watches for: a loss that is a spike beside those before it, and weights, moments or a loss that are not
finite, which must not be saved."""

import torch
from torch import Tensor

import checkpoints
from model import Hydra
from parallel import Ranks

WATCHED = 20  # losses that there must be to tell a spike from them
MEMORY = 0.02  # weight of the newest loss in their running mean and variance, once they are 50


def is_spike(loss: Tensor, running: Tensor, spike: float) -> Tensor:
    """Whether a loss is more than `spike` standard deviations above the mean of `running` [3]: the number of losses,
    their mean and their variance."""
    count, mean, variance = running.unbind()
    return (count >= WATCHED) & (loss > mean + spike * variance.sqrt())


def update_running(running: Tensor, loss: Tensor, updated: Tensor) -> None:
    """Add a loss to `running` if its step was `updated`: plain mean and variance at first, exponential ones later."""
    count, mean, variance = running.unbind()
    part = (1 / (count + 1)).clamp(min=MEMORY)
    away = loss - mean
    added = torch.stack((count + 1, mean + part * away, (1 - part) * (variance + part * away.square())))
    running.copy_(torch.where(updated, added, running))


@torch.no_grad()
def is_sound(model: Hydra, batch: tuple[Tensor, Tensor], autocast: torch.autocast, ranks: Ranks) -> bool:
    """Whether the loss is finite: weights can be finite and still be lost."""
    model.eval()  # has its graphs already
    with autocast:
        sound = model(*batch).loss.isfinite()
    model.train()
    return not ranks.any(not sound)


def unsound(model: Hydra, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], autocast: torch.autocast,
            ranks: Ranks) -> str:  # fmt: skip
    """What of a run is not finite, so that it must not be saved: a weight, a moment or the loss; empty where all is."""
    name = checkpoints.not_finite(model, optimizer, ranks)
    if not name and not is_sound(model, batch, autocast, ranks):
        return "the loss"
    return name
