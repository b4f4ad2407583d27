"""Finished groups of steps that are not trained yet to and from a checkpoint: one .npz a leader, no pickle.

Shapes: N rollouts, S response tokens of all of them together, K top-k entries per token.
"""

import json
from collections.abc import Container, Mapping
from pathlib import Path

import numpy as np

from megatron_jackpot.records import Prompt, Rollout

Groups = dict[tuple[int, int], list[Rollout]]
"""(epoch, prompt id) -> its rollouts: an epoch has a prompt once, so that this also names the step."""

PER_TOKEN = ("tokens", "server_logp", "topk_ids", "topk_logp", "valid", "weight_version")
PER_ROLLOUT = ("epoch", "sample", "finish", "reward", "correct", "advantage")


def save_groups(path: Path, groups: Groups) -> None:
    """Write `groups`; nothing where there are none."""
    rollouts = [rollout for group in groups.values() for rollout in group]
    if not rollouts:
        return
    arrays = {name: np.concatenate([getattr(r, name) for r in rollouts]) for name in PER_TOKEN}
    arrays |= {name: np.array([getattr(r, name) for r in rollouts]) for name in PER_ROLLOUT}
    arrays["parts"] = np.array([json.dumps(r.parts) for r in rollouts])
    arrays["prompt_id"] = np.array([r.prompt.id for r in rollouts])
    arrays["length"] = np.array([len(r.tokens) for r in rollouts])
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_groups(path: Path, prompts: Mapping[int, Prompt], skip: Container[int] = ()) -> Groups:
    """What `save_groups` wrote, less the prompts in `skip`, which are others now.

    Raises ValueError where a prompt is not among `prompts` or the file is not whole.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    missing = {*PER_TOKEN, *PER_ROLLOUT, "prompt_id", "length"} - arrays.keys()
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}. Delete this checkpoint.")
    stops = np.cumsum(arrays["length"])
    groups: Groups = {}
    for i, (stop, length) in enumerate(zip(stops, arrays["length"], strict=True)):
        prompt_id = int(arrays["prompt_id"][i])
        if prompt_id in skip:
            continue
        if prompt_id not in prompts:
            raise ValueError(
                f"{path} holds prompt {prompt_id}, which data.* does not give. Restore the data."
            )
        own = {name: arrays[name][stop - length : stop] for name in PER_TOKEN}
        own |= {name: arrays[name][i].item() for name in PER_ROLLOUT}
        # A checkpoint of a run before there were several has none.
        own["parts"] = json.loads(arrays["parts"][i].item()) if "parts" in arrays else {}
        groups.setdefault((own["epoch"], prompt_id), []).append(Rollout(prompt=prompts[prompt_id], **own))
    return groups
