"""The prompts of the speculation bench."""

from collections import Counter

from bench.texts import FREE, KINDS, REPEATING, texts


def test_there_are_eight_of_each_repeating_kind_and_24_chats() -> None:
    found = Counter(text.kind for text in texts())
    assert found == {**dict.fromkeys(REPEATING, 8), FREE: 24}
    assert set(found) == set(KINDS)


def test_they_differ_and_are_short() -> None:
    prompts = [text.prompt for text in texts()]
    assert len(set(prompts)) == len(prompts)
    assert all(10 < len(prompt) < 1300 for prompt in prompts)


def test_those_that_are_repeated_are_longer_than_chats() -> None:
    longest_chat = max(len(text.prompt) for text in texts() if text.kind == FREE)
    assert all(len(text.prompt) > 4 * longest_chat for text in texts() if text.kind != FREE)
