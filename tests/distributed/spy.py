"""Looks on inside a worker: what it exchanged, and what it drew and holds after every epoch. Never changes anything."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

# what goes over the wire; all_gather_object and its like are made of these
COLLECTIVES = [
    name for name in (
        "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "broadcast", "reduce", "gather", "scatter",
        "reduce_scatter_tensor", "all_to_all_single", "barrier", "isend", "irecv",
    ) if hasattr(torch.distributed.distributed_c10d, name)
]  # fmt: skip


def install(set_: Callable[[Any, str, Any], None] = setattr) -> dict[str, Any]:
    """-> {"epochs": [...], "collectives": {name: count}}, filled while the run goes on"""
    from tdpo_cli.models.family import Family
    from tdpo_cli.train import epoch, metrics

    seen: dict[str, Any] = {"epochs": [], "collectives": dict.fromkeys(COLLECTIVES, 0), "plans": [], "text_encoders_read": 0}
    c10d = torch.distributed.distributed_c10d
    for name in COLLECTIVES:
        counted = _counted(getattr(c10d, name), name, seen["collectives"])
        for module in (c10d, torch.distributed):
            if hasattr(module, name):
                set_(module, name, counted)

    row, shuffle_plan = metrics.row, epoch.shuffle_plan

    def spied_row(job: Any, result: Any) -> dict[str, Any]:
        written, everyone = row(job, result), result.samples
        state = job.state_dict()
        held = (everyone.home == job.world.rank).nonzero().flatten().tolist()
        networks = {**state["policy"], **{f"critic.{name}": value for name, value in (state["critic"] or {}).items()}}
        seen["epochs"].append({
            "prompts": list(everyone.prompts), "sample_ids": everyone.sample_ids.tolist(),
            "x_T": {str(i): _digest(latents[0]) for i, latents in zip(held, everyone.latents, strict=True)},
            "plans": seen["plans"], "weights": _digest(*(networks[name] for name in sorted(networks))), "micro_batch": job.plan.micro_batch,
            "collectives": sum(seen["collectives"].values()), "row": {key: value for key, value in written.items() if "second" not in key},
        })  # fmt: skip
        seen["plans"] = []
        return written

    def spied_plan(*arguments: Any) -> Any:
        plan = shuffle_plan(*arguments)
        seen["plans"].append(_digest(plan.sample_index, plan.step_index))
        return plan

    read = Family.read_text_encoders

    def spied_read(family: Family) -> None:
        seen["text_encoders_read"] += sum(getattr(family.pipeline, name) is None for name in family.unread)
        read(family)

    set_(Family, "read_text_encoders", spied_read)
    set_(metrics, "row", spied_row)
    set_(epoch, "shuffle_plan", spied_plan)
    return seen


def main() -> None:
    """`python spy.py ...` is `python -m tdpo_cli ...`; what was seen goes to $SPY_FOLDER/RANK.json."""
    from tdpo_cli import cli

    seen = install()
    file = Path(os.environ["SPY_FOLDER"], f"{os.environ.get('RANK', 0)}.json")
    try:
        cli.main()
    finally:
        file.write_text(json.dumps(seen))


def _counted(function: Callable, name: str, counts: dict[str, int]) -> Callable:
    @functools.wraps(function)
    def counted(*arguments: Any, **options: Any) -> Any:
        counts[name] += 1
        return function(*arguments, **options)

    return counted


def _digest(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
