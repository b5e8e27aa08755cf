# SPDX-License-Identifier: MIT
"""Trees and blocks: three implementations that agree, a chain as a tree, exact cases, mistakes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import DEVICES
from test_sampling import on, ragged_case, seeds, uniforms

from quantgemm import ops
from quantgemm import reference as ref
from quantgemm import reference_modes as modes

Tensor = torch.Tensor
NAMES = ("tokens", "count", "logprobs", "status", "nodes")


def assert_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...], skip: str = "") -> None:
    for a, b, name in zip(got, want, NAMES[: len(want)], strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=2e-6, msg=name)
        elif name != skip:
            assert torch.equal(a.cpu(), b.cpu()), name


def random_parents(batch: int, most: int, seed: int) -> Tensor:
    """Any node before a node, or none; a few are no nodes at all."""
    g = torch.Generator().manual_seed(seed)
    columns = [torch.randint(-1, i, (batch,), generator=g) for i in range(most)]
    parents = torch.stack(columns, 1)
    parents[torch.rand(parents.shape, generator=g) < 0.3] = -1
    parents[torch.rand(parents.shape, generator=g) < 0.02] = most + 3
    return parents


def tree_case(batch: int, most: int, vocab: int, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Drafts of siblings often differ; some rows of q equal p, so that nodes are accepted."""
    case = ragged_case(batch, most, vocab, dtype, seed)
    parents = random_parents(batch, most, seed)
    for b in range(1, batch, 3):
        first = int(case["cu_rows"][b])
        for i in range(int(case["cu_rows"][b + 1]) - first - 1):
            if -1 <= parents[b, i] < i:
                case["draft"][b, i] = case["target"][first + 1 + int(parents[b, i])]
                row = case["draft"][b, i].float()
                case["draft_tokens"][b, i] = int(row.argmax())
    return case | {"parents": parents}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [3, 61, 1000, 4099])
@pytest.mark.parametrize("noise", ["seeds", "uniforms"])
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_three_trees_agree(
    vocab: int, dtype: torch.dtype, noise: str, one_hot: bool, mixed: bool, device: str
) -> None:
    batch, most = 24, 7
    case = tree_case(batch, most, vocab, dtype, vocab)
    case |= seeds(batch) if noise == "seeds" else uniforms(batch, most)
    if one_hot:
        case |= {"draft": None, "draft_probs": False}
    if mixed:
        case["temperature"] = (torch.arange(batch) % 2).float()
    want = modes.verify_tree_loop(**case)
    assert_equal(ops.spec_verify_tree(**on(device, case)), want)
    assert_equal(modes.verify_tree_vectorized(**on(device, case)), want, skip="status")
    assert one_hot or ((want[1] > 1).any() and (want[4] > 1).any())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [3, 61, 1000, 4099])
@pytest.mark.parametrize("noise", ["seeds", "uniforms"])
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_three_blocks_agree(
    vocab: int, dtype: torch.dtype, noise: str, one_hot: bool, mixed: bool, device: str
) -> None:
    batch, most = 24, 5
    case = ragged_case(batch, most, vocab, dtype, vocab)
    case |= seeds(batch) if noise == "seeds" else uniforms(batch, most)
    if one_hot:
        case |= {"draft": None, "draft_probs": False}
    if mixed:
        case["temperature"] = (torch.arange(batch) % 2).float()
    want = modes.verify_block_loop(**case)
    assert_equal(ops.spec_verify(**on(device, case), block=True), want)
    assert_equal(modes.verify_block_vectorized(**on(device, case)), want, skip="status")
    assert one_hot or (want[1] > 1).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["tree", "block"])
