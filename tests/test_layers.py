"""The layers with a backward of their own against torch's: values, gradients, what they keep, what they refuse."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import layers
from layers import IGNORE, ChunkedCrossEntropy, Linear, RMSNorm, SwiGLU, compute_dtype, cross_entropy, loss_chunk

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@contextlib.contextmanager
def keeping():
    """Storage -> numbers of it, of what autograd keeps for the backward."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


# ---- RMSNorm


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rmsnorm_with_gradients_is_torchs(dtype, eps):
    torch.manual_seed(0)
    norm = RMSNorm(48, eps).to(dtype)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    x = torch.randn(3, 7, 48).to(dtype).requires_grad_()
    grad = torch.randn(3, 7, 48).to(dtype)
    got = norm(x)
    expected = F.rms_norm(x, (48,), norm.weight, eps)
    assert "RMSNormFunction" in got.grad_fn.name() and torch.equal(got, expected)
    assert torch.equal(norm(x.detach()), expected)  # the road without gradients
    ours = torch.autograd.grad(got, [x, norm.weight], grad)
    torchs = torch.autograd.grad(expected, [x, norm.weight], grad)
    for a, b in zip(ours, torchs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_rmsnorm_s_gradient_at_a_row_of_zeros_is_that_of_its_epsilon():
    """Where x is small beside eps the norm is a product with eps**-0.5, and so is its derivative."""
    norm = RMSNorm(8, 0.01)
    norm.init_weights()
    x = torch.zeros(1, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(norm(x).sum(), x)
    torch.testing.assert_close(grad, torch.full((1, 8), 10.0))


def test_rmsnorm_keeps_its_input_and_a_number_a_row():
    norm = RMSNorm(64, 1e-6)
    norm.init_weights()
    x = torch.randn(5, 64, requires_grad=True)
    with keeping() as kept:
        norm(x)
    assert sorted(kept.values()) == [5, 64, 5 * 64]
    assert x.untyped_storage().data_ptr() in kept


def test_rmsnorm_under_autocast_takes_the_dtype_of_its_input():
    norm = RMSNorm(16, 1e-6)
    norm.init_weights()
    x = torch.randn(2, 16, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == norm(x.detach()).dtype == torch.bfloat16


# ---- linear maps and SwiGLU


def test_linear_is_a_product_without_a_bias():
    linear = Linear(6, 4)
    assert linear.bias is None
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(linear(x), x @ linear.weight.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_row_compiled_on_a_cpu_is_a_sum(dtype):
    """Traced, not compiled: no library product is in the graph of one row, one is in that of two."""
    torch._dynamo.reset()
    weight = torch.randn(5, 8, dtype=dtype)
    for rows, products in ((1, 0), (2, 1)):
        x = torch.randn(rows, 1, 8, dtype=dtype)
        graphs = []

        def record(graph, inputs, graphs=graphs):
            graphs.append(graph.code)
            return graph

        got = torch.compile(layers.linear, backend=record, fullgraph=True, dynamic=False)(x, weight)
        assert got.dtype == dtype and sum("linear" in code for code in graphs) == products
        torch.testing.assert_close(got, F.linear(x, weight))


@pytest.mark.parametrize("autocast", [False, True])
def test_swiglu_with_gradients_is_the_plain_one_and_keeps_less(autocast):
    """Besides its input and weights it keeps gate and up, and neither silu(gate) nor the product."""
    torch.manual_seed(0)
    mlp = SwiGLU(64, 96)
    x = torch.randn(2, 5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with keeping() as kept:
            got = mlp(x)
        gate, up = F.linear(x, mlp.gate_up.weight).chunk(2, dim=-1)
        expected = F.linear(F.silu(gate) * up, mlp.down.weight)
        with torch.no_grad():
            assert torch.equal(mlp(x), expected)
    assert torch.equal(got, expected)
    assert sum(n for n in kept.values() if n % 96 == 0 and n < 64 * 96) == 10 * 2 * 96
    ours = torch.autograd.grad(got.float().square().sum(), [x, *mlp.parameters()])
    plain = torch.autograd.grad(expected.float().square().sum(), [x, *mlp.parameters()])
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_swiglu_compiled_keeps_no_product_either():
    """The same numbers are kept as in eager: the compiler makes the product again in the backward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    mlp = SwiGLU(64, 96)
    x = torch.randn(2, 5, 64, requires_grad=True)
    expected = mlp(x)
    plain = torch.autograd.grad(expected.square().sum(), [x, *mlp.parameters()])
    with keeping() as kept:
        got = torch.compile(mlp, fullgraph=True, dynamic=False)(x)
    assert sum(n for n in kept.values() if n % 96 == 0 and n < 64 * 96) == 10 * 2 * 96
    torch.testing.assert_close(got, expected)
    ours = torch.autograd.grad(got.square().sum(), [x, *mlp.parameters()])
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- the loss


def text(N=80, V=97, D=16, dtype=torch.float32):
    """Rows, a head and targets of which every seventh is ignored."""
    torch.manual_seed(0)
    x = torch.randn(N, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (N,))
    targets[::7] = IGNORE
    return x, weight, targets


def chunks_of(monkeypatch, rows: int, V: int = 97) -> None:
    monkeypatch.setattr(layers, "MAX_LOGITS", rows * V)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [1, 7, 16, 79])
def test_the_chunked_loss_equals_the_plain_one(rows, dtype, monkeypatch):
    x, weight, targets = text(dtype=dtype)
    logits, plain = cross_entropy(x, weight, targets)
    torch.testing.assert_close(logits, x @ weight.t())
    expected = torch.autograd.grad(plain, [x, weight])
    chunks_of(monkeypatch, rows)
    none, loss = cross_entropy(x, weight, targets)
    assert none is None and loss.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(loss, plain)
    for a, b in zip(torch.autograd.grad(loss * 3, [x, weight]), expected, strict=True):
        torch.testing.assert_close(a, 3 * b, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def compiled_loss():
    torch._dynamo.reset()
    return torch.compile(layers.loss_chunk, fullgraph=True, dynamic=False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_loss_equals_the_plain_fp32_one(compiled_loss, dtype, monkeypatch):
    """Loss and gradients, ignored targets included, one graph for all chunks."""
    x, weight, targets = text()
    plain = F.cross_entropy(x @ weight.t(), targets, ignore_index=IGNORE)
    expected = torch.autograd.grad(plain, [x, weight])
    monkeypatch.setattr(layers, "MAX_LOGITS", 3 * 97)  # eight times three rows, of which twenty divide 80
    torch._dynamo.utils.counters.clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        none, loss = cross_entropy(x, weight, targets, compiled_loss)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert none is None and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for a, b in zip([loss, *torch.autograd.grad(loss, [x, weight])], [plain, *expected], strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.slow
@pytest.mark.parametrize("target", [-2, 97, 1000])
def test_a_target_outside_of_the_vocabulary_makes_a_compiled_loss_nan(compiled_loss, target, monkeypatch):
    x, weight, targets = text()
    targets[33] = target
    monkeypatch.setattr(layers, "MAX_LOGITS", 3 * 97)
    assert cross_entropy(x, weight, targets, compiled_loss)[1].isnan()


def test_the_rows_of_a_compiled_chunk_divide_all_rows_where_that_costs_little():
    for N in range(1, 400):
        for most in (1, 7, 64, 100):
            rows = layers.chunk_rows(N, most)
            assert rows <= most and (N % rows == 0 or rows == most)
    assert layers.chunk_rows(32 * 1024, 5336) == 4096 and layers.chunk_rows(97, 60) == 60
    assert layers.chunk_rows(2**15, 2**20) == 2**15


def test_the_plain_loss_keeps_logits_that_are_few_and_no_more(monkeypatch):
    x, weight, targets = text()
    chunks_of(monkeypatch, 80)
    assert cross_entropy(x, weight, targets)[0].shape == (80, 97)
    monkeypatch.setattr(layers, "MAX_LOGITS", 80 * 97 - 1)
    assert cross_entropy(x, weight, targets)[0] is None
    monkeypatch.setattr(layers, "MAX_LOGITS", 1)  # a vocabulary above it goes row by row
    torch.testing.assert_close(cross_entropy(x, weight, targets)[1], F.cross_entropy(x @ weight.t(), targets,
                                                                                     ignore_index=IGNORE))  # fmt: skip


def test_the_chunked_loss_makes_no_gradient_where_there_is_no_backward(monkeypatch):
    x, weight, targets = text()
    _, expected = cross_entropy(x, weight, targets)
    chunks_of(monkeypatch, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, loss = cross_entropy(x, weight, targets)
    torch.testing.assert_close(loss, expected)
    assert counter.get_total_flops() == 2 * 80 * 97 * 16


def test_the_chunked_loss_never_holds_all_logits():
    """The largest tensor that the forward or the backward makes stays at one chunk (or one weight)."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    x, weight, targets = text(512, 300, 8)
    with Largest() as seen:
        ChunkedCrossEntropy.apply(x, weight, targets, 64, torch.float32, True, loss_chunk).backward()
    assert seen.numel == 64 * 300


@pytest.mark.parametrize("rows", [16, 80])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_loss_of_bf16_logits_is_summed_in_fp32(weights, rows, monkeypatch):
    """Under autocast, and with bf16 weights, where no autocast lifts the logits."""
    x, weight, targets = text(dtype=weights)
    chunks_of(monkeypatch, rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        _, loss = cross_entropy(x, weight, targets)
    logits = x.bfloat16() @ weight.bfloat16().t()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), targets, ignore_index=IGNORE))
    expected = torch.autograd.grad(F.cross_entropy(x @ weight.t(), targets, ignore_index=IGNORE), [x, weight])
    for a, b in zip(torch.autograd.grad(loss, [x, weight]), expected, strict=True):
        assert a.dtype == weights
        torch.testing.assert_close(a, b, rtol=0.1, atol=2e-3)


@pytest.mark.parametrize("rows", [16, 80])
@pytest.mark.parametrize("target", [-2, -100, 97, 1000])
def test_a_target_outside_of_the_vocabulary_is_an_error_in_either_loss(target, rows, monkeypatch):
    """All but IGNORE, and it does not matter whether a gradient is asked for."""
    x, weight, targets = text()
    targets[33] = target
    chunks_of(monkeypatch, rows)
    with pytest.raises((IndexError, RuntimeError), match=f"{target} is out of bounds"):
        cross_entropy(x, weight, targets)
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError), match=f"{target} is out of bounds"):
        cross_entropy(x, weight, targets)


def test_without_any_target_both_losses_are_nan_and_no_class_is_pushed(monkeypatch):
    x, weight, targets = text()
    targets.fill_(IGNORE)
    for rows in (80, 16):
        chunks_of(monkeypatch, rows)
        assert cross_entropy(x, weight, targets)[1].isnan()
    total = ChunkedCrossEntropy.apply(x, weight, targets, 16, torch.float32, True, loss_chunk)
    assert total == 0 and not any(grad.any() for grad in torch.autograd.grad(total, [x, weight]))


def test_the_dtype_of_a_product():
    x = torch.zeros(1)
    assert compute_dtype(x) == torch.float32 and compute_dtype(x.double()) == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x) == torch.bfloat16


# ---- second derivatives


def loss_in_chunks(x):
    return ChunkedCrossEntropy.apply(x, torch.randn(9, 8), torch.arange(4), 2, torch.float32, True, loss_chunk)


HAND_WRITTEN = {"RMSNorm": RMSNorm(8, 1e-6), "SwiGLU": SwiGLU(8, 6), "ChunkedCrossEntropy": loss_in_chunks}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_a_second_derivative_is_refused(name):
    """They would be wrong without an error: the backwards are written by hand and recompute from saved tensors."""
    x = torch.randn(4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(HAND_WRITTEN[name](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_initial_loss_of_random_rows_is_log_vocab():
    x, weight, targets = text()
    _, loss = cross_entropy(x * 0.01, weight * 0.01, targets)
    assert loss.item() == pytest.approx(math.log(97), abs=1e-3)
