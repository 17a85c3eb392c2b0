"""What the ranks of a model do together, in compiled code: `degree` is their number. One rank alone does none of it.

The library is the same on every rank: which of them it runs on is data.
"""

from collections.abc import Callable

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

LM_HEAD = True  # flag: the model has one


class FirstToken(nn.Parameter):
    """int32 [1]: the first token whose embedding a rank has. It stays an integer, whatever the model's dtype is."""

    def __init__(self) -> None:
        super().__init__((1,), "int32")

    def to(self, dtype: str | None = None) -> None:
        pass


def all_reduce(x: Tensor, degree: int) -> Tensor:
    """The sum of every rank's x."""
    return op.ccl_allreduce(x, "sum") if degree > 1 else x


def lookup(
    embedding: Callable[[Tensor], Tensor], ids: Tensor, rows: int, first: FirstToken | None, degree: int
) -> Tensor:
    """Embeddings of ids int32 [n], each of which one rank has -> [n, hidden].

    embedding: of ids [n], each less than `rows`, the number that a rank has
    first: None on one rank
    """
    if degree == 1:
        return embedding(ids)
    x = embedding(op.tensor_expr_op(_own_te, "own_ids", [ids, first, rows]))
    return all_reduce(op.tensor_expr_op(_masked_te, "masked", [x, ids, first, rows]), degree)


def _own_te(ids: te.Tensor, first: te.Tensor, rows: int) -> te.Tensor:
    """In a rank's rows; 0 for those of other ranks."""

    def own(i):
        row = ids[i] - first[0]
        return tirx.Select(tirx.all(row >= 0, row < rows), row, 0)

    return te.compute(ids.shape, own, "own_ids")


def _masked_te(x: te.Tensor, ids: te.Tensor, first: te.Tensor, rows: int) -> te.Tensor:
    """x, but zeros for ids of other ranks."""

    def value(i, j):
        row = ids[i] - first[0]
        return tirx.Select(tirx.all(row >= 0, row < rows), x[i, j], tirx.const(0, x.dtype))

    return te.compute(x.shape, value, "masked")


if LM_HEAD:

    def gather_logits(logits: Tensor, vocab_size: int, degree: int) -> Tensor:
        """Every rank's columns side by side, without those of padding: [m, vocab share] -> [m, vocab_size]."""
        if degree == 1:
            return logits
        m, share = logits.shape
        by_rank = op.reshape(op.ccl_allgather(logits, degree), (degree, m, share))
        rows = op.reshape(op.permute_dims(by_rank, [1, 0, 2]), (m, degree * share))
        return rows if vocab_size == degree * share else op.tensor_expr_op(_cut_te, "cut", [rows, vocab_size])

    def _cut_te(rows: te.Tensor, columns: int) -> te.Tensor:
        return te.compute((rows.shape[0], columns), lambda i, j: rows[i, j], "cut")
