"""Paths, steps and the sampling loop of flow matching."""

from tiltflow.flow.paths import (
    interpolate,
    logit_normal_times,
    power_law_grid_times,
    power_law_times,
    velocity_to_eps,
    velocity_to_x0,
)
from tiltflow.flow.sampling import Dynamics, Trajectory, VelocityModel, guided_velocity, sample
from tiltflow.flow.steps import StepResult, cps_step, dance_sde_step, euler_step, sde_step, sigma_schedule

__all__ = [
    "Dynamics",
    "StepResult",
    "Trajectory",
    "VelocityModel",
    "cps_step",
    "dance_sde_step",
    "euler_step",
    "guided_velocity",
    "interpolate",
    "logit_normal_times",
    "power_law_grid_times",
    "power_law_times",
    "sample",
    "sde_step",
    "sigma_schedule",
    "velocity_to_eps",
    "velocity_to_x0",
]
