"""Embeddings of n-grams: which rows they read, what is dropped, and how their gradients reach the table."""

import itertools

import pytest
import torch

from nanorun.config import resolve
from nanorun.dropout import row_keys
from nanorun.errors import UserError
from nanorun.ngrams import NgramEmbedding
from nanorun.optim.build import OptimizerSet, create
from nanorun.optim.sparse_adam import rows_of
from nanorun.tracks import load_track

NGRAMS = ("model.ngrams=[2,3]", "model.ngram_buckets=4096")
SPARSE = ("optim.table.name=sparse_adam", "optim.table.lr=0.01")


def filled(lengths=(2, 3), n_buckets=64, vocab_size=5):
    tables = NgramEmbedding(lengths, n_buckets, 4, vocab_size)
    torch.nn.init.normal_(tables.weight, generator=torch.Generator().manual_seed(0))
    return tables


def test_ngrams_that_fit_their_table_have_a_row_each_and_the_others_share_within_their_own():
    pairs = torch.tensor(list(itertools.product(range(5), repeat=3)))
    rows_NBT = filled().rows(pairs)
    bigrams, trigrams = rows_NBT[:, 2, 0], rows_NBT[:, 2, 1]
    assert len(bigrams.unique()) == 25
    assert bigrams.max() < 64 <= trigrams.min()
    assert trigrams.max() < 128
    assert 45 < len(trigrams.unique()) < 65  # 125 codes thrown at 64 rows leave about 9 empty


def test_an_ngram_is_read_from_its_last_tokens_alone_and_differs_at_a_rows_start():
    rows_BTN = filled().rows(torch.tensor([[4, 0, 1, 2], [3, 0, 1, 2], [1, 2, 1, 2]]))
    assert torch.equal(rows_BTN[0, 3], rows_BTN[1, 3])
    assert torch.equal(rows_BTN[0, 2, 0], rows_BTN[1, 2, 0])
    assert rows_BTN[0, 1, 0] != rows_BTN[1, 1, 0]
    assert rows_BTN[2, 1, 0] == rows_BTN[2, 3, 0] == rows_BTN[0, 3, 0]
    assert rows_BTN[2, 1, 1] != rows_BTN[2, 3, 1]


def test_documents_kept_apart_have_the_rows_that_each_has_alone():
    tables, begins = filled((2, 3, 6)), 4
    idx_BT = torch.tensor([[2, 3, 4, 0, 1, 1, 2, 4, 4, 3, 3], [4, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]])
    found_BTN = tables.rows(idx_BT, begins)
    ends = ([0, 2, 7, 8, 11], [0, 11])
    for row, places in enumerate(ends):
        alone = [tables.rows(idx_BT[row : row + 1, a:b])[0] for a, b in itertools.pairwise(places)]
        assert torch.equal(found_BTN[row], torch.cat(alone))
    # Without the switch the first row's n-grams reach over.
    assert torch.equal(found_BTN[1], tables.rows(idx_BT)[1])
    assert not torch.equal(found_BTN[0], tables.rows(idx_BT)[0])


def test_compiled_code_takes_the_rows_by_one_operation():
    called = []

    def count(graph, inputs):
        called.extend(node for node in graph.graph.nodes if node.op == "call_function")
        return graph

    tables, idx_BT = filled((2, 3, 6)), torch.tensor([[4, 0, 1, 2, 3, 3, 1, 0]])
    compiled = torch.compile(tables.rows, backend=count)
    try:
        assert torch.equal(compiled(idx_BT), tables.rows(idx_BT))
    finally:
        torch._dynamo.reset()
    # Written out by the compiler, the numbers of a trigram alone came to 18,000 lines.
    assert len(called) == 1


def test_the_sum_is_that_of_the_rows_and_dropping_keeps_whole_ngrams_and_the_mean():
    tables = filled()
    idx_BT = torch.randint(5, (64, 32), generator=torch.Generator().manual_seed(1))
    each_BTNC = tables.weight[tables.rows(idx_BT)]
    torch.testing.assert_close(tables(idx_BT, None, 0.0), each_BTNC.sum(2))
    dropped_BTC = tables(idx_BT, row_keys(0, 0, 64, torch.device("cpu")), 0.5)
    options = torch.stack([a * each_BTNC[:, :, 0] + b * each_BTNC[:, :, 1] for a in (0, 2) for b in (0, 2)])
    distances = (options - dropped_BTC).norm(dim=-1)
    assert distances.min(0).values.max() < 1e-5
    shares = torch.bincount(distances.argmin(0).flatten(), minlength=4) / idx_BT.numel()
    assert (shares - 0.25).abs().max() < 0.05


