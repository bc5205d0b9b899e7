"""Packed documents: a window's documents are computed as if each were the whole text, in training, evaluation, prefill
and decoding; in one graph whatever the documents are."""

import struct
from dataclasses import replace

import pytest
import torch
from conftest import FAIR
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch.nn.attention import flex_attention as flex_module

import attention
import machine
import model as model_module
import sample
import train
from attention import KINDS, documents
from configurator import UserError
from generate import decode, generate, new_state, prefill
from machine import document_mask
from model import Hydra, HydraConfig

END = 96
SHAPE = dict(vocab_size=97, block_size=64, dim=64, n_head=4, n_kv_head=2, compression=2, latent_head_dim=0,
             mlp_ratio=1.0, doc_mask=True)  # fmt: skip
DENSE = [*({"pattern": p} for p in (*KINDS, "MMCCCLML")), {"pattern": "M", "window": 5},
         {"pattern": "MMCCCLML", "window": 3}, {"pattern": "C", "conv_kernel": 5}, {"pattern": "C", "conv_kernel": 0},
         {"pattern": "C", "conv_kernel": 1}, {"pattern": "C", "value_shift": False}, *FAIR]  # fmt: skip
ROUTED = [{"pattern": "MCLM", "mod_capacity": 0.5, "window": 4}, {"pattern": "MCL", "mor_recursions": 3, "window": 4},
          {"pattern": "LMMCCL", "mod_capacity": 0.5, "mor_recursions": 2},
          FAIR[-1] | {"pattern": "LMC", "mod_capacity": 0.5, "mor_recursions": 2}]  # fmt: skip
# rows of the batch below by the lengths of their documents, each closed by END but for a row's last one
LENGTHS = [[1, 9, 1, 1, 7, 21], [40], [17, 20, 3]]


def make(**changes) -> Hydra:
    """A model in which no parameter is at its start, and whose routers decide this way as often as that."""
    torch.manual_seed(0)
    net = Hydra(HydraConfig(**SHAPE | {"n_layer": max(3, len(changes.get("pattern", "")))} | changes))
    net.end_token = END
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn_like(p)) if "router" in name else p.add_(torch.randn_like(p) * 0.05)
    return net


