"""The known key that an unknown one most likely meant."""

import difflib
from collections.abc import Sequence

STEP, SAMPLES, RESPONSE = "run.steps", "rollout.samples_per_prompt", "rollout.max_new_tokens"
LRS, MODELS = ("policy.optimizer.lr", "actor.optimizer.lr"), ("policy.hf", "actor.hf")
CLIPS = ("policy.optimizer.clip_grad", "actor.optimizer.clip_grad")

SYNONYMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("learning_rate", "learn_rate"), LRS),
    **dict.fromkeys(("model", "model_path", "model_name", "checkpoint", "hf_checkpoint"), MODELS),
    **dict.fromkeys(("max_grad_norm", "grad_clip", "gradient_clipping"), CLIPS),
    **dict.fromkeys(("num_steps", "max_steps", "total_steps", "train_iters", "num_rollout"), (STEP,)),
    **dict.fromkeys(("output_dir", "out", "log_dir"), ("run.folder",)),
    **dict.fromkeys(("save_steps", "save_freq", "save_interval"), ("run.save_every",)),
    **dict.fromkeys(("batch_size", "train_batch_size", "rollout_batch_size"), ("rollout.prompts_per_step",)),
    **dict.fromkeys(("n", "num_generations", "group_size", "n_samples_per_prompt"), (SAMPLES,)),
    **dict.fromkeys(("max_tokens", "max_response_length", "max_completion_length"), (RESPONSE,)),
    **dict.fromkeys(("logprobs", "top_logprobs", "top_k"), ("rollout.top_k_logp",)),
    **dict.fromkeys(("max_prompt_length", "max_prompt_len"), ("data.max_prompt_tokens",)),
    **dict.fromkeys(("dataset", "train_files", "train_data", "prompt_data"), ("data.path",)),
    **dict.fromkeys(("val_files", "eval_data", "eval_prompt_data"), ("data.heldout_path",)),
    **dict.fromkeys(("reward_fn", "rm_type"), ("data.reward",)),
    **dict.fromkeys(("reward_funcs", "reward_weights"), ("data.rewards",)),
    **dict.fromkeys(("entropy_coeff", "entropy_coef"), ("algorithm.entropy.bonus",)),
    **dict.fromkeys(("kl_coef", "kl_loss_coef", "beta"), ("algorithm.reference_kl.weight",)),
    **dict.fromkeys(("ref_model", "ref_load", "reference_model"), ("policy.reference.hf",)),
    **dict.fromkeys(("eval_steps", "test_freq", "eval_interval"), ("evaluation.every",)),
    **dict.fromkeys(("tensor_parallel_size", "tensor_model_parallel_size", "tp_size"), ("parallel.tp",)),
    **dict.fromkeys(("pipeline_parallel_size", "pipeline_model_parallel_size"), ("parallel.pp",)),
    **dict.fromkeys(("micro_batch_size", "max_tokens_per_gpu"), ("packing.tokens",)),
    **dict.fromkeys(("advantage_estimator", "adv_estimator"), ("algorithm.advantage",)),
    **dict.fromkeys(("loss_type", "policy_loss"), ("algorithm.objective",)),
}  # fmt: skip
"""Last part of a key as other trainers (TRL, verl, slime, OpenRLHF) call it -> our keys."""
SHOWN = 3


def meant(unknown: str, section: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The keys in full that `unknown` may stand for, none where nothing is near: by its last part the same
    one elsewhere, what other trainers call so, one that is spelled alike in its own section, or anywhere.

    `keys` are all known keys in full, `section` the names of the section that the unknown one stands in.
    """
    above, _, last = unknown.rpartition(".")
    found = [key for key in keys if _last(key) == last] or list(SYNONYMS.get(last.lower(), ()))
    if not found:
        close = difflib.get_close_matches(last, section, n=1, cutoff=0.55)
        found = [f"{above}.{close[0]}" if above else close[0]] if close else []
    if not found:
        close = difflib.get_close_matches(last, [_last(key) for key in keys], n=1, cutoff=0.7)
        found = [key for key in keys if close and _last(key) == close[0]]
    near = max((_shared(unknown, key) for key in found), default=0)
    return [key for key in found if _shared(unknown, key) == near][:SHOWN]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _shared(one: str, other: str) -> int:
    """How many leading parts two keys have in common."""
    number = 0
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        number += 1
    return number
