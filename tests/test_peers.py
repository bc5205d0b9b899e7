"""CCQA against an independent implementation of the same paper: the attention and the layer of `zaya` in transformers
(5.x), the public model of its authors.

transformers is for development only and not in requirements.txt; CI installs it, without it this file is skipped.
"""

import pytest
import torch

from attention import make_context
from model import Block, HydraConfig

pytest.importorskip("transformers", reason="a development-only comparison: pip install transformers")


@torch.no_grad()
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("taps", [2, 3])
@pytest.mark.parametrize("compression, groups", [(4, 3), (2, 4), (8, 6)])
def test_ccqa_in_its_authors_form_equals_zaya(taps, compression, groups, fraction):
    """The attention with half of its channels turned, as that model has them, and the layer around it with its learned
    residual scales; both without their MLPs, of which theirs is a mixture of experts."""
    from transformers import ZayaConfig
    from transformers.models.zaya.modeling_zaya import ZayaDecoderLayer, ZayaRotaryEmbedding

    torch.manual_seed(0)
    D, H, T = 384, 12, 50
    K = D // compression // H
    eps = 1e-12
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": fraction}
    config = ZayaConfig(hidden_size=D, num_attention_heads=H, num_key_value_heads=groups, head_dim=K, cca_time0=taps,
                        cca_time1=taps, num_hidden_layers=1, attn_implementation="sdpa", vocab_size=10,
                        rms_norm_eps=eps, num_experts=2, moe_intermediate_size=8, router_hidden_size=8,
                        rope_parameters={"hybrid": rope, "hybrid_sliding": rope})  # fmt: skip
    layer = ZayaDecoderLayer(config, 0)
    block = Block("C", HydraConfig(pattern="C", n_layer=1, dim=D, n_head=H, n_kv_head=groups, compression=compression,
                                   conv_kernel=taps, qk_gain=0.5, norm_eps=eps, latent_head_dim=0, alpha="learned",
                                   rope_fraction=fraction, pre_out_norm=False))  # fmt: skip
    theirs, ours = layer.self_attn, block.attn
    projection = theirs.qkv_proj
    for p in layer.parameters():
        p.normal_(std=0.3)
    for conv in (projection.conv_qk_depthwise, projection.conv_qk_grouped):
        conv.bias.zero_()  # ours have none
    ours.down.weight.copy_(torch.cat([projection.q_proj.weight, projection.k_proj.weight,
                                      projection.v_proj_current.weight, projection.v_proj_delayed.weight]))  # fmt: skip
    ours.conv_depthwise.copy_(projection.conv_qk_depthwise.weight[:, 0])
    ours.conv_grouped.copy_(projection.conv_qk_grouped.weight)
    ours.k_temperature.copy_(theirs.qk_norm.temp)
    ours.out.weight.copy_(theirs.o_proj.weight)

    block.attn_norm.weight.copy_(layer.input_layernorm.weight)
    block.mlp_norm.weight.copy_(layer.post_attention_layernorm.weight)
    for mine, scale in ((block.attn_scale, layer.post_attention_residual_scale),
                        (block.mlp_scale, layer.post_mlp_residual_scale)):  # fmt: skip
        mine.line_scale.copy_(scale.residual_scale)
        mine.line_bias.copy_(scale.residual_bias)
        mine.layer_scale.copy_(scale.hidden_states_scale)
        mine.layer_bias.copy_(scale.hidden_states_bias)
    block.mlp = torch.nn.Identity()
    layer.mlp.forward = lambda x, router: (x, router)

    x = torch.randn(2, T, D) * 0.3
    ctx = make_context(torch.arange(T), {ours.rope_width}, 10000.0)
    tables = ZayaRotaryEmbedding(config)(x, torch.arange(T).expand(2, T), "hybrid")
    expected, _ = theirs(x, position_embeddings=tables)
    torch.testing.assert_close(ours(x, ctx), expected, rtol=1e-5, atol=1e-5)
    expected, _ = layer(x, position_embeddings=tables)
    torch.testing.assert_close(block(x, ctx), expected, rtol=1e-5, atol=1e-5)