@pytest.mark.parametrize("order", ["forward", "shuffled"])
def test_smaller_draft_vocabulary(order: str, mode: str, device: str) -> None:
    case = tree_case(16, 4, 300, torch.float32, 8) | seeds(16)
    g = torch.Generator().manual_seed(1)
    chosen = torch.randperm(300, generator=g)[:100]
    chosen = chosen.sort().values if order == "forward" else chosen
    q = torch.rand(16, 4, 100, generator=g).softmax(-1)
    drafts = chosen[torch.multinomial(q.flatten(0, 1), 1, generator=g)].view(16, 4)
    to_draft = ops.invert_vocabulary_map(chosen, 300)
    case |= {"draft": q, "draft_tokens": drafts, "target_to_draft": to_draft}
    case["draft_tokens"][0, 0] = int((to_draft < 0).nonzero()[0])  # q = 0 there: never accepted
    if mode == "tree":
        assert_equal(ops.spec_verify_tree(**on(device, case)), modes.verify_tree_loop(**case))
        return
    del case["parents"]
    want = modes.verify_block_loop(**case)
    assert_equal(ops.spec_verify(**on(device, case), block=True), want)
    del case["target_to_draft"]
    again = ops.spec_verify(**on(device, case | {"draft_to_target": chosen}), block=True)
    assert_equal(again, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("probs", [True, False])
def test_a_chain_is_a_tree_of_one_branch(probs: bool, device: str) -> None:
    """The same bits, from probabilities and from logits, with and without truncation."""
    batch, most = 40, 5
    case = ragged_case(batch, most, 5003, torch.float32, 3) | seeds(batch)
    if not probs:
        case["target"], case["draft"] = case["target"].log(), case["draft"].log()
        case |= {"target_probs": False, "draft_probs": False}
        # 10 of 20 groups of 256: the chain draws from a list of what is kept, the tree does not.
        case["top_k"] = torch.tensor([0, 10, 200])[torch.arange(batch) % 3]
        case["temperature"] = (torch.arange(batch) % 4).float()
    case = on(device, case)
    parents = torch.arange(-1, most - 1, device=device).expand(batch, -1)
    chain = ops.spec_verify(**case)
    tree = ops.spec_verify_tree(**case, parents=parents)
    for a, b in zip(tree[:4], chain, strict=True):
        assert torch.equal(a, b)
    slots = torch.arange(most, device=device)
    assert torch.equal(tree[4], slots.where(slots < chain[1][:, None] - 1, -1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["tree", "block"])
@pytest.mark.parametrize("given", ["lse", "rows", "probs", "one-hot"])
def test_logits_against_the_loop(given: str, mode: str, device: str) -> None:
    """Equal but for draws that rounding of exp decides."""
    batch, most, vocab = 48, 5, 3001
    g = torch.Generator().manual_seed(6)
    parents = torch.tensor([-1, -1, 0, 0, 2] if mode == "tree" else [-1, 0, 1, 2, 3])
    base = torch.randn(batch, most + 1, vocab, generator=g) * 3
    draft = base[:, parents + 1] + 0.5 * torch.randn(batch, most, vocab, generator=g)
    heat = torch.rand(batch, generator=g) + 0.5
    heat[::5] = 0
    settings = {"temperature": heat, "top_k": torch.full((batch,), 40)}
    columns = []
    for i in range(most):
        columns.append(
            ops.draft_sample(
                draft[:, i].to(device),
                **on(device, settings | seeds(batch)),
                turn=i,
                return_probs=True,
            )
        )
    tokens, lse, cutoff, probs = (
        torch.stack(c, 1).cpu() for c in list(zip(*columns, strict=True))[:4]
    )
    case: dict[str, Any] = {
        "target": base.flatten(0, 1),
        "draft_tokens": tokens,
        "cu_rows": torch.arange(batch + 1) * (most + 1),
    }
    case |= settings | seeds(batch)
    if given != "one-hot":
        case["draft"] = draft
    if given == "probs":
        case |= {"draft": probs, "draft_probs": True}
    if given == "lse":
        case |= {"draft_lse": lse, "draft_cutoff": cutoff}
    if mode == "tree":
        case["parents"] = parents.expand(batch, -1)
        got = ops.spec_verify_tree(**on(device, case))
        want, rows = modes.verify_tree_loop(**case), modes.verify_tree_vectorized(**case)
    else:
        got = ops.spec_verify(**on(device, case), block=True)
        want, rows = modes.verify_block_loop(**case), modes.verify_block_vectorized(**case)
    got = [t.cpu() for t in got]
    assert torch.equal(rows[0], want[0]) and torch.equal(rows[1], want[1])
    same = (got[0] == want[0]).all(1)
    assert same.float().mean() >= 0.9 and (got[1] == want[1]).float().mean() >= 0.97
    assert got[1].float().mean() > (1.1 if given == "one-hot" else 1.8)
    torch.testing.assert_close(got[2][same], want[2][same], rtol=1e-4, atol=1e-4)
    assert torch.equal(got[3], want[3])


def small_tree(p: Tensor, drafts: list[int], parents: list[int], **more: Any) -> tuple[Tensor, ...]:
    device = more.pop("device")
    case: dict[str, Any] = {
        "target": p,
        "draft_tokens": torch.tensor([drafts]),
        "parents": torch.tensor([parents]),
        "cu_rows": torch.tensor([0, len(drafts) + 1]),
        "target_probs": True,
        "draft_probs": more.get("draft") is not None,
        "uniforms": torch.full((1, len(drafts) + 1), 0.5, dtype=torch.float64),
    }
    return tuple(t.cpu() for t in ops.spec_verify_tree(**on(device, case | more)))


@pytest.mark.parametrize("device", DEVICES)
def test_exact_trees(device: str) -> None:
    # One-hot siblings that cover p: the last of them must be accepted, whatever its noise.
    p = torch.zeros(4, 9)
    p[0, [2, 4, 7]] = torch.tensor([0.25, 0.25, 0.5])
    p[1:, 1] = 1
    almost = torch.full((1, 4), 1 - 2**-24, dtype=torch.float64)
    tokens, count, logprobs, status, nodes = small_tree(
        p, [2, 4, 7], [-1, -1, -1], uniforms=almost, device=device
    )
    assert tokens.tolist() == [[7, 1, -1, -1]] and nodes.tolist() == [[2, -1, -1]]
    assert count == 2 and status == 0 and abs(logprobs[0, 0] - math.log(0.5)) < 1e-6

    # Refused siblings are not drawn; a node's child is not tried before the node is accepted.
    tokens, count, _, _, nodes = small_tree(
        p, [2, 1, 4], [-1, 0, -1], uniforms=almost, device=device
    )
    assert tokens.tolist() == [[7, -1, -1, -1]] and (nodes == -1).all() and count == 1

    # Parents may stand behind their children; unreachable nodes and -1 are skipped.
    tokens, _, _, status, nodes = small_tree(
        p, [1, 7, -1], [1, -1, -1], uniforms=torch.zeros(1, 4).double(), device=device
    )
    assert tokens.tolist() == [[7, 1, 1, -1]] and nodes.tolist() == [[1, 0, -1]] and status == 0
    tokens, count, _, status, _ = small_tree(p, [2, 4, 12], [0, 9, -1], device=device)
    assert status == ref.BAD_PARENT | ref.BAD_TOKEN and count == 1 and tokens[0, 0] == 7

    # q == p: the first sibling is accepted; a sibling with q(d) = 0 never is.
    q = p[:1].expand(1, 3, 9).clone()
    tokens, count, _, _, nodes = small_tree(
        p, [4, 2, 7], [-1, -1, -1], draft=q, uniforms=almost, device=device
    )
    assert nodes[0, 0] == 0 and tokens[0, 0] == 4
    tokens, count, _, status, nodes = small_tree(
        p, [5, 2, 7], [-1, -1, -1], draft=q, uniforms=almost, device=device
    )
    # The refused first (which q cannot have drawn) would leave nothing: it takes nothing.
    assert status == ref.EMPTY_RESIDUAL and nodes[0, 0] == 1

    # Greedy: the child that is the argmax.
    tokens, count, _, _, nodes = small_tree(
        p, [2, 7, 1], [-1, -1, 1], temperature=torch.zeros(1), device=device
    )
    assert tokens.tolist() == [[7, 1, 1, -1]] and nodes.tolist() == [[1, 2, -1]] and count == 3


@pytest.mark.parametrize("device", DEVICES)
def test_exact_blocks(device: str) -> None:
    p = torch.rand(4, 70, generator=torch.Generator().manual_seed(0)).softmax(-1)
    case = {
        "target": p,
        "draft_tokens": torch.tensor([[3, 9, 69]]),
        "cu_rows": torch.tensor([0, 4]),
        "draft": p[None, :3],
        "target_probs": True,
        "draft_probs": True,
        "uniforms": torch.full((1, 4), 1 - 2**-53, dtype=torch.float64),
    }
    tokens, count, _, status = ops.spec_verify(**on(device, case), block=True)
    assert count == 4 and tokens[0, :3].tolist() == [3, 9, 69] and status == 0
    case["draft_tokens"] = torch.tensor([[3, -1, 69]])  # drafts end at -1
    tokens, count, _, _ = ops.spec_verify(**on(device, case), block=True)
    assert count == 2 and tokens[0, 0] == 3 and tokens[0, 2] == -1
    # A first draft less likely than drafted, made up for by the second: both are kept, where one
    # by one the first is refused.
    p, q = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]), torch.tensor([[1.0, 0], [0.5, 0.5]])
    case |= {"target": p, "draft": q[None], "draft_tokens": torch.tensor([[0, 0]])}
    case |= {"cu_rows": torch.tensor([0, 3]), "uniforms": torch.full((1, 3), 0.6).double()}
    assert ops.spec_verify(**on(device, case))[1] == 1
    assert ops.spec_verify(**on(device, case), block=True)[1] == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["tree", "block"])
