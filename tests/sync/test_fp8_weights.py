"""fp8 weights: values and scales against NumPy, sizes that are no multiple of a block, names, and what is
refused."""

import base64
import json
import math
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("aiohttp")

from megatron_jackpot.config import parse_config
from megatron_jackpot.models.hf_folder import HFFolder, write_hf_folder
from megatron_jackpot.servers.admin import ServerAdmin
from megatron_jackpot.servers.served_folder import BLOCK, QUANTIZATION, served_folder
from megatron_jackpot.sync.fp8 import quantise, quantised
from megatron_jackpot.sync.ipc import IPCSync
from megatron_jackpot.sync.proof import Proof, SyncError, hf_shapes
from tests.servers.fake_server import FakeServer, ok
from tests.sync.test_weight_sync import checksums, info
from tests.tiny import write_model

SHAPE = dict(
    hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4, head_dim=32
)


def oracle(weight):
    """(values, scales) of e4m3 by its definition: 4 exponent bits of bias 7, 3 bits of mantissa, largest
    448."""
    rows, columns = weight.shape
    values, scales = np.zeros_like(weight), np.ones((math.ceil(rows / BLOCK), math.ceil(columns / BLOCK)))
    for i, j in np.ndindex(*scales.shape):
        place = np.s_[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
        block = weight[place]
        if np.abs(block).max() > 0:
            scales[i, j] = np.float32(np.abs(block).max()) / np.float32(448)
        scaled = (block / scales[i, j]).astype(np.float32)
        exponent = np.floor(np.log2(np.maximum(np.abs(scaled), 2.0**-20))).clip(min=-6)
        step = 2.0 ** (exponent - 3)
        values[place] = np.round(scaled / step) * step * scales[i, j]
    return values, scales


def dequantise(fp8_NK, scale):
    """The values in fp32, as a server sees them."""
    rows, columns = fp8_NK.shape
    return fp8_NK.float() * scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1, 1), (130, 200), (127, 129), (300, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_scales_are_those_of_the_definition(shape, dtype):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.3).to(dtype)
    fp8, scale = quantise(weight)
    assert fp8.shape == weight.shape and fp8.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    values, scales = oracle(weight.float().numpy().astype(np.float64))
    np.testing.assert_array_equal(scale.numpy(), scales.astype(np.float32))
    back = dequantise(fp8, scale)
    # A value in the middle of two may be rounded either way in fp32.
    assert np.mean(np.abs(back.numpy() - values) > 1e-6 * np.abs(values) + 1e-9) < 1e-3
    # Half a step of 3 bits of mantissa, or of the smallest exponent.
    largest = scale.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]
    assert ((back - weight.float()).abs() <= weight.float().abs() / 16 + largest * 2**-10 + 1e-9).all()


def test_a_block_of_zeros_stays_zero_and_an_outlier_moves_its_own_block_alone():
    weight = torch.full((256, 128), 0.01)
    weight[:128] = 0
    weight[0, 0] = 1e4
    fp8, scale = quantise(weight)
    back = dequantise(fp8, scale)
    assert back[0, 0] == 1e4 and (back[1:128] == 0).all()
    torch.testing.assert_close(back[128:], weight[128:], rtol=1e-6, atol=0)
    assert (dequantise(*quantise(torch.zeros(3, 3))) == 0).all()


