"""Many users at once with asyncio: each one prints tokens as they come, and one gives up."""

import asyncio

from pyllamabatch import Engine, Model, SamplingParams

PROMPTS = {
    "Ann": "Count from 1 to 20.",
    "Ben": "Uppercase: all of us share one batch",
    "Cem": "Sort the numbers: 9 3 7 1",
    "Dea": "Count from 1 to 25.",  # leaves after ten tokens
}


async def user(name: str, engine: Engine, model: Model) -> None:
    chat = [{"role": "user", "content": PROMPTS[name]}]
    prompt = model.vocab.apply_chat_template(chat)
    params = SamplingParams(temperature=0, max_tokens=80)
    text = ""
    async for token in engine.stream(prompt, params):
        text += token.text
        if name == "Dea" and token.index == 9:
            break  # leaving the loop cancels the request: its cells are free for others
    print(f"{name}: {text}")


async def main() -> None:
    with Model.default() as model, Engine(model, n_seq_max=len(PROMPTS)) as engine:
        await asyncio.gather(*(user(name, engine, model) for name in PROMPTS))
        print("finished:", engine.stats().finished)


asyncio.run(main())
