"""All that depends on where train.py computes: on a CPU, on a GPU, in one process or in several."""

import io
import os
import sys
from collections.abc import Callable, Iterator
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
        "mps": torch.backends.mps.is_available(),  # Apple
        "cpu": True,
    }
    usable = [device for device, is_available in available.items() if is_available]
    if name == "auto":
        name = usable[0]
    if name not in usable:
        sys.exit(f"--device {name}: not available here; use auto or {' or '.join(usable)}")
    return torch.device(name)


def low_precision(device: torch.device) -> torch.dtype | None:
    """The number format for mixed precision, where that pays off: on NVIDIA's GPUs."""
    if device.type != "cuda":
        return None
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16  # the latter before Ampere (2020)


def prepare(model: nn.Module, device: torch.device, compile: bool) -> nn.Module:
    """Move a model to a device, and wrap it in what makes it fast there.

    Returns:
        The network to train with. It shares its weights with `model`, which is the one to save.
    """
    # channels_last keeps a pixel's channels side by side in memory: convolutions like that.
    model.to(device, memory_format=torch.channels_last)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: 10 bits of mantissa, on tensor cores
        torch.backends.cudnn.benchmark = True  # try which convolution is fastest: shapes stay
    if dtype := low_precision(device):
        model.forward = in_mixed_precision(model.forward, device, dtype)
    network = model
    if dist.is_initialized():
        # Has the mean of all processes' gradients ready when backward() returns.
        network = DistributedDataParallel(network)
    return torch.compile(network) if compile else network


def in_mixed_precision(
    forward: Callable[[Tensor], Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Let convolutions and matrix products take 16 bits a number; the rest stays float32."""

    def mixed(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            logits = forward(images)
        return logits.float()

    return mixed


def scale_gradients(
    loss_function: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    """Keep small gradients from becoming 0 in float16, whose smallest number is 6e-8.

    backward() then starts from a large number and not from 1, and step() divides by it: what
    `torch.amp.GradScaler` does where it stands in the loop. A gradient that became too large for
    float16 counts as 0, and the number is halved.
    """
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)

    def scale(module: nn.Module, inputs: tuple, loss: Tensor) -> None:
        if loss.requires_grad:
            loss.register_hook(scaler.scale)

    def unscale(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad.nan_to_num_(nan=0, posinf=0, neginf=0)
        scaler.update()

    loss_function.register_forward_hook(scale)
    optimizer.register_step_pre_hook(unscale)


def join_processes(device: torch.device) -> tuple[torch.device, int, int]:
    """Meet the other processes that torchrun has started; without torchrun there are none.

    Returns:
        This process's device, its rank (0 in the first), and the number of processes.
    """
    if "RANK" not in os.environ:  # torchrun sets it
        return device, 0, 1
    if device.type == "mps":
        sys.exit("--device mps: several processes need cuda or cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # a GPU for each process
        if device.index >= torch.cuda.device_count():
            sys.exit(f"--nproc-per-node: this machine has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
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
    """Put together, in the order of ranks, what each process has a share of (along dimension 0)."""
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