def test_what_is_sent_is_what_the_folder_of_the_servers_describes(tmp_path):
    config = _config(tmp_path)
    actor = HFFolder(config.actor.hf)
    # In the order of an export.
    tensors = [(name, actor.read(name).bfloat16()) for name in hf_shapes(config.actor.hf)]
    folder = served_folder(config)
    sent = dict(quantised(tensors))
    assert {name: list(tensor.shape) for name, tensor in sent.items()} == hf_shapes(folder)
    assert hf_shapes(folder).keys() - hf_shapes(config.actor.hf).keys() == {
        f"{name}_scale_inv" for name, _ in tensors if name.endswith("_proj.weight")
    }
    assert sent["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert sent["model.layers.0.mlp.up_proj.weight_scale_inv"].shape == (2, 1)
    assert sent["model.norm.weight"].dtype == sent["model.embed_tokens.weight"].dtype == torch.bfloat16
    dtypes = [tensor.dtype for tensor in sent.values()]
    assert sum(a != b for a, b in zip(dtypes, dtypes[1:], strict=False)) <= 5  # few buckets are cut short
    written = json.loads((folder / "config.json").read_text())
    assert written["quantization_config"] == QUANTIZATION and not list(folder.glob("*.safetensors"))
    write_hf_folder(tmp_path / "again", sent.items(), folder, bucket_bytes=10**6)
    back = HFFolder(tmp_path / "again")
    assert all(torch.equal(back.read(name).float(), tensor.float()) for name, tensor in sent.items())


def test_servers_of_the_other_format_are_refused(tmp_path):
    config = _config(tmp_path)
    fp8, plain = served_folder(config), config.actor.hf
    names = checksums("x")
    with_scales = json.loads(json.dumps(names).replace('"w"', '"w.weight_scale_inv"'))
    for reply, folder, message in (
        (names, fp8, "serves no fp8 weights, but fp8 ones are sent. Set servers.quantization to null"),
        (with_scales, plain, "serves fp8 weights, but bf16 ones are sent. Set servers.quantization to fp8"),
    ):
        with FakeServer(weights_checker=[ok(reply)]) as server:
            with pytest.raises(SyncError, match=message):
                Proof(ServerAdmin([server.url]), folder).equal_checksums()
    with FakeServer(weights_checker=[ok(with_scales)]) as server:
        Proof(ServerAdmin([server.url]), fp8).equal_checksums()


@pytest.mark.parametrize(
    ("shape", "tp", "name"),
    [
        (dict(intermediate_size=192), 1, "intermediate_size = 192"),
        (dict(num_key_value_heads=2), 1, r"num_key_value_heads \* head_dim = 64"),
        ({}, 2, r"num_attention_heads \* head_dim = 128 to be a multiple of 128 \* servers.tp = 256"),
    ],
)
def test_sizes_that_cannot_be_cut_at_blocks_are_refused(tmp_path, shape, tp, name):
    with pytest.raises(ValueError, match=name):
        served_folder(_config(tmp_path, shape, tp))


def _config(folder, shape=None, tp=1):
    write_model(folder / "actor", 0, **{**SHAPE, **(shape or {})})
    tree = dict(
        run=dict(folder=str(folder / "run")),
        policy=dict(hf=str(folder / "actor")),
        actor=dict(hf=str(folder / "actor")),
        data=dict(tasks=dict(chain_sum={})),
        packing=dict(tokens=16384),
        servers=dict(quantization="fp8", tp=tp),
    )
    return parse_config(tree)


def test_a_push_of_fp8_weights_is_proved_by_the_names_and_shapes_of_that_format(tmp_path):
    config = _config(tmp_path)
    source = HFFolder(config.actor.hf)
    tensors = [(name, source.read(name).bfloat16()) for name in sorted(source.names)]
    reply = json.loads(json.dumps(checksums("x")).replace('"w"', '"w.weight_scale_inv"'))
    script = dict(server_info=[ok({"tp_size": 1})], weights_checker=[ok(reply)], model_info=[ok(info("1"))])
    knobs = dict(hf_folder=served_folder(config), proof_folder=None, timeout_s=10)
    with FakeServer(**script) as server:
        report = IPCSync([server.url], **knobs).push(list(quantised(tensors)), 1)
        bodies = server.asked("update_weights_from_tensor")
        with pytest.raises(SyncError, match="weight_scale_inv was not sent but in"):
            IPCSync([server.url], **knobs).push(tensors, 1)
    sent = [pickle.loads(base64.b64decode(body["serialized_named_tensors"][0])) for body in bodies]
    dtypes = {place.name: place.dtype for bucket in sent for place in bucket["metadata"]}
    assert dtypes["model.layers.1.self_attn.q_proj.weight"] == torch.float8_e4m3fn
    assert dtypes["model.layers.1.self_attn.q_proj.weight_scale_inv"] == torch.float32
    assert report.num_bytes < 0.75 * sum(tensor.nbytes for _, tensor in tensors)
