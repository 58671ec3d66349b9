"""Time, memory and speed of this machine: policies measured beside each other in one process."""
