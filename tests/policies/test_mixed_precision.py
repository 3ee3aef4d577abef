import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from customized_grpo.policies.mixed_precision import MixedPrecision, checkpoint


def test_written_out_attention_equals_the_kernel_and_leaves_masks_alone() -> None:
    query, key, value = torch.randn(3, 2, 4, 10, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    attend = nn.functional.scaled_dot_product_attention
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    plain, masked, scaled = (
        attend(query, key, value),
        attend(query, key, value, mask),
        attend(query, key, value, scale=0.1),
    )
    with MixedPrecision("cpu"):
        assert torch.allclose(attend(query, key, value), plain, atol=1e-6)
        assert torch.allclose(attend(query, key, value, attn_mask=mask), masked, atol=1e-6)
        assert torch.allclose(attend(query, key, value, mask), masked, atol=1e-6)
        assert torch.allclose(attend(query, key, value, scale=0.1), scaled, atol=1e-6)


def test_a_norm_keeps_the_dtype_of_its_input_and_trains_its_scale() -> None:
    norm = nn.RMSNorm(8)
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with MixedPrecision("cpu"):
            out = norm(rows.bfloat16())
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), norm(rows), atol=2e-2)
    assert norm.weight.grad is not None
    assert norm.weight.grad.dtype == torch.float32


def test_a_recomputation_in_another_thread_runs_what_the_forward_pass_ran() -> None:
    """As on a GPU, whose backward pass has a thread of its own."""
    weight = torch.randn(8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rows = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(1))

    def block(rows: torch.Tensor) -> torch.Tensor:
        normed = nn.functional.rms_norm(rows.bfloat16(), (8,), weight)
        return nn.functional.scaled_dot_product_attention(normed, normed, normed)

    gradients = []
    for call in (block, lambda rows: checkpoint(block, rows)):
        with torch.autocast("cpu", torch.bfloat16), MixedPrecision("cpu"):
            loss = call(rows).float().square().sum()
        with ThreadPoolExecutor(1) as thread:
            gradients += thread.submit(torch.autograd.grad, loss, weight).result()
    assert torch.equal(*gradients)
