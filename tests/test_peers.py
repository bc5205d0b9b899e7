"""CCQA against an independent implementation of the same paper: the attention of `zaya` in transformers (5.x).

transformers is for development only and not in requirements.txt; CI installs it, without it this file is skipped.
"""

import pytest
import torch

from attention import CCQA, make_context
from model import HydraConfig

pytest.importorskip("transformers", reason="a development-only comparison: pip install transformers")


@torch.no_grad()
@pytest.mark.parametrize("taps", [2, 3])
@pytest.mark.parametrize("compression, groups", [(4, 3), (2, 4), (8, 6)])
def test_ccqa_equals_zaya_attention(taps, compression, groups):
    from transformers import ZayaConfig
    from transformers.models.zaya.modeling_zaya import ZayaAttention

    torch.manual_seed(0)
    D, H, T = 384, 12, 50
    K = D // compression // H
    theirs = ZayaAttention(
        ZayaConfig(hidden_size=D, num_attention_heads=H, num_key_value_heads=groups, head_dim=K, cca_time0=taps,
                   cca_time1=taps, num_hidden_layers=1, attn_implementation="sdpa", vocab_size=10), 0)  # fmt: skip
    ours = CCQA(HydraConfig(pattern="C", n_layer=1, dim=D, n_head=H, n_kv_head=groups, compression=compression,
                            conv_kernel=taps, qk_gain=0.5, norm_eps=1e-12, latent_head_dim=0))  # fmt: skip
    ours.norm = torch.nn.Identity()
    projection = theirs.qkv_proj
    for p in theirs.parameters():
        p.normal_(std=0.3)
    for conv in (projection.conv_qk_depthwise, projection.conv_qk_grouped):
        conv.bias.zero_()  # ours have none
    ours.down.weight.copy_(torch.cat([projection.q_proj.weight, projection.k_proj.weight,
                                      projection.v_proj_current.weight, projection.v_proj_delayed.weight]))  # fmt: skip
    ours.conv_depthwise.copy_(projection.conv_qk_depthwise.weight[:, 0])
    ours.conv_grouped.copy_(projection.conv_qk_grouped.weight)
    ours.k_temperature.copy_(theirs.qk_norm.temp)
    ours.out.weight.copy_(theirs.o_proj.weight)

    x = torch.randn(2, T, D) * 0.3
    ctx = make_context(torch.arange(T), {K}, 10000.0)
    cos, sin = (t.squeeze(1)[None].expand(2, -1, -1) for t in ctx.rope[K])
    sin = torch.cat((-sin[..., : K // 2], sin[..., K // 2 :]), dim=-1)  # ours carries the half's sign
    expected, _ = theirs(x, position_embeddings=(cos, sin))
    torch.testing.assert_close(ours(x, ctx), expected, rtol=1e-5, atol=1e-5)
