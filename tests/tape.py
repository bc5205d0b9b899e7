"""What a CUDA graph is, on real CPU tensors: what a step does to tensors is recorded once and repeated without Python,
on the same addresses, with every number and shape as it was. So captured decoding is tested where there is no GPU.

It proves that a step works in place on tensors that stay, that nothing in it follows a number of the host, and that it
asks the device for nothing. It cannot prove that CUDA's kernels let themselves be captured.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from generate import Replayed

SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "multinomial")


def tensors_of(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Tape(TorchDispatchMode):
    """Records what runs inside of it. Behind it all tensors are as before, since a capture runs nothing. RuntimeError
    where the host would wait for the device."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = tensors_of((args, kwargs))
        by_mask = name in ("index", "index_put_") and torch.bool in {t.dtype for t in tensors_of(args[1])}
        if name in SYNCS or by_mask:
            raise RuntimeError(f"{name} waits for the device")
        if func._schema.is_mutable:
            self.before += [(t, t.clone()) for t in given]
            self.calls.append((func, args, kwargs, []))
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        made = tensors_of(result)
        memory = {t.untyped_storage().data_ptr() for t in given}
        if not memory & {t.untyped_storage().data_ptr() for t in made}:  # else it is a view, which stays
            self.calls.append((func, args, kwargs, made))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for t, old in reversed(self.before):
            t.copy_(old)

    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            result = func(*args, **kwargs)
            for old, new in zip(made, tensors_of(result)):  # noqa: B905, what works in place made nothing
                old.copy_(new)


class Taped(Replayed):
    """`Replayed` from tapes."""

    def __init__(self, step, device):
        self.step, self.replays = step, {}

    @staticmethod
    def possible(weight: torch.Tensor) -> bool:
        return True

    def capture(self, step):
        step()
        with Tape() as tape:
            step()
        return tape.replay


def listed(captures: list[int]) -> type[Taped]:
    """`Taped` that notes of every capture the slots that its step reads."""

    class Listed(Taped):
        def capture(self, step):
            captures.append(*step.args)
            return super().capture(step)

    return Listed
