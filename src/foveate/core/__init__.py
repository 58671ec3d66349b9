"""The shared language: schedules, plans, protocols, costs and traces; torch types only."""
