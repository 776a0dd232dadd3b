"""What an installed wheel must do, with nothing but the wheel and pytest."""

import pyllamabatch
from pyllamabatch.raw import ffi, lib


def test_sixteen_prompts_at_once_through_the_embedded_model() -> None:
    prompts = [f"Prompt {i}" for i in range(16)]
    params = pyllamabatch.SamplingParams(temperature=0, max_tokens=8)
    with pyllamabatch.Model.default() as model, pyllamabatch.Engine(model) as engine:
        results = engine.generate(prompts, params)
    assert all(result.n_generated > 0 for result in results)


def test_the_cpu_backend_is_there() -> None:
    assert lib.ggml_cpu_has_avx2() in (0, 1)
    names = [
        ffi.string(lib.ggml_backend_dev_name(lib.ggml_backend_dev_get(i)))
        for i in range(lib.ggml_backend_dev_count())
    ]
    assert any(name.startswith(b"CPU") for name in names)
