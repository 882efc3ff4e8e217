"""All that depends on where train.py computes: on a CPU, on a GPU, in one process or in several."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

NAMES = ("auto", "cuda", "mps", "cpu")


def choose_device(name: str) -> torch.device:
    """The device to compute on: the one asked for, or for "auto" the first there is.

    Raises:
        SystemExit: with one line of advice, where the machine has no such device.
    """
    available = {
        "cuda": torch.cuda.is_available(),  # NVIDIA, and AMD through ROCm
        "mps": torch.backends.mps.is_available() and "RANK" not in os.environ,  # Apple
        "cpu": True,
    }
    usable = [device for device, is_available in available.items() if is_available]
    if name == "auto":
        name = usable[0]
    if name not in usable:
        sys.exit(f"--device {name}: not available here; use auto or {' or '.join(usable)}")
    return torch.device(name)


def prepare(model: nn.Module, device: torch.device, compile: bool) -> nn.Module:
    """Move a model to a device, and wrap it in what makes it fast there.

    Returns:
        The network to train with. It shares its weights with `model`, which is the one to save.
    """
    # channels_last keeps a pixel's channels side by side in memory: convolutions like that.
    model.to(device, memory_format=torch.channels_last)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for what is left in float32
        torch.backends.cudnn.benchmark = True  # try which convolution is fastest: shapes stay
    if device.type == "cpu":
        keep_freed_memory()
    network = model
    if dist.is_initialized():
        # Has the mean of all processes' gradients ready when backward() returns.
        network = DistributedDataParallel(network)
    if compile:
        network = torch.compile(network)
    dtype = low_precision(device)
    return MixedPrecision(network, device, dtype) if dtype else network


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors, for those of the next step.

    Linux's gives large blocks back to the operating system, which hands them out again page by
    page, each cleared: in most runs that took a quarter of the first epoch's time. It keeps those
    that are not larger than one that was freed before, up to 32 MB; so free such a one. Source:
    "dynamic mmap threshold" in the manual page mallopt(3).
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)  # nobody holds it: freed at once


def low_precision(device: torch.device) -> torch.dtype | None:
    """The number format for mixed precision, where that pays off."""
    if device.type != "cuda":
        return None
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16  # NVIDIA's Turing (T4) lacks it


class MixedPrecision(nn.Module):
    """A network whose convolutions and matrix products take 16 bits a number; the rest takes 32.

    float16 reaches down to 6e-8 only, and smaller gradients would become 0. So they are multiplied
    where they enter the network, and divided where they arrive at a weight, in float32. That is
    what `torch.amp.GradScaler` does around the loop's statements; here they stay as they are. Its
    number changes from step to step, this one is fixed; a gradient that overflows counts as 0.

    Args:
        network: takes images and gives logits.
        device: where it is.
        dtype: torch.bfloat16 or torch.float16.
    """

    def __init__(self, network: nn.Module, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.network = network
        self.autocast = torch.autocast(device.type, dtype)
        self.scale = 1024 if dtype is torch.float16 else 1
        if self.scale > 1:
            for weight in network.parameters():
                if weight.requires_grad:
                    weight.register_hook(lambda grad: (grad / self.scale).nan_to_num(0, 0, 0))

    def forward(self, images: Tensor) -> Tensor:
        with self.autocast:
            logits = self.network(images)
        logits = logits.float()
        if self.scale > 1 and logits.requires_grad:
            logits.register_hook(lambda grad: grad * self.scale)
        return logits


def join_processes(device: torch.device) -> tuple[torch.device, int, int]:
    """Meet the other processes that torchrun has started; without torchrun there are none.

    Returns:
        This process's device, its rank (0 in the first), and the number of processes.

    Raises:
        SystemExit: with one line of advice, where a machine has fewer GPUs than processes.
    """
    if "RANK" not in os.environ:  # torchrun sets it
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # a GPU for each process
        if device.index >= torch.cuda.device_count():
            sys.exit(f"--nproc-per-node: this machine has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    if dist.get_rank() > 0:
        sys.stdout = io.StringIO()  # rank 0 speaks for all
    return device, dist.get_rank(), dist.get_world_size()


def leave_processes() -> None:
    """Take leave of the other processes, when all of them are done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def one_after_the_other() -> Iterator[None]:
    """Let the first process on each machine do something, and only then all others."""
    waits = dist.is_initialized() and int(os.environ["LOCAL_RANK"]) > 0
    if waits:
        dist.barrier()
    yield
    if dist.is_initialized() and not waits:
        dist.barrier()


def gather(*shares: Tensor) -> tuple[Tensor, ...]:
    """Put together, in the order of ranks, what each process has a share of.

    Args:
        shares: tensors on the CPU, to be put together along dimension 0.
    """
    if not dist.is_initialized():
        return shares
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, shares)
    return tuple(torch.cat(parts) for parts in zip(*of_all, strict=True))


def sum_over_processes(numbers: list[float], device: torch.device) -> list[float]:
    """Sum each of some numbers over all processes."""
    if not dist.is_initialized():
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()
