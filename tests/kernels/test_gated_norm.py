"""gated_rms_norm: the reference against transformers, the Triton kernels against the reference in fp64."""

import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

from kernels.ops.gated_rms_norm import gated_rms_norm_reference, gated_rms_norm_triton
from kernels.proof.cases.gated_rms_norm import OP
from kernels.proof.closeness import assert_close_fp32
from tests.mistakes import refused


def test_reference_equals_transformers():
    """Qwen3_5RMSNormGated computes in fp32 whatever it is given."""
    x = OP.make_case(T=7, H=3, V=24, J=2).inputs
    norm = Qwen3_5RMSNormGated(24, eps=1e-6)
    norm.weight.data = x["weight"]
    theirs = norm(x["o"].reshape(-1, 24), x["z"].reshape(-1, 24)).reshape(7, 72)
    double = {name: t.double() for name, t in x.items()}
    y, u = gated_rms_norm_reference(**double, eps=1e-6)
    assert_close_fp32({"x": theirs, "u": theirs.double() @ double["lora_A"].T}, {"x": y, "u": u})


def test_errors_name_the_culprit():
    o, z, w = torch.randn(3, 2, 8), torch.randn(3, 16), torch.ones(8)
    refused(r"o is torch.float64", gated_rms_norm_triton, o.double(), z, w, 1e-6)
    refused("heads side by side", gated_rms_norm_triton, torch.randn(2, 3, 8).transpose(0, 1), z, w, 1e-6)
    refused("weight requires grad", gated_rms_norm_triton, o, z, w.requires_grad_(), 1e-6)
