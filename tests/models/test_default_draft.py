"""The draft that ships beside the embedded model: its size, its vocabulary, its agreement."""

import pytest

from pyllamabatch import Model
from pyllamabatch.llama.context import Context
from pyllamabatch.models import default_draft_path, default_model_path
from pyllamabatch.step.draft_model import check_same_vocabulary
from tools.recipe.default_model.evaluate import agreement


def test_the_file_is_at_most_1_mib_and_has_the_model_s_vocabulary() -> None:
    assert default_draft_path().stat().st_size <= 1 << 20
    with (
        Model(default_draft_path(), n_gpu_layers=0) as draft,
        Model(default_model_path(), vocab_only=True) as model,
    ):
        check_same_vocabulary(draft.vocab, model.vocab)
        assert draft.n_ctx_train == 2048


@pytest.mark.parametrize(
    ("kind", "least"), [("copy", 0.85), ("upper", 0.85), ("qa", 0.8), ("sort", 0.7), ("add", 0.3)]
)
def test_it_agrees_with_the_model(kind: str, least: float) -> None:
    with (
        Model(default_draft_path(), n_gpu_layers=0) as draft,
        Context(draft, n_threads=1, n_threads_batch=1) as context,
    ):
        assert least < agreement(context, kind, 25) < 1
