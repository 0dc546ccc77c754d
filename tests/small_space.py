"""A search space of one parameter."""

SPACE = {
    "about": "a test",
    "task": "classification",
    "metric": "top1",
    "parameters": {"losses.tdp": {"loguniform": [0.1, 10]}},
}
