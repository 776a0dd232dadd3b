"""A small model drafts tokens and the embedded one checks several in a step: the same answer.

The engine's own step, without an engine: one sequence, greedy.
"""

import numpy as np

from pyllamabatch import Model, SamplingParams
from pyllamabatch.llama.context import Context
from pyllamabatch.models import default_draft_path
from pyllamabatch.step.draft_model import DraftModel
from pyllamabatch.step.stepper import SAMPLE, Stepper

MOST = 4  # drafted tokens in a step
message = {"role": "user", "content": "Repeat after me: every good draft saves a step."}

with (
    Model.default() as model,
    Model(default_draft_path()) as small,
    Context(model, n_ctx=512) as context,
    Stepper(context, n_draft_max=MOST) as stepper,
):
    draft = DraftModel(small, stepper, n_ctx=512)
    prompt = model.vocab.tokenize(model.vocab.apply_chat_template([message]), parse_special=True)
    n, rows = len(prompt), stepper.rows
    for drafted in (False, True):
        context.memory.clear()
        stepper.set_slot(0, SamplingParams(temperature=0, max_tokens=100), prompt)
        rows.token[:n], rows.pos[:n], rows.seq[:n], rows.flags[:n] = prompt, np.arange(n), 0, 0
        rows.flags[n - 1] = SAMPLE
        result = stepper.step(n)
        answer, n_steps = result.token.tolist(), 1
        draft.begin(0, np.append(prompt, answer))
        while not result.finish.any():
            if drafted:
                stepper.drafts.n_most[0] = MOST
                draft.draft([0])
            result = stepper.run([0], 1)
            answer, n_steps = answer + result.token.tolist(), n_steps + 1
        text = model.vocab.detokenize(answer, remove_special=True)
        print(f"{'with' if drafted else 'without'} a draft: {n_steps} steps: {text}")
    draft.close()
