"""qk_norm_rope: the reference against transformers, the Triton kernels against the reference in fp64."""

import pytest
import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm, apply_rotary_pos_emb

from kernels.documents import Documents
from kernels.lora_term import LoRATerm
from kernels.ops.qk_norm_rope import qk_norm_rope_reference, qk_norm_rope_triton
from kernels.proof.cases.qk_norm_rope import OP
from kernels.proof.closeness import assert_close_fp32


def test_reference_equals_transformers():
    """Two documents, so that positions start afresh; the adapter as three separate projections."""
    T, H, G, K, P = 7, 4, 2, 16, 3
    case = OP.make_case(T, H, G, K, P, rank=2)
    x = {name: t.double() for name, t in case.inputs.items()}
    positions = Documents(torch.tensor([0, 3, T], dtype=torch.int32)).positions
    angles = positions[:, None] * 1e4 ** -torch.linspace(0, 1, P, dtype=torch.float64)
    x["cos"], x["sin"] = angles.cos(), angles.sin()

    rows, delta = (2 * H * K, G * K, G * K), []
    for u, B in zip(x["u"].split(2, dim=1), x["B"].split(rows), strict=True):
        delta.append(32 * torch.einsum("tr,nr->tn", u, B))
    qg, k, v = (x["qgkv"] + torch.cat(delta, dim=1)).split(rows, dim=1)
    qg = qg.reshape(T, H, 2, K)
    q_norm, k_norm = Qwen3_5RMSNorm(K, eps=1e-6), Qwen3_5RMSNorm(K, eps=1e-6)
    q_norm.weight.data, k_norm.weight.data = x["q_weight"], x["k_weight"]
    full = torch.cat([angles, angles], dim=1)
    # (heads, T, K) as one batch; their norm computes in fp32.
    q, k = (t.transpose(0, 1)[None] for t in (q_norm(qg[:, :, 0]), k_norm(k.reshape(T, G, K))))
    q, k = apply_rotary_pos_emb(q, k, full.cos()[None], full.sin()[None])
    theirs = {"q": q[0].transpose(0, 1), "gate": qg[:, :, 1].reshape(T, -1), "k": k[0].transpose(0, 1),
              "v": v.reshape(T, G, K)}  # fmt: skip
    assert_close_fp32(theirs, case.call(qk_norm_rope_reference, x))


def test_outputs_are_tensors_of_their_own():
    """Attention reads q, k and v as contiguous tensors, also when the GEMM's row is a slice."""
    case = OP.make_case(T=3, H=2, G=1, K=16, P=4, strided=True)
    for y in case.call(qk_norm_rope_triton, case.inputs).values():
        assert y.is_contiguous() and y.untyped_storage().nbytes() == y.nbytes


def test_errors_name_the_culprit():
    x = OP.make_case(T=3, H=2, G=1, K=16, P=4, rank=0).inputs
    with pytest.raises(ValueError, match=r"qgkv is torch.float64"):
        qk_norm_rope_triton(**x | {"qgkv": x["qgkv"].double()}, num_heads=2, num_kv_heads=1, eps=1e-6)
    with pytest.raises(ValueError, match="96 columns; 3/1 heads of 16 with gates make 128"):
        qk_norm_rope_triton(**x, num_heads=3, num_kv_heads=1, eps=1e-6)
    with pytest.raises(ValueError, match="k_weight requires grad"):
        x["k_weight"].requires_grad_()
        lora = LoRATerm(torch.zeros(3, 3), torch.zeros(96, 1), 1.0)
        qk_norm_rope_triton(**x, num_heads=2, num_kv_heads=1, eps=1e-6, lora=lora)
