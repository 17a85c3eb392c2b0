"""How a quantised KV cache lies in TVM's, where keys, values, queries and outputs have one dtype and one width.

They lie in entries of bytes. An entry is what is cached of a token's key or value head:
[not STORED_KV_SCALES] its quantised values, a byte each, and their scale, a float32, lowest byte first.
[STORED_KV_SCALES] its quantised values, a byte each.
A token's queries and outputs, float32 [num_heads, head_dim], fill as many entries as they need, one after the other.
"""

STORED_KV_SCALES = False  # flag: a layer has a scale for keys and one for values, from the checkpoint

ENTRY_DTYPE = "int8"


def entry_size(head_dim: int) -> int:
    """Bytes that are cached of a head."""
    return head_dim if STORED_KV_SCALES else head_dim + 4


def query_entries(num_heads: int, head_dim: int) -> int:
    """Entries that hold a token's queries: an even number, for head_dim is even, and a row is to be whole float32."""
    pair = 2 * entry_size(head_dim)
    return -(-num_heads * head_dim * 4 // pair) * 2
