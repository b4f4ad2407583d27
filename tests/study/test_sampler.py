"""The sampler of the study: it draws by the law of the model and reports the log-probs of the scorer."""

import math

import pytest
import torch

from benchmarks.study_parts.decoder import Decoder, greedy
from benchmarks.study_parts.sampler import Draws, draw, sample_groups
from megatron_jackpot.config import Parallel, Precision
from megatron_jackpot.config.model_folder import read_hf_config
from megatron_jackpot.data.packing import Packer
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.families import family_of
from megatron_jackpot.records import Prompt, Rollout
from megatron_jackpot.sync.stream import export
from megatron_jackpot.train.scoring import Scorer

PROMPTS = [Prompt(i, tuple(range(3 + i, 8 + 3 * i)), None) for i in range(4)]
"""Of different lengths: shorter ones are padded."""
DRAWS = Draws(seed=3, temperature=0.8, max_new_tokens=6, top_k=5, stop_ids=(2,))


@pytest.fixture(scope="module", params=["policy", "near"])
def model(request, mesh, models) -> MegatronModel:
    folder = models / request.param
    family = family_of(read_hf_config(folder))
    return MegatronModel.load(
        request.param,
        family,
        folder,
        mesh=mesh,
        parallel=Parallel(),
        precision=Precision(dtype="float32", fused_linear=False),
        padded_vocab=family.vocab_size,
    )


@pytest.fixture
def decoder(model) -> Decoder:
    made = Decoder(model.family.hf_config)
    made.load(export(model))
    return made


def test_reported_log_probs_are_the_scorers_at_sampled_tokens_and_in_the_top_k(model, decoder, mesh) -> None:
    groups = [
        [
            Rollout(
                prompt=prompt,
                epoch=0,
                sample=sample,
                tokens=made.tokens,
                server_logp=made.server_logp,
                topk_ids=made.topk_ids,
                topk_logp=made.topk_logp,
                valid=made.valid,
                weight_version=made.weight_version,
                finish=made.finish,
            )
            for sample, made in enumerate(group)
        ]
        for prompt, group in zip(
            PROMPTS, sample_groups(decoder, PROMPTS, [range(8)] * 4, 0, 1, DRAWS), strict=True
        )
    ]
    batch = Packer(mesh, tokens=256, enabled=True, num_minibatches=1, vpp=None).pack(groups, DRAWS.top_k)
    scorer = Scorer(model, None, temperature=DRAWS.temperature, top_k=DRAWS.top_k)
    scores = scorer(batch, step=1, served_version=1)
    assert scores is not None and int(batch.mask_MT.sum()) > 60
    gap = (scores.policy_logp_MT - batch.server_logp_MT)[batch.mask_MT].abs()
    assert float(gap.max()) < 2e-5
    # Both top-k lists are of one model: the union has nothing that the server's lacks.
    k, inside = DRAWS.top_k, batch.mask_MT
    assert bool((scores.candidate_ids_MTK[inside][:, k:] == -1).all())
    pairs = (scores.candidate_target_logp_MTK[inside][:, :k], batch.topk_logp_MTK[inside])
    torch.testing.assert_close(*pairs, atol=2e-5, rtol=0)


def test_pairs_of_tokens_are_drawn_as_often_as_the_model_says(decoder) -> None:
    """Chi-square over first tokens, and over second tokens behind each of the three likeliest first ones."""
    prompt, many = PROMPTS[1], 30_000
    short = Draws(seed=5, temperature=0.8, max_new_tokens=2, top_k=1, stop_ids=(60,))
    (group,) = sample_groups(decoder, [prompt], [range(many)], 0, 0, short)
    first = torch.tensor([int(made.tokens[0]) for made in group])
    check_law(first, law_after(decoder, prompt.tokens))
    for token in first.bincount().topk(3).indices.tolist():
        second = [int(made.tokens[1]) for made in group if made.tokens[0] == token and len(made.tokens) > 1]
        check_law(torch.tensor(second), law_after(decoder, (*prompt.tokens, token)))


def law_after(decoder: Decoder, tokens: tuple[int, ...]) -> torch.Tensor:
    logits, _ = decoder.prefill([tokens], 0)
    return (logits[0].double() / 0.8).softmax(-1)


def check_law(drawn: torch.Tensor, law: torch.Tensor) -> None:
    """Within five standard deviations of what chi-square has; rare ids count as one."""
    counts, expected = drawn.bincount(minlength=len(law)).double(), law * len(drawn)
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None].clamp(min=1e-9)])
    chi2, freedom = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
    assert freedom >= 5 and abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom), (chi2, freedom)


def test_a_completion_depends_on_its_prompt_and_sample_alone_and_ends_with_the_first_stop(decoder) -> None:
    together = sample_groups(decoder, PROMPTS, [range(6)] * 4, 2, 0, DRAWS)
    for prompt, group in zip(PROMPTS, together, strict=True):
        (alone,) = sample_groups(decoder, [prompt], [range(6)], 2, 0, DRAWS)
        assert [made.tokens.tolist() for made in group] == [made.tokens.tolist() for made in alone]
    # In rounds of different sizes they are the same.
    later = sample_groups(decoder, PROMPTS[:2], [range(4, 6), range(1, 6)], 2, 0, DRAWS)
    for group, made in zip(together, later, strict=False):
        assert [one.tokens.tolist() for one in group[-len(made) :]] == [one.tokens.tolist() for one in made]
    for made in (made for group in together for made in group):
        stops = [position for position, token in enumerate(made.tokens.tolist()) if token == 2]
        assert stops == ([len(made.tokens) - 1] if made.finish == "stop" else [])
        assert made.finish == "stop" or len(made.tokens) == DRAWS.max_new_tokens
    assert together[0][0].tokens.tolist() != together[0][1].tokens.tolist()


def test_greedy_answers_are_those_of_a_full_pass_for_every_token(decoder) -> None:
    answers = greedy(decoder, [prompt.tokens for prompt in PROMPTS], max_new_tokens=5, stop_ids=[2])
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = list(prompt.tokens)
        for token in answer:
            logits, _ = decoder.prefill([tokens], 0)
            assert int(logits[0].argmax()) == token
            tokens.append(token)


def test_nothing_of_probability_0_is_drawn_at_either_end_of_the_uniform_number() -> None:
    logp = torch.tensor([[-math.inf, math.log(0.25), -math.inf, math.log(0.75), -math.inf]] * 3)
    assert draw(logp, torch.tensor([0.0, 0.26, 1 - 2.0**-24])).tolist() == [1, 3, 3]