def test_a_sparse_gradient_holds_what_the_dense_one_does():
    idx_BT = torch.randint(5, (3, 8), generator=torch.Generator().manual_seed(1))
    dense, sparse = filled(), filled()
    sparse.sparse = True
    keys = row_keys(0, 0, 3, torch.device("cpu"))
    for tables in (dense, sparse):
        tables(idx_BT, keys, 0.5).square().sum().backward()
    assert sparse.weight.grad.is_sparse
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)
    for one, other in zip(rows_of(sparse.weight.grad), rows_of(dense.weight.grad), strict=True):
        torch.testing.assert_close(one, other)


def test_sparse_adam_on_rows_that_all_have_gradients_is_adam():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(6, 3)) for _ in range(2))
    one = create("sparse_adam", [ours], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    other = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(5):
        grad = torch.randn(6, 3, generator=generator)
        ours.grad, theirs.grad = grad.to_sparse(1), grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs)


def test_sparse_adam_leaves_rows_without_a_gradient_and_counts_each_rows_steps():
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = create("sparse_adam", [parameter], lr=0.1, eps=1e-10, weight_decay=0.5)
    for rows in ([0], [0, 1]):
        grad = torch.zeros(3, 2)
        grad[rows] = 1.0
        parameter.grad = grad.to_sparse(1)
        optimizer.step()
    # The gradient is 1 throughout, so each step is lr, and the decay 0.05 of the row.
    first = 1 * 0.95 - 0.1
    wanted = [[first * 0.95 - 0.1] * 2, [first] * 2, [1.0] * 2]
    torch.testing.assert_close(parameter.detach(), torch.tensor(wanted))
    assert optimizer.state[parameter]["row_steps"].tolist() == [2, 1, 0]


def losses(stepper, n_steps=6):
    return [float(stepper.step(step, 1.0).loss) for step in range(n_steps)]


@pytest.mark.parametrize("extra", [(), ("model.ngram_dropout=0.4",), ("train.grad_clip=0.1",)])
def test_a_run_with_sparse_gradients_has_the_losses_of_one_with_dense_ones(make_stepper, extra):
    sparse = make_stepper(*NGRAMS, *SPARSE, *extra, "train.micro_batch_rows=3")
    dense = make_stepper(*NGRAMS, *SPARSE, *extra, "train.micro_batch_rows=8")
    assert sparse.model.ngrams.sparse
    dense.model.ngrams.sparse = False
    found = losses(sparse)
    assert found == pytest.approx(losses(dense), abs=2e-5)
    assert found[-1] < found[0]


def test_an_optimizer_that_takes_no_sparse_gradients_gets_dense_ones(make_stepper):
    stepper = make_stepper(*NGRAMS)
    losses(stepper, 2)
    assert not stepper.model.ngrams.sparse
    assert stepper.optimizers.table()[1].role == "table"


def test_the_tables_take_the_embeddings_optimizer_where_none_is_named_for_them(make_stepper):
    stepper = make_stepper(*NGRAMS, "optim.embedding.name=sgd", "optim.embedding.lr=0.5")
    named = {row.role: row.optimizer for row in stepper.optimizers.table()}
    assert named["table"] == named["embedding"] == "sgd"
    assert named["head"] == "adamw"


def test_steps_that_are_left_out_copy_no_table():
    class BadOnTheDevice:
        device = torch.device("cuda")

        def __bool__(self):
            return True

    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = create("sparse_adam", [parameter], lr=0.1)
    parameter.grad = torch.full((3, 2), torch.nan)
    # What does not read the flag on the host is put back from a copy of all that there is.
    OptimizerSet([optimizer], ["sparse_adam"]).step(skip=BadOnTheDevice())
    assert torch.equal(parameter, torch.ones(3, 2))
    assert not optimizer.state


def test_a_table_cannot_take_an_optimizer_of_matrices(make_stepper):
    with pytest.raises(UserError, match="muon cannot take the role 'table'"):
        make_stepper(*NGRAMS, "optim.table.name=muon", "optim.table.lr=0.1")


def test_lengths_twice_or_out_of_order_are_refused():
    with pytest.raises(UserError, match="shortest first"):
        resolve(load_track("shakespeare-sprint"), "muon", ["model.ngrams=[3,2]"])