def batch() -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    """The documents of every row, and the rows."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for lengths in LENGTHS:
        row = [torch.randint(0, END, (n,), generator=generator) for n in lengths]
        for document in row[:-1]:
            document[-1] = END
        rows.append(row)
    return rows, torch.stack([torch.cat(row) for row in rows])


def alone(net: Hydra, rows: list[list[torch.Tensor]], function) -> torch.Tensor:
    """function(model, document [1, n]) -> [1, n, ..], of every document on its own, side by side. The model of the
    reference knows of no document."""
    plain = Hydra(replace(net.config, doc_mask=False)).train(net.training)
    plain.load_state_dict(net.state_dict())
    return torch.stack([torch.cat([function(plain, document[None])[0] for document in row]) for row in rows])


def logits(net: Hydra, idx: torch.Tensor) -> torch.Tensor:
    return net(idx, idx).logits


# ---- what a document is


def test_documents_are_counted_and_positions_begin_again():
    pos, doc = documents(torch.tensor([[5, END, END, 6, 7, END], [END, 1, 2, 3, 4, 5]]), END)
    assert pos.tolist() == [[0, 1, 0, 0, 1, 2], [0, 0, 1, 2, 3, 4]]
    assert doc.tolist() == [[0, 0, 2, 3, 3, 3], [0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("window", [0, 1, 3])
def test_a_mask_is_the_past_of_the_own_document(window):
    _, idx = batch()
    _, doc = documents(idx, END)
    seen = document_mask(doc, window)
    ends = (idx == END).long()
    for b in range(len(idx)):
        for q in range(40):
            for k in range(40):
                ended = ends[b, k:q].sum() > 0  # an end of text at or behind the key, in front of the query
                assert seen[b, 0, q, k] == (k <= q and not ended and (not window or q - k < window))


# ---- equal to each document alone


@torch.no_grad()
@pytest.mark.parametrize("changes", DENSE + ROUTED, ids=str)
def test_packed_documents_equal_each_alone(changes):
    net = make(**changes).eval()
    rows, idx = batch()
    torch.testing.assert_close(logits(net, idx), alone(net, rows, logits), rtol=1e-5, atol=1e-5)
    if "conv_kernel" not in changes:  # and the documents would not have been alone otherwise
        plain = Hydra(replace(net.config, doc_mask=False)).eval()
        plain.load_state_dict(net.state_dict())
        assert (logits(net, idx) - logits(plain, idx)).abs().max() > 0.01


@pytest.mark.parametrize("changes", DENSE, ids=str)
def test_gradients_of_packed_documents_are_the_sums_of_each_alone(changes):
    net = make(**changes)
    rows, idx = batch()
    torch.manual_seed(2)
    weights = torch.randn(3, 40, 97) / 100
    (logits(net, idx) * weights).sum().backward()
    plain = Hydra(replace(net.config, doc_mask=False))
    plain.load_state_dict(net.state_dict())
    for row, weight in zip(rows, weights, strict=True):
        parts = weight.split([len(document) for document in row])
        for document, part in zip(row, parts, strict=True):
            (logits(plain, document[None])[0] * part).sum().backward()
    for (name, a), b in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("changes", ROUTED, ids=str)
def test_in_training_the_selected_tokens_see_their_own_document(changes):
    """The top k are of the window, so that a document's tokens decide which of the others' are in: with a router that
    no token moves, changing one document leaves the others as they were, in training too."""
    net = make(**changes).train()
    _, idx = batch()
    other = idx.clone()
    other[0, 12:18] = (other[0, 12:18] + 1) % END  # inside of the fifth document, whose end stays
    scores = torch.randn(3, 64)
    for router in [*net.depth_routers, *net.recursion_routers]:
        router.forward = lambda x: scores[:, : x.size(1)]
    with torch.no_grad():
        a, b = logits(net, idx), logits(net, other)
    assert torch.equal(a[0, :12], b[0, :12]) and not torch.equal(a[0, 12:19], b[0, 12:19])
    torch.testing.assert_close(a[0, 19:], b[0, 19:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", DENSE[:7] + ROUTED, ids=str)
def test_packed_documents_are_causal(changes):
    net = make(**changes).eval()
    _, idx = batch()
    for t in (5, 18, 30):
        other = idx.clone()
        other[:, t + 1 :] = (other[:, t + 1 :] + 3) % 97  # moves the ends of text too
        torch.testing.assert_close(logits(net, idx)[:, : t + 1], logits(net, other)[:, : t + 1], rtol=1e-5, atol=1e-5)


def test_without_an_end_of_text_nothing_changes():
    net = make(pattern="MMCCCLML", window=5).eval()
    idx = torch.randint(0, END, (2, 40))
    plain = Hydra(replace(net.config, doc_mask=False)).eval()
    plain.load_state_dict(net.state_dict())
    torch.testing.assert_close(logits(net, idx), logits(plain, idx), rtol=1e-5, atol=1e-5)


def test_recomputed_blocks_keep_the_documents():
    net = make(pattern="MCL", mor_recursions=2, mod_capacity=0.5)
    _, idx = batch()
    gradients = []
    for net.recompute in (False, True):
        net.zero_grad()
        net(idx, idx).loss.backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---- in one graph


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"pattern": "MC", "n_layer": 2, "window": 5}, {"pattern": "ML", "n_layer": 2},
                                     {"pattern": "CM", "n_layer": 2, "mod_capacity": 0.5, "window": 5},
                                     {"pattern": "MC", "n_layer": 2, "mor_recursions": 2, "mod_capacity": 0.5},
                                     FAIR[-1] | {"pattern": "ML", "n_layer": 2}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_compiled_blocks_are_compiled_once_and_equal_the_plain_ones(backend, changes, monkeypatch):
    """Traced as for CUDA: block masks are made in front of the blocks, behind a router in its graph."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)
    monkeypatch.setattr(machine, "flex_problem", lambda *_: "")
    torch._dynamo.reset()
    reference = make(**changes, attn_backend="sdpa")
    net = Hydra(replace(reference.config, attn_backend=backend))
    net.end_token = END
    net.load_state_dict(reference.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    machine.compile_blocks(net.blocks, backend=counter)
    _, idx = batch()
    frames = []
    for batch_of in (idx, idx.flip(0), idx.roll(7, dims=1)):
        for model in (net, reference):
            model.zero_grad()
            model(batch_of, batch_of).loss.backward()
        for (name, a), b in zip(net.named_parameters(), reference.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b[1].grad, rtol=1e-4, atol=1e-5, msg=name)
        frames.append(counter.frame_count)
    assert frames == [len(net.blocks) * net.config.mor_recursions] * 3


@pytest.mark.slow
def test_flex_sees_the_documents_with_its_own_masks(monkeypatch):
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)
    monkeypatch.setattr(machine, "flex_problem", lambda *_: "")
    torch._dynamo.reset()
    reference = make(pattern="MC", n_layer=2, window=5)
    net = Hydra(replace(reference.config, attn_backend="flex"))
    net.end_token = END
    net.load_state_dict(reference.state_dict())
    _, idx = batch()
    recorder = AotEagerAndRecordGraphs()
    machine.compile_blocks(net.blocks, backend=recorder)
    with torch.no_grad():
        torch.testing.assert_close(logits(net, idx), logits(reference, idx), rtol=1e-5, atol=1e-5)
    assert all("flex_attention" in graph.code for graph in recorder.fw_graphs) and len(recorder.fw_graphs) == 2


