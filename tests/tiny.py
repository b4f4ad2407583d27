"""Tiny random Qwen3 folders and rollouts for tests, made without transformers."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_jackpot.records import Prompt, Rollout

POLICY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
ACTOR = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, tie_word_embeddings=True
)


def hf_config(**changes: object) -> dict:
    """A Qwen3 config.json; vocab 61 is odd on purpose, so that padding and sharding are exercised."""
    config = dict(
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        hidden_act="silu",
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        torch_dtype="float32",
    )
    return {**config, **changes}


def write_model(folder: Path, seed: int, **changes: object) -> Path:
    """An HF folder with random weights large enough that log-probs differ clearly from uniform."""
    config = hf_config(**changes)
    generator = torch.Generator().manual_seed(seed)
    h, f, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    def norm(size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator) + 0.5

    tensors = {"model.embed_tokens.weight": normal(config["vocab_size"], h), "model.norm.weight": norm(h)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(config["vocab_size"], h)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes = {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}
        tensors |= {f"{p}self_attn.{n}_proj.weight": normal(*shape) for n, shape in shapes.items()}
        tensors |= {f"{p}self_attn.{n}_norm.weight": norm(d) for n in "qk"}
        tensors |= {f"{p}mlp.{n}_proj.weight": normal(f, h) for n in ("gate", "up")}
        tensors[f"{p}mlp.down_proj.weight"] = normal(h, f)
        tensors |= {f"{p}{n}_layernorm.weight": norm(h) for n in ("input", "post_attention")}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_models(folder: Path) -> Path:
    """FOLDER/policy and FOLDER/actor of POLICY and ACTOR."""
    write_model(folder / "policy", 0, **POLICY)
    write_model(folder / "actor", 1, **ACTOR)
    return folder


def rollout_arrays(prompt_id: int, sample: int, *, vocab: int = 61, top_k: int = 8) -> dict:
    """A rollout as plain arrays and numbers, a function of (prompt_id, sample); its proposal is random per
    position."""
    g = np.random.default_rng([prompt_id, sample])
    prompt = np.random.default_rng(prompt_id).integers(3, vocab, 4 + prompt_id % 5)
    length = int(g.integers(3, 12))
    logits = g.normal(size=(length, vocab)).astype(np.float32) * 1.5
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tokens = np.array([g.choice(vocab, p=np.exp(row) / np.exp(row).sum()) for row in logp], np.int32)
    order = np.argsort(-logp, axis=-1)[:, :top_k]
    return dict(
        prompt=prompt,
        tokens=tokens,
        server_logp=logp[np.arange(length), tokens],
        topk_ids=order.astype(np.int32),
        topk_logp=np.take_along_axis(logp, order, axis=-1),
        valid=np.arange(length) != (1 if prompt_id == 2 else -1),
        weight_version=np.zeros(length, np.int32),
        reward=float(sample % 2),
        correct=bool(sample % 2),
        advantage=float(g.normal()),
    )


def rollout(prompt_id: int, sample: int, *, vocab: int = 61, top_k: int = 8) -> Rollout:
    arrays = rollout_arrays(prompt_id, sample, vocab=vocab, top_k=top_k)
    prompt = Prompt(prompt_id, tuple(arrays.pop("prompt").tolist()), "x")
    return Rollout(prompt=prompt, epoch=0, sample=sample, finish="stop", **arrays)


def groups(prompt_ids: range, samples: int = 4, top_k: int = 8) -> list[list[Rollout]]:
    return [[rollout(p, s, top_k=top_k) for s in range(samples)] for p in prompt_ids]


def write_tokenizer(folder: Path) -> None:
    """A character tokenizer of 50 tokens with <eos> = 2 and a chat template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>"]
    vocab = {
        token: i for i, token in enumerate(special + list("0123456789+-*/=?.,: \nabcdefghijklmnopqrstuvwxyz"))
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="?"
    )
    fast.chat_template = (
        "{% for m in messages %}{{m.content}}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    fast.save_pretrained(folder)
