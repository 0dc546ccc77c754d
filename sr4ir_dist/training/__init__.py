"""Training: schedules, step, engines, loop and what they need."""