@pytest.mark.parametrize("probs", [False, True])
def test_garbage_never_leaves_the_vocabulary(probs: bool, mode: str, device: str) -> None:
    g = torch.Generator().manual_seed(4)
    bits = torch.randint(-(2**31), 2**31, (200, 130), generator=g, dtype=torch.int64)
    values = bits.to(torch.int32).view(torch.float32)
    values[5], values[9] = math.nan, -math.inf
    drafts = torch.randint(-3, 140, (50, 3), generator=g)
    case = {"target": values, "draft_tokens": drafts, "cu_rows": torch.arange(0, 201, 4)}
    case |= {"draft": values[:150].reshape(50, 3, 130), "target_probs": probs, "draft_probs": probs}
    case |= seeds(50)
    case["temperature"] = torch.rand(50, generator=g) - 0.2
    if not probs:
        case["top_k"] = torch.randint(-2, 140, (50,), generator=g)
        case["top_p"] = torch.rand(50, generator=g) * 1.5 - 0.2
        case["min_p"] = torch.rand(50, generator=g) - 0.5
    if mode == "tree":
        case["parents"] = torch.randint(-2, 4, (50, 3), generator=g)
        result = ops.spec_verify_tree(**on(device, case))
    else:
        result = ops.spec_verify(**on(device, case), block=True)
    tokens, count, _, status = (t.cpu() for t in result[:4])
    inside = torch.arange(4) < count[:, None]
    assert ((tokens >= 0) & (tokens < 130))[inside].all() and (tokens[~inside] == -1).all()
    assert (count >= 1).all() and (count <= 4).all() and status.any()


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["tree", "block"])
@pytest.mark.parametrize("probs", [True, False])
def test_batch_and_grid_do_not_matter(probs: bool, mode: str) -> None:
    """Alone, among few and among many: other cluster sizes, the same bits. And 20 repeats."""
    batch, most, vocab = 300, 3, 40000
    g = torch.Generator(device="cuda").manual_seed(0)
    target = torch.randn(batch, 4, vocab, generator=g, device="cuda")
    parents = torch.tensor([-1, -1, 0] if mode == "tree" else [-1, 0, 1], device="cuda")
    noise = torch.randn(batch, most, vocab, generator=g, device="cuda")
    draft = target[:, parents + 1] + 0.5 * noise
    if not probs:  # drafts from what the target keeps: outside of it all would be rejected
        kept = target[:, parents + 1].topk(300, dim=-1)
        draft = torch.full_like(draft, -torch.inf).scatter_(-1, kept.indices, kept.values)
        draft += 0.5 * noise
    drafts = torch.multinomial(draft.softmax(-1).flatten(0, 1), 1, generator=g).view(batch, most)
    if probs:
        target, draft = target.softmax(-1), draft.softmax(-1)
    given = on("cuda", seeds(batch))
    if not probs:
        given |= {"top_k": torch.full((batch,), 300, device="cuda")}

    def run(chosen: Tensor) -> tuple[Tensor, ...]:
        cu_rows = torch.arange(len(chosen) + 1, device="cuda") * 4
        case: dict[str, Any] = {k: v[chosen] for k, v in given.items()}
        case |= {"target": target[chosen].flatten(0, 1), "draft_tokens": drafts[chosen]}
        case |= {"cu_rows": cu_rows, "draft": draft[chosen]}
        case |= {"target_probs": probs, "draft_probs": probs}
        if mode == "block":
            return ops.spec_verify(**case, block=True)
        return ops.spec_verify_tree(**case, parents=parents.expand(len(chosen), -1))

    everyone = torch.arange(batch, device="cuda")
    want = run(everyone)
    assert 1.2 < want[1].float().mean() < 3.9
    for chosen in (everyone.flip(0), everyone[:1], everyone[7:47], everyone[100:240:2]):
        for a, b in zip(run(chosen), want, strict=True):
            assert torch.equal(a, b[chosen])
    for _ in range(20):
        for a, b in zip(run(everyone), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_as_many_drafts_as_there_may_be(device: str) -> None:
    for most in (17, 256):
        case = tree_case(4, most, 17, torch.float32, 5) | seeds(4)
        case["cu_rows"] = torch.arange(5) * (most + 1)
        rows = int(case["cu_rows"][-1])
        case["target"] = torch.rand(rows, 17, generator=torch.Generator().manual_seed(1)).softmax(1)
        assert_equal(ops.spec_verify_tree(**on(device, case)), modes.verify_tree_loop(**case))
        # Equal laws but for the last: all but it pass.
        del case["parents"]
        case["draft"] = case["target"].view(4, most + 1, 17)[:, :most].clone()
        case["draft"][:, -1] = torch.nn.functional.one_hot(torch.tensor(3), 17)
        case["draft_tokens"] = torch.full((4, most), 3)
        got = ops.spec_verify(**on(device, case), block=True)
        assert_equal(got, modes.verify_block_loop(**case))
        assert (got[1] >= most).all()


def test_mistakes() -> None:
    case = tree_case(2, 2, 8, torch.float32, 1) | seeds(2)
    op = torch.ops.quantgemm.spec_verify
    with pytest.raises(ValueError, match="block: expected without parents"):
        op(**case, block=True)
    with pytest.raises(ValueError, match=r"parents: expected shape \[num_sequences, max_drafts\]"):
        op(**case | {"parents": case["parents"][:1]})
    with pytest.raises(TypeError, match=r"parents: expected torch.int64, got torch.int32"):
        op(**case | {"parents": case["parents"].int()})
    wide = torch.zeros(1, 257, dtype=torch.int64)
    with pytest.raises(ValueError, match="at most 256 drafts of a tree or a block, got 257"):
        op(case["target"], wide, torch.tensor([0, 1]), **seeds(1), block=True)
    maps = {"target_to_draft": torch.arange(8), "draft_to_target": torch.arange(8)}
    with pytest.raises(ValueError, match="draft_to_target: expected without target_to_draft"):
        ops.spec_verify_tree(**case | maps)
    with pytest.raises(ValueError, match="turn: expected 0 to 255, got 256"):
        ops.draft_sample(case["target"][:2], **seeds(2), turn=256)
