"""Deterministic solvers from x_T to x_0 with an unconstrained denoiser.

`ddim` and `plms` use the published timesteps (50 -> 981 … 1). `dpm++` (DPM-Solver++ 2M) and
`unipc` are diffusers' schedulers with noise levels uniform in log sigma: on the published
timesteps they are hardly better than DDIM. Source: DDIM, Eq. 12; PNDM (Liu et al. 2022), Eq. 12;
Lu et al. 2022; Zhao et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from raylarge.diffusion.schedule import Schedule
from raylarge.diffusion.steps import ddim, eps_of, x_0_of

Denoise = Callable[[Tensor, int], Tensor]
"""(x_t, t) -> the estimate of x_0."""


def solve(
    denoise: Denoise, x_t: Float[Tensor, "B ..."], schedule: Schedule, solver: str, count: int
) -> Float[Tensor, "B ..."]:
    """Return the sample x_0 that a solver computes from noise x_T in `count` steps.

    Raises:
        ValueError: an unknown solver, or more steps than the schedule has.
    """
    if solver not in SOLVERS:
        raise ValueError(f"there is no solver '{solver}'; choose one of: {', '.join(SOLVERS)}")
    return SOLVERS[solver](denoise, x_t, schedule, count)


def _ddim(denoise: Denoise, x_t: Tensor, schedule: Schedule, count: int) -> Tensor:
    for step in schedule.steps(count):
        x_t = ddim(x_t, denoise(x_t, step.t), step)
    return x_t


def _plms(denoise: Denoise, x_t: Tensor, schedule: Schedule, count: int) -> Tensor:
    """Adams-Bashforth on eps, up to fourth order; the first step is improved Euler."""
    steps = schedule.steps(count)
    past: list[Tensor] = []
    for step, following in zip(steps, [*steps[1:], steps[-1]], strict=True):
        eps = eps_of(x_t, denoise(x_t, step.t), step.abar)
        if past:
            weights = _ADAMS[len(past)]
            mixed = sum(w * e for w, e in zip(weights, [eps, *past], strict=True))
        else:
            x_prev = ddim(x_t, x_0_of(x_t, eps, step.abar), step)
            abar = float(schedule.abar[following.t])
            mixed = (eps + eps_of(x_prev, denoise(x_prev, following.t), abar)) / 2
        x_t = ddim(x_t, x_0_of(x_t, torch.as_tensor(mixed), step.abar), step)
        past = [eps, *past][:3]
    return x_t


_ADAMS = {
    1: (3 / 2, -1 / 2),
    2: (23 / 12, -16 / 12, 5 / 12),
    3: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def _library(name: str) -> Callable[[Denoise, Tensor, Schedule, int], Tensor]:
    """Return a solver that runs diffusers' scheduler of a name."""

    def run(denoise: Denoise, x_t: Tensor, schedule: Schedule, count: int) -> Tensor:
        import diffusers

        options = {"algorithm_type": "dpmsolver++"} if name.startswith("DPM") else {}
        scheduler = getattr(diffusers, name)(
            num_train_timesteps=schedule.length,
            trained_betas=schedule.betas.numpy(),
            prediction_type="sample",
            use_exponential_sigmas=True,
            **options,
        )
        schedule.steps(count)  # raises for counts that do not fit
        scheduler.set_timesteps(count)
        scheduler.set_begin_index(0)  # neighbouring noise levels may share a timestep
        for t in scheduler.timesteps:
            x_t = scheduler.step(denoise(x_t, int(t)), t, x_t, return_dict=False)[0]
        return x_t

    return run


SOLVERS: dict[str, Callable[[Denoise, Tensor, Schedule, int], Tensor]] = {
    "ddim": _ddim,
    "plms": _plms,
    "dpm++": _library("DPMSolverMultistepScheduler"),
    "unipc": _library("UniPCMultistepScheduler"),
}
