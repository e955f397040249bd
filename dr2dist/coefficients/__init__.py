"""Schedules of alpha and beta, and a guard that moves along one."""

from dr2dist.coefficients.guard import Bounds, Decision, Guard, Limits, Memory
from dr2dist.coefficients.schedule import Coefficients, Knot, Schedule

__all__ = ["Bounds", "Coefficients", "Decision", "Guard", "Knot", "Limits", "Memory", "Schedule"]
