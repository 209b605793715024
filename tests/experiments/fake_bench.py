"""Made-up measurements: a bench whose candidates take the times that a test gives them."""

import dataclasses

from experiments.bench.candidates import Configured
from pallas_kernels.decode_experts import ExpertShapes

SHAPES = ExpertShapes(E=8, K=2, H=128, I=128)


class FakeTrial:
    def __init__(self, bench, candidate: Configured):
        self.bench, self.candidate = bench, candidate

    def check(self) -> float:
        if self.candidate in self.bench.wrong:
            raise AssertionError("relative error 4.00e-03 of the bfloat16 output is above 1.8e-03")
        return 1.65e-3

    def sample(self) -> float:
        self.bench.sampled.append(self.candidate)
        return self.bench.us(self.candidate, len(self.bench.sampled))

    def finish(self) -> None:
        if self.candidate in self.bench.changing:
            raise AssertionError("the chain's bits changed from one run to another")


@dataclasses.dataclass(eq=False)
class FakeBench:
    """us(candidate, how many samples were taken before and with it) -> microseconds.

    Attributes:
      broken: candidates that do not compile; wrong: whose error is too large; changing: whose bits
        change.
      built, sampled: the candidates, in order.
    """

    us: callable = lambda candidate, count: 10.0
    broken: tuple = ()
    wrong: tuple = ()
    changing: tuple = ()
    built: list = dataclasses.field(default_factory=list)
    sampled: list = dataclasses.field(default_factory=list)

    def at(self, T: int):
        return self.build

    def build(self, candidate: Configured) -> FakeTrial:
        self.built.append(candidate)
        if candidate in self.broken:
            raise ValueError("no layout for this tile")
        return FakeTrial(self, candidate)
