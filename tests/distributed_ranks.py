"""Run a function on several ranks on the CPU, and fail instead of hanging when they wait for each other."""

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing


def run_ranks(
    work: Callable[..., Any], *arguments: Any, folder: Path, n_ranks: int = 2, seconds: float = 120
) -> list[Any]:
    """Results of ``work(*arguments)`` of every rank, in a gloo group.

    Args:
        work: A function of a module, so that another process can import it; its result is stored with `torch.save`.
        arguments: Anything that can be pickled.
        folder: An empty folder for what the ranks exchange.
        n_ranks: How many processes.
        seconds: After this time the ranks are stuck and are killed.
    """
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_rank, args=(work, arguments, folder, rank, n_ranks), daemon=True)
        for rank in range(n_ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    errors = [
        f"rank {rank}: {path.read_text()}" for rank in range(n_ranks) if (path := folder / f"{rank}.err").exists()
    ]
    if stuck or errors:
        raise AssertionError("\n".join([f"ranks {stuck} are stuck after {seconds} s", *errors]))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n_ranks)]


def _rank(work: Callable[..., Any], arguments: tuple[Any, ...], folder: Path, rank: int, n_ranks: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=n_ranks, timeout=timedelta(seconds=30)
    )
    try:
        torch.save(work(*arguments), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.err").write_text(traceback.format_exc())
        raise
    dist.destroy_process_group()
