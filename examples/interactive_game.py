"""A game loop: characters that speak when the game asks them, a token a frame.

An interactive sequence gives one token for each `sample()` and keeps its cells in between. Calls
that come together become one step: here each character has a thread, as a game server might.
"""

from concurrent.futures import ThreadPoolExecutor

from pyllamabatch import Engine, Model, SamplingParams, Sequence

SCRIPT = {"guard": "Repeat after me: halt", "merchant": "What is 12 + 30?", "cat": "Shout: meow"}
N_FRAMES = 30


def open_scene(sequence: Sequence, model: Model, line: str) -> None:
    chat = model.vocab.apply_chat_template([{"role": "user", "content": line}])
    sequence.prompt(chat)


with Model.default() as model, Engine(model, n_seq_max=4) as engine:
    cast = {name: engine.sequence(SamplingParams(temperature=0)) for name in SCRIPT}
    for name, sequence in cast.items():
        open_scene(sequence, model, SCRIPT[name])

    said, speaking = dict.fromkeys(cast, ""), list(cast)
    with ThreadPoolExecutor(len(cast)) as pool:
        for frame in range(N_FRAMES):
            tokens = pool.map(lambda name: cast[name].sample(), speaking)
            for name, token in zip(list(speaking), tokens, strict=True):
                if token.end:
                    print(f"frame {frame:2}: the {name} says {said[name]!r}")
                    speaking.remove(name)
                else:
                    said[name] += token.text

    # What if the guard had been asked something else? A fork shares the cells so far.
    with cast["guard"].fork() as other:
        print("the fork knows", other.position, "tokens without computing them again")
    for sequence in cast.values():
        sequence.close()
