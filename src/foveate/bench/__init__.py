"""Clocks, memory and calibration."""
