"""States where libllama's streams are copied late."""

import pytest

from pyllamabatch.errors import UnsupportedOperation
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from tests.support.decoding import decode


def test_no_state_is_loaded_where_a_copy_waits(model: Model) -> None:
    """libllama copies streams with the next decode: from or to cells that were loaded before it."""
    with Context(model, n_ctx=512 * 3, n_seq_max=3, kv_unified=False) as context:
        decode(context, [5, 6, 7], seq=0)
        decode(context, [8, 9], seq=1)
        data = context.state_seq_get(1)
        context.memory.seq_cp(0, 2)
        context.memory.seq_rm(0)
        for seq in (0, 2):
            with pytest.raises(UnsupportedOperation, match="waits for the next decode"):
                context.state_seq_set(data, seq)
        expected = decode(context, [4], pos=3, seq=2)
        context.state_seq_set(data, 0)
        assert context.memory.pos_max(0) == 1
        context.memory.clear()
        decode(context, [5, 6, 7], seq=2)
        assert (decode(context, [4], pos=3, seq=2) == expected).all()
