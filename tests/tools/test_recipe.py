"""The tasks that the embedded model was trained on: repeatable, right, and split for good."""

import random
import re

import pytest

from tools.recipe.default_model import tasks, tokenizer, world


@pytest.mark.parametrize("kind", tasks.TASKS)
def test_tasks_depend_on_the_seed_alone(kind: str) -> None:
    assert tasks.make_tasks(kind, 20, seed=3) == tasks.make_tasks(kind, 20, seed=3)
    assert tasks.make_tasks(kind, 20, seed=3) != tasks.make_tasks(kind, 20, seed=4)


@pytest.mark.parametrize("kind", tasks.TASKS)
def test_the_splits_share_no_prompt(kind: str) -> None:
    rng = random.Random(0)
    train = {tasks.make_task(kind, rng, "train").prompt for _ in range(1000)}
    held_out = {tasks.make_task(kind, rng, "held_out").prompt for _ in range(200)}
    assert train.isdisjoint(held_out)


def test_a_held_out_sum_is_held_out_in_every_wording() -> None:
    rng = random.Random(0)
    wordings = ("What is 2 + 3?", "Calculate 3 + 2.", "2 + 3 =", "Add 3 and 2.")
    small = {t.prompt for t in (tasks.make_task("add", rng, "train") for _ in range(20_000))}
    seen = {wording in small for wording in wordings}
    assert seen == {tasks.split_of("add", "2+3") == "train"}


def test_one_problem_in_sixteen_is_held_out() -> None:
    held_out = sum(tasks.split_of("copy", str(i)) == "held_out" for i in range(16_000))
    assert 900 < held_out < 1100


def test_every_piece_of_knowledge_is_asked_for_in_training() -> None:
    for questions, answer in world.KNOWLEDGE:
        assert any(tasks.split_of("qa", question) == "train" for question in questions), answer


@pytest.mark.parametrize("kind", ["add", "subtract"])
def test_sums_are_right(kind: str) -> None:
    sign = {"add": 1, "subtract": -1}[kind]
    for task in tasks.make_tasks(kind, 200, seed=7):
        first, second = (int(number) for number in re.findall(r"\d+", task.prompt))
        if task.prompt.startswith("Subtract"):
            first, second = second, first
        assert first + sign * second == int(task.answer), task


@pytest.mark.parametrize("kind", ["recall", "recall_long"])
def test_a_recalled_value_is_stated_once_and_the_prompt_fits(kind: str) -> None:
    for task in tasks.make_tasks(kind, 200, seed=7):
        question = re.search(r"(?:of|is|does) (\w+)(?: mean)?\?$", task.prompt)
        assert question is not None, task
        values = re.findall(rf"\b{question[1]} (?:is|=|means) (\w+)[.;]", task.prompt)
        assert values == [task.answer], task
        assert len(tokenizer.encode(task.prompt)) < 2000
