"""Schedules of alpha and beta."""

from dr2dist.coefficients.schedule import Coefficients, Knot, Schedule

__all__ = ["Coefficients", "Knot", "Schedule"]
