"""The keys and values of one sequence, for the PyTorch paths."""

from torch import Tensor


def sequence_kv(k_pages: Tensor, v_pages: Tensor, table: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Tokens start … stop - 1 of a sequence. Views, nothing copied, when its pages follow one another.

    k_pages, v_pages: [pages, page_size, num_kv_heads, head_dim]
    table: [max_blocks] int, the sequence's page numbers
    -> keys, values [num_kv_heads, stop - start, head_dim]
    """
    page_size = k_pages.shape[1]
    block = start // page_size
    table = table[block : -(-stop // page_size)]
    numbers = table.tolist()
    first, count = numbers[0], len(numbers)
    if numbers == list(range(first, first + count)):
        k, v = k_pages[first : first + count], v_pages[first : first + count]
    else:
        k, v = k_pages[table], v_pages[table]
    tokens = slice(start - block * page_size, stop - block * page_size)
    return k.flatten(0, 1)[tokens].transpose(0, 1), v.flatten(0, 1)[tokens].transpose(0, 1)
