"""A chat of several turns. The prefix cache spares what was computed before.

Every turn sends the whole conversation. The engine finds the cells of the turns before it in the
cache, and computes the new tokens alone; or all of them, where a model as small as this one takes
no longer for that than copying the cells would.
"""

from pyllamabatch import Engine, Model, SamplingParams

questions = ["Copy: hello", "What is 17 + 25?", "Reverse: drawer"]

with Model.default() as model, Engine(model, n_seq_max=2) as engine:
    greedy = SamplingParams(temperature=0, max_tokens=32)
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    for question in questions:
        messages.append({"role": "user", "content": question})
        prompt = model.vocab.apply_chat_template(messages)
        result = engine.submit(prompt, greedy).result()
        messages.append({"role": "assistant", "content": result.text})
        print(f"{question} -> {result.text}")
    stats = engine.stats()
    print(f"{stats.prefix_tokens} of {stats.known_tokens} prompt tokens came from the cache")
