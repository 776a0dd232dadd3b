"""The raw loop on a profile machine, and the loop that suits a case."""

import numpy as np

from pyllamabatch.compare.case import Case
from pyllamabatch.compare.loop import Loop, LoopSequence
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.machine.context import MachineContext
from pyllamabatch.machine.profile_machine import NO_TOKENS, ProfileMachine
from pyllamabatch.step.sampling_params import INT32_MAX, SamplingParams
from pyllamabatch.step.types import SAMPLE


class MachineLoop(Loop):
    """The same steps, which take what the machine's profile says and sample nothing."""

    def __init__(self, context: MachineContext) -> None:
        self._sequences: dict[int, LoopSequence] = {}
        self._n_batch = context.n_batch
        self._device = context.device

    def close(self) -> None:
        for seq in list(self._sequences):
            self.stop(seq)

    def _begin(self, seq: int, seed: int) -> None:
        params = SamplingParams(max_tokens=INT32_MAX, seed=seed)
        self._device.put_slot(seq, self._device.new_slot(params, NO_TOKENS), report=True)

    def _end(self, seq: int) -> None:
        self._device.clear_slot(seq)
        self._device.seq_rm(seq)

    def _compute(self, taken: dict[int, int]) -> dict[int, int]:
        device, end = self._device, 0
        decode = [seq for seq in sorted(taken) if self._sequences[seq].decoding]
        for seq in sorted(taken.keys() - decode):
            s, n = self._sequences[seq], taken[seq]
            rows = slice(end, end := end + n)
            device.rows.token[rows], device.rows.pos[rows] = s.left[:n], range(s.pos, s.pos + n)
            device.rows.seq[rows], device.rows.flags[rows] = seq, 0
            if n == len(s.left):
                device.rows.flags[end - 1] = SAMPLE
        run = device.compute(np.array(decode, np.int32), 1, end)
        device.recorded.clear()  # it has no reader
        return {slot: token for slot, token, _, _ in run.results}


def open_loop(model: Model, case: Case) -> Loop:
    """A context of its own, on `model` or on the case's profile machine, and a loop on it."""
    params = case.context_params()
    if not case.machine:
        return Loop(Context(model, **params), case.sampling)
    return MachineLoop(MachineContext(ProfileMachine.named(case.machine), model, **params))