# ---- generation


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("changes", DENSE + ROUTED, ids=str)
def test_prefill_and_decoding_equal_the_packed_forward(changes, static):
    """Prefills that end inside of documents and at their ends, then token by token across the others."""
    net = make(**changes).eval()
    rows, idx = batch()
    full = logits(net, idx)
    b = torch.arange(3)
    for lengths in ([1, 1, 1], [10, 17, 16], [23, 2, 37]):
        state = new_state(net, 3, 64, static)
        got = prefill(net, [row[:n] for row, n in zip(idx, lengths, strict=True)], state)
        place = torch.tensor(lengths)
        torch.testing.assert_close(got, full[b, place - 1], rtol=1e-4, atol=1e-4)
        for _ in range(40 - max(lengths)):
            got = decode(net, idx[b, place], state)
            torch.testing.assert_close(got, full[b, place], rtol=1e-4, atol=1e-4)
            place += 1


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"pattern": "MMCCCLML", "window": 4}, *ROUTED], ids=str)
def test_a_single_row_begins_again_behind_an_end_of_text(changes):
    """Its steps are otherwise promised that all slots are its own."""
    net = make(**changes).eval()
    _, idx = batch()
    full = logits(net, idx[:1])[0]
    state = new_state(net, 1, 64)
    prefill(net, idx[:1, :4], state)
    for t in range(4, 40):
        torch.testing.assert_close(decode(net, idx[0, t : t + 1], state)[0], full[t], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_prompt_of_several_documents_goes_on_as_its_last_one_does():
    net = make(pattern="MMCCCLML", window=4).eval()
    document = torch.tensor([3, 1, 4, 1, 5])
    before = torch.cat((torch.arange(20), torch.tensor([END])))
    fresh = torch.stack(list(generate(net, [document], 12, temperature=0)), dim=1)
    behind = torch.stack(list(generate(net, [torch.cat((before, document))], 12, temperature=0)), dim=1)
    assert torch.equal(fresh, behind)


def test_the_road_without_documents_makes_no_masks():
    net = Hydra(HydraConfig(**SHAPE | {"doc_mask": False, "pattern": "MC", "n_layer": 2}))
    ctx = net.context(torch.arange(8))
    assert ctx.doc is None and not ctx.masks
    assert attention.moved(torch.ones(1, 3, 1), 2, None).flatten().tolist() == [0, 0, 1]


# ---- as a user meets it


def test_a_run_takes_its_end_of_text_from_the_tokenizer_and_so_do_its_samples(tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i} is a number. " * 3)
    seen = set()

    def spy(idx, end):
        seen.add((end, bool((idx == end).any())))
        return documents(idx, end)

    monkeypatch.setattr(model_module, "documents", spy)
    args = ["--dim=32", "--n_head=2", "--n_kv_head=1", "--compression=2", "--n_layer=2", "--pattern=MC",
            "--mlp_ratio=1", "--block_size=64", "--vocab_size=257", "--tokenizer=bytes", f"--data={folder}",
            "--max_iters=1", "--eval_iters=1", "--final_eval_iters=1", "--sample_tokens=4",
            f"--cache_dir={tmp_path / 'cache'}", f"--out_dir={tmp_path / 'out'}"]  # fmt: skip
    assert train.main(args) == 0 and not seen
    assert train.main([*args, "--doc_mask"]) == 0 and seen == {(256, True)}
    options = sample.SampleConfig(out_dir=str(tmp_path / "out"), checkpoint="last")
    net, _, _ = sample.load_model(options, torch.device("cpu"))
    assert net.config.doc_mask and net.end_token == 256


def test_shards_without_a_tokenizer_have_no_end_of_text_to_stop_at(tmp_path):
    for split in ("train", "val"):
        header = struct.pack("<256i", 20240520, 1, 600, *[0] * 253)
        (tmp_path / f"x_{split}_000.bin").write_bytes(header + bytes(1200))
    with pytest.raises(UserError, match="doc_mask=True: .*--tokenizer"):
        train.main([f"--data={tmp_path}", "--doc_mask", f"--cache_dir={tmp_path / 'cache'}",
                    f"--out_dir={tmp_path / 'out'}"])  # fmt: skip
    assert not (tmp_path / "out").exists()
