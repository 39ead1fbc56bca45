"""Ranges: the stages of a step as torch.profiler sees them, and nothing at all where nobody listens."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastem import ranges
from fastem.em import Known
from fastem.guidance import DPS, PiGDM, PosteriorMean
from fastem.models import GaussianEps
from fastem.operators import Observation
from fastem.samplers import DDIM, PhiloxNoise, sample
from fastem.schedules import Schedule

GUIDED = ["step", *(f"step/{name}" for name in ranges.STAGES)]
UNGUIDED = [name for name in GUIDED if name != "step/unet_vjp"]


def run(guidance, steps=2):
    observation = Observation.of(torch.rand(1, 3, 8, 8), torch.tensor([0.1]))
    noise = PhiloxNoise(torch.zeros(1, dtype=torch.int64), 1, (3, 8, 8))
    model, schedule = GaussianEps(torch.zeros(3, 8, 8), 0.25), Schedule.linear().respace(steps)
    return sample(model, observation, Known(torch.ones(1, 1, 1, 1)), guidance, schedule, noise=noise, rule=DDIM())


def recorded(action):
    """Names of the ranges, in the order they were entered."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        action()
    events = [event for event in prof.events() if event.name.split("/")[0] == ranges.STEP]
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]


@pytest.mark.parametrize(
    "guidance, stages", [(DPS(), GUIDED), (PosteriorMean(), UNGUIDED)], ids=["with a backward pass", "without one"]
)
def test_every_step_names_its_stages(guidance, stages):
    with ranges.listening():
        assert recorded(lambda: run(guidance)) == 2 * stages


def test_a_step_without_pull_has_no_backward_stage():
    with ranges.listening():
        names = recorded(lambda: run(PiGDM(compat="released"), steps=3))
    assert names.count("step/unet_vjp") == 2  # the released gain is 0 in the last step


def test_nobody_listens_by_default():
    assert recorded(lambda: run(DPS())) == []
    assert ranges.stage("a") is ranges.stage("b")  # one object for all: nothing is made


def test_an_error_closes_what_was_open():
    with ranges.listening():
        with pytest.raises(ZeroDivisionError), ranges.stage("outer"), ranges.stage("inner"):
            _ = 1 / 0
        assert recorded(lambda: run(PosteriorMean(), steps=1)) == UNGUIDED  # not outer/inner/step
    assert recorded(lambda: run(PosteriorMean(), steps=1)) == []


def test_results_do_not_depend_on_listening():
    torch.manual_seed(0)
    plain = run(DPS()).x
    torch.manual_seed(0)
    with ranges.listening():
        assert torch.equal(run(DPS()).x, plain)
