"""A drafter of one's own: what came after the last two tokens before comes again. The same answers.

An engine's default policy drafts where that pays. This one always does, so that there is something
to see with a model that is computed in no time. From the command line the drafter is
`pyllamabatch generate --speculate examples/own_drafter.py:Again …`.
"""

from pyllamabatch import Engine, Model, SamplingParams
from pyllamabatch.engine.drafters import Wanted
from pyllamabatch.scheduler import ComposedPolicy, PlanBuilder
from pyllamabatch.scheduler.policy import Speculation


class Again:
    def draft(self, wanted: list[Wanted]) -> list[list[int]]:
        return [self.after(one.tokens.tolist(), one.n) for one in wanted]

    def after(self, tokens: list[int], n: int) -> list[int]:
        for i in range(len(tokens) - 3, 0, -1):
            if tokens[i - 1 : i + 1] == tokens[-2:]:
                return tokens[i + 1 : i + 1 + n]
        return []


def always(builder: PlanBuilder) -> Speculation:
    drafts = builder.view.drafts
    return Speculation(dict.fromkeys(drafts().ids, 4) if drafts else {}, 1)


if __name__ == "__main__":
    chat = [{"role": "user", "content": "Repeat after me: good drafts are good drafts."}]
    with Model.default() as model:
        for drafter in (None, Again()):
            policy = ComposedPolicy(speculate=always) if drafter else None
            with Engine(model, policy=policy, speculate=drafter) as engine:
                answer = engine.chat(chat, SamplingParams(temperature=0)).message.content
                stats = engine.stats()
            print(f"{stats.steps} steps, {stats.accepted_tokens} drafts were right: {answer}")
